"""A residual add and the LayerNorm of its result as one kernel: what `passes/norm_residual.py` makes, on GPUs.

DLight's rules take a chain with one result; this function has two, the sum and its normalised rows, so they would leave
it to Fallback, a kernel a stage.

    for row:                     # blockIdx.x
        the sum into shared memory, and from there to its place
        each reduction over the row: all threads
        the normalised row
"""

from __future__ import annotations

from typing import Any

from tvm import s_tir, tirx
from tvm.s_tir.dlight import analysis
from tvm.s_tir.dlight.analysis import get_max_shared_memory_per_block
from tvm.target import Target

THREADS = 256


def schedule_add_norm(func: tirx.PrimFunc, target: Target) -> s_tir.Schedule | None:
    """The schedule; None for a function of another form, or rows that do not fit a block's shared memory."""
    sch = s_tir.Schedule(func)
    infos = analysis.normalize_prim_func(sch)
    if not infos or not infos[0].is_injective() or not infos[-1].is_injective():
        return None
    sums = [info.block_rv for info in infos if info.is_reduction()]
    if not sums or any(len(info.iters) > 3 or not (info.is_injective() or info.is_reduction()) for info in infos):
        return None
    outputs = [p for p in func.params if any(sch.get(i.block_rv).writes[0].source.same_as(p) for i in infos)]
    add = next((i for i in infos if outputs and sch.get(i.block_rv).writes[0].source.same_as(outputs[0])), None)
    if len(outputs) != 2 or add is None or add is infos[-1] or not add.is_injective():
        return None
    elements = sch.get(sch.get_loops(infos[-1].block_rv)[-1]).extent
    if not isinstance(elements, tirx.IntImm):
        return None
    if 4 * (int(elements) + 3 * THREADS) > get_max_shared_memory_per_block(target):
        return None
    last = infos[-1].block_rv
    for info in infos[:-1]:  # casts before the add, a mean after a sum
        if info.is_injective() and info is not add:
            sch.compute_inline(info.block_rv)
    threads = min(THREADS, int(target.attrs["max_num_threads"]))
    copy = sch.cache_write(add.block_rv, 0, "shared", consumer_blocks=[*sums, last])
    *rows, column = sch.get_loops(add.block_rv)
    row = sch.fuse(*rows) if rows else sch.add_unit_loop(column)
    sch.bind(row, "blockIdx.x")
    _bind(sch, column, threads)
    for block in (copy, *sums, last):
        sch.reverse_compute_at(block, row, preserve_unit_loops=True)
        _bind(sch, sch.get_loops(block)[-1], threads)
    for block in sums:
        sch.set_scope(block, 0, "shared")
    return sch


def _bind(sch: s_tir.Schedule, loop: Any, threads: int) -> None:
    _, tx = sch.split(loop, factors=[None, threads], preserve_unit_iters=True)
    sch.bind(tx, "threadIdx.x")
