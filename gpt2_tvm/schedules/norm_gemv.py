"""`NormGemv`: a product of a few rows whose vector is computed where it is needed.

A decode step is a chain of small kernels, and each costs a launch. LayerNorm before a product needs all n_embd values
of a row and no more: so every block of the product computes it again, for itself, into shared memory, and multiplies
from there. The same holds for what merges the splits of split-KV attention before the output projection.

    for block:
        the weights of each thread into registers, where they fit (`early_loads.py`)
        for each reduction of the prologue (sum, squares): all threads of the block, one row after the other
        the vector into shared memory, all threads
        the product: `TunableGemv`'s stages, at the same points

The prologue's reductions over many elements of few rows meet across the block's threads (two barriers each); those
over a few elements of many places (splits) are one thread's each.
"""

from __future__ import annotations

from dataclasses import replace
from math import prod
from typing import Any

from tvm import s_tir, tirx
from tvm.s_tir.dlight import analysis
from tvm.s_tir.dlight.analysis import get_max_shared_memory_per_block
from tvm.s_tir.dlight.base import get_bytes, try_inline_contiguous_spatial
from tvm.s_tir.dlight.gpu.base import GPUScheduleRule
from tvm.target import Target

from gpt2_tvm.schedules import early_loads
from gpt2_tvm.schedules.add_norm import schedule_add_norm
from gpt2_tvm.schedules.gemv_config import LOAD_BYTES, GemvConfig, largest_factor
from gpt2_tvm.schedules.gemv_match import GemvMatch, _one_row, _several_rows, without_rounding
from gpt2_tvm.schedules.launch_bounds import with_room
from gpt2_tvm.schedules.tunable_gemv import Chooser, GemvShape, _Stages, quantised

RULE = "norm-gemv"
LATE_RULE = "late-norm-gemv"  # without early loads; stands before the other (`--rules with-late-norm-gemv`)
FEW = 32  # a reduction over no more elements is one thread's
LARGE = 16384  # outputs from which a block takes several a thread, so that fewer blocks repeat the prologue
THREADS = 256  # of a block with quantised weights


def config_for(shape: GemvShape, target: Target) -> GemvConfig:
    """The point where nothing was tuned: blocks large enough that the prologue is a small part of what they do."""
    kind = str(target.kind.name)
    most = int(target.attrs["max_num_threads"])
    wide = shape.outputs is not None and shape.outputs >= LARGE
    if (point := quantised(shape, target)) is not None:
        return replace(point, ts=max(point.ts, min(THREADS, most) // point.tr), tile_s=4 if wide else 1)
    item = get_bytes(shape.dtype)
    if kind == "webgpu":
        ts, tr, vec_load, most_r = 8, 32, item, 4
    else:
        # Metal has vectors of four, whatever their elements
        ts, tr, vec_load, most_r = (8, 32, 4 * item if kind == "metal" else LOAD_BYTES, LOAD_BYTES // item)
    while ts * tr > most:
        ts //= 2
    k = shape.reduced or 1
    if kind == "cuda":  # fewer threads a row before loads of fewer bytes: K = 1600 is 8 threads x 25 loads
        along = next((t for t in (32, 16, 8, 4) if k % (t * most_r) == 0), tr)
        ts, tr = ts * tr // along, along
    tile_r = max(largest_factor(k, tuple(tr * f for f in (1, 2, 4, 8, 16) if f <= most_r)) // tr, 1)
    vec_c = 1 if kind in ("webgpu", "metal") else largest_factor(tile_r, (1, 2, 4))
    return GemvConfig(
        ts=ts,
        tr=tr,
        tile_s=4 if wide else 1,
        tile_r=tile_r,
        vec_load=min(vec_load, tile_r * item),
        vec_c=vec_c,
        s_axis="x" if kind == "metal" else "y",
        shared_vector=True,
        # TVM's Metal code generator fails where a shared buffer is written in twos and read in fours
        vec_shared=1 if kind in ("webgpu", "metal") else 4,
        unroll=64 if kind == "webgpu" else 256,
    )


def shared_bytes(values: int, item: int, reductions: int, small: int, threads: int) -> int:
    """Shared memory of a block: `values` elements of `item` bytes of vectors, `small` float32 sums, and a slot a thread
    for the product's and each of the prologue's reductions, which targets without shuffles need."""
    return values * item + 4 * small + 4 * threads * (reductions + 1)


def fits(values: int, item: int, reductions: int, small: int, target: Target) -> bool:
    """Whether `NormGemv` can take a product with such a prologue, at any point of at most 512 threads."""
    threads = min(512, int(target.attrs["max_num_threads"]))
    return shared_bytes(values, item, reductions, small, threads) <= get_max_shared_memory_per_block(target)


class NormGemv(GPUScheduleRule):
    """A function whose product [1..8 rows, K] x [N, K] reads a vector that the function itself computes; and residual
    add with LayerNorm (`add_norm.py`).

    choose: as `TunableGemv`'s; what it leaves gets `config_for`'s point. early: load the weights before the vector is
    computed, where that fits (`early_loads.py`).
    """

    def __init__(self, choose: Chooser | None = None, early: bool = True) -> None:
        self.choose, self.early = choose, early

    def apply(self, func: tirx.PrimFunc, target: Target, tunable: bool) -> s_tir.Schedule | None:
        if not isinstance(func, tirx.PrimFunc) or not self.is_target_available(target):
            return None
        if (add_norm := schedule_add_norm(func, target)) is not None:
            return add_norm
        # Step 1. The product, and before it the blocks that compute its vector
        sch = s_tir.Schedule(without_rounding(func))
        found = match_prologue(sch)
        if found is None:
            return None
        match, prologue = found
        # Step 2. A point
        shape = GemvShape(match.outputs, match.reduced, match.rows, match.weight_dtype(sch), match.grouped)
        config = (self.choose and self.choose(shape, target)) or config_for(shape, target)
        config = replace(config, shared_vector=True, split_k=1, reduction="shuffle")
        # Step 3. Shared memory
        buffers = [sch.get(block).writes[0].source for block in prologue]
        if any(not isinstance(e, tirx.IntImm) for buffer in buffers for e in buffer.shape):
            return None
        values = sum(prod(int(e) for e in buffer.shape) * get_bytes(buffer.dtype) for buffer in buffers)
        if shared_bytes(values, 1, len(prologue) - 1, 0, config.threads) > get_max_shared_memory_per_block(target):
            return None
        # Step 4. Guard what a last, partial tile writes
        if match.epilogue is None and (match.outputs is None or match.outputs % (config.ts * config.tile_s)):
            match.epilogue = sch.cache_write(match.block, 0, "local")
        # Step 5. The product's schedule, which places the prologue where it would load the vector
        early = self.early and early_loads.fits(sch, match, config, target)
        stages = _PrologueStages(sch, match, config, target, prologue, early)
        made = stages.run()
        if made is None:
            return None
        if stages.early_weights is not None:
            buffer = made.get(stages.early_weights).writes[0].source
            made = s_tir.Schedule(early_loads.finish(made.mod["main"], buffer))
        return with_room(made, shape, config, target)


def match_prologue(sch: s_tir.Schedule) -> tuple[GemvMatch, list[Any]] | None:
    """The product with what follows it, and the blocks of its prologue in order; None where there is no such pair."""
    infos = analysis.normalize_prim_func(sch)
    reductions = [i for i, info in enumerate(infos or ()) if info.is_reduction()]
    if not infos or len(reductions) < 2 or not all(info.is_injective() or info.is_reduction() for info in infos):
        return None
    product, before = infos[reductions[-1]], infos[: reductions[-1]]
    after = try_inline_contiguous_spatial(sch, infos[reductions[-1] + 1 :])
    reads = [read.source for read in sch.get(product.block_rv).reads]
    vector = next((i for i in reversed(before) if sch.get(i.block_rv).writes[0].source.same_as(reads[0])), None)
    if vector is None or vector.is_reduction() or len(after) > 1 or not _reads_weight(sch, product, before):
        return None
    for info in before:  # a mean, say, once a row: its readers compute it from the sum
        if info is not vector and info.is_injective():
            sch.compute_inline(info.block_rv)
    epilogue = after[0].block_rv if after else None
    match = _one_row(sch, product, epilogue) or _several_rows(sch, product, epilogue)
    if match is None or match.vectors[0].name != reads[0].name:
        return None
    return match, [*(info.block_rv for info in before if info.is_reduction()), vector.block_rv]


def _reads_weight(sch: s_tir.Schedule, product: Any, before: Any) -> bool:
    """Whether a reduction multiplies its vector with parameters, or what is spread from them (dequantised); the squares
    about a mean are not such a product."""
    made = {sch.get(info.block_rv).writes[0].source: sch.get(info.block_rv).reads for info in before}
    others = [read.source for read in sch.get(product.block_rv).reads[1:]]
    return bool(others) and all(
        other not in made or not any(read.source in made for read in made[other]) for other in others
    )


class _PrologueStages(_Stages):
    """`TunableGemv`'s stages, with a vector that is computed in shared memory instead of read into it."""

    def __init__(
        self, sch: s_tir.Schedule, match: GemvMatch, config: GemvConfig, target: Target, prologue: Any, early: bool
    ) -> None:
        super().__init__(sch, match, config, target, None)
        self.prologue, self.early = list(prologue), early
        self.early_weights: Any = None  # the block that loads them

    def _vector_fits(self) -> bool:
        return True  # `NormGemv.apply` has looked

    def load_weights(self, lanes: Any, step: Any) -> None:
        """Before the prologue, where they fit in registers; else as ever."""
        if not self.early:
            super().load_weights(lanes, step)
            return
        self.early_weights = self.sch.cache_read(lanes, read_buffer_index=self.match.weight, storage_scope="local")
        early_loads.load_early(self.sch, self.early_weights, self.block_loop, self.config)

    def load_vector(self, lanes: Any) -> None:
        """The prologue, in the block's own loop, before the product."""
        *sums, vector = self.prologue
        self._compute_vector(vector)
        for block in reversed(sums):
            self._reduce(block)

    def _place(self, block: Any) -> list[Any]:
        """A block of the prologue, its result in shared memory, once for the whole thread block; returns its loops."""
        self.sch.set_scope(block, 0, "shared")
        self.sch.compute_at(block, self.block_loop, preserve_unit_loops=True)
        return self.sch.get_loops(block)[self.outer + 1 :]

    def _bind(self, loop: Any, wide: int = 1) -> tuple[Any, Any]:
        """Share a loop out to all threads; returns the loops of a thread: in x, and over `wide` neighbours."""
        sch, c = self.sch, self.config
        y, x = (c.ts, c.tr) if c.s_axis == "y" else (c.tr, c.ts)
        _, ty, tx, inner = sch.split(loop, factors=[None, y, x, wide], preserve_unit_iters=True)
        sch.bind(ty, "threadIdx.y")
        sch.bind(tx, "threadIdx.x")
        return tx, inner

    def _reduce(self, block: Any) -> None:
        sch = self.sch
        sizes = {"S": 1, "R": 1}
        for axis in sch.get(block).iter_vars:
            sizes["R" if axis.iter_type == tirx.IterVar.CommReduce else "S"] *= int(axis.dom.extent)
        if sizes["R"] <= FEW:  # a sum in a register of one thread, then to the others
            copy = sch.cache_write(block, 0, "local")
            tx, _ = self._bind(sch.fuse(*self._place(copy)))
            sch.compute_at(block, tx, preserve_unit_loops=True)
            return
        loops = self._place(block)
        kinds = [axis.iter_type for axis in sch.get(block).iter_vars]
        self._bind(sch.fuse(*(l for l, kind in zip(loops, kinds, strict=True) if kind == tirx.IterVar.CommReduce)))

    def _compute_vector(self, block: Any) -> None:
        sch, c = self.sch, self.config
        loop = sch.fuse(*self._place(block))
        whole = largest_factor(int(sch.get(loop).extent), tuple(c.threads * f for f in (1, 2, 4, 8)))
        _, lanes = self._bind(loop, max(min(whole // c.threads, c.vec_shared), 1))
        sch.vectorize(lanes)
        self.vector_cache = block
