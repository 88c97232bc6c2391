"""Metal: MSL source that macOS compiles when it loads the library, in objects for Apple silicon.

No compiler of Apple's is needed here: the objects come from LLVM, and linking them is all that is left to do
on the Mac (`lib.tar`), or is done here by ziglang, whose linker also signs the library as macOS asks
(`lib.dylib`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpt2_tvm.toolchains import cpu, linker, modules, tensor_intrin

if TYPE_CHECKING:
    from targets import DeviceTarget


def missing(target: DeviceTarget) -> str | None:
    """See `gpt2_tvm.toolchains.missing`: nothing ever is."""
    return None


def prepare(target: DeviceTarget) -> None:
    """See `gpt2_tvm.toolchains.prepare`."""
    tensor_intrin.load("metal")


@contextmanager
def compiling(target: DeviceTarget) -> Iterator[Any]:
    """See `gpt2_tvm.toolchains.compiling`."""
    prepare(target)
    device = target.tvm_target()
    with device:
        yield device


def export(executable: Any, target: DeviceTarget, folder: Path) -> list[str]:
    """See `gpt2_tvm.toolchains.export`: `lib.tar`, and before it `lib.dylib` if this machine can link it."""
    if "kernel void" not in modules.sources(executable, "metal"):
        raise RuntimeError("the executable holds no Metal kernel: was it built for another target?")
    names = []
    if command := linker.find_linker(cpu.platform(target)):
        library = folder / "lib.dylib"
        executable.export_library(str(library), fcompile=linker.fcompile(command))
        if b"kernel void" not in library.read_bytes():
            raise RuntimeError("lib.dylib lost its Metal kernels in linking")
        names.append(library.name)
    return [*names, cpu.pack(executable, folder)]
