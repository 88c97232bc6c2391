"""Weights stored as float16 and int8 and computed with in float32, on a CPU: what is stored, every kernel against
float64, the instructions of its loop, and whole models against a numpy model that holds the dequantised weights."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from cpu_functions import EPILOGUES, MULTIPLY_ADD, NR, bound, error, hot_loop, packed_function
from reference import RULES, checkpoint, random_rows
from safetensors.numpy import load_file, save_file

from gpt2_tvm import Engine, UserError, compile_model
from gpt2_tvm.build import make_plan, stored_weights, weight_layout
from gpt2_tvm.checkpoint import resolve_model
from gpt2_tvm.config import GPT2Config
from gpt2_tvm.measure.peers import unpack
from gpt2_tvm.quantization import SCALE, SCHEMES, get_scheme
from gpt2_tvm.quantization.forms import WeightLayout, form_of
from gpt2_tvm.quantization.rows import LEVELS, dequantise_rows, quantise_rows
from gpt2_tvm.quantization.storage import is_matrix, scheme_of
from gpt2_tvm.schedules.cpu_gemv import CpuGemv
from gpt2_tvm.schedules.cpu_matmul import CpuMatmul
from gpt2_tvm.tensor_cache import load_tensors
from gpt2_tvm.weights import expected_tensors, iter_weights
from targets import load_target

WIDENED = ("q16f32", "q8f32")
SHARE = {"float32": 1e-3, "float16": 1e-2, "bfloat16": 5e-2}  # of the largest logit, by the dtype of the arithmetic
ROWS = (*range(1, 10), 12, 17, 322, 1023)
CONFIG = GPT2Config(vocab_size=211, n_positions=96, n_embd=60, n_layer=2, n_head=3)  # no size is a multiple of a tile


# -- what is stored ----------------------------------------------------------------------------------------------------


def test_int8_is_within_half_a_step_and_uses_the_whole_range() -> None:
    weight = np.random.default_rng(0).standard_normal((300, 70)).astype(np.float32)
    weight[5] *= 1e6
    weight[6] *= 1e-6
    quantised, scales = quantise_rows("w", weight)
    assert quantised.dtype == np.int8 and scales.dtype == np.float32 and scales.shape == (300,)
    assert (np.abs(quantised).max(axis=1) == LEVELS).all() and quantised.min() == -LEVELS
    error = np.abs(dequantise_rows(quantised, scales) - weight).max(axis=1)
    assert (error <= scales * 0.5001).all()


def test_int8_of_rows_that_are_hard() -> None:
    weight = np.zeros((8, 5), np.float32)
    weight[1] = -3.5  # constant
    weight[2] = [1e30, 1, 2, 3, 4]  # an outlier takes the row
    weight[3] = 3e38
    weight[4] = np.finfo(np.float32).smallest_subnormal  # the scale rounds to 0
    weight[5, 2] = -2e-43  # a subnormal scale: two bits
    weight[6, 0] = np.finfo(np.float32).tiny
    quantised, scales = quantise_rows("w", weight)
    back = dequantise_rows(quantised, scales)
    assert np.isfinite(back).all()
    assert (quantised[[0, 4, 7]] == 0).all() and (scales[[0, 7]] == 0).all()
    assert (quantised[1] == -LEVELS).all() and np.allclose(back[1], -3.5, rtol=1e-6)
    assert quantised[2].tolist() == [LEVELS, 0, 0, 0, 0]
    assert np.allclose(back[3], weight[3], rtol=1e-6)
    assert np.abs(back[5] - weight[5]).max() <= 1e-43 and np.isclose(back[6, 0], weight[6, 0])


def test_int8_of_a_float16_checkpoint_and_of_many_rows() -> None:
    """More rows than are widened at once; each is quantised by itself."""
    weight = np.random.default_rng(1).standard_normal((5000, 1000)).astype(np.float16)
    quantised, scales = quantise_rows("w", weight)
    one, scale = quantise_rows("w", weight[4321:4322])
    assert (quantised[4321] == one).all() and scales[4321] == scale[0]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_int8_refuses_what_is_not_finite(value: float) -> None:
    weight = np.ones((4, 3), np.float32)
    weight[2, 1] = value
    with pytest.raises(UserError, match=r"^h\.0\.attn\.c_attn\.weight holds NaN or infinity \(row 2\)[^\n]*$"):
        quantise_rows("h.0.attn.c_attn.weight", weight)


@pytest.mark.parametrize("scheme", WIDENED)
def test_what_an_artifact_stores(scheme: str) -> None:
    """Matrices in the scheme's dtype, in panels, each followed by its scales; everything else float32 as it was."""
    source = resolve_model("bundled")
    plan = make_plan(source.config, load_target("x86-64-v3"), scheme)
    plain, matrices = dict(iter_weights(source, "float32")), 0
    stored = list(stored_weights(source, plan))
    names = [name for name, _ in stored]
    assert [n for n in names if not n.endswith(SCALE)] == list(expected_tensors(source.config))
    arrays = dict(stored)
    for i, (name, array) in enumerate(stored):
        if name.endswith(SCALE):
            continue
        if array.ndim != 3:
            assert array.dtype == np.float32 and np.array_equal(array, plain[name]), name
            assert not name.endswith("weight") or "ln_" in name or "wpe" in name, name
            continue
        matrices += 1
        back = unpack(array, plain[name].shape)
        if scheme == "q8f32":
            assert array.dtype == np.int8 and names[i + 1] == name + SCALE
            scales = arrays[name + SCALE]
            assert (np.abs(dequantise_rows(back, scales) - plain[name]).max(axis=1) <= scales * 0.5001).all()
        else:
            assert array.dtype == np.float16 and np.array_equal(back, plain[name].astype(np.float16))
    assert matrices == 4 * source.config.n_layer + 1


@pytest.mark.parametrize(
    ("scheme", "target"),
    [
        (s, t)
        for s in ("q16f32", "q0bf16")
        for t in ("cuda", "metal", "webgpu", "rocm")
        if (s, t) != ("q16f32", "webgpu")
    ],
)
def test_gpu_targets_are_refused_in_one_line(scheme: str, target: str) -> None:
    with pytest.raises(UserError) as refused:
        make_plan(CONFIG, load_target(target), scheme)
    message = str(refused.value)
    assert scheme in message and "q0f32, q0f16" in message and "\n" not in message


@pytest.mark.parametrize(
    ("scheme", "value", "words"),
    [
        ("q8f32", np.nan, "NaN"),
        ("q16f32", np.inf, "NaN"),
        ("q16f32", 1e6, "float16"),
        ("q8f16", 1e6, "float16"),
        ("q8f16", np.nan, "NaN"),
        ("q4f16_1", 1e6, "float16"),
        ("q4f32_1", -np.inf, "NaN"),
        ("q0bf16", 3.4e38, "bfloat16"),
    ],
)
def test_weights_that_cannot_be_stored(tiny_model: Path, tmp_path: Path, scheme: str, value: float, words: str) -> None:
    tensors = {key: array.copy() for key, array in load_file(tiny_model / "model.safetensors").items()}
    name = next(key for key in tensors if key.endswith("h.1.mlp.c_fc.weight"))
    tensors[name][3, 5] = value
    (tmp_path / "config.json").write_text((tiny_model / "config.json").read_text())
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    source = resolve_model(str(tmp_path))
    plan = make_plan(source.config, load_target("cpu"), scheme)
    with pytest.raises(UserError, match=rf"h\.1\.mlp\.c_fc\.weight[^\n]*{words}") as refused:
        list(stored_weights(source, plan))
    assert "\n" not in str(refused.value)


# -- kernels -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", WIDENED)
@pytest.mark.parametrize("epilogue", EPILOGUES)
def test_matmul_of_any_number_of_rows(epilogue: str, storage: str) -> None:
    for n in ROWS:
        assert error(("b", "n"), (1, n), 770, 97, epilogue, storage) < bound(epilogue), n
    assert error(("b", "n"), (3, 7), 770, 97, epilogue, storage) < bound(epilogue)


@pytest.mark.parametrize("storage", WIDENED)
@pytest.mark.parametrize("rows", (*range(1, 10), 12, 16))
def test_gemv_of_one_to_sixteen_rows(rows: int, storage: str) -> None:
    for epilogue in EPILOGUES if rows in (1, 12) else (EPILOGUES[rows % len(EPILOGUES)],):
        assert error((1, rows), (1, rows), 770, 97, epilogue, storage) < bound(epilogue), epilogue
    assert error((rows, 1), (rows, 1), 33, NR, "none", storage) < bound("none")


@pytest.mark.parametrize("storage", WIDENED)
@pytest.mark.parametrize(("k", "n"), [(16, 50257), (64, 1), (768, 768), (1, 33)])
def test_any_width(k: int, n: int, storage: str) -> None:
    for symbolic, rows in (((1, 1), (1, 1)), ((1, 12), (1, 12)), (("b", "n"), (1, 17))):
        assert error(symbolic, rows, k, n, "residual", storage) < bound("residual"), rows


# By target and storage, what widens a vector of weights on its way to the multiply-add
WIDENS = {
    ("x86-64-v4", "q16f32"): r"vcvtph2ps\s.*%zmm",
    ("x86-64-v4", "q8f32"): r"vpmovsxbd\s[^\n]*\(.*%zmm",
    ("x86-64-v3", "q16f32"): r"vcvtph2ps\s.*%ymm",
    ("x86-64-v3", "q8f32"): r"vpmovsxbd\s[^\n]*\(.*%ymm",
    ("arm64", "q16f32"): r"fcvtl2?\s",
    ("arm64", "q8f32"): r"scvtf\s+v\d+\.4s",
}


@pytest.mark.parametrize("rows", [1, 4, 12])
@pytest.mark.parametrize(("name", "storage"), list(WIDENS))
def test_gemv_widens_in_registers(name: str, storage: str, rows: int) -> None:
    """From memory through the conversion to the multiply-add, no spills, no stores, each weight converted once."""
    target = load_target(name)
    panel, lanes = target.layout.rows or 0, (target.limits.vector_bits or 0) // 32
    products, loop = hot_loop(packed_function((1, rows), 768, 768, "residual", storage, panel), CpuGemv, name)
    converted = len(re.findall(WIDENS[name, storage], loop))
    group = products // converted  # rows that share a converted vector
    assert products % converted == 0 and converted % (panel // lanes) == 0
    assert group == {1: 1, 4: 4, 12: 12 if name == "x86-64-v4" else 6}[rows]
    assert re.search(r"prefetcht0|prfm\s+pldl1keep", loop)


@pytest.mark.parametrize(("name", "storage"), list(WIDENS))
def test_matmul_widens_a_block_once(name: str, storage: str) -> None:
    """The micro-kernel reads the float32 block; the conversion stands outside its loop."""
    panel = load_target(name).layout.rows or 0
    products, loop = hot_loop(packed_function(("b", "n"), 768, 768, "residual", storage, panel), CpuMatmul, name)
    assert products >= 12 and not re.search(WIDENS[name, storage], loop)
    assert MULTIPLY_ADD[name] and "prefetch" not in loop


# -- models ------------------------------------------------------------------------------------------------------------


def dequantised(artifact: Path) -> tuple[GPT2Config, dict[str, np.ndarray]]:
    """The weights that an artifact's kernels compute with, float64, in the plain shapes."""
    manifest = json.loads((artifact / "manifest.json").read_text())
    config = GPT2Config.from_json(manifest["config"])
    stored = {name: tensor.numpy() for name, tensor in load_tensors(artifact / "params").items()}
    scheme, layout = get_scheme(manifest["quantization"]), WeightLayout(**manifest["layout"])
    weights = {}
    for name, shape in expected_tensors(config).items():
        if is_matrix(name, shape):
            form = form_of(scheme_of(name, scheme, config.tie_word_embeddings), layout)
            arrays = [stored[name + suffix] for suffix in form.parameters(*shape)]
            weights[name] = form.values(arrays, *shape).astype(np.float64)
        else:
            weights[name] = stored[name].astype(np.float64)
    return config, weights


def numpy_logits(config: GPT2Config, weights: dict[str, np.ndarray], ids: list[int]) -> np.ndarray:
    """GPT-2 in float64: logits [n, V] after each of n tokens."""

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + config.layer_norm_epsilon)
        return x * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def linear(x: np.ndarray, name: str) -> np.ndarray:
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    n, heads, size = len(ids), config.n_head, config.head_dim
    x = weights["transformer.wte.weight"][ids] + weights["transformer.wpe.weight"][:n]
    for i in range(config.n_layer):
        h = f"transformer.h.{i}"
        qkv = linear(norm(x, f"{h}.ln_1"), f"{h}.attn.c_attn").reshape(n, 3, heads, size).transpose(1, 2, 0, 3)
        scores = qkv[0] @ qkv[1].transpose(0, 2, 1) / np.sqrt(size) + np.triu(np.full((n, n), -np.inf), 1)
        p = np.exp(scores - scores.max(-1, keepdims=True))
        y = (p / p.sum(-1, keepdims=True)) @ qkv[2]
        x = x + linear(y.transpose(1, 0, 2).reshape(n, -1), f"{h}.attn.c_proj")
        u = linear(norm(x, f"{h}.ln_2"), f"{h}.mlp.c_fc")
        u = 0.5 * u * (1 + np.tanh(np.sqrt(2 / np.pi) * (u + 0.044715 * u**3)))
        x = x + linear(u, f"{h}.mlp.c_proj")
    head = "transformer.wte.weight" if config.tie_word_embeddings else "lm_head.weight"
    return norm(x, "transformer.ln_f") @ weights[head].T


MODELS = [
    pytest.param(("q16f32", "tied"), marks=pytest.mark.heavy),
    ("q8f32", "tied"),
    pytest.param(("q8f32", "untied"), marks=pytest.mark.heavy),
    ("q4f32_1", "tied"),
    pytest.param(("q4f16_1", "untied"), marks=pytest.mark.heavy),
    pytest.param(("q8f16", "tied"), marks=pytest.mark.heavy),
    pytest.param(("q0bf16", "tied"), marks=pytest.mark.heavy),
    pytest.param(("q8f32-float-embedding", "untied"), marks=pytest.mark.heavy),
    pytest.param(("q4f32_1-float-head", "untied"), marks=pytest.mark.heavy),
    pytest.param(("q8f32-float-head", "tied"), marks=pytest.mark.heavy),
    pytest.param(("q16f32", "bundled"), marks=pytest.mark.heavy),
    ("q8f32", "bundled"),
    pytest.param(("q4f32_1", "bundled"), marks=pytest.mark.heavy),
]


@pytest.fixture(scope="module", params=MODELS, ids="-".join)
def artifact(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained model that comes along, and two of odd sizes, as q16f32 and q8f32."""
    scheme, name = request.param
    folder = tmp_path_factory.mktemp(f"{name}-{scheme}")
    model = "bundled"
    if name != "bundled":
        config = replace(CONFIG, tie_word_embeddings=name == "tied")
        model = str(checkpoint(folder / "model", config, spread=8.0))
    batches = (1, 4) if name == "tied" else (1,)
    return compile_model(model, "cpu", scheme, folder / "out", RULES, batch_sizes=batches, verify_widths=(8,))


def close(ours: np.ndarray, expected: np.ndarray, share: float = 1e-3) -> None:
    assert ours.dtype == np.float32 and ours.shape == expected.shape
    assert float(np.abs(ours - expected).max()) <= share * float(np.abs(expected).max())  # false for NaN


def share_of(artifact: Path) -> float:
    """The difference that an artifact's arithmetic is allowed, of the largest logit."""
    return SHARE[json.loads((artifact / "manifest.json").read_text())["compute_dtype"]]


def test_every_function_computes_with_the_dequantised_weights(artifact: Path) -> None:
    """Prefill, decode, a chain, a tree and score, against float64."""
    engine, (config, weights) = Engine(artifact), dequantised(artifact)
    share = share_of(artifact)
    (row,) = random_rows(config, [48], seed=3)
    expected = numpy_logits(config, weights, row)
    close(engine.prefill(row[:17]), expected[16:17], share)
    for at in range(17, 24):
        close(engine.decode(row[at]), expected[at : at + 1], share)
    close(engine.verify(row[24:32])[0], expected[24:32], share)
    parents = [-1, 0, 0, 1, 1, 2, 5, 3]
    tokens = random_rows(config, [8], seed=4)[0]
    tree = engine.verify(tokens, parents)[0]
    for j in range(8):
        branch, at = [], j
        while at >= 0:
            branch.insert(0, tokens[at])
            at = parents[at]
        close(tree[j], numpy_logits(config, weights, row[:32] + branch)[-1], share)
    engine.reset()
    logits = expected - expected.max(-1, keepdims=True)
    log_prob = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    score = np.asarray(engine.score(row)).reshape(-1)
    wanted = log_prob[np.arange(47), row[1:]]
    np.testing.assert_allclose(score[-47:], wanted, atol=share * float(np.abs(expected).max()))
    engine.reset()
    close(engine.prefill(row), expected[-1:], share)


def test_a_batch_is_its_sequences_apart(artifact: Path) -> None:
    engine, (config, weights) = Engine(artifact), dequantised(artifact)
    if 4 not in engine.artifact.batch_sizes:
        pytest.skip("compiled for one sequence")
    rows = random_rows(config, [5, 11, 2, 8], seed=5)
    engine.prefill(rows)
    steps = random_rows(config, [1] * 4, seed=6)
    ours = engine.decode(steps)
    for i, (row, step) in enumerate(zip(rows, steps, strict=True)):
        close(ours[i : i + 1], numpy_logits(config, weights, row + step)[-1:], share_of(artifact))


@pytest.mark.parametrize("scheme", WIDENED)
def test_without_our_rules_the_numbers_are_the_same(scheme: str, tmp_path: Path) -> None:
    """TVM's own loops: the scheme is part of the function, not of the schedule."""
    model = str(checkpoint(tmp_path / "model", CONFIG, spread=8.0))
    out = compile_model(model, "cpu", scheme, tmp_path / "out", "baseline", verify_widths=(), max_seq_len=16)
    config, weights = dequantised(out)
    engine, (row,) = Engine(out), random_rows(config, [9], seed=1)
    expected = numpy_logits(config, weights, row)
    close(engine.prefill(row[:8]), expected[7:8])
    close(engine.decode(row[8]), expected[8:9])


def test_the_manifest_tells_what_a_step_reads(artifact: Path) -> None:
    """Bytes of the weights as stored, and the roles and rules of the float32 model."""
    manifest = json.loads((artifact / "manifest.json").read_text())
    scheme = get_scheme(manifest["quantization"])
    assert manifest["compute_dtype"] == scheme.compute_dtype
    tied = manifest["config"]["tie_word_embeddings"]
    table = scheme.of_table("embedding", "head") if tied else scheme.of_table("head")
    rows = [f for f in manifest["functions"] if "decode_b1" in f["calls"]]
    head = next(f for f in rows if "logits" in f["role"])
    k, v = manifest["config"]["n_embd"], manifest["config"]["vocab_size"]
    panel = weight_layout(load_target("cpu")).panel_rows
    padded = -(-v // panel) * panel
    bits = {"float32": 32, "float16": 16, "bfloat16": 16, "int8": 8, "int4": 4}[table.weight_dtype]
    columns = -(-k // 32) * 32 if bits == 4 else k  # 4 bits come in whole groups
    item = 4 if scheme.compute_dtype == "float32" else 2
    scales = {"int8": 4 * v, "int4": item * padded * -(-k // 32)}.get(table.weight_dtype, 0)
    least, most = v * k * bits // 8, padded * columns * bits // 8  # with or without padding
    around = item * k + 4 * v
    assert least + around <= head["bytes"] <= most + around + scales
    if RULES == "full":
        assert {f["rule"] for f in rows if "c_" in f["role"] or "logits" in f["role"]} == {"cpu-gemv"}
    embed = next(f for f in rows if "embed" in f["role"])
    assert int(embed["bytes"]) < 100 * k


def test_schemes_are_described_where_they_are_named() -> None:
    import gpt2_tvm.quantization

    assert all(f"| {name} |" in str(gpt2_tvm.quantization.__doc__) for name in SCHEMES)
