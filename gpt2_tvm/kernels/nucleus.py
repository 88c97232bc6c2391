"""A draw from the nucleus (top-p) of sorted probabilities, as MLC's engines ask for it.

Signature: mlc-llm, python/mlc_llm/compiler_pass/attach_sampler.py, sample_with_top_p.
"""

from __future__ import annotations

from functools import cache

from tvm.script import tirx as T
from tvm.tirx import PrimFunc

THREADS = 256


@cache
def nucleus(gpu: bool) -> PrimFunc:
    """``(probs [b, V] float32, falling; indices [b, V]; draws [n] float32 in [0, 1); rows [n]; top_p [b] float32;
    out [n])``: for each draw a token of row rows[i], from the smallest set of the likeliest tokens whose mass reaches
    top_p (Holtzman et al. 2020, section 3.1), never an empty one. float32 and int32.

    On a GPU a block serves a draw: its threads sum parts of the row, then one walks over the sums and into two parts.
    """
    threads = THREADS if gpu else 1

    # fmt: off
    @T.inline
    def walk(at, part, parts, probs, row, V, wanted):
        """at: mass up to an index, that index; then scratch. Goes on until the mass reaches `wanted`."""
        at[0] = T.float32(0)
        at[1] = T.float32(0)  # of parts, then of tokens: exact below 2^24
        for j in T.serial(parts - 1):
            at[4] = part[j]  # a condition may not read shared memory
            if at[1] == T.Cast("float32", j) and at[0] + at[4] < wanted:
                at[0] = at[0] + at[4]
                at[1] = at[1] + T.float32(1)
        at[3] = at[1] * T.Cast("float32", (V + parts - 1) // parts)
        at[1] = at[3]
        for j in T.serial((V + parts - 1) // parts):
            at[4] = probs[row, T.min(T.Cast("int32", at[3]) + j, V - 1)]
            if (
                at[1] == at[3] + T.Cast("float32", j)
                and at[1] < T.Cast("float32", V - 1)
                and at[0] + at[4] < wanted
            ):
                at[0] = at[0] + at[4]
                at[1] = at[1] + T.float32(1)

    @T.inline
    def draw(i, thread, probs, indices, draws, rows, top_p, out, V, part, at):
        part[thread] = T.float32(0)
        for j in T.serial((V + threads - 1) // threads):
            if thread * ((V + threads - 1) // threads) + j < V:
                part[thread] = part[thread] + probs[rows[i], thread * ((V + threads - 1) // threads) + j]
    # fmt: on

    if gpu:
        # fmt: off
        @T.prim_func(private=True, s_tir=True)
        def sample_from_nucleus(
            at_probs: T.handle, at_indices: T.handle, at_draws: T.handle, at_rows: T.handle, at_top: T.handle,
            at_out: T.handle,
        ):
            T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True, "op_pattern": 8})
            b, V, n = T.int32(), T.int32(), T.int32()
            probs = T.match_buffer(at_probs, (b, V), "float32")
            indices = T.match_buffer(at_indices, (b, V), "int32")
            draws = T.match_buffer(at_draws, (n,), "float32")
            rows = T.match_buffer(at_rows, (n,), "int32")
            top_p = T.match_buffer(at_top, (b,), "float32")
            out = T.match_buffer(at_out, (n,), "int32")
            for i in T.thread_binding(n, thread="blockIdx.x"):
                for thread in T.thread_binding(threads, thread="threadIdx.x"):
                    part = T.sblock_alloc_buffer((threads,), "float32", scope="shared")
                    at = T.sblock_alloc_buffer((5,), "float32", scope="local")
                    draw(i, thread, probs, indices, draws, rows, top_p, out, V, part, at)
                    T.tvm_storage_sync("shared")
                    if thread == 0:
                        walk(at, part, threads, probs, rows[i], V, top_p[rows[i]])
                        at[2] = draws[i] * (at[0] + probs[rows[i], T.Cast("int32", at[1])])
                        walk(at, part, threads, probs, rows[i], V, at[2])
                        out[i] = indices[rows[i], T.Cast("int32", at[1])]
        # fmt: on
        return sample_from_nucleus

    # fmt: off
    @T.prim_func(private=True, s_tir=True)
    def sample_from_nucleus_cpu(
        at_probs: T.handle, at_indices: T.handle, at_draws: T.handle, at_rows: T.handle, at_top: T.handle,
        at_out: T.handle,
    ):
        T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True, "op_pattern": 8})
        b, V, n = T.int32(), T.int32(), T.int32()
        probs = T.match_buffer(at_probs, (b, V), "float32")
        indices = T.match_buffer(at_indices, (b, V), "int32")
        draws = T.match_buffer(at_draws, (n,), "float32")
        rows = T.match_buffer(at_rows, (n,), "int32")
        top_p = T.match_buffer(at_top, (b,), "float32")
        out = T.match_buffer(at_out, (n,), "int32")
        part = T.sblock_alloc_buffer((1,), "float32", scope="global")
        at = T.sblock_alloc_buffer((5,), "float32", scope="global")
        for i in T.serial(n):
            draw(i, 0, probs, indices, draws, rows, top_p, out, V, part, at)
            walk(at, part, 1, probs, rows[i], V, top_p[rows[i]])
            at[2] = draws[i] * (at[0] + probs[rows[i], T.Cast("int32", at[1])])
            walk(at, part, 1, probs, rows[i], V, at[2])
            out[i] = indices[rows[i], T.Cast("int32", at[1])]
    # fmt: on
    return sample_from_nucleus_cpu
