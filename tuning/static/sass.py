"""The machine code in a CUDA library: instructions, registers, shared and local memory of each kernel.

Uses NVIDIA's cuobjdump (PyPI: nvidia-cuda-cuobjdump, nvidia-cuda-nvdisasm) on what is carved out of it.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from gpt2_tvm.toolchains import images

PACKAGES = "nvidia-cuda-cuobjdump and nvidia-cuda-nvdisasm"
HOW_TO_GET_IT = (
    "pip install 'gpt2-tvm[test]' (nvidia-cuda-cuobjdump and nvidia-cuda-nvdisasm), or put cuobjdump on PATH"
)
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
# Instructions that move data, which are told apart by width; the rest by their first word.
MEMORY = ("LDG", "STG", "LDS", "STS", "LDL", "STL", "LDGSTS", "LD", "ST")
# The mix: what a reader of a GEMV, a matmul or a reduction looks for.
MIX = (
    *("HMMA", "HGMMA", "IMMA", "LDSM", "FFMA", "FMUL", "FADD", "HFMA2", "HADD2", "HMUL2", "IMAD", "MUFU", "SHFL"),
    *("BAR", "PRMT", "F2F", "F2FP", "I2F", "I2FP", "UTMALDG", "BRA"),
)
RESERVED_BYTES = 1024  # of each block: cuobjdump counts it as the kernel's own from sm_90 on
_CODE = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)(.*?);", re.MULTILINE)
_REGISTER = re.compile(r"\bR(\d+)\b")
_STACK_ADDRESS = re.compile(r"\[\s*R1(?:\s*\+\s*-?0x[0-9a-f]+)?\s*\]")


@dataclass(frozen=True)
class Kernel:
    """One kernel for one architecture.

    counts: by `INSTRUCTIONS`. registers: a thread. stack: bytes a thread of its frame in local memory, where spilled
    registers live and arrays that are indexed at run time. shared: static bytes a block. local: bytes a thread
    outside the frame. listing: cuobjdump's.
    """

    arch: str
    name: str
    counts: dict[str, int]
    registers: int
    stack: int
    listing: str = field(repr=False)
    shared: int = 0
    local: int = 0

    @cached_property
    def opcodes(self) -> Counter[str]:
        """How often each instruction stands in the listing, under its full name ("LDG.E.128.CONSTANT")."""
        return Counter(name for name, _ in _CODE.findall(self.listing))

    @cached_property
    def mix(self) -> dict[str, int]:
        """Instructions by kind, the memory's first: "LDG.128" has its width in bits. "total" last."""
        found: Counter[str] = Counter()
        for name, count in self.opcodes.items():
            first = name.split(".", 1)[0]
            if first in MEMORY:
                found[f"{first}.{width_bits(name)}"] += count
            elif first in MIX:
                found[first] += count
        order = sorted(found, key=lambda key: (key.split(".")[0] not in MEMORY, key))
        return {**{key: found[key] for key in order}, "total": sum(self.opcodes.values()) - self.opcodes["NOP"]}

    @property
    def widest_load(self) -> int:
        """Bytes that one thread's widest load from global memory takes; 0 if the kernel loads nothing."""
        return max((width_bits(n) // 8 for n in self.opcodes if n.split(".")[0] in ("LDG", "LDGSTS", "LD")), default=0)

    @cached_property
    def indexed_local(self) -> int:
        """Accesses of local memory whose address is computed: of an array that is indexed at run time, which is no
        spill."""
        return sum(
            1 for name, rest in _CODE.findall(self.listing) if name[:3] in ("LDL", "STL") and not _own_slot(rest)
        )

    @cached_property
    def bytes_in_flight(self) -> int:
        """Bytes that one thread has asked global memory for and not used yet, at most: the sum over the loads whose
        registers no later instruction has read. Counted down the listing, a loop once."""
        flying: dict[int, int] = {}  # first register: bytes
        most = 0
        for name, rest in _CODE.findall(self.listing):
            kind, operands = name.split(".", 1)[0], rest.split(",")
            read = rest if kind in ("STG", "STS", "STL") else ",".join(operands[1:])
            for register in map(int, _REGISTER.findall(read)):
                for first in [first for first, size in flying.items() if first <= register < first + max(1, size // 4)]:
                    del flying[first]
            target = _REGISTER.search(operands[0])
            if kind == "LDG" and target:
                flying[int(target.group(1))] = width_bits(name) // 8
                most = max(most, sum(flying.values()))
        return most

    def loads_before_barrier(self, bits: int = 128) -> tuple[int, int]:
        """(loads of that width from global memory that stand before the first barrier of the block, all of them)."""
        found = [name for name, _ in _CODE.findall(self.listing)]
        barrier = next((i for i, name in enumerate(found) if name.startswith("BAR.")), len(found))
        wide = [i for i, name in enumerate(found) if name.startswith("LDG.") and width_bits(name) == bits]
        return sum(i < barrier for i in wide), len(wide)


def _own_slot(operands: str) -> bool:
    return _STACK_ADDRESS.search(operands) is not None


def width_bits(opcode: str) -> int:
    """The bits that a memory instruction moves a thread: LDG.E.128 128, STG.E.U16 16, LDG.E 32."""
    for part in opcode.split(".")[1:]:
        if part in ("64", "128", "256"):
            return int(part)
        if part in ("U8", "S8"):
            return 8
        if part in ("U16", "S16"):
            return 16
    return 32


def tool() -> Path | None:
    """cuobjdump, from the pip wheel or PATH, or None."""
    wheels = (Path(entry, "nvidia", "cu13", "bin", "cuobjdump") for entry in sys.path if entry)
    found = next((path for path in wheels if os.access(path, os.X_OK)), None) or shutil.which("cuobjdump")
    return Path(found) if found else None


def kernels(library: bytes) -> list[Kernel]:
    """All kernels in `library` (exported by TVM, a cubin or a fatbin), one architecture after another.

    Raises FileNotFoundError where cuobjdump is missing, RuntimeError with its message where it refuses the image.
    """
    return [kernel for image in images.cuda_images(library) for kernel in _kernels_of(image)]


def _kernels_of(image: images.DeviceImage) -> list[Kernel]:
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch, f"image.{image.kind}")
        path.write_bytes(image.data)
        code, usage = _run("--dump-sass", path), _run("--dump-resource-usage", path)
    found = []
    pattern = r"^ Function (\S+):\s*^\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)"
    resources = list(re.finditer(pattern, usage, re.MULTILINE))
    for part in re.split(r"^\s*code for (?=sm_)", code, flags=re.MULTILINE)[1:]:
        arch = part.split(maxsplit=1)[0]
        for block in re.split(r"^\s*Function : ", part, flags=re.MULTILINE)[1:]:
            name = block.split(maxsplit=1)[0]
            # both listings go through the images in the same order, so the first of the name left is this one's
            own = next(index for index, match in enumerate(resources) if match.group(1) == name)
            _, registers, stack, shared, local = resources.pop(own).groups()
            counts = {key: len(re.findall(pattern, block)) for key, pattern in INSTRUCTIONS.items()}
            own_shared = int(shared) - (RESERVED_BYTES if int(arch.removeprefix("sm_").rstrip("af")) >= 90 else 0)
            found.append(Kernel(arch, name, counts, int(registers), int(stack), block, max(0, own_shared), int(local)))
    return found


def _run(option: str, path: Path) -> str:
    cuobjdump = tool()
    if cuobjdump is None:
        raise FileNotFoundError(f"cuobjdump is not here: {HOW_TO_GET_IT}")
    environment = {**os.environ, "PATH": f"{cuobjdump.parent}{os.pathsep}{os.environ.get('PATH', '')}"}
    done = subprocess.run([cuobjdump, option, path], capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"cuobjdump {option}: {done.stderr.strip()}")
    return done.stdout
