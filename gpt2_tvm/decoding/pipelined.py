"""Greedy tokens one by one, each read back while the device is at the next: for runners that can read `later`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from gpt2_tvm.errors import UserError

if TYPE_CHECKING:
    from gpt2_tvm.engine import Engine

Later = Callable[[], np.ndarray]


def can_pipeline(engine: Engine) -> bool:
    """Whether the engine's runner reads back without waiting for what is queued after."""
    return hasattr(engine.runner, "later")


class Pipelined:
    """The tokens of `engine.decode_greedy(count)` of a single sequence, as they come.

    Step n + 1 is queued before token n is read: its token, position and cache are on the device, and what comes back is
    4 bytes. Iterating moves the engine's position with each token that is handed out. Until the end, or until
    `settle`, nothing else may call the engine.

    Raises UserError as `Engine.decode_greedy` does.
    """

    def __init__(self, engine: Engine, count: int) -> None:
        if engine.batch != 1:
            raise UserError(f"tokens come one by one for a single sequence, not for {engine.batch}")
        if engine.best is None:
            raise UserError("greedy tokens need logits to start from: call prefill or decode first")
        engine._check_room([count])
        self.engine, self.left = engine, count
        self._token = int(engine.best[0])
        self._coming: Later | None = None
        token = np.zeros((engine._slots, 1), np.int32)
        token[0, 0] = self._token
        at, active = engine._where(np.ones(1, np.int32))
        history = engine._tensor("history", (engine._slots, engine.max_seq_len))
        self._inputs = [engine._int("greedy_token", token), at, history, active, engine._caches]

    def __iter__(self) -> Pipelined:
        return self

    def __next__(self) -> int:
        engine, runner = self.engine, self.engine.runner
        if self.left == 0:
            self.settle()
            raise StopIteration
        found = self._coming
        runner.call(f"greedy_b{engine._slots}", self._inputs)  # appends this token, finds the next
        self._coming = runner.later(self._inputs[0])  # type: ignore[attr-defined]
        if found is not None:
            self._token = int(found()[0, 0])
        self.left -= 1
        engine.positions = engine.positions + np.int32(1)
        engine._next = engine._tree = None
        return self._token

    def settle(self) -> None:
        """Stop here: `engine.best` is then what would have come next."""
        self.left = 0
        if self._coming is not None:
            self.engine._next = self._coming()[:1, 0].astype(np.int32)
            self._coming = None
