"""Adaptive draft length, with costs that are counted: every forward pass of target and draft takes a fixed time.

The clock of the strategy is replaced by one that only these passes move, so that nothing here can be noisy.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from reference import checkpoint

from gpt2_tvm import Engine, compile_model
from gpt2_tvm.config import GPT2Config
from gpt2_tvm.decoding.costs import Costs
from gpt2_tvm.decoding.lengths import CREDIT_MOST, EARN, EARN_MOST, START, Adaptive
from gpt2_tvm.decoding.lookup import Index
from gpt2_tvm.decoding.planted import Plan
from gpt2_tvm.decoding.registry import make_strategy
from gpt2_tvm.decoding.samples import STALL
from gpt2_tvm.decoding.strategy import Decoding
from gpt2_tvm.theory.speculation import best, speedup_measured

CONFIG = GPT2Config(
    vocab_size=11, n_positions=448, n_embd=16, n_layer=1, n_head=1, bos_token_id=None, eos_token_id=None
)
ROW = 0.1  # of a pass's time for each row after the first
LEAST = 0.95  # times greedy's speed, whatever the draft


class Meter:
    """A clock in steps of the target, moved by the passes of the engines that it watches.

    Attributes:
        passes: by (engine, kind of pass), how many rows each had.
    """

    def __init__(self) -> None:
        self.now = 0.0
        self.passes: list[tuple[str, str, int]] = []

    def perf_counter(self) -> float:
        return self.now

    def slow(self, patch: pytest.MonkeyPatch, owner: Any, name: str, seconds: float) -> None:
        """Every call of a function takes so long."""
        original = getattr(owner, name)

        def call(*arguments: Any, **options: Any) -> Any:
            self.now += seconds
            return original(*arguments, **options)

        patch.setattr(owner, name, call)

    def watch(self, patch: pytest.MonkeyPatch, engine: Engine, name: str, step: float) -> None:
        def counted(kind: str, rows: Any) -> None:
            original = getattr(engine, kind)

            def call(*arguments: Any, **options: Any) -> Any:
                steps, n = rows(*arguments)
                self.now += steps * step * (1 + ROW * (n - 1))
                self.passes.append((name, kind, n))
                return original(*arguments, **options)

            patch.setattr(engine, kind, call)

        widths = engine.artifact.verify_widths
        longest = lambda ids, *_: max(map(len, ids))  # noqa: E731
        counted("decode", lambda ids: (1, 1))
        counted("prefill", lambda ids: (1, longest(ids)))
        counted("verify", lambda ids: (1, next(w for w in widths if w >= longest(ids))))
        counted("decode_greedy", lambda n, *_: (n, 1))


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> tuple[Engine, Engine]:
    folder = tmp_path_factory.mktemp("adaptive")
    model = checkpoint(folder / "model", CONFIG, spread=6.0)
    made = compile_model(
        str(model), "cpu", output=folder / "a", rules="baseline", batch_sizes=(1, 3), verify_widths=(2, 4, 8)
    )
    return Engine(made), Engine(made)


@pytest.fixture
def metered(engines: tuple[Engine, Engine]) -> Iterator[Any]:
    """(rate, cost ratio, texts of how many tokens, batch, what the host takes to accept) -> steps that greedy needs
    over what was spent; and the meter."""

    def run(
        rate: float, cost: float, lengths: list[int], batch: int = 1, host: float = 0.0
    ) -> tuple[float, Meter, Any]:
        target, draft = engines
        meter, spent = Meter(), 0.0
        greedy = make_strategy("greedy", target)
        with pytest.MonkeyPatch.context() as patch:
            prompts = [[[1 + i % 9, b, 3] for b in range(batch)] for i in range(len(lengths))]
            texts = [Decoding(greedy, p, n).run() for p, n in zip(prompts, lengths, strict=True)]
            meter.watch(patch, target, "target", 1.0)
            meter.watch(patch, draft, "draft", cost)
            patch.setattr("gpt2_tvm.decoding.speculative.time", meter)
            plan = Plan(rate, [], CONFIG.vocab_size, seed=3)
            strategy: Any = make_strategy("speculative", target, draft, "adaptive", plan=plan)
            meter.slow(patch, strategy, "_accept", host)
            for prompt, n, text in zip(prompts, lengths, texts, strict=True):
                plan.texts = text
                decoding = Decoding(strategy, prompt, n)
                tokens = iter(decoding)
                next(tokens)  # the prompt's time is not decoding's
                before = meter.now
                for _ in tokens:
                    pass
                spent += meter.now - before
                assert [row.tokens for row in decoding.rows] == text
        return sum(n - 1 for n in lengths) / spent, meter, strategy

    yield run


@pytest.mark.parametrize("cost", [0.05, 0.2, 0.5, 1.0])
@pytest.mark.parametrize("rate", [0.0, 0.1, 0.3, 0.9])
@pytest.mark.parametrize("lengths", [[64], [400], [48] * 8], ids=["one", "long", "many"])
def test_never_slower_than_greedy_by_more_than_a_twentieth(
    metered: Any, rate: float, cost: float, lengths: list[int]
) -> None:
    speed, _, _ = metered(rate, cost, lengths)
    assert speed >= LEAST


def test_a_batch_is_no_slower_either(metered: Any) -> None:
    for rate in (0.0, 0.3):
        assert metered(rate, 0.3, [64, 64], batch=3)[0] >= LEAST


@pytest.mark.parametrize("rate", [0.0, 0.3, 0.6])
@pytest.mark.parametrize("host", [0.3, 1.0])
def test_what_the_host_does_for_a_round_counts_too(metered: Any, rate: float, host: float) -> None:
    for lengths in ([64], [400], [48] * 8):
        assert metered(rate, 0.1, lengths, host=host)[0] >= LEAST


@pytest.mark.parametrize("look", [0.01, 0.1])
def test_looking_for_what_is_not_there_costs_little(engines: tuple[Engine, Engine], look: float) -> None:
    target, _ = engines
    expected = Decoding(make_strategy("greedy", target), [[1, 2, 3]], 400).run()
    meter = Meter()
    with pytest.MonkeyPatch.context() as patch:
        strategy: Any = make_strategy("lookup", target, length="adaptive")
        meter.watch(patch, target, "target", 1.0)
        patch.setattr("gpt2_tvm.decoding.speculative.time", meter)
        patch.setattr(Index, "following", lambda self, count: [])
        meter.slow(patch, strategy.draft, "propose", look)
        decoding = Decoding(strategy, [[1, 2, 3]], 400)
        tokens = iter(decoding)
        next(tokens)
        before = meter.now
        for _ in tokens:
            pass
    assert decoding.rows[0].tokens == expected[0]
    assert 399 / (meter.now - before) >= LEAST


@pytest.mark.parametrize(("rate", "cost"), [(0.9, 0.05), (0.9, 0.2), (0.7, 0.1)])
def test_a_draft_that_pays_gains_nearly_what_the_best_length_would(metered: Any, rate: float, cost: float) -> None:
    speed, _, _ = metered(rate, cost, [400, 400])
    padded = {1: 1, 2: 2, 3: 4, 4: 4}

    def gain(k: int) -> float:
        return speedup_measured(rate, k, cost, lambda m: 1 + ROW * (padded.get(m, 8) - 1))

    assert speed > 0.85 * best(rate, gain, 7).speedup > 1.2


def test_a_draft_that_never_agrees_is_left_alone_and_its_cache_too(metered: Any) -> None:
    _, meter, strategy = metered(0.0, 0.5, [400])
    passes = [(kind, n) for name, kind, n in meter.passes if name == "draft"]
    # the prompt; a few trials; then a try now and then, as long as catching up for it is cheap
    assert 2 <= len(passes) <= 8
    assert strategy.draft.behind([type("Row", (), {"ids": list(range(400))})()])[0] > 100
    tried = sum(1 for name, kind, _ in meter.passes if (name, kind) == ("target", "verify"))
    assert 1 <= tried <= 5


def test_a_new_text_is_a_new_chance_but_not_every_one(metered: Any) -> None:
    """A draft that has not paid is not given the next prompts, until it is time for another try."""
    _, meter, _ = metered(0.0, 0.5, [40] * 12)
    prompts = sum(1 for name, kind, n in meter.passes if (name, kind, n) == ("draft", "prefill", 3))
    assert 2 <= prompts <= 7


def test_a_choice_of_nothing_costs_the_host_nothing_until_the_next_try() -> None:
    costs, adaptive = Costs(lambda rows: 1 if rows <= 1 else 4), Adaptive(3)
    adaptive.start(2)
    costs.checked(1, 1.0)
    costs.checked(4, 1.2)
    costs.drafted(0.5, 1)
    adaptive.saw(0, 20, 0)
    adaptive.saw(1, 20, 0)
    assert [adaptive.choose(b, costs) for b in (0, 1)] == [0, 0]
    rested = next(n for n in range(1000) if not adaptive.rests([0, 1]))
    assert rested == 14 and adaptive.choose(0, costs) == 1  # the 16th round since the last is a try
    assert not adaptive.rests([0, 1])
    adaptive.saw(0, 1, 0)
    assert adaptive.choose(0, costs) == 0  # and the next comes after twice as many
    assert next(n for n in range(1000) if not adaptive.rests([0])) == 30


def test_credit_is_spent_earned_and_limited() -> None:
    costs, adaptive = Costs(lambda rows: 1 if rows <= 1 else 4), Adaptive(3)
    adaptive.start(1)
    costs.checked(1, 1.0)
    costs.checked(4, 1.5)
    costs.drafted(0.2, 1)
    costs.caught_up(0.1, 1)
    assert costs.round_s(3) == pytest.approx(2.1) and costs.round_s(3, behind=10) == pytest.approx(3.1)
    adaptive.spent(costs, 2.3, 3, 0, 1.0)  # as the clock says, not as expected
    assert adaptive.credit == pytest.approx(START - 1.3)
    assert adaptive.choose(0, costs, behind=30) == 0  # the credit is not enough
    adaptive.plain(costs)
    assert adaptive.credit == pytest.approx(START - 1.3 + EARN)
    adaptive.plain(costs, beside=0.1)  # a look for a draft is charged, also where nothing is found
    assert adaptive.credit == pytest.approx(START - 1.4 + 2 * EARN)
    for _ in range(1000):
        adaptive.plain(costs)
    assert adaptive.credit == EARN_MOST
    for _ in range(100):
        adaptive.spent(costs, 2.1, 3, 0, 4.0)
    assert adaptive.credit == CREDIT_MOST
    assert adaptive.choose(0, costs, behind=30) > 0
    adaptive.start(1)
    assert adaptive.credit == START and adaptive.choose(0, costs, behind=30) == 0


def test_a_round_that_the_machine_held_up_is_not_the_drafts_fault() -> None:
    costs, adaptive = Costs(lambda rows: 1 if rows <= 1 else 4), Adaptive(3)
    adaptive.start(1)
    for _ in range(5):
        costs.checked(1, 1.0)
        costs.checked(4, 1.5)
        costs.drafted(0.0, 1)
    costs.checked(1, 500.0)
    assert costs.plain_s == pytest.approx((5 + STALL) / 6)
    adaptive.spent(costs, 500.0, 3, 0, 2.0)
    assert adaptive.credit == pytest.approx(START + 2 - 1.5 * STALL / costs.plain_s)


def test_rows_that_were_never_computed_may_cost_as_much_more() -> None:
    costs = Costs(lambda rows: 1 if rows <= 1 else 2 if rows == 2 else 8)
    costs.checked(1, 1.0)
    costs.checked(2, 1.2)
    costs.drafted(0.1, 1)
    assert costs.round_s(7) == pytest.approx(0.7 + 1.2)
    assert costs.risks(7)[7] == pytest.approx(0.7 + 1.2 + 0.2 * 6 - 1)
    assert costs.risks(1) == pytest.approx([0.0, 0.1 + 1.2 - 1])


def test_what_is_believed_of_few_or_odd_samples() -> None:
    costs = Costs(lambda rows: rows)
    for seconds in (50.0, 1.0):  # a first call may have something to load
        costs.checked(1, seconds)
    assert costs.rising == {1: 1.0} and costs.target == {1: 25.5}
    for seconds in (1.0, 1.0):
        costs.checked(1, seconds)
    costs.checked(2, 30.0)  # once: no more than two passes
    costs.checked(4, 0.3)  # less than fewer rows take: no less than those
    assert costs.rising == {1: 1.0, 2: 2.0, 4: 2.0} and costs.target[2] == 30.0
    for _ in range(3):
        costs.checked(2, 30.0)
    assert costs.rising == {1: 1.0, 2: 30.0, 4: 30.0}  # it is so
