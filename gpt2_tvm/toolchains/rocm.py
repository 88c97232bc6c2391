"""ROCm: AMD code objects, made by the LLVM inside TVM with AMD's device libraries and linked by lld.

Neither the ROCm stack nor an AMD card is needed to compile. To run, TVM must be built with USE_ROCM: the
apache-tvm wheel is not.
"""

from __future__ import annotations

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
HOW_TO_GET_IT = f"apt install rocm-device-libs lld-{LLVM_MAJOR}, or install ROCm and set ROCM_PATH"
_BITCODE_FOLDERS = ("amdgcn/bitcode", "lib/amdgcn/bitcode")


def device_libraries() -> Path | None:
    """The folder of AMD's device libraries (ocml.bc and others) under ROCM_PATH, /opt/rocm, or where Debian
    and Ubuntu put them.
    """
    roots = [
        os.environ.get("ROCM_PATH"),
        "/opt/rocm",
        "/usr/lib/x86_64-linux-gnu",
        "/usr/lib/aarch64-linux-gnu",
        "/usr/lib",
    ]
    folders = (Path(root, folder) for root in roots if root for folder in _BITCODE_FOLDERS)
    return next((folder for folder in folders if (folder / "ocml.bc").is_file()), None)


def find_lld() -> Path | None:
    """An `ld.lld` of LLVM 22 or later: on PATH by its versioned or plain name, or ROCm's own."""
    rocm = Path(os.environ.get("ROCM_PATH") or "/opt/rocm", "llvm", "bin", "ld.lld")
    for name in (f"ld.lld-{LLVM_MAJOR}", "ld.lld", str(rocm)):
        path = shutil.which(name)
        if path and _lld_version(path) >= LLVM_MAJOR:
            return Path(path)
    return None


def bitcode(target: DeviceTarget, folder: Path) -> list[str]:
    """The device libraries to link for `target`: the mathematics, and the constants that say what it may
    assume.

    TVM's own list holds each switch both ways (`finite_only_on` and `_off`), for one wave size, and leaves
    the choice to the order of linking. This one says what is meant: IEEE results, the target's wave size and,
    where there is a file, its ISA.
    """
    wave64 = "on" if target.tvm.get("thread_warp_size", 64) == 64 else "off"
    names = [
        "ocml",
        "oclc_daz_opt_off",  # gone from newer ROCm, which decides it by a function attribute
        "oclc_finite_only_off",
        "oclc_unsafe_math_off",
        "oclc_correctly_rounded_sqrt_on",
        f"oclc_wavefrontsize64_{wave64}",
        _isa_file(str(target.tvm["mcpu"]), folder),
        "oclc_abi_version_500",
    ]
    return [str(path) for name in names if (path := folder / f"{name}.bc").is_file()]


def missing(target: DeviceTarget) -> str | None:
    """See `gpt2_tvm.toolchains.missing`."""
    if linker.find_linker() is None:
        return f"a C++ compiler to link with: {linker.HOW_TO_GET_ONE}"
    if device_libraries() is None:
        return f"AMD's device libraries: {HOW_TO_GET_IT}"
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
    device = target.tvm_target()
    folder, lld = device_libraries(), find_lld()
    assert folder is not None and lld is not None  # prepare has seen them
    ours: dict[str, Callable[..., Any]] = {
        "tvm_callback_rocm_bitcode_path": lambda *_: bitcode(target, folder),
        "tvm_callback_rocm_link": lambda relocatable, *_: _link(lld, bytes(relocatable)),
    }
    with callbacks.replaced(ours), device:
        yield device


def export(executable: Any, target: DeviceTarget, folder: Path) -> list[str]:
    """See `gpt2_tvm.toolchains.export`: `lib.so`, which must hold a code object for the target's
    architecture.
    """
    library = folder / "lib.so"
    executable.export_library(str(library), fcompile=linker.fcompile(linker.require_linker()))
    archs = {arch for image in images.amd_images(library.read_bytes()) for arch in image.archs}
    if target.tvm["mcpu"] not in archs:
        there = ", ".join(sorted(archs)) or "no AMD GPU"
        raise RuntimeError(f"lib.so carries code for {there}, not for {target.tvm['mcpu']}")
    return [library.name]


def _isa_file(mcpu: str, folder: Path) -> str:
    """The name of the ISA's file: its own or, for a GPU newer than these libraries, the newest one that is
    not newer than it.
    """

    def version(isa: str) -> tuple[int, int]:
        # "90a" and "1100": the last two digits are minor version and stepping, in hexadecimal
        return int(isa[:-2]), int(isa[-2:], 16)

    own = mcpu.removeprefix("gfx")
    there = [path.stem.removeprefix("oclc_isa_version_") for path in folder.glob("oclc_isa_version_*.bc")]
    not_newer = [isa for isa in there if version(isa) <= version(own)]
    return f"oclc_isa_version_{max(not_newer, key=version, default=own)}"


def _link(lld: Path, relocatable: bytes) -> bytes:
    with tempfile.TemporaryDirectory() as scratch:
        source, output = Path(scratch, "kernels.o"), Path(scratch, "kernels.hsaco")
        source.write_bytes(relocatable)
        # --no-undefined: a function that no device library has would otherwise fail only when the GPU loads
        # the code
        command = [str(lld), "--no-undefined", "-shared", str(source), "-o", str(output)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{lld.name} failed: {(done.stderr or done.stdout).strip()}")
        return output.read_bytes()


def _lld_version(path: str) -> int:
    try:
        text = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=10).stdout
    except (OSError, subprocess.TimeoutExpired):
        return 0
    version = re.search(r"LLD (\d+)", text)
    return int(version.group(1)) if version else 0
