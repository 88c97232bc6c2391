"""Each kind of target builds the same two kernels, and a checker that knows the device's code looks at what
came out.
"""

from __future__ import annotations

import ctypes
import inspect
import os
import re
import shutil
import struct
import subprocess
import sys
import tarfile
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tvm
import tvm_ffi
from checkers import msl, sass
from checkers import rocm as amd
from tvm import te, tirx

from gpt2_tvm import toolchains
from gpt2_tvm.errors import UserError
from gpt2_tvm.toolchains import (
    cuda,
    cuda_runtime,
    cuda_toolkit,
    images,
    linker,
    modules,
    rocm,
    tensor_intrin,
    webgpu,
)
from targets import DeviceTarget, load_target

N, K = 256, 512
needs_cuda = pytest.mark.skipif(
    cuda.missing(load_target("cuda")) is not None,
    reason="needs the CUDA compiler: pip install 'gpt2-tvm[cuda]'",
)
needs_sass = pytest.mark.skipif(sass.tool() is None, reason=f"needs {sass.PACKAGES} from PyPI")
needs_rocm = pytest.mark.skipif(
    rocm.missing(load_target("rocm")) is not None or amd.tools() is None,
    reason=f"needs: apt install {amd.PACKAGES}",
)
needs_zig = pytest.mark.skipif(linker.zig() is None, reason="needs ziglang from PyPI")
native_elf = pytest.mark.skipif(sys.platform != "linux", reason="the driver's stub is for Linux")


def kernels(dtype: str = "float16") -> tvm.IRModule:
    """`gemv`: [1, K] x [N, K] -> [1, N]; `matmul`: [m, K] x [N, K] -> [m, N] for any m. Both are matmuls with
    a transposed weight.
    """

    def matmul(name: str, rows: int | tirx.Var) -> tirx.PrimFunc:
        x, w = te.placeholder((rows, K), dtype, "x"), te.placeholder((N, K), dtype, "w")
        k = te.reduce_axis((0, K), "k")
        out = te.compute((rows, N), lambda i, j: te.sum(x[i, k] * w[j, k], axis=k), "NT_matmul")
        return te.create_prim_func([x, w, out]).with_attr("global_symbol", name)

    return tvm.IRModule({"gemv": matmul("gemv", 1), "matmul": matmul("matmul", tirx.Var("m", "int32"))})


def build(
    target: DeviceTarget, folder: Path, dtype: str = "float16", **options: object
) -> tuple[object, list[str]]:
    """(executable, names of the files in `folder`) of `kernels`, scheduled by stock DLight where it schedules
    the kind.
    """
    from tvm.s_tir import dlight

    context = cuda.compiling(target, **options) if options else toolchains.compiling(target)
    with context as tvm_target:
        module = kernels(dtype)
        if target.kind != "cpu":
            rules = (dlight.gpu.Matmul(), dlight.gpu.GEMV(), dlight.gpu.Fallback())
            module = dlight.ApplyDefaultSchedule(*rules)(module)
        executable = tvm.compile(module, tvm_target)
    folder.mkdir(exist_ok=True)
    return executable, toolchains.export(executable, target, folder)


def one_line(error: pytest.ExceptionInfo[UserError]) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


# --- cpu ---


@pytest.mark.parametrize("export", ["so", "tar"])
def test_cpu_library_computes(tmp_path: Path, export: str) -> None:
    _, names = build(replace(load_target("cpu"), export=export), tmp_path, "float32")
    assert names == (["lib.tar"] if export == "tar" else [f"lib{linker.this_platform().library_suffix}"])
    library = tvm.runtime.load_module(str(tmp_path / names[0]))
    rng = np.random.default_rng(0)
    w = rng.standard_normal((N, K), "float32")
    for name, rows in (("gemv", 1), ("matmul", 5)):
        x = rng.standard_normal((rows, K), "float32")
        out = tvm.runtime.tensor(np.zeros((rows, N), "float32"))
        library[name](tvm.runtime.tensor(x), tvm.runtime.tensor(w), out)
        np.testing.assert_allclose(out.numpy(), x @ w.T, rtol=1e-4, atol=1e-4)


def test_objects_for_another_machine_without_zig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linker, "zig", lambda: None)
    for name, magic, machine_at, machine in (
        ("arm64", b"\x7fELF\x02\x01", 18, 183),  # EM_AARCH64
        ("apple-m", b"\xcf\xfa\xed\xfe", 4, 12),  # low half of CPU_TYPE_ARM64
    ):
        if linker.platform_of(load_target(name).tvm["mtriple"]) == linker.this_platform():
            continue
        _, names = build(load_target(name), tmp_path / name)
        assert names == ["lib.tar"]
        with tarfile.open(tmp_path / name / "lib.tar") as archive:
            objects = [archive.extractfile(member).read() for member in archive.getmembers()]
        assert objects
        assert all(
            data.startswith(magic) and struct.unpack_from("<H", data, machine_at)[0] == machine
            for data in objects
        )


def test_tar_is_reproducible(tmp_path: Path) -> None:
    for name in ("a", "b"):
        build(replace(load_target("cpu"), export="tar"), tmp_path / name)
    assert (tmp_path / "a" / "lib.tar").read_bytes() == (tmp_path / "b" / "lib.tar").read_bytes()


@pytest.mark.heavy  # the first link for a platform builds zig's own libraries for it
@needs_zig
def test_zig_links_for_other_machines(tmp_path: Path) -> None:
    if linker.this_platform() != linker.Platform("arm64", "linux"):
        _, names = build(load_target("arm64"), tmp_path / "arm")
        assert (
            names == ["lib.so"]
            and struct.unpack_from("<H", (tmp_path / "arm" / "lib.so").read_bytes(), 18)[0] == 183
        )
    _, names = build(load_target("m1"), tmp_path / "metal")
    assert names == ["lib.dylib", "lib.tar"]
    library = (tmp_path / "metal" / "lib.dylib").read_bytes()
    assert 0x1D in _load_commands(library), (
        "unsigned (no LC_CODE_SIGNATURE): Apple silicon refuses to load it"
    )


def _load_commands(macho: bytes) -> set[int]:
    assert macho.startswith(b"\xcf\xfa\xed\xfe")
    (count,) = struct.unpack_from("<I", macho, 16)
    found, offset = set(), 32
    for _ in range(count):
        command, size = struct.unpack_from("<II", macho, offset)
        found.add(command)
        offset += size
    return found


# --- linking ---


def test_linker_prefers_the_system_and_falls_back_to_zig(monkeypatch: pytest.MonkeyPatch) -> None:
    here = linker.this_platform()
    monkeypatch.setattr(linker, "system_compiler", lambda: "/usr/bin/c++")
    monkeypatch.setattr(linker, "zig", lambda: ("zig",))
    assert linker.find_linker() == linker.Linker(("/usr/bin/c++",), here)
    other = linker.Platform("arm64", "macos" if here.system == "linux" else "linux")
    assert linker.find_linker(other).command[:3] == ("zig", "cc", "-target")
    monkeypatch.setattr(linker, "system_compiler", lambda: None)
    assert linker.find_linker().command[0] == "zig"
    monkeypatch.setattr(linker, "zig", lambda: None)
    assert linker.find_linker() is None
    with pytest.raises(UserError, match="pip install ziglang") as error:
        toolchains.prepare(load_target("cpu"))
    one_line(error)


def test_compiler_from_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    mine = tmp_path / "my-compiler"
    mine.write_text("#!/bin/sh\nexit 0\n")
    mine.chmod(0o755)
    monkeypatch.setenv("CXX", str(mine))
    assert linker.system_compiler() == str(mine)
    monkeypatch.setenv("CXX", str(tmp_path / "absent"))
    monkeypatch.setenv("CC", str(mine))
    assert linker.system_compiler() == str(mine)


def test_a_failing_link_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "bad.o").write_bytes(b"not an object")
    with pytest.raises(UserError, match="cannot link lib.so with") as error:
        linker.require_linker().link(tmp_path / "lib.so", [tmp_path / "bad.o"])
    assert "bad.o" in one_line(error)


@pytest.mark.parametrize(
    ("triple", "arch", "system"),
    [
        ("x86_64-unknown-linux-gnu", "x86_64", "linux"),
        ("aarch64-linux-gnu", "arm64", "linux"),
        ("arm64-apple-macos13.0", "arm64", "macos"),
        ("x86_64-apple-darwin22", "x86_64", "macos"),
        ("wasm32-unknown-unknown-wasm", "wasm32", "other"),
    ],
)
def test_platform_of(triple: str, arch: str, system: str) -> None:
    assert linker.platform_of(triple) == linker.Platform(arch, system)


# --- cuda ---


@needs_cuda
@needs_sass
def test_cuda_fatbin_has_tensor_cores_on_every_architecture(tmp_path: Path) -> None:
    before = dict(os.environ), tvm_ffi.get_global_func(cuda.CALLBACK)
    build(load_target("cuda"), tmp_path)
    library = (tmp_path / "lib.so").read_bytes()
    assert sorted(cuda.check(library)) == ["ptx_90", "sm_80", "sm_89", "sm_90"]
    found = {(kernel.arch, kernel.name): kernel for kernel in sass.kernels(library)}
    assert sorted(found) == [
        (arch, name) for arch in ("sm_80", "sm_89", "sm_90") for name in ("gemv_kernel", "matmul_kernel")
    ]
    for (arch, name), kernel in found.items():
        assert (kernel.counts["HMMA"] > 0) == (name == "matmul_kernel"), arch
        assert kernel.counts["LDG"] and not kernel.counts["LDL"] and not kernel.stack and kernel.registers, (
            arch,
            name,
        )
    assert dict(os.environ) == before[0]
    assert tvm_ffi.get_global_func(cuda.CALLBACK).same_as(before[1])


@needs_cuda
@needs_sass
@pytest.mark.parametrize("name", ["t4", "h200"])
def test_cuda_named_device(tmp_path: Path, name: str) -> None:
    target = load_target(name)
    build(target, tmp_path)
    library = (tmp_path / "lib.so").read_bytes()
    assert set(cuda.check(library)) == {target.archs[0], target.archs[0].replace("sm", "ptx")}
    assert {kernel.arch for kernel in sass.kernels(library)} == set(target.archs)


@needs_cuda
def test_cuda_one_cubin_in_two_threads_at_once(tmp_path: Path) -> None:
    """The hook is global to the process: each thread must still get its own architecture."""

    def one(arch: str) -> tuple[str, ...]:
        build(load_target("cuda"), tmp_path / arch, archs=[arch], ptx=False)
        return cuda.check((tmp_path / arch / "lib.so").read_bytes())

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(one, ("sm_80", "sm_90"))) == [("sm_80",), ("sm_90",)]
    assert [image.kind for image in images.cuda_images((tmp_path / "sm_90" / "lib.so").read_bytes())] == [
        "cubin"
    ]


@needs_cuda
def test_cuda_compile_errors_come_out_and_the_hook_goes(tmp_path: Path) -> None:
    before = tvm_ffi.get_global_func(cuda.CALLBACK)
    with cuda.compiling(load_target("h200")), pytest.raises(Exception, match="undefined_name"):
        tvm_ffi.get_global_func(cuda.CALLBACK)('extern "C" __global__ void f() { undefined_name(); }')
    assert tvm_ffi.get_global_func(cuda.CALLBACK).same_as(before)


def test_a_library_without_cubin_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="source, not compiled"):
        cuda.check(b'..extern "C" __global__ void kernel0(float* a)')
    build(load_target("cpu"), tmp_path)
    with pytest.raises(RuntimeError, match="no CUDA kernel"):
        cuda.check(next(tmp_path.glob("lib.*")).read_bytes())


@pytest.mark.heavy
@needs_cuda
@native_elf
@pytest.mark.skipif(cuda_runtime.driver() is not None, reason="there is a driver here")
def test_why_there_is_a_stub() -> None:
    """Without it TVM puts CUDA source into the library, in silence; with it, in either order with `import
    tvm`, a cubin.
    """
    script = (
        "import sys, tempfile; sys.path[:0] = sys.argv[2:]; from pathlib import Path\n"
        "from targets import load_target; from gpt2_tvm.toolchains import cuda, cuda_runtime\n"
        "if sys.argv[1] == 'first': cuda_runtime.load(allow_stub=True)\n"
        "import tvm, test_toolchains as t\n"
        "if sys.argv[1] == 'never': cuda.prepare = lambda target: None\n"
        "names = t.build(load_target('h200'), Path(tempfile.mkdtemp()))\n"
        "assert not tvm.cuda(0).exist; print('cubin')\n"
    )
    paths = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
    for order, wanted in (("first", "cubin"), ("after", "cubin"), ("never", "source, not compiled")):
        done = subprocess.run([sys.executable, "-c", script, order, *paths], capture_output=True, text=True)
        assert wanted in (done.stdout if wanted == "cubin" else done.stderr), done.stderr[-2000:]


@native_elf
@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm of binutils")
def test_the_stub_has_what_the_runtime_is_linked_with() -> None:
    library = Path(tvm.__file__).parent / "lib" / "libtvm_runtime_cuda.so"
    if not library.is_file():
        pytest.skip("this TVM has no CUDA runtime")
    symbols = subprocess.run(
        ["nm", "-D", "--undefined-only", library], capture_output=True, text=True, check=True
    ).stdout
    driver = set(re.findall(r"\bU (cu[A-Z]\w+)$", symbols, re.MULTILINE))
    assert driver <= set(cuda_runtime.DRIVER_FUNCTIONS)


@native_elf
def test_stub_is_built_once_and_whole_by_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with ThreadPoolExecutor(4) as pool:
        made = set(pool.map(lambda _: cuda_runtime.stub_driver(), range(4)))
    (library,) = made
    assert library.is_relative_to(tmp_path) and [path.name for path in library.parent.iterdir()] == [
        "libcuda.so.1"
    ]
    stamp = library.stat().st_mtime_ns
    assert cuda_runtime.stub_driver().stat().st_mtime_ns == stamp
    stub = ctypes.CDLL(str(library))
    assert {getattr(stub, name)() for name in cuda_runtime.DRIVER_FUNCTIONS} == {
        cuda_runtime.CUDA_ERROR_NO_DEVICE
    }
    assert not hasattr(stub, "cuDeviceGetAttribute")


def test_cache_folder_that_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert cuda_runtime.cache_folder() == tmp_path / f"gpt2-tvm-{os.getuid()}"


def test_toolkit_must_be_complete_and_of_cuda_13(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_toolkit, "_roots", lambda: [tmp_path])
    include = tmp_path / "include"
    for header in (*cuda_toolkit._HEADERS, "cccl/cuda/std/cstdint"):
        assert cuda_toolkit.find() is None
        (include / header).parent.mkdir(parents=True, exist_ok=True)
        (include / header).write_text("")
    (include / "cuda_runtime_api.h").write_text("#define CUDART_VERSION  12080\n")
    assert cuda_toolkit.find() is None
    (include / "cuda_runtime_api.h").write_text("#define CUDART_VERSION  13000\n")
    assert cuda_toolkit.find() == cuda_toolkit.Toolkit(tmp_path, (include / "cccl",), None)


def test_cuda_parts_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    h200, several = load_target("h200"), load_target("cuda")
    partial = cuda_toolkit.Toolkit(Path("there"), (), None)
    for name, value, target, wanted in (
        ("find", lambda: None, h200, "CUDA 13 headers: pip install"),
        ("nvrtc_installed", lambda: False, h200, "NVRTC"),
        ("find", lambda: partial, several, "fatbinary, to bundle sm_80, sm_89, sm_90"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(cuda_toolkit, "find", lambda: partial)
            patch.setattr(cuda_toolkit, "nvrtc_installed", lambda: True)
            patch.setattr(cuda_toolkit, name, value)
            with pytest.raises(UserError, match="cannot compile for") as error:
                toolchains.prepare(target)
            assert wanted in one_line(error) and "gpt2-tvm[cuda]" in one_line(error)


# --- images ---


def test_images_are_not_fooled() -> None:
    assert images.cuda_images(b"") == images.amd_images(b"") == []
    assert images.cuda_images(b"\x7fELF\x02\x01" * 9 + struct.pack("<I", 0xBA55ED50) * 9) == []
    header = bytearray(64)
    header[:6] = b"\x7fELF\x02\x01"
    struct.pack_into("<H", header, 18, 190)
    struct.pack_into("<QQ", header, 32, 0, 1 << 40)  # says that it is longer than the file
    struct.pack_into("<HHHH", header, 54, 56, 1, 64, 1)
    assert images.cuda_images(bytes(header)) == []


# --- metal ---


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("name", ["metal", "m2-ultra"])
def test_metal_source_type_checks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, dtype: str
) -> None:
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
    sizes = [eval(size) for size in re.findall(r"@workgroup_size(\([\d, ]+\))", source)]
    assert len(sizes) == 2 and all(
        np.prod(size) <= load_target("webgpu").limits.threads_per_block for size in sizes
    )


def test_webgpu_source_is_accepted_by_wgpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wgpu = pytest.importorskip("wgpu")
    monkeypatch.setenv("XDG_RUNTIME_DIR", os.environ.get("XDG_RUNTIME_DIR", str(tmp_path)))
    adapters = [adapter for adapter in wgpu.gpu.enumerate_adapters_sync() if "shader-f16" in adapter.features]
    if not adapters:
        pytest.skip("no adapter with float16 (on Linux without a GPU: apt install mesa-vulkan-drivers)")
    build(load_target("webgpu"), tmp_path)
    device = adapters[0].request_device_sync(required_features=["shader-f16"])
    for part in re.split(
        r"^(?=// Function: \w+\n//-)", (tmp_path / webgpu.KERNELS).read_text(), flags=re.MULTILINE
    ):
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
def test_rocm_mathematics_are_linked(tmp_path: Path) -> None:
    """A function of ocml is found (lld runs with --no-undefined), and TVM's own callbacks are back
    afterwards.
    """
    from tvm.s_tir import dlight

    name = "tvm_callback_rocm_bitcode_path"
    before = tvm_ffi.get_global_func(name)
    with toolchains.compiling(load_target("gfx942")) as target:
        a = te.placeholder((1024,), "float32", "a")
        function = te.create_prim_func([a, te.compute((1024,), lambda i: te.atan(a[i]) + te.cosh(a[i]), "b")])
        module = dlight.ApplyDefaultSchedule(dlight.gpu.Fallback())(tvm.IRModule({"main": function}))
        executable = tvm.compile(module, target)
    assert toolchains.export(executable, load_target("gfx942"), tmp_path) == ["lib.so"]
    assert tvm_ffi.get_global_func(name).same_as(before)


def test_rocm_bitcode_says_what_is_meant(tmp_path: Path) -> None:
    for name in (
        *(
            "ocml",
            "oclc_finite_only_off",
            "oclc_finite_only_on",
            "oclc_unsafe_math_off",
            "oclc_unsafe_math_on",
        ),
        *(
            "oclc_correctly_rounded_sqrt_on",
            "oclc_wavefrontsize64_on",
            "oclc_wavefrontsize64_off",
            "oclc_abi_version_500",
        ),
        *("oclc_isa_version_906", "oclc_isa_version_90a", "oclc_isa_version_940", "oclc_isa_version_1036"),
    ):
        (tmp_path / f"{name}.bc").write_bytes(b"")

    def names(target: str) -> set[str]:
        return {Path(path).stem for path in rocm.bitcode(load_target(target), tmp_path)}

    for target, isa, wave in (("gfx90a", "90a", "on"), ("gfx942", "940", "on"), ("gfx1100", "1036", "off")):
        assert f"oclc_isa_version_{isa}" in names(target) and f"oclc_wavefrontsize64_{wave}" in names(target)
        assert not {"oclc_finite_only_on", "oclc_unsafe_math_on"} & names(target)
        assert len(names(target)) == 7


def test_rocm_parts_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rocm, "device_libraries", lambda: Path("there"))
    monkeypatch.setattr(rocm, "find_lld", lambda: None)
    with pytest.raises(
        UserError, match="lld of LLVM 22 or later: apt install rocm-device-libs lld-22"
    ) as error:
        toolchains.prepare(load_target("gfx942"))
    one_line(error)


def test_an_old_lld_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def put(name: str, version: str) -> Path:
        path = tmp_path / name
        path.write_text(f"#!/bin/sh\necho '{version} (compatible with GNU linkers)'\n")
        path.chmod(0o755)
        return path

    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}/bin")
    monkeypatch.setenv("ROCM_PATH", str(tmp_path))
    monkeypatch.setattr(
        "shutil.which", lambda name: str(tmp_path / name) if (tmp_path / name).is_file() else None
    )
    put("ld.lld", "Debian LLD 14.0.6")
    assert rocm.find_lld() is None
    put("ld.lld", "LLD 23.1.0")
    assert rocm.find_lld() == tmp_path / "ld.lld"
    put("ld.lld-22", "Debian LLD 22.1.8")
    assert rocm.find_lld() == tmp_path / "ld.lld-22"


def test_llvm_major_is_that_of_the_installed_tvm() -> None:
    from tvm.target.codegen import llvm_version_major

    assert llvm_version_major() == rocm.LLVM_MAJOR


# --- tensor intrinsics ---


def test_light_stack_is_the_same_stack() -> None:
    def both() -> tuple[list[inspect.FrameInfo], list[inspect.FrameInfo]]:
        return inspect.stack(), _true_stack()

    _true_stack = inspect.stack
    with tensor_intrin.light_stack():
        assert inspect.stack is not _true_stack
        light, true = both()
    assert inspect.stack is _true_stack
    assert len(light) == len(true) > 10

    def seen(info: inspect.FrameInfo) -> tuple[object, ...]:
        return info.frame, info.lineno, info.function, info.code_context, info.index

    for ours, theirs in zip(light, true, strict=True):
        assert seen(ours) == seen(theirs), ours.filename


def test_light_stack_goes_when_an_import_fails_and_serves_threads() -> None:
    true_stack = inspect.stack
    with pytest.raises(ZeroDivisionError), tensor_intrin.light_stack():
        1 / 0  # noqa: B018
    assert inspect.stack is true_stack

    def enter() -> None:
        for _ in range(50):
            with tensor_intrin.light_stack():
                inspect.stack()

    threads = [threading.Thread(target=enter) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert inspect.stack is true_stack


@pytest.mark.parametrize("kind", ["cuda", "metal"])
def test_intrinsics_are_registered(kind: str) -> None:
    tensor_intrin.load(kind)
    module = sys.modules[f"tvm.s_tir.tensor_intrin.{kind}"]
    options = {"dtype": "float16", "trans_a": False, "trans_b": True}
    if kind == "metal":
        group = module.get_simdgroup_intrin_group("shared", "shared", **options)
    else:
        options["in_dtype"] = options.pop("dtype")
        group = module.get_wmma_intrin_group("shared.dyn", "shared.dyn", out_dtype="float32", **options)
    for name in group.values():
        assert tvm.s_tir.TensorIntrin.get(name).impl is not None


@pytest.mark.heavy
def test_intrinsics_load_fast() -> None:
    """With torch loaded, as in a process that converts a checkpoint: 2 s here, 20 s and more without `light_stack`."""
    code = (
        "import time, torch, tvm; from gpt2_tvm.toolchains import tensor_intrin; start = time.perf_counter()\n"
        "tensor_intrin.load('metal'); print(time.perf_counter() - start)"
    )
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=True)
    assert float(done.stdout) < 10
