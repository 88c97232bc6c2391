"""From logits to a token: temperature, top-k and top-p (nucleus) sampling.

Everything is float64 on the host and depends on nothing but the arguments: the same logits and the same generator give
the same token on every machine.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from gpt2_tvm.errors import UserError


def check_options(temperature: float, top_k: int, top_p: float) -> None:
    """UserError, one line, for an option out of its range."""
    if not (math.isfinite(temperature) and temperature >= 0):
        raise UserError(f"--temperature {temperature:g}: give 0 (the most likely token) or more, such as 0.8")
    if top_k < 0:
        raise UserError(f"--top-k {top_k}: give how many of the most likely tokens to choose from, or 0 for all")
    if not 0 <= top_p <= 1:
        raise UserError(f"--top-p {top_p:g}: give a probability from 0 to 1, where 1 means all tokens")


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen from logits; the default is greedy. Raises UserError for an option out of range."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        check_options(self.temperature, self.top_k, self.top_p)

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    def probabilities(self, logits: np.ndarray) -> np.ndarray:
        """`distribution` as float64 [vocab], 0 where a token is excluded."""
        ids, shares = distribution(logits, self.temperature, self.top_k, self.top_p)
        dense = np.zeros(len(logits))
        dense[ids] = shares
        return dense


def distribution(
    logits: np.ndarray, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    """The tokens that may come next, and with which probability.

    Args:
        logits: [vocab], any float dtype. -inf excludes a token; +inf leaves only those that have it.
        temperature: divides the logits; 0 leaves only the most likely token.
        top_k: keep the k most likely tokens (0: all). Of equal logits the lower ids are the more likely ones, as for
            argmax, so that exactly k are kept.
        top_p: then keep the smallest set of the most likely tokens that holds at least this share (always one).

    Returns:
        (ids int64 [n], probabilities float64 [n]), the probabilities positive, descending and adding up to 1.

    Raises UserError for an option out of range, for NaN among the logits and where every token is excluded.
    """
    check_options(temperature, top_k, top_p)
    scores = np.asarray(logits, np.float64)
    if scores.ndim != 1 or scores.size == 0:
        raise ValueError(f"logits have shape {list(scores.shape)}; one vector [vocab] is expected")
    best = scores.max()
    if np.isnan(best):
        raise UserError(
            "the model gave NaN instead of logits; its weights are damaged or overflow the dtype (try q0f32)"
        )
    if best == -np.inf:
        raise UserError("every token has probability 0 (all logits are -inf); the model or the mask is at fault")
    if temperature == 0 or top_k == 1 or top_p == 0:
        return np.array([scores.argmax()]), np.ones(1)

    ids = np.flatnonzero(scores > -np.inf) if np.isfinite(best) else np.flatnonzero(scores == np.inf)
    if 0 < top_k < ids.size:
        ids = _largest(scores, ids, top_k)
    kept = scores[ids]
    with np.errstate(over="ignore"):  # a tiny temperature: the quotient is -inf and the weight 0, as it should be
        weights = np.exp((kept - best) / temperature) if np.isfinite(best) else np.ones(ids.size)
    shares = weights / weights.sum()
    if top_p < 1:
        # Tokens below (1 - p) / n hold less than 1 - p together: the set we look for is among the others. Sort those.
        likely = np.flatnonzero(shares >= (1 - top_p) / ids.size)
        ids, shares = ids[likely], shares[likely]
    order = np.argsort(-shares, kind="stable")
    ids, shares = ids[order], shares[order]
    if top_p < 1:
        enough = int(np.searchsorted(shares.cumsum(), top_p)) + 1
        ids, shares = ids[:enough], shares[:enough]
    possible = shares > 0
    ids, shares = ids[possible], shares[possible]
    return ids, shares / shares.sum()


def _largest(scores: np.ndarray, ids: np.ndarray, k: int) -> np.ndarray:
    """Those k of `ids` whose scores are largest, in their order; of equal scores the lower ids."""
    of_ids = scores[ids]
    least = np.partition(of_ids, -k)[-k]
    above = np.flatnonzero(of_ids > least)
    equal = np.flatnonzero(of_ids == least)[: k - above.size]
    return ids[np.sort(np.concatenate([above, equal]))]


def sample(
    logits: np.ndarray,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    rng: np.random.Generator | None = None,
) -> int:
    """One token drawn from `distribution(logits, temperature, top_k, top_p)`.

    Args:
        rng: where chance comes from; one number is drawn unless a single token is left. None: a fresh generator.
    """
    ids, shares = distribution(logits, temperature, top_k, top_p)
    if ids.size == 1:
        return int(ids[0])
    drawn = (rng or np.random.default_rng()).random()
    at = int(np.searchsorted(shares.cumsum(), drawn, side="right"))
    return int(ids[min(at, ids.size - 1)])
