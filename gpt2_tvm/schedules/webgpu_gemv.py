"""`WebgpuGemv`: one to eight rows times a weight [N, K], for GPUs behind WGSL.

    for block of outputs:
        the prologue, where x is computed here: see `webgpu_prologue`
        for thread s, thread r:                           # TS x TR; neighbouring r read neighbouring vectors
            acc [rows, TILE_S] = 0
            for step of k:
                w [TILE_S, 4], x [rows, 4] <- vectors along k
                for row, tile_s, lane: acc[row, tile_s] += x[row, lane] * w[tile_s, lane]
            acc to shared memory; one barrier
        for output, one a thread: the TR sums, epilogue, store

It takes the points of `TunableGemv` (`GemvConfig`) but writes the loops itself. Through TVM's schedule a WGSL kernel
has its sums in arrays with computed indices, which no compiler keeps in registers, every vector sum written out lane
by lane, and two barriers for each halving of the threads, once for every output of a tile; on a software device, where
a barrier suspends every thread, that is most of the time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from tvm import s_tir, tirx
from tvm.s_tir.dlight.gpu.base import GPUScheduleRule
from tvm.script import tirx as T
from tvm.target import Target

from gpt2_tvm.kernels.math import Expr, static
from gpt2_tvm.schedules.gemv_config import GemvConfig
from gpt2_tvm.schedules.gemv_match import MAX_ROWS
from gpt2_tvm.schedules.stages import Buffer, bind
from gpt2_tvm.schedules.tunable_gemv import Chooser, GemvShape
from gpt2_tvm.schedules.webgpu_product import (
    LANES,
    Product,
    binding,
    buffer,
    kernel,
    loop,
    match_product,
    store_epilogue,
    vector,
    where,
)
from gpt2_tvm.schedules.webgpu_prologue import At, Prologue, plan_prologue

RULE = "webgpu-gemv"


def config_for(shape: GemvShape, target: Target, prologue: bool = False) -> GemvConfig:
    """The point where nothing was tuned. prologue: each block computes the vector first.

    Eight threads side by side read 128 neighbouring bytes, a whole line of any cache; more would only make the sums
    meet later. 64 threads a block: the blocks of a small product still fill a GPU. Two outputs a thread: the vector,
    which every block reads, is then loaded half as often. Twice the threads where there is a prologue to share.
    """
    ts = 16 if prologue else 8
    return GemvConfig(ts=ts, tr=8, tile_s=2, tile_r=LANES, vec_load=16, vec_c=LANES, reduction="shared")


class WebgpuGemv(GPUScheduleRule):
    """Products of one to eight rows, their number known; see the module.

    choose: (shape, target) -> the point, or None to leave the function to the next rule. Of the point, ts, tr and
    tile_s are used; vectors are as long as K allows. lone: outputs of a thread that shares no sum with others (0: as
    the point says); blocks stay as large as the point says. windowed: only products whose vector is computed first, and
    of it a block has one window at a time in shared memory (`Prologue.width`).
    """

    def __init__(self, choose: Chooser | GemvConfig | None = None, lone: int = 0, windowed: bool = False) -> None:
        self.lone, self.windowed = lone, windowed
        self.choose: Chooser | None = (lambda *_: choose) if isinstance(choose, GemvConfig) else choose

    def apply(self, func: tirx.PrimFunc, target: Target, tunable: bool) -> s_tir.Schedule | None:
        if not isinstance(func, tirx.PrimFunc) or not self.is_target_available(target):
            return None
        # Step 1. Recognise the product
        m = match_product(func)
        rows = static(m.rows) if m is not None else None
        if m is None or rows is None or not 1 <= rows <= MAX_ROWS:
            return None
        # Step 2. Choose a point
        shape = GemvShape(int(m.column.extent), int(m.k.extent), rows, str(m.w.ty.dtype))
        config = self.choose(shape, target) if self.choose else config_for(shape, target, bool(m.prologue))
        if config is None:
            return None
        most = int(target.attrs.get("max_num_threads", 256))
        while config.threads > most:
            config = replace(config, ts=max(1, config.ts // 2), tr=config.tr if config.ts > 1 else config.tr // 2)
        if self.lone:
            config = _lone(config, self.lone)
        # Step 3. The prologue, where there is one
        prologue = plan_prologue(m, config.threads, self.windowed) if m.prologue else None
        memory = int(target.attrs.get("max_shared_memory_per_block", 16 << 10))
        if m.prologue and prologue is not None:
            while config.tr > 1 and prologue.shared_bytes + 4 * _sums(rows, config) > memory:
                config = replace(config, tr=config.tr // 2)
                prologue = plan_prologue(m, config.threads, self.windowed) or prologue
        if m.prologue and (prologue is None or prologue.shared_bytes + 4 * _sums(rows, config) > memory):
            return None
        if self.windowed and (prologue is None or not prologue.width):
            return None
        # Step 4. Loops
        return kernel(func, _Emitter(m, rows, config, prologue).emit)


def _lone(config: GemvConfig, outputs: int) -> GemvConfig:
    """A point with blocks as large, whose threads have `outputs` outputs each, where that divides, for themselves."""
    block = config.ts * config.tile_s
    ts, tile_s = (block // outputs, outputs) if block % outputs == 0 else (config.ts, config.tile_s)
    return replace(config, ts=ts, tile_s=tile_s, tr=1, reduction="shared")


def _sums(rows: int, config: GemvConfig) -> int:
    """Sums in shared memory: for each output one a thread along r, and one to spare, so that the readers' rows start in
    other banks."""
    return rows * config.ts * config.tile_s * (config.tr + 1) if config.tr > 1 else 0


class _Emitter:
    def __init__(self, m: Product, rows: int, config: GemvConfig, prologue: Prologue | None) -> None:
        self.m, self.rows, self.c, self.prologue = m, rows, config, prologue
        self.n, self.k = int(m.column.extent), int(m.k.extent)
        self.lanes = next(lanes for lanes in (LANES, 2, 1) if self.k % lanes == 0)
        self.outputs = config.ts * config.tile_s  # of a block, in one row

    def emit(self) -> None:
        c = self.c
        acc = buffer("acc", [self.rows * c.tile_s], "float32")
        x = buffer("x_part", [self.rows, self.lanes], self.m.x.ty.dtype)
        w = buffer("w_part", [c.tile_s, self.lanes], self.m.w.ty.dtype)
        sums = buffer("sums", [_sums(self.rows, c)], "float32", "shared") if c.tr > 1 else None
        with (
            binding("block", -(-self.n // self.outputs), "blockIdx.x") as block,
            binding("tid", c.threads, "threadIdx.x") as tid,
        ):
            made = self.prologue.emit(tid) if self.prologue else {}
            s, r = tid // c.tr, tid % c.tr
            first = block * self.outputs
            for i in range(self.rows * c.tile_s):
                T.buffer_store(acc, tirx.const(0, "float32"), [i])
            columns = [self._inside(first + s + j * c.ts) for j in range(c.tile_s)]
            if self.prologue and self.prologue.width:
                self._multiply_windows(self.prologue, acc, x, w, columns, tid)
            else:
                self._multiply(acc, x, w, columns, r, made)
            if sums is None:
                self._store_own(acc, first + s)
                return
            for row in range(self.rows):
                for j in range(c.tile_s):
                    at = (row * self.outputs + s + j * c.ts) * (c.tr + 1) + r
                    T.buffer_store(sums, tirx.BufferLoad(acc, [row * c.tile_s + j]), [at])
            T.evaluate(T.tvm_storage_sync("shared"))
            self._meet(sums, first, tid)

    def _inside(self, column: Expr) -> Expr:
        return tirx.min(column, self.n - 1) if self.n % self.outputs else column

    def _multiply(
        self, acc: Buffer, x: Buffer, w: Buffer, columns: list[Expr], r: Expr, made: Mapping[Buffer, At]
    ) -> None:
        vectors = self.k // self.lanes
        with loop("step", -(-vectors // self.c.tr)) as step:
            at = bind("at", step * self.c.tr + r)
            with where(at < vectors, vectors % self.c.tr != 0):
                self._step(acc, x, w, columns, at, made)

    def _multiply_windows(
        self, prologue: Prologue, acc: Buffer, x: Buffer, w: Buffer, columns: list[Expr], tid: Expr
    ) -> None:
        with loop("window", self.k // prologue.width) as window:
            made = prologue.fill(tid, window * prologue.width)
            vectors = prologue.width // self.lanes
            with loop("step", vectors) as step:
                self._step(acc, x, w, columns, window * vectors + step, made)
            T.evaluate(T.tvm_storage_sync("shared"))

    def _step(
        self, acc: Buffer, x: Buffer, w: Buffer, columns: list[Expr], at: Expr, made: Mapping[Buffer, At]
    ) -> None:
        """One vector along k of every row and column, multiplied."""
        for j, column in enumerate(columns):
            self.m.load_weights(w, j, self.lanes, column, at * self.lanes)
        for row in range(self.rows):
            vector(x, [row], self.lanes, self._x(row, at, made))
        for row in range(self.rows):
            for j in range(len(columns)):
                place = [row * len(columns) + j]
                for lane in range(self.lanes):
                    term = _wide(x, row, lane) * _wide(w, j, lane)
                    T.buffer_store(acc, tirx.BufferLoad(acc, place) + term, place)

    def _x(self, row: int, at: Expr, made: Mapping[Buffer, At]) -> Callable[[Expr], Expr]:
        return lambda lane: self.m.x_at(_int(row), at * self.lanes + lane, made)

    def _store_own(self, acc: Buffer, column: Expr) -> None:
        """The outputs of a thread that shares none, a loop over a copy of the sums: these have no computed indices and
        stay in registers, and the epilogue is compiled once."""
        count, tile_s = self.rows * self.c.tile_s, self.c.tile_s
        held = buffer("held", [count], "float32")
        for i in range(count):
            T.buffer_store(held, tirx.BufferLoad(acc, [i]), [i])
        with loop("output", count) as i:
            self._store(i // tile_s, column + i % tile_s * self.c.ts, tirx.BufferLoad(held, [i]))

    def _meet(self, sums: Buffer, first: Expr, tid: Expr) -> None:
        """Each output by one thread."""
        c, count = self.c, self.rows * self.outputs
        total = buffer("total", [1], "float32")
        with loop("round", -(-count // c.threads)) as turn:
            output = bind("output", turn * c.threads + tid)
            with where(output < count, count % c.threads != 0):
                T.buffer_store(total, tirx.const(0, "float32"), [0])
                with loop("r", c.tr) as r:
                    more = tirx.BufferLoad(sums, [output * (c.tr + 1) + r])
                    T.buffer_store(total, tirx.BufferLoad(total, [0]) + more, [0])
                self._store(output // self.outputs, first + output % self.outputs, tirx.BufferLoad(total, [0]))

    def _store(self, row: Expr | int, column: Expr, total: Expr) -> None:
        with where(column < self.n, self.n % self.outputs != 0):
            store_epilogue(self.m, _int(row) if isinstance(row, int) else row, column, total)


def _int(value: int) -> Expr:
    return tirx.const(value, "int32")


def _wide(part: Buffer, row: int, lane: int) -> Expr:
    value = tirx.BufferLoad(part, [row, lane])
    return value if part.dtype == "float32" else tirx.Cast("float32", value)
