"""Functions under test for the CPU's rules, as the pipeline's fusion phase makes them, and their float64 references."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import tvm
import tvm_ffi
from tvm import te, tirx
from tvm.relax.frontend import nn
from tvm.relax.frontend.nn import op

from gpt2_tvm.kernels.math import activation
from gpt2_tvm.kernels.packed_linear import pack, packed_matmul
from gpt2_tvm.passes.apply_rules import apply_rules
from gpt2_tvm.pipeline import FUSE, FUSED, LEGALIZE
from gpt2_tvm.schedules.cpu_gemv import CpuGemv
from gpt2_tvm.schedules.cpu_matmul import GEMV_ROWS, CpuMatmul
from targets import load_target

CPU = load_target("cpu")
NR = CPU.layout.rows or 16
EPILOGUES = ("none", "bias", "gelu", "residual", "cast")
# dtypes of x (and bias, residual) and of the weight, by name; int8 has a scale a row
STORAGE = {
    "float32": ("float32", "float32"),
    "float16": ("float16", "float16"),
    "q16f32": ("float32", "float16"),
    "q8f32": ("float32", "int8"),
}
Shape = tuple[Any, Any]


class Packed(nn.Module):
    """y = epilogue(x W^T); `cast`: to float16."""

    def __init__(self, k: int, n: int, epilogue: str, storage: str = "float32", rows: int = NR) -> None:
        super().__init__()
        x, weight = STORAGE[storage]
        self.weight = nn.Parameter([-(-n // rows), k, rows], weight)
        if weight == "int8":
            self.weight_scale = nn.Parameter([n], "float32")
        self.bias = nn.Parameter([n], x)
        self.n, self.epilogue, self.storage = n, epilogue, storage

    def forward(self, x: nn.Tensor, residual: nn.Tensor) -> nn.Tensor:
        y = op.tensor_expr_op(lambda x, w: packed_matmul(x, w, self.n), "packed_matmul", [x, self.weight])
        if STORAGE[self.storage][1] == "int8":
            y = op.multiply(y, self.weight_scale)
        if self.epilogue != "none":
            y = op.add(y, self.bias.astype("float32"))
        if self.epilogue == "gelu":
            gelu = lambda y: te.compute(y.shape, lambda *i: activation("gelu_new", y(*i), True), "gelu")  # noqa: E731
            y = op.tensor_expr_op(gelu, "gelu", [y])
        if self.epilogue == "residual":
            y = op.add(y, residual.astype("float32"))
        return y.astype("float16") if self.epilogue == "cast" else y


def fuse(module: nn.Module, **inputs: tuple[Sequence[Any], str]) -> tirx.PrimFunc:
    """The one function that FuseOps and FuseTIR make of a module's `forward`."""
    spec = {"forward": {name: nn.spec.Tensor(shape, dtype) for name, (shape, dtype) in inputs.items()}}
    mod, _ = module.export_tvm(spec)
    with CPU.tvm_target():
        mod = tvm.transform.Sequential([make() for make in (*LEGALIZE, *FUSE, *FUSED)])(mod)
    (func,) = [f for _, f in mod.functions_items() if isinstance(f, tirx.PrimFunc)]
    return func.with_attr("global_symbol", "main")


@cache
def packed_function(
    rows: Shape, k: int, n: int, epilogue: str = "none", storage: str = "float32", panel: int = NR
) -> tirx.PrimFunc:
    x = STORAGE[storage][0]
    return fuse(Packed(k, n, epilogue, storage, panel), x=((*rows, k), x), residual=((*rows, n), x))


def schedule(func: tirx.PrimFunc, rule: Any, target: Any = None) -> tirx.PrimFunc | None:
    result = rule.apply(func, target or CPU.tvm_target(), False)
    return None if result is None else result.mod["main"]


def build(func: tirx.PrimFunc | None) -> Any:
    """A scheduled function, callable on this CPU."""
    assert func is not None
    return tvm.compile(tvm.IRModule({"main": func}), target=CPU.tvm_target())["main"]


@cache
def packed_library(rows: Shape, k: int, n: int, epilogue: str, storage: str) -> Any:
    """A packed product built for this CPU by the rules in the target's order."""
    rules = [("cpu-matmul", CpuMatmul(CPU)), ("cpu-gemv", CpuGemv(CPU))]
    func = packed_function(rows, k, n, epilogue, storage)
    mod, hits = apply_rules(tvm.IRModule({"main": func}), rules, CPU.tvm_target())
    small = isinstance(rows[1], int) and rows[0] * rows[1] <= GEMV_ROWS
    assert [h.rule for h in hits] == ["cpu-gemv" if small else "cpu-matmul"]
    return tvm.compile(mod, target=CPU.tvm_target())["main"]


def run(function: Any, *inputs: np.ndarray, out: tuple[Sequence[int], str]) -> np.ndarray:
    y = tvm.runtime.tensor(np.full(out[0], np.nan, out[1]))  # what is not written shows
    function(*[tvm.runtime.tensor(i) for i in inputs], y)
    return y.numpy()


def inputs_of(
    rows: tuple[int, int], k: int, n: int, epilogue: str, storage: str
) -> tuple[list[np.ndarray], np.ndarray]:
    """Random arguments in the function's order but with the weight as a matrix, and the float64 result."""
    rng = np.random.default_rng(rows[1] * 1000 + n)
    floats, stored = STORAGE[storage]
    x = rng.standard_normal((*rows, k)).astype(floats)
    weight = (rng.standard_normal((n, k)) * (30 if stored == "int8" else 1)).astype(stored)
    bias, residual = rng.standard_normal(n).astype(floats), rng.standard_normal((*rows, n)).astype(floats)
    given = [x, weight]
    expected = x.astype(np.float64) @ weight.astype(np.float64).T
    if stored == "int8":
        given.append(rng.uniform(0.5, 2, n).astype(np.float32))
        expected *= given[-1]
    if epilogue != "none":
        given.append(bias)
        expected += bias
    if epilogue == "gelu":
        expected = 0.5 * expected * (1 + np.tanh(np.sqrt(2 / np.pi) * (expected + 0.044715 * expected**3)))
    if epilogue == "residual":
        given.append(residual)
        expected += residual
    return given, expected


def error(
    symbolic: Shape, rows: tuple[int, int], k: int, n: int, epilogue: str, storage: str = "float32", library: Any = None
) -> float:
    """The largest difference to float64, as a share of the largest value; `library`: not the target's own kernel."""
    given, expected = inputs_of(rows, k, n, epilogue, storage)
    out = "float16" if epilogue == "cast" else "float32"
    function = library or packed_library(symbolic, k, n, epilogue, storage)
    actual = run(function, given[0], pack(given[1], NR), *given[2:], out=(expected.shape, out))
    return float(np.abs(actual.astype(np.float64) - expected).max() / np.abs(expected).max())


def bound(epilogue: str) -> float:
    return 5e-4 if epilogue == "cast" else 3e-6


def loops(func: tirx.PrimFunc, kind: tirx.ForKind) -> list[tirx.For]:
    found: list[tirx.For] = []
    tvm_ffi.structural_walk(func.body, [(tirx.For, found.append)])
    return [f for f in found if f.kind == kind]


# By target: a multiply-add of vector registers, and one of them going to or from the stack
MULTIPLY_ADD = {
    "x86-64-v4": r"vfmadd\w+ps\s.*%zmm",
    "x86-64-v3": r"vfmadd\w+ps\s.*%ymm",
    "arm64": r"fmla\s+v\d+\.4s",
}
SPILL = {
    "x86-64-v4": r"\(%rsp.*zmm|zmm.*\(%rsp",
    "x86-64-v3": r"\(%rsp.*ymm|ymm.*\(%rsp",
    "arm64": r"(ld|st)[rp]\s+q.*\[sp",
}


def hot_loop(func: tirx.PrimFunc, rule: type, name: str) -> tuple[int, str]:
    """The multiply-adds in the innermost loop that LLVM makes for a target, and that loop's assembly.

    Fails where the loop spills or stores: sums belong in registers from the first step to the last.
    """
    target = load_target(name)
    scheduled = schedule(func, rule(target), target.tvm_target())
    library = tvm.compile(tvm.IRModule({"main": scheduled}), target=target.tvm_target())
    blocks = re.split(r"^[.\w]+:.*$", library.mod.inspect_source("asm"), flags=re.MULTILINE)
    block = max(blocks, key=lambda b: len(re.findall(MULTIPLY_ADD[name], b)))
    loop = re.split(r"^\s+(?:j[a-z]+|b\.\w+|cbn?z|tbn?z)\s", block, flags=re.MULTILINE)[0]  # up to its jump back
    assert not re.search(SPILL[name], loop), loop
    assert not re.search(r"vmov\w+\s+%[xyz]mm\d+,.*\(|st[rp]\s+[qd]", loop), loop
    return len(re.findall(MULTIPLY_ADD[name], loop)), loop
