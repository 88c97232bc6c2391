"""The rejection rule alone, on distributions made by hand: 20,000 draws are the target's, and a bias shows."""

from __future__ import annotations

import numpy as np
import pytest

from gpt2_tvm.decoding import rejection
from gpt2_tvm.decoding.rejection import accept_greedy, accept_sampled, draw, near_tie, residual
from gpt2_tvm.decoding.sampling import Sampling

VOCAB, DRAWS, K = 5, 20_000, 3
CHI2_99_124 = 163.546  # the 0.99 quantile of chi-square with 5^3 - 1 degrees of freedom


def chains(seed: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Two Markov chains [previous token, next token]: the target's and the draft's, which differ a good deal."""
    rng = np.random.default_rng(seed)
    p, q = rng.dirichlet(np.full(VOCAB, 1.5), (2, VOCAB))
    return 0.7 * p + 0.3 / VOCAB, q  # every text of three tokens is expected more than once


def text(p: np.ndarray, q: np.ndarray, length: int, rng: np.random.Generator) -> list[int]:
    """`length` tokens after token 0 by speculation with K drafted tokens a round."""
    ids = [0]
    while len(ids) <= length:
        drafted: list[int] = []
        for _ in range(K):
            drafted.append(draw(q[[*ids, *drafted][-1]], rng))
        before = [ids[-1], *drafted]
        stand, following = accept_sampled(
            lambda i, before=before: p[before[i]], drafted, [q[t] for t in before[:-1]], rng
        )
        ids += [*drafted[:stand], following]
    return ids[1 : length + 1]


def statistic(p: np.ndarray, q: np.ndarray) -> float:
    """Chi-square of the first three tokens of 20,000 texts against the target's joint distribution."""
    rng = np.random.default_rng(11)
    seen = np.zeros((VOCAB,) * 3)
    for _ in range(DRAWS):
        seen[tuple(text(p, q, 3, rng))] += 1
    expected = DRAWS * p[0][:, None, None] * p[:, :, None] * p[None]
    assert expected.min() > 1
    return float(((seen - expected) ** 2 / expected).sum())


def test_sampled_text_has_the_targets_distribution() -> None:
    assert statistic(*chains()) < CHI2_99_124


def test_a_draft_that_is_the_target_is_never_refused() -> None:
    p, _ = chains()
    rng = np.random.default_rng(0)
    for _ in range(200):
        drafted = [draw(p[0], rng), draw(p[1], rng)]
        assert accept_sampled(lambda i: p[i], drafted, [p[0], p[1]], rng)[0] == 2


def test_a_bias_is_found_in_what_replaces_a_refused_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rejection, "residual", lambda p, q, token: p)
    assert statistic(*chains()) > CHI2_99_124


def test_a_bias_is_found_in_how_often_a_token_is_refused() -> None:
    p, q = chains()
    biased = 0.93 * p + 0.07 * q  # a target that leans to its draft a little
    rng = np.random.default_rng(11)
    seen = np.zeros((VOCAB,) * 3)
    for _ in range(DRAWS):
        seen[tuple(text(biased, q, 3, rng))] += 1
    expected = DRAWS * p[0][:, None, None] * p[:, :, None] * p[None]
    assert ((seen - expected) ** 2 / expected).sum() > CHI2_99_124


def test_a_draft_without_a_choice_stands_as_often_as_the_target_would_choose_it() -> None:
    p, rng = np.array([0.2, 0.5, 0.3]), np.random.default_rng(5)
    seen = np.zeros(3)
    for _ in range(DRAWS):
        stand, token = accept_sampled(lambda i: p, [1], [None], rng)
        seen[1 if stand else token] += 1
    assert ((seen - DRAWS * p) ** 2 / (DRAWS * p)).sum() < 9.21  # 0.99 quantile, 2 degrees of freedom


def test_residual_is_what_is_left_of_the_target() -> None:
    p, q = np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.6, 0.2])
    np.testing.assert_allclose(residual(p, q, 1), [0.3, 0, 0])
    np.testing.assert_allclose(residual(p, None, 1), [0.5, 0, 0.2])
    np.testing.assert_array_equal(residual(p, p, 0), p)
    assert draw(np.array([0.0, 1e-300, 0.0]), np.random.default_rng(0)) == 1


@pytest.mark.parametrize(("best", "drafted", "stand"), [([1, 2, 3], [1, 2], 2), ([1, 9, 3], [1, 2], 1), ([4], [], 0)])
def test_greedy_keeps_the_targets_own(best: list[int], drafted: list[int], stand: int) -> None:
    assert accept_greedy(best, drafted) == stand


def test_near_tie_is_relative_to_the_largest_magnitude() -> None:
    rows = np.array([[-10.0, 5.0, 4.999], [-100.0, 5.0, 4.999], [0.0, 1.0, 1.0]])
    assert near_tie(rows, 2e-5) == 1
    assert near_tie(rows[:1], 2e-5) is None
    assert near_tie(rows[[0, 2]], 2e-5) == 1


def test_probabilities_are_the_distribution_spread_out() -> None:
    shares = Sampling(1.0, top_k=2).probabilities(np.log([0.1, 0.6, 0.3]))
    np.testing.assert_allclose(shares, [0, 2 / 3, 1 / 3])
