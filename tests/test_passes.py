"""The fusions of the graph: sets by name, what each joins, launches a step; and no set changes what is computed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tvm_ffi
from faults import refusal
from tvm import relax, tirx
from tvm.ir import GlobalVar

from gpt2_tvm.build import make_plan
from gpt2_tvm.config import PRESETS, GPT2Config
from gpt2_tvm.inventory import function_table
from gpt2_tvm.passes.registry import FUSIONS, applicable, pass_set
from gpt2_tvm.quantization import get_scheme
from targets import load_target

GPUS = ("cuda", "webgpu", "metal", "rocm")
LAYERS = 2
Sizes = tuple[tuple[int, ...], tuple[int, ...]]
DEQUANTIZE = "dequantize-gemv"
# 1024 positions, so that a head's slots are split; sizes that no thread count divides
CONFIG = GPT2Config(vocab_size=101, n_positions=1024, n_embd=36, n_layer=LAYERS, n_head=3)


# Left out, or alone, together. linear-residual and norm-gemv are not, nor linear-residual and norm-residual: without
# the first the others meet an add that is alone.
PAIRS = (
    (DEQUANTIZE,),
    ("linear-gelu", "linear-residual"),
    ("qkv-append", "norm-gemv"),
    ("combine-gemv", "norm-residual"),
)

ONE: Sizes = ((1,), ())  # what decode alone is asked with: a third of the functions, and of the time
SEVERAL: Sizes = ((1, 3), (2,))


@cache
def lowered(
    target: str, passes: str, quantization: str = "q0f32", rules: str = "full", sizes: Sizes = ONE
) -> tuple[Any, Any]:
    """(lowered, plan) of `CONFIG`. sizes: batches, and widths of verify. `table` asks with all five in a row."""
    from gpt2_tvm.build import lower_plan

    batches, widths = sizes
    plan = make_plan(
        CONFIG, load_target(target), quantization, rules, batch_sizes=batches, verify_widths=widths, passes=passes
    )
    with plan.target.tvm_target():
        return lower_plan(plan)[0], plan


@cache
def table(
    target: str, passes: str, quantization: str = "q0f32", rules: str = "full", sizes: Sizes = ONE
) -> dict[str, Any]:
    return function_table(*lowered(target, passes, quantization, rules, sizes))


# Sets ---------------------------------------------------------------------------------------------------------------


def test_sets() -> None:
    cpu, gpu = load_target("cpu"), load_target("cuda")
    rules = tuple(gpu.rules)
    assert pass_set("none", cpu, ()) == ()
    assert pass_set("all", cpu, ()) == ("dequantize-gemv", "linear-gelu", "linear-residual", "norm-residual")
    assert pass_set("all", gpu, rules) == tuple(FUSIONS)
    assert pass_set("only-norm-gemv+qkv-append", gpu, rules) == (
        "qkv-append",
        "norm-gemv",
    )  # in the order of the passes
    assert pass_set("linear-gelu", cpu, ()) == ("linear-gelu",)
    assert set(pass_set("without-norm-gemv", gpu, rules)) == set(FUSIONS) - {"norm-gemv"}
    assert applicable(gpu, ("fallback",)) == ("dequantize-gemv", "linear-gelu", "linear-residual", "qkv-append")


def test_sets_that_mean_nothing_are_refused() -> None:
    cpu, gpu = load_target("cpu"), load_target("cuda")
    assert "nonsense" in refusal(lambda: pass_set("only-nonsense", cpu, ()))
    assert "not for cpu" in refusal(lambda: pass_set("qkv-append", cpu, ()))
    assert "needs rule" in refusal(lambda: pass_set("norm-gemv", gpu, ("gemv", "fallback")))
    for text in ("only-", "without-", ",", ""):
        assert "names no pass" in refusal(partial(pass_set, text, cpu, ()))


# Launches -----------------------------------------------------------------------------------------------------------


def calls(low: Any, name: str) -> Counter[str]:
    """PrimFuncs that an exported function calls, in the final module."""
    found: Counter[str] = Counter()
    (func,) = [f for v, f in low.final.functions_items() if v.name_hint == name]

    def see(node: Any) -> None:
        if isinstance(node, relax.Call) and isinstance(node.op, GlobalVar):
            found[node.op.name_hint] += isinstance(low.final[node.op], tirx.PrimFunc)

    relax.analysis.post_order_visit(func, see)
    return found


def launches(low: Any, plan: Any, name: str) -> int:
    """Kernels that one call launches, by walking TVM's host code of everything that it calls."""
    from gpt2_tvm.host_code import host_launches

    count = calls(low, name)
    functions = {v: f for v, f in low.final.functions_items() if v.name_hint in count}
    host = host_launches(functions, plan.target.tvm_target())
    return sum(times * len(host[function]) for function, times in count.items())


@pytest.mark.parametrize(
    "target", ["cuda", *(pytest.param(name, marks=pytest.mark.heavy) for name in ("webgpu", "metal", "rocm"))]
)
def test_launches_of_a_step(target: str) -> None:
    """A layer: LayerNorm with c_attn, attention with the append, c_proj with what merges the splits, LayerNorm with
    c_fc, mlp.c_proj. A step: embedding, LayerNorm with the head, argmax."""
    low, plan = lowered(target, "all", "q0f32", "full", SEVERAL)
    found = table(target, "all", sizes=SEVERAL)
    assert found["launches_per_decode"] == launches(low, plan, "greedy_b1") == 5 * LAYERS + 3
    for name in ("decode_b1", "decode_b3", "verify_b1_m2", "verify_b3_m2"):
        assert found["launches"][name] == launches(low, plan, name) == 5 * LAYERS + 2
    assert table(target, "none")["launches_per_decode"] > 10 * LAYERS


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("target", "quantization", "layers"),
    [
        ("cuda", "q0f16", 12),
        *((target, "q0f16", LAYERS) for target in GPUS[1:]),
        *((t, "q8f16", LAYERS) for t in GPUS[:2]),
    ],
)
def test_launches_of_gpt2(target: str, quantization: str, layers: int) -> None:
    """124M as it is, and two layers of it elsewhere."""
    from gpt2_tvm.build import lower_plan

    config = replace(PRESETS["gpt2"], n_layer=layers)
    plan = make_plan(config, load_target(target), quantization, batch_sizes=(1, 8), verify_widths=(4, 8))
    with plan.target.tvm_target():
        low, _ = lower_plan(plan)
    found = function_table(low, plan)
    assert found["launches_per_decode"] == launches(low, plan, "greedy_b1") <= 5 * layers + 4
    assert found["launches"]["verify_b1_m4"] <= 5 * layers + 4


@pytest.mark.heavy
def test_what_each_pass_saves_on_a_gpu() -> None:
    """Launches a step, one pass alone: how many places it has."""
    none = table("cuda", "none")["launches_per_decode"]
    saved = {name: none - table("cuda", name)["launches_per_decode"] for name in FUSIONS if name != "dequantize-gemv"}
    assert saved == {
        "linear-gelu": LAYERS,
        "linear-residual": 2 * LAYERS,
        "qkv-append": LAYERS,
        "combine-gemv": LAYERS,
        "norm-gemv": 2 * LAYERS + 1,
        "norm-residual": 2 * LAYERS,
    }


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_dequantised_apart_is_a_function_of_its_own(target: str) -> None:
    apart = table(target, "without-dequantize-gemv", "q8f32")
    together = table(target, "all", "q8f32")
    names = [row["name"] for row in apart["functions"] if row["name"].startswith("dequantise")]
    assert names and not any(row["name"].rstrip("0123456789") == "dequantise" for row in together["functions"])
    products = 4 * LAYERS + 1
    assert apart["launches"]["decode_b1"] == together["launches"]["decode_b1"] + products


def test_rules_without_ours_leave_norms_alone() -> None:
    """The study's rule sets know no kernel of ours that a rule must make."""
    for rules in ("stock", "baseline"):
        _, plan = lowered("cuda", "all", "q0f32", rules, ONE)
        assert "norm-gemv" not in plan.passes and "linear-gelu" in plan.passes
        assert not any(row["rule"] == "norm-gemv" for row in table("cuda", "all", rules=rules)["functions"])


def test_too_many_rows_or_elements_stay_apart() -> None:
    from gpt2_tvm.build import lower_plan

    wide = GPT2Config(vocab_size=101, n_positions=64, n_embd=1600, n_layer=1, n_head=25)
    plan = make_plan(wide, load_target("webgpu"), batch_sizes=(1, 8), verify_widths=(2,))
    with plan.target.tvm_target():
        found = function_table(lower_plan(plan)[0], plan)
    assert found["launches"]["decode_b1"] == 5 + 2
    # eight rows of 1600 values do not fit 32 KiB, sixteen rows are a matmul's
    for name in ("decode_b8", "verify_b8_m2"):
        alone = [row for row in found["functions"] if row["calls"].get(name) and row["name"].startswith("layer_norm")]
        assert sum(row["calls"][name] for row in alone) == 3


# Results ------------------------------------------------------------------------------------------------------------


def logits(
    model: Path, target: str, quantization: str, passes: str, folder: Path, batches: tuple[int, ...]
) -> list[np.ndarray]:
    """Of a prompt, decode steps, a chain and a greedy loop; a batch of two has different lengths."""
    from gpt2_tvm.build import compile_model
    from gpt2_tvm.engine import Engine

    made = compile_model(
        str(model), target, quantization, folder, batch_sizes=batches, verify_widths=(3,), passes=passes
    )
    found: list[np.ndarray] = []
    ids = np.random.default_rng(0).integers(0, 97, 70)
    engine = Engine(made)  # once: a device compiles its shaders
    for batch in batches:
        prompts = [ids.tolist(), ids[:5].tolist()][:batch]
        engine.reset()
        found.append(engine.prefill(prompts))
        found.append(engine.decode([7] * len(prompts)))
        found.append(engine.verify([[1, 2, 3]] * len(prompts)))
        engine.rewind(2)
        found.append(engine.decode([9] * len(prompts)))
        found.append(engine.decode_greedy(3).astype(np.float32))
    return found


@pytest.fixture(scope="module")
def odd_model(no_page: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from gpt2_tvm.checkpoint import random_model
    from gpt2_tvm.weights import write_hf_checkpoint

    config = GPT2Config(vocab_size=97, n_positions=200, n_embd=36, n_layer=2, n_head=3)
    return write_hf_checkpoint(tmp_path_factory.mktemp("odd") / "model", config, random_model(config, seed=1))


References = Callable[[str], list[np.ndarray]]


@pytest.fixture(scope="module")
def references(odd_model: Path, tmp_path_factory: pytest.TempPathFactory) -> References:
    """`logits` of a quantization on the CPU with all passes, for both batches; the first of them are those of one."""
    folder = tmp_path_factory.mktemp("references")
    return cache(lambda quantization: logits(odd_model, "cpu", quantization, "all", folder / quantization, (1, 2)))


def same(
    references: References,
    model: Path,
    target: str,
    quantization: str,
    sets: list[str],
    tmp_path: Path,
    tolerance: float,
    batches: tuple[int, ...] = (1, 2),
) -> None:
    expected = references(quantization)
    for passes in sets:
        found = logits(model, target, quantization, passes, tmp_path / f"{target}-{passes}", batches)
        for ours, theirs in zip(found, expected[: len(found)], strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance * np.abs(theirs).max(), err_msg=passes)


@pytest.mark.heavy
def test_cpu_results_without_any_pass_are_those_with_all(
    references: References, odd_model: Path, tmp_path: Path
) -> None:
    same(references, odd_model, "cpu", "q8f32", ["none"], tmp_path, 1e-5)


@pytest.mark.heavy
def test_cpu_results_where_the_residual_is_added_alone(references: References, odd_model: Path, tmp_path: Path) -> None:
    """By norm-residual, once without and once with the other passes."""
    same(references, odd_model, "cpu", "q8f32", ["only-norm-residual", "without-linear-residual"], tmp_path, 1e-5)


def apart(target: str, quantization: str, form: str) -> list[str]:
    """The sets "only-x" or "without-x" of every pass of a target, two at a time where they join other functions and
    neither sees what the other made. Where weights are not widened dequantize-gemv finds nothing, see
    `test_plain_weights_leave_dequantize_gemv_nothing`: its sets are those of no pass, or of all.
    """
    device = load_target(target)
    every = applicable(device, tuple(device.rules) if device.kind != "cpu" else ())
    names = [name for name in every if name != DEQUANTIZE or get_scheme(quantization).widened]
    pairs = [[name for name in pair if name in names] for pair in PAIRS]
    assert sorted(name for pair in pairs for name in pair) == sorted(names)
    return [f"{form}-{'+'.join(pair)}" for pair in pairs if pair]


@pytest.mark.parametrize("target", ["cpu", "webgpu"])
def test_plain_weights_leave_dequantize_gemv_nothing(target: str) -> None:
    apart = lowered(target, f"without-{DEQUANTIZE}")[0].final
    assert tvm_ffi.structural_equal(apart, lowered(target, "all")[0].final, map_free_vars=True)


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("quantization", "form"), [("q0f32", "without"), ("q0f16", None), ("q4f32_1", "only"), ("q16f32", None)]
)
def test_cpu_results_are_those_of_every_pass_apart(
    references: References, odd_model: Path, tmp_path: Path, quantization: str, form: str | None
) -> None:
    """`form` None: without any pass, and, where they are widened, with weights widened apart."""
    sets = ["none", *(apart("cpu", quantization, form) if form else [])]
    if get_scheme(quantization).widened and form != "without":
        sets.append(f"without-{DEQUANTIZE}")
    same(references, odd_model, "cpu", quantization, sets, tmp_path, 2e-2 if quantization == "q0f16" else 1e-5)


@pytest.mark.heavy
@pytest.mark.parametrize(("quantization", "sets"), [("q0f32", ["none", "all"]), ("q8f32", ["all"])])
def test_webgpu_results_are_those_of_the_cpu(
    references: References, odd_model: Path, tmp_path: Path, quantization: str, sets: list[str]
) -> None:
    pytest.importorskip("wgpu", reason="needs wgpu: pip install 'gpt2-tvm[webgpu]'")
    from wgsl_harness import device

    device()
    same(references, odd_model, "webgpu", quantization, sets, tmp_path, 1e-5)


@pytest.mark.heavy
@pytest.mark.parametrize(("quantization", "form"), [("q0f32", "without"), ("q8f32", "only")])
def test_webgpu_results_of_every_pass_apart(
    references: References, odd_model: Path, tmp_path: Path, quantization: str, form: str
) -> None:
    """For one sequence: most of the time is a software device's, compiling shaders."""
    pytest.importorskip("wgpu", reason="needs wgpu: pip install 'gpt2-tvm[webgpu]'")
    from wgsl_harness import device

    device()
    sets = apart("webgpu", quantization, form)
    if get_scheme(quantization).widened:
        sets += ["none", f"without-{DEQUANTIZE}"]
    same(references, odd_model, "webgpu", quantization, sets, tmp_path, 1e-5, (1,))


def test_the_manifest_names_the_passes(odd_model: Path, tmp_path: Path) -> None:
    from gpt2_tvm.artifact import open_artifact
    from gpt2_tvm.build import compile_model

    folder = compile_model(str(odd_model), "cpu", output=tmp_path / "a", passes="linear-gelu", verify_widths=())
    assert open_artifact(folder).manifest["passes"] == ["linear-gelu"]
