"""No KV cache: every token recomputes the whole text before it. What a cache is measured against."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from gpt2_tvm.decoding.strategy import SPARE, Strategy, TextRow


class Naive(Strategy):
    """Prefill of all ids for every token, greedy or sampled."""

    name: ClassVar[str] = "naive"

    def step(self, rows: Sequence[TextRow]) -> list[list[int]]:
        """See `Strategy.step`: one token."""
        with self.clock("verify"):
            self.engine.reset()
            logits = self.engine.prefill([row.ids if row.live else [SPARE] for row in rows])
        for row in rows:
            row.steps += row.live
        with self.clock("sample"):
            return [[token] for token in self.choose(logits, rows)]
