"""Matrix product for prefill: many rows times a weight in panels (`kernels/packed_linear.py`), on a CPU.

GotoBLAS's structure (Goto and van de Geijn 2008; Van Zee and van de Geijn 2015, "BLIS", section 3), with the packing of
the weight done at conversion and the epilogue on the tile. Rows are taken in groups so that the packed copy of x stays
small; a group is

    pack x: [row tiles, K, MR] float32, in parallel             # a tile's column of x is MR neighbouring floats
    for block of row tiles, for panel, in parallel:             # the block's x stays in L2 from panel to panel
        for block of k:                                         # the panel's block of k stays in L1 from tile to tile
            for row tile in the block:
                acc [MR, NR] = sums so far, in registers
                for k: acc[r, :] += x[k, r] * w[k, :]           # MR * NR / lanes multiply-adds
        epilogue (bias, activation, residual, cast) row by row, whole vectors; the last panel's tail one by one

Rows past the last repeat it in the packed copy and are never stored, so tails run the same kernel. Weights that are not
float32 are widened into an L1 buffer once for each block of k.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import tvm_ffi
from tvm import ir, s_tir, sym, tirx
from tvm.s_tir import dlight
from tvm.script import tirx as T
from tvm.target import Target

from gpt2_tvm.kernels.math import Expr, loads, rewrite, static, uses
from gpt2_tvm.schedules.blocking import Blocking
from gpt2_tvm.schedules.stages import (
    Buffer,
    Loop,
    Stage,
    alloc,
    bind,
    loop,
    read_stages,
    row_count,
    row_indices,
    scheduled,
    takes,
    vector_loop,
)

GEMV_ROWS = 16  # up to here, and known at compile time: memory-bound, `cpu_gemv.py`
GROUP_ROWS = 512  # rows packed at a time: bounds the copy to 512 * K floats whatever the prompt's length


@dataclass(frozen=True)
class Tiling:
    """How the kernels are blocked. rows: NR of the weight's panels. tile_rows: MR. lanes: float32 in a register.

    k_block: elements of k whose panel block [k_block, NR] fills three quarters of L1; block_tiles: row tiles whose
    packed x [tiles, k_block, MR] fills half of L2.
    """

    rows: int
    tile_rows: int
    lanes: int
    k_block: int
    block_tiles: int

    @staticmethod
    def of(blocking: Blocking, rows: int, k_extent: int) -> Tiling:
        """For weights in panels of `rows`."""
        lanes = blocking.lanes_in(rows)
        l1, l2, tile_rows = 1024 * blocking.l1_kib, 1024 * blocking.l2_kib, blocking.tile_rows
        blocks = -(-k_extent // max(1, l1 * 3 // 4 // (4 * rows)))
        k_block = -(-k_extent // blocks)
        tiles = min(l2 // 2 // (4 * k_block * tile_rows), l1 // 2 // (4 * rows * tile_rows))
        return Tiling(rows, tile_rows, lanes, k_block, max(1, tiles))


@dataclass(frozen=True)
class PackedMatmul:
    """A function that is a `packed_matmul` and what follows it elementwise.

    row_loops: the loops over rows; column, k: the loops over N and K. x: the (float32) factor from x, over row_loops
    and k. weight: the buffer [P, K, NR]; of 4-bit weights their words [P, K/8, NR], and `element` is the (float32)
    factor from them and their scales. epilogue: stages over row_loops and a column, the product among their loads.
    """

    row_loops: tuple[Loop, ...]
    column: Loop
    k: Loop
    x: Expr
    weight: Buffer
    product: Buffer
    epilogue: tuple[Stage, ...]
    outputs: tuple[Buffer, ...]
    element: Expr | None = None

    @property
    def panel_rows(self) -> int:
        """NR"""
        return int(self.weight.shape[2])

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)"""
        return int(self.column.extent), int(self.k.extent)

    @property
    def rows(self) -> Expr:
        """How many rows, an integer expression."""
        return sym.Analyzer().simplify(row_count(self.row_loops))

    def x_at(self, row: Expr, k: Expr) -> Expr:
        """x[row, k] as float32, `row` counted over all row loops."""
        return rewrite(self.x, {**row_indices(row, self.row_loops), self.k.var: k})

    def weight_at(self, panel: Expr, k: Expr, column: Expr) -> Expr:
        """W[panel, k, column] as float32."""
        if self.element is not None:
            at = {load.source: partial(_in_panel, load.source, panel, column) for load in loads(self.element)}
            return rewrite(self.element, {self.k.var: k}, at)
        element = tirx.BufferLoad(self.weight, [panel, k, column])
        return element if self.weight.dtype == "float32" else tirx.Cast("float32", element)


def match_packed_matmul(func: tirx.PrimFunc) -> PackedMatmul | None:
    """Recognise a packed product with an elementwise epilogue; None for any other function."""
    stages = read_stages(func)
    if not stages or not stages[0].reduced or not stages[0].writes_its_loops():
        return None
    product, epilogue = stages[0], stages[1:]
    *row_loops, column = product.spatial
    found = _factors(product, column)
    if found is None or len(product.reduced) != 1 or static(column.extent) is None:
        return None
    if not row_loops or any(uses(found[0], column.var) or load.source.same_as(found[1]) for load in loads(found[0])):
        return None
    matched = PackedMatmul(
        row_loops=tuple(row_loops),
        column=column,
        k=product.reduced[0],
        x=found[0],
        weight=found[1],
        product=product.buffer,
        epilogue=tuple(epilogue),
        outputs=tuple(func.params),
        element=found[2],
    )
    return matched if all(_follows(stage, product, stages) for stage in epilogue) else None


def _in_panel(buffer: Buffer, panel: Expr, column: Expr, indices: list[Expr]) -> Expr:
    return tirx.BufferLoad(buffer, [panel, indices[1], column])


def _factors(product: Stage, column: Loop) -> tuple[Expr, Buffer, Expr | None] | None:
    """(x, W, element) of `acc + float32(x) * float32(W[o // NR, k, o % NR])`, where element is None, or of `acc +
    float32(x) * element`, which reads the words W of 4-bit weights and their scales; None for anything else."""
    total = product.value
    if not (isinstance(total, tirx.Add) and isinstance(product.init, tirx.FloatImm) and product.init.value == 0):
        return None
    own, term = total.a, total.b
    if not (isinstance(own, ir.TensorLoad) and own.source.same_as(product.buffer) and isinstance(term, tirx.Mul)):
        return None
    for x, factor in ((term.a, term.b), (term.b, term.a)):
        load = factor.value if isinstance(factor, tirx.Cast) else factor
        if isinstance(load, ir.TensorLoad) and len(load.indices) == 3 and _is_panel_access(load, product, column):
            return x, load.source, None
        read = loads(factor)
        words = [at.source for at in read if at.source.dtype == "uint32"]
        if len(words) == 1 and len(read) == 2 and all(_is_group_access(at, product, column) for at in read):
            return x, words[0], factor
    return None


def _is_group_access(load: ir.TensorLoad, product: Stage, column: Loop) -> bool:
    """Whether a load is of a panel's array at the column, and at a fraction of k: of words, and of scales."""
    if len(load.indices) != 3 or len(product.reduced) != 1:
        return False
    k = product.reduced[0].var
    place = [load.indices[0], load.indices[2]]
    part = load.indices[1]
    if not (isinstance(part, tirx.FloorDiv) and part.a.same_as(k) and static(part.b) is not None):
        return False
    return _is_panel_place(place, load.source.shape[2], column) and static(product.reduced[0].extent) is not None


def _is_panel_place(place: Sequence[Expr], panel_rows: Expr, column: Loop) -> bool:
    """Whether indices are those of a column's panel, and of the column within it."""
    rows, extent = static(panel_rows), static(column.extent)
    if rows is None or extent is None:
        return False
    analyzer = sym.Analyzer()
    analyzer.bind(column.var, ir.Range(0, column.extent))
    expected = (tirx.floordiv(column.var, rows), tirx.floormod(column.var, rows))
    return all(analyzer.can_prove_equal(i, e) for i, e in zip(place, expected, strict=True))


def _is_panel_access(load: ir.TensorLoad, product: Stage, column: Loop) -> bool:
    if len(product.reduced) != 1 or static(product.reduced[0].extent) is None:
        return False
    place, k = [load.indices[0], load.indices[2]], load.indices[1]
    return k.same_as(product.reduced[0].var) and _is_panel_place(place, load.source.shape[2], column)


def _follows(stage: Stage, product: Stage, stages: Sequence[Stage]) -> bool:
    """Whether a stage needs nothing of the earlier stages but the element at its own place."""
    own, of_product = stage.spatial, product.spatial
    if stage.reduced or not stage.writes_its_loops() or len(own) != len(of_product):
        return False
    if not all(tvm_ffi.structural_equal(a.extent, b.extent) for a, b in zip(own, of_product, strict=True)):
        return False
    earlier = {s.buffer for s in stages}
    return all(
        all(i.same_as(l.var) or static(l.extent) == 1 for i, l in zip(load.indices, own, strict=True))
        for load in loads(stage.value)
        if load.source in earlier
    )


def emit_epilogue(m: PackedMatmul, lanes: int, row: Expr, panel: Expr, total: Callable[[Expr], Expr]) -> None:
    """Store one row of one panel, columns below N only: `total(c)` is the product at the panel's column c."""
    n, _ = m.shape
    full, tail = divmod(n, m.panel_rows)

    def columns(count: int) -> None:
        at_row = row_indices(row, m.row_loops)
        place, first = [at_row[l.var] for l in m.row_loops], panel * m.panel_rows
        values: dict[Buffer, Callable[[Expr], Expr]] = {m.product: total}  # by column of the panel

        def store(buffer: Buffer, value: Callable[[Expr], Expr]) -> None:
            """buffer := value; what only the epilogue reads goes to a copy of this row and panel."""
            if buffer in m.outputs:
                vector_loop("c", count, lanes, lambda c: T.buffer_store(buffer, value(c), [*place, first + c]))
                return
            copy = alloc(buffer.name, [m.panel_rows], buffer.dtype)
            vector_loop("c", count, lanes, lambda c: T.buffer_store(copy, value(c), [c]))
            values[buffer] = lambda c: tirx.BufferLoad(copy, [c])

        def evaluate(stage: Stage, known: dict[Buffer, Callable[[Expr], Expr]], c: Expr) -> Expr:
            *rows, column = (l.var for l in stage.spatial)
            places = {**dict(zip(rows, place, strict=True)), column: first + c}
            # stages read each other at their own place only (`_follows`), so a load's indices do not matter
            return rewrite(stage.value, places, {b: partial(_at_column, f, c) for b, f in known.items()})

        if m.product in m.outputs:
            store(m.product, total)
        for stage in m.epilogue:
            store(stage.buffer, partial(evaluate, stage, dict(values)))

    if not tail:
        columns(m.panel_rows)
    elif not full:
        columns(tail)
    else:
        with T.If(panel < full):
            with T.Then():
                columns(m.panel_rows)
            with T.Else():
                columns(tail)


def _at_column(value: Callable[[Expr], Expr], c: Expr, indices: list[Expr]) -> Expr:
    return value(c)


class CpuMatmul(dlight.ScheduleRule):
    """`packed_matmul` with a number of rows that is symbolic or above 16, and its epilogue.

    processor: see `Blocking.of`.
    """

    def __init__(self, processor: Any = None) -> None:
        self.processor = processor

    def apply(self, func: tirx.PrimFunc, target: Target, tunable: bool) -> s_tir.Schedule | None:
        # Step 1. Recognise the product
        m = match_packed_matmul(func) if takes(func, target) else None
        if m is None or (static(m.rows) or GEMV_ROWS + 1) <= GEMV_ROWS:
            return None
        # Step 2. Block sizes from the target
        tiling = Tiling.of(Blocking.of(self.processor, target), m.panel_rows, m.shape[1])
        # Step 3. Groups of rows: pack, then tiles
        tiles = _ceil(m.rows, tiling.tile_rows)
        group_tiles = _ceil(GROUP_ROWS, tiling.tile_rows)

        def body() -> None:
            with loop(T.serial, "group", _ceil(tiles, group_tiles)) as group:
                first = bind("first_tile", group * group_tiles)
                count = bind("tiles", tirx.min(T.int64(group_tiles), tiles - first))
                shape = [tirx.min(T.int64(group_tiles), tiles), m.shape[1], tiling.tile_rows]
                packed = alloc("x_packed", shape, "float32")
                _pack_rows(m, tiling, packed, first, count)
                _multiply(m, tiling, packed, first, count)

        return scheduled(func, body)


def _ceil(a: Expr, b: int) -> Expr:
    return -(-a // b) if isinstance(a, int) else (a + (b - 1)) // b


def _pack_rows(m: PackedMatmul, tiling: Tiling, packed: Buffer, first: Expr, count: Expr) -> None:
    """packed[t, k, r] := x[(first + t) * MR + r, k] for t in [0, count); the last row stands in for those past it."""
    with loop(T.parallel, "tile", count) as tile, loop(T.serial, "r", tiling.tile_rows) as r:
        row = bind("row", tirx.min((first + tile) * tiling.tile_rows + r, m.rows - 1))
        vector_loop("k", m.shape[1], tiling.lanes, lambda k: T.buffer_store(packed, m.x_at(row, k), [tile, k, r]))


def _multiply(m: PackedMatmul, tiling: Tiling, packed: Buffer, first: Expr, count: Expr) -> None:
    (n, k_extent), mr, nr = m.shape, tiling.tile_rows, tiling.rows
    panels = _ceil(n, nr)
    blocks = bind("blocks", _ceil(count, tiling.block_tiles))
    block_tiles = bind("block_tiles", (count + blocks - 1) // blocks)  # even blocks: no thread is left with a short one
    with loop(T.parallel, "task", blocks * panels) as task:
        panel = bind("panel", task % panels)
        start = bind("start", task // panels * block_tiles)
        stop = bind("stop", tirx.min(start + block_tiles, count))
        sums = alloc("sums", [tiling.block_tiles * mr, nr], "float32")
        wide = m.weight.dtype != "float32" or m.element is not None
        w = alloc("w_block", [tiling.k_block, nr], "float32") if wide else m.weight
        with loop(T.serial, "k_outer", _ceil(k_extent, tiling.k_block)) as k_outer:
            k_first = bind("k_first", k_outer * tiling.k_block)
            k_count = bind("k_count", tirx.min(T.int64(tiling.k_block), k_extent - k_first))
            if wide:
                with loop(T.serial, "k", k_count) as k:
                    vector_loop(
                        "c", nr, tiling.lanes, lambda c: T.buffer_store(w, m.weight_at(panel, k_first + k, c), [k, c])
                    )
            with loop(T.serial, "tile", stop - start) as tile:
                _micro_kernel(
                    tiling,
                    k_count,
                    k_outer == 0,
                    lambda r, c: (sums, [tile * mr + r, c]),
                    lambda k, r: tirx.BufferLoad(packed, [start + tile, k_first + k, r]),
                    lambda k, c: tirx.BufferLoad(w, [k, c] if wide else [panel, k_first + k, c]),
                )
        row_first = bind("row_first", (first + start) * mr)
        with loop(T.serial, "row", tirx.min((stop - start) * mr, m.rows - row_first)) as row:
            emit_epilogue(m, tiling.lanes, row_first + row, panel, lambda c: tirx.BufferLoad(sums, [row, c]))


def _micro_kernel(
    tiling: Tiling,
    k_count: Expr,
    is_first: Expr,
    sums: Callable[[Expr, Expr], tuple[Buffer, list[Expr]]],
    x: Callable[[Expr, Expr], Expr],
    w: Callable[[Expr, Expr], Expr],
) -> None:
    """sums[r, c] (+)= sum over k of x(k, r) * w(k, c), for MR rows and NR columns, with the sums in registers."""
    # one buffer for each register column: LLVM promotes what TVM puts on the stack, and TVM does so below 1 KiB
    acc = [alloc(f"acc{v}", [tiling.tile_rows, tiling.lanes], "float32") for v in range(tiling.rows // tiling.lanes)]

    def each(body: Callable[[Buffer, Expr, Expr, Expr], None]) -> None:
        # row by row: a broadcast element of x is done with before the next one needs a register
        with loop(T.unroll, "r", tiling.tile_rows) as r:
            for v, column in enumerate(acc):
                with loop(T.vectorized, "lane", tiling.lanes) as lane:
                    body(column, r, lane, v * tiling.lanes + lane)

    with T.If(is_first):
        with T.Then():
            each(lambda a, r, l, c: T.buffer_store(a, T.float32(0), [r, l]))
        with T.Else():
            each(lambda a, r, l, c: T.buffer_store(a, tirx.BufferLoad(*sums(r, c)), [r, l]))
    with loop(T.serial, "k", k_count) as k:
        each(lambda a, r, l, c: T.buffer_store(a, tirx.BufferLoad(a, [r, l]) + x(k, r) * w(k, c), [r, l]))
    each(lambda a, r, l, c: T.buffer_store(sums(r, c)[0], tirx.BufferLoad(a, [r, l]), sums(r, c)[1]))
