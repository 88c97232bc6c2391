"""The web runtime's objects: compiled once, kept in the user's cache folder."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

from gpt2_tvm.errors import UserError
from gpt2_tvm.toolchains.webruntime import emscripten, sources
from gpt2_tvm.toolchains.webruntime.patches import PATCHES, Patch

FLAGS = ("-O2", "-std=c++17", "-Wno-ignored-attributes", "-Wno-unused-command-line-argument")


def cache_folder() -> Path:
    """Where built runtimes are kept: gpt2-tvm/web-runtime in XDG_CACHE_HOME, or in ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME")
    root = Path(base) if base and Path(base).is_absolute() else Path.home() / ".cache"
    return root / "gpt2-tvm" / "web-runtime"


def runtime_objects(say: Callable[[str], None] | None = None, patches: Sequence[Patch] = PATCHES) -> list[Path]:
    """The objects that every model links with, built where they are not in the cache yet (about two minutes).

    say: told before a build begins. patches: what of `PATCHES` to apply. UserError where emcc is missing or fails, or
    the cache cannot be written.
    """
    compiler = emscripten.require()
    folder = cache_folder()
    wanted = {unit: folder / f"{Path(unit).stem}-{_key(unit, compiler, patches)}.o" for unit in sources.UNITS}
    missing = {unit: path for unit, path in wanted.items() if not path.is_file()}
    if missing:
        if say:
            say("building TVM's web runtime, once: about two minutes")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _compile(compiler, missing, patches, folder)
        except OSError as error:
            raise UserError(
                f"cannot write to {folder}: {error.strerror}; set XDG_CACHE_HOME to another folder"
            ) from error
    return list(wanted.values())


def _compile(compiler: emscripten.Emscripten, units: dict[str, Path], patches: Sequence[Patch], folder: Path) -> None:
    with tempfile.TemporaryDirectory(prefix=".build-", dir=folder) as name:
        tree = Path(name)
        sources.assemble(tree, patches)
        includes = [f"-I{tree / part}" for part in sources.INCLUDES]

        def compile_one(unit: str) -> None:
            made = tree / f"{Path(unit).stem}.o"
            compiler.run([*FLAGS, *includes, "-c", str(tree / unit), "-o", str(made)], f"compile {Path(unit).name}")
            made.replace(units[unit])  # renamed, so that nobody finds half an object

        with ThreadPoolExecutor(max(1, min(len(units), os.cpu_count() or 1))) as pool:
            list(pool.map(compile_one, units))


def _key(unit: str, compiler: emscripten.Emscripten, patches: Sequence[Patch]) -> str:
    """What an object depends on, as 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for part in (
        version("apache-tvm"),
        version("apache-tvm-ffi"),
        compiler.version,
        *FLAGS,
        *(text for p in patches if p.file == unit for text in (p.old, p.new)),
    ):
        digest.update(part.encode() + b"\0")
    for name, file in sorted(sources.headers().items()):
        digest.update(name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]


def clear() -> None:
    """Remove every runtime that was built."""
    shutil.rmtree(cache_folder(), ignore_errors=True)
