"""A token drawn from the model's distribution, with the KV cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from gpt2_tvm.decoding.sampling import Sampling
from gpt2_tvm.decoding.strategy import Strategy, TextRow
from gpt2_tvm.errors import UserError

if TYPE_CHECKING:
    from gpt2_tvm.engine import Engine


class Sampled(Strategy):
    """One decode step a token; temperature, top-k and top-p as in `sampling`."""

    name: ClassVar[str] = "sample"

    def __init__(self, engine: Engine, sampling: Sampling | None = None) -> None:
        super().__init__(engine, sampling)
        if self.sampling.greedy:
            raise UserError("sample needs a --temperature above 0, such as 0.8; choose --strategy greedy for 0")

    def step(self, rows: Sequence[TextRow]) -> list[list[int]]:
        """See `Strategy.step`: one token."""
        logits = self.decode(rows)
        with self.clock("sample"):
            return [[token] for token in self.choose(logits, rows)]
