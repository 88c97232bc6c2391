"""Quantised weights on GPUs: the right numbers through wgpu, nothing of the matrix's size in floats anywhere, and the
instructions that CUDA, Metal and ROCm get."""

from __future__ import annotations

import functools
import json
import re
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tvm
import tvm_ffi
from quantised_products import ROWS, Layer, arguments, check, function, gemv, scheduled
from reference import checkpoint, random_rows
from tvm import relax, tirx
from tvm.s_tir import dlight
from wgsl_harness import lower, run, source

from gpt2_tvm import UserError, toolchains
from gpt2_tvm.build import lower_plan, make_plan
from gpt2_tvm.config import GPT2Config
from gpt2_tvm.quantization import SCHEMES, get_scheme
from gpt2_tvm.schedules.gemv_config import GemvConfig, quantised_config
from gpt2_tvm.schedules.registry import make_rules
from gpt2_tvm.schedules.tunable_gemv import TunableGemv
from gpt2_tvm.schedules.webgpu_matmul import WebgpuMatmul
from gpt2_tvm.toolchains import callbacks, cuda, cuda_toolkit, tensor_intrin
from targets import load_target, specialise
from tuning.static import sass

QUANTISED = ("q8f32", "q8f16", "q4f32_1", "q4f16_1")
# every matrix has a size of its own, which no activation, cache or result shares
ODD = GPT2Config(vocab_size=331, n_positions=40, n_embd=96, n_layer=1, n_head=3, n_inner=136)


# -- numbers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", QUANTISED)
@pytest.mark.parametrize(
    ("rows", "n", "k", "epilogue"),
    [
        (1, 131, 256, "residual"),  # loads of 16 bytes
        (1, 33, 70, "none"),  # rows that are no whole number of words, groups or loads
        (1, 5, 9, "gelu"),
        (3, 64, 96, "bias"),
        (8, 131, 72, "residual"),
    ],
)
def test_gemv(scheme: str, rows: int, n: int, k: int, epilogue: str) -> None:
    layer = Layer(scheme, rows, n, k, epilogue)
    given = arguments(layer)
    check(layer, run(gemv(layer), given)[-1], given)


POINTS = {
    "tile_s": GemvConfig(4, 8, 4, 8, 4, 1, unroll=256),
    "wide, shared vector": GemvConfig(8, 4, 2, 16, 16, 1, shared_vector=True),
    "one thread a row": GemvConfig(64, 1, 1, 32, 8, 1),
    "split_k": GemvConfig(4, 4, 1, 8, 4, 1, split_k=4),
    "s on x": GemvConfig(16, 4, 2, 8, 8, 1, s_axis="x", unroll=0),
}


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize(("scheme", "rows"), [("q8f32", 1), ("q8f32", 4), ("q4f32_1", 1)])
def test_points_of_the_space(point: str, scheme: str, rows: int) -> None:
    layer = Layer(scheme, rows, 70, 256, "bias")
    given = arguments(layer)
    check(layer, run(gemv(layer, choose=POINTS[point]), given)[-1], given)


@pytest.mark.parametrize("scheme", QUANTISED)
@pytest.mark.parametrize(("rows", "n", "k"), [(17, 70, 72), (1, 33, 66)])
def test_matmul_of_many_rows(scheme: str, rows: int, n: int, k: int) -> None:
    layer = Layer(scheme, rows, n, k, "bias")  # the same loops as for a symbolic number, which the models below have
    given = arguments(layer)
    kernel = scheduled(function(layer), WebgpuMatmul(), load_target("webgpu").tvm_target())
    check(layer, run(kernel, given)[-1], given)


@pytest.mark.parametrize("scheme", ["q8f32", pytest.param("q4f32_1", marks=pytest.mark.heavy)])
def test_dlights_matmul_takes_them_too(scheme: str) -> None:
    layer = Layer(scheme, None, 40, 66, "none")
    given = arguments(layer, 9)
    kernel = scheduled(function(layer), dlight.gpu.Matmul(), load_target("webgpu").tvm_target())
    check(layer, run(kernel, given)[-1], given)


@pytest.mark.parametrize("scheme", ["q8f32", "q4f32_1"])
def test_rows_that_are_hard(scheme: str) -> None:
    """Zeros, one value, outliers and the smallest numbers: what numpy makes of the stored arrays, and no NaN."""
    weight = np.zeros((7, 64), np.float32)
    weight[1] = -3.5
    weight[2, 5] = 1e30
    weight[3] = 3e38 / 64
    weight[4, 40] = 1e-30
    weight[5] = np.linspace(-1, 1, 64)
    layer = Layer(scheme, 1, 7, 64)
    given = arguments(layer, weight=weight)
    given[0][:] = 1.0
    result = run(gemv(layer), given)[-1][0, 0].astype(np.float64)
    wanted = weight.astype(np.float64).sum(axis=1)
    assert np.isfinite(result).all() and not result[[0, 6]].any()
    step = np.abs(weight).max(axis=1).astype(np.float64) / (127 if "8" in scheme else 7)
    assert (np.abs(result - wanted) <= 64 * step * 0.51 + 1e-5 * np.abs(wanted)).all()


def test_dlights_point_is_dlights_schedule() -> None:
    """Where no rounding is taken out: float32 arithmetic."""
    for target in ("h200", "m1", "gfx942", "webgpu"):
        device = load_target(target).tvm_target()
        for layer in (Layer("q8f32", 1, 131, 96, "bias"), Layer("q4f32_1", 1, 131, 96, "bias")):
            func = function(layer, target)
            with device:
                theirs = dlight.gpu.GEMV().apply(func, device, False)
                ours = TunableGemv(guard=False).apply(func, device, False)
            assert theirs is not None and ours is not None
            assert tvm_ffi.structural_equal(theirs.mod, ours.mod), (target, layer.scheme)


def test_the_rule_leaves_floats_and_many_rows_to_others() -> None:
    ((_, rule),) = make_rules(["quantised-gemv"], load_target("webgpu"))
    device = load_target("webgpu").tvm_target()
    for layer in (Layer("q0f32", 1, 64, 64), Layer("q8f32", 9, 64, 64), Layer("q8f32", None, 64, 64)):
        assert rule.apply(function(layer), device, False) is None, layer


def test_points_have_wide_loads_and_no_idle_threads() -> None:
    for target, threads in (("h200", 128), ("webgpu", 128), ("m1", 128), ("gfx942", 128)):
        device = load_target(target).tvm_target()
        for k in (256, 768, 1024, 1280, 1600, 3072, 6400):
            for a_word in (4, 8):
                c = quantised_config(device, 768, k, a_word)
                assert c.threads == threads and k % (c.tr * c.tile_r) == 0, (target, k, c)
                assert c.vec_load == 16 or k % (4 * a_word * 4), (target, k, c)
        assert quantised_config(device, 5, 3, 4).tile_r == 4


# -- memory ------------------------------------------------------------------------------------------------------------


def float_matrices(plan: Any) -> list[str]:
    """Where a lowered plan holds a whole weight matrix in floats: what functions pass each other, and what any kernel
    allocates in any memory after TVM has narrowed buffers to what is touched."""
    lowered, _ = lower_plan(plan)
    e, inner, v = plan.config.n_embd, plan.config.n_inner, plan.config.vocab_size
    sizes = {prod(shape) for shape in ((3 * e, e), (e, e), (inner, e), (v, e))}
    found = []

    def is_matrix(shape: Any, dtype: str) -> bool:
        fixed = all(isinstance(extent, int | tirx.IntImm) for extent in shape)
        return dtype.startswith(("float", "bfloat")) and fixed and prod(map(int, shape)) in sizes

    for var, func in lowered.lowered.functions_items():
        if isinstance(func, relax.Function):
            for block in func.body.blocks:
                for binding in block.bindings:
                    ty = binding.var.ty
                    is_tensor = isinstance(ty, relax.TensorType) and ty.shape is not None
                    if is_tensor and is_matrix(ty.shape.values, str(ty.dtype)):
                        found.append(f"{var.name_hint}: {binding.var.name}")
    for var, func in lowered.scheduled.functions_items():
        if not isinstance(func, tirx.PrimFunc) or "dequantise" not in var.name_hint:
            continue
        found += [f"{var.name_hint}: {p.name}" for p in func.params if is_matrix(p.shape, str(p.dtype))]
        host, kernels, _ = lower(func, plan.target.tvm_target())

        for module in (host, kernels):
            for _, body in module.functions_items():
                made: list[Any] = []
                tvm_ffi.structural_walk(body.body, [(tirx.AllocBuffer, made.append)])
                buffers = [node.buffer for node in made]
                found += [f"{var.name_hint}: {b.name}" for b in buffers if is_matrix(b.shape, str(b.dtype))]
    return found


def plan_for(target: str, scheme: str, **options: Any) -> Any:
    return make_plan(ODD, specialise(load_target(target)), scheme, verify_widths=(4,), **options)


@pytest.mark.parametrize(
    ("target", "scheme"),
    [
        ("webgpu", "q8f32"),
        ("webgpu", "q4f32_1"),
        pytest.param("h200", "q8f16", marks=pytest.mark.heavy),
        pytest.param("h200", "q4f16_1", marks=pytest.mark.heavy),
        pytest.param("m1", "q8f16", marks=pytest.mark.heavy),
        pytest.param("gfx942", "q8f32", marks=pytest.mark.heavy),
    ],
)
def test_no_dequantised_matrix_lies_in_memory(target: str, scheme: str) -> None:
    assert float_matrices(plan_for(target, scheme)) == []


def test_a_dequantised_matrix_would_be_found() -> None:
    found = float_matrices(plan_for("webgpu", "q8f32", passes="without-dequantize-gemv"))
    assert any("decode_b1" in where for where in found) and any("prefill" in where for where in found)


# -- code --------------------------------------------------------------------------------------------------------------


def cuda_source(func: tirx.PrimFunc) -> str:
    with callbacks.replaced({cuda.CALLBACK: lambda code, *_: bytearray(code.encode())}):
        return source(func, load_target("h200").tvm_target())


CUDA_LAYERS = {
    "one row": Layer("q8f16", 1, 2304, 768, "bias"),
    "float32": Layer("q8f32", 1, 768, 3072, "residual"),
    "four rows": Layer("q8f16", 4, 3072, 768, "gelu"),
    "4 bits": Layer("q4f16_1", 1, 768, 1024, "bias"),
    "prefill": Layer("q8f16", None, 2304, 768, "bias"),
}


@functools.cache
def cuda_kernels() -> dict[str, sass.Kernel]:
    """All of `CUDA_LAYERS` for sm_90, in one compilation each."""
    toolkit = cuda_toolkit.find()
    assert toolkit is not None
    tensor_intrin.load("cuda")
    found = {}
    for name, layer in CUDA_LAYERS.items():
        if layer.rows is None:
            kernel = scheduled(function(layer, "h200"), dlight.gpu.Matmul(), load_target("h200").tvm_target())
        else:
            kernel = gemv(layer, "h200")
        with cuda._cuda_path(toolkit.root):
            (found[name],) = sass.kernels(cuda._nvrtc(cuda_source(kernel), "sm_90", "cubin", toolkit))
    return found


needs_cuda = [
    pytest.mark.skipif(
        cuda.missing(load_target("cuda")) is not None, reason="needs the CUDA compiler: pip install 'gpt2-tvm[cuda]'"
    ),
    pytest.mark.skipif(sass.tool() is None, reason=f"needs {sass.PACKAGES} from PyPI"),
]


@pytest.mark.parametrize("name", [pytest.param(n, marks=needs_cuda) for n in CUDA_LAYERS if n != "prefill"])
def test_cuda_loads_sixteen_bytes_and_spills_nothing(name: str) -> None:
    kernel, layer = cuda_kernels()[name], CUDA_LAYERS[name]
    point = quantised_config(load_target("h200").tvm_target(), layer.n, layer.k, 4 if "8" in layer.scheme else 8)
    steps = layer.k // (point.tr * point.tile_r)
    assert kernel.counts["LDG128"] >= steps, kernel.mix
    assert not kernel.stack and not kernel.local and not kernel.counts["LDL"] and not kernel.counts["STL"]
    assert kernel.registers <= 96
    assert kernel.mix["FFMA"] >= steps * point.tile_r, "one multiply-add a weight"
    # every weight is converted once, from its byte or nibble; to float16 and back it never goes
    converted = sum(kernel.mix.get(key, 0) for key in ("I2F", "I2FP"))
    assert steps * point.tile_r <= converted <= steps * point.tile_r + 8
    assert not kernel.mix.get("F2F") and kernel.mix.get("F2FP", 0) <= max(8, 4 * (layer.rows or 1))


@pytest.mark.parametrize("name", [pytest.param("prefill", marks=needs_cuda)])
def test_cuda_prefill_uses_tensor_cores(name: str) -> None:
    kernel = cuda_kernels()[name]
    assert kernel.counts["HMMA"] and kernel.counts["LDSM"] and not kernel.counts["LDL"] and not kernel.stack


@pytest.mark.parametrize(
    ("target", "wide"), [("m1", "uint4"), pytest.param("gfx942", "dwordx4", marks=pytest.mark.heavy)]
)
def test_other_gpus_load_sixteen_bytes(target: str, wide: str) -> None:
    device = load_target(target)
    if what := toolchains.missing(device):
        pytest.skip(f"needs {what}")
    toolchains.prepare(device)
    with toolchains.compiling(device) as tvm_target:
        assert wide in source(gemv(Layer("q8f16", 1, 512, 768, "bias"), target), tvm_target)


@pytest.mark.parametrize("rows", [1, None])
def test_q8f32_and_q4f32_need_no_float16_on_webgpu(rows: int | None) -> None:
    device = load_target("webgpu").tvm_target()
    for scheme in ("q8f32", "q4f32_1"):
        layer = Layer(scheme, rows, 64, 64, "bias")
        kernel = gemv(layer) if rows else scheduled(function(layer), WebgpuMatmul(), device)
        text = source(kernel, device)
        assert not re.search(r"\b(f16|i8|u8)\b", text) and re.search(r"array<(u32|vec[24]<u32>)>", text)


# -- models ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["h200", "m1", "gfx942", "webgpu"])
def test_every_quantised_scheme_is_for_every_gpu(target: str) -> None:
    for scheme in QUANTISED:
        assert make_plan(ODD, load_target(target), scheme).scheme == get_scheme(scheme)
    for scheme in SCHEMES:
        if scheme not in QUANTISED and not scheme.startswith("q0f") and (scheme, target) != ("q16f32", "webgpu"):
            with pytest.raises(UserError) as refused:
                make_plan(ODD, load_target(target), scheme)
            message = str(refused.value)
            assert scheme in message and "q8f32" in message and "CPU" in message and "\n" not in message


@pytest.mark.parametrize(
    ("scheme", "tied", "ours"),
    [
        ("q4f32_1", False, True),  # of q8f32 and our rules: test_passes.py
        ("q8f16", True, True),
        ("q8f32-float-embedding", False, True),
        ("q8f32", True, False),
        ("q4f32_1", False, False),
    ],
)
@pytest.mark.heavy
def test_a_model_on_webgpu(scheme: str, tied: bool, ours: bool, no_page: None, tmp_path: Path) -> None:
    """Prefill, decode and verify of a whole model through wgpu, against numpy with the dequantised weights."""
    from test_cpu_quantization import close, dequantised, numpy_logits
    from wgsl_harness import device

    from gpt2_tvm import Engine, compile_model

    device(f16="f16" in scheme)
    model = checkpoint(tmp_path / "model", replace(ODD, tie_word_embeddings=tied), spread=8.0)
    rules = "norm-gemv,quantised-gemv,webgpu-matmul,reduction,general-reduction,fallback"
    out = compile_model(str(model), "webgpu", scheme, tmp_path / "out", "full" if ours else rules, verify_widths=(4,))
    manifest = json.loads((out / "manifest.json").read_text())
    by_rule = {f["rule"] for f in manifest["functions"] if "decode" in f["role"] and "c_" in f["role"]}
    assert by_rule <= ({"webgpu-gemv"} if ours else {"norm-gemv", "quantised-gemv"}) or "float" in scheme
    config, weights = dequantised(out)
    engine, (row,) = Engine(out), random_rows(config, [20], seed=3)
    wanted = numpy_logits(config, weights, row)
    share = 1e-3 if "f32" in scheme else 2e-2
    close(engine.prefill(row[:9]), wanted[8:9], share)
    close(engine.decode(row[9]), wanted[9:10], share)
    close(engine.decode(row[10]), wanted[10:11], share)
    close(engine.verify(row[11:15])[0], wanted[11:15], share)


def test_bytes_of_a_step_are_those_of_the_words() -> None:
    """What roofline and tuner are told: words, scales, and nothing of the matrix in floats."""
    from gpt2_tvm.work import work_of

    for scheme, bits in (("q8f16", 8), ("q4f16_1", 4.5)):
        layer = Layer(scheme, 1, 512, 768, "bias")
        nbytes, flops = work_of("main", function(layer, "h200"))
        around = 2 * (768 + 2 * 512) + 4 * 512 * (scheme == "q8f16")
        assert nbytes == 512 * 768 * bits / 8 + around, scheme
        assert isinstance(flops, int) and flops >= 2 * 512 * 768


def test_layout_of_rows_is_what_the_functions_take() -> None:
    func = function(Layer("q8f32", 1, 33, 70), "webgpu")
    assert [tuple(map(int, p.shape)) for p in func.params] == [(1, 1, 70), (33, 18), (33,), (1, 1, 33)]
    assert ROWS.shape(33, 18) == [33, 18] and tvm.DataType(func.params[1].dtype) == "uint32"
