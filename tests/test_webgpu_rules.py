"""Our rules for WGSL: every kernel run through wgpu and compared with numpy in float64, and what its source may be."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import tvm
from tvm import te, tirx
from wgsl_harness import lower_to_wgsl, run, source

from gpt2_tvm.errors import UserError
from gpt2_tvm.kernels.math import activation
from gpt2_tvm.schedules.gemv_config import GemvConfig
from gpt2_tvm.schedules.webgpu_gemv import WebgpuGemv
from gpt2_tvm.schedules.webgpu_matmul import MatmulConfig, WebgpuMatmul
from gpt2_tvm.schedules.webgpu_product import match_product
from gpt2_tvm.schedules.webgpu_prologue import WINDOW
from gpt2_tvm.toolchains.web_needs import shared_bytes
from targets import load_target

TARGET = load_target("webgpu").tvm_target()
SMALL = tvm.target.Target({**dict(load_target("webgpu").tvm_attributes()), "max_shared_memory_per_block": 4096})
# Of a few hundred products of numbers of size 1, as a share of the largest; float16 results have 11 bits
TOLERANCE = {"float32": 2e-6, "float16": 2e-3}
DIRECT = MatmulConfig(shared_k=0)
SHARED = MatmulConfig(shared_k=16)


def product(shape: tuple[Any, Any], n: int, k: int, dtype: str = "float32", epilogue: str = "") -> tirx.PrimFunc:
    """y[*shape, N] = x W^T in float32, then `epilogue`: of b (bias), g (GELU), r (residual)."""
    x, w = te.placeholder([*shape, k], dtype, "x"), te.placeholder([n, k], dtype, "w")
    return te.create_prim_func(_with_epilogue(x, w, [x, w], epilogue))


def normed_product(shape: tuple[int, int], n: int, k: int, epilogue: str = "") -> tirx.PrimFunc:
    """The same of LayerNorm(x) with gain and bias, as the model writes it."""
    x, gain, bias = (
        te.placeholder([*shape, k], "float32", "x"),
        te.placeholder([k], name="g"),
        te.placeholder([k], name="h"),
    )
    w = te.placeholder([n, k], "float32", "w")
    i, j = te.reduce_axis((0, k), "i"), te.reduce_axis((0, k), "j")
    total = te.compute(shape, lambda b, t: te.sum(x[b, t, i], i), "total")
    mean = te.compute(shape, lambda b, t: total[b, t] / float(k), "mean")
    square = te.compute(shape, lambda b, t: te.sum((x[b, t, j] - mean[b, t]) * (x[b, t, j] - mean[b, t]), j), "square")
    rstd = te.compute(shape, lambda b, t: tirx.rsqrt(square[b, t] / float(k) + 1e-5), "rstd")
    normed = te.compute(
        x.shape, lambda b, t, e: (x[b, t, e] - mean[b, t]) * rstd[b, t] * gain[e] + bias[e], "normalised"
    )
    return te.create_prim_func(_with_epilogue(normed, w, [x, gain, bias, w], epilogue))


def _with_epilogue(x: te.Tensor, w: te.Tensor, inputs: list[te.Tensor], epilogue: str) -> list[te.Tensor]:
    axis = te.reduce_axis((0, w.shape[1]), "k")
    shape, dtype = (*x.shape[:2], w.shape[0]), str(w.dtype)
    y = te.compute(
        shape, lambda b, m, o: te.sum(x[b, m, axis].astype("float32") * w[o, axis].astype("float32"), axis), "y"
    )
    for what in epilogue:
        y, more = _after(y, what, dtype)
        inputs = [*inputs, *more]
    if epilogue and dtype != "float32":
        wide = y
        y = te.compute(shape, lambda *i: wide(*i).astype(dtype), "cast")
    return [*inputs, y]


def _after(y: te.Tensor, what: str, dtype: str) -> tuple[te.Tensor, list[te.Tensor]]:
    """y with one of the epilogue's operations, and the inputs that it brings."""
    if what == "b":
        bias = te.placeholder([y.shape[2]], dtype, "bias")
        return te.compute(y.shape, lambda b, m, o: y[b, m, o] + bias[o].astype("float32"), "biased"), [bias]
    if what == "g":
        return te.compute(y.shape, lambda b, m, o: activation("gelu_new", y[b, m, o], False), "gelu"), []
    residual = te.placeholder(y.shape, dtype, "residual")
    return te.compute(y.shape, lambda *i: y(*i) + residual(*i).astype("float32"), "added"), [residual]


def scheduled(rule: Any, func: tirx.PrimFunc, target: Any = TARGET) -> tirx.PrimFunc:
    schedule = rule.apply(func, target, False)
    assert schedule is not None, "the rule does not take this function"
    return schedule.mod["main"].with_attr("tirx.is_scheduled", True)


def normalised(x: np.ndarray) -> np.ndarray:
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5)


def check(func: tirx.PrimFunc, sizes: dict[str, int], epilogue: str) -> None:
    """Run a scheduled product with random inputs; rows and columns of y that stay NaN fail."""
    random = np.random.default_rng(0)
    shapes = [[sizes[e.name] if isinstance(e, tirx.Var) else int(e) for e in p.shape] for p in func.params]
    arrays = [random.standard_normal(shape).astype(str(p.dtype)) for shape, p in zip(shapes, func.params, strict=True)]
    arrays[-1][...] = np.nan
    names = [str(p.name) for p in func.params]
    given = {name: array.astype(np.float64) for name, array in zip(names, arrays, strict=True)}
    x = normalised(given["x"]) * given["g"] + given["h"] if "g" in given else given["x"]
    wanted = x @ given["w"].T
    for what in epilogue:
        if what == "g":
            inner = np.sqrt(2 / np.pi) * (wanted + 0.044715 * wanted**3)
            wanted = wanted * 0.5 * (1 + np.tanh(inner))
        else:
            wanted = wanted + given["bias" if what == "b" else "residual"]
    result = run(func, arrays)
    tolerance = TOLERANCE["float16" if "float16" in [str(p.dtype) for p in func.params] else "float32"]
    np.testing.assert_allclose(result[-1], wanted, rtol=0, atol=tolerance * max(np.abs(wanted).max(), 1))
    for before, after in zip(arrays[:-1], result[:-1], strict=True):
        np.testing.assert_array_equal(before, after)


# -- matmul -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [DIRECT, SHARED, MatmulConfig(3, 4, 4, 8, 8)], ids=["direct", "shared", "odd tiles"])
@pytest.mark.parametrize(
    ("rows", "n", "k", "dtype", "epilogue"),
    [
        ((1, 1), 64, 64, "float32", ""),
        ((2, 35), 66, 40, "float32", "bg"),  # neither rows nor columns fill their tiles
        ((1, 65), 64, 37, "float32", "bgr"),  # no vectors along k
        ((1, 70), 5, 50, "float16", "br"),  # vectors of two
        ((3, 9), 130, 24, "float16", "b"),  # k ends inside a block of shared memory
    ],
)
def test_matmul(config: MatmulConfig, rows: tuple[int, int], n: int, k: int, dtype: str, epilogue: str) -> None:
    check(scheduled(WebgpuMatmul(config), product(rows, n, k, dtype, epilogue)), {}, epilogue)


@pytest.mark.parametrize("config", [DIRECT, SHARED], ids=["direct", "shared"])
def test_matmul_of_any_number_of_rows(config: MatmulConfig) -> None:
    b, n = te.var("b", "int64"), te.var("n", "int64")
    func = scheduled(WebgpuMatmul(config), product((b, n), 70, 24, "float32", "br"))
    for batch, length in [(1, 1), (1, 64), (3, 22), (2, 65)]:
        check(func, {"b": batch, "n": length}, "br")


def test_matmul_of_one_row_a_sequence() -> None:
    """The head of prefill: the batch alone is unknown, and is taken for a small one."""
    func = product((te.var("b", "int64"), 1), 97, 32)
    lowered = scheduled(WebgpuMatmul(), func)
    check(lowered, {"b": 1}, "")
    check(lowered, {"b": 11}, "")
    text = source(lowered, TARGET)
    assert "acc : array<f32, 8>" in text  # one row of eight columns a thread, not eight


def test_matmul_keeps_to_the_device() -> None:
    large = WebgpuMatmul(MatmulConfig(8, 8, 16, 32, 32))
    for target, most in ((TARGET, 32768), (SMALL, 4096)):
        func = scheduled(large, product((1, 300), 256, 64), target)
        text = source(func, target)
        (threads,) = re.findall(r"@workgroup_size\((\d+), 1, 1\)", text)
        shared = [16 * int(count) for count in re.findall(r"var<workgroup> \w+ : array<vec4<f32>, (\d+)>", text)]
        assert int(threads) <= 256 and sum(shared) <= most
        check(func, {}, "")


@pytest.mark.parametrize("values", [{"tile_m": 0}, {"shared_k": 6}, {"shared_k": -4}])
def test_a_wrong_config_is_refused(values: dict[str, int]) -> None:
    with pytest.raises(UserError, match="shared_k a multiple of 4"):
        MatmulConfig(**values)


def test_what_is_no_product_of_this_kind_is_left_alone() -> None:
    x, w = te.placeholder([4, 8, 16], name="x"), te.placeholder([4, 12, 16], name="w")
    k = te.reduce_axis((0, 16), "k")
    batched = te.create_prim_func([x, w, te.compute((4, 8, 12), lambda b, i, j: te.sum(x[b, i, k] * w[b, j, k], k))])
    softmax_like = te.create_prim_func([x, te.compute((4, 8), lambda b, i: te.sum(te.exp(x[b, i, k]), k))])
    for func in (batched, softmax_like):
        assert match_product(func) is None
        assert WebgpuMatmul().apply(func, TARGET, False) is None
        assert WebgpuGemv().apply(func, TARGET, False) is None
    many = product((2, 8), 32, 32)
    assert WebgpuGemv().apply(many, TARGET, False) is None
    assert WebgpuMatmul().apply(normed_product((1, 1), 32, 32), TARGET, False) is None


# -- gemv ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [None, GemvConfig(4, 32, 2), GemvConfig(16, 1, 3), GemvConfig(1, 64, 1)], ids=str)
@pytest.mark.parametrize(
    ("rows", "n", "k", "dtype", "epilogue"),
    [
        ((1, 1), 70, 24, "float32", ""),
        ((1, 8), 66, 40, "float32", "bg"),
        ((3, 1), 64, 37, "float32", "bgr"),
        ((2, 2), 131, 50, "float16", "br"),
        ((1, 1), 5, 1028, "float32", "b"),
    ],
)
def test_gemv(config: GemvConfig | None, rows: tuple[int, int], n: int, k: int, dtype: str, epilogue: str) -> None:
    for lone in (0, 4):
        check(scheduled(WebgpuGemv(config, lone), product(rows, n, k, dtype, epilogue)), {}, epilogue)


@pytest.mark.parametrize("rows", [(1, 1), (1, 3), (8, 1)])
@pytest.mark.parametrize(("n", "k"), [(70, 32), (33, 300), (16, 50), (8, 37)])
def test_gemv_of_a_normalised_vector(rows: tuple[int, int], n: int, k: int) -> None:
    for lone in (0, 4):
        check(scheduled(WebgpuGemv(lone=lone), normed_product(rows, n, k, "bg")), {}, "bg")


@pytest.mark.parametrize("rows", [(1, 1), (1, 3), (8, 1)])
@pytest.mark.parametrize(("n", "k"), [(70, 256), (33, 300)])
def test_gemv_of_a_vector_in_windows(rows: tuple[int, int], n: int, k: int) -> None:
    """The same numbers, and shared memory that does not grow with the vector."""
    kernel = scheduled(WebgpuGemv(lone=8, windowed=True), normed_product(rows, n, k, "bg"))
    check(kernel, {}, "bg")
    partial_sums = 2 * 8 * 4  # of a mean and a variance, 8 rows, 4 threads
    assert shared_bytes(lower_to_wgsl(kernel).shader) <= 4 * (WINDOW + partial_sums)


def test_only_vectors_longer_than_a_window_come_in_windows() -> None:
    rule = WebgpuGemv(lone=8, windowed=True)
    for func in (product((1, 1), 64, 512), normed_product((1, 1), 64, WINDOW), normed_product((1, 1), 64, 257)):
        assert rule.apply(func, TARGET, False) is None


def test_gemv_without_room_for_the_vector_is_left_to_the_next_rule() -> None:
    assert WebgpuGemv().apply(normed_product((1, 8), 64, 512), SMALL, False) is None


# -- the source ---------------------------------------------------------------------------------------------


def test_what_is_read_in_vectors_is_an_array_of_vectors() -> None:
    for rule, rows in ((WebgpuGemv(), (1, 1)), (WebgpuMatmul(), (1, 40))):
        for dtype, element in (("float32", "f32"), ("float16", "f16")):
            text = source(scheduled(rule, product(rows, 64, 64, dtype, "b")), TARGET)
            bindings = dict(re.findall(r"var<storage, read(?:_write)?> (\w+)_ptr : array<(.+)>;", text))
            assert bindings["x"] == bindings["w"] == f"vec4<{element}>"
            assert bindings["bias"] == element  # one at a time
        odd = source(scheduled(rule, product(rows, 64, 37)), TARGET)
        assert "vec4" not in odd and "vec2" not in odd


def test_a_tensor_that_is_read_both_ways_stays_an_array_of_numbers() -> None:
    from tvm.script import tirx as T

    @T.prim_func(private=True, s_tir=True)
    def mixed(x: T.Buffer((64,), "float32"), y: T.Buffer((68,), "float32"), out: T.Buffer((64,), "float32")):
        T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True})
        for _ in T.thread_binding(1, thread="blockIdx.x"):
            for t in T.thread_binding(16, thread="threadIdx.x"):
                for lane in T.vectorized(4):
                    out[t * 4 + lane] = x[t * 4 + lane] + y[t * 4 + 1 + lane] + x[63]

    text = source(mixed, TARGET)
    bindings = dict(re.findall(r"var<storage, read(?:_write)?> (\w+)_ptr : array<(.+)>;", text))
    assert bindings == {"x": "f32", "y": "f32", "out": "vec4<f32>"}  # x: also alone; y: not on a boundary
    x, y = np.arange(64, dtype=np.float32), np.arange(68, dtype=np.float32)
    np.testing.assert_array_equal(run(mixed, [x, y, np.zeros(64, np.float32)])[-1], x + y[1:65] + 63)


def test_kernels_stay_small() -> None:
    """What a browser compiles while somebody waits: DLight's matmul has thousands of statements with GELU."""
    for rule, rows, most in ((WebgpuMatmul(SHARED), (1, 300), 1400), (WebgpuMatmul(DIRECT), (1, 300), 1400)):
        text = source(scheduled(rule, product(rows, 1024, 256, "float32", "bg")), TARGET)
        assert text.count(";") < most
    assert source(scheduled(WebgpuGemv(), normed_product((1, 1), 1024, 256, "bg")), TARGET).count(";") < 200
