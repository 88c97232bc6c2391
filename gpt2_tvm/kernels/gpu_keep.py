"""Keep one branch of a verified tree: move its keys and values to the front.

A thread owns one element of the head for all the slots, so nothing waits for another thread. It loads every element
before it stores one: the loads overlap in time, and no source can be overwritten before it is read.
"""

# mypy: disable-error-code="valid-type,misc"
from __future__ import annotations

from functools import cache

from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from gpt2_tvm.kernels.gpu_prefill_attention import steps
from gpt2_tvm.kernels.spec import AttentionSpec, GpuLimits

THREADS = 128


@cache
def keep_branch(spec: AttentionSpec, limits: GpuLimits, batch: int, width: int) -> PrimFunc:
    """``(cache [2, B, H, S, D], positions [B], path [B, width], lengths [B])``, all but cache int32, cache in place.

    Slot ``positions[b] + path[b, j]`` moves to ``positions[b] + j`` for ``j < lengths[b]``: keys and values, all
    heads. path increases strictly, from the root down. A slot outside ``[0, S)`` is neither read nor written.
    """
    n_head, head_dim, capacity, dtype = spec.n_head, spec.head_dim, spec.capacity, spec.dtype
    threads = min(THREADS, limits.threads_per_block)
    elements = 2 * spec.width

    # fmt: off
    @T.prim_func(private=True, s_tir=True)
    def keep_branch(
        cache: T.Buffer((2, batch, n_head, capacity, head_dim), dtype),
        positions: T.Buffer((batch,), "int32"),
        path: T.Buffer((batch, width), "int32"),
        lengths: T.Buffer((batch,), "int32"),
    ):
        T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True, "op_pattern": 8})
        source = T.sblock_alloc_buffer((1,), "int32", scope="local")
        held = T.sblock_alloc_buffer((width,), dtype, scope="local")
        for bx in T.thread_binding(steps(elements, threads), thread="blockIdx.x"):
            for seq in T.thread_binding(batch, thread="blockIdx.y"):
                for tid in T.thread_binding(threads, thread="threadIdx.x"):
                    e: T.let[T.int32] = bx * threads + tid
                    part: T.let[T.int32] = e // (n_head * head_dim)
                    head: T.let[T.int32] = e // head_dim % n_head
                    d: T.let[T.int32] = e % head_dim
                    first: T.let[T.int32] = positions[seq]
                    if e < elements and first >= 0 and first < capacity:
                        for j in T.unroll(width):
                            # kept inside the cache, so that no load waits for a condition
                            source[0] = T.min(T.max(path[seq, j], 0), capacity - 1 - first)
                            held[j] = cache[part, seq, head, first + source[0], d]
                        for j in T.unroll(width):
                            # The smaller first: TVM moves terms across `<`, where a large sum may overflow.
                            source[0] = T.min(path[seq, j], capacity)
                            if j < lengths[seq] and j < capacity - first and 0 <= source[0] < capacity - first:
                                cache[part, seq, head, first + j, d] = held[j]
    # fmt: on
    return keep_branch
