"""What a core's units can do, measured: the rates that an inner loop's instruction counts are held against.

Tables of a processor's ports are wrong or missing as often as not (LLVM's model of Zen 5 is Zen 4's, with half of its
multiply-adds a cycle), and this machine may be any. So four loops that do nothing but one thing say what it can do:
vectors loaded from L1, float16 and int8 vectors widened to float32, and one multiply-add that waits for the last.
"""

# TVMScript is parsed by TVM, not executed: its annotations mean nothing to a type checker.
# mypy: disable-error-code="no-untyped-def,valid-type"

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import tvm
from tvm.script import tirx as T

from gpt2_tvm.measure.loops import fma_loop, read_loop
from ladder.assembly import hottest_loop
from ladder.kernels import compiled, seconds

VECTORS, SUMS = 128, 8  # vectors that stay in L1, and sums that hide an addition's latency
STEPS = 20_000


@dataclass(frozen=True)
class Ports:
    """Rates of all threads together, a second: vectors loaded from L1, conversions by the dtype that they start from;
    multiply-adds in GFLOP/s, memory in GB/s. latency_ns: of one multiply-add."""

    read_gb_s: float
    fma_gflop_s: float
    loads: float
    converts: dict[str, float]
    latency_ns: float


def sum_loop(target: Any, threads: int, dtype: str) -> tuple[Callable[[], Any], int, int]:
    """A call that adds up vectors that lie in L1; how many vectors, and how many conversions it executes for them."""
    L = int(target.limits.vector_bits or 128) // 32

    # fmt: off
    @T.prim_func(s_tir=True)
    def main(
        x: T.Buffer((threads, VECTORS * L), dtype), out: T.Buffer((threads, SUMS * L), "float32"), steps: T.int64
    ):
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
        for t in T.parallel(threads):
            acc = T.alloc_buffer((SUMS, L), "float32", scope="local")
            for r in T.unroll(SUMS):
                for v in T.vectorized(L):
                    acc[r, v] = T.float32(0)
            for _ in T.serial(steps):
                for i in T.serial(VECTORS // SUMS):
                    for r in T.unroll(SUMS):
                        for v in T.vectorized(L):
                            acc[r, v] = acc[r, v] + T.Cast("float32", x[t, (i * SUMS + r) * L + v])
            for r in T.unroll(SUMS):
                for v in T.vectorized(L):
                    out[t, r * L + v] = acc[r, v]
    # fmt: on

    executable = compiled(main, target)
    loop, _ = hottest_loop(executable.mod.inspect_source("asm"))
    vectors = threads * VECTORS * STEPS
    converts = vectors * loop.converts // max(1, loop.arithmetic)  # one addition a vector
    x = tvm.runtime.tensor(np.ones((threads, VECTORS * L), dtype))
    out = tvm.runtime.tensor(np.zeros((threads, SUMS * L), np.float32))
    call = executable["main"]
    return lambda: call(x, out, STEPS), vectors, converts


def chain_loop(target: Any) -> tuple[Callable[[], Any], int]:
    """A call whose multiply-adds wait for each other, on one thread; and how many they are."""

    # fmt: off
    @T.prim_func(s_tir=True)
    def main(x: T.Buffer((1,), "float32"), out: T.Buffer((1,), "float32"), steps: T.int64):
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
        acc = T.alloc_buffer((1,), "float32", scope="local")
        acc[0] = T.float32(0)
        for _ in T.serial(steps):
            acc[0] = acc[0] * x[0] + x[0]
        out[0] = acc[0]
    # fmt: on

    call = compiled(main, target)["main"]
    x = tvm.runtime.tensor(np.full(1, 0.5, np.float32))
    out = tvm.runtime.tensor(np.zeros(1, np.float32))
    return lambda: call(x, out, 1_000_000), 1_000_000


def measure_ports(target: Any, threads: int, repeats: int = 7) -> Ports:
    """The best of `repeats` turns each, in rounds: what a unit can do, other programs only take from it."""
    read, fma = read_loop(threads, target=target), fma_loop(threads, target=target)
    chain, steps = chain_loop(target)
    sums = {dtype: sum_loop(target, threads, dtype) for dtype in ("float32", "float16", "int8")}
    calls = {"chain": chain, **{dtype: call for dtype, (call, _, _) in sums.items()}}
    best = dict.fromkeys(calls, float("inf"))
    rates = {"read": 0.0, "fma": 0.0}
    for _ in range(repeats):
        rates = {"read": max(rates["read"], read.rate()), "fma": max(rates["fma"], fma.rate())}
        best = {name: min(best[name], seconds(call)) for name, call in calls.items()}
    return Ports(
        read_gb_s=rates["read"],
        fma_gflop_s=rates["fma"],
        loads=sums["float32"][1] / best["float32"],
        converts={d: sums[d][2] / best[d] for d in ("float16", "int8") if sums[d][2]},
        latency_ns=best["chain"] / steps * 1e9,
    )
