"""CPUs: a shared library or, where nothing here can link for the target, a tar of its objects."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpt2_tvm.errors import UserError
from gpt2_tvm.toolchains import linker

if TYPE_CHECKING:
    from targets import DeviceTarget


def platform(target: DeviceTarget) -> linker.Platform:
    """The platform that the machine code of `target` (for a GPU: of its host) is for."""
    triple = target.host_triple()
    return linker.platform_of(triple) if triple else linker.this_platform()


def missing(target: DeviceTarget) -> str | None:
    """See `gpt2_tvm.toolchains.missing`: nothing for another platform, whose objects can stay unlinked."""
    if platform(target) == linker.this_platform() and linker.find_linker() is None:
        return f"a C++ compiler to link with: {linker.HOW_TO_GET_ONE}"
    return None


def prepare(target: DeviceTarget) -> None:
    """See `gpt2_tvm.toolchains.prepare`."""
    if what := missing(target):
        raise UserError(f"cannot compile for {target.name}: it needs {what}")


@contextmanager
def compiling(target: DeviceTarget) -> Iterator[Any]:
    """See `gpt2_tvm.toolchains.compiling`: LLVM is inside TVM, so nothing is hooked in."""
    prepare(target)
    device = target.tvm_target()
    with device:
        yield device


def export(executable: Any, target: DeviceTarget, folder: Path) -> list[str]:
    """See `gpt2_tvm.toolchains.export`: `lib.so`, `lib.dylib` for macOS, `lib.tar` if nothing here links.

    `tvm.runtime.load_module` takes either; it links the tar where it loads it, with that machine's compiler.
    """
    where = platform(target)
    command = linker.find_linker(where)
    if command is None or target.export == "tar":
        return [pack(executable, folder)]
    library = folder / f"lib{where.library_suffix}"
    executable.export_library(str(library), fcompile=linker.fcompile(command))
    return [library.name]


def pack(executable: Any, folder: Path) -> str:
    """Write `lib.tar`, the objects of `executable`, into `folder` and return its name."""
    library = folder / "lib.tar"
    executable.export_library(str(library), fcompile=linker.pack_objects)
    return library.name
