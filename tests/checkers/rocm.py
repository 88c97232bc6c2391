"""What a code object says: architecture, wave size, registers, spills, shared memory, instructions.

Uses llvm-readelf and llvm-objdump of LLVM 22 (Debian, Ubuntu: llvm-22) on what is carved out of a library.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from gpt2_tvm.toolchains import images

PACKAGES = "lld-22 llvm-22"
INSTRUCTIONS = {
    "load": r"\b(?:global|flat|buffer)_load_",
    "load128": r"\b(?:global|flat|buffer)_load_(?:b128|dwordx4)",
    "mfma": r"\bv_mfma",
    "wmma": r"\bv_wmma",
    "scratch": r"\bscratch_",  # memory of one thread: spills
}


@dataclass(frozen=True)
class Kernel:
    """One kernel, as its code object's metadata and disassembly describe it. Sizes are in bytes."""

    name: str
    wave: int
    max_threads: int
    vector_registers: int
    vector_spills: int
    scalar_spills: int
    private_bytes: int
    shared_bytes: int
    counts: dict[str, int]


@dataclass(frozen=True)
class CodeObject:
    """`target` is the metadata's ("amdgcn-amd-amdhsa-hcc-gfx90a"), `arch` the ELF header's ("gfx90a")."""

    target: str
    arch: str
    kernels: tuple[Kernel, ...]


def tools() -> tuple[str, str] | None:
    """llvm-readelf and llvm-objdump, or None."""
    readelf, objdump = shutil.which("llvm-readelf-22"), shutil.which("llvm-objdump-22")
    return (readelf, objdump) if readelf and objdump else None


def code_objects(library: bytes) -> list[CodeObject]:
    """The AMD code objects in `library`."""
    return [_read(image.data) for image in images.amd_images(library)]


def _read(data: bytes) -> CodeObject:
    found = tools()
    if found is None:
        raise FileNotFoundError(f"llvm-readelf-22 and llvm-objdump-22 are not here: apt install {PACKAGES}")
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch, "kernels.hsaco")
        path.write_bytes(data)
        notes = _output([found[0], "--notes", "--file-header", str(path)])
        code = _output([found[1], "-d", str(path)])
    bodies = dict(re.findall(r"<(\w+)>:\n(.*?)(?=\n\n|\Z)", code, re.DOTALL))
    target = re.search(r"amdhsa\.target:\s*(\S+)", notes)
    arch = re.search(r"^\s*Flags:.*?\b(gfx[0-9a-f]+)", notes, re.MULTILINE)
    # YAML: each kernel is an item two spaces in; its keys stand four spaces in, its arguments deeper.
    entries = re.split(r"^  - ", notes.partition("amdhsa.kernels:")[2], flags=re.MULTILINE)[1:]
    kernels = tuple(_kernel(entry, bodies) for entry in entries if ".symbol:" in entry)
    return CodeObject(target.group(1) if target else "", arch.group(1) if arch else "", kernels)


def _kernel(entry: str, bodies: dict[str, str]) -> Kernel:
    values = dict(re.findall(r"^    \.(\w+):\s+(\S+)$", entry, re.MULTILINE))
    name = values["symbol"].removesuffix(".kd")
    body = bodies[name]
    return Kernel(
        name=name,
        wave=int(values["wavefront_size"]),
        max_threads=int(values["max_flat_workgroup_size"]),
        vector_registers=int(values["vgpr_count"]),
        vector_spills=int(values["vgpr_spill_count"]),
        scalar_spills=int(values["sgpr_spill_count"]),
        private_bytes=int(values["private_segment_fixed_size"]),
        shared_bytes=int(values["group_segment_fixed_size"]),
        counts={key: len(re.findall(pattern, body)) for key, pattern in INSTRUCTIONS.items()},
    )


def _output(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
