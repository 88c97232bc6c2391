"""Attention of one row a sequence (decode) or a few (verify): split-KV.

A row alone is a matrix-vector product with the cache: it moves bytes, and one block a head would leave most of a GPU
idle. So the slots of a head are shared out to several blocks (splits), each with an online softmax of its own; a second
kernel merges their sums (Dao et al. 2023, "Flash-Decoding for long-context inference"). How many slots a split takes
follows the live length of its sequence, which lies in `positions` on the device: the grid stays fixed, so that one
step can be recorded once and replayed.

Within a block, for each tile of slots:

1. keys go to shared memory and values to registers, all loads in flight at once
2. each thread scores one key against its share of the rows
3. threads form groups of D/4; each group sums ``p . V`` over its own eight slots of the tile, under a maximum of its
   own: no reduction across the block, and two barriers a tile

The groups meet once, at the end. Up to eight rows of a sequence share the loads.

Slots of this call's rows are read from the cache, or from qkv itself (``append``); then the block that loads such a
slot also writes it to the cache, and a step needs no launch for that.

``direct`` is for devices whose shared memory is memory like all other, and whose barriers suspend every thread: keys
and queries are not brought there, and a block is one group, which meets nobody. (A browser clears shared memory before
a kernel begins, and SwiftShader compiles that to a store for every element: 4,352 keys took it four seconds.) Rows are
loops there, for it compiles every statement as slowly.
"""

# mypy: disable-error-code="valid-type,misc"
from __future__ import annotations

import math
from functools import cache
from typing import Any

from tvm import tirx
from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from gpt2_tvm.kernels.gpu_combine_splits import combine_splits, live_slots, steps_of
from gpt2_tvm.kernels.gpu_decode_blocks import SLOTS, DecodeKernels, plan_blocks
from gpt2_tvm.kernels.gpu_prefill_attention import MASKED, steps
from gpt2_tvm.kernels.spec import AttentionSpec, GpuLimits


@cache
def decode_attention(
    spec: AttentionSpec,
    limits: GpuLimits,
    batch: int,
    rows: int,
    tree: bool = False,
    append: bool = False,
    splits: int | None = None,
    direct: bool = False,
) -> DecodeKernels:
    """Kernels for `batch` sequences of `rows` rows each, 1 to 32.

    Row i of a sequence attends to slots ``[0, positions[b])`` and to slot ``positions[b] + j`` where ``j <= i``, or,
    with tree, where bit j of ``tree[b, i]`` (int32) is set. Rows ``i >= lengths[b]`` write zeros; so does a row that
    may look at nothing. append: k and v of the valid rows are taken from qkv and written to the cache (argument 3,
    in place); otherwise they are in the cache already. Slots at or past the capacity are neither read nor written.
    splits: how many, instead of a choice by capacity and limits. direct: as little shared memory as can be; for heads
    of a multiple of four elements.
    Raises UserError for rows outside 1 to 32, or where a block does not fit the device.
    """
    n_head, head_dim, capacity, dtype, width = spec.n_head, spec.head_dim, spec.capacity, spec.dtype, spec.width
    blocks = plan_blocks(spec, limits, batch, rows, splits, direct)
    threads, groups, tile, runs, lanes = blocks.threads, blocks.groups, blocks.tile, blocks.runs, blocks.lanes
    chunks, height, stride, count, unit = blocks.chunks, blocks.height, blocks.stride, blocks.splits, blocks.unit
    lines, per_line, pieces = blocks.lines, blocks.per_line, blocks.pieces
    staged, q_staged, merging = blocks.staged, blocks.q_staged, blocks.merging
    scale = spec.scale * math.log2(math.e)
    over = T.serial if direct else T.unroll  # rows
    workspace = (batch, rows, n_head, count, head_dim + 2)
    out_shape, out_dtype = ((batch, rows, width), dtype) if count == 1 else (workspace, "float32")

    def tiles_a_split(slots: Any) -> Any:
        return steps_of(steps_of(slots, unit), count) * (unit // tile)

    def column(run: Any, piece: Any) -> Any:
        """First element of a piece of a run. Neighbours in a group load neighbouring pieces."""
        return (piece * runs + run) * lanes

    def sees(mask: Any, seq: Any, row: Any, new: Any) -> Any:
        """Whether a row may look at this call's row `new` (below 0: it was there before)."""
        if not tree:
            return new <= row
        bit = T.shift_right(mask[seq, T.min(row, rows - 1)], T.min(T.max(new, 0), 31))
        return T.Or(new < 0, T.bitwise_and(bit, 1) == 1)

    # fmt: off
    @T.inline
    def put(stage, at, raw, wide):
        """Conversions one by one between load and store: Metal has no cast of half4 to float4 as TVM writes it."""
        if dtype == "float32":
            for lane in T.vectorized(lanes):
                stage[at + lane] = raw[lane]
        else:
            for lane in T.unroll(lanes):
                wide[lane] = T.Cast("float32", raw[lane])
            for lane in T.vectorized(lanes):
                stage[at + lane] = wide[lane]

    @T.inline
    def widen(to, raw):
        for lane in T.unroll(lanes):
            to[lane] = T.Cast("float32", raw[lane])

    @T.inline
    def take_key(k, qkv, cache, raw, seq, head, slot, part, first, end):
        """Four elements of a slot's key, from where it lies; past the last slot that one's."""
        if append and slot >= first:
            for lane in T.vectorized(4):
                raw[lane] = qkv[
                    seq, T.max(T.min(slot, end - 1) - first, 0), width + head * head_dim + part * 4 + lane
                ]
        else:
            for lane in T.vectorized(4):
                raw[lane] = cache[0, seq, head, T.min(slot, end - 1), part * 4 + lane]
        widen(k, raw)

    @T.inline
    def bring_new_rows(qkv, cache, stage, values, raw, wide, seq, head, row0, run, group, slot0, first, end, tid):
        """This call's rows among the tile's slots: from qkv, and into the cache (by the first chunk's block)."""
        for i in T.serial(steps(rows * runs * pieces, threads)):
            e: T.let[T.int32] = i * threads + tid
            row: T.let[T.int32] = e // (runs * pieces)
            col: T.let[T.int32] = e % (runs * pieces) * lanes
            at: T.let[T.int32] = head * head_dim + col
            if first + row >= slot0 and first + row < T.min(slot0 + tile, end) and row < rows and col < head_dim:
                if not direct:
                    for lane in T.vectorized(lanes):
                        raw[lane] = qkv[seq, row, width + at + lane]
                    put(stage, (first + row - slot0) * stride + col, raw, wide)
                if row0 == 0:
                    for part in T.unroll(2):
                        for lane in T.vectorized(lanes):
                            cache[part, seq, head, first + row, col + lane] = qkv[
                                seq, row, (1 + part) * width + at + lane
                            ]
        for i in T.unroll(SLOTS):
            for piece in T.unroll(pieces):
                if group < groups and column(run, piece) < head_dim and slot0 + i * groups + group >= first:
                    # Past the end the last new row: what was loaded may be memory that nothing was written to yet.
                    for lane in T.vectorized(lanes):
                        values[i * 4 + piece * lanes + lane] = qkv[
                            seq, T.max(T.min(slot0 + i * groups + group, end - 1) - first, 0),
                            2 * width + head * head_dim + column(run, piece) + lane,
                        ]

    @T.inline
    def add_tile(acc, top, total, at, scores, values, p, rise, r, group):
        """Row r's tile to its sums, which are number `at` of acc, top and total."""
        rise[0] = top[at]
        for i in T.unroll(SLOTS):
            p[i] = scores[r * tile + i * groups + group]
            top[at] = T.max(top[at], p[i])
        rise[0] = T.exp2(rise[0] - top[at])
        total[at] = total[at] * rise[0]
        for lane in T.unroll(4):
            acc[at, lane] = acc[at, lane] * rise[0]
        for i in T.unroll(SLOTS):
            p[i] = T.exp2(p[i] - top[at])
            total[at] = total[at] + p[i]
            for lane in T.unroll(4):
                acc[at, lane] = acc[at, lane] + p[i] * T.Cast("float32", values[i * 4 + lane])

    @T.inline
    def give(out, raw, sums, merged, seq, row, head, split, d, lengths):
        if count == 1:
            for lane in T.unroll(lanes):
                raw[lane] = T.Cast(
                    dtype,
                    T.if_then_else(
                        row < lengths[seq] and merged[1] > T.float32(0), sums[lane] / merged[1], T.float32(0)
                    ),
                )
            for lane in T.vectorized(lanes):
                out[seq, row, head * head_dim + d + lane] = raw[lane]
        else:
            for lane in T.vectorized(lanes):
                out[seq, row, head, split, d + lane] = sums[lane]
            if d == 0:
                out[seq, row, head, split, head_dim] = merged[0]
                out[seq, row, head, split, head_dim + 1] = merged[1]

    @T.inline
    def body(qkv, positions, lengths, mask, cache, out):
        stage = T.sblock_alloc_buffer((staged,), "float32", scope="shared")  # keys; at the end sums of groups
        q_tile = T.sblock_alloc_buffer((q_staged,), "float32", scope="shared")
        scores = T.sblock_alloc_buffer((height * tile,), "float32", scope="shared")
        meet = T.sblock_alloc_buffer((groups, height, 2), "float32", scope="shared")  # maximum, sum
        # One-element buffers: a let would be written out again wherever it is used, and again in what uses that.
        slot0 = T.sblock_alloc_buffer((1,), "int32", scope="local")
        slot = T.sblock_alloc_buffer((1,), "int32", scope="local")
        values = T.sblock_alloc_buffer((SLOTS * 4,), dtype, scope="local")
        raw = T.sblock_alloc_buffer((lanes,), dtype, scope="local")
        wide = T.sblock_alloc_buffer((lanes,), "float32", scope="local")
        k = T.sblock_alloc_buffer((4,), "float32", scope="local")
        q = T.sblock_alloc_buffer((4,), "float32", scope="local")
        score = T.sblock_alloc_buffer((per_line,), "float32", scope="local")
        p = T.sblock_alloc_buffer((SLOTS,), "float32", scope="local")
        acc = T.sblock_alloc_buffer((height, 4), "float32", scope="local")
        top = T.sblock_alloc_buffer((height,), "float32", scope="local")
        rise = T.sblock_alloc_buffer((1,), "float32", scope="local")
        total = T.sblock_alloc_buffer((height,), "float32", scope="local")
        acc_r = T.sblock_alloc_buffer((1, 4), "float32", scope="local")  # of one row
        top_r = T.sblock_alloc_buffer((1,), "float32", scope="local")
        total_r = T.sblock_alloc_buffer((1,), "float32", scope="local")
        merged = T.sblock_alloc_buffer((2,), "float32", scope="local")  # maximum, sum
        sums = T.sblock_alloc_buffer((lanes,), "float32", scope="local")  # weighted

        for bx in T.thread_binding(batch * chunks * count, thread="blockIdx.x"):
            for head in T.thread_binding(n_head, thread="blockIdx.y"):
                for tid in T.thread_binding(threads, thread="threadIdx.x"):
                    seq: T.let[T.int32] = bx // (chunks * count)
                    row0: T.let[T.int32] = bx // count % chunks * height
                    split: T.let[T.int32] = bx % count
                    group: T.let[T.int32] = tid // runs
                    run: T.let[T.int32] = tid % runs
                    key: T.let[T.int32] = tid % tile
                    line: T.let[T.int32] = tid // tile
                    first: T.let[T.int32] = T.max(T.min(positions[seq], capacity), 0)
                    end: T.let[T.int32] = live_slots(positions, lengths, seq, rows, capacity)
                    share: T.let[T.int32] = tiles_a_split(end)
                    last: T.let[T.int32] = T.max(first - 1, 0) if append else end - 1  # slot to read in the cache

                    if not direct:
                        for i in T.serial(steps(height * runs * pieces, threads)):
                            e: T.let[T.int32] = i * threads + tid
                            row: T.let[T.int32] = row0 + e // (runs * pieces)
                            col: T.let[T.int32] = e % (runs * pieces) * lanes
                            if e < height * runs * pieces:
                                for lane in T.vectorized(lanes):
                                    raw[lane] = T.if_then_else(
                                        col < head_dim and row < rows,
                                        qkv[
                                            seq, T.min(row, rows - 1),
                                            head * head_dim + T.min(col, head_dim - lanes) + lane,
                                        ],
                                        T.Cast(dtype, 0),
                                    )
                                put(q_tile, e * lanes, raw, wide)
                    for r in T.unroll(height):
                        # Above MASKED: where all is masked so far, exp2(MASKED - top) is 0, and no branch asks for it.
                        top[r] = T.float32(MASKED / 2)
                        total[r] = T.float32(0)
                        for lane in T.unroll(4):
                            acc[r, lane] = T.float32(0)

                    for step in T.serial(T.max(T.min(share, steps_of(end, tile) - split * share), 0)):
                        slot0[0] = (split * share + step) * tile
                        # 1. Past the last slot it is read again: no branch between loads, and its score is masked.
                        if not direct:
                            for i in T.serial(steps(tile * runs * pieces, threads)):
                                e: T.let[T.int32] = i * threads + tid
                                row: T.let[T.int32] = e // (runs * pieces)
                                col: T.let[T.int32] = e % (runs * pieces) * lanes
                                old: T.let[T.bool] = not append or slot0[0] + row < first
                                if e < tile * runs * pieces and col < head_dim and old:
                                    for lane in T.vectorized(lanes):
                                        raw[lane] = cache[0, seq, head, T.min(slot0[0] + row, last), col + lane]
                                    put(stage, row * stride + col, raw, wide)
                                elif e < tile * runs * pieces and col >= head_dim:
                                    for lane in T.vectorized(lanes):
                                        stage[row * stride + col + lane] = T.float32(0)
                        for i in T.unroll(SLOTS):
                            slot[0] = T.min(slot0[0] + i * groups + group, last)
                            for piece in T.unroll(pieces):
                                if group < groups and column(run, piece) < head_dim:
                                    for lane in T.vectorized(lanes):
                                        values[i * 4 + piece * lanes + lane] = cache[
                                            1, seq, head, slot[0], column(run, piece) + lane
                                        ]
                        if append and slot0[0] + tile > first:
                            bring_new_rows(
                                qkv, cache, stage, values, raw, wide,
                                seq, head, row0, run, group, slot0[0], first, end, tid,
                            )
                        if not direct:
                            T.tvm_storage_sync("shared")

                        # 2.
                        if line < lines:
                            for r in T.unroll(per_line):
                                score[r] = T.float32(0)
                            for part in T.serial(runs):
                                if direct:
                                    take_key(k, qkv, cache, raw, seq, head, slot0[0] + key, part, first, end)
                                else:
                                    for lane in T.vectorized(4):
                                        k[lane] = stage[key * stride + part * 4 + lane]
                                for r in T.unroll(per_line):
                                    if direct:
                                        for lane in T.vectorized(4):
                                            raw[lane] = qkv[
                                                seq, T.min(row0 + T.min(r * lines + line, height - 1), rows - 1),
                                                head * head_dim + part * 4 + lane,
                                            ]
                                        widen(q, raw)
                                    else:
                                        for lane in T.vectorized(4):
                                            q[lane] = q_tile[
                                                T.min(r * lines + line, height - 1) * (runs * 4) + part * 4 + lane
                                            ]
                                    for lane in T.unroll(4):
                                        score[r] = score[r] + k[lane] * q[lane]
                            for r in T.unroll(per_line):
                                row: T.let[T.int32] = r * lines + line
                                if row < height:
                                    scores[row * tile + key] = T.if_then_else(
                                        slot0[0] + key < end and sees(mask, seq, row0 + row, slot0[0] + key - first),
                                        score[r] * T.float32(scale),
                                        T.float32(MASKED),
                                    )
                        T.tvm_storage_sync("shared")

                        # 3. Slots i * groups + group of the tile are my group's.
                        if group < groups:
                            for r in over(height):
                                if direct:  # what has a computed index is in memory: once a row, not once a product
                                    for lane in T.unroll(4):
                                        acc_r[0, lane] = acc[r, lane]
                                    top_r[0] = top[r]
                                    total_r[0] = total[r]
                                    add_tile(acc_r, top_r, total_r, 0, scores, values, p, rise, r, group)
                                    for lane in T.unroll(4):
                                        acc[r, lane] = acc_r[0, lane]
                                    top[r] = top_r[0]
                                    total[r] = total_r[0]
                                else:
                                    add_tile(acc, top, total, r, scores, values, p, rise, r, group)

                    # The groups meet. `stage` is free: all scores of the last tile were read after a barrier.
                    if direct:
                        for r in T.serial(height):
                            for piece in T.unroll(pieces):
                                if group < groups and row0 + r < rows and column(run, piece) < head_dim:
                                    merged[0] = top[r]
                                    merged[1] = total[r]
                                    for lane in T.unroll(lanes):
                                        sums[lane] = acc[r, piece * lanes + lane]
                                    give(
                                        out, raw, sums, merged, seq, row0 + r, head, split, column(run, piece), lengths
                                    )
                    else:
                        if group < groups:
                            for r in T.unroll(height):
                                for piece in T.unroll(pieces):
                                    if column(run, piece) < head_dim:
                                        for lane in T.vectorized(lanes):
                                            stage[(group * height + r) * head_dim + column(run, piece) + lane] = acc[
                                                r, piece * lanes + lane
                                            ]
                                if run == 0:
                                    meet[group, r, 0] = top[r]
                                    meet[group, r, 1] = total[r]
                        T.tvm_storage_sync("shared")
                        for i in T.serial(steps(height * head_dim // lanes, threads)):
                            e: T.let[T.int32] = i * threads + tid
                            r: T.let[T.int32] = e // (head_dim // lanes)
                            row: T.let[T.int32] = row0 + r
                            d: T.let[T.int32] = e % (head_dim // lanes) * lanes
                            if e < height * head_dim // lanes and row < rows:
                                merged[0] = T.float32(MASKED)
                                merged[1] = T.float32(0)
                                for lane in T.vectorized(lanes):
                                    sums[lane] = T.float32(0)
                                for g in T.unroll(groups):
                                    merged[0] = T.max(merged[0], meet[g, r, 0])
                                for g in T.unroll(groups):
                                    weight: T.let[T.float32] = T.exp2(meet[g, r, 0] - merged[0])
                                    merged[1] = merged[1] + weight * meet[g, r, 1]
                                    for lane in T.vectorized(lanes):
                                        sums[lane] = sums[lane] + weight * stage[(g * height + r) * head_dim + d + lane]
                                give(out, raw, sums, merged, seq, row, head, split, d, lengths)

    if tree:

        @T.prim_func(private=True, s_tir=True)
        def partial(
            qkv: T.Buffer((batch, rows, 3 * width), dtype),
            positions: T.Buffer((batch,), "int32"),
            lengths: T.Buffer((batch,), "int32"),
            cache: T.Buffer((2, batch, n_head, capacity, head_dim), dtype),
            mask: T.Buffer((batch, rows), "int32"),
            out: T.Buffer(out_shape, out_dtype),
        ):
            T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True, "op_pattern": 8})
            body(qkv, positions, lengths, mask, cache, out)

    else:

        @T.prim_func(private=True, s_tir=True)
        def partial(
            qkv: T.Buffer((batch, rows, 3 * width), dtype),
            positions: T.Buffer((batch,), "int32"),
            lengths: T.Buffer((batch,), "int32"),
            cache: T.Buffer((2, batch, n_head, capacity, head_dim), dtype),
            out: T.Buffer(out_shape, out_dtype),
        ):
            T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True, "op_pattern": 8})
            body(qkv, positions, lengths, positions, cache, out)

    # fmt: on
    if count == 1:
        return DecodeKernels(_named(partial, spec, splits, append), None, None)
    combine = combine_splits(spec, merging, batch, rows, count, unit)
    return DecodeKernels(_named(partial, spec, splits, append), combine, workspace)


def _named(partial: PrimFunc, spec: AttentionSpec, splits: int | None, append: bool) -> PrimFunc:
    """With what its arguments do not say, for `attention_forms`."""
    named = partial.with_attr("attention_scale", tirx.FloatImm("float64", spec.scale))
    named = named.with_attr("attention_append", append)
    return named if splits is None else named.with_attr("attention_splits", splits)
