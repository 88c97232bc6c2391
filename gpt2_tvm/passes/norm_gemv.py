"""`norm-gemv`: a LayerNorm joins the product of few rows that reads it, which then needs no launch of its own.

Only where each block of the product can afford to compute it again (`schedules/norm_gemv.py`): a fixed number of rows,
at most eight, that fit a block's shared memory. Elsewhere (prefill) LayerNorm stays a function, read once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import tvm

from gpt2_tvm.passes.prologues import few_rows, join_prologues
from gpt2_tvm.schedules.norm_gemv import fits

if TYPE_CHECKING:
    from targets import DeviceTarget

REDUCTIONS = 2  # the sum, and the squares about the mean


def after_fusion(on: bool, target: DeviceTarget) -> Any:
    if not on:
        return None
    tvm_target = target.tvm_target()

    def prepare(mod: tvm.IRModule, producer: Any) -> Any | None:
        rows, elements = few_rows(producer.var) or (0, 0)
        item = tvm.DataType(str(producer.var.ty.dtype)).itemsize
        return producer if fits(rows * elements, item, REDUCTIONS, REDUCTIONS * rows, tvm_target) else None

    return join_prologues("NormInProduct", ("layer_norm",), prepare)
