"""Linear layers on weights stored in panels, for CPUs.

A weight [N, K] is stored as W [P, K, NR], P = ceil(N / NR): ``W[o // NR, k, o % NR] = weight[o, k]``, zeros past row N.
NR is two or more vector registers wide, so the k loop of a panel reads memory strictly forwards and multiplies whole
registers by one element of x: no horizontal sums, and one layout for one row (`schedules/cpu_gemv.py`) and for many
(`schedules/cpu_matmul.py`). It is the packing of GotoBLAS (Goto and van de Geijn 2008, "Anatomy of High-Performance
Matrix Multiplication") done once, when weights are converted, instead of in every call.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from tvm import te, tirx

from gpt2_tvm.errors import UserError


def pack(weight: np.ndarray, rows: int) -> np.ndarray:
    """[N, K] of any dtype -> [ceil(N / rows), K, rows], C-contiguous, the last panel padded with zeros.

    Panels are written one after the other, and each reads `rows` neighbouring rows of `weight`: a memory-mapped weight
    streams through, and nothing of its size is held beside the result.
    Raises UserError where `weight` is not a matrix or `rows` is not positive.
    """
    if weight.ndim != 2 or rows < 1:
        raise UserError(
            f"cannot pack a weight of shape {list(weight.shape)} into panels of {rows} rows; "
            "a linear weight is a matrix, and [layout] rows in the target's TOML is at least 1"
        )
    n, k = weight.shape
    packed = np.empty((-(-n // rows), k, rows), weight.dtype)
    for panel, first in enumerate(range(0, n, rows)):
        block = weight[first : first + rows]
        packed[panel, :, : len(block)] = block.T
        packed[panel, :, len(block) :] = 0
    return packed


def packed_matmul(x: te.Tensor, w: te.Tensor, out_features: int) -> te.Tensor:
    """x [b, n, K] times the transpose of the weight in w [P, K, NR] -> [b, n, out_features] float32.

    x and w may be of any dtype that casts to float32 (float32, float16, int8 …); products and sums are float32.
    FuseOps sees a reduction that elementwise operators may follow in the same function (kOutEWiseFusable), so bias,
    activation, residual and casts join it.
    """
    b, n, k_extent = x.shape
    panel_rows = w.shape[2]
    k = te.reduce_axis((0, k_extent), name="k")

    def product(i: tirx.Var, t: tirx.Var, o: tirx.Var) -> Any:
        element = w[tirx.floordiv(o, panel_rows), k, tirx.floormod(o, panel_rows)]
        return te.sum(x[i, t, k].astype("float32") * element.astype("float32"), axis=k)

    return te.compute((b, n, out_features), product, name="packed_matmul")
