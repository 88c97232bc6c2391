"""`WebgpuMatmul`: many rows times a weight [N, K], tiled in registers, for GPUs behind WGSL.

A block owns `rows` x `columns` of y, each of its threads a tile of them in registers, a stride apart so that neighbours
write neighbours:

    for block of rows, block of columns:
        for thread:
            acc [tile_m, tile_n] = 0
            for step of k:                                # the one loop; what is inside is unrolled
                x [tile_m, 4], w [tile_n, 4] <- vectors along k
                for m, n, lane: acc[m, n] += x[m, lane] * w[n, lane]
            epilogue (bias, activation, residual) and store, element by element

The vectors come straight from memory (`shared_k` = 0), or from shared memory, which the block fills for `shared_k`
elements of k at a time. Either way a multiply-add waits for an eighth of a load of four (8 x 8 tiles), where DLight's
schedule for WebGPU has a load of one for every two.

Rows past the last read the last one again and are not stored, so one kernel serves every length. Only the tile is
unrolled: tile_m · tile_n · 4 statements, which a software device compiles in a fraction of a second. Without shared
memory the epilogue is a loop over a copy of the sums, for it costs such a device as much to compile again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from tvm import DataType, s_tir, tirx
from tvm.s_tir.dlight.gpu.base import GPUScheduleRule
from tvm.script import tirx as T
from tvm.target import Target

from gpt2_tvm.errors import UserError
from gpt2_tvm.kernels.math import Expr
from gpt2_tvm.schedules.stages import Buffer, bind
from gpt2_tvm.schedules.webgpu_product import (
    LANES,
    Product,
    along,
    binding,
    buffer,
    kernel,
    loop,
    match_product,
    store_epilogue,
    vector,
    where,
)


@dataclass(frozen=True)
class MatmulConfig:
    """How the product is tiled.

    Attributes:
        tile_m, tile_n: rows and columns of a thread's tile.
        threads_m, threads_n: threads of a block along rows and columns.
        shared_k: elements of k that a block keeps in shared memory at a time, a multiple of 4; 0: none, every thread
            reads memory itself (devices without fast shared memory: software, some mobile GPUs).
    """

    tile_m: int = 4
    tile_n: int = 8
    threads_m: int = 16
    threads_n: int = 8
    shared_k: int = 16

    def __post_init__(self) -> None:
        sizes = (self.tile_m, self.tile_n, self.threads_m, self.threads_n)
        if min(sizes) < 1 or self.shared_k < 0 or self.shared_k % LANES:
            raise UserError(f"{self}: tiles and threads must be at least 1, shared_k a multiple of {LANES} or 0")

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return self.threads_m * self.threads_n

    @property
    def rows(self) -> int:
        """Rows of y a block."""
        return self.tile_m * self.threads_m

    @property
    def columns(self) -> int:
        """Columns of y a block."""
        return self.tile_n * self.threads_n

    @property
    def stride(self) -> int:
        """Elements from row to row in shared memory: an odd number of vectors, so that rows start in other banks."""
        return LANES * (self.shared_k // LANES | 1)

    def shared_bytes(self, element_bytes: int) -> int:
        """Shared memory of a block."""
        return (self.rows + self.columns) * self.stride * element_bytes if self.shared_k else 0

    def for_rows(self, rows: int) -> MatmulConfig:
        """The same with tiles no taller than `rows` rows need."""
        return replace(self, tile_m=max(1, min(self.tile_m, -(-rows // self.threads_m))))


class WebgpuMatmul(GPUScheduleRule):
    """Products with a number of rows that is symbolic, or known at compile time; see the module.

    config: the point for many rows; a product of few gets lower tiles.
    """

    def __init__(self, config: MatmulConfig | None = None) -> None:
        self.config = config or MatmulConfig()

    def apply(self, func: tirx.PrimFunc, target: Target, tunable: bool) -> s_tir.Schedule | None:
        if not isinstance(func, tirx.PrimFunc) or not self.is_target_available(target):
            return None
        # Step 1. Recognise the product
        m = match_product(func)
        if m is None or m.prologue:
            return None
        # Step 2. Tiles that the device takes
        rows = m.few_rows()
        config = self.config if rows is None else self.config.for_rows(rows)
        config = _fitting(config, m, target)
        # Step 3. Loops
        return kernel(func, _Emitter(m, config).emit)


def _fitting(config: MatmulConfig, m: Product, target: Target) -> MatmulConfig:
    """`config`, lowered to what a block of the target may use."""
    threads = int(target.attrs.get("max_num_threads", 256))
    memory = int(target.attrs.get("max_shared_memory_per_block", 16 << 10))
    element = max(DataType(e.ty.dtype).bits // 8 for e in (m.x, m.w))
    while config.threads > threads:
        config = replace(config, threads_n=max(1, config.threads_n // 2), threads_m=max(1, config.threads_m // 2))
    while config.shared_bytes(element) > memory:
        config = replace(config, shared_k=config.shared_k // 2 // LANES * LANES)
    return config


class _Emitter:
    def __init__(self, m: Product, config: MatmulConfig) -> None:
        self.m, self.c = m, config
        self.n, self.k = int(m.column.extent), int(m.k.extent)
        self.lanes = next(lanes for lanes in (LANES, 2, 1) if self.k % lanes == 0)
        self.rows = tirx.Cast("int32", m.rows) if m.rows.ty.dtype != "int32" else m.rows

    def emit(self) -> None:
        c = self.c
        blocks = (self.rows + (c.rows - 1)) // c.rows
        columns = -(-self.n // c.columns)
        acc = buffer("acc", [c.tile_m * c.tile_n], "float32")
        self.x = buffer("x_part", [c.tile_m, self.lanes], self.m.x.ty.dtype)
        self.w = buffer("w_part", [c.tile_n, self.lanes], self.m.w.ty.dtype)
        if c.shared_k:
            self.x_shared = buffer("x_shared", [c.rows * c.stride], self.m.x.ty.dtype, "shared")
            self.w_shared = buffer("w_shared", [c.columns * c.stride], self.m.w.ty.dtype, "shared")
        with (
            binding("bx", blocks, "blockIdx.x") as bx,
            binding("by", columns, "blockIdx.y") as by,
            binding("tid", c.threads, "threadIdx.x") as tid,
        ):
            self.tid = tid
            self.row0, self.column0 = bx * c.rows, by * c.columns
            self.ty, self.tx = tid // c.threads_n, tid % c.threads_n
            self._each(lambda m, n: T.buffer_store(acc, tirx.const(0, "float32"), [m * c.tile_n + n]))
            self._through_shared(acc) if c.shared_k else self._direct(acc)
            self._store(acc)

    def _each(self, body: Callable[[int, int], None]) -> None:
        for m in range(self.c.tile_m):
            for n in range(self.c.tile_n):
                body(m, n)

    def _row(self, m: int) -> Expr:
        """Row m of the thread's tile."""
        return self.row0 + self.ty + m * self.c.threads_m

    def _column(self, n: int) -> Expr:
        return self.column0 + self.tx + n * self.c.threads_n

    def _direct(self, acc: Buffer) -> None:
        c = self.c
        rows = [bind(f"row{m}", tirx.min(self._row(m), self.rows - 1)) for m in range(c.tile_m)]
        columns = [self._inside(self._column(n)) for n in range(c.tile_n)]
        with loop("step", self.k // self.lanes) as step:
            for m, row in enumerate(rows):
                vector(self.x, [m], self.lanes, self._lanes(self.m.x_at, row, step))
            for n, column in enumerate(columns):
                self.m.load_weights(self.w, n, self.lanes, column, step * self.lanes)
            self._multiply(acc)

    def _lanes(self, element: Callable[[Expr, Expr], Expr], line: Expr, step: Expr) -> Callable[[Expr], Expr]:
        """lane -> element(line, k) in this step's vector."""
        return lambda lane: element(line, step * self.lanes + lane)

    def _inside(self, column: Expr) -> Expr:
        return tirx.min(column, self.n - 1) if self.n % self.c.columns else column

    def _through_shared(self, acc: Buffer) -> None:
        c = self.c
        with loop("block", -(-self.k // c.shared_k)) as block:
            first = block * c.shared_k
            T.evaluate(T.tvm_storage_sync("shared"))  # the last block has been read
            self._fill(
                self.x_shared, c.rows, first, lambda r, k: self.m.x_at(tirx.min(self.row0 + r, self.rows - 1), k)
            )
            self._fill(
                self.w_shared, c.columns, first, lambda r, k: self.m.w_at(self._inside(self.column0 + r), k), True
            )
            T.evaluate(T.tvm_storage_sync("shared"))
            with loop("step", c.shared_k // self.lanes) as step:
                for m in range(c.tile_m):
                    at = (self.ty + m * c.threads_m) * c.stride + step * self.lanes
                    vector(self.x, [m], self.lanes, along(self.x_shared, at))
                for n in range(c.tile_n):
                    at = (self.tx + n * c.threads_n) * c.stride + step * self.lanes
                    vector(self.w, [n], self.lanes, along(self.w_shared, at))
                self._multiply(acc)

    def _fill(
        self, tile: Buffer, rows: int, first: Expr, value: Callable[[Expr, Expr], Expr], weights: bool = False
    ) -> None:
        """Rows of k's block into shared memory, a vector a thread and round; zeros past the end of k."""
        in_words = weights and self.m.halves is not None and self.lanes > 1
        c = self.c
        vectors = c.shared_k // self.lanes
        with loop("round", -(-rows * vectors // c.threads)) as turn:
            e = bind("e", turn * c.threads + self.tid)
            row, k = e // vectors, e % vectors * self.lanes

            def element(lane: Expr) -> Expr:
                found = tirx.BufferLoad(self.w, [0, lane]) if in_words else value(row, first + k + lane)
                if self.k % c.shared_k == 0:
                    return found
                return T.if_then_else(first + k < self.k, found, tirx.const(0, found.ty.dtype))

            with where(e < rows * vectors, (rows * vectors) % c.threads != 0):
                if in_words:  # through registers; past the end the last ones
                    at = first + k if self.k % c.shared_k == 0 else tirx.min(first + k, self.k - self.lanes)
                    self.m.load_weights(self.w, 0, self.lanes, self._inside(self.column0 + row), at)
                vector(tile, [], self.lanes, element, offset=row * c.stride + k)

    def _multiply(self, acc: Buffer) -> None:
        def wide(buffer: Buffer, row: int, lane: int) -> Expr:
            value = tirx.BufferLoad(buffer, [row, lane])
            return value if buffer.dtype == "float32" else tirx.Cast("float32", value)

        def add(m: int, n: int) -> None:
            at = [m * self.c.tile_n + n]
            for lane in range(self.lanes):
                T.buffer_store(acc, tirx.BufferLoad(acc, at) + wide(self.x, m, lane) * wide(self.w, n, lane), at)

        self._each(add)

    def _store(self, acc: Buffer) -> None:
        c = self.c
        each: Callable[..., Any] = T.unroll
        if not c.shared_k:  # a copy, so that the sums themselves have no computed indices and stay in registers
            each, sums = T.serial, buffer("sums", [c.tile_m * c.tile_n], "float32")
            for i in range(c.tile_m * c.tile_n):
                T.buffer_store(sums, tirx.BufferLoad(acc, [i]), [i])
            acc = sums
        with loop("m", c.tile_m, each) as m:
            row = bind("row", self.row0 + self.ty + m * c.threads_m)
            with where(row < self.rows, True), loop("n", c.tile_n, each) as n:
                column = bind("column", self.column0 + self.tx + n * c.threads_n)
                with where(column < self.n, self.n % c.columns != 0):
                    store_epilogue(self.m, row, column, tirx.BufferLoad(acc, [m * c.tile_n + n]))
