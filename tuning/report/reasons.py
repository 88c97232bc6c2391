"""Why a rule does not want a function, in words, from the function alone.

`asking` finds the line of the rule that said no; this says the same for a reader who does not know the rule's source,
where the usual reasons apply: no reduction, several, not a sum, no product, one row, many rows or a number of them that
only the run knows, a batch. "" where none of them does: then the line has to speak.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import tvm_ffi
from tvm import ir, s_tir, tirx

from gpt2_tvm.expressions import Text, combine
from gpt2_tvm.schedules.cpu_matmul import GEMV_ROWS
from gpt2_tvm.schedules.gemv_match import MAX_ROWS
from tuning.report.loops import extent_text

QUANTISED = ("int8", "uint32")  # weights in integers, as they are or in words
NO_PRODUCT = "it is no product of a weight with rows"
OF_FEW_ROWS = ("norm-gemv", "late-norm-gemv", "quantised-gemv", "wide-gemv", "webgpu-gemv")
_COMBINERS = {"Add": "sum", "Max": "maximum", "Min": "minimum", "Mul": "product"}


@dataclass(frozen=True)
class Work:
    """What an unscheduled function does, as far as rules care.

    reductions: "sum", "maximum" ... of each stage that reduces. stages: how many loop nests. product: whether a
    reduction, the last such, sums products of two buffers. rows: then the extent of the smaller factor's own axes (1 in
    a matrix-vector product), else None. batch: of the axes that both factors share. packed: whether the weight lies in
    panels [P, K, NR]. prologue: whether the function reduces first, to compute what the product multiplies. quantised:
    whether its weight is stored in integers.
    """

    reductions: tuple[str, ...]
    stages: int
    product: bool
    rows: Text | None
    batch: Text
    packed: bool
    prologue: bool
    quantised: bool


def work_of(func: tirx.PrimFunc) -> Work:
    """Read an unscheduled PrimFunc."""
    blocks: list[Any] = []
    tvm_ffi.structural_walk(
        func.body, [(s_tir.SBlock, lambda b: blocks.append(b) if b.iter_vars else None)], order="pre"
    )
    reducing = [block for block in blocks if block.init is not None]
    at = max((i for i, block in enumerate(reducing) if _factors(block)), default=None)
    factors = _factors(reducing[at]) if at is not None else None
    rows, batch, packed = _rows(reducing[at], factors) if at is not None and factors else (None, 1, False)
    kinds = tuple(kind for block in reducing for kind in _combiners(block))
    quantised = any(str(getattr(param, "dtype", "")) in QUANTISED for param in func.params)
    return Work(kinds, len(blocks), factors is not None, rows, batch, packed, bool(at), quantised)


def why_not(rule: str, work: Work) -> str:
    """Why the rule of this name declines such a function, one sentence without a full stop; "" if it cannot be told."""
    if rule in OF_FEW_ROWS:
        return _why_not_few_rows(rule, work)
    if rule in ("matmul", "gemv", "reduction", "general-reduction", "dlight-cpu-gemv", "dlight-cpu-reduction"):
        if not work.reductions:
            return "it sums nothing: no stage of the function has a reduction"
        several = len(work.reductions) > 1
        if several and rule != "general-reduction":
            return f"it reduces {len(work.reductions)} times ({', '.join(work.reductions)}); the rule takes exactly one"
        if several and work.product:
            return (
                "it reduces first over one row and then, in a product, over another axis; the rule wants the same axes"
            )
    if rule == "matmul":
        if not work.product:
            return f"its {work.reductions[0]} is not over products of two matrices"
        if work.rows == 1:
            return "one factor is a vector: a matrix product needs rows, columns and a sum"
    elif rule in ("gemv", "dlight-cpu-gemv"):
        if not work.product:
            return f"its {work.reductions[0]} is not over products of a matrix and a vector"
        if work.rows != 1:
            return f"{_rows_text(work.rows)}: both factors are matrices, and the rule wants one to be a vector"
        if work.batch != 1:
            return f"it is a batch of {work.batch} products whose sums do not run along the innermost axis"
    elif rule in ("reduction", "dlight-cpu-reduction"):
        if work.reductions[0] != "sum":
            return f"it takes a {work.reductions[0]}; the rule takes sums"
        if work.product and work.rows != 1:
            return f"{_rows_text(work.rows)}: its largest input is not indexed by all of the output's axes"
    elif rule == "general-reduction":
        if work.stages == 1:
            return f"its only stage is the {work.reductions[0]}; the rule wants an elementwise stage at the end"
        if work.product and work.rows != 1:
            return "its stages do not all walk the same axes with the sum innermost"
    elif rule == "webgpu-matmul":
        if not work.product:
            return NO_PRODUCT
        if work.prologue:
            return "it reduces before the product, and every block would have to do that again for all of its rows"
    elif rule in ("tensor-matmul", "wgmma-matmul"):
        if not work.product:
            return NO_PRODUCT
        if rule == "wgmma-matmul" and isinstance(work.rows, int):
            return f"{_rows_text(work.rows)}: it is for rows whose number the caller chooses"
        if work.prologue:
            return "it reduces before the product; tensor cores are fed two matrices as they lie in memory"
        return "it is not two plain matrices of float16 with a depth that divides into the steps of tensor cores"
    elif rule == "persistent":
        return "the rule takes no function: with it the model calls one that is a whole step, scheduled as it comes"
    elif rule in ("cpu-matmul", "cpu-gemv"):
        if not (work.product and work.packed):
            return "it is not a product with a weight in panels"
        if rule == "cpu-matmul" and isinstance(work.rows, int) and work.rows <= GEMV_ROWS:
            return f"{_rows_text(work.rows)}: up to {GEMV_ROWS} rows, known at compile time, are cpu-gemv's"
        if rule == "cpu-gemv":
            return f"{_rows_text(work.rows)}: the rule takes 1 to {GEMV_ROWS} rows, known at compile time"
    elif rule == "cpu-reduction" and work.product:
        return "it is a product of matrices, not work on one row at a time"
    return ""


def _why_not_few_rows(rule: str, work: Work) -> str:
    """`why_not` for our rules of products with few rows on GPUs."""
    if not work.product:
        return NO_PRODUCT
    if not isinstance(work.rows, int) or work.rows > MAX_ROWS:
        return f"{_rows_text(work.rows)}: the rule takes 1 to {MAX_ROWS} rows, known at compile time"
    if rule in ("norm-gemv", "late-norm-gemv") and not work.prologue:
        return "its vector comes as it is: nothing before the product has to be reduced for it"
    if rule == "quantised-gemv" and not work.quantised:
        return "its weight is stored in floating point"
    if rule in ("quantised-gemv", "wide-gemv") and work.prologue:
        return "it reduces before the product to compute its vector, which is norm-gemv's work"
    if rule == "wide-gemv" and work.quantised:
        return "its weight is stored in integers, which is quantised-gemv's work"
    if rule == "wide-gemv":
        return "a row of its weight does not divide into loads of 16 bytes for at least four threads"
    return ""


def _rows_text(rows: Text | None) -> str:
    if isinstance(rows, int):
        return f"it has {rows} row{'s' if rows != 1 else ''}"
    return f"its number of rows ({rows}) is known only at run time"


def _factors(block: Any) -> list[Any] | None:
    """The two loads whose product a reduction sums, else None."""
    value = getattr(block.body, "value", None)
    if not isinstance(value, tirx.Add):
        return None
    for term in (value.a, value.b):
        if isinstance(term, tirx.Mul):
            loads: list[Any] = []
            tvm_ffi.structural_walk(term, [(ir.TensorLoad, loads.append)])
            if len(loads) == 2:
                return loads
    return None


def _rows(block: Any, loads: list[Any]) -> tuple[Text, Text, bool]:
    """(own extent of the factor that has less of it, extent that both share, whether a factor lies in panels)."""
    own: list[Text] = [1, 1]
    both: Text = 1
    for axis in block.iter_vars:
        if int(axis.iter_type) == int(tirx.IterVar.CommReduce):
            continue
        uses = [any(_uses(index, axis.var) for index in load.indices) for load in loads]
        extent = extent_text(axis.dom.extent)
        if all(uses):
            both = combine("*", both, extent)
        elif any(uses):
            own[uses.index(True)] = combine("*", own[uses.index(True)], extent)
    panels = any(len(load.indices) == 3 and type(load.indices[0]).__name__ == "FloorDiv" for load in loads)
    # the weight's own axes are the columns: known, and the larger where both are
    symbolic = [extent for extent in own if not isinstance(extent, int)]
    smaller = min((extent for extent in own if isinstance(extent, int)), default=1)
    return smaller if smaller == 1 or not symbolic else symbolic[0], both, panels


def _combiners(block: Any) -> list[str]:
    """What a reduction block combines with, one word for each buffer that it writes."""
    stores: list[Any] = []
    tvm_ffi.structural_walk(block.body, [(tirx.BufferStore, stores.append)])
    return [_COMBINERS.get(type(store.value).__name__, "combination") for store in stores]


def _uses(expression: Any, var: Any) -> bool:
    found: list[bool] = []
    tvm_ffi.structural_walk(expression, [(ir.Var, lambda v: found.append(True) if v.same_as(var) else None)])
    return bool(found)
