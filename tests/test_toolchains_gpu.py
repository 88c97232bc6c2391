"""Metal, WebGPU and ROCm: each builds the two kernels, and a checker that knows the device's code reads
them.
"""

from __future__ import annotations

import os
import re
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tvm
import tvm_ffi
from checkers import msl
from checkers import rocm as amd
from checkers.build import build
from tvm import te

from gpt2_tvm import toolchains
from gpt2_tvm.errors import UserError
from gpt2_tvm.toolchains import linker, modules, rocm, webgpu
from targets import load_target

needs_rocm = pytest.mark.skipif(
    rocm.missing(load_target("rocm")) is not None or amd.tools() is None,
    reason=f"needs: apt install {amd.PACKAGES}",
)
needs_zig = pytest.mark.skipif(linker.zig() is None, reason="needs ziglang from PyPI")


# --- metal ---


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("name", ["metal", "m2-ultra"])
def test_metal_source_type_checks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, dtype: str) -> None:
    pytest.importorskip("clang.cindex", reason="needs libclang from PyPI")
    monkeypatch.setattr(linker, "zig", lambda: None)  # its link is a heavy test
    executable, names = build(load_target(name), tmp_path, dtype)
    assert "lib.tar" in names
    source = modules.sources(executable, "metal")
    assert msl.check(source) == msl.Report(("gemv_kernel", "matmul_kernel"), ())
    # DLight's simdgroup matmul is written for float16 alone; for float32 its rule falls back to plain threads
    assert ("simdgroup_multiply_accumulate" in source) == (dtype == "float16")
    with tarfile.open(tmp_path / "lib.tar") as archive:
        objects = [archive.extractfile(member).read() for member in archive.getmembers()]
    assert all(data.startswith(b"\xcf\xfa\xed\xfe") for data in objects)
    assert any(b"kernel void matmul_kernel" in data for data in objects)


PLANTED = [
    ("out[i] = in[i] * 2.0h;", "out[i] = inn[i] * 2.0h;", "inn"),
    ("tanh((float)in[i])", "tanh((int)in[i])", "ambiguous"),
    ("threadgroup_barrier(mem_flags::mem_threadgroup)", "threadgroup_barrier(mem_flags::all)", "all"),
    ("half4(1.0h, 2.0h, 3.0h, 4.0h)", "half4(1.0h, 2.0h, 3.0h, 4.0h, 5.0h)", "make_half4"),
    ("float2 both = float2(1, 2);", "float2 both = half2(1, 2);", "float2"),
    ("(float4)(four)", "(float4)(both)", "convertvector"),
    (
        "simdgroup_half8x8 a; simdgroup_load(a, in,",
        "simdgroup_float8x8 a; simdgroup_load(a, in,",
        "simdgroup_load",
    ),
]
MSL = """// Function: good
#include <metal_stdlib>
using namespace metal;
kernel void good(device half* in [[ buffer(0) ]], device half* out [[ buffer(1) ]],
                 uint i [[thread_position_in_grid]]) {
  threadgroup half shared_memory[64];
  shared_memory[i] = (half)tanh((float)in[i]);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  out[i] = in[i] * 2.0h;
  half4 four = half4(1.0h, 2.0h, 3.0h, 4.0h);
  float2 both = float2(1, 2);
  float4 wide = (float4)*(device half4*)(in + i) * (float4)(four) + long4(1, 2, 3, i)[0];
  simdgroup_half8x8 a; simdgroup_load(a, in, 8);
}
"""


def test_msl_checker_accepts_good_source_and_finds_planted_errors() -> None:
    pytest.importorskip("clang.cindex", reason="needs libclang from PyPI")
    assert msl.check(MSL) == msl.Report(("good",), ())
    for good, bad, wanted in PLANTED:
        assert good in MSL
        report = msl.check(MSL + MSL.replace("good", "bad").replace(good, bad))
        assert report.kernels == ("good", "bad")
        assert report.errors and all(error.startswith("bad:") for error in report.errors)
        assert any(wanted in error for error in report.errors), (bad, report.errors)


# --- webgpu ---


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_webgpu_source(tmp_path: Path, dtype: str) -> None:
    _, names = build(load_target("webgpu"), tmp_path, dtype)
    assert names == [f"lib{linker.this_platform().library_suffix}", webgpu.KERNELS]
    source = (tmp_path / webgpu.KERNELS).read_text()
    assert re.findall(r"^fn (\w+)\(", source, re.MULTILINE) == ["gemv_kernel", "matmul_kernel"]
    assert ("enable f16;" in source) == (dtype == "float16")
    sizes = [[int(side) for side in size.split(",")] for size in re.findall(r"@workgroup_size\(([\d, ]+)\)", source)]
    assert len(sizes) == 2
    assert all(np.prod(size) <= load_target("webgpu").limits.threads_per_block for size in sizes)


def test_kernels_of_a_relax_executable_are_found(tmp_path: Path) -> None:
    """There the device module hangs one level deeper, below the virtual machine's code."""
    from tvm.relax.frontend import nn
    from tvm.s_tir import dlight

    class Model(nn.Module):
        def forward(self, x: nn.Tensor) -> nn.Tensor:
            return nn.op.softmax(x)

    target = load_target("webgpu")
    module, _ = Model().export_tvm({"forward": {"x": nn.spec.Tensor([4, 64], "float32")}})
    with toolchains.compiling(target) as tvm_target:
        module = tvm.relax.transform.LegalizeOps()(module)
        module = dlight.ApplyDefaultSchedule(dlight.gpu.Reduction(), dlight.gpu.Fallback())(module)
        executable = tvm.compile(module, tvm_target)
    assert [found.kind for found in modules.tree(executable)] == ["relax.VMExecutable", "llvm", "webgpu"]
    toolchains.export(executable, target, tmp_path)
    assert "fn softmax" in (tmp_path / webgpu.KERNELS).read_text()


def test_webgpu_source_is_accepted_by_wgpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wgpu = pytest.importorskip("wgpu")
    monkeypatch.setenv("XDG_RUNTIME_DIR", os.environ.get("XDG_RUNTIME_DIR", str(tmp_path)))
    adapters = [adapter for adapter in wgpu.gpu.enumerate_adapters_sync() if "shader-f16" in adapter.features]
    if not adapters:
        pytest.skip("no adapter with float16 (on Linux without a GPU: apt install mesa-vulkan-drivers)")
    build(load_target("webgpu"), tmp_path)
    device = adapters[0].request_device_sync(required_features=["shader-f16"])
    for part in re.split(r"^(?=// Function: \w+\n//-)", (tmp_path / webgpu.KERNELS).read_text(), flags=re.MULTILINE):
        if "@compute" in part:
            device.create_compute_pipeline(
                layout="auto",
                compute={
                    "module": device.create_shader_module(code=part),
                    "entry_point": re.search(r"^fn (\w+)\(", part, re.MULTILINE).group(1),
                },
            )


# --- rocm ---


@needs_rocm
@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize(("name", "wave"), [("rocm", 32), ("gfx90a", 64), ("gfx942", 64), ("gfx1100", 32)])
def test_rocm_code_objects(tmp_path: Path, name: str, wave: int, dtype: str) -> None:
    target = load_target(name)
    build(target, tmp_path, dtype)
    (found,) = amd.code_objects((tmp_path / "lib.so").read_bytes())
    assert found.arch == target.tvm["mcpu"] and found.target.endswith(f"-{found.arch}")
    assert [kernel.name for kernel in found.kernels] == ["gemv_kernel", "matmul_kernel"]
    for kernel in found.kernels:
        assert (kernel.wave, kernel.max_threads) == (wave, 256)
        assert kernel.vector_spills == kernel.scalar_spills == kernel.private_bytes == 0
        assert kernel.shared_bytes <= target.limits.shared_memory_bytes and kernel.counts["load"]


@needs_rocm
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_rocm_mathematics_need_no_device_library(tmp_path: Path, dtype: str) -> None:
    """All functions that GPT-2 uses link (with --no-undefined); one that TVM cannot lower is refused."""
    from tvm.s_tir import dlight

    def compile_for_gfx942(*functions: Callable[..., Any]) -> Any:
        a = te.placeholder((1024,), dtype, "a")
        out = te.compute((1024,), lambda i: sum((function(a[i]) for function in functions), a[i]), "b")
        module = tvm.IRModule({"main": te.create_prim_func([a, out])})
        with toolchains.compiling(load_target("gfx942")) as target:
            return tvm.compile(dlight.ApplyDefaultSchedule(dlight.gpu.Fallback())(module), target)

    names = ("tvm_callback_rocm_bitcode_path", "tvm_callback_rocm_link")
    before = [tvm_ffi.get_global_func(name) for name in names]
    used = (te.exp, te.log, te.tanh, te.erf, te.sqrt, te.rsqrt, te.sigmoid, te.floor, lambda x: te.power(x, x))
    assert toolchains.export(compile_for_gfx942(*used), load_target("gfx942"), tmp_path) == ["lib.so"]
    with pytest.raises(Exception, match=r"undefined symbol: atanf|unknown intrinsic"):
        compile_for_gfx942(te.atan)
    assert all(tvm_ffi.get_global_func(name).same_as(earlier) for name, earlier in zip(names, before, strict=True))


@needs_rocm
@needs_zig
def test_rocm_links_with_ziglang_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    true_which = shutil.which
    monkeypatch.setattr("shutil.which", lambda name: None if "ld.lld" in name else true_which(name))
    if rocm.find_lld() is None:
        pytest.skip(f"this ziglang has an lld older than LLVM {rocm.LLVM_MAJOR}")
    assert rocm.find_lld()[1:] == ("-m", "ziglang", "ld.lld")
    build(load_target("gfx90a"), tmp_path)
    (found,) = amd.code_objects((tmp_path / "lib.so").read_bytes())
    assert found.arch == "gfx90a" and len(found.kernels) == 2


def test_rocm_parts_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rocm, "find_lld", lambda: None)
    with pytest.raises(UserError, match="lld of LLVM 22 or later: apt install lld-22") as error:
        toolchains.prepare(load_target("gfx942"))
    assert "\n" not in str(error.value)


def test_an_old_lld_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def put(name: str, version: str) -> None:
        path = tmp_path / name
        path.write_text(f"#!/bin/sh\necho '{version} (compatible with GNU linkers)'\n")
        path.chmod(0o755)
        rocm._lld_version.cache_clear()

    monkeypatch.setattr("shutil.which", lambda name: str(path) if (path := tmp_path / name).is_file() else None)
    monkeypatch.setattr(linker, "zig", lambda: None)
    put("ld.lld", "Debian LLD 14.0.6")
    assert rocm.find_lld() is None
    put("ld.lld", "LLD 23.1.0")
    assert rocm.find_lld() == (str(tmp_path / "ld.lld"),)
    put("ld.lld-22", "Debian LLD 22.1.8")
    assert rocm.find_lld() == (str(tmp_path / "ld.lld-22"),)


def test_llvm_major_is_that_of_the_installed_tvm() -> None:
    from tvm.target.codegen import llvm_version_major

    assert llvm_version_major() == rocm.LLVM_MAJOR
