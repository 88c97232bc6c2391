"""Attention of a whole prompt on NVIDIA's tensor cores, float16: the same call as `gpu_prefill_attention`.

A block of four warps takes 64 query rows of one head, 16 a warp, and walks over the keys 64 at a time:

1. scores of 16 rows x 64 keys by `mma.m16n8k16` (float16 in, float32 out); the queries stay in registers from the
   start, the keys come from shared memory by `ldmatrix`
2. the largest score of a row: in registers, then over the four threads that hold the row
3. ``p = 2**(score - maximum)``; what was summed under the old maximum is scaled down
4. p, in float16, times the values: two neighbouring 16 x 8 results of 1 are laid out over a warp's registers as one
   16 x 16 operand is, so p goes from one product to the next without leaving them

Keys and values are copied by `cp.async`: the values while the scores are computed, the next keys while the values are
multiplied. A tile's rows are 16 bytes longer than the head: eight rows then lie in different banks, which is what
`ldmatrix` reads at a time.

After Dao et al. 2022, "FlashAttention", algorithm 1, and Dao 2023, "FlashAttention-2", section 3 (work over warps,
one scaling at the end). Register layouts: PTX ISA 9.0, "Matrix fragments for mma.m16n8k16" and "ldmatrix".
"""

# mypy: ignore-errors
# TVMScript is parsed by TVM, not executed: its annotations mean nothing to a type checker.
from __future__ import annotations

import math
from functools import cache

from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from gpt2_tvm.kernels.gpu_prefill_attention import MASKED, steps
from gpt2_tvm.kernels.spec import AttentionSpec, GpuLimits

WARPS = 4
THREADS = 32 * WARPS
ROWS = 16 * WARPS  # of a block
KEYS = 64  # a step; as many as rows, for the queries pass through the values' tile
CHUNK = 8  # float16 in 16 bytes
MAX_HEAD_DIM = 128  # twice that, and the sums of p . V leave the registers
LEAST_ARCH = 80  # m16n8k16 and cp.async
FULL_WARP = 0xFFFFFFFF


def padded(head_dim: int) -> int:
    """A head's elements in products: a multiple of 16, the last ones zeros."""
    return -(-head_dim // 16) * 16


def shared_bytes(head_dim: int) -> int:
    """Of a block: a tile of keys and one of values."""
    return 2 * KEYS * (padded(head_dim) + CHUNK) * 2


def fits(spec: AttentionSpec, limits: GpuLimits) -> bool:
    """Whether the kernel can do `spec` on a device: float16, rows of whole 16 bytes, Ampere or later."""
    return (
        limits.kind == "cuda"
        and limits.arch >= LEAST_ARCH
        and spec.dtype == "float16"
        and spec.head_dim % CHUNK == 0
        and spec.head_dim <= MAX_HEAD_DIM
        and limits.threads_per_block >= THREADS
        and limits.shared_memory_bytes >= shared_bytes(spec.head_dim)
    )


@cache
def prefill_attention(spec: AttentionSpec) -> PrimFunc:
    """``(qkv [b, n, 3HD], positions [b], lengths [b], cache [2, b, H, S, D], out [b, n, HD])``; b, n symbolic, tensors
    float16.

    Row t of sequence i attends to slots ``0 .. positions[i] + t``: this call's keys and values are in the cache
    already. Rows ``t >= lengths[i]`` write zeros. Slots at or past the capacity are never read. p is rounded to
    float16 for its product with the values; scores and all sums are float32.
    """
    n_head, head_dim, capacity, width = spec.n_head, spec.head_dim, spec.capacity, spec.width
    deep = padded(head_dim)
    stride = deep + CHUNK
    slices = deep // 16  # of the head, 16 elements each
    chunks = head_dim // CHUNK  # of a row
    pairs = KEYS // 16
    scale = spec.scale * math.log2(math.e)  # 2**x is what devices have; e**x costs a product more

    # fmt: off
    @T.inline
    def fetch(tile, cache, plane, slot0, end, tid):
        """Slots of a head into a tile, not waited for. Those past the end repeat the last one, and count nothing."""
        for i in T.unroll(steps(KEYS * chunks, THREADS)):
            at: T.let[T.int32] = i * THREADS + tid
            if KEYS * chunks % THREADS == 0 or at < KEYS * chunks:
                T.evaluate(T.s_tir.cp_async_raw.legacy(
                    tile.data, at // chunks * stride + at % chunks * CHUNK,
                    cache.data,
                    plane + T.Cast("int64", T.max(T.min(slot0 + at // chunks, end - 1), 0) * head_dim
                                   + at % chunks * CHUNK),
                    16, dtype="float16",
                ))
        T.ptx["cp.async.commit_group"]()

    @T.inline
    def arrived():
        """What every thread fetched is there for all, and everyone is done with what was there before."""
        T.ptx["cp.async.wait_group"](0)
        T.tvm_storage_sync("shared")

    @T.prim_func(private=True, s_tir=True)
    def prefill_attention(
        qkv_h: T.handle, positions_h: T.handle, lengths_h: T.handle, cache_h: T.handle, out_h: T.handle
    ):
        T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True, "op_pattern": 8})
        b, n = T.int64(), T.int64()
        qkv = T.match_buffer(qkv_h, (b, n, 3 * width), "float16")
        positions = T.match_buffer(positions_h, (b,), "int32")
        lengths = T.match_buffer(lengths_h, (b,), "int32")
        cache = T.match_buffer(cache_h, (2, b, n_head, capacity, head_dim), "float16")
        out = T.match_buffer(out_h, (b, n, width), "float16")
        k_tile = T.sblock_alloc_buffer((KEYS * stride,), "float16", scope="shared")
        v_tile = T.sblock_alloc_buffer((KEYS * stride,), "float16", scope="shared")
        q = T.sblock_alloc_buffer((slices * 8,), "float16", scope="local")
        side = T.sblock_alloc_buffer((8,), "float16", scope="local")  # the product's other side: keys or values
        p = T.sblock_alloc_buffer((8,), "float16", scope="local")
        # of a 16 x 8 result, in a thread: [row g: 2 columns, row g + 8: 2 columns]
        score = T.sblock_alloc_buffer((KEYS // 8 * 4,), "float32", scope="local")
        acc = T.sblock_alloc_buffer((deep // 8 * 4,), "float32", scope="local")
        top = T.sblock_alloc_buffer((2,), "float32", scope="local")
        rise = T.sblock_alloc_buffer((2,), "float32", scope="local")
        total = T.sblock_alloc_buffer((2,), "float32", scope="local")

        for bx in T.thread_binding(T.Cast("int32", T.ceildiv(n, ROWS)), thread="blockIdx.x"):
            for by in T.thread_binding(T.Cast("int32", b) * n_head, thread="blockIdx.y"):
                for tid in T.thread_binding(THREADS, thread="threadIdx.x"):
                    seq: T.let[T.int32] = by // n_head
                    head: T.let[T.int32] = by % n_head
                    lane: T.let[T.int32] = tid % 32
                    n_rows: T.let[T.int32] = T.Cast("int32", n)
                    row0: T.let[T.int32] = ((n_rows + ROWS - 1) // ROWS - 1 - bx) * ROWS  # long blocks first
                    row: T.let[T.int32] = row0 + tid // 32 * 16 + lane // 4  # mine, and the eighth from it
                    first: T.let[T.int32] = T.max(T.min(positions[seq], capacity), 0)
                    length: T.let[T.int32] = T.max(T.min(lengths[seq], n_rows), 0)
                    keys: T.let[T.int64] = T.Cast("int64", by) * (capacity * head_dim)
                    values: T.let[T.int64] = keys + b * (n_head * capacity * head_dim)
                    end: T.let[T.int32] = T.Select(
                        row0 < length, T.min(first + T.min(row0 + ROWS, length), capacity), 0
                    )

                    for i in T.unroll(steps(ROWS * chunks, THREADS)):
                        at: T.let[T.int32] = i * THREADS + tid
                        if ROWS * chunks % THREADS == 0 or at < ROWS * chunks:
                            T.evaluate(T.s_tir.cp_async_raw.legacy(
                                v_tile.data, at // chunks * stride + at % chunks * CHUNK,
                                qkv.data,
                                (T.Cast("int64", seq) * n + T.min(row0 + at // chunks, n_rows - 1)) * (3 * width)
                                + head * head_dim + at % chunks * CHUNK,
                                16, dtype="float16",
                            ))
                    fetch(k_tile, cache, keys, 0, end, tid)
                    if deep > head_dim and tid < KEYS:
                        for c in T.vectorized(CHUNK):
                            k_tile[tid * stride + head_dim + c] = T.float16(0)
                        for c in T.vectorized(CHUNK):
                            v_tile[tid * stride + head_dim + c] = T.float16(0)
                    arrived()
                    for d in T.unroll(slices):
                        T.evaluate(T.ptx_legacy.ldmatrix(
                            False, 4, ".b16", q.data, d * 8, v_tile.access_ptr("r"),
                            (tid // 32 * 16 + lane % 16) * stride + d * 16 + lane // 16 * 8, dtype="float16",
                        ))
                    T.tvm_storage_sync("shared")
                    fetch(v_tile, cache, values, 0, end, tid)
                    for r in T.unroll(2):
                        top[r] = T.float32(MASKED)
                        total[r] = T.float32(0)
                    for j in T.unroll(deep // 8 * 4):
                        acc[j] = T.float32(0)

                    for step in T.serial((end + KEYS - 1) // KEYS):
                        # 1.
                        for j in T.unroll(KEYS // 8 * 4):
                            score[j] = T.float32(0)
                        for d in T.unroll(slices):
                            for j in T.unroll(pairs):
                                T.evaluate(T.ptx_legacy.ldmatrix(
                                    False, 4, ".b16", side.data, 0, k_tile.access_ptr("r"),
                                    (j * 16 + lane // 16 * 8 + lane % 8) * stride + d * 16 + lane // 8 % 2 * 8,
                                    dtype="float16",
                                ))
                                for half in T.unroll(2):
                                    T.evaluate(T.ptx_legacy.mma(
                                        "m16n8k16", "row", "col", "fp16", "fp16", "fp32", q.data, d * 8,
                                        side.data, half * 4, score.data, j * 8 + half * 4, False, dtype="float32",
                                    ))
                        arrived()  # the values; the keys are read
                        if (step + 1) * KEYS < end:
                            fetch(k_tile, cache, keys, (step + 1) * KEYS, end, tid)

                        # 2. and 3. Every row sees slot 0, so from the first tile on its maximum is a real score.
                        for j in T.unroll(KEYS // 8 * 4):
                            score[j] = score[j] * T.float32(scale)
                        if (step + 1) * KEYS > T.min(first + row0 + 1, end):  # not all of it is seen by every row
                            for j in T.unroll(KEYS // 8 * 4):
                                score[j] = T.Select(
                                    step * KEYS + j // 4 * 8 + lane % 4 * 2 + j % 2
                                    <= T.min(first + row + j // 2 % 2 * 8, end - 1),
                                    score[j], T.float32(MASKED),
                                )
                        for r in T.unroll(2):
                            rise[r] = top[r]
                            for j in T.unroll(KEYS // 8):
                                top[r] = T.max(top[r], T.max(score[j * 4 + r * 2], score[j * 4 + r * 2 + 1]))
                            for hop in T.unroll(2):
                                top[r] = T.max(
                                    top[r], T.tvm_warp_shuffle_xor(T.uint32(FULL_WARP), top[r], hop + 1, 32, 32)
                                )
                            rise[r] = T.exp2(rise[r] - top[r])
                            total[r] = total[r] * rise[r]
                        for j in T.unroll(deep // 8 * 4):
                            acc[j] = acc[j] * rise[j // 2 % 2]
                        for j in T.unroll(KEYS // 8 * 4):
                            score[j] = T.exp2(score[j] - top[j // 2 % 2])
                            total[j // 2 % 2] = total[j // 2 % 2] + score[j]

                        # 4.
                        for j in T.unroll(pairs):
                            for c in T.unroll(4):
                                for e in T.vectorized(2):
                                    p[c * 2 + e] = T.Cast("float16", score[j * 8 + c * 2 + e])
                            for d in T.unroll(slices):
                                T.evaluate(T.ptx_legacy.ldmatrix(
                                    True, 4, ".b16", side.data, 0, v_tile.access_ptr("r"),
                                    (j * 16 + lane % 16) * stride + d * 16 + lane // 16 * 8, dtype="float16",
                                ))
                                for half in T.unroll(2):
                                    T.evaluate(T.ptx_legacy.mma(
                                        "m16n8k16", "row", "col", "fp16", "fp16", "fp32", p.data, 0,
                                        side.data, half * 4, acc.data, d * 8 + half * 4, False, dtype="float32",
                                    ))
                        arrived()  # the next keys; the values are read
                        if (step + 1) * KEYS < end:
                            fetch(v_tile, cache, values, (step + 1) * KEYS, end, tid)

                    for r in T.unroll(2):
                        for hop in T.unroll(2):
                            total[r] = total[r] + T.tvm_warp_shuffle_xor(
                                T.uint32(FULL_WARP), total[r], hop + 1, 32, 32
                            )
                        total[r] = T.float32(1) / total[r]
                        if row + r * 8 < n_rows:
                            for j in T.unroll(head_dim // 8):
                                for e in T.unroll(2):  # not a factor: what padded rows hold may be NaN
                                    p[e] = T.Cast(
                                        "float16",
                                        T.Select(
                                            row + r * 8 < length, acc[j * 4 + r * 2 + e] * total[r], T.float32(0)
                                        ),
                                    )
                                for e in T.vectorized(2):
                                    out[seq, row + r * 8, head * head_dim + j * 8 + lane % 4 * 2 + e] = p[e]
    # fmt: on
    return prefill_attention
