"""One text by a strategy, token by token: what `python -m gpt2_tvm.generate` streams."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from gpt2_tvm.decoding.registry import make_strategy
from gpt2_tvm.decoding.sampling import Sampling
from gpt2_tvm.decoding.strategy import Decoding, Strategy

if TYPE_CHECKING:
    from gpt2_tvm.engine import Engine


class StrategyGeneration:
    """As `tokens.Generation`, with any strategy: iterate over it for the tokens.

    Attributes:
        finish, prefill_s, decode_s, prompt, seed: as there.
        steps: tokens that the decode steps gave (speculation: several a step).
        passes: of the target, after the prompt's.
        acceptance: the share of drafted tokens looked at that stood; None where nothing was drafted.
    """

    def __init__(
        self,
        strategy: Strategy,
        prompt: Sequence[int],
        max_tokens: int,
        seed: int | None = None,
        eos_id: int | None = None,
    ) -> None:
        self._decoding = Decoding(strategy, [list(prompt)], max_tokens, eos_id, seed)
        self.prompt = list(prompt)
        self.seed = int(self._decoding.seed or 0)

    def __iter__(self) -> Iterator[int]:
        for rows in self._decoding:
            yield from rows[0]

    @property
    def finish(self) -> str:
        return self._decoding.rows[0].finish

    @property
    def prefill_s(self) -> float:
        return self._decoding.prefill_s

    @property
    def decode_s(self) -> float:
        return self._decoding.decode_s

    @property
    def steps(self) -> int:
        return sum(step.tokens for step in self._decoding.steps)

    @property
    def passes(self) -> int:
        return self._decoding.rows[0].steps

    @property
    def acceptance(self) -> float | None:
        row = self._decoding.rows[0]
        return row.accepted / row.examined if row.examined else None


def make_generation(
    engine: Engine,
    prompt: Sequence[int],
    max_tokens: int,
    wanted: tuple[str, Path | None, str, tuple[float, int, float]],
    seed: int | None = None,
    eos_id: int | None = None,
    device: str | None = None,
    threads: int | None = None,
) -> StrategyGeneration:
    """From the command line's options.

    wanted: the strategy's name, the draft's artifact, the draft length, and temperature, top-k and top-p. device and
    threads are the draft's engine's.
    """
    from gpt2_tvm.engine import Engine

    name, draft, length, sampling = wanted
    mate = Engine(draft, device, threads=threads) if draft is not None else None
    strategy = make_strategy(name, engine, mate, length, Sampling(*sampling))
    return StrategyGeneration(strategy, prompt, max_tokens, seed, eos_id)
