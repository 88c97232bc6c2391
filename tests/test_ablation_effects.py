"""Main effects and interactions of planted data: what comes out is what went in."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pytest

from tuning.effects import effects

NAMES = ("a", "b", "c")
SETS = [frozenset(s) for size in range(4) for s in combinations(NAMES, size)]


def planted(pairs: dict[frozenset[str], float], base: float = 20.0) -> dict[frozenset[str], list[float]]:
    """Rates whose factors are a: 3, b: 0.5, c: 1, times a factor for each pair that is on."""
    single = {"a": 3.0, "b": 0.5, "c": 1.0}
    return {
        on: [base * math.prod(single[f] for f in on) * math.prod(f for pair, f in pairs.items() if pair <= on)]
        for on in SETS
    }


def test_factors_that_multiply_come_out_as_they_are() -> None:
    found = effects(NAMES, planted({}))
    assert found.cells == found.of_cells == 8
    for name, ratio in {"a": 3.0, "b": 0.5, "c": 1.0}.items():
        assert found.of(name).ratio == pytest.approx(ratio, rel=1e-12)
    for pair in combinations(NAMES, 2):
        assert found.of(*pair).ratio == pytest.approx(1.0, rel=1e-12)
    assert found.residual_sd == pytest.approx(0, abs=1e-12)


def test_two_that_compete() -> None:
    """Each alone is 4 times as fast, both together are as well: in logarithms the effect of one is ln 4 without the
    other and 0 with it. Main effect: their mean, a factor 2. Interaction: half of 0 - ln 4, a factor 1/2."""
    rates = {on: [10.0 * (4.0 if on & {"a", "b"} else 1.0)] for on in SETS}
    found = effects(NAMES, rates)
    assert found.of("a").ratio == pytest.approx(2.0)
    assert found.of("b").ratio == pytest.approx(2.0)
    assert found.of("b", "a").ratio == pytest.approx(0.5)
    assert found.of("c").ratio == pytest.approx(1.0)
    assert found.of("a", "c").ratio == pytest.approx(1.0)


def test_one_that_needs_the_other() -> None:
    found = effects(NAMES, planted({frozenset("ab"): 9.0}))
    # of the pair's ln 9 a half goes to each main effect and to the interaction
    assert found.of("a").ratio == pytest.approx(3.0 * 3.0)
    assert found.of("b").ratio == pytest.approx(0.5 * 3.0)
    assert found.of("a", "b").ratio == pytest.approx(3.0)
    assert found.of("b", "c").ratio == pytest.approx(1.0)


def test_a_term_is_the_contrast_of_means() -> None:
    rates = {on: [float(v)] for on, v in zip(SETS, np.random.default_rng(4).uniform(1, 90, len(SETS)), strict=True)}
    found = effects(NAMES, rates)

    def mean(have: set[str], lack: set[str]) -> float:
        return float(np.mean([math.log(rates[on][0]) for on in SETS if have <= on and not lack & on]))

    for name in NAMES:
        assert found.of(name).log_effect == pytest.approx(mean({name}, set()) - mean(set(), {name}))
    for one, two in combinations(NAMES, 2):
        with_two = mean({one, two}, set()) - mean({two}, {one})
        without = mean({one}, {two}) - mean(set(), {one, two})
        assert found.of(one, two).log_effect == pytest.approx((with_two - without) / 2)
    assert found.residual_sd > 0.01  # of random data pairs do not explain all


def test_failed_sets_leave_a_fit_that_says_so() -> None:
    rates = planted({frozenset("ab"): 9.0})
    del rates[frozenset("abc")]
    found = effects(NAMES, rates)
    assert (found.cells, found.of_cells) == (7, 8)
    assert found.of("a").ratio == pytest.approx(9.0)  # 7 equations for 7 unknowns
    assert found.of("a", "b").ratio == pytest.approx(3.0)


def test_what_cannot_be_told_is_none() -> None:
    rates = {on: values for on, values in planted({}).items() if "a" not in on}
    found = effects(NAMES, rates)
    assert found.of("a").log_effect is None and found.of("a").ratio is None and found.of("a").ratio_sd is None
    assert found.of("b", "a").log_effect is None
    assert effects(NAMES, {}).of("a").ratio is None
    only = effects(NAMES, {**rates, frozenset("a"): []})  # no repeats: as good as absent
    assert only.cells == 4


def test_spread_of_repeats_becomes_a_standard_error() -> None:
    """Of 8 cells with n repeats of spread s in logarithms: an effect is a difference of means of 4 medians each, so its
    variance is 2/4 of a median's, pi/2 s^2 / n."""
    logs = np.array([-0.02, 0.0, 0.02])
    rates = {on: list(values[0] * np.exp(logs)) for on, values in planted({}).items()}
    found = effects(NAMES, rates)
    expected = math.sqrt(0.5 * math.pi / 2 * 0.02**2 / 3)
    for term in found.terms:
        assert term.log_effect_sd == pytest.approx(expected)
    assert found.of("a").ratio_sd == pytest.approx(3.0 * expected)
    assert effects(NAMES, planted({})).of("a").log_effect_sd == 0  # a single repeat has no spread to tell of


def test_rates_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="positive"):
        effects(NAMES, {frozenset(): [0.0]})
    with pytest.raises(ValueError, match="positive"):
        effects(NAMES, {frozenset(): [float("nan")]})
    with pytest.raises(ValueError, match="among"):
        effects(NAMES, {frozenset("x"): [1.0]})
