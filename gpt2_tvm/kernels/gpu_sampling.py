"""What follows the logits on the device: argmax, the greedy loop's hand-over to its next step, log-probabilities.

One block a row. A thread loads eight logits before it looks at any, so that their latencies overlap. The block then
meets in shared memory in two rounds of about the square root of its threads: two barriers, where halving takes ten.

Floats are compared as integers: the bits of a float32, seen as an int32 and with the lower 31 flipped where the
sign is set, are in the order of the numbers. So NaN can be put below everything by its bits: WGSL may
assume that there is no NaN and drop a test like ``x == x``.
"""

# mypy: disable-error-code="valid-type,misc"
from __future__ import annotations

from functools import cache
from typing import Any

from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from gpt2_tvm.kernels.gpu_prefill_attention import steps
from gpt2_tvm.kernels.spec import GpuLimits

THREADS = 1024  # at most; a row of 50257 has work for them all
AT_ONCE = 8  # logits in flight a thread
LOWEST = -0x7FFFFFFF  # below minus infinity; WGSL has no literal for one less
INFINITY_BITS = 0x7F800000
ROW_KERNEL = "row_kernel"  # attribute: which kernel of a block a row this is, for `attention_forms`


def _threads(limits: GpuLimits, vocab: int) -> int:
    """Threads for a row: a power of two, no more than there are logits (or one)."""
    most = min(THREADS, limits.threads_per_block, max(vocab, 1))
    return 1 << most.bit_length() - 1


def _fan(threads: int) -> int:
    """Threads in the second round: each takes every fan-th result of the first, and the last round takes theirs."""
    return 1 << threads.bit_length() // 2


def in_order(bits: Any) -> Any:
    """int32 bits of a float32 -> an int32 in the same order; NaN lowest, -0 equal to 0."""
    ordered = T.Select(bits < 0, T.bitwise_xor(bits, 0x7FFFFFFF), bits)
    ordered = T.Select(ordered == -1, 0, ordered)  # only -0 comes out as -1
    return T.Select(T.bitwise_and(bits, 0x7FFFFFFF) > INFINITY_BITS, LOWEST, ordered)


def _argmax_body(vocab: int, threads: int) -> Any:
    """An inline: the index of the row's largest logit ends up in ``best[1]`` of every thread."""
    rounds = steps(vocab, threads * AT_ONCE)
    fan = _fan(threads)

    # fmt: off
    @T.inline
    def meet(best, seen, keys, indices, count, stride, start):
        """The best of `count` entries from `start`, a stride apart; ties go to the lowest index."""
        best[0] = LOWEST
        best[1] = 0
        for j in T.serial(count):
            seen[0] = keys[j * stride + start]
            seen[1] = indices[j * stride + start]
            if seen[0] > best[0] or (seen[0] == best[0] and seen[1] < best[1]):
                best[0] = seen[0]
                best[1] = seen[1]

    @T.inline
    def body(logits, row, tid, best):
        seen = T.sblock_alloc_buffer((AT_ONCE,), "int32", scope="local")
        keys = T.sblock_alloc_buffer((threads,), "int32", scope="shared")
        indices = T.sblock_alloc_buffer((threads,), "int32", scope="shared")
        last_keys = T.sblock_alloc_buffer((fan,), "int32", scope="shared")
        last_indices = T.sblock_alloc_buffer((fan,), "int32", scope="shared")
        best[0] = LOWEST
        best[1] = 0
        for i in T.serial(rounds):
            for j in T.unroll(AT_ONCE):
                # Past the end the last logit is looked at again: it cannot win over itself.
                seen[j] = T.reinterpret("int32", logits[row, T.min((i * AT_ONCE + j) * threads + tid, vocab - 1)])
            for j in T.unroll(AT_ONCE):
                seen[j] = in_order(seen[j])
                if seen[j] > best[0]:
                    best[0] = seen[j]
                    best[1] = T.min((i * AT_ONCE + j) * threads + tid, vocab - 1)
        keys[tid] = best[0]
        indices[tid] = best[1]
        T.tvm_storage_sync("shared")
        if tid < fan:
            meet(best, seen, keys, indices, threads // fan, fan, tid)
            last_keys[tid] = best[0]
            last_indices[tid] = best[1]
        T.tvm_storage_sync("shared")
        meet(best, seen, last_keys, last_indices, fan, 1, 0)
    # fmt: on
    return body


@cache
def argmax(batch: int, vocab: int, limits: GpuLimits) -> PrimFunc:
    """``(logits [B, V] float32, out [B] int32)``: lowest index of the largest logit; NaN never wins, 0 if all are."""
    threads = _threads(limits, vocab)
    body = _argmax_body(vocab, threads)

    @T.prim_func(private=True, s_tir=True)
    def argmax(logits: T.Buffer((batch, vocab), "float32"), out: T.Buffer((batch,), "int32")):
        T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True, "op_pattern": 8})
        best = T.sblock_alloc_buffer((2,), "int32", scope="local")  # key, index
        for row in T.thread_binding(batch, thread="blockIdx.x"):
            for tid in T.thread_binding(threads, thread="threadIdx.x"):
                body(logits, row, tid, best)
                if tid == 0:
                    out[row] = best[1]

    return argmax.with_attr(ROW_KERNEL, "argmax")


@cache
def greedy_advance(batch: int, vocab: int, capacity: int, limits: GpuLimits) -> PrimFunc:
    """The end of a greedy step: ``(logits [B, V] float32, token [B, 1], positions [B], history [B, capacity])``.

    The last three are int32 and in place (arguments 1, 2, 3). On entry ``positions[b]`` = p counts the tokens that
    were in the cache before this step, whose token went to slot p. On return ``positions[b]`` = p + 1, ``token[b]`` is
    the argmax of the row (as in `argmax`), and ``history[b, p + 1]`` remembers it: the next step will append it there.
    With p + 1 outside ``[0, capacity)`` nothing is remembered.
    """
    threads = _threads(limits, vocab)
    body = _argmax_body(vocab, threads)

    @T.prim_func(private=True, s_tir=True)
    def greedy_advance(
        logits: T.Buffer((batch, vocab), "float32"),
        token: T.Buffer((batch, 1), "int32"),
        positions: T.Buffer((batch,), "int32"),
        history: T.Buffer((batch, capacity), "int32"),
    ):
        T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True, "op_pattern": 8})
        best = T.sblock_alloc_buffer((2,), "int32", scope="local")  # key, index
        slot = T.sblock_alloc_buffer((1,), "int32", scope="local")
        for row in T.thread_binding(batch, thread="blockIdx.x"):
            for tid in T.thread_binding(threads, thread="threadIdx.x"):
                body(logits, row, tid, best)
                if tid == 0:
                    slot[0] = positions[row] + 1
                    token[row, 0] = best[1]
                    if slot[0] >= 0 and slot[0] < capacity:
                        history[row, slot[0]] = best[1]
                    positions[row] = slot[0]

    return greedy_advance.with_attr(ROW_KERNEL, "greedy_advance")


@cache
def log_prob(vocab: int, limits: GpuLimits) -> PrimFunc:
    """``(logits [b, n, V] float32, targets [b, n] int32, out [b, n] float32)``; b, n symbolic.

    ``out = logits[target] - max - log(sum(exp(logits - max)))``, in one pass over the row: each thread keeps a sum
    under its own maximum. A target outside ``[0, V)`` gives 0 (padding can say -1).
    """
    threads = _threads(limits, vocab)
    rounds = steps(vocab, threads * AT_ONCE)
    fan = _fan(threads)
    lowest = -3.0e38  # below any logit, and finite: WGSL may assume that there is no infinity

    # fmt: off
    @T.inline
    def meet(top, total, maxima, sums, count, stride, start):
        """Sums under `count` maxima from `start`, a stride apart, under the largest of them."""
        top[0] = T.float32(lowest)
        total[0] = T.float32(0)
        for j in T.serial(count):
            top[0] = T.max(top[0], maxima[j * stride + start])
        for j in T.serial(count):
            total[0] = total[0] + sums[j * stride + start] * T.exp(maxima[j * stride + start] - top[0])

    @T.prim_func(private=True, s_tir=True)
    def log_prob(logits_h: T.handle, targets_h: T.handle, out_h: T.handle):
        T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True, "op_pattern": 8})
        b, n = T.int64(), T.int64()
        logits = T.match_buffer(logits_h, (b, n, vocab), "float32")
        targets = T.match_buffer(targets_h, (b, n), "int32")
        out = T.match_buffer(out_h, (b, n), "float32")
        maxima = T.sblock_alloc_buffer((threads,), "float32", scope="shared")
        sums = T.sblock_alloc_buffer((threads,), "float32", scope="shared")
        last_maxima = T.sblock_alloc_buffer((fan,), "float32", scope="shared")
        last_sums = T.sblock_alloc_buffer((fan,), "float32", scope="shared")
        x = T.sblock_alloc_buffer((AT_ONCE,), "float32", scope="local")
        top = T.sblock_alloc_buffer((2,), "float32", scope="local")  # new, old
        total = T.sblock_alloc_buffer((1,), "float32", scope="local")
        for t in T.thread_binding(T.Cast("int32", n), thread="blockIdx.x"):
            for seq in T.thread_binding(T.Cast("int32", b), thread="blockIdx.y"):
                for tid in T.thread_binding(threads, thread="threadIdx.x"):
                    top[0] = T.float32(lowest)
                    total[0] = T.float32(0)
                    for i in T.serial(rounds):
                        for j in T.unroll(AT_ONCE):
                            x[j] = logits[seq, t, T.min((i * AT_ONCE + j) * threads + tid, vocab - 1)]
                        top[1] = top[0]
                        for j in T.unroll(AT_ONCE):
                            top[0] = T.max(top[0], x[j])
                        total[0] = total[0] * T.exp(top[1] - top[0])
                        for j in T.unroll(AT_ONCE):
                            if (i * AT_ONCE + j) * threads + tid < vocab:
                                total[0] = total[0] + T.exp(x[j] - top[0])
                    maxima[tid] = top[0]
                    sums[tid] = total[0]
                    T.tvm_storage_sync("shared")
                    if tid < fan:
                        meet(top, total, maxima, sums, threads // fan, fan, tid)
                        last_maxima[tid] = top[0]
                        last_sums[tid] = total[0]
                    T.tvm_storage_sync("shared")
                    meet(top, total, last_maxima, last_sums, fan, 1, 0)
                    if tid == 0:
                        out[seq, t] = T.if_then_else(
                            targets[seq, t] >= 0 and targets[seq, t] < vocab,
                            logits[seq, t, T.min(T.max(targets[seq, t], 0), vocab - 1)] - top[0] - T.log(total[0]),
                            T.float32(0),
                        )
    # fmt: on
    return log_prob.with_attr(ROW_KERNEL, "log_prob")
