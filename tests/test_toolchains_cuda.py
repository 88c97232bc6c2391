"""CUDA without a GPU: the driver's stub, cubins and fat binaries, and the machine code inside them."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import tvm
import tvm_ffi
from checkers import sass
from checkers.build import build

from gpt2_tvm import toolchains
from gpt2_tvm.errors import UserError
from gpt2_tvm.toolchains import cuda, cuda_runtime, cuda_toolkit, images
from targets import load_target

needs_cuda = pytest.mark.skipif(
    cuda.missing(load_target("cuda")) is not None,
    reason="needs the CUDA compiler: pip install 'gpt2-tvm[cuda]'",
)
needs_sass = pytest.mark.skipif(sass.tool() is None, reason=f"needs {sass.PACKAGES} from PyPI")
native_elf = pytest.mark.skipif(sys.platform != "linux", reason="the driver's stub is for Linux")


def one_line(error: pytest.ExceptionInfo[UserError]) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


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
    assert [image.kind for image in images.cuda_images((tmp_path / "sm_90" / "lib.so").read_bytes())] == ["cubin"]


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
    """Without it the library holds CUDA source; with it, before or after `import tvm`, a cubin."""
    script = (
        "import sys, tempfile; sys.path[:0] = sys.argv[2:]; from pathlib import Path\n"
        "from targets import load_target; from gpt2_tvm.toolchains import cuda, cuda_runtime\n"
        "if sys.argv[1] == 'first': cuda_runtime.load(allow_stub=True)\n"
        "import tvm; from checkers import build as t; from gpt2_tvm.toolchains import tensor_intrin\n"
        "if sys.argv[1] == 'never': cuda.prepare = lambda target: tensor_intrin.load('cuda')\n"
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
    assert library.is_relative_to(tmp_path) and [path.name for path in library.parent.iterdir()] == ["libcuda.so.1"]
    stamp = library.stat().st_mtime_ns
    assert cuda_runtime.stub_driver().stat().st_mtime_ns == stamp
    stub = ctypes.CDLL(str(library))
    assert {getattr(stub, name)() for name in cuda_runtime.DRIVER_FUNCTIONS} == {cuda_runtime.CUDA_ERROR_NO_DEVICE}
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
    with monkeypatch.context() as patch:  # several architectures asked for by argument
        patch.setattr(cuda_toolkit, "find", lambda: partial)
        patch.setattr(cuda_toolkit, "nvrtc_installed", lambda: True)
        with pytest.raises(UserError, match="fatbinary"), cuda.compiling(h200, archs=["sm_80", "sm_90"]):
            pass
