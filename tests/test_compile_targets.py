"""Every family of targets compiles the whole model, and what comes out is checked with that family's own tools.

The quick tests use a small model; the heavy ones two layers of GPT-2 124M too (further ones call the same functions).
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from checkers import msl, rocm, sass

from gpt2_tvm import toolchains
from gpt2_tvm.build import Plan, compile_model, lower_plan, make_plan
from gpt2_tvm.checkpoint import random_model
from gpt2_tvm.config import PRESETS, GPT2Config
from gpt2_tvm.toolchains import modules
from gpt2_tvm.weights import write_hf_checkpoint
from targets import load_target

SMALL = GPT2Config(vocab_size=1000, n_positions=64, n_embd=128, n_layer=2, n_head=2)
GPT2 = replace(PRESETS["gpt2"], n_layer=2)
WIDTHS = (8,)  # of verify; of 4 in test_cuda_static.py and test_wgpu_runner.py


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_hf_checkpoint(tmp_path_factory.mktemp("small") / "small", SMALL, random_model(SMALL, seed=3)))


@pytest.fixture(scope="module")
def gpt2_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_hf_checkpoint(tmp_path_factory.mktemp("gpt2") / "gpt2", GPT2, random_model(GPT2, seed=3)))


def plan_of(name: str, target: str, quantization: str) -> Plan:
    config = SMALL if name == "small_model" else GPT2
    return make_plan(config, load_target(target), quantization, verify_widths=WIDTHS)


def built(plan: Plan) -> Any:
    """The executable of a plan, before export: for kinds whose library hides the source."""
    import tvm

    toolchains.prepare(plan.target)
    with toolchains.compiling(plan.target) as tvm_target:
        lowered, _ = lower_plan(plan)
        return tvm.compile(lowered.final, target=tvm_target, relax_pipeline=None, tir_pipeline=None)


def require(target: str) -> None:
    if what := toolchains.missing(load_target(target)):
        pytest.skip(f"cannot compile for {target} here: needs {what}")


@pytest.mark.heavy
def test_cuda(gpt2_model: str, tmp_path: Path) -> None:
    """A fatbin for three architectures and PTX; tensor cores in every float16 prefill matmul; nothing spilled
    anywhere. (Other sizes and float32: test_cuda_static.py.)"""
    require("cuda")
    if sass.tool() is None:
        pytest.skip(f"cuobjdump is missing: pip install {sass.PACKAGES}")
    artifact = compile_model(gpt2_model, "cuda", "q0f16", output=tmp_path / "a", verify_widths=WIDTHS, weights=False)
    manifest = json.loads((artifact / "manifest.json").read_text())
    kernels = sass.kernels((artifact / manifest["library"]).read_bytes())
    assert {k.arch for k in kernels} == {"sm_80", "sm_89", "sm_90"}
    matmuls = [f["name"] for f in manifest["functions"] if f["rule"].endswith("matmul") and "prefill" in f["calls"]]
    assert len(matmuls) >= 5  # c_attn, two c_proj, c_fc, head
    for arch in ("sm_80", "sm_89", "sm_90"):
        mine = {k.name: k for k in kernels if k.arch == arch}
        for name in matmuls:
            found = [k for kernel, k in mine.items() if kernel == f"{name}_kernel"]
            assert found, f"{arch}: no kernel for {name} among {sorted(mine)}"
            assert found[0].counts["HMMA"] > 0, f"{arch} {name} runs without tensor cores"
        spilled = [k.name for k in mine.values() if k.counts["STL"] and k.name.startswith("fused_NT_matmul")]
        assert not spilled, f"{arch}: {spilled} keep values in local memory"


@pytest.mark.parametrize(
    ("model", "quantization"),
    [
        ("small_model", "q0f16"),
        pytest.param("small_model", "q0f32", marks=pytest.mark.heavy),
        pytest.param("gpt2_model", "q0f16", marks=pytest.mark.heavy),
    ],
)
def test_metal(model: str, quantization: str) -> None:
    """Every kernel of the model type-checks as Metal Shading Language."""
    source = modules.sources(built(plan_of(model, "metal", quantization)), "metal")
    report = msl.check(source)
    assert len(report.kernels) >= 20
    assert not report.errors, report.errors[:5]


@pytest.mark.parametrize(
    ("model", "quantization", "gfx"),
    [
        ("small_model", "q0f16", "gfx1100"),
        pytest.param("small_model", "q0f32", "gfx90a", marks=pytest.mark.heavy),
        pytest.param("gpt2_model", "q0f16", "gfx942", marks=pytest.mark.heavy),
    ],
)
def test_rocm(model: str, quantization: str, gfx: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """A code object for the architecture asked for, readable by LLVM's tools, each kernel within its thread limit."""
    require(gfx)
    if rocm.tools() is None:
        pytest.skip("llvm-readelf and llvm-objdump 22 are missing: apt install llvm-22")
    artifact = compile_model(
        request.getfixturevalue(model), gfx, quantization, output=tmp_path / "a", verify_widths=WIDTHS, weights=False
    )
    objects = rocm.code_objects((artifact / "lib.so").read_bytes())
    assert objects and all(o.arch == gfx for o in objects)
    kernels = [k for o in objects for k in o.kernels]
    assert len(kernels) >= 20
    assert all(k.max_threads <= 256 for k in kernels)
    assert {k.wave for k in kernels} == {32 if gfx == "gfx1100" else 64}


@pytest.mark.heavy
def test_webgpu(gpt2_model: str, no_page: None, tmp_path: Path) -> None:
    """wgpu makes a pipeline of every kernel (what they compute is tested in test_wgpu_runner.py)."""
    pytest.importorskip("wgpu", reason="pip install 'gpt2-tvm[webgpu]'")
    from gpt2_tvm.errors import UserError
    from gpt2_tvm.runners.wgpu_device import Device
    from gpt2_tvm.runners.wgsl import parse_wgsl

    artifact = compile_model(gpt2_model, "webgpu", output=tmp_path / "a", verify_widths=WIDTHS)
    shaders = parse_wgsl((artifact / "kernels.wgsl").read_text())
    assert len(shaders) >= 20
    try:
        device = Device()
    except UserError as error:
        pytest.skip(str(error))
    for shader in shaders.values():
        device.compile(shader)


def test_webgpu_without_weights_is_refused(small_model: str, tmp_path: Path) -> None:
    """Its manifest says what they ask of a device."""
    from gpt2_tvm.errors import UserError

    with pytest.raises(UserError, match=r"webgpu .* weights"):
        compile_model(small_model, "webgpu", output=tmp_path / "a", weights=False)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    "target",
    ["x86-64-v3", "arm64", *(pytest.param(name, marks=pytest.mark.heavy) for name in ("x86-64-v4", "apple-m"))],
)
def test_cpu_elsewhere(target: str, small_model: str, tmp_path: Path) -> None:
    """Other CPUs' artifacts are built here; those that this machine cannot run are refused in one line, not by a
    crash."""
    from gpt2_tvm import Engine
    from gpt2_tvm.errors import UserError
    from targets.detect import missing_features

    artifact = compile_model(small_model, target, output=tmp_path / "a", verify_widths=WIDTHS)
    assert (artifact / "manifest.json").is_file()
    if missing_features(load_target(target).requires):
        with pytest.raises(UserError, match="needs a CPU with"):
            Engine(artifact)


@pytest.mark.heavy
def test_the_bundled_model_in_float16_for_a_gpu(tmp_path: Path) -> None:
    """Its merge of split attention in front of several rows is a vector of conditions, which CUDA has no word for."""
    if lack := toolchains.missing(load_target("h200")):
        pytest.skip(lack)
    compile_model("bundled", "h200", "q0f16", output=tmp_path / "a", verify_widths=WIDTHS, weights=False)
