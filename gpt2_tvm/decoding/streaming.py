"""Speculative streaming: the model drafts for itself, in the pass that checks its last draft (`gpt2_tvm.streams`).

Each step gives a tree of candidates, best paths first by what the streams said, and takes back what of it stands and
the streams' word on what may follow. Greedy only: which branch stands is decided on the device.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from gpt2_tvm.decoding.costs import Costs, DraftLength
from gpt2_tvm.decoding.rejection import near_tie
from gpt2_tvm.decoding.sampling import Sampling
from gpt2_tvm.decoding.speculative import TIE
from gpt2_tvm.decoding.strategy import SPARE, Strategy, TextRow, park
from gpt2_tvm.errors import UserError

if TYPE_CHECKING:
    from gpt2_tvm.engine import Engine

CHOICES = 4  # of each stream that are candidates at all


@dataclass
class Tree:
    """Tokens after a text: ids, and the index of each one's parent among them (-1: it follows the text)."""

    ids: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)


def likeliest_paths(streams: np.ndarray, depth: int, size: int) -> Tree:
    """The `size` tokens of the most probable paths, parents first.

    Args:
        streams: float32 [G, vocab], logits of the tokens that come next, each stream blind to what the others choose.
        depth: of the tree, at most.
    """
    depth, made = min(depth, len(streams)), Tree()
    if depth < 1 or size < 1:
        return made
    logits = streams[:depth].astype(np.float64)
    shifted = logits - logits.max(-1, keepdims=True)
    logs = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    count = min(CHOICES, logs.shape[-1])
    best = np.argsort(-logs, axis=-1, kind="stable")[:, :count] if count == logs.shape[-1] else _largest(logs, count)
    # (minus the path's log-probability, parent, depth, which of the stream's choices)
    waiting = [(-logs[0, best[0, 0]], -1, 0, 0)]
    while waiting and len(made.ids) < size:
        cost, parent, d, c = heapq.heappop(waiting)
        above = cost + logs[d, best[d, c]]
        made.ids.append(int(best[d, c]))
        made.parents.append(parent)
        if c + 1 < count:
            heapq.heappush(waiting, (above - logs[d, best[d, c + 1]], parent, d, c + 1))
        if d + 1 < depth:
            heapq.heappush(waiting, (cost - logs[d + 1, best[d + 1, 0]], len(made.ids) - 1, d + 1, 0))
    return made


def _largest(logs: np.ndarray, count: int) -> np.ndarray:
    """Indices of the `count` largest of each row, the largest first."""
    some = np.argpartition(-logs, count - 1, axis=-1)[:, :count]
    order = np.argsort(-np.take_along_axis(logs, some, -1), axis=-1, kind="stable")
    return np.take_along_axis(some, order, -1)


class Streaming(Strategy):
    """See the module.

    Args:
        engine: of an artifact with streams.
        length: how deep a tree may be; the streams' number is the limit. 0 is a plain decode step.
        sampling: greedy.

    Attributes:
        costs: what passes took; one with streams counts as as many rows as its tree has.
    """

    name: ClassVar[str] = "streaming"

    def __init__(self, engine: Engine, length: DraftLength, sampling: Sampling | None = None) -> None:
        super().__init__(engine, sampling)
        plan = engine.artifact.streams
        if plan is None:
            raise UserError(f"{engine.artifact.path} was compiled without streams; compile with --streams FOLDER")
        if not self.sampling.greedy:
            raise UserError("--strategy streaming writes greedy text; leave --temperature out")
        self.length = length
        self.rows = int(plan["rows"])
        self.costs = Costs(lambda rows: 1 if rows <= 1 else self.rows)
        self._tie = TIE if engine.artifact.manifest["compute_dtype"] == "float32" else None
        self._said: list[np.ndarray | None] = []  # what the streams said after each row's last id

    def begin(self, rows: Sequence[TextRow]) -> list[int]:
        """See `Strategy.begin`."""
        first = super().begin(rows)
        self.length.start(len(rows))
        self._said = [None] * len(rows)
        return first

    def step(self, rows: Sequence[TextRow]) -> list[list[int]]:
        """See `Strategy.step`: for each row the candidates that stand and one token of the model's own."""
        with self.clock("draft"):
            trees = [self._tree(b, row) for b, row in enumerate(rows)]
        if all(tree is None for tree in trees):
            start = time.perf_counter()
            logits = self.decode(rows)
            self.costs.checked(1, time.perf_counter() - start)
            self.length.spent(self.costs, 0, 0, 1.0)
            with self.clock("sample"):
                return [[token] for token in self.choose(logits, rows)]
        with self.clock("rollback"):
            park(self.engine, rows)
        base = self.engine.positions.copy()
        given = [
            [row.ids[-1] if row.live else SPARE, *(t.ids if t else ())] for row, t in zip(rows, trees, strict=True)
        ]
        parents = [[-1, *(p + 1 for p in (t.parents if t else ()))] for t in trees]
        with self.clock("verify"):
            start = time.perf_counter()
            logits, kept, streams = self.engine.stream(given, parents)
            seconds = time.perf_counter() - start
            self.costs.checked(self.rows, seconds)
            self.costs.drafted(0.0, 1)
            # a text that the streams have said nothing of takes a pass that gains nothing before the first that may
            self.costs.caught_up(max(0.0, seconds - self.costs.target_s(1)), 1)
        with self.clock("sample"):
            new, doubtful = [], [False] * len(rows)
            for b, row in enumerate(rows):
                row.steps += row.live
                tokens, doubtful[b] = (
                    self._accept(logits[b], kept[b], given[b], parents[b]) if row.live else ([], False)
                )
                new.append(tokens)
                self._said[b] = None if doubtful[b] else streams[b]
        with self.clock("rollback"):
            self.engine.rewind([int(at) + max(1, len(n)) for at, n in zip(base, new, strict=True)])
        if any(doubtful):
            self._decide(rows, base, new, doubtful)
        for b, (row, tree) in enumerate(zip(rows, trees, strict=True)):
            if row.live and tree is not None:
                self._count(b, row, tree, len(new[b]) - 1)
        made = [len(n) for n, row in zip(new, rows, strict=True) if row.live]
        self.length.spent(self.costs, 1, 0, sum(made) / len(made), 1 + any(doubtful))
        return new

    def _tree(self, b: int, row: TextRow) -> Tree | None:
        """Candidates for a row; an empty tree where the streams are to begin, None for a plain step."""
        if not row.live:
            return None
        said = self._said[b]
        self._said[b] = None
        wanted = self.length.choose(b, self.costs, behind=int(said is None)) if row.left > 1 else 0
        if not wanted:
            return None
        if said is None:
            return Tree()
        depth = min(wanted, row.left - 1)
        room = self.engine.max_seq_len - len(row.ids)  # a tree is in the cache as a whole before a branch is kept
        return likeliest_paths(said, depth, min(self.rows - 1, room))

    def _accept(
        self, logits: np.ndarray, kept: np.ndarray, ids: Sequence[int], parents: Sequence[int]
    ) -> tuple[list[int], bool]:
        """The tokens of the branch that stands and the model's own after it; and whether the last is near a tie."""
        # of an early exit's rows, those that are this tree's: others only fill up
        place = {int(row): k for k, row in reversed(list(enumerate(kept))) if row < len(ids)}
        at, new = 0, []
        while True:
            after = logits[place[at]]
            best = int(after.argmax())
            new.append(best)
            if self._tie is not None and near_tie(after[None], self._tie) is not None:
                return new, True
            at = next((j for j in place if j > at and parents[j] == at and ids[j] == best), -1)
            if at < 0:
                return new, False

    def _decide(
        self, rows: Sequence[TextRow], base: np.ndarray, new: list[list[int]], doubtful: Sequence[bool]
    ) -> None:
        """Replace the last new token of doubtful rows by what a decode step says."""
        ends = [int(at) + max(1, len(n)) for at, n in zip(base, new, strict=True)]
        with self.clock("rollback"):
            self.engine.rewind([end - doubt for end, doubt in zip(ends, doubtful, strict=True)])
        with self.clock("verify"):
            before = [
                [row.ids[-1], *n][-2] if doubt else SPARE for row, n, doubt in zip(rows, new, doubtful, strict=True)
            ]
            logits = self.engine.decode(before)
        with self.clock("rollback"):
            self.engine.rewind(ends)
        for b, row in enumerate(rows):
            if doubtful[b]:
                new[b][-1] = int(logits[b].argmax())
                row.steps += 1

    def _count(self, b: int, row: TextRow, tree: Tree, accepted: int) -> None:
        """A level of the tree counts as one token of a draft: it stands where one of its candidates does."""
        depths = [0] * len(tree.ids)
        for j, parent in enumerate(tree.parents):
            depths[j] = depths[parent] + 1 if parent >= 0 else 1
        deepest = max(depths, default=0)
        examined = min(accepted + 1, deepest)
        row.drafted += deepest
        row.examined += examined
        row.accepted += accepted
        self.length.saw(b, examined, accepted)
