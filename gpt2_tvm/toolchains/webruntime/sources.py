"""The source tree of the web runtime, put together in one folder."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from importlib import metadata, resources
from pathlib import Path

from gpt2_tvm.errors import UserError
from gpt2_tvm.toolchains.webruntime.patches import PATCHES, Patch

TVM_SOURCE_DIR = "TVM_SOURCE_DIR"
# Compiled each to an object; the first takes all of TVM's runtime in.
UNITS = ("web/emcc/wasm_runtime.cc", "web/emcc/tvmjs_support.cc", "web/emcc/webgpu_runtime.cc")
INCLUDES = (
    ".",
    "include",
    "3rdparty/tvm-ffi/include",
    "3rdparty/tvm-ffi/3rdparty/dlpack/include",
    "3rdparty/compiler-rt",
)
MISSING_HEADERS = (
    "include/tvm/support/io.h",
    "include/tvm/support/serializer.h",
    "include/tvm/support/cuda/nvtx.h",
    "src/support/arena.h",
    "src/support/base64.h",
    "src/support/bytes_io.h",
    "src/support/ring_buffer.h",
    "src/support/utils.h",
    "3rdparty/compiler-rt/builtin_fp16.h",
)


def package_folder(package: str, module: str) -> Path:
    """Where an installed package's module lies, without importing it. UserError where it is not installed."""
    try:
        distribution = metadata.distribution(package)
    except metadata.PackageNotFoundError:
        raise UserError(f"{package} is not installed; install it with: pip install {package}") from None
    return Path(str(distribution.locate_file(module)))


def header_folders() -> tuple[Path, ...]:
    """Where the headers that the packages lack are looked for, first match wins: TVM_SOURCE_DIR, then ours.

    UserError where TVM_SOURCE_DIR names something else than a TVM source tree.
    """
    ours = Path(str(resources.files(__package__))) / "headers"
    named = os.environ.get(TVM_SOURCE_DIR)
    if not named:
        return (ours,)
    tree = Path(named).expanduser()
    if not (tree / "include" / "tvm").is_dir():
        raise UserError(
            f"{TVM_SOURCE_DIR}={named} is no TVM source tree; unset it, or name the folder that has include/tvm"
        )
    return (tree, ours)


def headers() -> dict[str, Path]:
    """Each of `MISSING_HEADERS` and the file that stands in for it. UserError where there is none."""
    found: dict[str, Path] = {}
    for name in MISSING_HEADERS:
        files = [folder / name for folder in header_folders() if (folder / name).is_file()]
        if not files:
            raise UserError(f"{name} is missing from this installation of gpt2-tvm; install it again")
        found[name] = files[0]
    return found


def assemble(folder: Path, patches: Sequence[Patch] = PATCHES) -> None:
    """Fill `folder` with TVM's web and runtime sources, patched, tvm-ffi's, and the headers.

    UserError where a package carries no sources, or others than these patches are for.
    """
    tvm, ffi = package_folder("apache-tvm", "tvm"), package_folder("apache-tvm-ffi", "tvm_ffi")
    parts = {
        "web/emcc": tvm / "web" / "emcc",
        "src/runtime": tvm / "src" / "runtime",
        "include": tvm / "include",
        "3rdparty/tvm-ffi/include": ffi / "include",
        "3rdparty/tvm-ffi/src": ffi / "src",
        "3rdparty/tvm-ffi/3rdparty/dlpack": ffi / "3rdparty" / "dlpack",
    }
    for name, source in parts.items():
        if not source.is_dir():
            raise UserError(
                f"the installed packages carry no {name}, which the web runtime is built from; "
                "install apache-tvm and apache-tvm-ffi from PyPI"
            )
        shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name, file in headers().items():
        target = folder / name
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)
    for patch in patches:
        path = folder / patch.file
        try:
            path.write_text(patch.apply(path.read_text(encoding="utf-8")), encoding="utf-8")
        except ValueError as error:
            raise UserError(f"{error}: install apache-tvm {_pinned()}, for which this project is made") from None


def _pinned() -> str:
    wanted = [r for r in metadata.requires("gpt2-tvm") or [] if r.replace(" ", "").startswith("apache-tvm==")]
    return wanted[0].split("==", 1)[1].split(";")[0].strip() if wanted else "0.27"
