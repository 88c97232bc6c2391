"""What `TunableGemv` schedules: y[rows, s] = sum over r of x[rows, r] W[s, r], with what follows the product.

Two ways to recognise it. One row: DLight's own analysis, so that exactly the functions are taken that `dl.gpu.GEMV`
takes. Two to eight rows, which that analysis declines: the weight's indices are (s, r), the activation's (rows, r).

A packed weight (`kernels/dequantise.py`) is the words that it lies in, (s, r // 2) for float16, (s, r // 4) for int8,
(s, r // 8) for 4 bits: `match_gemv` inlines the stage that spreads them into the product.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import tvm_ffi
from tvm import s_tir, tirx
from tvm.s_tir.dlight import analysis
from tvm.s_tir.dlight.analysis import get_root_block
from tvm.s_tir.dlight.analysis.gemv import get_reduction_expr
from tvm.s_tir.dlight.base import try_inline_contiguous_spatial

MAX_ROWS = 8
PACKED = {2: "float16", 4: "int8", 8: "int4"}  # weights in a word of 32 bits


@dataclass
class GemvMatch:
    """A product found in a schedule, its loops in the order of the fields.

    block: the reduction · epilogue: the one elementwise block after it, or None · spatial: the outputs' loop (after a
    unit batch loop where there is one row) · row: loop over the rows, or None for one · reduction, group: loops over
    r, and over what shares a scale · outputs, reduced, grouped: their extents (None: symbolic) · rows · vectors: the
    activations' buffers · weight, vector: which of the block's reads they are.
    """

    block: Any
    epilogue: Any | None
    spatial: list[Any]
    row: Any | None
    reduction: Any
    group: Any
    outputs: int | None
    reduced: int | None
    grouped: int
    rows: int
    vectors: list[tirx.Buffer]
    weight: int = 1
    vector: int = 0

    def weight_dtype(self, sch: s_tir.Schedule) -> str:
        """Of a weight, also where words of 32 bits hold several."""
        read = sch.get(self.block).reads[self.weight]
        return PACKED.get(_weights_a_word(read), str(read.source.dtype))


def _weights_a_word(read: Any) -> int:
    """2, 4 or 8 for words of which each holds so many neighbouring weights, else 1."""
    last = read.region[-1].min
    if str(read.source.dtype) == "uint32" and isinstance(last, tirx.FloorDiv) and isinstance(last.b, tirx.IntImm):
        return int(last.b)
    return 1


def is_quantised(func: tirx.PrimFunc) -> bool:
    """Whether a function reads words of 32 bits, as quantised weights do."""
    return any(str(getattr(p, "dtype", "")) == "uint32" for p in func.params)


def without_rounding(func: tirx.PrimFunc) -> tirx.PrimFunc:
    """A product with a quantised weight, its elements spread as float32 where it multiplies them; other functions as
    they are.

    The stage that spreads them may store float16, for tensor cores; a GEMV would convert to float16 and back.
    """
    if not is_quantised(func):
        return func
    sch = s_tir.Schedule(func)
    for block in sch.get_child_blocks(get_root_block(sch)):
        stage = sch.get(block)
        words = any(str(read.source.dtype) == "uint32" for read in stage.reads)
        spatial = all(i.iter_type == tirx.IterVar.DataPar for i in stage.iter_vars)
        made = stage.writes[0].source
        between = not any(made.same_as(p) for p in func.params)  # a function may do nothing but spread (embed)
        if words and spatial and between and str(made.dtype) == "float16":
            sch.compute_inline(block)
    (inlined,) = sch.mod.functions.values()

    def narrow(cast: tirx.Cast) -> Any:
        inner = cast.value
        if isinstance(inner, tirx.Cast) and str(inner.ty.dtype) == "float16" and cast.ty == inner.value.ty:
            return inner.value
        return cast

    return inlined.with_body(tvm_ffi.structural_map(inlined.body, [(tirx.Cast, narrow)]))


def match_gemv(sch: s_tir.Schedule) -> GemvMatch | None:
    """Bring the function to a product and at most one elementwise block; None where it is no such function."""
    infos = analysis.normalize_prim_func(sch)
    infos = try_inline_contiguous_spatial(sch, infos)
    if not infos or len(infos) > 2 or not infos[0].is_reduction():
        return None
    if len(infos) == 2 and not infos[1].is_injective():
        return None
    epilogue = infos[1].block_rv if len(infos) == 2 else None
    return _one_row(sch, infos[0], epilogue) or _several_rows(sch, infos[0], epilogue)


def _extent(sch: s_tir.Schedule, loop: Any) -> int | None:
    extent = sch.get(loop).extent
    return int(extent) if isinstance(extent, tirx.IntImm) else None


def _one_row(sch: s_tir.Schedule, info: Any, epilogue: Any) -> GemvMatch | None:
    if len(info.iters) not in (2, 3):
        return None
    vectors = analysis.is_gemv(sch, info)
    if vectors is None or analysis.normalize(sch, info) is not True:
        return None  # not a product, or one that runs over the weight's outer axis
    batch, s, r, c = sch.get_loops(info.block_rv)
    extents = [_extent(sch, loop) for loop in (batch, s, r, c)]
    outputs = None if extents[0] is None or extents[1] is None else extents[0] * extents[1]
    reduced = None if extents[2] is None or extents[3] is None else extents[2] * extents[3]
    return GemvMatch(info.block_rv, epilogue, [batch, s], None, r, c, outputs, reduced, extents[3] or 1, 1, vectors)


def _several_rows(sch: s_tir.Schedule, info: Any, epilogue: Any) -> GemvMatch | None:
    block = sch.get(info.block_rv)
    kinds = {i.var: i.kind for i in info.iters}
    if list(kinds.values()).count("R") != 1 or get_reduction_expr(block) is None:
        return None
    quantised = len(block.reads) > 1 and _weights_a_word(block.reads[1]) in PACKED
    if len(block.reads) != 2 and not (quantised and len(block.reads) == 3):  # the third: scales of groups
        return None
    used = []
    for read in block.reads:
        if any(not (isinstance(r.extent, tirx.IntImm) and int(r.extent) == 1) for r in read.region):
            return None
        used.append(analysis.collect_block_iter_vars_used_in_access_region(block, read.region))
    spatial = {v for v, kind in kinds.items() if kind == "S"}
    reduction = next(v for v, kind in kinds.items() if kind == "R")
    vector, weight = 0, 1
    rows, outputs = used[vector] & spatial, used[weight] & spatial
    last = block.reads[weight].region[-1].min
    last = last.a if quantised else last
    if reduction not in used[vector] or not last.same_as(reduction) or rows & outputs or rows | outputs != spatial:
        return None
    if any(others & rows for others in used[2:]):
        return None
    if len(outputs) != 1 or not rows:
        return None
    # rows come first in the result, so that its last axis is the outputs'
    order = [i.var for i in info.iters if i.kind == "S"]
    if order[-1] not in outputs:
        return None
    loops = {i.var: i.loop_rv for i in info.iters}
    extents = [_extent(sch, loops[v]) for v in order[:-1]]
    if any(e is None for e in extents) or not 1 < prod(e or 1 for e in extents) <= MAX_ROWS:
        return None
    s, r = loops[order[-1]], loops[reduction]
    row_loops = [loops[v] for v in order[:-1]]
    sch.reorder(s, *row_loops, r)
    row = sch.fuse(*row_loops)
    group = sch.add_unit_loop(info.block_rv)
    size = _extent(sch, row) or 1
    buffers = [block.reads[vector].source]
    return GemvMatch(
        info.block_rv, epilogue, [s], row, r, group, _extent(sch, s), _extent(sch, r), 1, size, buffers, weight, vector
    )
