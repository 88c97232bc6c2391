"""Inputs for a product, what it must give, and whether it does."""

from __future__ import annotations

import math
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from gpt2_tvm.quantization import groups, words
from tuning.children import Failure
from tuning.workloads import Workload

# Of results of size about 1: float32 sums in another order, and float16 results rounded to 11 bits.
TOLERANCE = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 8e-2}


def dtype_of(name: str) -> np.dtype:
    """numpy's dtype of that name, bfloat16 included."""
    return np.dtype(ml_dtypes.bfloat16) if name == "bfloat16" else np.dtype(name)


@dataclass(frozen=True)
class Example:
    """Arrays in the order of the function's parameters, x [rows.., K], W [N, K] (or its words of 32 bits, and scales),
    then bias [N] and residual [rows.., N] where the epilogue has them, and the result in float64. Results are of size
    about 1."""

    arrays: list[np.ndarray]
    expected: np.ndarray
    output_dtype: str


def make_example(workload: Workload, shapes: list[tuple[int, ...]], dtypes: list[str], seed: int = 0) -> Example:
    """Random inputs of a workload. shapes, dtypes: of all parameters, the output last.

    Raises Failure("invalid") for a function whose parameters do not follow x, W, [scales], [bias], [residual], y.
    """
    random = np.random.default_rng(seed)
    weight, w = _weight(random, workload, dtypes)
    others = [random.standard_normal(shape, np.float32) for shape in (shapes[0], *shapes[1 + len(weight) : -1])]
    names = (dtypes[0], *dtypes[1 + len(weight) : -1])
    first, *after = [a.astype(dtype_of(d)) for a, d in zip(others, names, strict=True)]
    arrays = [first, *weight, *after]
    x, *rest = [a.astype(np.float64) for a in (first, *after)]
    y = x.reshape(-1, workload.reduced) @ w.T
    y = y.reshape(shapes[-1])
    for step in workload.epilogue:
        if step == "bias":
            y = y + rest.pop(0)
        elif step == "residual":
            y = y + rest.pop(0).reshape(y.shape)
        else:
            y = activation(step, y)
    if rest:
        raise Failure(
            "invalid", f"{workload.name}: {len(rest)} inputs that its epilogue {workload.epilogue} does not use"
        )
    return Example(arrays, y, dtypes[-1])


def _weight(random: np.random.Generator, workload: Workload, dtypes: list[str]) -> tuple[list[np.ndarray], np.ndarray]:
    """(the arrays that a weight [N, K] is stored in, its values in float64)."""
    n, k = workload.outputs, workload.reduced
    full = random.standard_normal((n, k), np.float32) / math.sqrt(k)
    if dtypes[1] != "uint32":
        stored = full.astype(dtype_of(dtypes[1]))
        return [stored], stored.astype(np.float64)
    if workload.dtype == "float16":
        halves = full.astype(np.float16)
        return [words.pack_halves(halves)], halves.astype(np.float64)
    if workload.dtype == "int8":  # a scale a row
        scales = np.abs(full).max(1) / 127
        quantised = np.rint(full / scales[:, None]).astype(np.int8)
        stored_scales = scales.astype(dtype_of(dtypes[2]))
        return [words.pack_words(quantised), stored_scales], quantised * stored_scales.astype(np.float64)[:, None]
    if workload.dtype == "int4":  # a scale for 32 neighbours
        packed, scales = groups.quantise_groups(workload.name, full, dtypes[2])
        return [packed, scales], groups.dequantise_groups(packed, scales, k).astype(np.float64)
    raise Failure("invalid", f"{workload.name}: {workload.dtype} weights in words, which the reference does not know")


def activation(name: str, y: np.ndarray) -> np.ndarray:
    """GPT-2's activations in float64."""
    if name == "gelu_new":
        return 0.5 * y * (1 + np.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)))
    if name == "gelu":
        return 0.5 * y * (1 + np.vectorize(math.erf, otypes=[float])(y / math.sqrt(2)))
    if name == "relu":
        return np.maximum(y, 0)
    if name == "silu":
        return y / (1 + np.exp(-y))
    if name == "tanh":
        return np.tanh(y)
    raise Failure("invalid", f"an epilogue with {name}, which the reference does not know")


def compare(result: np.ndarray, example: Example) -> float:
    """The largest absolute error; Failure("wrong-result") where it is beyond the dtype's tolerance or not a number."""
    error = np.abs(result.astype(np.float64) - example.expected)
    worst = float(error.max()) if np.isfinite(error).all() else math.inf
    limit = TOLERANCE[example.output_dtype]
    if not worst <= limit:
        wrong = int((~(error <= limit)).sum())
        raise Failure(
            "wrong-result", f"{wrong} of {error.size} outputs are off, by up to {worst:.3g} (allowed {limit:g})"
        )
    return worst
