"""`tensor-matmul`: float16 products on NVIDIA's tensor cores, with tiles that fill the GPU at a prompt's length.

DLight's schedule gives a block 128 x 128 of the result, whatever the shape: for a prompt of 322 tokens a 768-column
product is 18 blocks, on a GPU of 132 multiprocessors. Here a block has 64 x 64 (128 x 64 where columns are many, 16 or
32 rows where there are no more), which is 72 blocks for the same product; and where there are rows enough for blocks of
128 x 128 on every multiprocessor, another kernel computes those, which read half as much of x and W for each product:

    for block of rows, block of columns:
        stages 0 .. s - 2 <- x, W                              # cp.async, straight to shared memory
        for step of k:
            wait for this step's stage; stage of step + s - 1 <- x, W
            for 16 of k: registers <- ldmatrix; acc += mma.m16n8k16
        epilogue (bias, activation, residual) on the accumulators, two neighbouring columns a store

One barrier a step. A stage's rows are 16 bytes longer than what they hold, so that the eight rows that `ldmatrix` reads
at a time lie in different banks. Rows past the last one repeat it and are not stored: three kernels serve every length,
for up to 32 rows, for many, and between, and the host takes one of them by the number of rows.

Register layouts: PTX ISA 9.0, "Matrix fragments for mma.m16n8k16".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from tvm import ir, s_tir, sym, tirx
from tvm.s_tir.dlight.gpu.base import GPUScheduleRule
from tvm.script import tirx as T
from tvm.target import Target

from gpt2_tvm.kernels.cuda_prefill_attention import CHUNK, LEAST_ARCH
from gpt2_tvm.kernels.math import Expr, loads, rewrite, static
from gpt2_tvm.kernels.spec import GpuLimits
from gpt2_tvm.schedules.stages import Buffer, Loop, bind, row_indices
from gpt2_tvm.schedules.tensor_tiles import (
    FEW_ROWS,
    MULTIPROCESSORS,
    TensorTile,
    choose_tile,
    large_tile,
    rows_to_fill,
)
from gpt2_tvm.schedules.webgpu_product import (
    Product,
    binding,
    buffer,
    kernel,
    loop,
    match_product,
    typed,
    vector,
    where,
)

RULE = "tensor-matmul"


class TensorMatmul(GPUScheduleRule):
    """Products of float16 with more than eight rows, or a number that is not known; see the module.

    tile: instead of what `choose_tile` and `large_tile` say, for any number of rows. multiprocessors: of the GPU.
    """

    def __init__(self, tile: TensorTile | None = None, multiprocessors: int = MULTIPROCESSORS) -> None:
        self.tile, self.multiprocessors = tile, multiprocessors

    def apply(self, func: tirx.PrimFunc, target: Target, tunable: bool) -> s_tir.Schedule | None:
        if not isinstance(func, tirx.PrimFunc) or not self.is_target_available(target):
            return None
        limits = GpuLimits.of_target(target)
        if limits.kind != "cuda" or not self.is_for(target, limits):
            return None
        # Step 1. Recognise the product, of two plain matrices
        m = match_product(func)
        if m is None or m.prologue or not self.is_for_rows(m.few_rows()):
            return None
        x, w = _matrix(m, m.x, m.row_loops), _matrix(m, m.w, (m.column,))
        if x is None or w is None:
            return None
        # Step 2. Tiles
        rows, columns, k = m.few_rows(), int(m.column.extent), int(m.k.extent)
        tile = self.tile or choose_tile(rows, columns, k, limits)
        if tile is None or k % tile.depth:
            return None
        parts = [(1, TensorKernel(m, x, w, tile))]
        if self.tile is None and rows is None:
            few, larger = choose_tile(FEW_ROWS, columns, k, limits), self.larger(m, x, w, limits)
            if few is None or larger is None:
                return None
            parts = [(1, TensorKernel(m, x, w, few)), (FEW_ROWS + 1, parts[0][1])]
            parts += [(rows_to_fill(part.t, columns, self.multiprocessors), part) for part in larger]
        # Step 3. Loops
        return kernel(func, partial(_by_rows, parts[0][1].rows, _distinct(parts)))

    def is_for(self, target: Target, limits: GpuLimits) -> bool:
        """Whether this CUDA target has the instructions."""
        return limits.arch >= LEAST_ARCH

    def is_for_rows(self, rows: int | None) -> bool:
        """Whether it takes products with so many rows; None where the caller decides."""
        return True

    def larger(self, m: Product, x: Buffer, w: Buffer, limits: GpuLimits) -> list[TensorKernel] | None:
        """The kernels for more rows than `choose_tile`'s is for, the largest last; None for a product that another rule
        should have."""
        tile = large_tile(int(m.k.extent), limits)
        return [] if tile is None else [TensorKernel(m, x, w, tile)]


Parts = Sequence[tuple[int, "TensorKernel"]]  # each with the number of rows from which on it is the one


def _distinct(parts: Parts) -> Parts:
    """Without those that a larger one leaves no rows for."""
    return [part for i, part in enumerate(parts) if all(part[0] < after[0] for after in parts[i + 1 :])]


def _by_rows(rows: Expr, parts: Parts) -> None:
    """The last kernel that has rows enough; the first one needs none."""
    if len(parts) == 1:
        parts[0][1].emit()
        return
    with T.If(rows < parts[1][0]):
        with T.Then():
            parts[0][1].emit()
        with T.Else():
            _by_rows(rows, parts[1:])


def _matrix(m: Product, factor: Expr, lines: Sequence[Loop]) -> Buffer | None:
    """The float16 argument that a factor is, where line after line of it lies in memory as the loops count them; None
    for anything else."""
    if not isinstance(factor, ir.TensorLoad) or factor.ty.dtype != "float16" or factor.source not in m.outputs:
        return None
    *leading, last = factor.indices
    *extents, width = factor.source.shape
    if not last.same_as(m.k.var) or static(width) != static(m.k.extent):
        return None
    loops = [line for line in lines if static(line.extent) != 1]
    axes = [(i, e) for i, e in zip(leading, extents, strict=True) if static(e) != 1]
    equal = sym.Analyzer().can_prove_equal
    whole = len(axes) == len(loops) and all(
        index.same_as(line.var) and equal(extent, line.extent)
        for (index, extent), line in zip(axes, loops, strict=True)
    )
    return factor.source if whole else None


class TensorKernel:
    """Writes the loops of one kernel: y = x Wᵀ with tiles `tile`, and what follows."""

    def __init__(self, m: Product, x: Buffer, w: Buffer, tile: TensorTile) -> None:
        self.m, self.x, self.w, self.t = m, x, w, tile
        self.n, self.k = int(m.column.extent), int(m.k.extent)
        self.rows = typed(m.rows, tirx.Var("row", "int32"))
        self.lanes = 2 if self.n % 2 == 0 else 1  # columns a store
        self.high, self.wide = tile.rows // tile.warps_m // 16, tile.columns // tile.warps_n // 16  # of a warp

    def allocate(self) -> None:
        """What the product needs beside its sums."""
        self.shared = buffer("stages", [self.t.stages * self.t.stage], "float16", "shared")
        self.a = buffer("a", [self.high * 8], "float16")
        self.b = buffer("b", [8], "float16")

    def place(self, line: Expr, piece: Expr) -> Expr:
        """Where 16 bytes of a line are, in elements from where its matrix begins in a stage."""
        return line * self.t.stride + piece * CHUNK

    def emit(self) -> None:
        t = self.t
        self.allocate()
        self.acc = buffer("acc", [self.high * self.wide * 8], "float32")
        row_blocks, column_blocks = (self.rows + (t.rows - 1)) // t.rows, -(-self.n // t.columns)
        with (
            binding("bx", row_blocks * column_blocks if t.group else row_blocks, "blockIdx.x") as bx,
            binding("by", 1 if t.group else column_blocks, "blockIdx.y") as by,
            binding("tid", t.threads, "threadIdx.x") as tid,
        ):
            self.tid, self.lane = tid, bind("lane", tid % 32)
            if t.group:
                bx, by = self._grouped(bx, row_blocks, column_blocks)
            self.row0, self.column0 = bx * t.rows, by * t.columns
            warp = tid // 32
            self.top = bind("top", warp // t.warps_n * (self.high * 16))  # the warp's first row in the block
            self.left = bind("left", warp % t.warps_n * (self.wide * 16))
            with loop("i", self.high * self.wide * 8, T.unroll) as i:
                T.buffer_store(self.acc, tirx.const(0, "float32"), [i])
            self.multiply()
            self._store()

    def _grouped(self, block: Expr, row_blocks: Expr, column_blocks: int) -> tuple[Expr, Expr]:
        """Where a block is: all columns of `group` rows of blocks before those of the next. The blocks that run at one
        time then have few rows of x and few of W among them, which stay in the second-level cache."""
        across = self.t.group * column_blocks
        first = bind("first", block // across * self.t.group)
        high, within = bind("high", tirx.min(row_blocks - first, self.t.group)), bind("within", block % across)
        # no number here is negative: what a division by `high` rounds towards need not be worked out
        return bind("row_block", first + tirx.truncmod(within, high)), bind("column_block", tirx.truncdiv(within, high))

    # -- the product

    def multiply(self) -> None:
        t = self.t
        count = self.k // t.depth
        for step in range(t.stages - 1):
            self.fetch(tirx.const(step, "int32"), tirx.const(step * t.stage, "int32"), needed=step < count)
        with loop("step", count) as step:
            T.evaluate(T.ptx["cp.async.wait_group"](t.stages - 2))
            T.evaluate(T.tvm_storage_sync("shared"))
            ahead = step + (t.stages - 1)
            with where(ahead < count, True):
                self.copies(ahead, ahead % t.stages * t.stage)
            T.evaluate(T.ptx["cp.async.commit_group"]())
            at = bind("at", step % t.stages * t.stage)
            for k in range(0, t.depth, 16):
                self._sixteen(at, k)

    def fetch(self, step: Expr, at: Expr, needed: bool) -> None:
        if needed:
            self.copies(step, at)
        T.evaluate(T.ptx["cp.async.commit_group"]())

    def copies(self, step: Expr, at: Expr) -> None:
        """A step of x and W on its way into a stage, 16 bytes a thread and round."""
        t = self.t
        chunks = t.depth // CHUNK
        for source, lines, first, last, start in (
            (self.x, t.rows, self.row0, self.rows - 1, 0),
            (self.w, t.columns, self.column0, tirx.const(self.n - 1, "int32"), t.rows * t.stride),
        ):
            for turn in range(-(-lines * chunks // t.threads)):
                e = turn * t.threads + self.tid
                line = tirx.min(first + e // chunks, last)
                offset = tirx.Cast("int64", line) * self.k + tirx.Cast("int64", step * t.depth + e % chunks * CHUNK)
                with where(e < lines * chunks, (turn + 1) * t.threads > lines * chunks):
                    T.evaluate(
                        T.s_tir.cp_async_raw.legacy(
                            self.shared.data,
                            at + start + self.place(e // chunks, e % chunks),
                            source.data,
                            offset,
                            2 * CHUNK,
                            dtype="float16",
                        )
                    )

    def _sixteen(self, at: Expr, k: int) -> None:
        """acc += x Wᵀ over 16 elements of k."""
        lane, stride = self.lane, self.t.stride
        for i in range(self.high):
            line = self.top + i * 16 + lane % 16
            self._matrices(self.a, i * 8, at + line * stride + k + lane // 16 * 8)
        for j in range(self.wide):
            line = self.t.rows + self.left + j * 16 + lane // 16 * 8 + lane % 8
            self._matrices(self.b, 0, at + line * stride + k + lane // 8 % 2 * 8)
            for i in range(self.high):
                for half in range(2):
                    T.evaluate(
                        T.ptx_legacy.mma(
                            *("m16n8k16", "row", "col", "fp16", "fp16", "fp32"),
                            *(self.a.data, i * 8, self.b.data, half * 4),
                            *(self.acc.data, (i * self.wide + j) * 8 + half * 4, False),
                            dtype="float32",
                        )
                    )

    def _matrices(self, to: Buffer, place: int, at: Expr) -> None:
        T.evaluate(
            T.ptx_legacy.ldmatrix(False, 4, ".b16", to.data, place, self.shared.access_ptr("r"), at, dtype="float16")
        )

    # -- what follows it

    def _store(self) -> None:
        """The warp's 16 x 8 results: a thread has two columns of row lane / 4, and of the eighth row from it."""
        with loop("i", self.high * 2, T.unroll) as i:
            row = bind("row", self.row0 + self.top + i * 8 + self.lane // 4)
            with where(row < self.rows, True):
                places = {var: bind(var.name, typed(at, var)) for var, at in row_indices(row, self.m.row_loops).items()}
                with loop("j", self.wide * 2, T.unroll) as j:
                    column = bind("column", self.column0 + self.left + j * 8 + self.lane % 4 * 2)
                    at = ((i // 2 * self.wide + j // 2) * 2 + j % 2) * 4 + i % 2 * 2
                    if self.lanes == 2:
                        with where(column < self.n, self.n % self.t.columns != 0):
                            self._finish(places, column, at)
                    else:
                        for lane in range(2):
                            with where(column + lane < self.n, self.n % self.t.columns != 0):
                                self._finish(places, column + lane, at + lane)

    def _finish(self, places: dict[ir.Var, Expr], column: Expr, at: Expr) -> None:
        """Columns `column` .. `column + lanes - 1` of a row, whose sums are acc[at ..]: what follows the product, and
        the stores."""
        m, lanes = self.m, self.lanes
        column = typed(column, m.column.var)

        def lane_of(local: Buffer, lane: Expr, indices: list[Expr]) -> Expr:
            return tirx.BufferLoad(local, [lane])

        def sums(lane: Expr) -> Expr:
            return tirx.BufferLoad(self.acc, [at + lane])

        def store(target: Buffer, local: Buffer) -> None:
            index = [places[row.var] for row in m.row_loops]
            vector(target, [*index], lanes, lambda lane: tirx.BufferLoad(local, [lane]), offset=column)

        def settle(target: Buffer, value: Callable[[Expr], Expr]) -> Buffer:
            local = buffer(f"{target.name}_part", [lanes], target.dtype)
            for lane in range(lanes):
                T.buffer_store(local, value(tirx.const(lane, "int32")), [lane])
            if target in m.outputs:
                store(target, local)
            return local

        made = {m.buffer: settle(m.buffer, sums)}
        for stage in m.epilogue:
            *rows, last = (one.var for one in stage.spatial)
            renamed = {var: places[row.var] for var, row in zip(rows, m.row_loops, strict=True)}
            for load in loads(stage.value):
                if load.source not in made and load.indices and load.indices[-1].same_as(last):
                    made[load.source] = self._read(load, renamed, column)

            def value(lane: Expr, stage: Any = stage, renamed: dict[ir.Var, Expr] = renamed, last: Any = last) -> Expr:
                known = {source: partial(lane_of, local, lane) for source, local in made.items()}
                return rewrite(stage.value, {**renamed, last: column + tirx.Cast(column.ty.dtype, lane)}, known)

            made[stage.buffer] = settle(stage.buffer, value)

    def _read(self, load: ir.TensorLoad, renamed: dict[ir.Var, Expr], column: Expr) -> Buffer:
        """A bias or a residual, the columns of a store at once."""
        local = buffer(f"{load.source.name}_part", [self.lanes], load.source.dtype)
        leading = [rewrite(index, renamed) for index in load.indices[:-1]]
        with T.vectorized(self.lanes) as lane:
            T.buffer_store(
                local,
                tirx.BufferLoad(load.source, [*leading, column + typed(lane, self.m.column.var)]),
                [lane],
            )
        return local
