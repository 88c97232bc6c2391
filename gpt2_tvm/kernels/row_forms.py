"""Kernels of one block a row (argmax, log-probability …) with fewer threads, for software devices.

There the threads of a block take turns, so that few do the work as fast as many; but each has its place in shared
memory, which a browser clears, and SwiftShader compiles that to a store for every element (`gpu_decode_attention`).
"""

from __future__ import annotations

from dataclasses import replace

from tvm.tirx import PrimFunc

from gpt2_tvm.kernels.accept_draft import gpu_near_ties
from gpt2_tvm.kernels.gpu_sampling import ROW_KERNEL, argmax, greedy_advance, log_prob
from gpt2_tvm.kernels.spec import GpuLimits

THREADS = 32


def few_threads(func: PrimFunc, limits: GpuLimits) -> PrimFunc | None:
    """The same kernel, grid and arguments, in blocks of `THREADS`; None for a function of another kind."""
    name = str(func.attrs[ROW_KERNEL]) if ROW_KERNEL in func.attrs else None
    logits = func.params[0]
    few = replace(limits, threads_per_block=min(THREADS, limits.threads_per_block))
    if name == "argmax":
        return argmax(int(logits.shape[0]), int(logits.shape[1]), few)
    if name == "greedy_advance":
        return greedy_advance(int(logits.shape[0]), int(logits.shape[1]), int(func.params[3].shape[1]), few)
    if name == "log_prob":
        return log_prob(int(logits.shape[2]), few)
    if name == "near_ties":
        return gpu_near_ties(int(logits.shape[0]), int(logits.shape[1]), float(func.attrs["tolerance"].value), few)
    return None
