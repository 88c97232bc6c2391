"""What MLC's engines do to logits in place, between the forward pass and sampling: bias, penalties, a grammar's mask.

Signatures and meaning: mlc-llm, python/mlc_llm/compiler_pass/attach_logit_processor.py. All indices are int32, logits
float32 [b, V]. On a GPU one thread owns one entry: nothing is written twice, as long as a token is named once.
"""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T
from tvm.tirx import PrimFunc

THREADS = 256
MASKED = -3.4028234663852886e38  # the lowest float32


def _grid(gpu: bool) -> Any:
    """`each(count, body)`: body(i) for i below count, in blocks of threads or in a loop. `each_row`: around it."""
    # fmt: off
    if gpu:
        @T.inline
        def each(count, body):
            for block in T.thread_binding((count + THREADS - 1) // THREADS, thread="blockIdx.x"):
                for thread in T.thread_binding(THREADS, thread="threadIdx.x"):
                    if block * THREADS + thread < count:
                        body(block * THREADS + thread)

        @T.inline
        def each_row(count, body):
            for i in T.thread_binding(count, thread="blockIdx.y"):
                body(i)
    else:
        @T.inline
        def each(count, body):
            for i in T.serial(count):
                body(i)

        each_row = each
    # fmt: on
    return each, each_row


def logit_bias(gpu: bool) -> PrimFunc:
    """``(logits [b, V], rows [t], tokens [t], bias [t] float32)``: logits[rows[i], tokens[i]] += bias[i]."""
    each, _ = _grid(gpu)

    # fmt: off
    @T.prim_func(private=True, s_tir=True)
    def apply_logit_bias(at_logits: T.handle, at_rows: T.handle, at_tokens: T.handle, at_bias: T.handle):
        T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True, "op_pattern": 8})
        b, V, t = T.int32(), T.int32(), T.int32()
        logits = T.match_buffer(at_logits, (b, V), "float32")
        rows = T.match_buffer(at_rows, (t,), "int32")
        tokens = T.match_buffer(at_tokens, (t,), "int32")
        bias = T.match_buffer(at_bias, (t,), "float32")

        @T.inline
        def add(i):
            logits[rows[i], tokens[i]] = logits[rows[i], tokens[i]] + bias[i]

        each(t, add)
    # fmt: on
    return apply_logit_bias


def penalty(gpu: bool) -> PrimFunc:
    """``(logits [b, V], sequences [s], rows [t], tokens [t], counts [t], penalties [s, 3] float32)``.

    penalties are presence, frequency and repetition of a sequence; rows say which of `sequences` a token is of. The
    first two are subtracted (frequency times the count), then a logit above 0 is divided by the third, else multiplied.
    """
    each, _ = _grid(gpu)

    # fmt: off
    @T.prim_func(private=True, s_tir=True)
    def apply_penalty(
        at_logits: T.handle, at_sequences: T.handle, at_rows: T.handle, at_tokens: T.handle, at_counts: T.handle,
        at_penalties: T.handle,
    ):
        T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True, "op_pattern": 8})
        b, V, t, s = T.int32(), T.int32(), T.int32(), T.int32()
        logits = T.match_buffer(at_logits, (b, V), "float32")
        sequences = T.match_buffer(at_sequences, (s,), "int32")
        rows = T.match_buffer(at_rows, (t,), "int32")
        tokens = T.match_buffer(at_tokens, (t,), "int32")
        counts = T.match_buffer(at_counts, (t,), "int32")
        penalties = T.match_buffer(at_penalties, (s, 3), "float32")

        @T.inline
        def punish(i):
            logits[sequences[rows[i]], tokens[i]] = logits[sequences[rows[i]], tokens[i]] - (
                penalties[rows[i], 0] + T.Cast("float32", counts[i]) * penalties[rows[i], 1]
            )
            logits[sequences[rows[i]], tokens[i]] = T.Select(
                logits[sequences[rows[i]], tokens[i]] > T.float32(0),
                logits[sequences[rows[i]], tokens[i]] / penalties[rows[i], 2],
                logits[sequences[rows[i]], tokens[i]] * penalties[rows[i], 2],
            )

        each(t, punish)
    # fmt: on
    return apply_penalty


def bitmask(gpu: bool) -> PrimFunc:
    """``(logits [b, V], sequences [s], mask [b, ceil(V / 32)])``: logits whose bit is 0 become the lowest float32."""
    each, each_row = _grid(gpu)

    # fmt: off
    @T.prim_func(private=True, s_tir=True)
    def apply_bitmask(at_logits: T.handle, at_sequences: T.handle, at_mask: T.handle):
        T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True, "op_pattern": 8})
        b, V, s, words = T.int32(), T.int32(), T.int32(), T.int32()
        logits = T.match_buffer(at_logits, (b, V), "float32")
        sequences = T.match_buffer(at_sequences, (s,), "int32")
        mask = T.match_buffer(at_mask, (b, words), "int32")

        @T.inline
        def hide_row(i):
            @T.inline
            def hide(v):
                if T.bitwise_and(T.shift_right(mask[sequences[i], v // 32], v % 32), 1) == 0:
                    logits[sequences[i], v] = T.float32(MASKED)

            each(V, hide)

        each_row(s, hide_row)
    # fmt: on
    return apply_bitmask
