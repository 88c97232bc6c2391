"""Float16 weights in words of 32 bits: products through wgpu against float64, with the device's float16 and without."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from quantised_products import Layer, arguments, check, function, scheduled
from wgsl_harness import device, lower_to_wgsl, run

from gpt2_tvm.quantization import get_scheme
from gpt2_tvm.quantization.forms import HalfWords, WeightLayout, form_of
from gpt2_tvm.quantization.words import pack_halves, unpack_halves
from gpt2_tvm.schedules.webgpu_gemv import WebgpuGemv
from gpt2_tvm.schedules.webgpu_halves import with_native_halves
from gpt2_tvm.schedules.webgpu_matmul import MatmulConfig, WebgpuMatmul
from targets import load_target

TARGET = load_target("webgpu").tvm_target()
RULES = {
    "gemv": WebgpuGemv(),
    "gemv of one's own": WebgpuGemv(lone=4),
    "matmul": WebgpuMatmul(),
    "direct matmul": WebgpuMatmul(MatmulConfig(shared_k=0)),
}
SHAPES = [
    (1, 131, 256, "residual"),
    (1, 33, 70, "none"),  # vectors of two
    (1, 5, 9, "gelu"),  # rows that end in half a word
    (3, 64, 96, "bias"),
    (8, 131, 72, "residual"),  # k ends inside a block of shared memory
]


@pytest.mark.parametrize("native", [False, True], ids=["words", "shader-f16"])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("rows", "n", "k", "epilogue"), SHAPES)
def test_product(rule: str, rows: int, n: int, k: int, epilogue: str, native: bool) -> None:
    layer = Layer("q16f32", rows, n, k, epilogue)
    given = arguments(layer)
    if not native:
        kernel = scheduled(function(layer), RULES[rule], TARGET)
        assert not lower_to_wgsl(kernel).shader.needs_f16
        check(layer, run(kernel, given)[-1], given)
        return
    device(f16=True)
    func = with_native_halves(function(layer))
    assert func is not None
    kernel = scheduled(func, RULES[rule], TARGET)
    shader = lower_to_wgsl(kernel).shader
    assert shader.needs_f16 and "unpack2x16float" not in shader.source
    result = run(kernel, [given[0], given[1].view(np.float16), *given[2:]])
    check(layer, result[-1], given)


def test_a_word_is_loaded_once_for_its_two_weights() -> None:
    kernel = scheduled(function(Layer("q16f32", 1, 64, 256)), WebgpuGemv(), TARGET)
    text = lower_to_wgsl(kernel).shader.source
    assert "weight_ptr : array<vec2<u32>>" in text
    assert text.count("unpack2x16float") == 2 * text.count("= weight_ptr[")


@pytest.mark.parametrize("scheme", ["q0f32", "q8f32", "q4f32_1"])
def test_other_weights_have_no_other_form(scheme: str) -> None:
    assert with_native_halves(function(Layer(scheme, 1, 64, 64))) is None


def test_packing_keeps_every_bit() -> None:
    for k in (1, 2, 7, 64):
        bits = np.random.default_rng(k).integers(0, 1 << 16, (5, k), np.uint16)
        packed = pack_halves(bits.view(np.float16))
        assert packed.dtype == np.uint32 and packed.shape == (5, -(-k // 2))
        np.testing.assert_array_equal(unpack_halves(packed, k).view(np.uint16), bits)


def test_panels_and_float16_arithmetic_have_no_words() -> None:
    def form(scheme: str, layout: Any) -> bool:
        return isinstance(form_of(get_scheme(scheme), layout), HalfWords)

    assert form("q16f32", WeightLayout())
    assert not form("q16f32", WeightLayout(panel_rows=16)) and not form("q0f16", WeightLayout())


def test_subnormal_weights_are_multiplied_as_they_are() -> None:
    weight = np.full((3, 64), 6e-8, np.float32)  # the smallest float16
    weight[1] *= 100
    layer = Layer("q16f32", 1, 3, 64)
    given = arguments(layer, weight=weight)
    given[0][:] = 1024.0
    result = run(scheduled(function(layer), WebgpuGemv(), TARGET), given)[-1][0, 0]
    wanted = weight.astype(np.float16).astype(np.float64).sum(axis=1) * 1024
    np.testing.assert_allclose(result, wanted, rtol=1e-6)
