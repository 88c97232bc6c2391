"""`tensor-matmul`: float16 products on NVIDIA's tensor cores, with tiles that fill the GPU at a prompt's length.

DLight's schedule gives a block 128 x 128 of the result, whatever the shape: for a prompt of 322 tokens a 768-column
product is 18 blocks, on a GPU of 132 multiprocessors. Here a block has 64 x 64 (128 x 64 where columns are many, 16 or
32 rows where there are no more), which is 72 blocks for the same product:

    for block of rows, block of columns:
        stages 0 .. s - 2 <- x, W                              # cp.async, straight to shared memory
        for step of k:
            wait for this step's stage; stage of step + s - 1 <- x, W
            for 16 of k: registers <- ldmatrix; acc += mma.m16n8k16
        epilogue (bias, activation, residual) on the accumulators, two neighbouring columns a store

One barrier a step. A stage's rows are 16 bytes longer than what they hold, so that the eight rows that `ldmatrix` reads
at a time lie in different banks. Rows past the last one repeat it and are not stored: one kernel serves every length.

Register layouts: PTX ISA 9.0, "Matrix fragments for mma.m16n8k16".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from tvm import ir, s_tir, sym, tirx
from tvm.s_tir.dlight.gpu.base import GPUScheduleRule
from tvm.script import tirx as T
from tvm.target import Target

from gpt2_tvm.errors import UserError
from gpt2_tvm.kernels.cuda_prefill_attention import CHUNK, LEAST_ARCH
from gpt2_tvm.kernels.math import Expr, loads, rewrite, static
from gpt2_tvm.kernels.spec import GpuLimits
from gpt2_tvm.schedules.stages import Buffer, Loop, bind, row_indices
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
MANY_COLUMNS = 16384  # blocks enough whatever their size: the head
DEPTHS = (128, 64, 32)
SHARED_BYTES = 32 << 10  # of a block with many rows: three are then on a multiprocessor with 100 KiB (RTX 40)


@dataclass(frozen=True)
class TensorTile:
    """What a block computes.

    Attributes:
        rows, columns: of the result. warps_m, warps_n: along them; a warp has a multiple of 16 of both.
        depth: elements of k a step, a multiple of 16. stages: steps in shared memory at a time.
    """

    rows: int
    columns: int
    warps_m: int
    warps_n: int
    depth: int
    stages: int

    def __post_init__(self) -> None:
        if self.rows % (16 * self.warps_m) or self.columns % (16 * self.warps_n) or self.depth % 16 or self.stages < 2:
            raise UserError(f"{self}: a warp needs a multiple of 16 rows and columns, depth one of 16, stages two")

    @property
    def threads(self) -> int:
        return 32 * self.warps_m * self.warps_n

    @property
    def stride(self) -> int:
        """Elements from row to row in shared memory."""
        return self.depth + CHUNK

    @property
    def stage(self) -> int:
        """Elements of one stage: x, then W."""
        return (self.rows + self.columns) * self.stride

    @property
    def shared_bytes(self) -> int:
        return 2 * self.stages * self.stage


def choose_tile(rows: int | None, columns: int, k: int, limits: GpuLimits) -> TensorTile | None:
    """The tile for a product of [rows, k] and [columns, k]; rows None: a shape of the caller's. None where k or the
    device does not fit.

    Few rows are bound by reading W: small blocks, so that there are many, with long steps, so that each has many
    loads under way.
    """
    many, shared = columns >= MANY_COLUMNS, limits.shared_memory_bytes
    depths: tuple[int, ...]
    if rows is not None and rows <= 32:
        height = 16 if rows <= 16 else 32
        shape = (height, 64, 1, 4) if many else (height, 32, height // 16, 2)
        depths = DEPTHS[2:] if many else DEPTHS
    elif rows is not None and rows <= 64:
        shape, depths = ((64, 64, 2, 2) if many else (64, 32, 4, 1)), DEPTHS[1:]
    else:
        shape, depths = ((128, 64, 2, 2) if many else (64, 64, 2, 2)), DEPTHS[2:]
        shared = min(shared, SHARED_BYTES)
    depth = next((d for d in depths if k % d == 0), None)
    if depth is None:
        return None
    for stages in (4, 3, 2):
        tile = TensorTile(*shape, depth, min(stages, max(2, k // depth)))
        if tile.shared_bytes <= shared and tile.threads <= limits.threads_per_block:
            return tile
    return None


class TensorMatmul(GPUScheduleRule):
    """Products of float16 with more than eight rows, or a number that is not known; see the module. tile: instead of
    `choose_tile`'s."""

    def __init__(self, tile: TensorTile | None = None) -> None:
        self.tile = tile

    def apply(self, func: tirx.PrimFunc, target: Target, tunable: bool) -> s_tir.Schedule | None:
        if not isinstance(func, tirx.PrimFunc) or not self.is_target_available(target):
            return None
        limits = GpuLimits.of_target(target)
        if limits.kind != "cuda" or limits.arch < LEAST_ARCH:
            return None
        # Step 1. Recognise the product, of two plain matrices
        m = match_product(func)
        if m is None or m.prologue:
            return None
        x, w = _matrix(m, m.x, m.row_loops), _matrix(m, m.w, (m.column,))
        if x is None or w is None:
            return None
        # Step 2. Tile
        tile = self.tile or choose_tile(m.few_rows(), int(m.column.extent), int(m.k.extent), limits)
        if tile is None or int(m.k.extent) % tile.depth:
            return None
        # Step 3. Loops
        return kernel(func, _Emitter(m, x, w, tile).emit)


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


class _Emitter:
    def __init__(self, m: Product, x: Buffer, w: Buffer, tile: TensorTile) -> None:
        self.m, self.x, self.w, self.t = m, x, w, tile
        self.n, self.k = int(m.column.extent), int(m.k.extent)
        self.rows = typed(m.rows, tirx.Var("row", "int32"))
        self.lanes = 2 if self.n % 2 == 0 else 1  # columns a store
        self.high, self.wide = tile.rows // tile.warps_m // 16, tile.columns // tile.warps_n // 16  # of a warp

    def emit(self) -> None:
        t = self.t
        self.shared = buffer("stages", [t.stages * t.stage], "float16", "shared")
        self.a = buffer("a", [self.high * 8], "float16")
        self.b = buffer("b", [8], "float16")
        self.acc = buffer("acc", [self.high * self.wide * 8], "float32")
        with (
            binding("bx", (self.rows + (t.rows - 1)) // t.rows, "blockIdx.x") as bx,
            binding("by", -(-self.n // t.columns), "blockIdx.y") as by,
            binding("tid", t.threads, "threadIdx.x") as tid,
        ):
            self.tid, self.lane = tid, bind("lane", tid % 32)
            self.row0, self.column0 = bx * t.rows, by * t.columns
            warp = tid // 32
            self.top = bind("top", warp // t.warps_n * (self.high * 16))  # the warp's first row in the block
            self.left = bind("left", warp % t.warps_n * (self.wide * 16))
            with loop("i", self.high * self.wide * 8, T.unroll) as i:
                T.buffer_store(self.acc, tirx.const(0, "float32"), [i])
            self._multiply()
            self._store()

    # -- the product

    def _multiply(self) -> None:
        t = self.t
        count = self.k // t.depth
        for step in range(t.stages - 1):
            self._fetch(tirx.const(step, "int32"), tirx.const(step * t.stage, "int32"), needed=step < count)
        with loop("step", count) as step:
            T.evaluate(T.ptx["cp.async.wait_group"](t.stages - 2))
            T.evaluate(T.tvm_storage_sync("shared"))
            ahead = step + (t.stages - 1)
            with where(ahead < count, True):
                self._copies(ahead, ahead % t.stages * t.stage)
            T.evaluate(T.ptx["cp.async.commit_group"]())
            at = bind("at", step % t.stages * t.stage)
            for k in range(0, t.depth, 16):
                self._sixteen(at, k)

    def _fetch(self, step: Expr, at: Expr, needed: bool) -> None:
        if needed:
            self._copies(step, at)
        T.evaluate(T.ptx["cp.async.commit_group"]())

    def _copies(self, step: Expr, at: Expr) -> None:
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
                            at + start + e // chunks * t.stride + e % chunks * CHUNK,
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
