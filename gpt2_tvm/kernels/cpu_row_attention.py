"""Attention of many rows for CPUs (prefill), as products of blocks whose vectors run over rows.

`cpu_attention.py` reads a key and adds up its products with a row across the lanes of a vector; with many rows those
sums are most of the work. Here a vector holds one channel of many rows, and nothing is ever added up across lanes:

    for head, for block of R rows, in parallel:            # a head's keys stay in L2 from block to block
        qT [D, R]: the rows, transposed and scaled         # once for all keys
        for block of KEYS slots up to the last row's own:
            sT [KEYS, R] = K qT                            # MR slots x 2 vectors of sums in registers
            mask, maximum, exponentials, sums              # a vector operation for each slot
            oT [D, R] = oT * rescale + V^T sT              # MR channels x 2 vectors of sums in registers
        out: oT over the sums, transposed back

The order of the loops is FlashAttention's (Dao et al. 2022, algorithm 1); both products are the micro-kernel of a
packed matrix product (`schedules/cpu_matmul.py`), with rows where that one has columns.
"""

# TVMScript is parsed by TVM, not executed: its annotations mean nothing to a type checker.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any

from tvm import tirx
from tvm.script import tirx as T

from gpt2_tvm.kernels.math import exp
from gpt2_tvm.kernels.spec import AttentionSpec

KEYS = 32  # slots scored together: their keys, values and scores stay in L1
MASKED = -1e30  # finite: exp(MASKED - maximum) is 0, as slot 0 is seen by every row and makes the first maximum
LEAST_SHARE = 5  # with a fifth of its rows a block costs as much as they do one by one


def row_block(simd_bits: int) -> int:
    """Rows of one task: two vectors of float32."""
    return 2 * max(1, simd_bits // 32)


def _sums(simd_bits: int) -> int:
    """Slots, or channels, whose sums over two vectors of rows are in registers at once: enough to hide the latency of
    a multiply-add, in half of AVX-512's 32 registers and half of the others' 16."""
    return 8 if simd_bits >= 512 else 4


def row_attention(spec: AttentionSpec, simd_bits: int) -> Any:
    """A TVMScript inline function (qkv, positions, lengths, cache, out, b, n), with the buffers of `cpu_attention`."""
    H, D, S, dtype, scale = spec.n_head, spec.head_dim, spec.capacity, spec.dtype, spec.scale
    R = row_block(simd_bits)
    L = R // 2
    MR = _sums(simd_bits)
    DR = next(m for m in range(MR, 0, -1) if D % m == 0)
    wide = dtype != "float32"

    def f32(x: tirx.Expr) -> tirx.Expr:
        return T.Cast("float32", x) if wide else x

    # fmt: off
    @T.inline
    def transpose_in(qkv, qt, ot, top, total, i, h, first, n):
        for r in T.serial(R):
            t = T.bind(T.min(first + r, n - 1))  # the last row stands in for those past it
            for d in T.serial(D):
                qt[d, r] = f32(qkv[i, t, h * D + d]) * T.float32(scale)
        for d in T.serial(D):
            for r in T.vectorized(R):
                ot[d, r] = T.float32(0)
        for r in T.vectorized(R):
            top[r] = T.float32(MASKED)
            total[r] = T.float32(0)

    @T.inline
    def score(cache, qt, st, acc0, acc1, i, h, first_slot, count, row):
        """st[k, r] := key k . row r, or MASKED where the row does not see it; `count` keys, rounded up to MR."""
        for group in T.serial((count + MR - 1) // MR):
            for m in T.unroll(MR):
                for lane in T.vectorized(L):
                    acc0[m, lane] = T.float32(0)
                for lane in T.vectorized(L):
                    acc1[m, lane] = T.float32(0)
            for d in T.serial(D):
                for m in T.unroll(MR):
                    for lane in T.vectorized(L):
                        acc0[m, lane] = acc0[m, lane] + f32(
                            cache[0, i, h, T.min(first_slot + group * MR + m, T.int64(S - 1)), d]) * qt[d, lane]
                    for lane in T.vectorized(L):
                        acc1[m, lane] = acc1[m, lane] + f32(
                            cache[0, i, h, T.min(first_slot + group * MR + m, T.int64(S - 1)), d]) * qt[d, L + lane]
            for m in T.unroll(MR):
                for lane in T.vectorized(L):
                    st[group * MR + m, lane] = T.Select(
                        first_slot + group * MR + m <= row + lane, acc0[m, lane], T.float32(MASKED))
                for lane in T.vectorized(L):
                    st[group * MR + m, L + lane] = T.Select(
                        first_slot + group * MR + m <= row + L + lane, acc1[m, lane], T.float32(MASKED))

    @T.inline
    def weigh(st, top, total, rescale, count):
        """Scores to weights: the online softmax, a vector of rows at a time."""
        for r in T.vectorized(R):
            rescale[r] = top[r]
        for k in T.serial(count):
            for r in T.vectorized(R):
                top[r] = T.max(top[r], st[k, r])
        for r in T.vectorized(R):
            rescale[r] = exp(rescale[r] - top[r])
        for r in T.vectorized(R):
            total[r] = total[r] * rescale[r]
        for k in T.serial(count):
            for r in T.vectorized(R):
                st[k, r] = exp(st[k, r] - top[r])
            for r in T.vectorized(R):
                total[r] = total[r] + st[k, r]

    @T.inline
    def mix(cache, st, ot, rescale, acc0, acc1, i, h, first_slot, count):
        """ot[d, r] := ot[d, r] * rescale[r] + the values' channel d, weighted."""
        for group in T.serial(D // DR):
            for m in T.unroll(DR):
                for lane in T.vectorized(L):
                    acc0[m, lane] = ot[group * DR + m, lane] * rescale[lane]
                for lane in T.vectorized(L):
                    acc1[m, lane] = ot[group * DR + m, L + lane] * rescale[L + lane]
            for k in T.serial(count):
                for m in T.unroll(DR):
                    for lane in T.vectorized(L):
                        acc0[m, lane] = acc0[m, lane] + f32(
                            cache[1, i, h, first_slot + k, group * DR + m]) * st[k, lane]
                    for lane in T.vectorized(L):
                        acc1[m, lane] = acc1[m, lane] + f32(
                            cache[1, i, h, first_slot + k, group * DR + m]) * st[k, L + lane]
            for m in T.unroll(DR):
                for lane in T.vectorized(L):
                    ot[group * DR + m, lane] = acc0[m, lane]
                for lane in T.vectorized(L):
                    ot[group * DR + m, L + lane] = acc1[m, lane]

    @T.inline
    def body(qkv, positions, lengths, cache, out, b, n):
        # row blocks run fastest: threads get whole heads, and so as many late rows, which see more, as early ones
        for task in T.parallel(b * H * ((n + R - 1) // R)):
            qt = T.alloc_buffer((D, R), "float32", scope="global")
            ot = T.alloc_buffer((D, R), "float32", scope="global")
            st = T.alloc_buffer((KEYS, R), "float32", scope="global")
            top = T.alloc_buffer((R,), "float32", scope="local")
            total = T.alloc_buffer((R,), "float32", scope="local")
            rescale = T.alloc_buffer((R,), "float32", scope="local")
            acc0 = T.alloc_buffer((MR, L), "float32", scope="local")
            acc1 = T.alloc_buffer((MR, L), "float32", scope="local")
            blocks = T.bind((n + R - 1) // R)
            i = T.bind(task // (H * blocks))
            h = T.bind(task // blocks % H)
            first = T.bind(task % blocks * R)
            pos = T.bind(T.min(T.max(T.Cast("int64", positions[i]), T.int64(0)), T.int64(S)))
            valid = T.bind(T.min(T.Cast("int64", lengths[i]), n))
            if first < valid:
                transpose_in(qkv, qt, ot, top, total, i, h, first, n)
                visible = T.bind(T.min(pos + T.min(first + R, valid), T.int64(S)))  # by the last row of the block
                for block in T.serial((visible + KEYS - 1) // KEYS):
                    count = T.bind(T.min(T.int64(KEYS), visible - block * KEYS))
                    score(cache, qt, st, acc0, acc1, i, h, block * KEYS, count, pos + first)
                    weigh(st, top, total, rescale, count)
                    mix(cache, st, ot, rescale, acc0, acc1, i, h, block * KEYS, count)
                for r in T.vectorized(R):
                    rescale[r] = T.float32(1) / total[r]
            for r in T.serial(T.min(T.int64(R), n - first)):
                if first + r < valid:
                    for d in T.serial(D):
                        out[i, first + r, h * D + d] = T.Cast(dtype, ot[d, r] * rescale[r])
                else:
                    for d in T.serial(D):  # TVM lowers no vector of one bfloat16
                        out[i, first + r, h * D + d] = T.Cast(dtype, T.float32(0))
    # fmt: on

    return body
