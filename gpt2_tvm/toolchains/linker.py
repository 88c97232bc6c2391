"""Linking LLVM's objects into a shared library: with the system's compiler, or ziglang from PyPI.

ziglang links for any platform: it stands in where there is no compiler, and links for other machines.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from gpt2_tvm.errors import UserError

# In the order of trying. A C compiler is enough: LLVM's objects need no C++ library.
COMPILERS = ("c++", "g++", "clang++", "cc", "gcc", "clang")
HOW_TO_GET_ONE = "install a C++ compiler (`apt install g++`, `xcode-select --install`) or `pip install ziglang`"
# The oldest glibc and macOS that a library linked by zig runs on; manylinux2014 has this glibc.
_ZIG_SYSTEMS = {"linux": "linux-gnu.2.17", "macos": "macos.13.0"}


@dataclass(frozen=True)
class Platform:
    """A processor architecture ("x86_64", "arm64") and an operating system ("linux", "macos", "other")."""

    arch: str
    system: str

    @property
    def library_suffix(self) -> str:
        """ ".so" or, on macOS, ".dylib"."""
        return ".dylib" if self.system == "macos" else ".so"


@dataclass(frozen=True)
class Linker:
    """A command that links shared libraries for one platform."""

    command: tuple[str, ...]
    platform: Platform

    def link(self, output: str | Path, objects: Sequence[str | Path]) -> None:
        """Link `objects` into the shared library `output`.

        Raises:
            UserError: the linker refused; the line carries its first error.
        """
        command = [*self.command, "-shared", "-fPIC", "-o", str(output), *map(str, objects)]
        if self.platform.system == "macos":
            # TVM's runtime is already in the process that loads the library: its symbols are found then.
            command += ["-Wl,-undefined,dynamic_lookup"]
        else:
            command += ["-lm"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            lines = (done.stderr or done.stdout).strip().splitlines() or [f"exit status {done.returncode}"]
            first = next((line for line in lines if "error" in line.lower()), lines[0])
            raise UserError(f"cannot link {Path(output).name} with {shlex.join(self.command)}: {first}")


def platform_of(triple: str) -> Platform:
    """The platform that an LLVM triple such as "arm64-apple-macos13.0" names."""
    arch, _, rest = triple.partition("-")
    arch = {"aarch64": "arm64", "amd64": "x86_64"}.get(arch, arch)
    system = "macos" if "apple" in rest or "darwin" in rest else "linux" if "linux" in rest else "other"
    return Platform(arch, system)


def this_platform() -> Platform:
    """The platform that this Python runs on."""
    machine = platform.machine().lower()
    arch = {"aarch64": "arm64", "amd64": "x86_64"}.get(machine, machine)
    return Platform(arch, {"Linux": "linux", "Darwin": "macos"}.get(platform.system(), "other"))


def system_compiler() -> str | None:
    """The path of the C or C++ compiler that CXX, CC or PATH names, or None."""
    for name in (os.environ.get("CXX"), os.environ.get("CC"), *COMPILERS):
        if name and (path := shutil.which(name)):
            return path
    return None


def zig() -> tuple[str, ...] | None:
    """The command that runs zig from the PyPI package ziglang, or None where it is not installed."""
    return (sys.executable, "-m", "ziglang") if importlib.util.find_spec("ziglang") else None


def find_linker(target: Platform | None = None) -> Linker | None:
    """A linker for `target` (default: this machine), or None. For this machine, the system's comes first."""
    wanted = target or this_platform()
    if wanted == this_platform() and (compiler := system_compiler()):
        return Linker((compiler,), wanted)
    command = zig()
    if command is None or wanted.system not in _ZIG_SYSTEMS:
        return None
    arch = {"arm64": "aarch64"}.get(wanted.arch, wanted.arch)
    return Linker((*command, "cc", "-target", f"{arch}-{_ZIG_SYSTEMS[wanted.system]}"), wanted)


def require_linker(target: Platform | None = None) -> Linker:
    """`find_linker`, or a UserError that says how to get one."""
    linker = find_linker(target)
    if linker is None:
        wanted = target or this_platform()
        raise UserError(f"nothing here links for {wanted.system} on {wanted.arch}: {HOW_TO_GET_ONE}")
    return linker


def fcompile(linker: Linker) -> Callable[..., None]:
    """`linker` as the `fcompile` argument of TVM's `export_library`."""

    def link(output: str, objects: Sequence[str], options: Sequence[str] | None = None, **_: object) -> None:
        linker.link(output, objects)

    link.object_format = "o"  # type: ignore[attr-defined]  # export_library reads it: write objects, not bitcode
    return link


def pack_objects(output: str, objects: Sequence[str], **_: object) -> None:
    """An `fcompile` that links nothing: a tar of the objects, which TVM links where it loads it.

    Owners and times are left out, so the same objects give the same bytes.
    """
    with tarfile.open(output, "w") as archive:
        for path in sorted(objects, key=lambda name: Path(name).name):
            member = archive.gettarinfo(path, arcname=Path(path).name)
            member.mtime, member.uid, member.gid, member.uname, member.gname, member.mode = (
                0,
                0,
                0,
                "",
                "",
                0o644,
            )
            with Path(path).open("rb") as file:
                archive.addfile(member, file)


pack_objects.object_format = "o"  # type: ignore[attr-defined]
