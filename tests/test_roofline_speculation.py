"""Speculative decoding's maths: by hand, against simulation, and the agreement of two models."""

from __future__ import annotations

import numpy as np
import pytest

from gpt2_tvm.errors import UserError
from gpt2_tvm.theory import speculation as s

# The worked case: gpt2 drafts for gpt2-xl on a T4 at 300 GB/s, 0.824356 ms and 10.373152 ms a token (test_roofline.py).
RATIO = 0.824356 / 10.373152


def test_the_best_draft_length_of_the_worked_case() -> None:
    """alpha = 0.75, c = 0.07947: (1 - 0.75^(k+1)) / (0.25 (1 + 0.07947 k)).

    k = 4: (1 - 0.237305) / (0.25 * 1.31788) = 3.050781 / 1.31788 = 2.3149
    k = 5: (1 - 0.177979) / (0.25 * 1.39735) = 3.288086 / 1.39735 = 2.3531
    k = 6: (1 - 0.133484) / (0.25 * 1.47682) = 3.466064 / 1.47682 = 2.3470
    """
    assert pytest.approx(0.079470, abs=1e-6) == RATIO
    gains = {k: s.speedup(0.75, k, RATIO) for k in range(s.LONGEST + 1)}
    assert [round(gains[k], 4) for k in (4, 5, 6)] == [2.3149, 2.3531, 2.3470]
    found = s.best(0.75, gains.__getitem__)
    assert (found.k, found.speedup) == (5, gains[5]) and found.expected_tokens == pytest.approx(3.288086, abs=1e-6)
    assert max(gains.values()) == gains[5]


def test_lower_agreement_or_a_dearer_draft_means_shorter_drafts() -> None:
    def length(agreement: float, ratio: float) -> int:
        return s.best(agreement, lambda k: s.speedup(agreement, k, ratio)).k

    assert [length(a, RATIO) for a in (0.05, 0.5, 0.75, 0.9)] == [0, 3, 5, 11]
    assert [length(0.75, c) for c in (0.02, RATIO, 0.3, 0.8)] == [9, 5, 2, 0]
    assert length(0.75, 0.75) == 0  # (1 + alpha) / (1 + c) is 1: Corollary 3.9 wants alpha > c


def test_the_limits() -> None:
    assert s.expected_tokens(0.0, 9) == 1 and s.expected_tokens(1.0, 9) == 10 and s.expected_tokens(0.3, 0) == 1
    assert s.speedup(1.0, 4, 0.0) == 5 and s.speedup(0.9, 0, 0.5) == 1
    assert s.expected_tokens(0.999999, 7) == pytest.approx(8, rel=1e-4)
    assert s.arithmetic_increase(0.5, 0, 0.1) == 1
    assert s.arithmetic_increase(0.8, 3, 0.1) == pytest.approx((0.3 + 3 + 1) * (1 - 0.8) / (1 - 0.8**4))


def test_checking_that_costs_more_than_a_step_shortens_the_draft() -> None:
    free = s.best(0.75, lambda k: s.speedup_measured(0.75, k, RATIO, lambda m: 1.0))
    dear = s.best(0.75, lambda k: s.speedup_measured(0.75, k, RATIO, lambda m: 1 + 0.2 * (m - 1)))
    assert free.k == 5 and free.speedup == pytest.approx(s.speedup(0.75, 5, RATIO))
    assert 0 < dear.k < free.k and dear.speedup < free.speedup


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: s.expected_tokens(1.2, 3), "an agreement of 1.2"),
        (lambda: s.expected_tokens(float("nan"), 3), "an agreement of nan"),
        (lambda: s.expected_tokens(0.5, -1), "-1 tokens to speculate"),
        (lambda: s.speedup(0.5, 1, -0.1), "a cost ratio of -0.1"),
        (lambda: s.agreement_of(np.zeros((2, 3)), np.zeros((2, 4))), "of models with one vocabulary"),
        (lambda: s.agreement_of(np.zeros((2, 3)), np.zeros((2, 3)), -1.0), "a temperature of -1.0"),
    ],
)
def test_what_means_nothing_is_refused(call: object, said: str) -> None:
    with pytest.raises(UserError, match=said):
        call()  # type: ignore[operator]


def logits(seed: int, noise: float) -> tuple[np.ndarray, np.ndarray]:
    """A target's logits [400, 24], and a draft's that differ by noise."""
    generator = np.random.default_rng(seed)
    target = 2 * generator.standard_normal((400, 24))
    return target, target + noise * generator.standard_normal(target.shape)


def test_agreement_of_equal_and_of_unlike_models() -> None:
    target, draft = logits(1, 0.7)
    for temperature in (0.0, 0.6, 1.0):
        assert s.agreement_of(target, target, temperature) == pytest.approx(1)
        assert s.agreement_of(target, target + 5.0, temperature) == pytest.approx(1)  # a shift is no difference
        assert 0.3 < s.agreement_of(target, draft, temperature) < 0.95
    assert s.agreement_of(np.eye(4), np.roll(np.eye(4), 1, axis=1)) == 0.0
    hot = s.agreement_of(target, draft, 50.0)
    assert hot > s.agreement_of(target, draft, 1.0)  # nearly uniform, both
    by_hand = np.array([[0.6, 0.3, 0.1]]), np.array([[0.2, 0.3, 0.5]])
    assert s.agreement_of(np.log(by_hand[0]), np.log(by_hand[1]), 1.0) == pytest.approx(0.2 + 0.3 + 0.1)


@pytest.mark.parametrize(("temperature", "noise"), [(0.0, 1.2), (1.0, 1.5)])
def test_simulated_drafting_yields_as_many_tokens(temperature: float, noise: float) -> None:
    """Positions drawn at random: a draft token x ~ q is accepted with min(1, p(x) / q(x)), up to k in a row, and each
    pass yields one more token. The mean comes to (1 - a^(k+1)) / (1 - a), a being `agreement_of`.
    """
    target, draft = logits(2, noise)
    agreement, k, passes = s.agreement_of(target, draft, temperature), 4, 20000
    generator = np.random.default_rng(3)
    position = generator.integers(0, len(target), (passes, k))
    if temperature == 0:
        accepted = (target.argmax(-1) == draft.argmax(-1))[position]
    else:
        p, q = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in (target, draft))
        drawn = (generator.random((passes, k, 1)) > q.cumsum(-1)[position]).sum(-1).clip(max=target.shape[1] - 1)
        accepted = generator.random((passes, k)) < p[position, drawn] / q[position, drawn]
    tokens = 1 + accepted.cumprod(axis=1).sum(axis=1)
    error = tokens.std() / passes**0.5
    assert abs(tokens.mean() - s.expected_tokens(agreement, k)) < 4 * error
    assert 0.2 < agreement < 0.9
