"""`TunableGemv`: DLight's schedule at DLight's point, and the right numbers at every other."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import tvm_ffi
from tvm import te, tirx
from tvm.s_tir import dlight
from wgsl_harness import run, source

from gpt2_tvm.build import lower_plan, make_plan
from gpt2_tvm.config import GPT2Config
from gpt2_tvm.errors import UserError
from gpt2_tvm.kernels.math import activation
from gpt2_tvm.schedules.gemv_config import GemvConfig, stock_config
from gpt2_tvm.schedules.registry import make_rules
from gpt2_tvm.schedules.tunable_gemv import TunableGemv
from gpt2_tvm.toolchains import callbacks, cuda
from targets import load_target, specialise

ODD = GPT2Config(vocab_size=301, n_positions=64, n_embd=96, n_layer=1, n_head=3)


def product(rows: int, n: int, k: int, dtype: str, epilogue: str = "", dims: int = 1) -> tirx.PrimFunc:
    """y[1, rows, N] (dims=2: [rows, 1, N]) = x W^T in float32, then `epilogue`: of b (bias), g (GELU), r (residual)."""
    lead = [1, rows] if dims == 1 else [rows, 1]
    x = te.placeholder([*lead, k], dtype, "x")
    w = te.placeholder([n, k], dtype, "w")
    axis = te.reduce_axis((0, k), "k")
    y = te.compute(
        [*lead, n], lambda b, m, j: te.sum(x[b, m, axis].astype("float32") * w[j, axis].astype("float32"), axis), "y"
    )
    inputs = [x, w]
    if "b" in epilogue:
        bias = te.placeholder([n], dtype, "bias")
        inputs.append(bias)
        before_bias = y
        y = te.compute(y.shape, lambda b, m, j: before_bias[b, m, j] + bias[j].astype("float32"), "biased")
    if "g" in epilogue:
        before_gelu = y
        y = te.compute(y.shape, lambda b, m, j: activation("gelu_new", before_gelu[b, m, j], True), "gelu")
    if "r" in epilogue:
        residual = te.placeholder([*lead, n], dtype, "residual")
        inputs.append(residual)
        before_residual = y
        y = te.compute(y.shape, lambda b, m, j: before_residual[b, m, j] + residual[b, m, j].astype("float32"), "added")
    if epilogue and dtype != "float32":
        wide = y
        y = te.compute(y.shape, lambda b, m, j: wide[b, m, j].astype(dtype), "cast")
    return te.create_prim_func([*inputs, y])


def expected(x: np.ndarray, w: np.ndarray, rest: list[np.ndarray], epilogue: str) -> np.ndarray:
    """The same in float64."""
    y = x.astype(np.float64) @ w.astype(np.float64).T
    rest = [a.astype(np.float64) for a in rest]
    if "b" in epilogue:
        y = y + rest.pop(0)
    if "g" in epilogue:
        y = 0.5 * y * (1 + np.tanh(np.sqrt(2 / np.pi) * (y + 0.044715 * y**3)))
    if "r" in epilogue:
        y = y + rest.pop(0)
    return y


def schedule(func: tirx.PrimFunc, config: GemvConfig | None, target: str = "webgpu") -> tirx.PrimFunc:
    device = load_target(target).tvm_target()
    with device:
        result = TunableGemv(config).apply(func, device, False)
    assert result is not None
    return next(iter(result.mod.functions.values()))


def check(func: tirx.PrimFunc, config: GemvConfig | None, epilogue: str = "") -> None:
    """Run on whatever WebGPU finds, against numpy. Every output element is written: it starts as NaN."""
    shapes = [[int(e) for e in p.shape] for p in func.params]
    dtypes = [str(p.dtype) for p in func.params]
    random = np.random.default_rng(sum(map(sum, shapes)))
    arrays = [random.standard_normal(s).astype(d) for s, d in zip(shapes[:-1], dtypes, strict=False)]
    arrays[1] = (arrays[1].astype("float32") / shapes[1][1] ** 0.5).astype(dtypes[1])
    out = np.full(shapes[-1], np.nan, dtypes[-1])
    result = run(schedule(func, config), [*arrays, out])[-1]
    tolerance = 2e-5 if dtypes[-1] == "float32" else 8e-3
    wanted = expected(arrays[0], arrays[1], arrays[2:], epilogue)
    np.testing.assert_allclose(result.astype(np.float64), wanted, rtol=0, atol=tolerance)


# -- DLight's point ------------------------------------------------------------------------------------------


@functools.cache
def fused(target: str, quantization: str, attention: str) -> tuple[Any, list[tuple[str, tirx.PrimFunc]]]:
    device = specialise(load_target(target))
    plan = make_plan(ODD, device, quantization, "baseline", attention, batch_sizes=(1, 2), verify_widths=(4,))
    lowered, _ = lower_plan(plan)
    functions = [(v.name_hint, f) for v, f in lowered.fused.functions_items() if isinstance(f, tirx.PrimFunc)]
    return device.tvm_target(), [
        (name, f) for name, f in functions if not f.attrs or "tirx.is_scheduled" not in f.attrs
    ]


@pytest.mark.parametrize(
    "target", ["cuda", "metal", *(pytest.param(name, marks=pytest.mark.heavy) for name in ("gfx942", "webgpu"))]
)
@pytest.mark.parametrize(
    ("quantization", "attention"), [("q0f16", "flash"), pytest.param("q0f32", "materialized", marks=pytest.mark.heavy)]
)
def test_stock_values_give_dlights_schedule(target: str, quantization: str, attention: str) -> None:
    device, functions = fused(target, quantization, attention)
    compared = 0
    with device:
        for name, func in functions:
            try:
                theirs = dlight.gpu.GEMV().apply(func, device, False)
            except ValueError:  # a defect: it accepts p·V of materialised attention on Metal, and fails in the middle
                assert target == "metal" and attention == "materialized", name
                assert TunableGemv().apply(func, device, False) is None
                continue
            if theirs is None:
                continue
            ours = TunableGemv(guard=False).apply(func, device, False)
            assert ours is not None, f"{name} was not recognised"
            assert tvm_ffi.structural_equal(theirs.mod, ours.mod), name
            guarded = TunableGemv().apply(func, device, False)
            point = stock_config(device, func.params[1].shape[0], 96)
            head = len(func.params) == 3 and ODD.vocab_size % point.ts != 0
            assert tvm_ffi.structural_equal(guarded.mod, theirs.mod) != head, f"{name}: only a partial head differs"
            compared += 1
    assert compared >= 5  # c_attn, c_proj, c_fc, mlp.c_proj and the head


@pytest.mark.parametrize("epilogue", ["", "b"])
def test_a_partial_tile_does_not_write_past_the_end(epilogue: str) -> None:
    """On CUDA 16 rows a block: 131 outputs leave 13 rows of the last block without an output. DLight's kernel writes
    them all when nothing follows the product."""
    device = load_target("h200").tvm_target()

    def last_store(func: tirx.PrimFunc) -> str:
        # the source is all that is looked at: nothing compiles it
        with callbacks.replaced({cuda.CALLBACK: lambda code, *_: bytearray(code.encode())}):
            lines = source(func, device).splitlines()
        name = str(func.params[-1].name)
        at = max(i for i, line in enumerate(lines) if line.strip().startswith(f"{name}_ptr["))
        return lines[at - 1]

    func = product(1, 131, 200, "float32", epilogue)
    assert "< 131" in last_store(schedule(func, None, "h200"))
    theirs = dlight.gpu.GEMV().apply(func, device, False)
    if not epilogue:
        assert "< 131" not in last_store(theirs.mod["main"]), "TVM has mended it: the guard can go"
    ((_, shipped),) = make_rules(["gemv"], load_target("h200"))
    (kernel,) = shipped.apply(func, device, False).mod.functions.values()
    assert "< 131" in last_store(kernel), "the rule that compile uses has the guard"


def test_stock_values_are_those_of_each_kind() -> None:
    cuda = load_target("h200").tvm_target()
    metal = load_target("m2-ultra").tvm_target()
    point = stock_config(cuda, 50257, 768)
    assert (point.ts, point.tr, point.tile_s, point.tile_r, point.vec_c) == (16, 32, 1, 8, 4)
    assert stock_config(cuda, 50257, 100).tile_r == 1
    assert (stock_config(metal, 3072, 768).ts, stock_config(metal, 768, 3072).ts) == (4, 2)
    assert stock_config(metal, 3072, 768).s_axis == "x"
    assert stock_config(load_target("webgpu").tvm_target(), 768, 768).threads == 64


# -- other points --------------------------------------------------------------------------------------------

POINTS = {
    "study 4090": GemvConfig(8, 16, 1, 8, 4, 4),
    "study m2": GemvConfig(2, 32, 1, 16, 1, 4, s_axis="x"),
    "tile_s": GemvConfig(4, 16, 4, 8, 16, 4, shared_vector=True, vec_shared=4, unroll=256),
    "tile_s odd": GemvConfig(2, 8, 3, 4, 4, 2),
    "one thread a row": GemvConfig(64, 1, 1, 4, 16, 4),
    "all threads on one row": GemvConfig(1, 128, 2, 4, 16, 4),
    "s on x, shared": GemvConfig(16, 4, 2, 8, 8, 1, s_axis="x", shared_vector=True, vec_shared=2, unroll=0),
    "split_k": GemvConfig(4, 8, 2, 4, 16, 4, split_k=4),
    "split_k, shared x": GemvConfig(4, 16, 1, 4, 4, 4, shared_vector=True, vec_shared=4, split_k=5),
    "through shared memory": GemvConfig(4, 16, 2, 4, 8, 2, reduction="shared"),
}


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("rows", [1, pytest.param(3, marks=pytest.mark.heavy), 8])
def test_points_compute_the_product(point: str, rows: int) -> None:
    # neither a multiple of a tile: 131 outputs, 200 = 8 · 25 reduced (a step beyond the end is predicated)
    check(product(rows, 131, 200, "float32", "bgr"), POINTS[point], "bgr")


@pytest.mark.parametrize("epilogue", ["", "b", "bg", "br"])
@pytest.mark.parametrize("rows", [1, 2, 4])
def test_epilogues(epilogue: str, rows: int) -> None:
    check(product(rows, 96, 64, "float32", epilogue, dims=2), POINTS["tile_s"], epilogue)


@pytest.mark.parametrize("point", ["study 4090", "tile_s", "split_k"])
def test_float16(point: str) -> None:
    config = replace(POINTS[point], vec_load=min(POINTS[point].vec_load, 8))  # WGSL's vectors have 4 lanes at most
    check(product(1, 96, 256, "float16", "bgr"), config, "bgr")
    check(product(4, 96, 256, "float16", "br"), config, "br")


def test_slices_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="SPLIT_K = 4 does not divide K = 98"):
        schedule(product(1, 64, 98, "float32"), POINTS["split_k"])


@pytest.mark.parametrize("rows", range(1, 9))
def test_dlights_point_for_every_number_of_rows(rows: int) -> None:
    check(product(rows, 70, 96, "float32", "b"), None, "b")


def test_nine_rows_are_declined() -> None:
    device = load_target("webgpu").tvm_target()
    assert TunableGemv().apply(product(9, 64, 64, "float32"), device, False) is None


def test_a_chooser_may_decline() -> None:
    device = load_target("webgpu").tvm_target()
    rule = TunableGemv(lambda shape, target: None)
    assert rule.apply(product(1, 64, 64, "float32"), device, False) is None


def test_configs_round_trip_and_refuse_nonsense() -> None:
    point = POINTS["tile_s"]
    assert GemvConfig.from_json(point.to_json()) == point
    assert "TILE_R" in point.to_json()
    for values, word in [
        ({"TS": 4}, "TR"),
        ({"TS": 4, "TR": 0}, "TR"),
        ({"TS": 4, "TR": 8, "TILE": 1}, "TILE"),
        ({"TS": 4, "TR": 8, "TILE_R": 6, "VEC_C": 4}, "VEC_C"),
        ({"TS": 4, "TR": 8, "S_AXIS": "z"}, "S_AXIS"),
    ]:
        with pytest.raises(UserError, match=word):
            GemvConfig.from_json(values)
