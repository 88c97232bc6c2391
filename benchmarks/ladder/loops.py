"""Rungs 0 to 2, the same for one row and for many: W as PyTorch stores it, [N, K], one dot product an output.

0 naive       y[r, o] += x[r, k] * w[o, k]: a chain of K scalar multiply-adds, each waiting for the one before it
1 vectors     the chain keeps `lanes` partial sums in one register, added up at the end: as many multiply-adds at once
2 parallel    the outputs are shared out among the threads

and the epilogue that rungs 0 to 5 run as a second function: bias and GELU, one element at a time, with libm's exp.
"""

# TVMScript is parsed by TVM, not executed: its annotations mean nothing to a type checker.
# mypy: disable-error-code="no-untyped-def,valid-type"

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T

from ladder.problem import Problem

COLUMNS = 64  # outputs of one task


def naive(p: Problem) -> Any:
    """Rung 0: the three loops as TVM makes them from the definition."""
    M, N, K = p.rows, p.n, p.k

    @T.prim_func(s_tir=True)
    def main(x: T.Buffer((M, K), "float32"), w: T.Buffer((N, K), "float32"), y: T.Buffer((M, p.columns), "float32")):
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
        for r, o in T.grid(M, N):
            y[r, o] = T.float32(0)
            for k in range(K):
                y[r, o] = y[r, o] + x[r, k] * w[o, k]

    return main


def vectors(p: Problem, kind: Any = T.serial) -> Any:
    """Rung 1: `lanes` partial sums a dot product. kind: of the loop over rows of x and pieces of `COLUMNS` outputs."""
    M, N, K, L = p.rows, p.n, p.k, p.lanes
    PIECES = -(-N // COLUMNS)

    @T.prim_func(s_tir=True)
    def main(x: T.Buffer((M, K), "float32"), w: T.Buffer((N, K), "float32"), y: T.Buffer((M, p.columns), "float32")):
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
        for piece in kind(M * PIECES):
            for o in T.serial(T.min(COLUMNS, N - piece % PIECES * COLUMNS)):
                acc = T.alloc_buffer((L,), "float32", scope="local")
                for lane in T.vectorized(L):
                    acc[lane] = T.float32(0)
                for k in T.serial(K // L):
                    for lane in T.vectorized(L):
                        acc[lane] = (
                            acc[lane] + x[piece // PIECES, k * L + lane] * w[piece % PIECES * COLUMNS + o, k * L + lane]
                        )
                for k in T.serial(K % L):
                    acc[0] = (
                        acc[0] + x[piece // PIECES, K // L * L + k] * w[piece % PIECES * COLUMNS + o, K // L * L + k]
                    )
                y[piece // PIECES, piece % PIECES * COLUMNS + o] = T.float32(0)
                for lane in T.unroll(L):
                    y[piece // PIECES, piece % PIECES * COLUMNS + o] = (
                        y[piece // PIECES, piece % PIECES * COLUMNS + o] + acc[lane]
                    )

    return main


def parallel(p: Problem) -> Any:
    """Rung 2: the same loop, shared out among the threads."""
    return vectors(p, T.parallel)


def bias_gelu(p: Problem, parallel: bool) -> Any:
    """y := gelu(y + bias), in place, with the target's own tanh, which LLVM makes a call for each element."""
    M, N = p.rows, p.n
    C = next(c for c in range(min(N, 256), 0, -1) if N % c == 0)  # columns of one task
    kind = T.parallel if parallel else T.serial

    @T.prim_func(s_tir=True)
    def main(y: T.Buffer((M, p.columns), "float32"), bias: T.Buffer((N,), "float32")):
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
        for t in kind(M * (N // C)):
            for c in T.serial(C):
                v = T.alloc_buffer((1,), "float32", scope="local")
                v[0] = y[t // (N // C), t % (N // C) * C + c] + bias[t % (N // C) * C + c]
                y[t // (N // C), t % (N // C) * C + c] = (
                    T.float32(0.5)
                    * v[0]
                    * (
                        T.float32(1)
                        + T.tanh(T.float32(0.7978845608028654) * (v[0] + T.float32(0.044715) * v[0] * v[0] * v[0]))
                    )
                )

    return main
