"""Weights on their way before the vector that they are multiplied with is known.

Each block of a `norm-gemv` product first computes its vector: a read of x, two sums across the threads with two
barriers each, a division. Then it asks for its weights, and waits again, as long as memory takes. The weights do not
depend on x: here a thread asks for all of its share first, into registers, and finds it there when the vector is ready.

Two things are needed for that beside the order of the loops:

- the share is one dense array a thread. In the weight's own coordinates it is a few pieces far apart, and TVM would
  allocate what lies between; so the array has the axes (output, step, thread along r, neighbours), of which a thread
  has one point of the third.
- the compiler must leave the loads where they stand. `ptxas` moves loads of memory that is constant (LDG.CONSTANT, from
  `__restrict__`) behind the barriers, next to where they are used, to save registers. Loads written as assembly are
  not constant, and no barrier is passed by them; weights are read once, so they take no room in the first-level cache.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import tvm_ffi
from tvm import ir, s_tir, sym, tirx
from tvm.backend.cuda.op import cuda_func_call
from tvm.s_tir.dlight.base import get_bytes

from gpt2_tvm.kernels.math import rewrite
from gpt2_tvm.schedules.gemv_config import LOAD_BYTES
from gpt2_tvm.schedules.launch_bounds import LONG

if TYPE_CHECKING:
    from tvm.target import Target

    from gpt2_tvm.schedules.gemv_config import GemvConfig
    from gpt2_tvm.schedules.gemv_match import GemvMatch

FUNCTION = "gpt2_tvm_load_16_bytes"
SOURCE = f"""
// gpt2_tvm: 16 bytes of a weight to registers, before any barrier that follows
__forceinline__ __device__ void {FUNCTION}(void *to, const void *from) {{
  uint4 value;
  asm volatile("ld.global.L1::no_allocate.v4.u32 {{%0, %1, %2, %3}}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w) : "l"(from));
  *(uint4 *)to = value;
}}
"""
# Of weights a thread, for one row: 104 of the 128 registers that `launch_bounds.LONG` leaves to blocks of 512 threads
# or fewer. Several rows need registers for their sums, and larger blocks have fewer to give.
MOST_BYTES, FEW_BYTES = 416, 128


def fits(sch: s_tir.Schedule, match: GemvMatch, config: GemvConfig, target: Target) -> bool:
    """Whether the weights of a thread can be loaded early: whole tiles of plain weights, not too many, on CUDA."""
    dtype = str(sch.get(match.block).reads[match.weight].source.dtype)
    if dtype not in ("float16", "float32") or match.weight_dtype(sch) != dtype:  # in words, or not in floating point
        return False
    if str(target.kind.name) != "cuda" or match.outputs is None or match.reduced is None:
        return False
    if config.vec_load != LOAD_BYTES or config.tile_r * get_bytes(dtype) % LOAD_BYTES:
        return False
    if match.outputs % (config.ts * config.tile_s) or match.reduced % (config.tr * config.tile_r):
        return False
    weights = config.weight_bytes(match.reduced, get_bytes(dtype))
    return weights <= (MOST_BYTES if match.rows == 1 and config.threads <= LONG else FEW_BYTES)


def load_early(sch: s_tir.Schedule, cache: Any, block_loop: Any, config: GemvConfig) -> None:
    """Place `cache`, which copies a weight [N, K] to registers, in the loop over blocks, before what is there.

    Its buffer becomes [N, steps, TR, TILE_R]; `finish` must follow when the schedule is complete.
    """
    c = config
    lanes = LOAD_BYTES // get_bytes(sch.get(cache).reads[0].source.dtype)

    def cut(s: Any, r: Any) -> tuple[Any, ...]:
        return s, r // (c.tr * c.tile_r), r // c.tile_r % c.tr, r % c.tile_r

    sch.transform_layout(cache, ("write", 0), cut)
    sch.transform_block_layout(cache, cut)
    sch.compute_at(cache, block_loop, preserve_unit_loops=True)
    s, steps, along, neighbours = sch.get_loops(cache)[-4:]
    across, tile = sch.split(s, factors=[c.ts, c.tile_s], preserve_unit_iters=True)
    loads, lane = sch.split(neighbours, factors=[None, lanes], preserve_unit_iters=True)
    sch.reorder(across, along, steps, tile, loads, lane)
    sch.bind(across, c.s_tag)
    sch.bind(along, c.r_tag)
    sch.vectorize(lane)
    # an array with an index that is not known when it is compiled cannot live in registers
    sch.annotate(steps, "pragma_auto_unroll_max_step", c.unroll)
    sch.annotate(steps, "pragma_unroll_explicit", 1)


def finish(func: tirx.PrimFunc, buffer: Any) -> tirx.PrimFunc:
    """`func` with plain indices for `buffer`, the registers, and with its loads as assembly.

    The schedule leaves (256 a + 8 b + c) // 256 where b < 32 and c < 8, from which TVM cannot tell that a thread reads
    one point of an axis.
    """
    analyzer = sym.Analyzer()

    def domains(block: s_tir.SBlock) -> None:
        for axis in block.iter_vars:
            analyzer.bind(axis.var, axis.dom)

    def simple(indices: Any) -> list[Any]:
        return [analyzer.simplify(index) for index in indices]

    def load(node: ir.TensorLoad) -> Any:
        return tirx.BufferLoad(buffer, simple(node.indices)) if node.source.same_as(buffer) else node

    def store(node: tirx.BufferStore) -> Any:
        return tirx.BufferStore(buffer, node.value, simple(node.indices)) if node.buffer.same_as(buffer) else node

    def region(node: ir.TensorRegion) -> Any:
        if not node.source.same_as(buffer):
            return node
        ranges = [ir.Range.from_min_extent(analyzer.simplify(r.min), r.extent) for r in node.region]
        return tirx.BufferRegion(buffer, ranges)

    def vector(node: tirx.For) -> Any:
        realize = node.body
        if node.kind != tirx.ForKind.VECTORIZED or not isinstance(realize, s_tir.SBlockRealize):
            return node
        block, copy = realize.block, realize.block.body
        if not isinstance(copy, tirx.BufferStore) or not copy.buffer.same_as(buffer):
            return node
        to, source = (tirx.address_of(access) for access in (tirx.BufferLoad(buffer, copy.indices), copy.value))
        call = tirx.Evaluate(cuda_func_call(FUNCTION, to, source, source_code=SOURCE))
        whole = s_tir.SBlock(block.iter_vars, block.reads, block.writes, block.name_hint, call)
        first = [rewrite(value, {node.loop_var: tirx.const(0, node.loop_var.ty)}) for value in realize.iter_values]
        return s_tir.SBlockRealize(first, realize.predicate, whole)

    tvm_ffi.structural_walk(func.body, [(s_tir.SBlock, domains)])
    plain = [(ir.TensorLoad, load), (tirx.BufferStore, store), (ir.TensorRegion, region)]
    body = tvm_ffi.structural_map(func.body, plain)
    return func.with_body(tvm_ffi.structural_map(body, [(tirx.For, vector)]))
