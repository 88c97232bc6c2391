"""The machine code in a CUDA library: instructions, registers and stack of each kernel.

Uses NVIDIA's cuobjdump (PyPI: nvidia-cuda-cuobjdump, nvidia-cuda-nvdisasm) on what is carved out of it.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from gpt2_tvm.toolchains import images

PACKAGES = "nvidia-cuda-cuobjdump and nvidia-cuda-nvdisasm"
_WIDE = r"\.E\.(?:[A-Z0-9.]*\.)?"
INSTRUCTIONS = {
    "HMMA": r"\bHMMA\.",  # float16 tensor cores, a warp at a time
    "HGMMA": r"\bHGMMA\.",  # Hopper's, a group of four warps
    "IMMA": r"\bIMMA\.",  # int8 tensor cores
    "LDSM": r"\bLDSM",  # matrices from shared memory
    "LDG": r"\bLDG\.",  # global loads, and those of 64 and 128 bits
    "LDG64": rf"\bLDG{_WIDE}64",
    "LDG128": rf"\bLDG{_WIDE}128",
    "LDGSTS": r"\bLDGSTS",  # asynchronous copies from global to shared memory
    "STG": r"\bSTG\.",
    "STG128": rf"\bSTG{_WIDE}128",
    "LDS128": r"\bLDS\.(?:[A-Z0-9.]*\.)?128",
    "UTMA": r"\bUTMA",  # Hopper's tensor memory accelerator
    "FFMA": r"\bFFMA",
    "SHFL": r"\bSHFL",
    "LDL": r"\bLDL",  # loads from local memory: registers that were spilled, or arrays indexed at run time
    "STL": r"\bSTL",
}


@dataclass(frozen=True)
class Kernel:
    """One kernel for one architecture. `counts` is by `INSTRUCTIONS`; `stack` in bytes a thread."""

    arch: str
    name: str
    counts: dict[str, int]
    registers: int
    stack: int
    listing: str = field(repr=False)


def tool() -> Path | None:
    """cuobjdump, from the pip wheel or PATH, or None."""
    wheels = (Path(entry, "nvidia", "cu13", "bin", "cuobjdump") for entry in sys.path if entry)
    found = next((path for path in wheels if os.access(path, os.X_OK)), None) or shutil.which("cuobjdump")
    return Path(found) if found else None


def kernels(library: bytes) -> list[Kernel]:
    """All kernels in `library` (exported by TVM, a cubin or a fatbin), one architecture after another."""
    return [kernel for image in images.cuda_images(library) for kernel in _kernels_of(image)]


def _kernels_of(image: images.DeviceImage) -> list[Kernel]:
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch, f"image.{image.kind}")
        path.write_bytes(image.data)
        code, usage = _run("--dump-sass", path), _run("--dump-resource-usage", path)
    found = []
    resources = list(re.finditer(r"^ Function (\S+):\s*^\s+REG:(\d+) STACK:(\d+)", usage, re.MULTILINE))
    for part in re.split(r"^\s*code for (?=sm_)", code, flags=re.MULTILINE)[1:]:
        arch = part.split(maxsplit=1)[0]
        for block in re.split(r"^\s*Function : ", part, flags=re.MULTILINE)[1:]:
            name = block.split(maxsplit=1)[0]
            # both listings go through the images in the same order, so the first of the name left is this
            # one's
            own = next(index for index, match in enumerate(resources) if match.group(1) == name)
            _, registers, stack = resources.pop(own).groups()
            counts = {key: len(re.findall(pattern, block)) for key, pattern in INSTRUCTIONS.items()}
            found.append(Kernel(arch, name, counts, int(registers), int(stack), block))
    return found


def _run(option: str, path: Path) -> str:
    cuobjdump = tool()
    if cuobjdump is None:
        raise FileNotFoundError(f"cuobjdump is not here: pip install {PACKAGES}")
    environment = {**os.environ, "PATH": f"{cuobjdump.parent}{os.pathsep}{os.environ.get('PATH', '')}"}
    done = subprocess.run([cuobjdump, option, path], capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"cuobjdump {option}: {done.stderr.strip()}")
    return done.stdout
