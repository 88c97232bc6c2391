"""What the host is told of a pass over a tree: the tokens that came of it, and what streams think may follow.

Few integers in place of logits: a read-back of these is the only one of a step.
"""

# TVMScript is parsed by TVM, not executed: its annotations mean nothing to a type checker.
# mypy: disable-error-code="no-untyped-def,valid-type,misc"

from __future__ import annotations

from functools import cache

from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from gpt2_tvm.kernels.gpu_prefill_attention import steps
from gpt2_tvm.kernels.gpu_sampling import _threads
from gpt2_tvm.kernels.math import exp
from gpt2_tvm.kernels.spec import GpuLimits

CHOICES = 4  # of each stream that are candidates at all
TOLD = 2  # columns before the tokens: how many these are, and whether the last is in doubt
LOWEST = -3.0e38  # below any logit, and finite: WGSL may assume that there is no infinity
LANES = 16  # that search side by side


# fmt: off
@cache
def cpu_choices(batch: int, rows: int, vocab: int, count: int) -> PrimFunc:
    """(logits float32 [B, G, V], counts int32 [B]) -> (ids int32, logs float32 [B, G, count]): the most likely tokens
    of each row, in order (of equal ones the lowest first), and their log-probabilities; 0 where counts are."""
    whole = vocab // LANES

    @T.prim_func(private=True, check_well_formed=False)
    def choices(
        logits: T.Buffer((batch, rows, vocab), "float32"), counts: T.Buffer((batch,), "int32"),
        ids: T.Buffer((batch, rows, count), "int32"), logs: T.Buffer((batch, rows, count), "float32"),
    ):
        T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True, "op_pattern": 8})
        for i in T.serial(batch):
            for r in T.serial(rows):
                if counts[i] <= 0:
                    for c in T.serial(count):
                        ids[i, r, c] = 0
                        logs[i, r, c] = T.float32(0)
                if counts[i] > 0:
                    top = T.alloc_buffer((LANES,), "float32", scope="local")
                    where = T.alloc_buffer((LANES,), "int32", scope="local")
                    for c in T.serial(count):
                        before = T.alloc_buffer((1,), "float32", scope="global")
                        last = T.alloc_buffer((1,), "int32", scope="global")
                        before[0] = T.float32(-LOWEST)
                        last[0] = -1
                        if c > 0:
                            before[0] = logs[i, r, T.max(c - 1, 0)]
                            last[0] = ids[i, r, T.max(c - 1, 0)]
                        for v in T.vectorized(LANES):
                            top[v] = T.float32(LOWEST)
                            where[v] = vocab
                        for j in T.serial(whole):
                            for v in T.vectorized(LANES):
                                where[v] = T.Select(
                                    T.And(
                                        logits[i, r, j * LANES + v] > top[v],
                                        T.Or(logits[i, r, j * LANES + v] < before[0],
                                             T.And(logits[i, r, j * LANES + v] == before[0],
                                                   j * LANES + v > last[0]))),
                                    j * LANES + v, where[v])
                                top[v] = T.Select(where[v] == j * LANES + v, logits[i, r, j * LANES + v], top[v])
                        for j in T.serial(whole * LANES, vocab):
                            if (logits[i, r, j] > top[0] or (logits[i, r, j] == top[0] and j < where[0])) and (
                                    logits[i, r, j] < before[0] or (logits[i, r, j] == before[0] and j > last[0])):
                                top[0] = logits[i, r, j]
                                where[0] = j
                        for v in T.serial(1, LANES):
                            if top[v] > top[0] or (top[v] == top[0] and where[v] < where[0]):
                                top[0] = top[v]
                                where[0] = where[v]
                        ids[i, r, c] = T.min(where[0], vocab - 1)
                        logs[i, r, c] = top[0]
                    total = T.alloc_buffer((2,), "float32", scope="global")
                    total[0] = logs[i, r, 0]
                    for v in T.vectorized(LANES):
                        top[v] = T.float32(0)
                    for j in T.serial(whole):
                        for v in T.vectorized(LANES):
                            top[v] = top[v] + exp(logits[i, r, j * LANES + v] - total[0])
                    total[1] = T.float32(0)
                    for v in T.serial(LANES):
                        total[1] = total[1] + top[v]
                    for j in T.serial(whole * LANES, vocab):
                        total[1] = total[1] + exp(logits[i, r, j] - total[0])
                    for c in T.serial(count):
                        logs[i, r, c] = logs[i, r, c] - total[0] - T.log(total[1])

    return choices


@cache
def gpu_choices(rows: int, vocab: int, count: int, limits: GpuLimits) -> PrimFunc:
    """`cpu_choices` of logits [R, V] alone -> ids, logs [R, count]. One block a row."""
    threads = _threads(limits, vocab)
    rounds, halvings = steps(vocab, threads), threads.bit_length() - 1

    @T.prim_func(private=True, s_tir=True)
    def choices(
        logits: T.Buffer((rows, vocab), "float32"), ids: T.Buffer((rows, count), "int32"),
        logs: T.Buffer((rows, count), "float32"),
    ):
        T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True, "op_pattern": 8})
        best = T.sblock_alloc_buffer((threads,), "float32", scope="shared")
        at = T.sblock_alloc_buffer((threads,), "int32", scope="shared")
        x = T.sblock_alloc_buffer((4,), "float32", scope="local")  # a logit, the last choice's, the first's, the best
        k = T.sblock_alloc_buffer((3,), "int32", scope="local")  # another's place, the last choice, the best's
        for row in T.thread_binding(rows, thread="blockIdx.x"):
            for tid in T.thread_binding(threads, thread="threadIdx.x"):
                x[1] = T.float32(-LOWEST)
                k[1] = -1
                for c in T.serial(count):
                    x[3] = T.float32(LOWEST)
                    k[2] = vocab
                    for i in T.serial(rounds):
                        if i * threads + tid < vocab:
                            x[0] = logits[row, i * threads + tid]
                            if (x[0] > x[3]
                                    and (x[0] < x[1] or (x[0] == x[1] and i * threads + tid > k[1]))):
                                x[3] = x[0]
                                k[2] = i * threads + tid
                    best[tid] = x[3]
                    at[tid] = k[2]
                    T.tvm_storage_sync("shared")
                    for h in T.unroll(halvings):
                        x[0] = best[T.min(tid + T.shift_right(threads, h + 1), threads - 1)]
                        k[0] = at[T.min(tid + T.shift_right(threads, h + 1), threads - 1)]
                        T.tvm_storage_sync("shared")
                        if x[0] > x[3] or (x[0] == x[3] and k[0] < k[2]):  # threads past the half have no say later
                            x[3] = x[0]
                            k[2] = k[0]
                        best[tid] = x[3]
                        at[tid] = k[2]
                        T.tvm_storage_sync("shared")
                    x[1] = best[0]
                    k[1] = at[0]
                    k[1] = T.min(k[1], vocab - 1)
                    if c == 0:
                        x[2] = x[1]
                    if tid == 0:
                        ids[row, c] = k[1]
                        logs[row, c] = x[1] - x[2]
                    T.tvm_storage_sync("shared")
                x[3] = T.float32(0)
                for i in T.serial(rounds):
                    if i * threads + tid < vocab:
                        x[3] = x[3] + T.exp(logits[row, i * threads + tid] - x[2])
                best[tid] = x[3]
                T.tvm_storage_sync("shared")
                for h in T.unroll(halvings):
                    if tid < T.shift_right(threads, h + 1):
                        best[tid] = best[tid] + best[tid + T.shift_right(threads, h + 1)]
                    T.tvm_storage_sync("shared")
                if tid == 0:
                    for c in T.serial(count):
                        logs[row, c] = logs[row, c] - T.log(best[0])

    return choices


@T.inline
def _tell(i, rows, streams, count, best, path, counts, ids, logs, told):
    told[i, 0] = counts[i]
    told[i, 1] = 0
    for j in T.serial(rows):
        told[i, TOLD + j] = 0
        if j < counts[i]:
            told[i, TOLD + j] = best[i, path[i, j]]
            if told[i, TOLD + j] < 0:  # the branch ends at a row in doubt
                told[i, TOLD + j] = -1 - told[i, TOLD + j]
                told[i, 1] = 1
    for g in T.serial(streams):
        for c in T.serial(count):
            told[i, TOLD + rows + g * count + c] = ids[i, g, c]
            told[i, TOLD + rows + (streams + g) * count + c] = T.reinterpret("int32", logs[i, g, c])


@cache
def tell_host(batch: int, rows: int, streams: int, count: int, gpu: bool) -> PrimFunc:
    """(best, path int32 [B, K], counts int32 [B], ids int32, logs float32 [B, G, count]) -> told int32 [B, 2 + K +
    2 * G * count].

    best: the most likely token after each row, -1 - token for one in doubt; path, counts: `stream_tree.accept_branch`'s
    of these. told: how many new tokens there are (0 for a sequence without part), 1 if the last of them is in doubt,
    the tokens, and of every stream the ids and the bits of the logs.
    """
    columns = TOLD + rows + 2 * streams * count
    if gpu:
        @T.prim_func(private=True, s_tir=True)
        def tell(
            best: T.Buffer((batch, rows), "int32"), path: T.Buffer((batch, rows), "int32"),
            counts: T.Buffer((batch,), "int32"), ids: T.Buffer((batch, streams, count), "int32"),
            logs: T.Buffer((batch, streams, count), "float32"), told: T.Buffer((batch, columns), "int32"),
        ):
            T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True, "op_pattern": 8})
            for i in T.thread_binding(batch, thread="blockIdx.x"):
                for _ in T.thread_binding(1, thread="threadIdx.x"):
                    _tell(i, rows, streams, count, best, path, counts, ids, logs, told)

        return tell

    @T.prim_func(private=True, check_well_formed=False)
    def tell_(
        best: T.Buffer((batch, rows), "int32"), path: T.Buffer((batch, rows), "int32"),
        counts: T.Buffer((batch,), "int32"), ids: T.Buffer((batch, streams, count), "int32"),
        logs: T.Buffer((batch, streams, count), "float32"), told: T.Buffer((batch, columns), "int32"),
    ):
        T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True, "op_pattern": 8})
        for i in T.serial(batch):
            _tell(i, rows, streams, count, best, path, counts, ids, logs, told)

    return tell_
# fmt: on
