"""The CPU's schedule rules: right on every shape and epilogue, the loops and instructions they promise, and what they
leave to others. The functions under test come out of the pipeline's own fusion phase."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import pytest
import tvm
import tvm_ffi
from tvm import te, tirx
from tvm.relax.frontend import nn
from tvm.relax.frontend.nn import op

from gpt2_tvm.errors import UserError
from gpt2_tvm.kernels.math import activation
from gpt2_tvm.kernels.packed_linear import pack, packed_matmul, packed_take
from gpt2_tvm.model import LayerNorm
from gpt2_tvm.passes.apply_rules import apply_rules
from gpt2_tvm.pipeline import FUSE
from gpt2_tvm.schedules.cpu_gemv import CpuGemv
from gpt2_tvm.schedules.cpu_matmul import CpuMatmul
from gpt2_tvm.schedules.cpu_reduction import CpuReduction
from targets import load_target

CPU = load_target("cpu")
NR = CPU.layout.rows or 16
EPILOGUES = ("none", "bias", "gelu", "residual", "cast")
ROWS = (*range(1, 10), 17, 322, 1023)
Shape = tuple[Any, Any]


class Packed(nn.Module):
    """y = epilogue(x W^T): `cast` to float16; with float16 weights, x, bias and residual are float16 too."""

    def __init__(self, k: int, n: int, epilogue: str, dtype: str = "float32", rows: int = NR) -> None:
        super().__init__()
        self.weight = nn.Parameter([-(-n // rows), k, rows], dtype)
        self.bias = nn.Parameter([n], "float32" if dtype == "int8" else dtype)
        self.n, self.epilogue = n, epilogue

    def forward(self, x: nn.Tensor, residual: nn.Tensor) -> nn.Tensor:
        y = op.tensor_expr_op(lambda x, w: packed_matmul(x, w, self.n), "packed_matmul", [x, self.weight])
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
        mod = tvm.transform.Sequential([make() for make in FUSE])(mod)
    (func,) = [f for _, f in mod.functions_items() if isinstance(f, tirx.PrimFunc)]
    return func.with_attr("global_symbol", "main")


@cache
def packed_function(
    rows: Shape, k: int, n: int, epilogue: str = "none", dtype: str = "float32", panel: int = NR
) -> tirx.PrimFunc:
    x = "float32" if dtype == "int8" else dtype
    return fuse(Packed(k, n, epilogue, dtype, panel), x=((*rows, k), x), residual=((*rows, n), x))


def schedule(func: tirx.PrimFunc, rule: Any, target: Any = None) -> tirx.PrimFunc | None:
    result = rule.apply(func, target or CPU.tvm_target(), False)
    return None if result is None else result.mod["main"]


@cache
def packed_library(rows: Shape, k: int, n: int, epilogue: str, dtype: str) -> Any:
    """A packed product built for this CPU by the rules in the target's order."""
    rules = [("cpu-matmul", CpuMatmul(CPU.layout)), ("cpu-gemv", CpuGemv(CPU.layout))]
    func = packed_function(rows, k, n, epilogue, dtype)
    mod, hits = apply_rules(tvm.IRModule({"main": func}), rules, CPU.tvm_target())
    small = isinstance(rows[1], int) and rows[0] * rows[1] <= 8
    assert [h.rule for h in hits] == ["cpu-gemv" if small else "cpu-matmul"]
    return tvm.compile(mod, target=CPU.tvm_target())["main"]


def run(function: Any, *inputs: np.ndarray, out: tuple[Sequence[int], str]) -> np.ndarray:
    y = tvm.runtime.tensor(np.full(out[0], np.nan, out[1]))  # what is not written shows
    function(*[tvm.runtime.tensor(i) for i in inputs], y)
    return y.numpy()


def error(symbolic: Shape, rows: tuple[int, int], k: int, n: int, epilogue: str, dtype: str = "float32") -> float:
    """The largest difference to float64, as a share of the largest value."""
    rng = np.random.default_rng(rows[1] * 1000 + n)
    floats = "float32" if dtype == "int8" else dtype
    x = rng.standard_normal((*rows, k)).astype(floats)
    weight = (rng.standard_normal((n, k)) * (30 if dtype == "int8" else 1)).astype(dtype)
    bias, residual = rng.standard_normal(n).astype(floats), rng.standard_normal((*rows, n)).astype(floats)
    expected = x.astype(np.float64) @ weight.astype(np.float64).T
    if epilogue != "none":
        expected += bias
    if epilogue == "gelu":
        expected = 0.5 * expected * (1 + np.tanh(np.sqrt(2 / np.pi) * (expected + 0.044715 * expected**3)))
    if epilogue == "residual":
        expected += residual
    given = [x, pack(weight, NR)]
    given += [bias] if epilogue != "none" else []
    given += [residual] if epilogue == "residual" else []
    out = "float16" if epilogue == "cast" else "float32"
    actual = run(packed_library(symbolic, k, n, epilogue, dtype), *given, out=(expected.shape, out))
    return float(np.abs(actual.astype(np.float64) - expected).max() / np.abs(expected).max())


def bound(epilogue: str) -> float:
    return 5e-4 if epilogue == "cast" else 3e-6


# -- packing -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "rows"), [(5, 2), (32, 32), (97, 16), (1, 8)])
def test_pack_puts_rows_into_panels(n: int, rows: int) -> None:
    weight = np.arange(n * 3, dtype=np.float16).reshape(n, 3)
    packed = pack(weight, rows)
    assert packed.shape == (-(-n // rows), 3, rows) and packed.dtype == weight.dtype and packed.flags.c_contiguous
    for o in range(packed.shape[0] * rows):
        assert np.array_equal(packed[o // rows, :, o % rows], weight[o] if o < n else np.zeros(3))


def test_pack_refuses_what_is_no_matrix() -> None:
    with pytest.raises(UserError, match=r"\[2, 2, 2\]"):
        pack(np.zeros((2, 2, 2)), 16)


@pytest.mark.parametrize(("stored", "computed"), [("float32", "float32"), ("float16", "float32")])
def test_take_from_a_packed_table(stored: str, computed: str) -> None:
    table = np.random.default_rng(0).standard_normal((70, 24)).astype(stored)
    w = te.placeholder((-(-70 // NR), 24, NR), stored, "w")
    ids = te.placeholder((tirx.Var("b", "int64"), tirx.Var("n", "int64")), "int32", "ids")
    func = te.create_prim_func([w, ids, packed_take(w, ids, computed)]).with_attr("global_symbol", "main")
    scheduled = schedule(func, CpuReduction(CPU.layout))
    rows = np.array([[0, 69, 31], [NR, NR - 1, 64]], np.int32)
    library = tvm.compile(tvm.IRModule({"main": scheduled}), target=CPU.tvm_target())
    assert np.array_equal(run(library["main"], pack(table, NR), rows, out=((2, 3, 24), computed)), table[rows])


# -- numbers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("epilogue", EPILOGUES)
def test_matmul_of_any_number_of_rows(epilogue: str, dtype: str) -> None:
    for n in ROWS:
        assert error(("b", "n"), (1, n), 770, 97, epilogue, dtype) < bound(epilogue), n
    assert error(("b", "n"), (3, 7), 770, 97, epilogue, dtype) < bound(epilogue)


@pytest.mark.parametrize(("k", "n"), [(64, 1), (16, 50257), (768, 768), (1, 33)])
def test_matmul_of_any_width(k: int, n: int) -> None:
    for rows in (1, 9, 17):
        assert error(("b", "n"), (1, rows), k, n, "residual") < bound("residual"), rows


@pytest.mark.parametrize("rows", [(1, 9), (3, 4), (1, 17)])
def test_matmul_of_rows_known_at_compile_time(rows: tuple[int, int]) -> None:
    assert error(rows, rows, 770, 97, "gelu") < bound("gelu")


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
@pytest.mark.parametrize("rows", range(1, 9))
def test_gemv_of_one_to_eight_rows(rows: int, dtype: str) -> None:
    epilogue = EPILOGUES[rows % len(EPILOGUES)]
    assert error((1, rows), (1, rows), 770, 97, epilogue, dtype) < bound(epilogue)
    assert error((rows, 1), (rows, 1), 33, NR, "none", dtype) < bound("none")


@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.parametrize(("k", "n"), [(16, 50257), (64, 1), (768, 768)])
def test_gemv_of_any_width(k: int, n: int, epilogue: str) -> None:
    assert error((1, 1), (1, 1), k, n, epilogue) < bound(epilogue)


def test_gemv_with_more_rows_than_registers() -> None:
    """Six-row tiles and seven rows, as with AVX2: two groups of four, the last row twice."""
    scheduled = schedule(packed_function((1, 7), 770, 97, "bias"), CpuGemv({"tile_rows": 6}))
    assert [int(f.extent) for f in loops(scheduled, tirx.ForKind.SERIAL) if f.loop_var.name == "group"] == [2]
    x, weight, bias = (np.random.default_rng(0).standard_normal(s).astype("float32") for s in ((7, 770), (97, 770), 97))
    library = tvm.compile(tvm.IRModule({"main": scheduled}), target=CPU.tvm_target())
    actual = run(library["main"], x[None], pack(weight, NR), bias, out=((1, 7, 97), "float32"))
    expected = x.astype(np.float64) @ weight.T + bias
    assert np.abs(actual[0] - expected).max() < 3e-6 * np.abs(expected).max()


def test_a_prologue_is_evaluated_while_packing() -> None:
    """What FuseOps may put in front of the product (a scale, a cast) is part of x."""
    b, n = tirx.Var("b", "int64"), tirx.Var("n", "int64")
    x, w = te.placeholder((b, n, 50), "float16", "x"), te.placeholder((-(-40 // NR), 50, NR), "float32", "w")
    twice = te.compute(x.shape, lambda *i: x(*i).astype("float32") * 2.0, "twice")
    func = te.create_prim_func([x, w, packed_matmul(twice, w, 40)]).with_attr("global_symbol", "main")
    library = tvm.compile(tvm.IRModule({"main": schedule(func, CpuMatmul(CPU.layout))}), target=CPU.tvm_target())
    rng = np.random.default_rng(0)
    given, weight = rng.standard_normal((2, 5, 50)).astype(np.float16), rng.standard_normal((40, 50)).astype(np.float32)
    actual = run(library["main"], given, pack(weight, NR), out=((2, 5, 40), "float32"))
    np.testing.assert_allclose(actual, 2 * given.astype(np.float64) @ weight.T, atol=1e-4)


def test_another_layout_gives_the_same_numbers() -> None:
    """AVX2's panels and tiles, 16 and 6, on whatever CPU this is."""
    layout = {"tile_rows": 6, "simd_bits": 256, "l1_kib": 8, "l2_kib": 64}
    x, weight = (np.random.default_rng(0).standard_normal(s).astype("float32") for s in ((8, 770), (97, 770)))
    expected = x.astype(np.float64) @ weight.T
    for shape, rule in ((("b", "n"), CpuMatmul(layout)), ((1, 8), CpuGemv(layout))):
        func = schedule(packed_function(shape, 770, 97, "none", "float32", 16), rule)
        library = tvm.compile(tvm.IRModule({"main": func}), target=CPU.tvm_target())
        actual = run(library["main"], x[None], pack(weight, 16), out=((1, 8, 97), "float32"))
        assert np.abs(actual[0] - expected).max() < 3e-6 * np.abs(expected).max()


class Softmax(nn.Module):
    def forward(self, x: nn.Tensor) -> nn.Tensor:
        return op.softmax(x, axis=-1)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("width", [768, 770, 3, 97])
@pytest.mark.parametrize("shape", [("b", "n"), (1, 1), (3, 9)], ids=str)
def test_layer_norm(shape: Shape, width: int, dtype: str) -> None:
    func = schedule(fuse(LayerNorm(width, 1e-5, dtype), x=((*shape, width), dtype)), CpuReduction(CPU.layout))
    library = tvm.compile(tvm.IRModule({"main": func}), target=CPU.tvm_target())
    rng = np.random.default_rng(width)
    for b, n in [(1, 1), (3, 17), (1, 322)] if shape[0] == "b" else [shape]:
        x, weight, bias = ((3 * rng.standard_normal(s) + 1).astype(dtype) for s in ((b, n, width), width, width))
        wide = x.astype(np.float64)
        expected = (wide - wide.mean(-1, keepdims=True)) / np.sqrt(wide.var(-1, keepdims=True) + 1e-5) * weight + bias
        actual = run(library["main"], x, weight, bias, out=(x.shape, dtype))
        np.testing.assert_allclose(actual, expected, atol=2e-2 if dtype == "float16" else 2e-5)


@pytest.mark.parametrize(("shape", "width"), [(("b", 1), 50257), ((4, 3), 770), ((1, 2), 5), (("b", 2), "v")], ids=str)
def test_softmax(shape: Shape, width: Any) -> None:
    func = schedule(fuse(Softmax(), x=((*shape, width), "float32")), CpuReduction(CPU.layout))
    assert "T.exp" not in str(func)
    library = tvm.compile(tvm.IRModule({"main": func}), target=CPU.tvm_target())
    size = (2 if shape[0] == "b" else shape[0], shape[1], 131 if width == "v" else width)
    x = (10 * np.random.default_rng(0).standard_normal(size)).astype(np.float32)
    x[0, 0, 1] = -np.inf
    e = np.exp(x.astype(np.float64) - x.max(-1, keepdims=True))
    actual = run(library["main"], x, out=(size, "float32"))
    np.testing.assert_allclose(actual, e / e.sum(-1, keepdims=True), rtol=1e-5, atol=1e-30)
    assert actual[0, 0, 1] == 0


# -- loops -------------------------------------------------------------------------------------------------------------


def loops(func: tirx.PrimFunc, kind: tirx.ForKind) -> list[tirx.For]:
    found: list[tirx.For] = []
    tvm_ffi.structural_walk(func.body, [(tirx.For, found.append)])
    return [f for f in found if f.kind == kind]


def extents(found: list[tirx.For]) -> set[int]:
    return {int(f.extent) for f in found}


def test_matmul_packs_and_multiplies_in_parallel_with_sums_in_registers() -> None:
    layout = {"tile_rows": 8, "simd_bits": 512, "l1_kib": 48, "l2_kib": 1024}
    func = schedule(packed_function(("b", "n"), 768, 97, "gelu", "float16", 32), CpuMatmul(layout))
    assert func is not None
    assert [f.loop_var.name for f in loops(func, tirx.ForKind.PARALLEL)] == ["tile", "task"]
    assert extents(loops(func, tirx.ForKind.VECTORIZED)) == {16}
    text = str(func)
    assert "acc0 = T.alloc_local((T.int64(8), T.int64(16)))" in text  # 8 x 16 and 8 x 16: two registers a row
    assert "acc1 = T.alloc_local((T.int64(8), T.int64(16)))" in text and "acc2" not in text
    assert "w_block = T.alloc_buffer((T.int64(256), T.int64(32)))" in text  # float16 is widened once a block of k
    assert "T.tanh" not in text and "T.exp" not in text


def test_gemv_reads_the_weight_once_in_one_parallel_loop() -> None:
    func = schedule(
        packed_function((1, 4), 768, 768, "bias", "float32", 32), CpuGemv({"tile_rows": 8, "simd_bits": 512})
    )
    assert func is not None
    assert extents(loops(func, tirx.ForKind.PARALLEL)) == {12}  # 24 panels, two side by side
    (k,) = [f for f in loops(func, tirx.ForKind.SERIAL) if f.loop_var.name == "k"]
    assert int(k.extent) == 768 and str(k).count("weight[") == 4  # two registers of two panels, for all rows together


@pytest.mark.parametrize(("rows", "n", "streams"), [(1, 768, 2), (1, 3072, 4), (2, 3072, 4), (8, 3072, 1), (1, 97, 1)])
def test_gemv_reads_panels_side_by_side_where_registers_and_threads_allow(rows: int, n: int, streams: int) -> None:
    func = schedule(
        packed_function((1, rows), 768, n, "bias", "float32", 32), CpuGemv({"tile_rows": 8, "simd_bits": 512})
    )
    (k,) = [f for f in loops(func, tirx.ForKind.SERIAL) if f.loop_var.name == "k"]
    assert len(set(re.findall(r"weight\[(\w+)", str(k)))) == streams


def test_small_work_stays_on_one_thread() -> None:
    assert not loops(schedule(packed_function((1, 1), 64, 33), CpuGemv(CPU.layout)), tirx.ForKind.PARALLEL)
    for shape, threads in (((1, 1), 0), ((2, 4), 0), ((2, 200), 1)):
        func = schedule(fuse(LayerNorm(768, 1e-5, "float32"), x=((*shape, 768), "float32")), CpuReduction(CPU.layout))
        assert len(loops(func, tirx.ForKind.PARALLEL)) == threads, shape


def test_symbolic_rows_are_parallel_only_where_there_are_many() -> None:
    func = schedule(fuse(LayerNorm(768, 1e-5, "float32"), x=(("b", "n", 768), "float32")), CpuReduction(CPU.layout))
    assert len(loops(func, tirx.ForKind.PARALLEL)) == 1 and re.search(r"if b \* n .*>= ", str(func))
    assert CPU.limits.vector_bits is None or CPU.limits.vector_bits // 32 in extents(
        loops(func, tirx.ForKind.VECTORIZED)
    )


# -- what is not theirs ------------------------------------------------------------------------------------------------


class Transposed(nn.Module):
    """A plain matmul whose sums run down a column: no row of its own to stream."""

    def forward(self, x: nn.Tensor, y: nn.Tensor) -> nn.Tensor:
        return op.matmul(x, y)


def test_rules_decline_what_is_not_theirs() -> None:
    many, few = packed_function(("b", "n"), 770, 97, "bias"), packed_function((1, 8), 770, 97)
    norm = fuse(LayerNorm(96, 1e-5, "float32"), x=(("b", "n", 96), "float32"))
    plain = fuse(Transposed(), x=(("n", 64), "float32"), y=((64, 96), "float32"))
    rules: dict[str, Any] = {
        "matmul": CpuMatmul(CPU.layout),
        "gemv": CpuGemv(CPU.layout),
        "reduction": CpuReduction(CPU.layout),
    }
    taken = {
        name: [rule for rule, r in rules.items() if r.apply(func, CPU.tvm_target(), False) is not None]
        for name, func in {"many": many, "few": few, "norm": norm, "plain": plain}.items()
    }
    assert taken == {"many": ["matmul"], "few": ["gemv"], "norm": ["reduction"], "plain": []}


def test_rules_leave_scheduled_functions_and_other_devices_alone() -> None:
    metal = load_target("metal").tvm_target()
    for func in (packed_function(("b", "n"), 770, 97), packed_function((1, 8), 770, 97)):
        for rule in (CpuMatmul(CPU.layout), CpuGemv(CPU.layout), CpuReduction(CPU.layout)):
            assert rule.apply(func.with_attr("tirx.is_scheduled", True), CPU.tvm_target(), False) is None
            assert rule.apply(func, metal, False) is None


# -- instructions ------------------------------------------------------------------------------------------------------


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
    """The multiply-adds in the innermost loop that LLVM makes for a target, and all assembly; fails where it spills."""
    target = load_target(name)
    scheduled = schedule(func, rule(target.layout), target.tvm_target())
    library = tvm.compile(tvm.IRModule({"main": scheduled}), target=target.tvm_target())
    asm = library.mod.inspect_source("asm")
    blocks = re.split(r"^[.\w]+:.*$", asm, flags=re.MULTILINE)
    block = max(blocks, key=lambda b: len(re.findall(MULTIPLY_ADD[name], b)))
    loop = re.split(r"^\s+(?:j[a-z]+|b\.\w+|cbn?z|tbn?z)\s", block, flags=re.MULTILINE)[0]  # up to its jump back
    assert not re.search(SPILL[name], loop), loop
    return len(re.findall(MULTIPLY_ADD[name], loop)), asm


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize(("name", "sums"), [("x86-64-v4", 16), ("x86-64-v3", 12), ("arm64", 24)])
def test_matmul_keeps_its_sums_in_vector_registers(name: str, sums: int, dtype: str) -> None:
    panel = load_target(name).layout.rows or 0
    products, asm = hot_loop(packed_function(("b", "n"), 768, 768, "residual", dtype, panel), CpuMatmul, name)
    assert products >= sums and products % sums == 0  # one or more whole steps of k
    if name == "x86-64-v4" and dtype == "float16":
        assert re.search(r"vcvtph2ps\s.*%zmm", asm)


@pytest.mark.parametrize("rows", [1, 4, 8])
@pytest.mark.parametrize("name", list(MULTIPLY_ADD))
def test_gemv_keeps_its_sums_in_vector_registers(name: str, rows: int) -> None:
    panel = load_target(name).layout.rows or 0
    products, _ = hot_loop(packed_function((1, rows), 768, 768, "residual", "float32", panel), CpuGemv, name)
    assert products >= 8
