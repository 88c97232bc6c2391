"""A pass over a tree on an engine: one call, and one read-back of a few integers (`kernels.stream_told`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from gpt2_tvm.errors import UserError

if TYPE_CHECKING:
    from gpt2_tvm.engine import Engine

Rows = Sequence[Sequence[int] | np.ndarray]
TOLD = 2  # columns of what is told before the tokens, as in `kernels.stream_told`, which needs a compiler


@dataclass(frozen=True)
class Choices:
    """What streams think may follow: of each stream, in order, ids and their log-probabilities, the likeliest first."""

    ids: list[list[int]]
    logs: list[list[float]]


@dataclass(frozen=True)
class Told:
    """Of one sequence in one step: its new tokens, whether the last is too near a tie to be taken from here (then a
    decode step is to say it), and what may follow them."""

    tokens: list[int]
    doubtful: bool
    choices: Choices


@lru_cache(maxsize=512)
def _shape(parents: tuple[int, ...], width: int) -> np.ndarray:
    """A tree as int32 [3, width]: parents, masks (bit r of a row's: row r is itself or above it) and depths."""
    made = np.zeros((3, width), np.int64)
    made[0] = -1
    for j in range(width):
        parent = parents[j] if j < len(parents) else -1
        made[0, j] = parent
        made[1, j] = (made[1, parent] if parent >= 0 else 0) | 1 << j
        made[2, j] = made[2, parent] + 1 if parent >= 0 else 0
    return made.astype(np.uint32).view(np.int32)


class TreePass:
    """The pass of an engine with streams. What does not change from call to call stays on the device.

    Raises UserError for an artifact without streams.
    """

    def __init__(self, engine: Engine) -> None:
        plan = engine.artifact.streams
        if plan is None:
            raise UserError(f"{engine.artifact.path} was compiled without streams; compile with --streams FOLDER")
        self.engine = engine
        self.width, self.kept, self.streams = int(plan["rows"]), int(plan["kept"]), int(plan["streams"])
        self._given: tuple[Any, ...] = ()
        self._held: dict[Any, Any] | None = None  # the engine's tensors that `_given` was written to

    def inputs(self, ids: Rows, parents: Sequence[Sequence[int]]) -> list[Any]:
        """The arguments of the compiled function. As for `Engine.stream`, but nothing is checked."""
        engine, slots, width = self.engine, self.engine._slots, self.width
        given = tuple(map(tuple, parents))
        if self._held is not engine._tensors or given != self._given:
            shapes = np.zeros((3, slots, width), np.int32)
            for b, above in enumerate(given):
                shapes[:, b] = _shape(above, width)
            for name, array in zip(("stream_parents", "stream_masks", "stream_depths"), shapes, strict=True):
                engine._int(name, array)
            self._given, self._held = given, engine._tensors
        padded, lengths = np.zeros((slots, width), np.int32), np.zeros(engine.batch, np.int32)
        for b, row in enumerate(ids):
            padded[b, : len(row)] = row
            lengths[b] = len(row)
        tree = [engine._tensor(f"stream_{name}", (slots, width)) for name in ("parents", "masks", "depths")]
        return [engine._int("stream_ids", padded), *tree, *engine._where(lengths), engine._caches]

    def __call__(self, ids: Rows, parents: Sequence[Sequence[int]]) -> list[Told]:
        """Append the branch that stands of each sequence, and move its position past it."""
        engine = self.engine
        out = engine.runner.call(f"stream_b{engine._slots}", self.inputs(ids, parents))
        told = engine.runner.download(out[0])[: engine.batch]
        engine.positions = engine.positions + told[:, 0]
        engine._next, engine._tree = None, None
        count = (told.shape[1] - TOLD - self.kept) // (2 * self.streams)
        after = told[:, TOLD + self.kept :].reshape(-1, 2, self.streams, count)
        names, logs = after[:, 0].tolist(), np.ascontiguousarray(after[:, 1]).view(np.float32).tolist()
        rows = told[:, : TOLD + self.kept].tolist()
        return [Told(row[TOLD : TOLD + row[0]], bool(row[1]), Choices(names[b], logs[b])) for b, row in enumerate(rows)]

    def look(self, ids: Rows, parents: Sequence[Sequence[int]]) -> tuple[np.ndarray, ...]:
        """`Engine.stream`."""
        engine = self.engine
        out = engine.runner.call(f"look_b{engine._slots}", self.inputs(ids, parents))
        logits, streams, counts, kept = (engine.runner.download(out[i])[: engine.batch] for i in range(4))
        engine.positions = engine.positions + counts
        engine._next, engine._tree = None, None
        if self.kept == self.width:
            kept = np.broadcast_to(np.arange(self.width, dtype=np.int32), kept.shape)
        return logits, kept, streams
