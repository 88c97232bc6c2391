"""ROCm: AMD code objects, made by the LLVM inside TVM and linked by lld. No part of ROCm is needed to
compile, nor an AMD card.

TVM's own callbacks want AMD's device libraries (ocml and others) and link them in. They are left out here:
TVM 0.27 lowers mathematics for AMD to LLVM's intrinsics and calls no function of theirs, with or without them
the code is the same, and lld, told to leave nothing undefined, would say if that changed.

To run, TVM must be built with USE_ROCM: the apache-tvm wheel is not.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpt2_tvm.errors import UserError
from gpt2_tvm.toolchains import callbacks, images, linker

if TYPE_CHECKING:
    from targets import DeviceTarget

# The LLVM inside apache-tvm 0.27. An older lld refuses the objects that it writes.
LLVM_MAJOR = 22
HOW_TO_GET_IT = (
    f"apt install lld-{LLVM_MAJOR}, or pip install 'ziglang>=0.17', or install a ROCm that has it and set ROCM_PATH"
)


def find_lld() -> tuple[str, ...] | None:
    """The command of an `ld.lld` of LLVM 22 or later: one on PATH, ROCm's own, or ziglang's."""
    rocm = Path(os.environ.get("ROCM_PATH") or "/opt/rocm", "llvm", "bin", "ld.lld")
    paths = (shutil.which(name) for name in (f"ld.lld-{LLVM_MAJOR}", "ld.lld", str(rocm)))
    commands: list[tuple[str, ...]] = [(path,) for path in paths if path]
    if zig := linker.zig():
        commands.append((*zig, "ld.lld"))
    return next((command for command in commands if _lld_version(command) >= LLVM_MAJOR), None)


def missing(target: DeviceTarget) -> str | None:
    """See `gpt2_tvm.toolchains.missing`."""
    if linker.find_linker() is None:
        return f"a C++ compiler to link with: {linker.HOW_TO_GET_ONE}"
    if find_lld() is None:
        return f"lld of LLVM {LLVM_MAJOR} or later: {HOW_TO_GET_IT}"
    return None


def prepare(target: DeviceTarget) -> None:
    """See `gpt2_tvm.toolchains.prepare`."""
    if what := missing(target):
        raise UserError(f"cannot compile for {target.name}: it needs {what}")


@contextmanager
def compiling(target: DeviceTarget) -> Iterator[Any]:
    """See `gpt2_tvm.toolchains.compiling`."""
    prepare(target)
    device, lld = target.tvm_target(), find_lld()
    assert lld is not None  # prepare has seen it
    ours: dict[str, Callable[..., Any]] = {
        "tvm_callback_rocm_bitcode_path": lambda *_: [],
        "tvm_callback_rocm_link": lambda relocatable, *_: _link(lld, bytes(relocatable)),
    }
    with callbacks.replaced(ours), device:
        yield device


def export(executable: Any, target: DeviceTarget, folder: Path) -> list[str]:
    """See `gpt2_tvm.toolchains.export`: `lib.so`, which must hold a code object for the target."""
    library = folder / "lib.so"
    executable.export_library(str(library), fcompile=linker.fcompile(linker.require_linker()))
    archs = {arch for image in images.amd_images(library.read_bytes()) for arch in image.archs}
    if target.tvm["mcpu"] not in archs:
        there = ", ".join(sorted(archs)) or "no AMD GPU"
        raise RuntimeError(f"lib.so carries code for {there}, not for {target.tvm['mcpu']}")
    return [library.name]


def _link(lld: tuple[str, ...], relocatable: bytes) -> bytes:
    with tempfile.TemporaryDirectory() as scratch:
        source, output = Path(scratch, "kernels.o"), Path(scratch, "kernels.hsaco")
        source.write_bytes(relocatable)
        # --no-undefined: a missing function would otherwise be found only by the GPU's loader
        done = subprocess.run(
            [*lld, "--no-undefined", "-shared", str(source), "-o", str(output)], capture_output=True, text=True
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(lld)} failed: {(done.stderr or done.stdout).strip()}")
        return output.read_bytes()


@functools.cache
def _lld_version(command: tuple[str, ...]) -> int:
    """The major version of an lld, 0 if it does not run."""
    try:
        text = subprocess.run([*command, "--version"], capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.TimeoutExpired):
        return 0
    version = re.search(r"LLD (\d+)", text)
    return int(version.group(1)) if version else 0
