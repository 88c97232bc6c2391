"""The vectorisable float32 functions against numpy and math in float64, and the code that LLVM makes of them."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import tvm
import tvm_ffi
from tvm import te, tirx

from gpt2_tvm.errors import UserError
from gpt2_tvm.kernels import math as kernel_math
from gpt2_tvm.schedules.cpu_reduction import CpuReduction
from targets import load_target

NORMAL = float(np.finfo(np.float32).tiny)
erf = np.vectorize(math.erf)
SQRT_HALF, TANH_SCALE = math.sqrt(0.5), math.sqrt(2 / math.pi)

# Every binade, the range where results are neither 0 nor inf, and around the splits of tanh and erf
GRID = np.concatenate(
    [
        np.linspace(-104, 88.72, 100_000),
        np.linspace(-8, 8, 100_000),
        np.geomspace(1e-38, 3e38, 50_000),
        -np.geomspace(1e-38, 3e38, 50_000),
        np.linspace(0.62, 0.63, 5_000),
        np.linspace(0.99, 1.01, 5_000),
    ]
).astype(np.float32)

REFERENCE: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "exp": np.exp,
    "tanh": np.tanh,
    "erf": erf,
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "gelu_new": lambda x: 0.5 * x * (1 + np.tanh(TANH_SCALE * (x + 0.044715 * x**3))),
    "gelu": lambda x: 0.5 * x * (1 + erf(x * SQRT_HALF)),
    "relu": lambda x: np.maximum(x, 0),
    "silu": lambda x: x / (1 + np.exp(-x)),
}


def scheduled(function: Callable[[Any], Any], target: Any, dtype: str = "float32") -> tvm.IRModule:
    """y[i] = function(x[i]) for a symbolic length, with the schedule that it gets in a model."""
    n = tirx.Var("n", "int64")
    x = te.placeholder((n,), dtype, "x")
    y = te.compute((n,), lambda i: function(x[i]), "y")
    func = te.create_prim_func([x, y]).with_attr("global_symbol", "main")
    schedule = CpuReduction().apply(func, target, False)
    assert schedule is not None
    return schedule.mod


def evaluate(function: Callable[[Any], Any], x: np.ndarray, dtype: str = "float32") -> np.ndarray:
    """`function` on this CPU, for every element of x."""
    target = load_target("cpu").tvm_target()
    library = tvm.compile(scheduled(function, target, dtype), target=target)
    y = tvm.runtime.tensor(np.zeros(len(x), dtype))
    library["main"](tvm.runtime.tensor(x.astype(dtype)), y)
    return y.numpy()


def relative_error(actual: np.ndarray, expected: np.ndarray, x: np.ndarray) -> float:
    """The largest, where the true value is a normal float32; elsewhere zero, inf and sign must agree."""
    normal = (np.abs(expected) >= NORMAL) & (np.abs(expected) <= np.finfo(np.float32).max)
    small, large = np.abs(expected) < NORMAL, np.abs(expected) > np.finfo(np.float32).max
    assert np.abs(actual[small] - expected[small]).max(initial=0) < NORMAL
    assert np.array_equal(actual[large], np.sign(expected[large]) * np.inf), x[large]
    return float((np.abs(actual[normal].astype(np.float64) - expected[normal]) / np.abs(expected[normal])).max())


@pytest.mark.parametrize(
    ("name", "bound"), [("exp", 1.0e-7), ("tanh", 1.6e-7), ("erf", 1.6e-7), ("sigmoid", 1.8e-7)], ids=lambda v: str(v)
)
def test_relative_error(name: str, bound: float) -> None:
    x = GRID if name != "sigmoid" else GRID[GRID > -87]
    actual = evaluate(getattr(kernel_math, name), x)
    with np.errstate(over="ignore"):
        expected = REFERENCE[name](x.astype(np.float64))
    assert relative_error(actual, expected, x) <= bound


@pytest.mark.parametrize("name", ["exp", "tanh", "erf", "sigmoid"])
def test_special_values(name: str) -> None:
    x = np.array([-np.inf, np.inf, np.nan, 0.0, -3e38, 3e38, -103.0, 1e-40], np.float32)
    with np.errstate(over="ignore"):
        expected = REFERENCE[name](x.astype(np.float64)).astype(np.float32)
    np.testing.assert_allclose(evaluate(getattr(kernel_math, name), x), expected, rtol=2e-7, atol=2e-45)


@pytest.mark.parametrize("fast", [True, False], ids=["fast", "intrinsics"])
@pytest.mark.parametrize("name", kernel_math.ACTIVATIONS)
def test_activations(name: str, fast: bool) -> None:
    x = GRID[np.abs(GRID) < 1e4]
    actual = evaluate(lambda v: kernel_math.activation(name, v, fast), x).astype(np.float64)
    with np.errstate(over="ignore"):
        expected = REFERENCE[name](x.astype(np.float64))
    assert (np.abs(actual - expected) / np.maximum(1, np.abs(expected))).max() < 2e-7


@pytest.mark.parametrize("name", kernel_math.ACTIVATIONS)
def test_activation_takes_float16_and_computes_in_float32(name: str) -> None:
    x = np.linspace(-10, 10, 1001).astype(np.float16)
    actual = evaluate(lambda v: kernel_math.activation(name, v, True).astype("float16"), x, "float16")
    expected = REFERENCE[name](x.astype(np.float64))
    np.testing.assert_allclose(actual, expected, rtol=6e-4, atol=4e-7)  # half a step of float16, and float32's rounding


def test_activations_keep_nan_and_know_their_limits() -> None:
    for name in kernel_math.ACTIVATIONS:
        y = evaluate(partial(kernel_math.activation, name, fast=True), np.array([np.nan, 1e30], np.float32))
        assert np.isnan(y[0]) and y[1] == np.float32(1.0 if name == "tanh" else 1e30)


def test_unknown_activation() -> None:
    with pytest.raises(UserError, match="gelu_fast"):
        kernel_math.activation("gelu_fast", tirx.Var("x", "float32"), True)


@pytest.mark.parametrize(
    ("target", "register"), [("x86-64-v4", "%zmm"), ("x86-64-v3", "%ymm"), ("arm64", ".4s")], ids=lambda v: v
)
@pytest.mark.parametrize("name", ["exp", "tanh", "erf", "sigmoid"])
def test_intrinsics_become_vector_code(name: str, target: str, register: str) -> None:
    """T.exp and its like, as stock operators write them: arithmetic in vector registers after our rules, no libm."""
    for_target = load_target(target).tvm_target()
    intrinsic = getattr(tirx, name)
    asm = tvm.compile(scheduled(intrinsic, for_target), target=for_target).mod.inspect_source("asm")
    assert register in asm
    assert not [c for c in ("expf", "tanhf", "erff", "floorf") if c in asm]
    products = sum(register in line for line in asm.splitlines() if re.search("mul|fmadd|fmla", line))
    assert products >= 8, "the polynomial is not in vector registers"


def test_rewrite_renews_let_variables_and_replaces_loads() -> None:
    a, b = (tirx.decl_buffer((8,), "float32", name=n) for n in "ab")
    i, j = (tirx.Var(n, "int64") for n in "ij")
    expr = kernel_math.exp(a[i] * 2.0)
    once = kernel_math.rewrite(expr, {i: j + 1}, {a: lambda indices: tirx.BufferLoad(b, indices)})
    again = kernel_math.rewrite(expr, {})
    assert [load.source.name for load in kernel_math.loads(once)] == ["b"]
    assert kernel_math.uses(once, j) and not kernel_math.uses(once, i)
    assert not again.var.same_as(expr.var)  # two loops may hold the expression
    assert tvm_ffi.structural_equal(again, expr)
