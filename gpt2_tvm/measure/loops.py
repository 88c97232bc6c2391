"""Two loops that reach what this machine can: one only reads memory, one only multiplies and adds.

Both are TVM's, compiled for the processor at hand when first asked for, and run on the same pool of threads as the
engine's kernels: what they reach is what a kernel of ours could reach, whatever numpy or a data sheet says.
"""

# TVMScript is parsed by TVM, not executed: its annotations mean nothing to a type checker.
# mypy: disable-error-code="no-untyped-def,valid-type"

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

READ_BYTES = 256 << 20  # far more than a cache holds
# Streams that a thread reads side by side: each is a prefetcher's own, and one core needs several to be kept busy. With
# four of them it is no faster to ask for lines ahead as well, as a GEMV of one stream does (schedules/cpu_gemv.py).
STREAMS = 4
VECTORS = 4  # of a stream in each step: a cache line or more with any vector width
FMA_STEPS = 1_000_000
FMA_ROWS = 8  # rows of two vectors: 16 sums side by side hide the latency of a multiply-add


@dataclass(frozen=True)
class Loop:
    """A compiled loop. run: one pass over all of its work. amount: bytes or floating-point operations of a pass."""

    run: Callable[[], Any]
    amount: float

    def rate(self, passes: int = 1) -> float:
        """Time some passes in a row -> 10^9 bytes, or operations, a second."""
        start = time.perf_counter()
        for _ in range(passes):
            self.run()
        return passes * self.amount / (time.perf_counter() - start) / 1e9


def can_compile() -> bool:
    """Whether this TVM has its compiler; a packed artifact brings the runtime alone."""
    import tvm

    return not getattr(tvm.base, "_RUNTIME_ONLY", False)


def _compiled(func: Any, target: Any, threads: int) -> Callable[..., Any]:
    import tvm

    from gpt2_tvm.runners.threads import prepare_pools, use_threads

    prepare_pools()
    if use_threads(threads) != threads:
        raise RuntimeError(f"this process's pool has fewer than {threads} threads")
    library = tvm.compile(tvm.IRModule({"main": func.with_attr("global_symbol", "main")}), target=target.tvm_target())
    return library["main"]


def _target(given: Any) -> tuple[Any, int]:
    """The target (this processor, unless given) and its float32 lanes."""
    from targets import load_target

    target = given or load_target("cpu")
    return target, (target.limits.vector_bits or 128) // 32


def read_loop(threads: int, nbytes: int = READ_BYTES, target: Any = None, streams: int = STREAMS) -> Loop:
    """A loop that adds up `nbytes` of float32 (about: whole steps), each thread its own part."""
    import tvm
    from tvm.script import tirx as T

    target, lanes = _target(target)
    step = VECTORS * lanes
    steps = max(1, nbytes // (4 * threads * streams * step))

    # fmt: off
    @T.prim_func(s_tir=True)
    def main(
        x: T.Buffer((threads, streams, steps, step), "float32"),
        out: T.Buffer((threads, streams, step), "float32"),
    ):
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
        for t in T.parallel(threads):
            sums = T.alloc_buffer((streams * VECTORS, lanes), "float32", scope="local")
            for r in T.unroll(streams * VECTORS):
                for v in T.vectorized(lanes):
                    sums[r, v] = T.float32(0)
            for i in T.serial(steps):
                for s in T.unroll(streams):
                    for r in T.unroll(VECTORS):
                        for v in T.vectorized(lanes):
                            sums[s * VECTORS + r, v] = sums[s * VECTORS + r, v] + x[t, s, i, r * lanes + v]
            for s in T.unroll(streams):
                for r in T.unroll(VECTORS):
                    for v in T.vectorized(lanes):
                        out[t, s, r * lanes + v] = sums[s * VECTORS + r, v]
    # fmt: on

    call = _compiled(main, target, threads)
    x = tvm.runtime.tensor(np.ones((threads, streams, steps, step), np.float32))
    out = tvm.runtime.tensor(np.zeros((threads, streams, step), np.float32))
    call(x, out)
    if not (out.numpy() == steps).all():
        raise RuntimeError("the read loop did not add up what it was given")
    return Loop(lambda: call(x, out), 4 * threads * streams * step * steps)


def fma_loop(threads: int, steps: int = FMA_STEPS, target: Any = None) -> Loop:
    """A loop that does nothing but multiply-adds of vector registers, on every thread."""
    import tvm
    from tvm.script import tirx as T

    target, lanes = _target(target)

    # fmt: off
    @T.prim_func(s_tir=True)
    def main(
        x: T.Buffer((1,), "float32"),
        out: T.Buffer((threads, FMA_ROWS, 2 * lanes), "float32"),
        steps: T.int64,
    ):
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
        for t in T.parallel(threads):
            a = T.alloc_buffer((FMA_ROWS, lanes), "float32", scope="local")
            b = T.alloc_buffer((FMA_ROWS, lanes), "float32", scope="local")
            for r in T.unroll(FMA_ROWS):
                for v in T.vectorized(lanes):
                    a[r, v] = T.float32(0)
                    b[r, v] = T.float32(0)
            for _ in T.serial(steps):
                for r in T.unroll(FMA_ROWS):
                    for v in T.vectorized(lanes):
                        a[r, v] = a[r, v] * x[0] + x[0]
                        b[r, v] = b[r, v] * x[0] + x[0]
            for r in T.unroll(FMA_ROWS):
                for v in T.vectorized(lanes):
                    out[t, r, v] = a[r, v]
                    out[t, r, lanes + v] = b[r, v]
    # fmt: on

    call = _compiled(main, target, threads)
    x = tvm.runtime.tensor(np.full(1, 0.5, np.float32))
    out = tvm.runtime.tensor(np.zeros((threads, FMA_ROWS, 2 * lanes), np.float32))
    call(x, out, 64)
    if not np.allclose(out.numpy(), 1):  # a := a / 2 + 1/2 goes to 1
        raise RuntimeError("the multiply-add loop did not converge to 1")
    return Loop(lambda: call(x, out, steps), 2.0 * threads * FMA_ROWS * 2 * lanes * steps)
