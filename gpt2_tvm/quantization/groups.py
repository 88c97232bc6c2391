"""Four bits, symmetric, one scale for 32 neighbours of a row: weight[n, k] is scale[n, k // 32] * (q[n, k] - 7) with q
from 0 to 14, in the layout that mlc-llm calls q4f16_1 (and q4f32_1, with float32 scales).

Eight q make one word of 32 bits, the first in the lowest four. A row whose length is no multiple of 32 ends with a
group that is filled up with zeros (q = 7).
"""

from __future__ import annotations

import numpy as np

from gpt2_tvm.errors import UserError

GROUP = 32
ZERO = 7  # the q that stands for 0
A_WORD = 8  # q in a word
_AT_ONCE = 4 << 20  # elements widened at a time: bounds the memory beside the result


def words_of(k: int) -> int:
    """Words of a row of k weights."""
    return groups_of(k) * (GROUP // A_WORD)


def groups_of(k: int) -> int:
    """Groups, hence scales, of a row of k weights."""
    return -(-k // GROUP)


def quantise_groups(name: str, weight: np.ndarray, scale_dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """[N, K] of any float dtype -> (uint32 [N, words_of(K)], scales [N, groups_of(K)] of `scale_dtype`).

    A weight is rounded to a multiple of the scale as it is stored, so that the scale's own rounding costs nothing
    twice. A group of zeros has scale 0, and one whose scale is less than the dtype can hold becomes zeros. Raises
    UserError, with the tensor's name, for NaN, infinity, and a group that is too large for a float16 scale.
    """
    n, k = weight.shape
    words = np.empty((n, words_of(k)), np.uint32)
    scales = np.empty((n, groups_of(k)), scale_dtype)
    step = max(1, _AT_ONCE // k)
    shifts = np.arange(0, 4 * A_WORD, 4, dtype=np.uint32)
    for start in range(0, n, step):
        rows = weight[start : start + step]
        block = np.zeros((len(rows), groups_of(k) * GROUP), np.float32)
        block[:, :k] = rows
        groups = block.reshape(len(rows), -1, GROUP)
        largest = np.abs(groups).max(axis=2)  # NaN where there is one
        _check(name, largest, start, scale_dtype)
        stored = (largest / np.float32(ZERO)).astype(scale_dtype)
        scales[start : start + step] = stored
        scale = stored.astype(np.float32)[:, :, None]
        quotient = np.divide(groups, scale, out=np.zeros_like(groups), where=scale > 0)
        # a rounded scale can make the largest weight a little more than 7 of them
        q = np.clip(np.rint(quotient), -ZERO, ZERO).astype(np.int32) + ZERO
        packed = q.reshape(len(rows), -1, A_WORD).astype(np.uint32) << shifts
        words[start : start + step] = np.bitwise_or.reduce(packed, axis=2)
    return words, scales


def dequantise_groups(words: np.ndarray, scales: np.ndarray, k: int) -> np.ndarray:
    """(uint32 [N, words], scales [N, groups]) -> float32 [N, k], the values that the kernels compute with."""
    shifts = np.arange(0, 4 * A_WORD, 4, dtype=np.uint32)
    q = ((words[:, :, None] >> shifts) & np.uint32(15)).reshape(len(words), -1).astype(np.float32) - ZERO
    return (q.reshape(len(words), -1, GROUP) * scales.astype(np.float32)[:, :, None]).reshape(len(words), -1)[:, :k]


def _check(name: str, largest: np.ndarray, start: int, scale_dtype: str) -> None:
    if not np.isfinite(largest).all():
        row = start + int(np.argwhere(~np.isfinite(largest))[0][0])
        raise UserError(
            f"{name} holds NaN or infinity (row {row}) and cannot be quantised; "
            "the checkpoint is damaged or its training diverged"
        )
    if scale_dtype == "float16" and float(largest.max(initial=0)) / ZERO > float(np.finfo(np.float16).max):
        row = start + int(np.argwhere(largest == largest.max())[0][0])
        raise UserError(
            f"{name} holds {float(largest.max()):g} (row {row}), more than float16 scales reach; "
            "choose a scheme with float32 scales (--quantization q4f32_1)"
        )
