"""Speculative decoding: a draft model proposes k tokens, the target checks all of them in one pass.

After Leviathan, Kalman and Matias 2023, "Fast Inference from Transformers via Speculative Decoding" (gamma there is k
here, alpha the agreement): with draft tokens accepted independently, each with probability alpha, a pass of the target
yields (1 - alpha^(k+1)) / (1 - alpha) tokens (equation 1), and the text comes

    (1 - alpha^(k+1)) / ((1 - alpha) (k c + 1))

times as fast (Theorem 3.8), c being a draft step's time over a target step's. That holds where checking k + 1 tokens
takes the target no longer than one, which memory-bound decoding does for a while; `speedup_measured` takes the real
times instead.

Agreement with temperature is the mean of sum(min(p, q)) over the vocabulary (Corollary 3.6); greedily, p and q are
all on one token each, and it is the share of positions where both choose the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gpt2_tvm.errors import UserError

if TYPE_CHECKING:
    import numpy as np

LONGEST = 64  # draft lengths that are looked at


def expected_tokens(agreement: float, k: int) -> float:
    """Tokens that one pass of the target yields on average with k drafted: 1 to k + 1."""
    _check(agreement, k)
    return float(k + 1) if agreement == 1 else (1 - agreement ** (k + 1)) / (1 - agreement)


def speedup(agreement: float, k: int, cost_ratio: float) -> float:
    """Theorem 3.8: how many times as fast as without drafts."""
    if not cost_ratio >= 0:
        raise UserError(f"a cost ratio of {cost_ratio}: give a draft step's time over the target's, 0 or more")
    return expected_tokens(agreement, k) / (k * cost_ratio + 1)


def speedup_measured(agreement: float, k: int, draft_s: float, target_s: Callable[[int], float]) -> float:
    """The same with the target's own time for checking: `target_s(m)` seconds for m rows a sequence."""
    return expected_tokens(agreement, k) * target_s(1) / (k * draft_s + target_s(k + 1))


def arithmetic_increase(agreement: float, k: int, flops_ratio: float) -> float:
    """Theorem 3.11: total operations over those without drafts; flops_ratio: the draft's operations a token over the
    target's.
    """
    return (k * flops_ratio + k + 1) / expected_tokens(agreement, k)


@dataclass(frozen=True)
class Best:
    """The draft length that gains most (0: drafting does not pay), with what it gains."""

    k: int
    speedup: float
    expected_tokens: float


def best(agreement: float, gain: Callable[[int], float], longest: int = LONGEST) -> Best:
    """The best of k = 0 … longest by `gain`, the shortest where several gain the same."""
    k = max(range(longest + 1), key=lambda k: (gain(k), -k))
    return Best(k, gain(k), expected_tokens(agreement, k))


def agreement_of(target_logits: np.ndarray, draft_logits: np.ndarray, temperature: float = 0.0) -> float:
    """The agreement of two models over the same positions.

    Args:
        target_logits, draft_logits: [positions, vocabulary], any float dtype.
        temperature: 0 for greedy decoding, else what both distributions are sharpened or flattened by.

    Returns the share of accepted draft tokens, 0 to 1. Raises UserError where the shapes differ or temperature is
    negative.
    """
    import numpy as np

    if target_logits.shape != draft_logits.shape or target_logits.ndim != 2:
        raise UserError(
            f"logits of shape {list(target_logits.shape)} and {list(draft_logits.shape)}: both must be [positions, "
            "vocabulary], of models with one vocabulary"
        )
    if not temperature >= 0:
        raise UserError(f"a temperature of {temperature}: it must be 0 or more")
    if temperature == 0:
        return float((target_logits.argmax(-1) == draft_logits.argmax(-1)).mean())

    def probabilities(logits: np.ndarray) -> np.ndarray:
        scaled = logits.astype(np.float64) / temperature
        weights = np.exp(scaled - scaled.max(-1, keepdims=True))
        return weights / weights.sum(-1, keepdims=True)

    return float(np.minimum(probabilities(target_logits), probabilities(draft_logits)).sum(-1).mean())


def _check(agreement: float, k: int) -> None:
    if not 0 <= agreement <= 1:
        raise UserError(f"an agreement of {agreement}: give the share of accepted draft tokens, from 0 to 1")
    if k < 0:
        raise UserError(f"{k} tokens to speculate: give 0 or more")
