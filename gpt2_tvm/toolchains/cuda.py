"""CUDA: cubins made by NVRTC in this process, and one fat binary of them for several architectures.

TVM hands its CUDA source to the function registered as `tvm_callback_cuda_compile`. Ours compiles it once an
architecture, all at the same time (NVRTC leaves Python's lock), and lets `fatbinary` put the images together,
PTX for later architectures among them. Against nvcc with the same `-gencode` flags, on 2 cores and the
kernels of four GPT-2 linear layers: 2.5 s and 4.0 s; and no host compiler is asked for.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpt2_tvm.errors import UserError
from gpt2_tvm.toolchains import callbacks, cuda_runtime, cuda_toolkit, images, linker, tensor_intrin

if TYPE_CHECKING:
    from targets import DeviceTarget

CALLBACK = "tvm_callback_cuda_compile"
_environment = threading.Lock()


def missing(target: DeviceTarget) -> str | None:
    """See `gpt2_tvm.toolchains.missing`."""
    if linker.find_linker() is None:
        return f"a C++ compiler to link with: {linker.HOW_TO_GET_ONE}"
    toolkit = cuda_toolkit.find()
    if toolkit is None:
        return f"CUDA {cuda_toolkit.MAJOR} headers: {cuda_toolkit.HOW_TO_GET_IT}"
    if not cuda_toolkit.nvrtc_installed():
        return "NVRTC's Python bindings: pip install 'gpt2-tvm[cuda]'"
    if len(target.archs) > 1 and toolkit.fatbinary is None:
        return f"fatbinary, to bundle {', '.join(target.archs)}: {cuda_toolkit.HOW_TO_GET_IT}"
    return None


def prepare(target: DeviceTarget) -> None:
    """See `gpt2_tvm.toolchains.prepare`."""
    if what := missing(target):
        raise UserError(f"cannot compile for {target.name}: it needs {what}")
    if not cuda_runtime.load(allow_stub=True):
        raise UserError(
            f"cannot compile for {target.name}: TVM's CUDA runtime does not load, it needs "
            f"libcudart.so.{cuda_toolkit.MAJOR}: {cuda_toolkit.HOW_TO_GET_IT}"
        )
    tensor_intrin.load("cuda")


@contextmanager
def compiling(target: DeviceTarget, archs: Sequence[str] | None = None, ptx: bool = True) -> Iterator[Any]:
    """Build cubins for `archs` inside this context; yields the `tvm.target.Target` to build with.

    Args:
        archs: architectures such as ("sm_80", "sm_90"), default `target.archs`.
        ptx: also carry PTX of the last one, which drivers compile for GPUs that came later. Without
            `fatbinary` (one architecture and NVRTC alone) there is nothing to put it into, and the library
            carries the cubin only.

    Raises:
        UserError: a compiler part is missing.
    """
    wanted = tuple(archs or target.archs)
    prepare(replace(target, archs=wanted))
    toolkit = cuda_toolkit.find()
    assert toolkit is not None  # prepare has seen it
    ptx = ptx and not wanted[-1][-1].isalpha()  # code for sm_90a is for nothing later
    bundle = toolkit.fatbinary is not None and (ptx or len(wanted) > 1)
    device = target.tvm_target()

    def compile_source(code: str, *_: Any) -> bytes:
        jobs = [*((arch, "cubin") for arch in wanted), *([(wanted[-1], "ptx")] if bundle and ptx else [])]
        with _cuda_path(toolkit.root), ThreadPoolExecutor(min(len(jobs), os.cpu_count() or 1)) as pool:
            results = list(pool.map(lambda job: _nvrtc(code, job[0], job[1], toolkit), jobs))
        return _fatbin(toolkit, jobs, results) if bundle else results[0]

    with callbacks.replaced({CALLBACK: compile_source}), device:
        yield device


def export(executable: Any, target: DeviceTarget, folder: Path) -> list[str]:
    """See `gpt2_tvm.toolchains.export`: `lib.so`, which must hold a cubin (`check`)."""
    library = folder / "lib.so"
    executable.export_library(str(library), fcompile=linker.fcompile(linker.require_linker()))
    check(library.read_bytes())
    return [library.name]


def check(library: bytes) -> tuple[str, ...]:
    """The architectures that an exported CUDA library carries code for, such as ("sm_80", "sm_90", "ptx_90").

    Raises:
        RuntimeError: it carries none, or source.
    """
    found = images.cuda_images(library)
    archs = tuple(dict.fromkeys(arch for image in found for arch in image.archs))
    if images.cuda_source_left(library):
        raise RuntimeError(
            "the library carries CUDA source, not compiled code: build inside `toolchains.compiling(target)`"
        )
    if not any(arch.startswith("sm_") for arch in archs):
        raise RuntimeError("the library carries no CUDA kernel: was it built for another target?")
    return archs


def _nvrtc(code: str, arch: str, form: str, toolkit: cuda_toolkit.Toolkit) -> bytes:
    from tvm.support import nvcc

    options = [f"-I{folder}" for folder in toolkit.includes]
    made = nvcc.compile_cuda(code, target_format=form, arch=arch, options=options, compiler="nvrtc")
    return bytes(made).rstrip(b"\0") if form == "ptx" else bytes(made)


def _fatbin(toolkit: cuda_toolkit.Toolkit, jobs: Sequence[tuple[str, str]], made: Sequence[bytes]) -> bytes:
    """One fat binary of the images `made` by `jobs` (architecture, form)."""
    assert toolkit.fatbinary is not None
    with tempfile.TemporaryDirectory() as scratch:
        output = Path(scratch, "kernels.fatbin")
        command = [str(toolkit.fatbinary), f"--create={output}", "-64"]
        for (arch, form), image in zip(jobs, made, strict=True):
            path = Path(scratch, f"{arch}.{form}")
            path.write_bytes(image)
            kind = "elf" if form == "cubin" else "ptx"
            command.append(f"--image3=kind={kind},sm={arch.removeprefix('sm_')},file={path}")
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"fatbinary failed: {(done.stderr or done.stdout).strip()}")
        return output.read_bytes()


@contextmanager
def _cuda_path(root: Path) -> Iterator[None]:
    """Name the toolkit's place where TVM looks for it at each call: in the environment, for as long."""
    with _environment:
        before = os.environ.get("CUDA_PATH")
        os.environ["CUDA_PATH"] = str(root)
        try:
            yield
        finally:
            if before is None:
                del os.environ["CUDA_PATH"]
            else:
                os.environ["CUDA_PATH"] = before
