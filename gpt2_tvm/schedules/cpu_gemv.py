"""Matrix product of one to eight rows with a weight in panels, on a CPU: decode, small batches, verify.

The weight is read once, strictly forwards, whatever the number of rows; memory sets the time, so the one rule is that
nothing may make the loads wait:

    x as float32 [rows, K], if it is not                        # once, on the calling thread
    for panel in parallel:
        acc [unrolled k, rows, NR] in registers                 # enough independent sums to cover the FMA's latency
        for k: acc[k % u, r, :] += x[r, k] * w[k, :]
        fold acc, epilogue row by row

Where rows * NR sums do not fit the registers (8 rows with AVX2), rows go in groups over blocks of k that stay in L1:
memory still gives the weight once.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

from tvm import ir, s_tir, tirx
from tvm.s_tir import dlight
from tvm.script import tirx as T
from tvm.target import Target

from gpt2_tvm.kernels.math import Expr, static
from gpt2_tvm.schedules.cpu_matmul import GEMV_ROWS, PackedMatmul, Tiling, emit_epilogue, match_packed_matmul
from gpt2_tvm.schedules.cpu_reduction import (
    Buffer,
    alloc,
    bind,
    loop,
    scheduled,
    takes,
    vector_loop,
)

# Vectors of sums that run side by side: a fused multiply-add takes 4 cycles and two start in each
INDEPENDENT_SUMS = 8
# Multiply-adds under which a second thread costs more than it saves (the thread pool's 2 to 10 us)
PARALLEL_WORK = 65536


class CpuGemv(dlight.ScheduleRule):
    """`packed_matmul` with 1 to 8 rows, known at compile time, and its epilogue.

    layout: the target's; `tile_rows` (how many rows of sums fit the registers) and where it names it `simd_bits`.
    """

    def __init__(self, layout: Any = None) -> None:
        self.layout = layout

    def apply(self, func: tirx.PrimFunc, target: Target, tunable: bool) -> s_tir.Schedule | None:
        # Step 1. Recognise the product
        m = match_packed_matmul(func) if takes(func, target) else None
        rows = static(m.rows) if m is not None else None
        if m is None or rows is None or not 1 <= rows <= GEMV_ROWS:
            return None
        # Step 2. Rows that fit the registers together, and threads for what is worth them
        n, k = m.shape
        tiling = Tiling.of(self.layout, target, int(m.weight.shape[2]), k)
        panels = -(-n // tiling.rows)
        kind = T.parallel if panels > 1 and rows * panels * tiling.rows * k >= PARALLEL_WORK else T.serial

        # Step 3. One pass over the panels
        def body() -> None:
            x = _float32_rows(m, rows, tiling.lanes)
            with loop(kind, "panel", panels) as panel:
                sums = alloc("sums", [rows, tiling.rows], "float32")
                _product(m, tiling, rows, panel, x, sums)
                with loop(T.serial, "row", rows) as row:
                    emit_epilogue(m, tiling, row, panel, lambda c: tirx.BufferLoad(sums, [row, c]))

        return scheduled(func, body)


def _float32_rows(m: PackedMatmul, rows: int, lanes: int) -> Callable[[Expr, Expr], Expr]:
    """x[row, k] as the inner loop reads it: in place, or from a float32 copy where x is another dtype or computed."""
    if isinstance(m.x, ir.TensorLoad):
        return m.x_at
    copy = alloc("x_float32", [rows, m.shape[1]], "float32", "global")
    with loop(T.serial, "r", rows) as r:
        vector_loop("k", m.shape[1], lanes, lambda k: T.buffer_store(copy, m.x_at(r, k), [r, k]))
    return lambda row, k: tirx.BufferLoad(copy, [row, k])


def _product(
    m: PackedMatmul, tiling: Tiling, rows: int, panel: Expr, x: Callable[[Expr, Expr], Expr], sums: Buffer
) -> None:
    """sums[r, c] := x[r, :] . weight[panel * NR + c, :], in groups of rows that fit the registers."""
    k = m.shape[1]
    groups = -(-rows // tiling.tile_rows)
    if groups == 1:
        _accumulate(m, tiling, panel, x, sums, (0, rows), T.int64(0), k, None)
        return
    bounds = [rows * g // groups for g in range(groups + 1)]
    with loop(T.serial, "k_outer", -(-k // tiling.k_block)) as k_outer:
        first = bind("k_first", k_outer * tiling.k_block)
        count = bind("k_count", tirx.min(T.int64(tiling.k_block), k - first))
        for group in pairwise(bounds):
            _accumulate(m, tiling, panel, x, sums, group, first, count, k_outer == 0)


def _accumulate(
    m: PackedMatmul,
    tiling: Tiling,
    panel: Expr,
    x: Callable[[Expr, Expr], Expr],
    sums: Buffer,
    group: tuple[int, int],
    k_first: Expr,
    k_count: Expr | int,
    is_first: Expr | None,
) -> None:
    """Rows group[0] to group[1] - 1 over k_first, …, k_first + k_count - 1; without `is_first` sums start at zero."""
    start, rows, lanes = group[0], group[1] - group[0], tiling.lanes
    columns = tiling.rows // lanes
    unroll = max(1, INDEPENDENT_SUMS // (rows * columns)) if static(k_count) else 1
    acc = [alloc(f"acc{v}", [unroll * rows, lanes], "float32") for v in range(columns)]

    def each(slots: int, body: Callable[[Buffer, Expr, Expr, Expr], None]) -> None:
        for v, column in enumerate(acc):
            with loop(T.unroll, "slot", slots) as slot, loop(T.vectorized, "lane", lanes) as lane:
                body(column, slot, lane, v * lanes + lane)

    def zero(a: Buffer, slot: Expr, lane: Expr, c: Expr) -> None:
        T.buffer_store(a, T.float32(0), [slot, lane])

    def resume(a: Buffer, slot: Expr, lane: Expr, c: Expr) -> None:
        T.buffer_store(a, tirx.BufferLoad(sums, [start + slot, c]), [slot, lane])

    def multiply(u: int, k: Expr) -> Callable[[Buffer, Expr, Expr, Expr], None]:
        def body(a: Buffer, r: Expr, lane: Expr, c: Expr) -> None:
            place = [u * rows + r, lane]
            T.buffer_store(a, tirx.BufferLoad(a, place) + x(start + r, k) * m.weight_at(panel, k, c), place)

        return body

    if is_first is None:
        each(unroll * rows, zero)
    else:
        with T.If(is_first):
            with T.Then():
                each(rows, zero)
            with T.Else():
                each(rows, resume)
    with loop(T.serial, "k", k_count // unroll) as k:
        for u in range(unroll):
            each(rows, multiply(u, k_first + k * unroll + u))
    if unroll > 1 and int(k_count) % unroll:
        with loop(T.serial, "k_tail", int(k_count) % unroll) as k:
            each(rows, multiply(0, k_first + int(k_count) // unroll * unroll + k))
    for u in range(1, unroll):
        each(rows, partial(_fold, u * rows))
    each(rows, lambda a, r, lane, c: T.buffer_store(sums, tirx.BufferLoad(a, [r, lane]), [start + r, c]))


def _fold(offset: int, acc: Buffer, r: Expr, lane: Expr, _: Expr) -> None:
    T.buffer_store(acc, tirx.BufferLoad(acc, [r, lane]) + tirx.BufferLoad(acc, [offset + r, lane]), [r, lane])
