"""What merges the splits of a head (`gpu_decode_attention`): each a weighted sum of values, a maximum, and a sum of
weights."""

# mypy: disable-error-code="valid-type,misc,no-untyped-def"
from __future__ import annotations

from typing import Any

from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from gpt2_tvm.kernels.gpu_prefill_attention import MASKED, steps
from gpt2_tvm.kernels.spec import AttentionSpec


def live_slots(positions: Any, lengths: Any, seq: Any, rows: int, capacity: int) -> Any:
    """Slots that a call of `rows` rows may look at."""
    first = T.max(T.min(positions[seq], capacity), 0)
    return T.Select(lengths[seq] > 0, T.min(first + T.min(lengths[seq], rows), capacity), 0)


def combine_splits(spec: AttentionSpec, threads: int, batch: int, rows: int, count: int, tile: int) -> PrimFunc:
    """``(parts [B, m, H, count, D + 2], positions [B], lengths [B], out [B, m, HD])``; parts in float32.

    threads: of a block. count: splits. tile: slots that a split takes at least.
    """
    n_head, head_dim, capacity, dtype, width = spec.n_head, spec.head_dim, spec.capacity, spec.dtype, spec.width
    # fmt: off
    blocks = steps(width, threads)

    @T.prim_func(private=True, s_tir=True)
    def combine(
        parts: T.Buffer((batch, rows, n_head, count, head_dim + 2), "float32"),
        positions: T.Buffer((batch,), "int32"),
        lengths: T.Buffer((batch,), "int32"),
        out: T.Buffer((batch, rows, width), dtype),
    ):
        T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True, "op_pattern": 8})
        merged = T.sblock_alloc_buffer((3,), "float32", scope="local")  # maximum, sum, weighted sum
        for bx in T.thread_binding(batch * rows, thread="blockIdx.x"):
            for by in T.thread_binding(blocks, thread="blockIdx.y"):
                for tid in T.thread_binding(threads, thread="threadIdx.x"):
                    seq: T.let[T.int32] = bx // rows
                    row: T.let[T.int32] = bx % rows
                    e: T.let[T.int32] = by * threads + tid
                    head: T.let[T.int32] = e // head_dim
                    tiles: T.let[T.int32] = steps_of(live_slots(positions, lengths, seq, rows, capacity), tile)
                    share: T.let[T.int32] = T.max(steps_of(tiles, count), 1)
                    if e < width:
                        merged[0] = T.float32(MASKED)
                        merged[1] = T.float32(0)
                        merged[2] = T.float32(0)
                        # Splits past the last tile wrote sums of nothing; they are not worth reading.
                        for s in T.serial(steps_of(tiles, share)):
                            merged[0] = T.max(merged[0], parts[seq, row, head, s, head_dim])
                        for s in T.serial(steps_of(tiles, share)):
                            weight: T.let[T.float32] = T.exp2(parts[seq, row, head, s, head_dim] - merged[0])
                            merged[1] = merged[1] + weight * parts[seq, row, head, s, head_dim + 1]
                            merged[2] = merged[2] + weight * parts[seq, row, head, s, e % head_dim]
                        out[seq, row, e] = T.Cast(
                            dtype,
                            T.if_then_else(
                                row < lengths[seq] and merged[1] > T.float32(0), merged[2] / merged[1], T.float32(0)
                            ),
                        )
    # fmt: on
    return combine


def steps_of(elements: Any, by: Any) -> Any:
    """`gpu_prefill_attention.steps` for TIR expressions."""
    return (elements + by - 1) // by
