"""What ends a round of greedy speculation on the device: which drafted tokens stand, and where all go on from.

The text itself is on the device, `history`: slot i of a sequence is its i-th id. A draft has written its tokens after
the last one; here those that stand stay, the target's own token follows them, and every position moves to it.
"""

# TVMScript is parsed by TVM, not executed: its annotations mean nothing to a type checker.
# mypy: disable-error-code="no-untyped-def,valid-type,misc"

from __future__ import annotations

from functools import cache

from tvm import tirx
from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from gpt2_tvm.kernels.gpu_prefill_attention import steps
from gpt2_tvm.kernels.gpu_sampling import ROW_KERNEL, _threads
from gpt2_tvm.kernels.spec import GpuLimits

FAR = 3.0e38  # beyond any logit, and finite: WGSL may assume that there is no infinity
LANES = 16  # of a CPU, that search side by side
TOLD = 2  # columns of `told` before the tokens: how many these are, and whether the last is in doubt


# fmt: off
@T.inline
def _accept(i, rows, capacity, best, lengths, token, positions, drafting, history, told):
    for j in T.serial(rows + TOLD):
        told[i, j] = 0
    if lengths[i] > 0 and positions[i] >= 0 and positions[i] < capacity:
        for j in T.serial(rows - 1):  # told[i, 0] counts what stands; a row in doubt is negative, so it ends that
            if told[i, 0] == j and j + 1 < lengths[i] and positions[i] + j + 1 < capacity:  # noqa: SIM102
                if best[i, j] == history[i, positions[i] + j + 1]:  # apart: both sides of an `and` are read
                    told[i, TOLD + j] = best[i, j]
                    told[i, 0] = j + 1
        token[i, 0] = best[i, told[i, 0]]
        if token[i, 0] < 0:
            token[i, 0] = -1 - token[i, 0]
            told[i, 1] = 1
        told[i, TOLD + told[i, 0]] = token[i, 0]
        told[i, 0] = told[i, 0] + 1
        positions[i] = positions[i] + told[i, 0]
        if positions[i] < capacity:
            history[i, positions[i]] = token[i, 0]
    drafting[i] = positions[i]


@cache
def accept_draft(batch: int, rows: int, capacity: int, gpu: bool) -> PrimFunc:
    """(best [B, M], lengths [B], token [B, 1], positions, drafting [B], history [B, capacity], told [B, M + 2]), int32.

    best: the target's token after each row, those in doubt as -1 - token (`near_ties`); row 0 of sequence b is
    history[b, positions[b]], its last id, and row j what was drafted at the j-th slot after it. lengths: 1 + how many
    were drafted; 0 for a sequence that takes no part.

    told: how many new tokens there are (those that stand and one of the target's own, 0 without part), 1 if the last
    of them is in doubt, and the tokens. In place: token is the last one, positions are its slot, history holds it
    there, and drafting, the draft's own positions, say the same.
    """
    if gpu:
        @T.prim_func(private=True, s_tir=True)
        def accept(
            best: T.Buffer((batch, rows), "int32"), lengths: T.Buffer((batch,), "int32"),
            token: T.Buffer((batch, 1), "int32"), positions: T.Buffer((batch,), "int32"),
            drafting: T.Buffer((batch,), "int32"), history: T.Buffer((batch, capacity), "int32"),
            told: T.Buffer((batch, rows + TOLD), "int32"),
        ):
            T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True, "op_pattern": 8})
            for i in T.thread_binding(batch, thread="blockIdx.x"):
                for _ in T.thread_binding(1, thread="threadIdx.x"):
                    _accept(i, rows, capacity, best, lengths, token, positions, drafting, history, told)

        return accept

    @T.prim_func(private=True, check_well_formed=False)
    def accept_(
        best: T.Buffer((batch, rows), "int32"), lengths: T.Buffer((batch,), "int32"),
        token: T.Buffer((batch, 1), "int32"), positions: T.Buffer((batch,), "int32"),
        drafting: T.Buffer((batch,), "int32"), history: T.Buffer((batch, capacity), "int32"),
        told: T.Buffer((batch, rows + TOLD), "int32"),
    ):
        T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True, "op_pattern": 8})
        for i in T.serial(batch):
            _accept(i, rows, capacity, best, lengths, token, positions, drafting, history, told)

    return accept_


@cache
def gpu_near_ties(rows: int, vocab: int, tolerance: float, limits: GpuLimits) -> PrimFunc:
    """(logits float32 [R, V], best int32 [R] in place): best becomes -1 - best where another logit of the row is within
    tolerance * max|logit| of the one at best (`decoding.rejection.near_tie`). One block a row."""
    threads = _threads(limits, vocab)
    rounds, halvings = steps(vocab, threads), threads.bit_length() - 1

    @T.prim_func(private=True, s_tir=True)
    def near_ties(logits: T.Buffer((rows, vocab), "float32"), best: T.Buffer((rows,), "int32")):
        T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True, "op_pattern": 8})
        second = T.sblock_alloc_buffer((threads,), "float32", scope="shared")
        lowest = T.sblock_alloc_buffer((threads,), "float32", scope="shared")
        x = T.sblock_alloc_buffer((3,), "float32", scope="local")
        for row in T.thread_binding(rows, thread="blockIdx.x"):
            for tid in T.thread_binding(threads, thread="threadIdx.x"):
                x[0] = T.float32(-FAR)
                x[1] = T.float32(FAR)
                for i in T.serial(rounds):
                    if i * threads + tid < vocab:
                        x[2] = logits[row, i * threads + tid]
                        x[1] = T.min(x[1], x[2])
                        if i * threads + tid != best[row]:
                            x[0] = T.max(x[0], x[2])
                second[tid] = x[0]
                lowest[tid] = x[1]
                T.tvm_storage_sync("shared")
                for h in T.unroll(halvings):
                    if tid < T.shift_right(threads, h + 1):
                        second[tid] = T.max(second[tid], second[tid + T.shift_right(threads, h + 1)])
                        lowest[tid] = T.min(lowest[tid], lowest[tid + T.shift_right(threads, h + 1)])
                    T.tvm_storage_sync("shared")
                if tid == 0:
                    x[0] = second[0]
                    x[2] = logits[row, best[row]]
                    x[1] = T.max(T.abs(x[2]), T.abs(lowest[0]))
                    if x[0] >= x[2] - T.float32(tolerance) * x[1]:
                        best[row] = -1 - best[row]

    named = near_ties.with_attr(ROW_KERNEL, "near_ties")
    return named.with_attr("tolerance", tirx.FloatImm("float64", tolerance))


@cache
def cpu_near_ties(batch: int, rows: int, vocab: int, tolerance: float) -> PrimFunc:
    """`gpu_near_ties` for logits [B, M, V] and best [B, M] on a CPU."""
    whole = vocab // LANES

    @T.prim_func(private=True, check_well_formed=False)
    def near_ties(logits: T.Buffer((batch, rows, vocab), "float32"), best: T.Buffer((batch, rows), "int32")):
        T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True, "op_pattern": 8})
        for i in T.serial(batch):
            for r in T.serial(rows):
                low = T.alloc_buffer((LANES,), "float32", scope="local")
                close = T.alloc_buffer((LANES,), "int32", scope="local")
                x = T.alloc_buffer((2,), "float32", scope="global")
                for v in T.vectorized(LANES):
                    low[v] = logits[i, r, best[i, r]]
                    close[v] = 0
                for j in T.serial(whole):
                    for v in T.vectorized(LANES):
                        low[v] = T.min(low[v], logits[i, r, j * LANES + v])
                x[0] = low[0]
                for v in T.serial(1, LANES):
                    x[0] = T.min(x[0], low[v])
                for j in T.serial(whole * LANES, vocab):
                    x[0] = T.min(x[0], logits[i, r, j])
                x[1] = logits[i, r, best[i, r]]
                x[0] = x[1] - T.float32(tolerance) * T.max(T.abs(x[1]), T.abs(x[0]))
                for j in T.serial(whole):
                    for v in T.vectorized(LANES):
                        close[v] = close[v] + T.Select(logits[i, r, j * LANES + v] >= x[0], 1, 0)
                for v in T.serial(1, LANES):
                    close[0] = close[0] + close[v]
                for j in T.serial(whole * LANES, vocab):
                    close[0] = close[0] + T.Select(logits[i, r, j] >= x[0], 1, 0)
                if close[0] > 1:  # itself, and another
                    best[i, r] = -1 - best[i, r]

    return near_ties
# fmt: on
