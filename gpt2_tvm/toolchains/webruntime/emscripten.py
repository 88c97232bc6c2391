"""emcc: the compiler and linker for WebAssembly."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from gpt2_tvm.errors import UserError

HOW_TO_GET_IT = (
    "install emscripten (Debian, Ubuntu: sudo apt-get install emscripten; macOS: brew install emscripten; "
    "else the emsdk of emscripten.org) and put emcc on PATH"
)
DEBIAN_NODE_MODULES = Path("/usr/share/nodejs")  # acorn, which Debian's emcc asks a node that is not Debian's for


@dataclass(frozen=True)
class Emscripten:
    """emcc: its path and version."""

    emcc: str
    version: str

    def run(self, arguments: Sequence[str], what: str) -> None:
        """Call emcc; UserError with its first error line where it fails. what: for that line."""
        environment = dict(os.environ)
        if DEBIAN_NODE_MODULES.is_dir():
            environment.setdefault("NODE_PATH", str(DEBIAN_NODE_MODULES))
        done = subprocess.run(
            [self.emcc, *arguments], capture_output=True, text=True, env=environment, stdin=subprocess.DEVNULL
        )
        if done.returncode != 0:
            lines = [line.strip() for line in done.stderr.splitlines() if line.strip()] or ["no message"]
            first = next((line for line in lines if re.search(r"\berror\b", line)), lines[0])
            raise UserError(f"emcc {self.version} cannot {what}: {first}")


@cache
def _at(path: str) -> Emscripten | None:
    try:
        said = subprocess.run([path, "--version"], capture_output=True, text=True, stdin=subprocess.DEVNULL).stdout
    except OSError:
        return None
    version = re.search(r"\b(\d+\.\d+\.\d+)", said)
    return Emscripten(path, version[1] if version else "unknown")


def find() -> Emscripten | None:
    """The emcc that EMCC or PATH names, or None."""
    path = shutil.which(os.environ.get("EMCC") or "emcc")
    return _at(path) if path else None


def require() -> Emscripten:
    """`find`, or a UserError that says how to get it."""
    found = find()
    if found is None:
        raise UserError(f"emcc is missing: {HOW_TO_GET_IT}")
    return found
