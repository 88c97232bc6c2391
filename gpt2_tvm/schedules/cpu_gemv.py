"""Matrix product of one to eight rows with a weight in panels, on a CPU: decode, small batches, verify.

The weight is read once, strictly forwards, whatever the number of rows; memory sets the time, so the one rule is that
nothing may make the loads wait:

    x as float32 [rows, K], if it is not                        # once, on the calling thread
    for panel in parallel:
        acc [unrolled k, rows, NR] in registers                 # enough independent sums to cover the FMA's latency
        for k: acc[k % u, r, :] += x[r, k] * w[k, :]
        fold acc, epilogue row by row

Where rows * NR sums do not fit the registers (8 rows with AVX2), rows go in groups, and the later ones find the panel
(at most a few hundred KiB) in L2: memory still gives the weight once.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
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

        # Step 3. One pass over the panels, each for rows in equal groups that fit the registers
        group_rows = -(-rows // -(-rows // tiling.tile_rows))

        def body() -> None:
            x = _float32_rows(m, rows, tiling.lanes)
            with loop(kind, "panel", panels) as panel, loop(T.serial, "group", -(-rows // group_rows)) as group:
                first = bind("first_row", group * group_rows)
                # the last row stands in for those that a short last group lacks
                sums = _product(m, tiling, panel, group_rows, lambda r, k: x(tirx.min(first + r, T.int64(rows - 1)), k))
                with loop(T.serial, "row", tirx.min(T.int64(group_rows), rows - first)) as row:
                    emit_epilogue(m, tiling, first + row, panel, lambda c: tirx.BufferLoad(sums, [row, c]))

        return scheduled(func, body)


def _float32_rows(m: PackedMatmul, rows: int, lanes: int) -> Callable[[Expr, Expr], Expr]:
    """x[row, k] as the inner loop reads it: in place, or from a float32 copy where x is another dtype or computed."""
    if isinstance(m.x, ir.TensorLoad):
        return m.x_at
    copy = alloc("x_float32", [rows, m.shape[1]], "float32", "global")
    with loop(T.serial, "r", rows) as r:
        vector_loop("k", m.shape[1], lanes, lambda k: T.buffer_store(copy, m.x_at(r, k), [r, k]))
    return lambda row, k: tirx.BufferLoad(copy, [row, k])


def _product(m: PackedMatmul, tiling: Tiling, panel: Expr, rows: int, x: Callable[[Expr, Expr], Expr]) -> Buffer:
    """A buffer [rows, NR] with the sum over k of x(r, k) * W[panel, k, c] at (r, c)."""
    k_extent, lanes = m.shape[1], tiling.lanes
    columns = tiling.rows // lanes
    unroll = max(1, INDEPENDENT_SUMS // (rows * columns))
    sums = alloc("sums", [rows, tiling.rows], "float32")
    acc = [alloc(f"acc{v}", [unroll * rows, lanes], "float32") for v in range(columns)]

    def each(slots: int, body: Callable[[Buffer, Expr, Expr, Expr], None]) -> None:
        with loop(T.unroll, "slot", slots) as slot:
            for v, column in enumerate(acc):
                with loop(T.vectorized, "lane", lanes) as lane:
                    body(column, slot, lane, v * lanes + lane)

    def multiply(u: int, k: Expr) -> Callable[[Buffer, Expr, Expr, Expr], None]:
        def body(a: Buffer, r: Expr, lane: Expr, c: Expr) -> None:
            place = [u * rows + r, lane]
            T.buffer_store(a, tirx.BufferLoad(a, place) + x(r, k) * m.weight_at(panel, k, c), place)

        return body

    each(unroll * rows, lambda a, slot, lane, c: T.buffer_store(a, T.float32(0), [slot, lane]))
    with loop(T.serial, "k", k_extent // unroll) as k:
        for u in range(unroll):
            each(rows, multiply(u, k * unroll + u))
    for k_tail in range(k_extent // unroll * unroll, k_extent):
        each(rows, multiply(0, T.int64(k_tail)))
    for u in range(1, unroll):
        each(rows, partial(_fold, u * rows))
    each(rows, lambda a, r, lane, c: T.buffer_store(sums, tirx.BufferLoad(a, [r, lane]), [r, c]))
    return sums


def _fold(offset: int, acc: Buffer, r: Expr, lane: Expr, _: Expr) -> None:
    T.buffer_store(acc, tirx.BufferLoad(acc, [r, lane]) + tirx.BufferLoad(acc, [offset + r, lane]), [r, lane])
