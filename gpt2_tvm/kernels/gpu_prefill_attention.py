"""Attention of a whole prompt: flash style, with no [n, n] matrix in memory.

A block takes 32 query rows (fewer for wide heads) of one head and walks over the keys in tiles:

1. the key tile goes to shared memory; each thread multiplies 2 rows (on WebGPU 4) by every eighth key, four elements of
   the head at a time, in registers
2. the row maxima meet in shared memory, and the value tile takes the keys' place
3. ``p = 2**(score - maximum)`` goes to shared memory; what was summed under the old maximum is scaled down
4. each thread adds ``p . V`` for its rows and its runs of four columns, in registers

The sums of p stay apart in each thread until the end: they only need the same maximum, not each other. Tiles
above the diagonal and past the longest row of the block are never touched. Long blocks start first.

Everything below step 1 works on registers: with heads of 64 and 2 rows a thread does 32 multiply-adds for 6 loads of
four elements from shared memory in ``q . k``, 64 for 10 in ``p . V``.

``direct`` leaves queries, keys and values where they are, for devices whose shared memory is memory like all other: two
barriers a step instead of four. A block has fewer threads then and takes its rows in parts, one after the other: what
little shared memory is left, SwiftShader compiles a store for every element of it (`gpu_decode_attention`).

After Dao et al. 2022, "FlashAttention", algorithm 1, and Milakov and Gimelshein 2018, "Online normalizer calculation
for softmax", section 3.
"""

# mypy: disable-error-code="valid-type,misc"
from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from tvm import tirx
from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from gpt2_tvm.errors import UserError
from gpt2_tvm.kernels.spec import AttentionSpec, GpuLimits

ACROSS = 8  # threads side by side: keys in q . k, columns in p . V
MASKED = -1e30  # a score that is left out: finite, for WGSL may assume there is no infinity


def padded(elements: int) -> int:
    """A row's stride in shared memory, in elements: an odd number of runs of four.

    Neighbouring threads read runs of four from neighbouring rows; an odd stride puts them in different banks.
    """
    return 4 * ((elements + 3) // 4 | 1)


@dataclass(frozen=True)
class PrefillTile:
    """rows: query rows a block, a multiple of height. keys: keys and values a step, a multiple of `ACROSS`. height:
    query rows a thread."""

    rows: int
    keys: int
    height: int = 2

    @property
    def threads(self) -> int:
        return self.rows // self.height * ACROSS

    def shared_bytes(self, head_dim: int, dtype: str) -> int:
        """Queries, one tile of keys or values, probabilities, and a number a thread and row for reductions."""
        element = 2 if dtype == "float16" else 4
        tiles = (self.rows + self.keys) * padded(head_dim) * element
        return tiles + 4 * self.rows * (padded(self.keys) + ACROSS)


TILES = (PrefillTile(32, 32), PrefillTile(32, 16), PrefillTile(16, 16), PrefillTile(16, 8), PrefillTile(8, 8))
# Behind WGSL a load from shared memory costs more beside a multiply-add (it is guarded, and on software devices done
# lane by lane): twice the rows a thread halve the loads.
WEBGPU_TILES = tuple(replace(tile, height=4) for tile in TILES)


def choose_tile(spec: AttentionSpec, limits: GpuLimits) -> PrefillTile:
    """The largest tile that the device takes. Raises UserError where not even the smallest fits."""
    for tile in WEBGPU_TILES if limits.kind == "webgpu" else TILES:
        needed = tile.shared_bytes(spec.head_dim, spec.dtype)
        if tile.threads <= limits.threads_per_block and needed <= limits.shared_memory_bytes:
            return tile
    raise UserError(
        f"flash attention over heads of {spec.head_dim} in {spec.dtype} needs {needed} bytes of shared memory a block; "
        f"the target allows {limits.shared_memory_bytes}: compile with --attention materialized"
    )


@cache
def prefill_attention(spec: AttentionSpec, limits: GpuLimits, direct: bool = False) -> PrimFunc:
    """``(qkv [b, n, 3HD], positions [b], lengths [b], cache [2, b, H, S, D], out [b, n, HD])``; b, n symbolic.

    Row t of sequence i attends to slots ``0 .. positions[i] + t``: this call's keys and values are in the cache
    already. Rows ``t >= lengths[i]`` write zeros. Slots at or past the capacity are never read. direct: see the module;
    for heads of a multiple of four elements.
    """
    n_head, head_dim, capacity, dtype, width = spec.n_head, spec.head_dim, spec.capacity, spec.dtype, spec.width
    tile = choose_tile(spec, limits)
    keys, height = tile.keys, tile.height
    rows = 2 * height if direct else tile.rows  # at a time
    threads, parts = rows // height * ACROSS, tile.rows // rows
    lanes = limits.lanes(head_dim)
    runs = -(-head_dim // 4)  # of four elements, in a row; the last one may be part zeros
    mine = -(-runs // ACROSS)  # of those, in one thread
    cols = keys // ACROSS  # keys a thread
    stride, p_stride = padded(head_dim), padded(keys)
    loads = runs * 4 // lanes  # in a row of a tile
    over = T.serial if direct else T.unroll  # what a loop costs less than its statements to compile
    wide = 1 if direct else 4  # keys of a row at a time, in p . V
    scale = spec.scale * math.log2(math.e)  # 2**x is what devices have; e**x costs a product more

    def column(run: Any) -> Any:
        """First column of a run, kept inside the row for threads that have no run there."""
        return T.min(run, runs - 1) * 4

    # fmt: off
    @T.inline
    def load_cache(tile, cache, part, seq, head, slot0, end, tid):
        for i in T.serial(steps(keys * loads, threads)):
            e: T.let[T.int32] = i * threads + tid
            if e < keys * loads:
                for lane in T.vectorized(lanes):
                    tile[e // loads * stride + e % loads * lanes + lane] = T.if_then_else(
                        e % loads * lanes < head_dim,
                        cache[part, seq, head, T.min(slot0 + e // loads, end - 1), e % loads * lanes + lane],
                        T.Cast(dtype, 0),
                    )

    @T.inline
    def take_four(four, row, tile, at, raw):
        """One load, then four conversions: Metal has no cast from half4 to float4 as TVM writes it."""
        for lane in T.vectorized(4):
            raw[lane] = tile[at + lane]
        for lane in T.unroll(4):
            four[row, lane] = T.Cast("float32", raw[lane])

    @T.inline
    def take_query(q, r, qkv, seq, row, head, run, raw):
        for lane in T.vectorized(4):
            raw[lane] = qkv[seq, row, head * head_dim + run * 4 + lane]
        for lane in T.unroll(4):
            q[r, lane] = T.Cast("float32", raw[lane])

    @T.inline
    def take_cached(four, r, cache, part, seq, head, slot, col, raw):
        for lane in T.vectorized(4):
            raw[lane] = cache[part, seq, head, slot, col + lane]
        for lane in T.unroll(4):
            four[r, lane] = T.Cast("float32", raw[lane])

    @T.inline
    def give(out, acc, total, meet, raw, seq, row0, ty, tx, r, n_rows, length, head):
        """Row r of mine: its sums over their total, which meets here."""
        total[r] = T.float32(0)
        for x in over(ACROSS):
            total[r] = total[r] + meet[ty + r, x]
        if row0 + ty + r < length:
            total[r] = T.float32(1) / total[r]
        else:  # whatever is in the padding
            total[r] = T.float32(0)
            for j in T.unroll(mine):
                for lane in T.unroll(4):
                    acc[r, j, lane] = T.float32(0)
        for j in T.unroll(mine):
            for lane in T.unroll(4):
                raw[lane] = T.Cast(dtype, acc[r, j, lane] * total[r])
            for piece in T.unroll(4 // lanes):
                at: T.let[T.int32] = (j * ACROSS + tx) * 4 + piece * lanes
                if row0 + ty + r < n_rows and at < head_dim:
                    for lane in T.vectorized(lanes):
                        out[seq, row0 + ty + r, head * head_dim + at + lane] = raw[piece * lanes + lane]

    @T.prim_func(private=True, s_tir=True)
    def prefill_attention(
        qkv_h: T.handle, positions_h: T.handle, lengths_h: T.handle, cache_h: T.handle, out_h: T.handle
    ):
        T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True, "op_pattern": 8})
        b, n = T.int64(), T.int64()
        qkv = T.match_buffer(qkv_h, (b, n, 3 * width), dtype)
        positions = T.match_buffer(positions_h, (b,), "int32")
        lengths = T.match_buffer(lengths_h, (b,), "int32")
        cache = T.match_buffer(cache_h, (2, b, n_head, capacity, head_dim), dtype)
        out = T.match_buffer(out_h, (b, n, width), dtype)
        # Flat, for TVM trims a padded row to the columns in use, and with it the stride that keeps banks apart.
        q_tile = T.sblock_alloc_buffer((1 if direct else rows * stride,), dtype, scope="shared")
        kv_tile = T.sblock_alloc_buffer((1 if direct else keys * stride,), dtype, scope="shared")
        p_tile = T.sblock_alloc_buffer((rows * p_stride,), "float32", scope="shared")
        meet = T.sblock_alloc_buffer((rows, ACROSS), "float32", scope="shared")
        raw = T.sblock_alloc_buffer((4,), dtype, scope="local")
        q = T.sblock_alloc_buffer((height, 4), "float32", scope="local")
        k = T.sblock_alloc_buffer((cols, 4), "float32", scope="local")
        p = T.sblock_alloc_buffer((height, wide), "float32", scope="local")
        v = T.sblock_alloc_buffer((1, 4), "float32", scope="local")
        score = T.sblock_alloc_buffer((height, cols), "float32", scope="local")
        acc = T.sblock_alloc_buffer((height, mine, 4), "float32", scope="local")
        done = T.sblock_alloc_buffer((height, mine, 4), "float32", scope="local")
        sums = T.sblock_alloc_buffer((height,), "float32", scope="local")
        top = T.sblock_alloc_buffer((height,), "float32", scope="local")
        rise = T.sblock_alloc_buffer((height,), "float32", scope="local")
        total = T.sblock_alloc_buffer((height,), "float32", scope="local")

        for bx in T.thread_binding(T.Cast("int32", T.ceildiv(n, tile.rows)), thread="blockIdx.x"):
            for by in T.thread_binding(T.Cast("int32", b) * n_head, thread="blockIdx.y"):
                for tid in T.thread_binding(threads, thread="threadIdx.x"):
                    seq: T.let[T.int32] = by // n_head
                    head: T.let[T.int32] = by % n_head
                    tx: T.let[T.int32] = tid % ACROSS
                    ty: T.let[T.int32] = tid // ACROSS * height  # my first row in the tile
                    n_rows: T.let[T.int32] = T.Cast("int32", n)
                    first: T.let[T.int32] = T.max(T.min(positions[seq], capacity), 0)
                    length: T.let[T.int32] = T.max(T.min(lengths[seq], n_rows), 0)
                    for part in T.serial(parts):
                        last_tile: T.let[T.int32] = (n_rows + tile.rows - 1) // tile.rows - 1
                        row0: T.let[T.int32] = (last_tile - bx) * tile.rows + part * rows
                        end: T.let[T.int32] = T.Select(
                            row0 < length, T.min(first + T.min(row0 + rows, length), capacity), 0
                        )

                        if not direct:
                            for i in T.serial(steps(rows * loads, threads)):
                                e: T.let[T.int32] = i * threads + tid
                                if e < rows * loads:
                                    for lane in T.vectorized(lanes):
                                        q_tile[e // loads * stride + e % loads * lanes + lane] = T.if_then_else(
                                            e % loads * lanes < head_dim,
                                            qkv[seq, T.min(row0 + e // loads, n_rows - 1),
                                                head * head_dim + e % loads * lanes + lane],
                                            T.Cast(dtype, 0),
                                        )
                        for r in T.unroll(height):
                            top[r] = T.float32(MASKED)
                            total[r] = T.float32(0)
                            for j in T.unroll(mine):
                                for lane in T.unroll(4):
                                    acc[r, j, lane] = T.float32(0)

                        for step in T.serial((end + keys - 1) // keys):
                            # 1. scores of my rows against my keys
                            if not direct:
                                load_cache(kv_tile, cache, 0, seq, head, step * keys, end, tid)
                                T.tvm_storage_sync("shared")
                            for r in T.unroll(height):
                                for c in T.unroll(cols):
                                    score[r, c] = T.float32(0)
                            for run in T.serial(runs):
                                for r in T.unroll(height):
                                    if direct:
                                        take_query(q, r, qkv, seq, T.min(row0 + ty + r, n_rows - 1), head, run, raw)
                                    else:
                                        take_four(q, r, q_tile, (ty + r) * stride + run * 4, raw)
                                for c in T.unroll(cols):
                                    if direct:
                                        take_cached(
                                            k, c, cache, 0, seq, head, T.min(step * keys + c * ACROSS + tx, end - 1),
                                            run * 4, raw,
                                        )
                                    else:
                                        take_four(k, c, kv_tile, (c * ACROSS + tx) * stride + run * 4, raw)
                                for r in T.unroll(height):
                                    for c in T.unroll(cols):
                                        for lane in T.unroll(4):
                                            score[r, c] = score[r, c] + q[r, lane] * k[c, lane]
                            for r in T.unroll(height):
                                rise[r] = T.float32(MASKED)
                                for c in T.unroll(cols):
                                    # A sum, not a choice: behind WGSL a choice between loads is a branch.
                                    score[r, c] = score[r, c] * T.float32(scale) + T.Select(
                                        step * keys + c * ACROSS + tx <= first + row0 + ty + r,
                                        T.float32(0),
                                        T.float32(MASKED),
                                    )
                                    rise[r] = T.max(rise[r], score[r, c])
                                meet[ty + r, tx] = rise[r]
                            T.tvm_storage_sync("shared")

                            # 2. and 3. Every row sees slot 0, so from the first tile on its maximum is a real score.
                            if not direct:
                                load_cache(kv_tile, cache, 1, seq, head, step * keys, end, tid)
                            for r in T.unroll(height):
                                rise[r] = top[r]
                                for x in over(ACROSS):
                                    top[r] = T.max(top[r], meet[ty + r, x])
                                rise[r] = T.exp2(rise[r] - top[r])
                                total[r] = total[r] * rise[r]
                                for j in T.unroll(mine):
                                    for lane in T.unroll(4):
                                        acc[r, j, lane] = acc[r, j, lane] * rise[r]
                                for c in T.unroll(cols):
                                    score[r, c] = T.exp2(score[r, c] - top[r])
                                    total[r] = total[r] + score[r, c]
                                    p_tile[(ty + r) * p_stride + c * ACROSS + tx] = score[r, c]
                            T.tvm_storage_sync("shared")

                            # 4.
                            for run in T.serial(keys // wide):
                                for r in T.unroll(height):
                                    for lane in T.vectorized(wide):
                                        p[r, lane] = p_tile[(ty + r) * p_stride + run * wide + lane]
                                for key in T.unroll(wide):
                                    for j in T.unroll(mine):
                                        if direct:
                                            take_cached(
                                                v, 0, cache, 1, seq, head,
                                                T.min(step * keys + run * wide + key, end - 1),
                                                column(j * ACROSS + tx), raw,
                                            )
                                        else:
                                            take_four(
                                                v, 0, kv_tile, (run * 4 + key) * stride + column(j * ACROSS + tx), raw
                                            )
                                        for r in T.unroll(height):
                                            for lane in T.unroll(4):
                                                acc[r, j, lane] = acc[r, j, lane] + p[r, key] * v[0, lane]
                            if not direct:
                                T.tvm_storage_sync("shared")

                        if direct:  # the last step's maxima have been read by all
                            T.tvm_storage_sync("shared")
                        for r in T.unroll(height):
                            meet[ty + r, tx] = total[r]
                        T.tvm_storage_sync("shared")
                        if direct:  # a copy, for what has a computed index is in memory, all the time
                            for r in T.unroll(height):
                                for j in T.unroll(mine):
                                    for lane in T.unroll(4):
                                        done[r, j, lane] = acc[r, j, lane]
                            for r in T.serial(height):
                                give(out, done, sums, meet, raw, seq, row0, ty, tx, r, n_rows, length, head)
                        else:
                            for r in T.unroll(height):
                                give(out, acc, total, meet, raw, seq, row0, ty, tx, r, n_rows, length, head)
    # fmt: on
    return prefill_attention.with_attr("prefill_scale", tirx.FloatImm("float64", spec.scale))


def steps(elements: int, threads: int) -> int:
    """Rounds in which `threads` threads do `elements` pieces of work."""
    return -(-elements // threads)
