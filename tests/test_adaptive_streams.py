"""Streams with an adaptive depth, with costs that are counted: never much slower than greedy, and fast where they are
right. The passes of the engine and the host's own work move the clock, nothing else does."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reference import checkpoint
from test_adaptive_length import LEAST, Meter

from gpt2_tvm import Engine, compile_model
from gpt2_tvm.checkpoint import ModelSource
from gpt2_tvm.config import GPT2Config
from gpt2_tvm.decoding import streaming
from gpt2_tvm.decoding.lengths import draft_length
from gpt2_tvm.decoding.registry import make_strategy
from gpt2_tvm.decoding.strategy import Decoding
from gpt2_tvm.decoding.streaming import Streaming
from gpt2_tvm.streams import StreamConfig, base_digests, tensor_shapes, write_streams
from gpt2_tvm.streams.running import Choices

CONFIG = GPT2Config(
    vocab_size=11, n_positions=448, n_embd=16, n_layer=1, n_head=1, bos_token_id=None, eos_token_id=None
)
G = 3


class Planted(Streaming):
    """Streams that each find the next token with a given probability, all later ones wrong after a miss."""

    rate: float
    text: list[int]
    rng: np.random.Generator

    def _tree(self, b: int, row: Any) -> Any:
        if self._said[b] is not None:
            at = len(row.ids) - row.prompt_tokens
            coming = [*self.text[at : at + G], 0, 0, 0][:G]
            said = [t if self.rng.random() < self.rate else (t + 1) % CONFIG.vocab_size for t in coming]
            self._said[b] = Choices([[t] for t in said], [[-0.1]] * G)
        return super()._tree(b, row)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    folder: Path = tmp_path_factory.mktemp("streams")
    source = ModelSource("model", CONFIG, folder=checkpoint(folder / "model", CONFIG, spread=6.0))
    config, rng = StreamConfig(G, 1, 2, base_digests(source)), np.random.default_rng(0)
    shapes = tensor_shapes(config, CONFIG)
    write_streams(folder / "streams", config, {name: rng.normal(0, 0.5, shape) for name, shape in shapes.items()})
    made = compile_model(
        str(folder / "model"),
        "cpu",
        output=folder / "a",
        rules="baseline",
        verify_widths=(),
        streams=folder / "streams",
        stream_rows="4",
    )
    return Engine(made)


@pytest.fixture
def metered(engine: Engine) -> Iterator[Any]:
    """(rate, a streamed pass in plain steps, the host's share of it, texts of how many tokens, depth) -> steps that
    greedy needs over what was spent."""

    def run(rate: float, cost: float, host: float, lengths: list[int], depth: str = "adaptive") -> float:
        meter, spent = Meter(), 0.0
        greedy = make_strategy("greedy", engine)
        prompts = [[1 + i % 9, 3] for i in range(len(lengths))]
        texts = [Decoding(greedy, [p], n).run()[0] for p, n in zip(prompts, lengths, strict=True)]
        strategy = Planted(engine, draft_length(depth, G))
        strategy.rate, strategy.rng = rate, np.random.default_rng(1)
        with pytest.MonkeyPatch.context() as patch:
            meter.slow(patch, engine, "decode", 1.0)
            meter.slow(patch, strategy, "_pass", cost - host)
            meter.slow(patch, streaming, "likeliest_paths", host)
            patch.setattr("gpt2_tvm.decoding.streaming.time", meter)
            for prompt, n, text in zip(prompts, lengths, texts, strict=True):
                strategy.text = text
                decoding = Decoding(strategy, [prompt], n)
                tokens = iter(decoding)
                next(tokens)
                before = meter.now
                for _ in tokens:
                    pass
                spent += meter.now - before
                assert decoding.rows[0].tokens == text
        return sum(n - 1 for n in lengths) / spent

    yield run


@pytest.mark.parametrize("cost", [1.2, 1.6, 2.3, 4.0])
@pytest.mark.parametrize("rate", [0.0, 0.3, 0.6, 0.8])
@pytest.mark.parametrize("lengths", [[64], [400], [64] * 6], ids=["one", "long", "many"])
def test_never_slower_than_greedy_by_more_than_a_twentieth(
    metered: Any, rate: float, cost: float, lengths: list[int]
) -> None:
    for host in (0.0, 0.5 * (cost - 1)):
        assert metered(rate, cost, host, lengths) >= LEAST


def test_streams_that_are_right_gain_nearly_what_they_can(metered: Any) -> None:
    for rate, cost in ((0.8, 1.4), (0.9, 1.8)):
        always = metered(rate, cost, 0.1, [400, 400], depth="3")
        assert always > 1.5 and metered(rate, cost, 0.1, [400, 400]) > 0.85 * always


def test_streams_that_are_too_slow_are_hardly_asked(metered: Any) -> None:
    assert metered(0.5, 3.5, 0.2, [400, 400], depth="3") < 0.7
    assert metered(0.5, 3.5, 0.2, [400, 400]) > 0.97
