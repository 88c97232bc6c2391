"""The machine code of a CPU library: its kernels, their innermost loops, and what these do.

ELF for x86-64 and arm64, of this machine or another: pyelftools finds the functions, capstone takes them apart.
"""

from __future__ import annotations

import bisect
import re
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import capstone
from elftools.elf.elffile import ELFFile

# By machine: a multiply-add on a whole vector of float32 by width in bits, anything on the stack, a call.
_X86_FMA = r"^vfn?madd\d+ps .*\b{}\d"
MULTIPLY_ADD = {
    "x64": {512: _X86_FMA.format("zmm"), 256: _X86_FMA.format("ymm"), 128: _X86_FMA.format("xmm")},
    "AArch64": {128: r"^fmla v\d+\.4s,"},
}
SCALAR_MULTIPLY_ADD = {"x64": r"^vfn?m(add|sub)\d+ss ", "AArch64": r"^fmadd s"}
STACK = {"x64": r"\[r[sb]p\b", "AArch64": r"\[(sp|x29)\b"}
CALL = {"x64": r"^call ", "AArch64": r"^blr? "}
WIDEN = {"x64": r"^vcvtph2ps [xyz]mm", "AArch64": r"^fcvtl2? v\d+\.4s"}  # float16 to float32, a vector at a time
# What brings a weight to its multiply-add and does nothing else: prefetches, and conversions from float16 and int8
FEEDS = {"x64": r"^(prefetch|vcvtph2ps|vpmovsxbd|vcvtdq2ps)", "AArch64": r"^(prfm|fcvtl|sshll|tbl|scvtf)"}
END = ("jmp", "ret", "b", "br")  # control does not go on behind these
# Jumps that can close a loop; their last operand is where to.
JUMP = {"x64": r"^j[a-z]+ (0x[0-9a-f]+)$", "AArch64": r"^(?:b|b\.\w+|cbn?z|tbn?z) (?:.*, )?#(0x[0-9a-f]+)$"}


@dataclass(frozen=True)
class Loop:
    """An innermost loop: straight code from the target of its backward jump to the jump. machine: pyelftools' name."""

    machine: str
    code: tuple[str, ...]

    def count(self, pattern: str) -> int:
        """How many instructions match a regular expression."""
        return sum(bool(re.search(pattern, line)) for line in self.code)

    def multiply_adds(self, bits: int) -> int:
        """Multiply-adds of whole vectors of `bits`."""
        return self.count(MULTIPLY_ADD[self.machine][bits])

    @property
    def stack_accesses(self) -> int:
        """Loads and stores of the stack: registers that were spilled."""
        return self.count(STACK[self.machine])

    @property
    def calls(self) -> int:
        """Calls of other functions: libm's, the runtime's."""
        return self.count(CALL[self.machine])


@dataclass(frozen=True)
class Kernel:
    """A PrimFunc of the library with the bodies of its parallel loops, which LLVM puts right behind it."""

    name: str
    machine: str
    code: tuple[tuple[int, str], ...]  # address, instruction

    def loops(self) -> list[Loop]:
        """Its innermost loops."""
        places = [address for address, _ in self.code]
        targets: list[int | None] = []  # of each instruction that jumps within the kernel: the index of where to
        for _, line in self.code:
            jump = re.match(JUMP[self.machine], line)
            to = bisect.bisect_left(places, int(jump[1], 16)) if jump else len(places)
            targets.append(to if jump and to < len(places) and places[to] == int(jump[1], 16) else None)
        closing = [(to, at) for at, to in enumerate(targets) if to is not None and to <= at]
        spans = [span for span in closing if self._comes_round(*span, targets)]
        innermost = [s for s in spans if not any(o != s and s[0] <= o[0] and o[1] <= s[1] for o in spans)]
        return [Loop(self.machine, tuple(line for _, line in self.code[a : b + 1])) for a, b in innermost]

    def _comes_round(self, start: int, end: int, targets: list[int | None]) -> bool:
        """Whether control gets from the target of a backward jump to the jump, by what lies between them. (A jump back
        from code that LLVM put out of the way closes no loop.)"""
        seen, todo = {start}, [start]
        while todo:
            at = todo.pop()
            if at == end:
                return True
            to = targets[at]
            following = [] if self.code[at][1].split()[0] in END else [at + 1]
            for n in [*following, *([to] if to is not None else [])]:
                if start <= n <= end and n not in seen:
                    seen.add(n)
                    todo.append(n)
        return False

    def products(self, bits: int) -> list[Loop]:
        """The innermost loops of matrix products: four multiply-adds of that width or more, a third of the loop or
        more. (A polynomial's, of an exponential say, are a quarter of theirs.)"""
        found = [(loop, loop.multiply_adds(bits)) for loop in self.loops()]
        feeds = FEEDS[self.machine]
        return [loop for loop, adds in found if adds >= 4 and 3 * adds >= len(loop.code) - loop.count(feeds)]

    def count(self, pattern: str) -> int:
        """How many instructions match, anywhere in the kernel."""
        return sum(bool(re.search(pattern, line)) for _, line in self.code)


def kernels(library: Path) -> dict[str, Kernel]:
    """The kernels of a library that TVM built, by the names in its manifest."""
    with library.open("rb") as file:
        elf = ELFFile(file)
        machine = elf.get_machine_arch()
        text = elf.get_section_by_name(".text")
        start, code = text["sh_addr"], text.data()
        symbols = {
            symbol["st_value"]: symbol.name
            for symbol in elf.get_section_by_name(".symtab").iter_symbols()
            if symbol["st_info"]["type"] == "STT_FUNC" and start <= symbol["st_value"] < start + len(code)
        }
    if machine == "x64":
        engine = capstone.Cs(capstone.CS_ARCH_X86, capstone.CS_MODE_64)
    else:
        engine = capstone.Cs(capstone.CS_ARCH_ARM64, capstone.CS_MODE_LITTLE_ENDIAN)
    ordered = [*sorted(symbols), start + len(code)]
    found = {}
    for address, end in pairwise(ordered):
        name = symbols[address]
        if name.endswith("_compute_"):
            raw = code[address - start : end - start]
            lines = tuple((i.address, f"{i.mnemonic} {i.op_str}") for i in engine.disasm(raw, address))
            found[name.removesuffix("_compute_")] = Kernel(name.removesuffix("_compute_"), machine, lines)
    return found


def imports(library: Path) -> set[str]:
    """Names of functions that a library takes from others."""
    with library.open("rb") as file:
        symbols = ELFFile(file).get_section_by_name(".dynsym").iter_symbols()
        return {symbol.name for symbol in symbols if symbol["st_shndx"] == "SHN_UNDEF" and symbol.name}
