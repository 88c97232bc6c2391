"""KV append and branch keeping for CPUs. Layouts as in `cpu_attention.py`."""

from __future__ import annotations

from functools import cache

from tvm import tirx
from tvm.script import tirx as T

from gpt2_tvm.kernels.spec import AttentionSpec


@cache
def kv_append(spec: AttentionSpec) -> tirx.PrimFunc:
    """(qkv, positions, lengths, cache in place): row t < lengths[b] goes to slot positions[b] + t, never outside the
    capacity."""
    H, D, S, dtype = spec.n_head, spec.head_dim, spec.capacity, spec.dtype

    # fmt: off
    @T.prim_func(private=True, check_well_formed=False)
    def kv_append_(a: T.handle, p: T.handle, le: T.handle, c: T.handle):
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True, "op_pattern": 8})
        b, n = T.int64(), T.int64()
        qkv = T.match_buffer(a, (b, n, 3 * H * D), dtype)
        positions = T.match_buffer(p, (b,), "int32")
        lengths = T.match_buffer(le, (b,), "int32")
        cache = T.match_buffer(c, (2, b, H, S, D), dtype)
        for i in T.serial(b):
            for t in T.serial(T.min(T.Cast("int64", lengths[i]), n)):
                slot = T.bind(T.Cast("int64", positions[i]) + t)
                if T.And(slot >= 0, slot < S):
                    for h in T.serial(H):
                        for d in T.vectorized(D):
                            cache[0, i, h, slot, d] = qkv[i, t, (H + h) * D + d]
                        for d in T.vectorized(D):
                            cache[1, i, h, slot, d] = qkv[i, t, (2 * H + h) * D + d]
    # fmt: on
    return kv_append_


@cache
def keep_branch(spec: AttentionSpec, batch: int, width: int) -> tirx.PrimFunc:
    """(cache in place, positions [B], path [B, width], lengths [B]): slot positions[b] + path[b, j] moves to
    positions[b] + j.

    path[b] increases strictly, so path[b, j] >= j and moving in order never overwrites a slot that is still needed.
    """
    H, D, S, dtype = spec.n_head, spec.head_dim, spec.capacity, spec.dtype

    # fmt: off
    @T.prim_func(private=True, check_well_formed=False)
    def keep_branch_(
        cache: T.Buffer((2, batch, H, S, D), dtype),
        positions: T.Buffer((batch,), "int32"),
        path: T.Buffer((batch, width), "int32"),
        lengths: T.Buffer((batch,), "int32"),
    ):
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True, "op_pattern": 8})
        for kv in T.serial(2):
            for i in T.serial(batch):
                for j in T.serial(T.min(lengths[i], width)):
                    source = T.bind(T.min(T.max(positions[i] + path[i, j], 0), S - 1))
                    target = T.bind(T.min(T.max(positions[i] + j, 0), S - 1))
                    if source != target:
                        for h in T.serial(H):
                            for d in T.vectorized(D):
                                cache[kv, i, h, target, d] = cache[kv, i, h, source, d]
    # fmt: on
    return keep_branch_
