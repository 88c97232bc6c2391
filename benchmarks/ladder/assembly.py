"""The hottest loop of a compiled function, counted instruction by instruction.

LLVM's text for a TVM module (`Module.inspect_source("asm")`) is read, x86-64 in AT&T syntax or aarch64. Of all
innermost loops the hottest is taken to be the one that accumulates with the most multiply-adds, counted by lanes: a
matrix product has one such loop, and polynomials in an epilogue do not accumulate. What the loop's instructions are
says what bounds it, whatever the machine's caches do.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass

_LABEL = re.compile(r"^(\.L\w+|[\w.$]+):")
_JUMP = re.compile(r"^\s+(?:j\w+|b(?:\.\w+)?|cbn?z|tbn?z)\s.*?(\.L\w+)\s*$")
_COMMENT = re.compile(r"\s+(?:#|//).*$")
_FMA = re.compile(r"v?fn?m(?:add|sub)\d*([ps])[sd]$|(fml[as])$|(fn?m(?:add|sub))$")
_ARITHMETIC = re.compile(r"v?(?:mul|add|sub|div|max|min)[ps][sd]$|f(?:mul|add|sub|div)$")
_CONVERT = re.compile(r"v?cvt\w+|v?pmov[sz]x\w+|fcvt\w*|[su]cvtf|[su]shll2?|[su]xtl2?")
_SHUFFLE = re.compile(r"v?p?(?:perm|shuf|unpck|blend|insert|extract|broadcast)\w*|(?:zip|uzp|trn|dup|ext|tbl)\d?$")
_REGISTER = re.compile(r"%([zyx])mm\d+|\bv\d+\.(\d+)[a-z]")
_NUMBERED = re.compile(r"%[zyx]mm(\d+)|\b[vqsd](\d+)\b")
_X86_MEMORY = re.compile(r"\([^)]*%[re]?\w+[^)]*\)")
_BITS = {"z": 512, "y": 256, "x": 128}
_NOT_LOADS = ("lea", "nop", "prefetch", "jmp", "call")


@dataclass(frozen=True)
class Loop:
    """What one iteration does. Counts are of instructions; one that multiplies by an element in memory counts as a
    multiply-add and as a load.

    vector_bits: width of the multiply-adds (32 where they are scalar, 0 where there are none). flops: of the
    multiply-adds. stack: loads and stores of spilled registers. converts: between number types. chain: how many
    operations of one iteration wait for each other and for those of the iteration before, the longest such chain.
    """

    instructions: int
    vector_bits: int
    fma: int
    arithmetic: int
    loads: int
    stores: int
    converts: int
    shuffles: int
    stack: int
    calls: int
    flops: int
    chain: int

    def to_json(self) -> dict[str, int]:
        return asdict(self)


def functions(text: str) -> dict[str, list[str]]:
    """The instructions and local labels of each function, without directives and comments."""
    found: dict[str, list[str]] = {}
    lines: list[str] = []
    for raw in text.splitlines():
        line = _COMMENT.sub("", raw.rstrip())
        label = _LABEL.match(line)
        if label and not label[1].startswith(".L"):
            lines = found.setdefault(label[1], [])
        elif label or (line.startswith((" ", "\t")) and not line.lstrip().startswith((".", "#"))):
            lines.append(line)
    return {name: body for name, body in found.items() if body}


def innermost_loops(lines: list[str]) -> Iterator[list[str]]:
    """The lines of each loop (from a label to the last jump back to it) that has no other loop inside."""
    at = {match[1]: i for i, line in enumerate(lines) if (match := _LABEL.match(line))}
    spans: dict[int, int] = {}
    for i, line in enumerate(lines):
        jump = _JUMP.match(line)
        if jump and at.get(jump[1], i) < i:
            spans[at[jump[1]]] = i
    for start, end in spans.items():
        if not any(start <= s and e <= end and (s, e) != (start, end) for s, e in spans.items()):
            yield lines[start : end + 1]


def count(lines: list[str]) -> Loop:
    """What a piece of straight code does."""
    n = dict.fromkeys(Loop.__dataclass_fields__, 0)
    for line in lines:
        if _LABEL.match(line) or not line.strip():
            continue
        mnemonic, _, operands = line.strip().partition("\t")
        if not operands:
            mnemonic, _, operands = line.strip().partition(" ")
        if mnemonic in ("rep", "lock", "data16"):
            continue
        n["instructions"] += 1
        reads, writes = _memory(mnemonic, operands)
        n["loads"] += reads
        n["stores"] += writes
        n["stack"] += (reads or writes) and re.search(r"%[re][sb]p|\bsp\b", operands) is not None
        n["calls"] += mnemonic.startswith("call") or mnemonic in ("bl", "blr")
        if fma := _FMA.match(mnemonic):
            bits = _width(operands) if fma[1] == "p" or fma[2] else 32
            n["fma"] += 1
            n["vector_bits"] = max(n["vector_bits"], bits)
            n["flops"] += 2 * bits // 32
        elif _CONVERT.match(mnemonic):
            n["converts"] += 1
        elif _ARITHMETIC.match(mnemonic):
            n["arithmetic"] += 1
        elif _SHUFFLE.match(mnemonic) and not reads:
            n["shuffles"] += 1
    n["chain"] = _chain(lines)
    return Loop(**{key: int(value) for key, value in n.items()})


def _chain(lines: list[str]) -> int:
    """By how much an iteration makes the longest chain of dependent floating-point operations longer."""
    depth: dict[str, int] = {}
    before: dict[str, int] = {}
    for _ in range(2):
        before = dict(depth)
        for line in lines:
            mnemonic, _, operands = line.strip().replace("\t", " ", 1).partition(" ")
            registers = [number for pair in _NUMBERED.findall(operands) for number in pair if number]
            if not registers or _memory(mnemonic, operands)[1]:
                continue
            target = registers[-1 if "%" in operands else 0]  # AT&T names the destination last
            fma = _FMA.match(mnemonic) is not None
            if "xor" in mnemonic and len(set(registers)) == 1:  # how compilers write zero
                registers = []
            sources = registers if fma or registers.count(target) > 1 else [r for r in registers if r != target]
            depth[target] = max((depth.get(r, 0) for r in sources), default=0)
            depth[target] += fma or _ARITHMETIC.match(mnemonic) is not None
    return max((depth[r] - before.get(r, 0) for r in depth), default=0)


def _memory(mnemonic: str, operands: str) -> tuple[bool, bool]:
    """Whether an instruction reads memory, and whether it writes it."""
    if "%" not in operands and re.search(r"\[(?:x|sp)", operands):  # aarch64
        return mnemonic.startswith("ld"), mnemonic.startswith("st")
    place = _X86_MEMORY.search(operands)
    if place is None or mnemonic.startswith(_NOT_LOADS):
        return False, False
    last = place.end() >= len(re.sub(r"(\{[^}]*\})+$", "", operands.rstrip()))  # AT&T: the destination comes last
    compares = mnemonic.startswith(("cmp", "test", "vucomi", "ucomi"))
    writes = last and not compares and "," in operands
    return not writes or not mnemonic.startswith(("mov", "vmov", "vcvt", "vextract", "set")), writes


def _width(operands: str) -> int:
    """Bits of the widest vector register named."""
    sizes = [0]
    for x86, lanes in _REGISTER.findall(operands):
        sizes.append(_BITS[x86] if x86 else 32 * int(lanes))
    return max(sizes)


def hottest_loop(text: str) -> tuple[Loop, list[str]]:
    """The innermost loop with the most floating-point work, and its lines; a loop of nothing where there is none.

    Where no loop multiplies and adds, the product is so small that it was unrolled to its end: then the function that
    does is taken as a loop that runs once.
    """
    best, code = Loop(**dict.fromkeys(Loop.__dataclass_fields__, 0)), []
    bodies = list(functions(text).values())
    loops = [lines for body in bodies for lines in innermost_loops(body)]
    unrolled = not any(count(lines).fma for lines in loops) and any(count(body).fma for body in bodies)
    for lines in bodies if unrolled else loops:
        loop = count(lines)
        if _rank(loop) > _rank(best):
            best, code = loop, lines
    return best, code


def _rank(loop: Loop) -> tuple[bool, int, int, int]:
    return loop.chain > 0 and loop.fma > 0, loop.flops, loop.arithmetic, loop.calls
