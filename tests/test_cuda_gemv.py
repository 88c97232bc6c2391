"""The products of a decode step: their CUDA source (`wide-gemv`, `norm-gemv`) run on the CPU, against numpy in float64;
and what ends a step, greedy or drawn.

K = 320 in float16 is 40 loads of 16 bytes: eight threads a row, four rows a warp, so that shuffles stay in segments;
1001 outputs end in a block that is not full. K = 1280 and, in float32, 320 have a whole warp a row.
"""

from __future__ import annotations

import functools
import itertools
import re
from typing import Any

import numpy as np
import pytest
from cuda_on_cpu import kernel_source, run
from tvm import tirx

from gpt2_tvm.build import lower_plan, make_plan
from gpt2_tvm.config import PRESETS, GPT2Config
from gpt2_tvm.decoding.sampling import distribution
from gpt2_tvm.inventory import launch_shapes
from gpt2_tvm.kernels.gpu_sample import sample_advance
from gpt2_tvm.kernels.gpu_sampling import greedy_advance
from gpt2_tvm.kernels.spec import GpuLimits
from gpt2_tvm.pipeline import Lowered
from gpt2_tvm.schedules import early_loads
from gpt2_tvm.schedules.cuda_gemv import split_config, wide_config
from gpt2_tvm.schedules.gemv_config import GemvConfig
from gpt2_tvm.schedules.norm_gemv import NormGemv
from gpt2_tvm.schedules.tunable_gemv import GemvShape
from targets import load_target
from tuning.predict import predict_us
from tuning.space import why_not
from tuning.workloads import Workload

CONFIG = GPT2Config(vocab_size=1001, n_positions=128, n_embd=320, n_layer=1, n_head=5)
RULES = ("wide-gemv", "norm-gemv", "split-gemv")
FAMILY = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
PRODUCTS = ("c_attn", "attn_c_proj", "c_fc", "mlp_c_proj", "wte", "wte, temperature")


@functools.cache
def lowered(quantization: str, rules: str = "full", passes: str = "all") -> Lowered:
    target = load_target("h200")
    return lower_plan(
        make_plan(CONFIG, target, quantization, rules, batch_sizes=(1, 4), verify_widths=(), passes=passes)
    )[0]


def function(made: Lowered, product: str, rows: int) -> str:
    """The name of the only function that multiplies `rows` rows with this weight."""
    weight, _, temperature = product.partition(", ")
    found = []
    for hit in made.hits:
        params = made.fused[hit.function].params if hit.rule in RULES else []
        if any(f"{weight}_weight" in p.name for p in params) and int(list(params)[-1].shape[0]) == rows:
            found += [hit.function] if bool(temperature) == ("divide" in hit.function) else []
    (name,) = found
    return name


def arrays(func: tirx.PrimFunc) -> list[np.ndarray]:
    """Random inputs of a size that gives results of about 1, and a result of NaN. Weights of splits are positive, as
    attention's are: a row without any would be zero."""
    random = np.random.default_rng(len(func.params))
    found = []
    for p in func.params:
        shape = [int(extent) for extent in p.shape]
        values = random.standard_normal(shape) / (np.sqrt(shape[1]) if len(shape) == 2 else 1)
        if len(shape) == 5:
            values[..., -1] = np.abs(values[..., -1]) + 0.1
        if p.name == "temperature" or (len(shape) == 3 and shape[-1] == 1):
            values = np.abs(values) + 0.5
        found.append(np.ones(shape, np.int32) if str(p.dtype) == "int32" else values.astype(str(p.dtype)))
    found[-1][...] = np.nan
    return found


def reference(name: str, func: tirx.PrimFunc, given: list[np.ndarray]) -> np.ndarray:
    *inputs, out = [np.asarray(array, np.float64) for array in given]
    left = list(zip((p.name for p in func.params), inputs, strict=False))
    x = left.pop(0)[1]
    if "layer_norm" in name:
        (_, gain), (_, shift), *left = left
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + CONFIG.layer_norm_epsilon)
        x = x * gain + shift
    if "merge_splits" in name:  # [B, 1, H, S, D + 2]: sums of values, the maximum, the sum of weights
        left.pop(0)
        weight = np.exp2(x[..., -2:-1])
        merged = (x[..., :-2] * weight).sum(3) / (x[..., -1:] * weight).sum(3)
        x = merged.reshape(*x.shape[:2], -1)
    x = x @ left.pop(0)[1].T
    if left and "bias" in left[0][0]:
        x = x + left.pop(0)[1]
    if "gelu" in name:
        x = x * 0.5 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    if "divide" in name:
        x = x / left.pop(0)[1]
    for _, residual in left:
        x = x + residual
    assert x.shape == out.shape and len(left) == ("c_proj" in "".join(p.name for p in func.params))
    return x


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("quantization", ["q0f16", pytest.param("q0f32", marks=pytest.mark.heavy)])
def test_the_source_computes_the_product(quantization: str, product: str, rows: int) -> None:
    made = lowered(quantization)
    check(made, function(made, product, rows))


EARLY = {
    "several loads a step": GemvConfig(ts=16, tr=4, tile_r=16, vec_load=16, vec_c=4),
    "several outputs": GemvConfig(ts=4, tr=8, tile_s=2, tile_r=8, vec_load=16, vec_c=4),
    "outputs in x": GemvConfig(ts=8, tr=8, tile_r=8, vec_load=16, vec_c=2, s_axis="x"),
    "too many bytes": GemvConfig(ts=8, tr=1, tile_s=1, tile_r=8, vec_load=16, vec_c=4),
    "a partial tile": GemvConfig(ts=32, tr=8, tile_s=4, tile_r=8, vec_load=16, vec_c=4),
}


@pytest.mark.parametrize("point", EARLY)
@pytest.mark.parametrize("rows", [1, 4])
def test_early_loads_at_any_point(point: str, rows: int) -> None:
    """What `--tuned` may ask for; where a thread's weights cannot be loaded early they are loaded as ever."""
    made = lowered("q0f16")
    name = function(made, "c_attn", rows)
    target = load_target("h200").tvm_target()
    with target:
        schedule = NormGemv(lambda *_: EARLY[point]).apply(made.fused[name], target, False)
    assert schedule is not None
    func = schedule.mod["main"].with_attr("tirx.is_scheduled", True)
    share = 320 // EARLY[point].tr * EARLY[point].tile_s * 2
    fits = "partial" not in point and share <= (early_loads.MOST_BYTES if rows == 1 else early_loads.FEW_BYTES)
    assert (early_loads.FUNCTION in func.script()) == fits
    given = arrays(made.fused[name])
    result = run(func, given, arch="sm_90")[-1]
    wanted = reference(name, made.fused[name], given)
    np.testing.assert_allclose(np.float64(result), wanted, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("quantization", ["q8f16", "q4f16_1", "q4f32_1"])
def test_packed_weights_are_not_loaded_early(quantization: str) -> None:
    """Rows of 80 words or fewer, one row and several: `norm-gemv` takes them as ever."""
    made = lowered(quantization)
    of_norm = [hit.function for hit in made.hits if hit.rule == "norm-gemv"]
    packed = [name for name in of_norm if any(str(p.dtype) in ("uint32", "int8") for p in made.fused[name].params)]
    assert {int(list(made.fused[name].params)[-1].shape[0]) for name in packed} == {1, 4}
    assert not [name for name in packed if early_loads.FUNCTION in made.scheduled[name].script()]


def product_of(outputs: int, reduced: int, dtype: str) -> Workload:
    return Workload("", outputs, reduced, 1, dtype, dtype, dtype, (), 1, 0, 0, (), "")


def check(made: Lowered, name: str) -> None:
    func = made.fused[name]
    given = arrays(func)
    result = run(made.scheduled[name], given, arch="sm_90")[-1]
    wanted = reference(name, func, given)
    assert np.abs(wanted).mean() > 0.1  # there is something to get wrong
    # float16: what is multiplied, and the result, are rounded once each
    tolerance = 2e-3 if str(func.params[0].dtype) == "float16" or "merge_splits" in name else 1e-5
    np.testing.assert_allclose(np.float64(result), wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("product", "blocks"), [("attn_c_proj", 80), ("mlp_c_proj", 320)])
@pytest.mark.parametrize("rows", [1, 4])
def test_the_source_of_split_k_computes_the_product(product: str, blocks: int, rows: int) -> None:
    """Off by default (`cuda_gemv`): two kernels, the second with bias and residual."""
    made = lowered("q0f16", "with-split-gemv", "without-combine-gemv")
    name = function(made, product, rows)
    assert next(hit.rule for hit in made.hits if hit.function == name) == "split-gemv"
    grids = [grid for grid, _ in launch_shapes(made.scheduled[name])]
    assert grids == [[blocks, 5, 1], [-(-320 * rows // 128), 1, 1]]
    check(made, name)


def test_where_split_k_could_pay() -> None:
    """By the model: on an H200 only where eight threads share a row, which is K = 1600 in float16."""
    device = load_target("h200")
    gains = []
    for (name, dtype), long in itertools.product(itertools.product(FAMILY, ("float16", "float32")), (1, 4)):
        outputs = PRESETS[name].n_embd
        shape, workload = GemvShape(outputs, outputs * long, 1, dtype), product_of(outputs, outputs * long, dtype)
        one, split = wide_config(shape, device.tvm_target()), split_config(shape, device.tvm_target())
        assert one is not None and split is not None and split.split_k > 1 and why_not(split, workload, device) is None
        if predict_us(split, workload, device) < predict_us(one, workload, device):
            gains.append((name, dtype, long))
    assert gains == [("gpt2-xl", "float16", 1)]
    assert split_config(GemvShape(50257, 768, 1, "float16"), device.tvm_target()) is None


@pytest.mark.parametrize("rows", [1, 4])
def test_threads_that_share_a_row_take_the_same_branches(rows: int) -> None:
    """A shuffle's mask is what `__activemask()` says after the guards of a last, partial block. With eight threads a
    row a warp may have parted there; but never the threads whose values meet (see `tunable_gemv`)."""
    made = lowered("q0f16")
    func = made.scheduled[function(made, "wte", rows)]
    source = kernel_source(func, "sm_90")
    product = source[source.rindex("__syncthreads()") : source.rindex("__shfl")]
    guards = re.findall(r"\bif \((.*)\) \{", product)
    assert any("threadIdx.y" in guard for guard in guards)  # 1001 outputs in blocks of 32
    assert not [guard for guard in guards if "threadIdx.x" in guard]


# ---- the end of a step

LIMITS = GpuLimits("cuda", 1024, 49152, 32, arch=90)
VOCAB, CAPACITY = 5003, 8


def ended(kernel: tirx.PrimFunc, *inputs: np.ndarray) -> tuple[np.ndarray, Any]:
    """Tokens and history after a step of two sequences at positions 3 and 4."""
    state = [np.zeros((2, 1), np.int32), np.array([3, 4], np.int32), np.zeros((2, CAPACITY), np.int32)]
    token, positions, history = run(kernel, [*inputs, *state], arch="sm_90")[-3:]
    assert positions.tolist() == [4, 5]
    assert history[0, 4] == token[0, 0] and history[1, 5] == token[1, 0] and np.count_nonzero(history) <= 2
    return token[:, 0], history


def logits() -> np.ndarray:
    rows = np.random.default_rng(0).normal(0, 2, (2, VOCAB)).astype(np.float32)
    rows[0, [40, 4900]] = rows[0].max() + 1  # of equal ones the first
    rows[1, 7] = np.nan
    return rows


def test_greedy_advance() -> None:
    tokens, _ = ended(greedy_advance(2, VOCAB, CAPACITY, LIMITS), logits())
    assert tokens.tolist() == [40, int(np.nanargmax(logits()[1]))]


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(0.0, 0, 1.0), (0.8, 5, 1.0), (1.0, 0, 0.3), (1.2, 40, 0.5), (1.0, 0, 0.0)]
)
def test_sample_advance(temperature: float, top_k: int, top_p: float) -> None:
    """Draws of several seeds are among the tokens that the host would draw from, and not all the same."""
    settings = np.array([[temperature, top_p]] * 2, np.float32)
    rows = np.nan_to_num(logits(), nan=-100.0)
    allowed = [distribution(row.astype(np.float64), temperature, top_k, top_p)[0].tolist() for row in rows]
    kernel = sample_advance(2, VOCAB, CAPACITY, LIMITS)
    seen: set[int] = set()
    for seed in range(4):
        choice = np.array([[top_k, seed], [top_k, seed + 9]], np.int32)
        tokens, _ = ended(kernel, rows, settings, choice)
        assert tokens[0] in {*allowed[0], 40, 4900}  # equal ones at a cut are all kept
        assert tokens[1] in allowed[1]
        seen.add(int(tokens[1]))
    assert (len(seen) > 1) == (len(allowed[1]) > 1)
