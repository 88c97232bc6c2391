"""Attention for CPUs: one TIR kernel for prefill, decode and verify, heads and rows in parallel.

It is two kernels in one. Few rows (decode, verify) read each key once and are bound by that: vectors run over the head,
below. Many rows (prefill) are bound by arithmetic: vectors run over the rows, `cpu_row_attention.py`.

Layouts: ``qkv`` [b, n, 3*H*D] holds q | k | v; ``cache`` [2, b, H, S, D] holds keys (0) and values (1), the rows of
this call already appended; ``positions`` [b] int32 counts the tokens cached before this call, ``lengths`` [b] int32 the
valid rows of this call (the rest is right padding, answered with zeros).

The softmax is the online one (Milakov and Gimelshein 2018, "Online normalizer calculation for softmax", section 3; Dao
et al. 2022, "FlashAttention", algorithm 1): one pass over the keys in blocks with a running maximum and sum, never a
matrix of scores.
"""

from __future__ import annotations

from functools import cache

from tvm import tirx
from tvm.script import tirx as T

from gpt2_tvm.kernels.cpu_row_attention import LEAST_SHARE, row_attention, row_block
from gpt2_tvm.kernels.math import exp
from gpt2_tvm.kernels.spec import AttentionSpec

KEY_BLOCK = 16  # keys scored together: one maximum and one rescale of the accumulator for each block
ROW_BLOCK = 16  # query rows of one task: enough work to be worth a hand-over to another thread
# Multiply-adds under which waking a second thread costs more than it saves, as in `schedules/cpu_gemv.py`
PARALLEL_WORK = 65536
MASKED = -1e30  # finite, so that a block without a visible key gives exp(0) * 0 and no NaN


def vector_lanes(head_dim: int, simd_bits: int) -> int:
    """The widest power of two that divides the head and fits one float32 register: 16, 8, 4, 2 or 1."""
    lanes = max(1, simd_bits // 32)
    while head_dim % lanes:
        lanes //= 2
    return lanes


@T.inline
def _fold_sum(values, lanes):
    """values[0] := the sum of 2 * lanes values, by halving: log2 vector additions."""
    for v in T.vectorized(lanes):
        values[v] = values[v] + values[v + lanes]


@T.inline
def _fold_max(values, lanes):
    for v in T.vectorized(lanes):
        values[v] = T.max(values[v], values[v + lanes])


@cache
def attention(spec: AttentionSpec, simd_bits: int, tree: bool = False) -> tirx.PrimFunc:
    """(qkv, positions, lengths, cache[, tree]) -> out [b, n, H*D].

    Row t of sequence i attends to the slots 0..positions[i]+t; with ``tree`` ([b, n] int32) to the slots below
    positions[i] and to slot positions[i]+j where bit j of tree[i, t] is set (n <= 32).
    """
    H, D, S, dtype, scale = spec.n_head, spec.head_dim, spec.capacity, spec.dtype, spec.scale
    lanes = vector_lanes(D, simd_bits)
    kb = KEY_BLOCK
    many = row_attention(spec, simd_bits)
    few = row_block(simd_bits) // LEAST_SHARE

    def f32(x: tirx.Expr) -> tirx.Expr:
        return x if dtype == "float32" else T.Cast("float32", x)

    def sees(slot: tirx.Expr, pos: tirx.Expr, mask_bits: tirx.Expr, t: tirx.Expr) -> tirx.Expr:
        """Whether row t may look at a slot of the cache (slots past the visible ones are cut by the caller)."""
        if not tree:
            return slot <= pos + t
        row = T.Cast("int32", T.min(T.max(slot - pos, T.int64(0)), T.int64(31)))
        return T.Or(slot < pos, T.bitwise_and(T.shift_right(mask_bits, row), 1) == 1)

    # fmt: off
    @T.inline
    def body(kind, qkv, positions, lengths, cache, mask, out, b, n):
        for task in kind(b * H * ((n + ROW_BLOCK - 1) // ROW_BLOCK)):
            q = T.alloc_buffer((D,), "float32", scope="local")
            acc = T.alloc_buffer((D,), "float32", scope="local")
            part = T.alloc_buffer((lanes,), "float32", scope="local")
            s = T.alloc_buffer((kb,), "float32", scope="local")
            fold = T.alloc_buffer((kb,), "float32", scope="local")
            run = T.alloc_buffer((4,), "float32", scope="local")  # maximum, sum, new maximum, rescale
            i = T.bind(task % (b * H) // H)
            h = T.bind(task % H)
            first_row = T.bind(task // (b * H) * ROW_BLOCK)
            pos = T.bind(T.min(T.max(T.Cast("int64", positions[i]), T.int64(0)), T.int64(S)))
            valid_rows = T.bind(T.min(T.Cast("int64", lengths[i]), n))
            for r in T.serial(ROW_BLOCK):
                if first_row + r < n:
                    t = T.bind(first_row + r)
                    for dv in T.vectorized(D):
                        acc[dv] = T.float32(0)
                    run[1] = T.float32(0)
                    if t < valid_rows:
                        run[0] = T.float32(MASKED)
                        for dv in T.vectorized(D):
                            q[dv] = f32(qkv[i, t, h * D + dv]) * T.float32(scale)
                        # a row of a tree may see any row of this call, a row of a chain only those before it
                        last = T.bind(pos + valid_rows if tree else pos + t + 1)
                        visible = T.bind(T.min(last, T.int64(S)))
                        bits = T.bind(mask[i, t] if tree else T.int32(0))
                        for block in T.serial((visible + kb - 1) // kb):
                            for k in T.serial(kb):
                                slot = T.bind(T.min(block * kb + k, T.int64(S - 1)))
                                for v in T.vectorized(lanes):
                                    part[v] = q[v] * f32(cache[0, i, h, slot, v])
                                for w in T.unroll(D // lanes - 1):
                                    for v in T.vectorized(lanes):
                                        part[v] = part[v] + q[(w + 1) * lanes + v] * f32(
                                            cache[0, i, h, slot, (w + 1) * lanes + v])
                                if lanes > 8:
                                    _fold_sum(part, 8)
                                if lanes > 4:
                                    _fold_sum(part, 4)
                                if lanes > 2:
                                    _fold_sum(part, 2)
                                if lanes > 1:
                                    _fold_sum(part, 1)
                                s[k] = T.Select(
                                    T.And(block * kb + k < visible, sees(block * kb + k, pos, bits, t)),
                                    part[0], T.float32(MASKED))
                            for v in T.vectorized(kb):
                                fold[v] = s[v]
                            _fold_max(fold, 8)
                            _fold_max(fold, 4)
                            _fold_max(fold, 2)
                            _fold_max(fold, 1)
                            run[2] = T.max(run[0], fold[0])
                            run[3] = exp(run[0] - run[2])
                            run[0] = run[2]
                            for v in T.vectorized(kb):
                                s[v] = T.Select(s[v] > T.float32(MASKED), exp(s[v] - run[2]), T.float32(0))
                            for v in T.vectorized(kb):
                                fold[v] = s[v]
                            _fold_sum(fold, 8)
                            _fold_sum(fold, 4)
                            _fold_sum(fold, 2)
                            _fold_sum(fold, 1)
                            run[1] = run[1] * run[3] + fold[0]
                            for dv in T.vectorized(D):
                                acc[dv] = acc[dv] * run[3]
                            for k in T.serial(T.min(T.int64(kb), visible - block * kb)):
                                for dv in T.vectorized(D):
                                    acc[dv] = acc[dv] + s[k] * f32(cache[1, i, h, block * kb + k, dv])
                    run[2] = T.Select(run[1] > T.float32(0), T.float32(1) / run[1], T.float32(0))
                    for dv in T.vectorized(D):
                        out[i, t, h * D + dv] = T.Cast(dtype, acc[dv] * run[2])

    if tree:
        @T.prim_func(private=True, check_well_formed=False)
        def tree_attention(a: T.handle, p: T.handle, le: T.handle, c: T.handle, tr: T.handle, o: T.handle):
            T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True, "op_pattern": 8})
            b, n = T.int64(), T.int64()
            qkv = T.match_buffer(a, (b, n, 3 * H * D), dtype)
            positions = T.match_buffer(p, (b,), "int32")
            lengths = T.match_buffer(le, (b,), "int32")
            cache = T.match_buffer(c, (2, b, H, S, D), dtype)
            mask = T.match_buffer(tr, (b, n), "int32")
            out = T.match_buffer(o, (b, n, H * D), dtype)
            body(T.parallel, qkv, positions, lengths, cache, mask, out, b, n)

        return tree_attention

    @T.prim_func(private=True, check_well_formed=False)
    def chain_attention(a: T.handle, p: T.handle, le: T.handle, c: T.handle, o: T.handle):
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True, "op_pattern": 8})
        b, n = T.int64(), T.int64()
        qkv = T.match_buffer(a, (b, n, 3 * H * D), dtype)
        positions = T.match_buffer(p, (b,), "int32")
        lengths = T.match_buffer(le, (b,), "int32")
        cache = T.match_buffer(c, (2, b, H, S, D), dtype)
        out = T.match_buffer(o, (b, n, H * D), dtype)
        if n <= few:
            longest = T.alloc_buffer((1,), "int64", scope="local")
            longest[0] = T.int64(0)
            for i in T.serial(b):
                longest[0] = T.max(longest[0], T.Cast("int64", positions[i]) + n)
            if 2 * b * n * H * D * longest[0] < PARALLEL_WORK:
                body(T.serial, qkv, positions, lengths, cache, positions, out, b, n)
            else:
                body(T.parallel, qkv, positions, lengths, cache, positions, out, b, n)
        else:
            many(qkv, positions, lengths, cache, out, b, n)
    # fmt: on

    return chain_attention
