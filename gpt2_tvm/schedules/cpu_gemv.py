"""Matrix product of one to eight rows with a weight in panels, on a CPU: decode, small batches, verify.

The weight is read once, strictly forwards, whatever the number of rows; memory sets the time, so the one rule is that
nothing may make the loads wait:

    x as float32 [rows, K], if it is not                        # once, on the calling thread
    for two or four neighbouring panels in parallel:            # as many streams that the prefetcher runs ahead on
        for group of rows:
            acc [unrolled k, panels, rows, NR] in registers     # enough independent sums to cover the FMA's latency
            for k: acc[k % u, p, r, :] += x[r, k] * w[p, k, :]
            fold acc, epilogue row by row

One group holds all rows unless their sums do not fit the registers (7 or 8 rows with AVX2 or NEON); then the second
finds the panel, at most a few hundred KiB, in L2: memory still gives the weight once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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

# Panels that one task reads side by side, where at least so many tasks remain. One core of a Zen 5 reads a 768 x 768
# weight at 30 GB/s in one stream, at 34 in two and at 38 in four; many cores would rather have the tasks.
STREAMS = {4: 16, 2: 8}
# Multiply-adds under which a second thread costs more than it saves (waking the pool: 2 to 10 us)
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
        # Step 2. Equal groups of rows whose sums fit the registers; panels side by side as far as they still fit
        n, k = m.shape
        tiling = Tiling.of(self.layout, target, int(m.weight.shape[2]), k)
        panels = -(-n // tiling.rows)
        groups = -(-rows // tiling.tile_rows)
        group_rows = -(-rows // groups)
        fits = tiling.tile_rows // group_rows
        streams = next((s for s, tasks in STREAMS.items() if s <= fits and panels >= s * tasks), 1)
        kind = T.parallel if panels > streams and rows * n * k >= PARALLEL_WORK else T.serial

        # Step 3. One pass over the panels
        def body() -> None:
            x = _float32_rows(m, rows, tiling.lanes)
            with loop(kind, "task", -(-panels // streams)) as task, loop(T.serial, "group", groups) as group:
                # the last row, and the last panel, stand in for those that a short last group lacks
                first = bind("first_row", group * group_rows)
                side = [bind(f"panel{i}", tirx.min(task * streams + i, T.int64(panels - 1))) for i in range(streams)]
                sums = _product(m, tiling, side, group_rows, lambda r, k: x(tirx.min(first + r, T.int64(rows - 1)), k))
                with (
                    loop(T.serial, "i", streams) as i,
                    loop(T.serial, "row", tirx.min(T.int64(group_rows), rows - first)) as row,
                ):
                    panel = bind("panel", tirx.min(task * streams + i, T.int64(panels - 1)))
                    emit_epilogue(m, tiling, first + row, panel, lambda c: tirx.BufferLoad(sums, [i, row, c]))

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
    m: PackedMatmul, tiling: Tiling, panels: Sequence[Expr], rows: int, x: Callable[[Expr, Expr], Expr]
) -> Buffer:
    """A buffer [len(panels), rows, NR] with the sum over k of x(r, k) * W[panels[i], k, c] at (i, r, c)."""
    k_extent, lanes = m.shape[1], tiling.lanes
    columns = tiling.rows // lanes
    unroll = max(1, tiling.tile_rows // (rows * len(panels)))
    sums = alloc("sums", [len(panels), rows, tiling.rows], "float32")
    registers = [(i, v) for i in range(len(panels)) for v in range(columns)]
    acc = {(i, v): alloc(f"acc{i}_{v}", [unroll * rows, lanes], "float32") for i, v in registers}

    def each(slots: int, body: Callable[[Buffer, int, Expr, Expr, Expr], None]) -> None:
        """body(accumulator, panel, slot, lane, column) for every lane of every register"""
        with loop(T.unroll, "slot", slots) as slot:
            for (i, v), a in acc.items():
                with loop(T.vectorized, "lane", lanes) as lane:
                    body(a, i, slot, lane, v * lanes + lane)

    def multiply(u: int, k: Expr) -> None:
        def body(a: Buffer, i: int, r: Expr, lane: Expr, c: Expr) -> None:
            place = [u * rows + r, lane]
            T.buffer_store(a, tirx.BufferLoad(a, place) + x(r, k) * m.weight_at(panels[i], k, c), place)

        each(rows, body)

    each(unroll * rows, lambda a, i, slot, lane, c: T.buffer_store(a, T.float32(0), [slot, lane]))
    with loop(T.serial, "k", k_extent // unroll) as k:
        for u in range(unroll):
            multiply(u, k * unroll + u)
    for k_tail in range(k_extent // unroll * unroll, k_extent):
        multiply(0, T.int64(k_tail))
    for u in range(1, unroll):
        each(rows, partial(_fold, u * rows))
    each(rows, lambda a, i, r, lane, c: T.buffer_store(sums, tirx.BufferLoad(a, [r, lane]), [i, r, c]))
    return sums


def _fold(offset: int, acc: Buffer, panel: int, r: Expr, lane: Expr, column: Expr) -> None:
    T.buffer_store(acc, tirx.BufferLoad(acc, [r, lane]) + tirx.BufferLoad(acc, [offset + r, lane]), [r, lane])
