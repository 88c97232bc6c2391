"""compile --interface mlc for GPUs that are not here: every kernel is there, and passes its family's own check.

What they compute is tested on the CPU (test_mlc_paged.py) and on WebGPU (test_mlc_gpu_kernels.py, test_web_llm.py).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from checkers import msl, rocm, sass

from gpt2_tvm import toolchains
from gpt2_tvm.build import compile_model, make_plan
from gpt2_tvm.checkpoint import resolve_model
from gpt2_tvm.config import PRESETS, GPT2Config
from gpt2_tvm.mlc.functions import FUNCTIONS
from gpt2_tvm.toolchains import modules
from targets import load_target

# What a cache calls at run time; names as in the code of a device.
CACHE = (
    "batch_prefill_ragged_kv",
    "batch_prefill_paged_kv",
    "batch_decode_paged_kv",
    "tir_attention_merge_state",
    "tir_kv_cache_transpose_append",
    "compact_kv_copy",
    "copy_single_page",
)
HELPERS = ("apply_logit_bias_inplace", "apply_penalty_inplace", "apply_bitmask_inplace", "sort_falling")
KERNELS = tuple(f"{name}_kernel" for name in (*CACHE, *HELPERS))
MERGE = "tir_attention_merge_state_kernel"
pytestmark = pytest.mark.heavy


def config_of(model: str) -> GPT2Config:
    return PRESETS["gpt2"] if model == "gpt2" else resolve_model(model).config


def built(model: str, target: str, quantization: str) -> Any:
    """The executable, before export."""
    import tvm

    from gpt2_tvm.mlc.lowering import lower_paged

    plan = make_plan(config_of(model), load_target(target), quantization, interface="mlc")
    toolchains.prepare(plan.target)
    with toolchains.compiling(plan.target) as tvm_target:
        lowered, told = lower_paged(plan)
        assert told["kv_cache"]["head_dim"] == 64
        executable = tvm.compile(lowered.final, target=tvm_target, relax_pipeline=None, tir_pipeline=None)
    missing = [one.name for one in FUNCTIONS if not has(executable, one.name)]
    assert not missing
    return executable


def has(executable: Any, name: str) -> bool:
    """Whether a library has a function: of Relax in its table, kernels' host code in its modules."""
    return name in str(executable.stats()) or any(m.implements_function(name) for m in modules.tree(executable))


def require(target: str) -> None:
    if what := toolchains.missing(load_target(target)):
        pytest.skip(f"cannot compile for {target} here: needs {what}")


def merge_of(source: str) -> str:
    """The kernel that merges two attentions, out of the source of many."""
    (found,) = (part for part in source.split("// Function: ") if part.startswith(MERGE))
    return found


@pytest.mark.parametrize(
    ("model", "quantization"), [("bundled", "q0f32"), ("bundled", "q0f16"), ("bundled", "q4f16_1"), ("gpt2", "q0f16")]
)
def test_metal(model: str, quantization: str) -> None:
    """Every kernel type-checks as Metal Shading Language."""
    source = modules.sources(built(model, "metal", quantization), "metal")
    report = msl.check(source)
    assert set(KERNELS) <= set(report.kernels)
    assert not report.errors, report.errors[:5]
    assert "threadgroup_barrier" in merge_of(source)


def test_cuda(tmp_path: Path) -> None:
    """Machine code for three architectures; tensor cores in prefill's matmuls, and none of them spills."""
    require("cuda")
    if sass.tool() is None:
        pytest.skip(f"cuobjdump is missing: pip install {sass.PACKAGES}")
    artifact = compile_model("bundled", "cuda", "q0f16", output=tmp_path / "a", interface="mlc")
    manifest = json.loads((artifact / "manifest.json").read_text())
    kernels = sass.kernels((artifact / manifest["library"]).read_bytes())
    matmuls = [f["name"] for f in manifest["functions"] if f["rule"].endswith("matmul") and "prefill" in f["calls"]]
    assert len(matmuls) >= 4  # c_attn, two c_proj, c_fc; the head sees one row
    heads = [f["name"] for f in manifest["functions"] if "logits" in f["role"]]
    for arch in ("sm_80", "sm_89", "sm_90"):
        mine = {kernel.name: kernel for kernel in kernels if kernel.arch == arch}
        assert set(KERNELS) <= set(mine), arch
        for name in matmuls:
            own = [kernel for key, kernel in mine.items() if key.startswith(f"{name}_kernel")]
            assert len(own) == (1 if name in heads else 3), f"{arch}: {name} is not for any number of rows"
            for kernel in own:
                assert not kernel.counts["STL"], f"{arch}: {kernel.name} keeps values in local memory"
                assert kernel.counts["HMMA"] > 0, f"{arch}: {kernel.name} runs without tensor cores"
        assert any(name.startswith("BAR.") for name in mine[MERGE].opcodes)  # ours: in TVM's, threads race


def test_rocm(tmp_path: Path) -> None:
    """A code object for the architecture asked for, readable by LLVM's tools, each kernel within its thread limit."""
    require("gfx1100")
    if rocm.tools() is None:
        pytest.skip("llvm-readelf and llvm-objdump 22 are missing: apt install llvm-22")
    artifact = compile_model("bundled", "gfx1100", "q0f32", output=tmp_path / "a", interface="mlc")
    objects = rocm.code_objects((artifact / "lib.so").read_bytes())
    kernels = {kernel.name: kernel for one in objects for kernel in one.kernels}
    assert objects and all(one.arch == "gfx1100" for one in objects)
    assert set(KERNELS) <= set(kernels)
    assert all(kernel.max_threads <= 256 and kernel.wave == 32 for kernel in kernels.values())
    assert "s_barrier" in kernels[MERGE].opcodes
