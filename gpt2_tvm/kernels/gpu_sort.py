"""Sorting a row of probabilities on a GPU, falling: each element's place is the number of those that come before it.

V^2 comparisons, but in one launch, in any number of blocks, with no scratch memory: for a vocabulary of 50257 that is
2.5e9, some milliseconds; sorting networks of a single launch have one block to work with, and TVM's own sort has grids
that WebGPU refuses (blockIdx.z). Ties go to the lower index. NaN comes last: floats are compared as in `gpu_sampling`.
"""

from __future__ import annotations

from functools import cache

from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from gpt2_tvm.kernels.gpu_sampling import in_order

THREADS = 256


@cache
def sort_falling() -> PrimFunc:
    """``(values [b, V] float32, sorted [b, V], order [b, V] int32)``: sorted[i, j] = values[i, order[i, j]]."""

    # fmt: off
    @T.prim_func(private=True, s_tir=True)
    def sort_falling(at_values: T.handle, at_sorted: T.handle, at_order: T.handle):
        T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True, "op_pattern": 8})
        b, V = T.int32(), T.int32()
        values = T.match_buffer(at_values, (b, V), "float32")
        falling = T.match_buffer(at_sorted, (b, V), "float32")
        order = T.match_buffer(at_order, (b, V), "int32")
        for i in T.thread_binding(b, thread="blockIdx.y"):
            for block in T.thread_binding((V + THREADS - 1) // THREADS, thread="blockIdx.x"):
                for thread in T.thread_binding(THREADS, thread="threadIdx.x"):
                    tile = T.sblock_alloc_buffer((THREADS,), "int32", scope="shared")
                    mine = T.sblock_alloc_buffer((3,), "int32", scope="local")  # key, place, another's key
                    mine[0] = in_order(T.reinterpret("int32", values[i, T.min(block * THREADS + thread, V - 1)]))
                    mine[1] = 0
                    for part in T.serial((V + THREADS - 1) // THREADS):
                        T.tvm_storage_sync("shared")
                        tile[thread] = in_order(
                            T.reinterpret("int32", values[i, T.min(part * THREADS + thread, V - 1)])
                        )
                        T.tvm_storage_sync("shared")
                        for j in T.serial(THREADS):
                            mine[2] = tile[j]
                            if part * THREADS + j < V and (
                                mine[2] > mine[0]
                                or (mine[2] == mine[0] and part * THREADS + j < block * THREADS + thread)
                            ):
                                mine[1] = mine[1] + 1
                    if block * THREADS + thread < V:
                        falling[i, mine[1]] = values[i, block * THREADS + thread]
                        order[i, mine[1]] = block * THREADS + thread
    # fmt: on
    return sort_falling
