"""Two attentions of the same rows, over two parts of their context, become one: in place, for the paged KV cache.

`relax.frontend.nn.llm.kv_cache` calls it wherever a sequence that has a history is given more tokens than one. TVM's
own kernel lets every thread of a head read that head's log-sum in the place where the first to finish writes the new
one. Threads that run in step never notice; with D/4 threads a head, more than run in step on SwiftShader, lavapipe and
GPUs with narrow subgroups, the later ones weigh their elements with a sum that is merged already. Here one thread of a
block reads and writes it.
"""

# mypy: disable-error-code="valid-type,misc,no-untyped-def"
from __future__ import annotations

from typing import Any

from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from gpt2_tvm.kernels.gpu_prefill_attention import steps

THREADS = 64


def merge_states(n_head: int, head_dim: int, dtype: Any) -> PrimFunc:
    """``(values [N, H, D], sums [N, H], other_values [N, H, D], other_sums [N, H])``; the first two are overwritten.

    values: softmax-weighted, in `dtype`. sums: float32, the binary logarithm of the sum of ``2**(score * log2(e))``.
    A block for each row and head.
    """
    threads = min(THREADS, head_dim)

    # fmt: off
    @T.prim_func(private=True, s_tir=True)
    def merge_states(at_values: T.handle, at_sums: T.handle, at_other_values: T.handle, at_other_sums: T.handle):
        T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True, "op_pattern": 8})
        rows = T.int32()
        values = T.match_buffer(at_values, (rows, n_head, head_dim), dtype)
        sums = T.match_buffer(at_sums, (rows, n_head), "float32")
        other_values = T.match_buffer(at_other_values, (rows, n_head, head_dim), dtype)
        other_sums = T.match_buffer(at_other_sums, (rows, n_head), "float32")
        state = T.sblock_alloc_buffer((4,), "float32", scope="local")  # larger sum, weights of both, merged sum
        shares = T.sblock_alloc_buffer((2,), "float32", scope="shared")  # of the first and of the other, 1 together
        for row in T.thread_binding(rows, thread="blockIdx.x"):
            for head in T.thread_binding(n_head, thread="blockIdx.y"):
                for tid in T.thread_binding(threads, thread="threadIdx.x"):
                    if tid == 0:
                        state[0] = T.max(sums[row, head], other_sums[row, head])
                        state[1] = T.exp2(sums[row, head] - state[0])
                        state[2] = T.exp2(other_sums[row, head] - state[0])
                        state[3] = state[1] + state[2]
                        shares[0] = state[1] / state[3]
                        shares[1] = state[2] / state[3]
                        sums[row, head] = state[0] + T.log2(state[3])
                    T.tvm_storage_sync("shared")
                    for i in T.serial(steps(head_dim, threads)):
                        d: T.let[T.int32] = i * threads + tid
                        if d < head_dim:
                            values[row, head, d] = T.Cast(
                                dtype,
                                T.Cast("float32", values[row, head, d]) * shares[0]
                                + T.Cast("float32", other_values[row, head, d]) * shares[1],
                            )
    # fmt: on
    return merge_states
