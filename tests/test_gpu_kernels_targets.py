"""Every GPU kernel compiles for every kind of GPU, to code that a checker of its own accepts."""

from __future__ import annotations

from pathlib import Path

import pytest
import tvm
from checkers import msl

from gpt2_tvm import toolchains
from gpt2_tvm.kernels.gpu_decode_attention import decode_attention
from gpt2_tvm.kernels.gpu_keep import keep_branch
from gpt2_tvm.kernels.gpu_kv_append import kv_append
from gpt2_tvm.kernels.gpu_prefill_attention import prefill_attention
from gpt2_tvm.kernels.gpu_sampling import argmax, greedy_advance, log_prob
from gpt2_tvm.kernels.spec import AttentionSpec, GpuLimits
from gpt2_tvm.toolchains import modules
from targets import load_target


def all_kernels(limits: GpuLimits, dtype: str, head_dim: int) -> tvm.IRModule:
    spec = AttentionSpec(12, head_dim, 1024, dtype, scale=head_dim**-0.5)
    decode = decode_attention(spec, limits, 1, 1, append=True, splits=4)
    verify = decode_attention(spec, limits, 2, 8, tree=True)
    found = {
        "kv_append": kv_append(spec, limits),
        "prefill": prefill_attention(spec, limits),
        "decode": decode.partial,
        "combine": decode.combine,
        "verify": verify.partial,
        "argmax": argmax(2, 50257, limits),
        "greedy_advance": greedy_advance(2, 50257, 1024, limits),
        "log_prob": log_prob(50257, limits),
        "keep_branch": keep_branch(spec, limits, 2, 8),
    }
    return tvm.IRModule({name: func.with_attr("global_symbol", name) for name, func in found.items()})


@pytest.mark.parametrize(
    ("name", "head_dim", "dtype"),
    [
        ("a100", 64, "float16"),
        ("metal", 64, "float16"),
        ("gfx90a", 80, "float16"),
        pytest.param("a100", 99, "float32", marks=pytest.mark.heavy),
        pytest.param("a100", 66, "float16", marks=pytest.mark.heavy),
        pytest.param("metal", 99, "float32", marks=pytest.mark.heavy),
        pytest.param("metal", 66, "float16", marks=pytest.mark.heavy),
        pytest.param("gfx90a", 99, "float32", marks=pytest.mark.heavy),
        pytest.param("gfx1100", 256, "float16", marks=pytest.mark.heavy),
    ],
)
def test_compiles_for(tmp_path: Path, name: str, head_dim: int, dtype: str) -> None:
    target = load_target(name)
    if what := toolchains.missing(target):
        pytest.skip(f"needs {what}")
    with toolchains.compiling(target) as tvm_target:
        module = all_kernels(GpuLimits.of_target(tvm_target), dtype, head_dim)
        executable = tvm.compile(module, tvm_target)
        assert toolchains.export(executable, target, tmp_path)  # which looks for the device's code in it
    if name == "metal":
        pytest.importorskip("clang.cindex", reason="needs libclang from PyPI")
        report = msl.check(modules.sources(executable, "metal"))
        assert len(report.kernels) == len(module.functions) and not report.errors
