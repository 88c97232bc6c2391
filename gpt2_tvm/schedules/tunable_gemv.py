"""`TunableGemv`: DLight's GEMV schedule with everything it fixes as a parameter, for one to eight rows.

    for block:                                        # blockIdx.x (and .y: the slices of split_k)
        for thread s, thread r:                       # TS x TR
            x into shared memory, if asked
            for step:                                 # r = ((step · TR + thread r) · vectors + vector) · VEC_C + lane
                weights [TILE_S, TILE_R] into registers, vec_load bytes a load
                for tile_s, row, vector: partial[lane] += W · x
            fold the lanes, then the TR threads; epilogue

With `stock_config`'s values the result is structurally equal to that of `dl.gpu.GEMV` (TVM 0.27), but for one defect
that is not copied: where nothing follows the product and TS · TILE_S does not divide N, the last block of DLight's
kernel writes past the end of y, because TVM lowers a reduction across threads without the block's predicate (the
head of GPT-2: N = 50257, TS = 16 on CUDA). Here the sum goes through a register and a copy that has the predicate.
TVM asks `__activemask()` for a shuffle's mask, behind the guards of such a block. Where several rows share a warp it
may have parted there, row by row: a guard of the product looks at the row alone (blockIdx and the thread along s), so
the threads whose values meet take the same branches, and what a lane is given of another row reaches no result.
Products that run over the weight's outer axis (p·V of materialised attention on Metal) are left to DLight.

Quantised weights (int8, 4 bits) are one more kind: what is loaded, vec_load bytes at a time, are the words that they
lie in, and each is spread in registers where it is multiplied. Their float32 elements are not rounded to float16 first,
as DLight's schedule of the same function does. The scale of an int8 row is part of the epilogue.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm import s_tir, tirx
from tvm.s_tir.dlight.analysis import get_max_shared_memory_per_block, is_broadcast_epilogue
from tvm.s_tir.dlight.base import get_bytes
from tvm.s_tir.dlight.gpu.base import GPUScheduleRule
from tvm.target import Target

from gpt2_tvm.schedules.gemv_config import GemvConfig, largest_factor, quantised_config, stock_config
from gpt2_tvm.schedules.gemv_match import GemvMatch, match_gemv, without_rounding

COMBINE_THREADS = 128  # of a block of the second kernel of split_k


@dataclass(frozen=True)
class GemvShape:
    """What a config is chosen by: outputs N and reduced K (None: symbolic), rows, and the weight's dtype."""

    outputs: int | None
    reduced: int | None
    rows: int
    dtype: str
    grouped: int = 1


Chooser = Callable[[GemvShape, Target], GemvConfig | None]


def stock(shape: GemvShape, target: Target) -> GemvConfig | None:
    """DLight's own point, for any number of rows."""
    return stock_config(target, shape.outputs, shape.reduced, shape.grouped)


def quantised(shape: GemvShape, target: Target) -> GemvConfig | None:
    """Our own point for quantised weights; float ones are left to the next rule."""
    if shape.dtype not in ("int8", "int4"):
        return None
    return quantised_config(target, shape.outputs, shape.reduced, 4 if shape.dtype == "int8" else 8)


class TunableGemv(GPUScheduleRule):
    """A product of one to eight rows with a weight [N, K], scheduled at a point of choice.

    choose: (shape, target) -> the point, or None to leave the function to the next rule; a `GemvConfig` for the same
    point everywhere; default DLight's point. guard: keep a last, partial tile from writing past the end; False only
    to show DLight's schedule as it is.
    """

    def __init__(self, choose: Chooser | GemvConfig | None = None, guard: bool = True) -> None:
        self.choose: Chooser = (lambda *_: choose) if isinstance(choose, GemvConfig) else choose or stock
        self.guard = guard

    def apply(self, func: tirx.PrimFunc, target: Target, tunable: bool) -> s_tir.Schedule | None:
        if not isinstance(func, tirx.PrimFunc) or not self.is_target_available(target):
            return None
        # Step 1. Recognise the product and bring its loops into order
        sch = s_tir.Schedule(without_rounding(func))
        match = match_gemv(sch)
        if match is None:
            return None
        # Step 2. Choose a point
        shape = GemvShape(match.outputs, match.reduced, match.rows, match.weight_dtype(sch), match.grouped)
        config = self.choose(shape, target)
        if config is None:
            return None
        if config.reduction == "shared":
            _without_shuffles(sch, target)
        # Step 3. Slices of the reduction to other blocks
        split = None
        if config.split_k > 1:
            split = _split_reduction(sch, match, config)
        # Step 4. Guard what a last, partial tile writes
        partial = match.outputs is None or match.outputs % (config.ts * config.tile_s) != 0
        if self.guard and match.epilogue is None and partial:
            match.epilogue = sch.cache_write(match.block, 0, "local")
        # Step 5. The product
        made = _Stages(sch, match, config, target, split).run()
        return made and self.finish(made, shape, config, target)

    def finish(self, sch: s_tir.Schedule, shape: GemvShape, config: GemvConfig, target: Target) -> s_tir.Schedule:
        """What a rule adds to the complete schedule of a product."""
        return sch


def overruns(func: tirx.PrimFunc, target: Target) -> bool:
    """Whether dl.gpu.GEMV of TVM 0.27, which accepts `func`, gives it a kernel that writes past the end of y."""
    match = match_gemv(s_tir.Schedule(func))
    if match is None or match.epilogue is not None or match.row is not None:
        return False
    config = stock_config(target, match.outputs, match.reduced, match.grouped)
    return match.outputs is None or match.outputs % (config.ts * config.tile_s) != 0


def _without_shuffles(sch: s_tir.Schedule, target: Target) -> None:
    """A target with warps of one thread makes TVM reduce through shared memory."""
    attributes = {**dict(target.export()), "thread_warp_size": 1}
    host = attributes.pop("host", None)
    plain = Target(attributes)
    sch.mod.update_func(
        sch.mod.get_global_vars()[0],
        sch.mod[sch.mod.get_global_vars()[0]].with_attr("target", Target(plain, Target(host)) if host else plain),
    )


def _split_reduction(sch: s_tir.Schedule, match: GemvMatch, config: GemvConfig) -> Any:
    """Cut r into split_k slices, each summed by a kernel of its own blocks; a second kernel adds the slices, and has
    the epilogue. Returns the loop over slices; `match` then describes the first kernel."""
    if match.reduced is None or match.reduced % config.split_k:
        raise ValueError(f"SPLIT_K = {config.split_k} does not divide K = {match.reduced}")
    reduction = sch.fuse(match.reduction, match.group)
    outer, _ = sch.split(reduction, factors=[config.split_k, None], preserve_unit_iters=True)
    final = match.block
    partial = sch.rfactor(outer, 0)

    *spatial, slices = sch.get_loops(final)
    if match.row is not None:  # neighbouring threads, neighbouring outputs
        spatial = [spatial[-1], *spatial[:-1]]
        sch.reorder(*spatial)
    blocks, threads = sch.split(sch.fuse(*spatial), factors=[None, COMBINE_THREADS])
    sch.bind(blocks, "blockIdx.x")
    sch.bind(threads, "threadIdx.x")
    sch.decompose_reduction(final, slices)
    if match.epilogue is not None:
        sch.set_scope(final, 0, "local")
        sch.reverse_compute_at(match.epilogue, threads)
    loops = sch.get_loops(partial)
    spatial_count = len(match.spatial)
    row = loops[spatial_count] if match.row is not None else None
    slice_loop, r = loops[-2:]
    sch.reorder(slice_loop, *loops[:-2], r)
    match.block, match.epilogue = partial, None
    match.spatial, match.row, match.reduction = loops[:spatial_count], row, r
    match.group = sch.add_unit_loop(partial)
    return slice_loop


class _Stages:
    """The schedule, a stage a method, in the order in which `run` names them."""

    def __init__(self, sch: s_tir.Schedule, match: GemvMatch, config: GemvConfig, target: Target, split: Any) -> None:
        self.sch, self.match, self.config, self.target, self.split = sch, match, config, target, split
        self.outer = 0 if split is None else 1  # loops outside the one over blocks
        self.shared = False

    def run(self) -> s_tir.Schedule | None:
        lanes, threads = self.factor()
        if self.config.shared_vector and len(self.match.vectors) != 1:
            return None
        step = self.bind_product(lanes)
        self.load_weights(lanes, step)
        if self.shared:
            self.load_vector(lanes)
        self.fold_lanes(threads)
        self.fold_threads()
        self.first_sums(lanes, threads)
        if self.match.epilogue is not None:
            self.place_epilogue()
        return self.sch

    def factor(self) -> tuple[Any, Any]:
        """Two partial sums: one for each thread and lane, then one for each thread."""
        sch, c, m = self.sch, self.config, self.match
        rows = [] if m.row is None else [m.row]
        s = sch.fuse(*m.spatial) if len(m.spatial) > 1 else m.spatial[0]
        r = sch.fuse(m.reduction, m.group)
        sch.split(s, factors=[None, c.ts, c.tile_s], preserve_unit_iters=True)
        step, tr, vectors, lane = sch.split(
            r, factors=[None, c.tr, c.tile_r // c.vec_c, c.vec_c], preserve_unit_iters=True
        )
        sch.reorder(*rows, step, vectors, tr, lane)
        lanes = sch.rfactor(sch.fuse(tr, lane), 0)
        *_, tr_lane = sch.get_loops(m.block)
        tr, _ = sch.split(tr_lane, factors=[c.tr, None], preserve_unit_iters=True)
        threads = sch.rfactor(tr, 0)
        return lanes, threads

    def bind_product(self, lanes: Any) -> Any:
        """Threads and vectors of the product itself; returns the loop over steps."""
        sch, c = self.sch, self.config
        outer, (bx, ts, *tile, step, vectors, tr_lane) = self._loops(lanes)
        tr, lane = sch.split(tr_lane, factors=[c.tr, None], preserve_unit_iters=True)
        sch.reorder(*outer, bx, ts, tr, step, *tile, vectors, lane)
        for loop in outer:
            sch.bind(loop, "blockIdx.y")
        sch.bind(bx, "blockIdx.x")
        sch.bind(ts, c.s_tag)
        sch.bind(tr, c.r_tag)
        sch.vectorize(lane)
        self.shared = c.shared_vector and self._vector_fits()
        self.block_loop, self.tr = bx, tr
        return step

    def _vector_fits(self) -> bool:
        """Whether x, and what a reduction through shared memory needs, fit a block's shared memory."""
        used = 0
        for buffer in self.match.vectors:
            size = 1
            for extent in buffer.shape:
                if not isinstance(extent, tirx.IntImm):
                    return False
                size *= int(extent)
            used += size * get_bytes(buffer.dtype)
            if self._through_shared():
                used += self.config.threads * get_bytes(buffer.dtype)
        return used <= get_max_shared_memory_per_block(self.target)

    def _through_shared(self) -> bool:
        return self.config.reduction == "shared" or self.target.kind.name not in ("cuda", "metal")

    def load_weights(self, lanes: Any, step: Any) -> None:
        """This step's weights into registers, vec_load bytes at a time."""
        sch = self.sch
        cache = sch.cache_read(lanes, read_buffer_index=self.match.weight, storage_scope="local")
        count = len(sch.get_loops(cache))
        sch.compute_at(cache, step, preserve_unit_loops=True)
        loops = sch.get_loops(cache)[-count:]
        flat = loops[0] if len(loops) == 1 else sch.fuse(*loops[-2:])
        size = get_bytes(sch.get(cache).reads[0].source.dtype)
        _, vector = sch.split(flat, factors=[None, max(1, self.config.vec_load // size)], preserve_unit_iters=True)
        sch.vectorize(vector)

    def load_vector(self, lanes: Any) -> None:
        """The whole of x into shared memory, by all threads of the block."""
        sch, c = self.sch, self.config
        cache = sch.cache_read(lanes, read_buffer_index=self.match.vector, storage_scope="shared")
        sch.compute_at(cache, self.tr, preserve_unit_loops=True)
        loop = sch.get_loops(cache)[-1]
        extent = sch.get(loop).extent
        wide = c.vec_shared
        if isinstance(extent, tirx.IntImm):  # a length that divides leaves no predicate
            whole = largest_factor(int(extent), tuple(c.threads * f for f in (1, 2, 4, 8)))
            wide = max(min(whole // c.threads, c.vec_shared), 1)
        y, x = (c.ts, c.tr) if c.s_axis == "y" else (c.tr, c.ts)
        _, ty, tx, vector = sch.split(loop, factors=[None, y, x, wide], preserve_unit_iters=True)
        sch.bind(ty, "threadIdx.y")
        sch.bind(tx, "threadIdx.x")
        sch.vectorize(vector)
        self.vector_cache = cache

    def fold_lanes(self, threads: Any) -> None:
        """The lanes of each thread to one sum."""
        sch, c = self.sch, self.config
        sch.reverse_compute_at(threads, self.block_loop, preserve_unit_loops=True)
        tr, lane, *rest = self._loops(threads)[1][1:]
        rows, ts, tile_s = self._split_outputs(rest)
        tile_s, vector = sch.split(
            tile_s, factors=[None, largest_factor(c.tile_s, (1, 2, 4))], preserve_unit_iters=True
        )
        sch.reorder(ts, tr, *rows, tile_s, vector, lane)
        sch.bind(ts, c.s_tag)
        sch.bind(tr, c.r_tag)
        sch.vectorize(vector)

    def fold_threads(self) -> None:
        """The threads along r to one sum: the reduction across threads."""
        sch, c = self.sch, self.config
        sch.reverse_compute_at(self.match.block, self.block_loop, preserve_unit_loops=True)
        tr, *rest = self._loops(self.match.block)[1][1:]
        rows, ts, tile_s = self._split_outputs(rest)
        sch.reorder(*rows, tile_s, ts, tr)
        sch.bind(ts, c.s_tag)
        sch.bind(tr, c.r_tag)

    def _split_outputs(self, loops: list[Any]) -> tuple[list[Any], Any, Any]:
        """Loops over one block's outputs as (rows, thread, tile)."""
        sch, c = self.sch, self.config
        rows = [] if self.match.row is None else loops[:-1]
        outputs = loops[len(rows) :]
        flat = sch.fuse(*outputs)
        outer, inner, tile_s = sch.split(flat, factors=[None, c.ts, c.tile_s], preserve_unit_iters=True)
        return rows, sch.fuse(outer, inner), tile_s

    def first_sums(self, lanes: Any, threads: Any) -> None:
        """Zero the sums before the loop over steps, keep them in registers, unroll."""
        sch, c = self.sch, self.config
        depth = self.outer + 3
        sch.decompose_reduction(lanes, loop=sch.get_loops(lanes)[depth])
        sch.decompose_reduction(threads, loop=sch.get_loops(threads)[-1])
        for block in (lanes, threads):
            sch.set_scope(block, buffer_index=0, storage_scope="local")
        for block in (lanes, threads):
            loop = sch.get_loops(block)[depth]
            sch.annotate(loop, "pragma_auto_unroll_max_step", c.unroll)
            sch.annotate(loop, "pragma_unroll_explicit", 1)
        if self.shared:
            loop = sch.get_loops(self.vector_cache)[-4]
            sch.annotate(loop, "pragma_unroll_explicit", c.unroll)
            sch.annotate(loop, "pragma_vectorize", 1)

    def place_epilogue(self) -> None:
        """What follows the product, in the same kernel."""
        sch, c, epilogue = self.sch, self.config, self.match.epilogue
        if self.match.row is None and is_broadcast_epilogue(sch, self.match.block, epilogue):
            sch.reverse_compute_at(epilogue, self.block_loop)
            sch.set_scope(self.match.block, 0, "shared")
            _, _, *rest = sch.get_loops(epilogue)
            _, tx = sch.split(sch.fuse(*rest), factors=[None, c.tr])
            sch.bind(tx, "threadIdx.x")
            return
        sch.reverse_compute_at(epilogue, self.block_loop, preserve_unit_loops=True)
        _, ts, _ = self._split_outputs(self._loops(epilogue)[1][1:])
        sch.bind(ts, c.s_tag)
        sch.set_scope(self.match.block, 0, "local")

    def _loops(self, block: Any) -> tuple[list[Any], list[Any]]:
        """(loops outside the one over blocks, the others)."""
        loops = self.sch.get_loops(block)
        return loops[: self.outer], loops[self.outer :]
