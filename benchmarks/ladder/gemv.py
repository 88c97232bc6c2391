"""Rungs 3 to 5 for one row (decode): W in panels [P, K, NR], so that a register holds NR / 2 columns of one k.

3 panels        no sum across a register's lanes is left; the panel is read strictly forwards
4 accumulators  k is taken in turns by several sums: a multiply-add need not wait for the one before it
5 streams       neighbouring panels side by side: the prefetcher runs ahead on as many streams

NR is two vector registers, so every sum has two buffers, `a` and `b`: TVM puts small ones on the stack, and LLVM moves
those into registers.
"""

# TVMScript is parsed by TVM, not executed: its annotations mean nothing to a type checker.
# mypy: disable-error-code="no-untyped-def,valid-type"

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T

from ladder.problem import Problem


def panels(p: Problem) -> Any:
    """Rung 3: one sum for each of the panel's two registers."""
    return _product(p, sums=1, streams=1)


def accumulators(p: Problem) -> Any:
    """Rung 4: up to eight sums for each of the two."""
    return _product(p, sums=p.divisor_of_k(min(8, p.tile_rows)), streams=1)


def streams(p: Problem) -> Any:
    """Rung 5: four panels at once (two where registers are few), the sums shared out among them."""
    side = 4 if p.tile_rows >= 8 else 2
    return _product(p, sums=p.divisor_of_k(min(8, p.tile_rows) // side), streams=side)


def _product(p: Problem, sums: int, streams: int) -> Any:
    N, K, L, NR, P = p.columns, p.k, p.lanes, p.panel_rows, p.panels
    U, S = sums, streams

    @T.prim_func(s_tir=True)
    def main(x: T.Buffer((1, K), "float32"), w: T.Buffer((P, K, NR), "float32"), y: T.Buffer((1, N), "float32")):
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
        for task in T.parallel((P + S - 1) // S):
            a = T.alloc_buffer((U * S, L), "float32", scope="local")
            b = T.alloc_buffer((U * S, L), "float32", scope="local")
            for i in T.unroll(U * S):
                for lane in T.vectorized(L):
                    a[i, lane] = T.float32(0)
                for lane in T.vectorized(L):
                    b[i, lane] = T.float32(0)
            for k in T.serial(K // U):
                for u in T.unroll(U):
                    for s in T.unroll(S):  # the last panel stands in for those that the last task lacks
                        for lane in T.vectorized(L):
                            a[u * S + s, lane] = (
                                a[u * S + s, lane] + x[0, k * U + u] * w[T.min(task * S + s, P - 1), k * U + u, lane]
                            )
                        for lane in T.vectorized(L):
                            b[u * S + s, lane] = (
                                b[u * S + s, lane]
                                + x[0, k * U + u] * w[T.min(task * S + s, P - 1), k * U + u, L + lane]
                            )
            for u in T.unroll(U - 1):
                for s in T.unroll(S):
                    for lane in T.vectorized(L):
                        a[s, lane] = a[s, lane] + a[(u + 1) * S + s, lane]
                    for lane in T.vectorized(L):
                        b[s, lane] = b[s, lane] + b[(u + 1) * S + s, lane]
            for s in T.unroll(S):
                for lane in T.vectorized(L):
                    y[0, T.min(task * S + s, P - 1) * NR + lane] = a[s, lane]
                for lane in T.vectorized(L):
                    y[0, T.min(task * S + s, P - 1) * NR + L + lane] = b[s, lane]

    return main
