"""Int8, symmetric, one scale a row: weight[n, k] is scale[n] * q[n, k] with q from -127 to 127.

A row's largest magnitude is what 127 stands for, so an element is off by at most half a scale, and rows do not disturb
each other: one row with an outlier loses precision alone.
"""

from __future__ import annotations

import numpy as np

from gpt2_tvm.errors import UserError

LEVELS = 127
_AT_ONCE = 4 << 20  # elements widened at a time: bounds the memory beside the result


def quantise_rows(name: str, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[N, K] of any float dtype -> (int8 [N, K], float32 scales [N]).

    A row of zeros has scale 0. Raises UserError, with the tensor's name, for NaN and infinity.
    """
    n, k = weight.shape
    quantised, scales = np.empty((n, k), np.int8), np.empty(n, np.float32)
    step = max(1, _AT_ONCE // k)
    for start in range(0, n, step):
        block = weight[start : start + step].astype(np.float32)
        largest = np.abs(block).max(axis=1)  # NaN where there is one
        if not np.isfinite(largest).all():
            row = start + int(np.flatnonzero(~np.isfinite(largest))[0])
            raise UserError(
                f"{name} holds NaN or infinity (row {row}) and cannot be quantised; "
                "the checkpoint is damaged or its training diverged"
            )
        scale = largest / np.float32(LEVELS)
        # 0 for a row of zeros, and for one of the smallest subnormals, which then becomes zeros too
        block /= np.where(scale > 0, scale, 1)[:, None]
        # a subnormal scale has few bits: its quotients can exceed 127
        quantised[start : start + step] = np.clip(np.rint(block, out=block), -LEVELS, LEVELS, out=block)
        scales[start : start + step] = scale
    return quantised, scales


def dequantise_rows(quantised: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """(int8 [N, K], float32 [N]) -> float32 [N, K], the values that the kernels compute with."""
    return quantised * scales[:, None]
