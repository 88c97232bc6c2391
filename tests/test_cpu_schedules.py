"""The CPU's schedule rules: right on every shape and epilogue, the loops and instructions they promise, and what they
leave to others. The functions under test come out of the pipeline's own fusion phase."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import tvm
from cpu_functions import (
    CPU,
    EPILOGUES,
    MULTIPLY_ADD,
    NR,
    Shape,
    bound,
    build,
    error,
    fuse,
    hot_loop,
    loops,
    packed_function,
    run,
    schedule,
)
from tvm import te, tirx
from tvm.relax.frontend import nn
from tvm.relax.frontend.nn import op

from gpt2_tvm.errors import UserError
from gpt2_tvm.kernels.packed_linear import pack, packed_matmul
from gpt2_tvm.model import LayerNorm
from gpt2_tvm.schedules.cpu_gemv import CpuGemv
from gpt2_tvm.schedules.cpu_matmul import CpuMatmul
from gpt2_tvm.schedules.cpu_reduction import CpuReduction
from targets import load_target

ROWS = (*range(1, 10), 12, 17, 322, 1023)


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


# -- numbers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", ["float32", "float16"])
@pytest.mark.parametrize("epilogue", EPILOGUES)
def test_matmul_of_any_number_of_rows(epilogue: str, storage: str) -> None:
    for n in ROWS:
        assert error(("b", "n"), (1, n), 770, 97, epilogue, storage) < bound(epilogue), n
    assert error(("b", "n"), (3, 7), 770, 97, epilogue, storage) < bound(epilogue)


@pytest.mark.parametrize(("k", "n"), [(64, 1), (16, 50257), (768, 768), (1, 33)])
def test_matmul_of_any_width(k: int, n: int) -> None:
    for rows in (1, 9, 17):
        assert error(("b", "n"), (1, rows), k, n, "residual") < bound("residual"), rows


@pytest.mark.parametrize("rows", [(3, 7), (1, 17)])
def test_matmul_of_rows_known_at_compile_time(rows: tuple[int, int]) -> None:
    assert error(rows, rows, 770, 97, "gelu") < bound("gelu")


@pytest.mark.parametrize("storage", ["float32", "float16"])
@pytest.mark.parametrize("rows", (*range(1, 10), 12, 16))
def test_gemv_of_one_to_sixteen_rows(rows: int, storage: str) -> None:
    epilogue = EPILOGUES[rows % len(EPILOGUES)]
    assert error((1, rows), (1, rows), 770, 97, epilogue, storage) < bound(epilogue)
    assert error((rows, 1), (rows, 1), 33, NR, "none", storage) < bound("none")


@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.parametrize(("k", "n"), [(16, 50257), (64, 1), (768, 768), (1, 33)])
def test_gemv_of_any_width(k: int, n: int, epilogue: str) -> None:
    assert error((1, 1), (1, 1), k, n, epilogue) < bound(epilogue)


@pytest.mark.parametrize(("rows", "groups"), [(6, 1), (7, 2), (13, 3)])
def test_gemv_with_more_rows_than_registers(rows: int, groups: int) -> None:
    """Sixteen registers, as with AVX2: six rows of sums at a time; the last group computes some rows again."""
    lanes = NR // 2  # two registers of sums a row
    few = {"vector_bits": 32 * lanes, "vector_registers": 16}
    scheduled = schedule(packed_function((1, rows), 770, 97, "bias"), CpuGemv(few))
    assert [int(f.extent) for f in loops(scheduled, tirx.ForKind.SERIAL) if f.loop_var.name == "group"] == [groups]
    assert error((1, rows), (1, rows), 770, 97, "bias", library=build(scheduled)) < bound("bias")


def test_a_prologue_is_evaluated_while_packing() -> None:
    """What FuseOps may put in front of the product (a scale, a cast) is part of x."""
    b, n = tirx.Var("b", "int64"), tirx.Var("n", "int64")
    x, w = te.placeholder((b, n, 50), "float16", "x"), te.placeholder((-(-40 // NR), 50, NR), "float32", "w")
    twice = te.compute(x.shape, lambda *i: x(*i).astype("float32") * 2.0, "twice")
    func = te.create_prim_func([x, w, packed_matmul(twice, w, 40)]).with_attr("global_symbol", "main")
    library = tvm.compile(tvm.IRModule({"main": schedule(func, CpuMatmul(CPU))}), target=CPU.tvm_target())
    rng = np.random.default_rng(0)
    given, weight = rng.standard_normal((2, 5, 50)).astype(np.float16), rng.standard_normal((40, 50)).astype(np.float32)
    actual = run(library["main"], given, pack(weight, NR), out=((2, 5, 40), "float32"))
    np.testing.assert_allclose(actual, 2 * given.astype(np.float64) @ weight.T, atol=1e-4)


def test_another_layout_gives_the_same_numbers() -> None:
    """AVX2's panels and tiles, 16 and 6, on whatever CPU this is."""
    layout = {"tile_rows": 6, "vector_bits": 256, "l1_kib": 8, "l2_kib": 64}
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
    func = schedule(fuse(LayerNorm(width, 1e-5, dtype), x=((*shape, width), dtype)), CpuReduction(CPU))
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
    func = schedule(fuse(Softmax(), x=((*shape, width), "float32")), CpuReduction(CPU))
    assert "T.exp" not in str(func)
    library = tvm.compile(tvm.IRModule({"main": func}), target=CPU.tvm_target())
    size = (2 if shape[0] == "b" else shape[0], shape[1], 131 if width == "v" else width)
    x = (10 * np.random.default_rng(0).standard_normal(size)).astype(np.float32)
    x[0, 0, 1] = -np.inf
    e = np.exp(x.astype(np.float64) - x.max(-1, keepdims=True))
    actual = run(library["main"], x, out=(size, "float32"))
    np.testing.assert_allclose(actual, e / e.sum(-1, keepdims=True), rtol=1e-5, atol=1e-30)
    assert actual[0, 0, 1] == 0


class Values(nn.Module):
    """P.V of materialised attention, stored as the dtype of its inputs."""

    def forward(self, p: nn.Tensor, v: nn.Tensor) -> nn.Tensor:
        return op.matmul(p, v, out_dtype="float32").astype(p.dtype)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("size", [64, 80, 20, 37])
def test_sums_down_columns(size: int, dtype: str) -> None:
    """Probabilities times values: columns in registers, rows and heads in parallel where there are many."""
    rng = np.random.default_rng(size)
    for shape, (b, n) in ((("b", "n"), (2, 5)), (("b", "n"), (1, 130)), ((1, 1), (1, 1))):
        p, v = rng.random((b, 3, n, 97)).astype(dtype), rng.standard_normal((b, 3, 97, size)).astype(dtype)
        func = fuse(Values(), p=((shape[0], 3, shape[1], 97), dtype), v=((shape[0], 3, 97, size), dtype))
        actual = run(build(schedule(func, CpuReduction(CPU))), p, v, out=((b, 3, n, size), dtype))
        expected = p.astype(np.float64) @ v.astype(np.float64)
        assert np.abs(actual - expected).max() < (1e-3 if dtype == "float16" else 3e-6) * np.abs(expected).max()


def test_sums_down_columns_keep_the_columns_in_registers() -> None:
    func = fuse(Values(), p=((1, 3, 4, 97), "float32"), v=((1, 3, 97, 64), "float32"))
    scheduled = schedule(func, CpuReduction({"vector_bits": 256}))
    assert extents(loops(scheduled, tirx.ForKind.VECTORIZED)) == {8}
    (k,) = [f for f in loops(scheduled, tirx.ForKind.SERIAL) if f.loop_var.name == "k"]
    assert str(k).count("v[") == 8 and int(k.extent) == 97  # eight vectors of columns, each row of v once


# -- loops -------------------------------------------------------------------------------------------------------------


def extents(found: list[tirx.For]) -> set[int]:
    return {int(f.extent) for f in found}


def test_matmul_packs_and_multiplies_in_parallel_with_sums_in_registers() -> None:
    layout = {"tile_rows": 8, "vector_bits": 512, "l1_kib": 48, "l2_kib": 1024}
    func = schedule(packed_function(("b", "n"), 768, 97, "gelu", "float16", 32), CpuMatmul(layout))
    assert func is not None
    assert [f.loop_var.name for f in loops(func, tirx.ForKind.PARALLEL)] == ["tile", "task"]
    assert extents(loops(func, tirx.ForKind.VECTORIZED)) == {16}
    text = str(func)
    assert "acc0 = T.alloc_buffer((T.int64(8), T.int64(16)))" in text  # 8 x 16 and 8 x 16: two registers a row
    assert "acc1 = T.alloc_buffer((T.int64(8), T.int64(16)))" in text and "acc2" not in text
    assert "w_block = T.alloc_buffer((T.int64(256), T.int64(32)))" in text  # float16 is widened once a block of k
    assert "T.tanh" not in text and "T.exp" not in text


def test_gemv_reads_the_weight_once_in_one_parallel_loop() -> None:
    many = {"vector_bits": 512, "vector_registers": 32, "prefetch_bytes": 8192}
    func = schedule(packed_function((1, 4), 768, 768, "bias", "float32", 32), CpuGemv(many))
    assert func is not None
    assert extents(loops(func, tirx.ForKind.PARALLEL)) == {24}  # panels
    (k,) = [f for f in loops(func, tirx.ForKind.SERIAL) if f.loop_var.name == "k"]
    assert int(k.extent) == 768 // 2  # 4 rows x 2 registers x 2 steps: 16 sums
    ahead = re.findall(r"prefetch\(T.address_of\(weight\[(.*?)\]\)", str(k))  # 64 rows of 128 bytes
    assert ahead == [f"panel, k * T.int64(2) + T.int64({64 + step}), T.int64({c})" for step in (0, 1) for c in (0, 16)]
    assert "prefetch" not in str(schedule(packed_function((1, 4), 768, 768), CpuGemv({"prefetch_bytes": 1})))


@pytest.mark.parametrize(("rows", "sums"), [(1, 16), (2, 16), (3, 12), (7, 14), (12, 24)])
def test_gemv_has_sums_enough_to_hide_the_latency_of_a_multiply_add(rows: int, sums: int) -> None:
    many = {"vector_bits": 512, "vector_registers": 32}
    func = schedule(packed_function((1, rows), 768, 768, "bias", "float32", 32), CpuGemv(many))
    assert len(set(re.findall(r"acc\d+_\d+_\d+", str(func)))) == sums


def test_small_buffers_stay_off_the_runtimes_pool() -> None:
    """A call into the pool for every register tile would cost more than the tile."""
    pool = re.compile(r"load ptr, ptr @__TVMBackendAllocWorkspace")
    cases = [
        (packed_function((1, 1), 768, 768, "bias"), CpuGemv(CPU), 0),
        (packed_function(("b", "n"), 768, 768, "bias"), CpuMatmul(CPU), 2),  # packed x, and a task's sums
        (fuse(Softmax(), x=((4, 64), "float32")), CpuReduction(CPU), 0),
    ]
    for func, rule, calls in cases:
        library = tvm.compile(tvm.IRModule({"main": schedule(func, rule)}), target=CPU.tvm_target())
        assert len(pool.findall(library.mod.inspect_source("ll"))) == calls, type(rule).__name__


def test_small_work_stays_on_one_thread() -> None:
    assert not loops(schedule(packed_function((1, 1), 64, 33), CpuGemv(CPU)), tirx.ForKind.PARALLEL)
    for shape, threads in (((1, 1), 0), ((2, 4), 0), ((2, 200), 1)):
        func = schedule(fuse(LayerNorm(768, 1e-5, "float32"), x=((*shape, 768), "float32")), CpuReduction(CPU))
        assert len(loops(func, tirx.ForKind.PARALLEL)) == threads, shape


def test_symbolic_rows_are_parallel_only_where_there_are_many() -> None:
    func = schedule(fuse(LayerNorm(768, 1e-5, "float32"), x=(("b", "n", 768), "float32")), CpuReduction(CPU))
    assert len(loops(func, tirx.ForKind.PARALLEL)) == 1 and re.search(r"if b \* n .*>= ", str(func))
    assert CPU.limits.vector_bits is None or CPU.limits.vector_bits // 32 in extents(
        loops(func, tirx.ForKind.VECTORIZED)
    )


# -- what is not theirs ------------------------------------------------------------------------------------------------


class Transposed(nn.Module):
    """sum over k of x[k, i] y[j, k]: no axis along which both are read forwards."""

    def forward(self, x: nn.Tensor, y: nn.Tensor) -> nn.Tensor:
        def product(x: te.Tensor, y: te.Tensor) -> te.Tensor:
            k = te.reduce_axis((0, 64), name="k")
            return te.compute((x.shape[1], 96), lambda i, j: te.sum(x[k, i] * y[j, k], axis=k), name="product")

        return op.tensor_expr_op(product, "product", [x, y])


def test_rules_decline_what_is_not_theirs() -> None:
    many, few = packed_function(("b", "n"), 770, 97, "bias"), packed_function((1, 16), 770, 97)
    more = packed_function((1, 17), 770, 97)
    norm = fuse(LayerNorm(96, 1e-5, "float32"), x=(("b", "n", 96), "float32"))
    plain = fuse(Transposed(), x=((64, "n"), "float32"), y=((96, 64), "float32"))
    rules: dict[str, Any] = {
        "matmul": CpuMatmul(CPU),
        "gemv": CpuGemv(CPU),
        "reduction": CpuReduction(CPU),
    }
    taken = {
        name: [rule for rule, r in rules.items() if r.apply(func, CPU.tvm_target(), False) is not None]
        for name, func in {"many": many, "few": few, "more": more, "norm": norm, "plain": plain}.items()
    }
    assert taken == {"many": ["matmul"], "few": ["gemv"], "more": ["matmul"], "norm": ["reduction"], "plain": []}


def test_rules_leave_scheduled_functions_and_other_devices_alone() -> None:
    metal = load_target("metal").tvm_target()
    for func in (packed_function(("b", "n"), 770, 97), packed_function((1, 8), 770, 97)):
        for rule in (CpuMatmul(CPU), CpuGemv(CPU), CpuReduction(CPU)):
            assert rule.apply(func.with_attr("tirx.is_scheduled", True), CPU.tvm_target(), False) is None
            assert rule.apply(func, metal, False) is None


# -- instructions ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", ["float32", "float16"])
@pytest.mark.parametrize(("name", "sums"), [("x86-64-v4", 24), ("x86-64-v3", 12), ("arm64", 24)])
def test_matmul_keeps_its_sums_in_vector_registers(name: str, sums: int, storage: str) -> None:
    panel = load_target(name).layout.rows or 0
    products, _ = hot_loop(packed_function(("b", "n"), 768, 768, "residual", storage, panel), CpuMatmul, name)
    assert products >= sums and products % sums == 0  # one or more whole steps of k


@pytest.mark.parametrize("rows", [1, 4, 8, 12])
@pytest.mark.parametrize("name", list(MULTIPLY_ADD))
def test_gemv_keeps_its_sums_in_vector_registers(name: str, rows: int) -> None:
    panel = load_target(name).layout.rows or 0
    products, _ = hot_loop(packed_function((1, rows), 768, 768, "residual", "float32", panel), CpuGemv, name)
    assert products >= 8
