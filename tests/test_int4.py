"""Four bits in groups of 32 (mlc-llm's q4f16_1 and q4f32_1): what is stored, and the CPU's kernels against float64 and
by their instructions."""

from __future__ import annotations

import re

import numpy as np
import pytest
import tvm
from cpu_functions import CPU, MULTIPLY_ADD, NR, hot_loop, run
from quantised_products import EPILOGUES, Layer, arguments, check, function

from gpt2_tvm.errors import UserError
from gpt2_tvm.passes.apply_rules import apply_rules
from gpt2_tvm.quantization import get_scheme
from gpt2_tvm.quantization.forms import WeightLayout, form_of
from gpt2_tvm.quantization.groups import GROUP, ZERO, dequantise_groups, groups_of, quantise_groups, words_of
from gpt2_tvm.quantization.words import pack_words, unpack_words
from gpt2_tvm.schedules.cpu_gemv import CpuGemv
from gpt2_tvm.schedules.cpu_matmul import GEMV_ROWS, CpuMatmul
from targets import load_target

PANELS = WeightLayout(panel_rows=NR, fast_math=True)
SCHEMES = ("q4f32_1", "q4f16_1")


# -- what is stored ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale_dtype", ["float32", "float16"])
def test_the_layout_is_mlc_llms(scale_dtype: str) -> None:
    """Element by element: eight in a word from the lowest bits up, a scale for 32 along K, 7 for zero."""
    weight = np.random.default_rng(0).standard_normal((5, 70)).astype(np.float32)
    words, scales = quantise_groups("w", weight, scale_dtype)
    assert words.dtype == np.uint32 and words.shape == (5, 12) == (5, words_of(70))
    assert scales.dtype == scale_dtype and scales.shape == (5, 3) == (5, groups_of(70))
    back = dequantise_groups(words, scales, 70)
    for n in range(5):
        for k in range(96):
            q = int(words[n, k // 8]) >> 4 * (k % 8) & 15
            if k >= 70:
                assert q == ZERO
                continue
            scale = float(scales[n, k // GROUP])
            assert 0 <= q <= 2 * ZERO and back[n, k] == np.float32(np.float32(scale) * (q - ZERO))
            assert abs(weight[n, k] - back[n, k]) <= 0.5001 * scale + 7 * 2**-11 * scale * (scale_dtype == "float16")
    largest = np.abs(np.pad(weight, ((0, 0), (0, 26))).reshape(5, 3, GROUP)).max(axis=2)
    np.testing.assert_allclose(scales.astype(np.float64), largest / 7, rtol=1e-3 if scale_dtype == "float16" else 1e-6)


def test_groups_that_are_hard() -> None:
    weight = np.zeros((6, 64), np.float32)
    weight[1] = -3.5  # constant
    weight[2, 3] = 1e30  # an outlier takes its group, not the row
    weight[2, 32:] = 1.0
    weight[3] = 3e38
    weight[4] = np.finfo(np.float32).smallest_subnormal
    weight[5, ::2] = 1e-38
    words, scales = quantise_groups("w", weight, "float32")
    back = dequantise_groups(words, scales, 64)
    assert np.isfinite(back).all() and not back[0].any() and (scales[0] == 0).all()
    np.testing.assert_allclose(back[[1, 3]], weight[[1, 3]], rtol=1e-6)
    np.testing.assert_allclose(back[2, [3, 40]], [1e30, 1.0], rtol=1e-6)
    assert (np.abs(back[4] - weight[4]) <= weight[4]).all()
    np.testing.assert_allclose(back[5], weight[5], rtol=1e-5)
    small, low = quantise_groups("w", np.full((1, 32), 1e-8, np.float32), "float16")
    assert not low.any() and not dequantise_groups(small, low, 32).any(), "less than a float16 scale can say"


def test_what_cannot_be_stored_is_refused_in_one_line() -> None:
    for value in (np.nan, np.inf, -np.inf):
        weight = np.ones((40, 64), np.float32)
        weight[33, 63] = value
        with pytest.raises(UserError, match=r"^h\.c_fc holds NaN or infinity \(row 33\)[^\n]*$"):
            quantise_groups("h.c_fc", weight, "float32")
    weight = np.ones((4, 64), np.float32)
    weight[2, 5] = 5e5
    with pytest.raises(UserError, match=r"^h\.c_fc holds 500000 \(row 2\)[^\n]*q4f32_1[^\n]*$"):
        quantise_groups("h.c_fc", weight, "float16")
    quantise_groups("h.c_fc", weight, "float32")


def test_many_rows_are_quantised_each_by_itself() -> None:
    weight = np.random.default_rng(1).standard_normal((5000, 1000)).astype(np.float16)
    words, scales = quantise_groups("w", weight, "float16")
    one, scale = quantise_groups("w", weight[4321:4322], "float16")
    assert (words[4321] == one).all() and (scales[4321] == scale).all()


@pytest.mark.parametrize("k", [1, 3, 4, 70, 256])
def test_bytes_in_words(k: int) -> None:
    quantised = np.random.default_rng(k).integers(-127, 128, (3, k)).astype(np.int8)
    words = pack_words(quantised)
    assert words.dtype == np.uint32 and words.shape == (3, -(-k // 4))
    for n in range(3):
        for i in range(k):
            byte = int(words[n, i // 4]) >> 8 * (i % 4) & 255
            assert byte == int(quantised[n, i]) % 256
    assert (unpack_words(words, k) == quantised).all()


@pytest.mark.parametrize("scheme", ["q8f32", "q4f32_1", "q4f16_1", "q0bf16", "q0f16"])
@pytest.mark.parametrize("layout", [WeightLayout(), PANELS, WeightLayout(8)])
def test_every_form_gives_back_the_same_values(scheme: str, layout: WeightLayout) -> None:
    weight = np.random.default_rng(2).standard_normal((45, 70)).astype(np.float32)
    form, plain = form_of(get_scheme(scheme), layout), form_of(get_scheme(scheme), WeightLayout())
    stored = dict(form.store("w", weight))
    assert {suffix: (list(a.shape), str(a.dtype)) for suffix, a in stored.items()} == form.parameters(45, 70)
    values = form.values(list(stored.values()), 45, 70)
    assert values.dtype == np.float32 and values.shape == (45, 70)
    assert np.array_equal(values, plain.values([a for _, a in plain.store("w", weight)], 45, 70))
    assert np.abs(values - weight).max() < 0.4 * np.abs(weight).max() / (1 if "4" in scheme else 40)


# -- kernels -----------------------------------------------------------------------------------------------------------


def error_free(layer: Layer, rows: int | None = None) -> None:
    """Built by the rules in the target's order, run, and checked; the rule is the one for that number of rows."""
    rules = [("cpu-matmul", CpuMatmul(CPU)), ("cpu-gemv", CpuGemv(CPU))]
    mod, hits = apply_rules(tvm.IRModule({"main": function(layer, "cpu")}), rules, CPU.tvm_target())
    few = layer.rows is not None and layer.rows <= GEMV_ROWS
    assert [h.rule for h in hits] == ["cpu-gemv" if few else "cpu-matmul"]
    built = tvm.compile(mod, target=CPU.tvm_target())["main"]
    for count in [rows] if rows else [layer.rows] if layer.rows else [1, 5, 17, 40]:
        given = arguments(layer, count)
        check(layer, run(built, *given[:-1], out=(given[-1].shape, layer.out_dtype)), given)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("epilogue", EPILOGUES)
def test_gemv(scheme: str, epilogue: str) -> None:
    for rows in (1, 4) if epilogue == "residual" else (1,):
        error_free(Layer(scheme, rows, 97, 70, epilogue, PANELS))


@pytest.mark.parametrize("rows", [2, 3, 5, 8, 12, 16])
def test_gemv_of_several_rows(rows: int) -> None:
    error_free(Layer("q4f32_1", rows, 97, 96 if rows % 2 else 104, "bias", PANELS))


@pytest.mark.parametrize(("n", "k"), [(1, 64), (33, 1), (NR, 33), (3 * NR, 768), (50257, 32)])
def test_any_size(n: int, k: int) -> None:
    error_free(Layer("q4f32_1", 1, n, k, "none", PANELS))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(("n", "k"), [(97, 70), (40, 770)])
def test_matmul_of_any_number_of_rows(scheme: str, n: int, k: int) -> None:
    error_free(Layer(scheme, None, n, k, "residual", PANELS))


@pytest.mark.parametrize("name", ["x86-64-v4", "x86-64-v3", "arm64"])
def test_gemv_spreads_in_registers(name: str) -> None:
    """No conversion, no spill, no store in the loop over words; with AVX-512 mask and exponent are one instruction."""
    target = load_target(name)
    layout = WeightLayout(target.layout.rows or 0, True)
    products, loop = hot_loop(function(Layer("q4f32_1", 1, 768, 768, "bias", layout), "cpu"), CpuGemv, name)
    columns = (target.layout.rows or 0) * 32 // (target.limits.vector_bits or 0)
    assert products == 8 * columns, "a word is eight steps of k"
    assert re.search(MULTIPLY_ADD[name], loop) and not re.search(r"vcvt\w*dq\w*ps|[su]cvtf", loop)
    if name == "x86-64-v4":
        assert len(re.findall(r"vpternlogd", loop)) >= 6 * columns
        assert (
            len(re.findall(r"^\s+v\w+.*%zmm", loop, re.MULTILINE)) <= 4 * products + 8 + columns
        )  # x broadcast, words


@pytest.mark.parametrize("name", ["x86-64-v4", "arm64"])
def test_matmul_spreads_a_block_once(name: str) -> None:
    target = load_target(name)
    layout = WeightLayout(target.layout.rows or 0, True)
    products, loop = hot_loop(function(Layer("q4f32_1", None, 768, 768, "bias", layout), "cpu"), CpuMatmul, name)
    assert products >= 12 and not re.search(r"vpsrl|vpternlog|ushr", loop)
