"""What an AMD code object says: architecture, wave size, registers, spills, shared memory, instructions.

Uses llvm-readelf and llvm-objdump of LLVM 22 (Debian, Ubuntu: llvm-22) on what is carved out of a library.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from gpt2_tvm.toolchains import images

PACKAGES = "lld-22 llvm-22"
HOW_TO_GET_IT = f"apt install {PACKAGES}"
INSTRUCTIONS = {
    "load": r"\b(?:global|flat|buffer)_load_",
    "load128": r"\b(?:global|flat|buffer)_load_(?:b128|dwordx4)",
    "mfma": r"\bv_mfma",
    "wmma": r"\bv_wmma",
    "scratch": r"\bscratch_",  # memory of one thread: spills
}
# The mix: first match counts.
MIX = {
    "mfma": r"v_mfma",
    "wmma": r"v_wmma",
    "dot": r"v_dot",
    "fma": r"v_(?:pk_|dual_)?(?:fma|fmac|mad|fmaak|fmamk)_?(?:mix\w*_)?(?:legacy_)?f",
    "fma_mix": r"v_fma_mix",
    "transcendental": r"v_(?:exp|log|rcp|rsq|sqrt|sin|cos)_",
    "convert": r"v_cvt_",
    "shuffle": r"ds_(?:bpermute|permute|swizzle)|v_(?:permlane|readlane|writelane)",
    "barrier": r"s_barrier",
    "scratch": r"scratch_",
}
_BYTES = {"ubyte": 1, "sbyte": 1, "u8": 1, "i8": 1, "b8": 1, "ushort": 2, "sshort": 2, "short": 2, "u16": 2, "i16": 2}
_BYTES |= {"b16": 2, "dword": 4, "b32": 4, "u32": 4, "dwordx2": 8, "b64": 8, "dwordx3": 12, "b96": 12}
_BYTES |= {"dwordx4": 16, "b128": 16}
_MEMORY = re.compile(
    r"^(?P<where>global|flat|buffer|ds|scratch)_(?P<what>load|store|read|write)(?P<two>2)?(?:st64)?_"
    r"(?:d16_(?:hi_)?)?(?P<size>[a-z]+\d*(?:x\d)?)(?:_d16(?:_hi)?)?$"
)


@dataclass(frozen=True)
class Kernel:
    """One kernel, as its code object's metadata and disassembly describe it. Sizes are in bytes; private_bytes and
    the spills (in registers) are a thread's, shared_bytes a block's.
    """

    name: str
    wave: int
    max_threads: int
    vector_registers: int
    vector_spills: int
    scalar_spills: int
    private_bytes: int
    shared_bytes: int
    counts: dict[str, int]
    scalar_registers: int = 0
    body: str = field(repr=False, default="")

    @cached_property
    def opcodes(self) -> Counter[str]:
        """How often each instruction stands in the code, without the suffix of its encoding ("_e32")."""
        names = re.findall(r"^\s+([a-z]\w+)", self.body, re.MULTILINE)
        return Counter(re.sub(r"_(?:e32|e64|sdwa|dpp)$", "", name) for name in names)

    @cached_property
    def mix(self) -> dict[str, int]:
        """Instructions by kind; "global_load.128" has its width in bits. "total" last."""
        moves: Counter[str] = Counter()
        others: Counter[str] = Counter()
        for name, count in self.opcodes.items():
            if memory := _memory(name):
                where, bits = memory
                moves[f"{where}.{bits}"] += count
            for kind, pattern in MIX.items():
                if re.match(pattern, name):
                    others[kind] += count
                    break
        return {**dict(sorted(moves.items())), **dict(sorted(others.items())), "total": sum(self.opcodes.values())}

    @property
    def widest_load(self) -> int:
        """Bytes that one thread's widest load from global memory takes; 0 if the kernel loads nothing."""
        found = [memory for memory in map(_memory, self.opcodes) if memory]
        return max((bits // 8 for where, bits in found if re.match(r"(global|flat|buffer)_load", where)), default=0)


def _memory(opcode: str) -> tuple[str, int] | None:
    """("global_load", 128) for "global_load_dwordx4"; None for what does not move data."""
    found = _MEMORY.match(opcode)
    if found is None or found["size"] not in _BYTES:
        return None
    what = {"read": "load", "write": "store"}.get(found["what"], found["what"])
    nbytes = _BYTES[found["size"]]
    return f"{found['where']}_{what}", 8 * nbytes * (2 if found["two"] else 1)


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
    """The AMD code objects in `library`. Raises FileNotFoundError where LLVM's tools are missing."""
    return [_read(image.data) for image in images.amd_images(library)]


def _read(data: bytes) -> CodeObject:
    found = tools()
    if found is None:
        raise FileNotFoundError(f"llvm-readelf-22 and llvm-objdump-22 are not here: {HOW_TO_GET_IT}")
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
        scalar_registers=int(values["sgpr_count"]),
        body=body,
    )


def _output(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
