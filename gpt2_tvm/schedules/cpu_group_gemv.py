"""The inner product of `cpu_gemv.py` for 4-bit weights in groups: one panel of NR rows, a few rows of x.

A word holds eight neighbours in k of one row, and a register the words of neighbouring rows, so every nibble of a
register is one step of k:

    for group of 32 in k:
        sums of the group [sets, rows, NR] = 0, in registers
        for word, for nibble j: sums[j % sets, r, :] += x[r, k] * float32(nibble - 7)
        total[r, :] += scale[group, :] * (the sets added up)

Four instructions a register of weights: shift, mask and exponent in one (`vpternlogd` where there is AVX-512),
subtract, multiply-add. The exponent makes a float of the nibble without a conversion: 2^23 + q has q in its lowest
bits.
Scales cost one multiply-add for 32 steps, and the totals, which lie in L1, no more.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import reduce

from tvm import ir, tirx
from tvm.script import tirx as T

from gpt2_tvm.kernels.math import Expr, loads
from gpt2_tvm.quantization.groups import A_WORD, GROUP, ZERO
from gpt2_tvm.schedules.blocking import LINE_BYTES, Blocking
from gpt2_tvm.schedules.cpu_matmul import PackedMatmul
from gpt2_tvm.schedules.stages import Buffer, alloc, loop, prefetch

ONE_WORD = GROUP // A_WORD  # words of a group
TWO_TO_23 = 0x4B000000  # as a float: 8388608
SUMS = 8  # independent sums that hide a multiply-add's latency behind the three instructions before each
OTHERS = 8  # registers for mask, exponent, offset, elements of x and what is on its way to a multiply-add


def rows_at_once(blocking: Blocking, columns: int) -> int:
    """How many rows of sums, `columns` registers each, fit beside the rest."""
    return max(1, (blocking.vector_registers - OTHERS - columns) // columns)


def group_product(
    m: PackedMatmul, blocking: Blocking, panel: Expr, rows: int, x: Callable[[int, Expr], Expr]
) -> Buffer:
    """A buffer [rows, NR] with the sum over k of x(r, k) * W[panel, k, c] at (r, c)."""
    k_extent, lanes = m.shape[1], blocking.lanes_in(m.panel_rows)
    columns = m.panel_rows // lanes
    assert m.element is not None
    (scales,) = [load.source for load in loads(m.element) if not load.source.same_as(m.weight)]
    sets = 1
    free = blocking.vector_registers - OTHERS - columns
    while sets * rows * columns < SUMS and 2 * sets * rows * columns <= free:
        sets *= 2
    ahead = blocking.prefetch_bytes // (m.panel_rows * 4)
    total = alloc("sums", [rows, m.panel_rows], "float32")
    registers = [(s, r, v) for s in range(sets) for r in range(rows) for v in range(columns)]
    acc = {at: alloc("acc{}_{}_{}".format(*at), [lanes], "float32") for at in registers}

    def clear(buffer: Buffer, at: Callable[[Expr], list[Expr]]) -> None:
        with loop(T.vectorized, "lane", lanes) as lane:
            T.buffer_store(buffer, T.float32(0), at(lane))

    def multiply(word: Expr, first: Expr, count: int) -> None:
        """Nibbles 0 to count of a word of each row, whose first stands for k = `first`."""
        for j in range(count):
            for v in range(columns):
                for r in range(rows):
                    a = acc[j % sets, r, v]
                    with loop(T.vectorized, "lane", lanes) as lane:
                        loaded = tirx.BufferLoad(m.weight, [panel, word, v * lanes + lane])
                        product = x(r, first + j) * _element(loaded, j)
                        T.buffer_store(a, tirx.BufferLoad(a, [lane]) + product, [lane])

    def add_group(group: Expr) -> None:
        for r in range(rows):
            for v in range(columns):
                with loop(T.vectorized, "lane", lanes) as lane:
                    c = v * lanes + lane
                    parts = reduce(operator.add, [tirx.BufferLoad(acc[s, r, v], [lane]) for s in range(sets)])
                    scale = tirx.BufferLoad(scales, [panel, group, c])
                    scale = scale if scales.dtype == "float32" else tirx.Cast("float32", scale)
                    T.buffer_store(total, tirx.BufferLoad(total, [r, c]) + scale * parts, [r, c])

    def start_group() -> None:
        for a in acc.values():
            clear(a, lambda lane: [lane])

    for r in range(rows):
        for v in range(columns):
            clear(total, lambda lane, r=r, v=v: [T.int64(r), v * lanes + lane])  # type: ignore[misc]
    with loop(T.serial, "group", k_extent // GROUP) as group:
        start_group()
        with loop(T.serial, "word", ONE_WORD) as word:
            at_word = group * ONE_WORD + word
            for at in range(0, m.panel_rows * 4 if ahead else 0, LINE_BYTES):  # past the panel lies the next one
                prefetch(m.weight, [panel, at_word + ahead, T.int64(at // 4)])
            multiply(at_word, at_word * A_WORD, A_WORD)
        add_group(group)
    if tail := k_extent % GROUP:
        first = k_extent - tail
        start_group()
        for k in range(first, k_extent, A_WORD):
            multiply(T.int64(k // A_WORD), T.int64(k), min(A_WORD, k_extent - k))
        add_group(T.int64(first // GROUP))
    return total


def _element(word: ir.Expr, j: int) -> Expr:
    """Nibble j of a word, less 7, as a float32."""
    shifted = word >> tirx.const(4 * j, "uint32") if j else word
    nibble = shifted & tirx.const(15, "uint32") if j < A_WORD - 1 else shifted
    return tirx.reinterpret("float32", nibble | tirx.const(TWO_TO_23, "uint32")) - tirx.const(2.0**23 + ZERO, "float32")
