"""The most likely token, with the KV cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from gpt2_tvm.decoding.pipelined import Pipelined, can_pipeline
from gpt2_tvm.decoding.sampling import Sampling
from gpt2_tvm.decoding.strategy import Strategy, TextRow
from gpt2_tvm.decoding.tokens import DEVICE_STEPS
from gpt2_tvm.errors import UserError

if TYPE_CHECKING:
    from gpt2_tvm.engine import Engine


class Greedy(Strategy):
    """What every other greedy strategy must write, token for token, and be faster than."""

    name: ClassVar[str] = "greedy"

    def __init__(self, engine: Engine, sampling: Sampling | None = None) -> None:
        super().__init__(engine, sampling)
        if not self.sampling.greedy:
            raise UserError(f"greedy with --temperature {self.sampling.temperature:g}: choose --strategy sample for it")
        self._tokens: Pipelined | None = None

    def begin(self, rows: Sequence[TextRow]) -> list[int]:
        """See `Strategy.begin`."""
        self._tokens = None
        return super().begin(rows)

    def step(self, rows: Sequence[TextRow]) -> list[list[int]]:
        """See `Strategy.step`: one token; of a single sequence on a GPU a few, which stay on the device meanwhile."""
        if len(rows) == 1 and self.engine.artifact.kind != "cpu":
            return [self._on_device(rows[0])]
        logits = self.decode(rows)
        with self.clock("sample"):
            return [[token] for token in self.choose(logits, rows)]

    def _on_device(self, row: TextRow) -> list[int]:
        """Unlike elsewhere the last id is in the cache too, but for the one that came from the prompt's logits."""
        again = len(row.ids) - int(self.engine.positions[0])
        if can_pipeline(self.engine):
            return [self._next(row, again)]
        count = min(DEVICE_STEPS, row.left)
        with self.clock("verify"):
            tokens = self.engine.decode_greedy(again + count)[0]
        row.steps += again + count
        return [int(token) for token in tokens[again:]]

    def _next(self, row: TextRow, again: int) -> int:
        """One token, while the device is at the one after it."""
        with self.clock("verify"):
            if self._tokens is None or again:
                self._tokens = Pipelined(self.engine, row.left + again)
                for _ in range(again):
                    next(self._tokens)
            token = next(self._tokens)
            if row.left == 1:
                self._tokens.settle()
        row.steps += again + 1
        return token
