"""Write this call's keys and values into the cache.

One thread moves one run of elements; k and v lie side by side in a row of qkv, so reads are contiguous over the
whole row and writes are contiguous within a head. One block a token at least, more where a row is wide.
"""

# mypy: disable-error-code="valid-type,misc"
from __future__ import annotations

from functools import cache
from typing import Any

from tvm import tirx
from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from gpt2_tvm.kernels.spec import AttentionSpec, GpuLimits

THREADS = 256


@cache
def kv_append(spec: AttentionSpec, limits: GpuLimits, batch: int | None = None, rows: int | None = None) -> PrimFunc:
    """``(qkv [b, n, 3HD], positions [b], lengths [b], cache [2, b, H, S, D])``, cache in place (argument 3).

    Row t of sequence i goes to slot ``positions[i] + t`` when ``t < lengths[i]``. A slot outside ``[0, S)`` is
    not written, whatever positions and lengths hold. batch, rows: fix b or n; symbolic where not given.
    """
    n_head, head_dim, capacity, dtype, width = spec.n_head, spec.head_dim, spec.capacity, spec.dtype, spec.width
    lanes = limits.lanes(head_dim)
    threads = min(THREADS, limits.threads_per_block)
    runs = 2 * width // lanes  # of one row: its keys, then its values
    blocks = -(-runs // threads)
    b: Any = tirx.Var("b", "int64") if batch is None else batch
    n: Any = tirx.Var("n", "int64") if rows is None else rows

    @T.prim_func(private=True, s_tir=True)
    def kv_append(qkv_h: T.handle, positions_h: T.handle, lengths_h: T.handle, cache_h: T.handle):
        T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True, "op_pattern": 8})
        qkv = T.match_buffer(qkv_h, (b, n, 3 * width), dtype)
        positions = T.match_buffer(positions_h, (b,), "int32")
        lengths = T.match_buffer(lengths_h, (b,), "int32")
        slots = T.match_buffer(cache_h, (2, b, n_head, capacity, head_dim), dtype)
        for t in T.thread_binding(T.Cast("int32", n), thread="blockIdx.x"):
            for by in T.thread_binding(T.Cast("int32", b) * blocks, thread="blockIdx.y"):
                for tx in T.thread_binding(threads, thread="threadIdx.x"):
                    seq: T.let[T.int32] = by // blocks
                    # Clamped first: TVM turns `first < capacity - t` into `first + t < capacity`, which may overflow.
                    first: T.let[T.int32] = T.max(T.min(positions[seq], capacity), -1)
                    e: T.let[T.int32] = (by % blocks * threads + tx) * lanes
                    if first >= 0 and first + t < capacity and t < lengths[seq] and e < 2 * width:
                        for v in T.vectorized(lanes):
                            slots[e // width, seq, e % width // head_dim, first + t, e % head_dim + v] = qkv[
                                seq, t, width + e + v
                            ]

    return kv_append
