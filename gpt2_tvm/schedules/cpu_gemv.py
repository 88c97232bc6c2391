"""Matrix product of one to sixteen rows with a weight in panels, on a CPU: decode, small batches, verify.

The weight is read once, strictly forwards, whatever the number of rows; memory sets the time, so the one rule is that
nothing may make the loads wait:

    x as float32 [rows, K], if it is not                        # once, on the calling thread
    for panel in parallel:                                      # neighbouring panels follow one another in memory
        for group of rows:
            acc [sets, rows, NR] in registers                   # enough independent sums to cover the FMA's latency
            for k: prefetch; acc[k % sets, r, :] += x[r, k] * float32(w[k, :])
            fold acc, epilogue row by row

Weights of another dtype (float16, int8) are widened in registers, on the way from memory to the multiply-add; the scale
of a quantised row is part of the epilogue. They need the prefetch most: a core runs ahead of its loads by a number of
*instructions*, which for an int8 weight are a quarter of the bytes that they are for float32 (an eighth with two rows),
and a hardware prefetcher starts again in every page of 4 KiB. Past a panel's end the prefetch finds the next panel,
which the same thread reads next. One such stream a core was as fast as two or four side by side, and simpler.

One group holds all rows unless their sums do not fit the registers; then the second finds the panel, at most a few
hundred KiB, in L2: memory still gives the weight once.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import reduce
from typing import Any

from tvm import DataType, ir, s_tir, tirx
from tvm.s_tir import dlight
from tvm.script import tirx as T
from tvm.target import Target

from gpt2_tvm.kernels.math import Expr, static
from gpt2_tvm.schedules.blocking import LINE_BYTES, Blocking
from gpt2_tvm.schedules.cpu_group_gemv import group_product, rows_at_once
from gpt2_tvm.schedules.cpu_matmul import GEMV_ROWS, PackedMatmul, emit_epilogue, match_packed_matmul
from gpt2_tvm.schedules.stages import Buffer, alloc, bind, loop, prefetch, scheduled, takes, vector_loop

# Multiply-adds under which a second thread costs more than it saves (waking the pool: 2 to 10 us)
PARALLEL_WORK = 65536
# Independent sums that hide a multiply-add's latency: 4 cycles at 2 a cycle on today's cores, and a few to spare for
# what the widening of a weight delays
SUMS = 12


class CpuGemv(dlight.ScheduleRule):
    """`packed_matmul` with 1 to 16 rows, known at compile time, and its epilogue.

    processor: see `Blocking.of`.
    """

    def __init__(self, processor: Any = None) -> None:
        self.processor = processor

    def apply(self, func: tirx.PrimFunc, target: Target, tunable: bool) -> s_tir.Schedule | None:
        # Step 1. Recognise the product
        m = match_packed_matmul(func) if takes(func, target) else None
        rows = static(m.rows) if m is not None else None
        if m is None or rows is None or not 1 <= rows <= GEMV_ROWS:
            return None
        # Step 2. Equal groups of rows whose sums fit the registers
        n, k = m.shape
        blocking = Blocking.of(self.processor, target)
        lanes = blocking.lanes_in(m.panel_rows)
        columns = m.panel_rows // lanes
        at_once = blocking.rows_in_registers(columns) if m.element is None else rows_at_once(blocking, columns)
        groups = -(-rows // at_once)
        group_rows = -(-rows // groups)
        panels = -(-n // m.panel_rows)
        kind = T.parallel if panels > 1 and rows * n * k >= PARALLEL_WORK else T.serial

        # Step 3. One pass over the panels
        def body() -> None:
            x = _float32_rows(m, rows, lanes)
            with loop(kind, "panel", panels) as panel, loop(T.serial, "group", groups) as group:
                # a short last group starts earlier: a row computed twice is simpler than a second kernel
                first = bind("first_row", tirx.min(group * group_rows, T.int64(rows - group_rows)))
                product = _product if m.element is None else group_product
                sums = product(m, blocking, panel, group_rows, lambda r, k: x(first + r, k))
                with loop(T.serial, "row", group_rows) as row:
                    emit_epilogue(m, lanes, first + row, panel, lambda c: tirx.BufferLoad(sums, [row, c]))

        return scheduled(func, body)


def _float32_rows(m: PackedMatmul, rows: int, lanes: int) -> Callable[[Expr, Expr], Expr]:
    """x[row, k] as the inner loop reads it: in place where it can, or from a float32 copy."""
    if isinstance(m.x, ir.TensorLoad):
        return m.x_at
    k_extent = m.shape[1]
    copy = alloc("x_float32", [rows, k_extent], "float32")
    with loop(T.serial, "r", rows) as r:
        vector_loop("k", k_extent, lanes, lambda k: T.buffer_store(copy, m.x_at(r, k), [r, k]))
    return lambda row, k: tirx.BufferLoad(copy, [row, k])


def _product(m: PackedMatmul, blocking: Blocking, panel: Expr, rows: int, x: Callable[[int, Expr], Expr]) -> Buffer:
    """A buffer [rows, NR] with the sum over k of x(r, k) * W[panel, k, c] at (r, c)."""
    k_extent, lanes = m.shape[1], blocking.lanes_in(m.panel_rows)
    columns = m.panel_rows // lanes
    item_bytes = DataType(m.weight.dtype).bits // 8
    step_bytes = m.panel_rows * item_bytes
    sets = 1  # of sums, that take turns: a power of two, which most K are a multiple of
    while sets * rows * columns < SUMS and 2 * sets * rows <= blocking.rows_in_registers(columns):
        sets *= 2
    ahead = blocking.prefetch_bytes // step_bytes
    sums = alloc("sums", [rows, m.panel_rows], "float32")
    # a buffer for each register: LLVM keeps in registers what TVM puts on the stack, and TVM only puts small ones there
    registers = [(s, r, v) for s in range(sets) for r in range(rows) for v in range(columns)]
    acc = {at: alloc("acc{}_{}_{}".format(*at), [lanes], "float32") for at in registers}

    def multiply(s: int, k: Expr) -> None:
        for r in range(rows):
            for v in range(columns):
                a = acc[s, r, v]
                with loop(T.vectorized, "lane", lanes) as lane:
                    product = x(r, k) * m.weight_at(panel, k, v * lanes + lane)
                    T.buffer_store(a, tirx.BufferLoad(a, [lane]) + product, [lane])

    for a in acc.values():
        with loop(T.vectorized, "lane", lanes) as lane:
            T.buffer_store(a, T.float32(0), [lane])
    with loop(T.serial, "k", k_extent // sets) as k:
        for at in range(0, sets * step_bytes if ahead else 0, LINE_BYTES):  # past the panel's end lies the next one
            step, column = divmod(at, step_bytes)
            prefetch(m.weight, [panel, k * sets + (ahead + step), T.int64(column // item_bytes)])
        for s in range(sets):
            multiply(s, k * sets + s)
    for k_tail in range(k_extent // sets * sets, k_extent):
        multiply(0, T.int64(k_tail))
    for r in range(rows):
        for v in range(columns):
            with loop(T.vectorized, "lane", lanes) as lane:
                parts = [tirx.BufferLoad(acc[s, r, v], [lane]) for s in range(sets)]
                T.buffer_store(sums, reduce(operator.add, parts), [r, v * lanes + lane])
    return sums
