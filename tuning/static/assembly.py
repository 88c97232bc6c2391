"""What LLVM's assembly for a CPU does: the functions that make up one PrimFunc, their loops, and the hottest loop.

Assembly does not say how often a loop turns. The hottest is taken to be an innermost loop: one with multiply-adds if
there is one, else one that computes with floats if there is one; of these the one that loads the most bytes a turn. In
a matrix product that is the loop over k, and not an epilogue that adds a residual or computes a GELU.

Understood are x86-64 (AT&T syntax) and AArch64 with NEON, in ELF and Mach-O files.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from tuning.static import arm, x86
from tuning.static.instruction import Instruction, Reader

WRAPPER = "__tvm_ffi_"  # of a PrimFunc's entry, which checks its arguments and calls what computes
_FUNCTION = re.compile(r"^([A-Za-z_.$][\w.$]*):")
_LOCAL = re.compile(r"^(?:\.L|L|l)(?:BB|tmp|func|CPI|JTI|loh|PI)")
_BLOCK = re.compile(r"^(\.?LBB\d+_\d+):")
_WORD = re.compile(r"[A-Za-z_.$][\w.$]*")
# libm and compiler-rt: what LLVM calls where it has no instructions.
_LIBM = re.compile(
    r"^_?(?:(?:exp2?|expm1|log2?|log10|log1p|tanh?|sinh?|cosh?|erfc?|pow|fmod|cbrt|floor|ceil|round|rint|trunc)[fl]?"
    r"|__(?:trunc|extend)\w+[hsd]f2|__gnu_\w+|__\w*[dt]i[34])$"
)


@dataclass(frozen=True)
class Loop:
    """Instructions from the label that is jumped back to, to the jump; `depth` 1 is outermost."""

    instructions: tuple[Instruction, ...]
    depth: int

    @property
    def lanes(self) -> int:
        """32-bit floating-point lanes that one turn computes; a multiply-add counts twice."""
        return sum(i.bits // 32 * (2 if i.kind == "fma" else 1) for i in self.instructions if i.is_arithmetic)

    @property
    def load_bytes(self) -> int:
        """Bytes that one turn loads, but for the stack and constants."""
        return sum(i.load_bytes for i in self.instructions)

    @cached_property
    def stack_slots(self) -> dict[str, int]:
        """Bytes of each place on the stack that a turn reads or writes, by its address in the assembly."""
        slots: dict[str, int] = {}
        for i in self.instructions:
            if i.stack_slot:
                slots[i.stack_slot] = max(slots.get(i.stack_slot, 0), i.stack_bytes)
        return slots


@dataclass(frozen=True)
class Function:
    """All code of one PrimFunc: what computes, and the bodies of its parallel loops.

    symbols: the functions of the assembly that were put together.
    """

    name: str
    symbols: tuple[str, ...]
    instructions: tuple[Instruction, ...]
    loops: tuple[Loop, ...]

    @property
    def hottest(self) -> Loop | None:
        """The innermost loop that counts (see the module's text); None if there is no loop."""

        def rank(loop: Loop) -> tuple[bool, bool, int, int, int]:
            products = any(i.kind in ("fma", "dot") for i in loop.instructions)
            return products, loop.lanes > 0, loop.load_bytes, loop.lanes, loop.depth

        return max(self.loops, key=rank, default=None)

    @property
    def vector_bits(self) -> int:
        """Width of the arithmetic in the hottest loop (without one: of all code), of its moves where it computes
        nothing. The widest that occurs; 0 if neither does.
        """
        code = self.hottest.instructions if self.hottest else self.instructions
        return max((i.bits for i in code if i.is_arithmetic), default=0) or max((i.bits for i in code), default=0)

    @property
    def libm(self) -> dict[str, int]:
        """References to functions of libm and compiler-rt, by name."""
        names = (word for i in self.instructions for word in i.symbols if _LIBM.match(word))
        return dict(sorted(Counter(name.lstrip("_") if not name.startswith("__") else name for name in names).items()))


def functions(assembly: str) -> dict[str, Function]:
    """The PrimFuncs in `assembly` (what an LLVM module of TVM gives for "asm"), by name.

    Raises ValueError where the assembly is of an architecture that is not understood.
    """
    reader = _reader(assembly)
    bodies = _bodies(assembly)
    mangled = "_" if any(name.startswith(f"_{WRAPPER}") for name in bodies) else ""  # Mach-O
    entries = [name for name in bodies if name.startswith(mangled + WRAPPER)]
    shared = {name for name in bodies if "__tvm_set_raised" in name}
    found = {}
    for entry in entries:
        own = _reachable(entry, bodies, set(entries) | shared)
        # the entry only checks its arguments, unless what computes was inlined into it
        symbols = [name for name in own if name != entry] or [entry]
        parsed = {name: [reader.read(line) for line in bodies[name]] for name in symbols}
        instructions = tuple(i for lines in parsed.values() for i in lines if i.mnemonic)
        loops = tuple(loop for lines in parsed.values() for loop in _innermost(lines))
        name = entry.removeprefix(mangled + WRAPPER)
        found[name] = Function(name, tuple(symbols), instructions, loops)
    return found


def counts(instructions: Sequence[Instruction]) -> dict[str, int]:
    """How many instructions of each kind, "total" last. An instruction that computes on memory counts as its kind and
    as a load; "stack" are those that touch a fixed place on the stack, "workspace" references to TVM's allocator.
    """
    found = Counter(i.kind for i in instructions if i.kind not in ("load", "store", "other"))
    found["load"] = sum(i.load_bytes > 0 for i in instructions)
    found["store"] = sum(i.store_bytes > 0 for i in instructions)
    found["stack"] = sum(bool(i.stack_slot) for i in instructions)
    found["workspace"] = sum("BackendAllocWorkspace" in symbol for i in instructions for symbol in i.symbols)
    return {**{kind: found[kind] for kind in sorted(found) if found[kind]}, "total": len(instructions)}


def _reader(assembly: str) -> Reader:
    if re.search(r"^\s+(?:ret|retq|vzeroupper)\s*$", assembly, re.MULTILINE) and "%r" in assembly:
        return x86.X86()
    if re.search(r"\bx29\b|\bstp\s+x\d+", assembly):
        return arm.AArch64()
    raise ValueError("this assembly is neither x86-64's nor AArch64's")


def _bodies(assembly: str) -> dict[str, list[str]]:
    """Function's symbol -> its lines: labels of blocks and instructions, without directives and comments."""
    bodies: dict[str, list[str]] = {}
    current: list[str] | None = None
    for line in assembly.splitlines():
        if _BLOCK.match(line):
            if current is not None:
                current.append(line)
            continue
        start = _FUNCTION.match(line)
        if start:
            if not _LOCAL.match(line):
                current = bodies.setdefault(start.group(1), [])
            continue
        text = line.strip()
        if current is not None and text and text[0] not in ".#;/":
            current.append(line)
    return {name: lines for name, lines in bodies.items() if lines}


def _reachable(entry: str, bodies: dict[str, list[str]], stop: set[str]) -> list[str]:
    """`entry` and the functions that its code names, directly or through others, but for those in `stop`."""
    found, todo = [entry], [entry]
    while todo:
        for line in bodies[todo.pop()]:
            for word in _WORD.findall(line):
                if word in bodies and word not in stop and word not in found:
                    found.append(word)
                    todo.append(word)
    return found


def _innermost(lines: Sequence[Instruction]) -> Iterator[Loop]:
    """The loops of one function that contain no other loop."""
    labels = {i.label: position for position, i in enumerate(lines) if i.label}
    spans: dict[int, int] = {}  # a loop with several ways back is one
    for position, i in enumerate(lines):
        target = labels.get(i.target, position + 1) if i.target else position + 1
        if target <= position:
            spans[target] = max(spans.get(target, 0), position)
    for start, end in spans.items():
        if any(start <= s and e <= end and (s, e) != (start, end) for s, e in spans.items()):
            continue
        depth = sum(s <= start and end <= e for s, e in spans.items())
        yield Loop(tuple(i for i in lines[start : end + 1] if i.mnemonic), depth)
