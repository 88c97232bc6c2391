"""Which drafted tokens stand: greedily, or so that the text has the target's distribution exactly.

Rejection sampling of Leviathan, Kalman and Matias 2023 ("Fast Inference from Transformers via Speculative Decoding",
algorithm 1) and Chen et al. 2023 ("Accelerating Large Language Model Decoding with Speculative Sampling"): a token that
the draft drew with probability q(x) stands with probability min(1, p(x) / q(x)), p being the target's; the first that
does not is replaced by one drawn from max(0, p - q), normalised. Then each token is distributed as p, whatever q is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

# Verify and decode add up in another order. Where that could decide which float32 logit is the largest, decode decides,
# as it does for greedy text. Half precision would be at it all the time: there a tie may fall either way.
TIE = 2e-5


def draw(shares: np.ndarray, rng: np.random.Generator) -> int:
    """An index, drawn with the probabilities `shares` [n] (any positive scale). Takes one number from `rng`."""
    bounds = shares.cumsum()
    at = int(np.searchsorted(bounds, rng.random() * bounds[-1], side="right"))
    # a number that rounds up to the whole sum would fall behind the last token that is possible
    return at if at < shares.size else int(np.flatnonzero(shares)[-1])


def residual(p: np.ndarray, q: np.ndarray | None, drafted: int) -> np.ndarray:
    """What to draw from after `drafted` was refused: max(0, p - q), not normalised. q None: all of it on `drafted`."""
    if q is None:
        left = p.copy()
        left[drafted] = 0.0
    else:
        left = np.maximum(p - q, 0.0)
    return left if left.any() else p  # p equals q up to rounding: refusing has probability 0, any choice is right


def accept_sampled(
    target: Callable[[int], np.ndarray],
    drafted: Sequence[int],
    draft: Sequence[np.ndarray | None],
    rng: np.random.Generator,
) -> tuple[int, int]:
    """How many drafted tokens stand, and the token that follows them.

    Args:
        target: i -> float64 [vocab], the target's probabilities of the token at place i, given the i drafted before
            it. Asked for i = 0, 1, … up to the first refusal, and for len(drafted) if there is none.
        drafted: k tokens, the i-th drawn from draft[i].
        draft: the draft's probabilities, float64 [vocab] each; None: the draft had no choice (all on its token).
        rng: one number for each token looked at, and one for the token that follows.
    """
    for i, token in enumerate(drafted):
        p, q = target(i), draft[i]
        share = p[token] if q is None else p[token] / q[token]
        if rng.random() >= share:
            return i, draw(residual(p, q, token), rng)
    return len(drafted), draw(target(len(drafted)), rng)


def accept_greedy(best: Sequence[int], drafted: Sequence[int]) -> int:
    """How many drafted tokens are the target's own: best[i] is its most likely token at place i."""
    return next((i for i, token in enumerate(drafted) if token != best[i]), len(drafted))


def near_tie(logits: np.ndarray, tolerance: float) -> int | None:
    """The first row of [rows, vocab] where another logit is within tolerance * max|logit| of the largest; None: no row.

    There two ways of computing the same logits may disagree about the largest: their sums run in another order.
    """
    largest = logits.max(-1)
    scale = np.maximum(np.abs(largest), np.abs(logits.min(-1)))
    close = np.count_nonzero(logits >= (largest - tolerance * scale)[:, None], axis=-1)
    found = np.flatnonzero(close > 1)
    return int(found[0]) if found.size else None
