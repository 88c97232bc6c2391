"""Reading x86-64 assembly in AT&T syntax (LLVM's default), of the SSE, AVX, AVX2 and AVX-512 families."""

from __future__ import annotations

import re

from tuning.static.instruction import Instruction

_KINDS = (
    ("fma", r"v?f?n?m(?:add|sub)\d+|vfn?m(?:add|sub)(?:add|sub)?\d*[ps][sdh]$|vfmaddsub\d+|vfmadd\d+"),
    ("dot", r"vp?dp\w+|v?pmadd(?:wd|ubsw)$"),
    ("mul", r"v?mul[ps][sdh]$|v?pmulld$"),
    ("divide", r"v?(?:div|sqrt|rcp(?:14)?|rsqrt(?:14)?)[ps][sdh]$"),
    ("add", r"v?(?:addsub|hadd|hsub|add|sub)[ps][sdh]$"),
    ("minmax", r"v?(?:min|max)[ps][sdh]$"),
    ("convert", r"v?cvt\w+|v?pmov[sz]x\w+|v?roundp[sd]|vrndscale\w+"),
    ("broadcast", r"v?p?broadcast\w+|v?movddup$"),
    (
        "shuffle",
        r"v?(?:perm\w*|unpck\w+|shuf\w+|blend\w+|pshuf\w+|pblend\w+|punpck\w+|insert\w+|extract\w+|movs[lh]dup)",
    ),
    ("prefetch", r"prefetch\w+"),
    ("branch", r"j\w+"),
    ("call", r"call[lq]?"),
)
_KIND = [(kind, re.compile(pattern)) for kind, pattern in _KINDS]
_MOVE = re.compile(r"v?(?:mov\w*|lddqu|maskmov\w+)|kmov\w|vpmaskmov\w")
_REGISTER = re.compile(r"%([xyz])mm(\d+)")
_LABEL = re.compile(r"^(\.?LBB\d+_\d+):")
_SYMBOL = re.compile(r"([A-Za-z_.$][\w.$]*)(?=@|\(%rip\)|$)")
_BITS = {"x": 128, "y": 256, "z": 512}
_SUFFIX = {"b": 1, "w": 2, "l": 4, "q": 8}
_NO_ACCESS = re.compile(r"lea[lqw]?$|nop\w*$|prefetch")


class X86:
    """See `instruction.Reader`. A function is read with %rsp, and with %rbp once it was made the frame's pointer."""

    def __init__(self) -> None:
        self._frame = False

    def read(self, line: str) -> Instruction:
        label = _LABEL.match(line)
        if label:
            return Instruction("", label=label.group(1))
        text = line.split("#", 1)[0].strip()
        mnemonic, _, rest = text.partition("\t") if "\t" in text else text.partition(" ")
        if mnemonic in ("rep", "lock", "notrack", "{evex}", "{vex}"):
            mnemonic, _, rest = rest.strip().partition(" ")
        rest = rest.strip()
        if mnemonic == "pushq":  # the prologue of a function
            self._frame = False if rest == "%rbp" else self._frame
        if mnemonic == "movq" and rest == "%rsp, %rbp":
            self._frame = True
        return self._describe(mnemonic, rest)

    def _describe(self, mnemonic: str, rest: str) -> Instruction:
        kind = next((kind for kind, pattern in _KIND if pattern.match(mnemonic)), "other")
        operands = _split(rest)
        registers = _REGISTER.findall(rest)
        bits = max((_BITS[size] for size, _ in registers), default=0)
        scalar = re.search(r"(?<![a-z])v?\w*s([sdh])$", mnemonic) if bits else None
        if scalar and not re.match(r"v?p|v?broadcast|v?movs|v?extract", mnemonic):
            bits = {"s": 32, "d": 64, "h": 16}[scalar.group(1)]
        if mnemonic in ("vmovss", "movss", "vmovd", "movd"):
            bits = 32
        elif mnemonic in ("vmovsd", "movsd", "vmovq", "movq") and registers:
            bits = 64
        if kind == "branch":
            return Instruction(mnemonic, kind, target=rest)
        memory = next((o for o in operands if "(" in o), None)
        found = {"bits": bits, "registers": tuple(dict.fromkeys(number for _, number in registers))}
        symbols = (
            tuple(_SYMBOL.findall(re.sub(r"[%$*]\w*", "", rest)))
            if re.search(r"[A-Za-z_]\w*[@(]", rest) or (kind == "call")
            else ()
        )
        if kind == "call" or memory is None or _NO_ACCESS.match(mnemonic):
            move = "move" if kind == "other" and _MOVE.match(mnemonic) else kind
            return Instruction(mnemonic, move, symbols=symbols, **found)  # type: ignore[arg-type]
        nbytes = _bytes(mnemonic, operands, bits, "{1to" in rest)
        stored = memory is operands[-1] and (
            _MOVE.match(mnemonic) is not None or not mnemonic.startswith(("cmp", "test", "v"))
        )
        if _MOVE.match(mnemonic) and kind == "other":
            kind = "store" if stored else "load"
        if self._on_stack(memory):
            return Instruction(
                mnemonic,
                kind,
                stack_slot=memory.replace(" ", ""),
                stack_bytes=nbytes,
                symbols=symbols,
                **found,  # type: ignore[arg-type]
            )
        if "(%rip)" in memory:  # a constant, or the address of something
            return Instruction(mnemonic, kind, symbols=symbols, **found)  # type: ignore[arg-type]
        return Instruction(
            mnemonic,
            kind,
            load_bytes=0 if stored else nbytes,
            store_bytes=nbytes if stored else 0,
            symbols=symbols,
            **found,  # type: ignore[arg-type]
        )

    def _on_stack(self, memory: str) -> bool:
        """Whether an address is a fixed place in the frame (with an index it is an array's)."""
        base = re.search(r"\(%(r[sb]p)\)", memory)
        return base is not None and (base.group(1) == "rsp" or self._frame)


def _split(operands: str) -> list[str]:
    """Operands, separated by commas outside brackets."""
    parts, depth, current = [], 0, ""
    for character in operands:
        depth += {"(": 1, ")": -1}.get(character, 0)
        if character == "," and depth == 0:
            parts.append(current.strip())
            current = ""
        else:
            current += character
    return [*parts, current.strip()] if current.strip() else parts


def _bytes(mnemonic: str, operands: list[str], bits: int, embedded_broadcast: bool) -> int:
    """Bytes of memory that an instruction touches."""
    if embedded_broadcast:
        return 8 if mnemonic.endswith("d") else 4
    broadcast = re.match(r"v?p?broadcast(\w+)$", mnemonic)
    if broadcast:
        what = broadcast.group(1)
        wide = {"f128": 16, "i128": 16, "f32x4": 16, "i32x4": 16, "f64x2": 16, "f64x4": 32, "i64x4": 32, "f32x8": 32}
        return wide.get(what, {"ss": 4, "sd": 8, "b": 1, "w": 2, "d": 4, "q": 8}.get(what, 4))
    widen = re.match(r"v?pmov[sz]x(\w\w)$", mnemonic)
    if widen:
        return bits // 8 // {"bw": 2, "bd": 4, "bq": 8, "wd": 2, "wq": 4, "dq": 2}.get(widen.group(1), 2)
    if re.match(r"v?cvt(?:ph2ps|ps2pd|dq2pd|udq2pd)$", mnemonic):
        return bits // 16
    if mnemonic == "vcvtps2ph":
        return bits // 16
    if re.match(r"vinsert[fi](?:128|32x4|64x2)|vextract[fi](?:128|32x4|64x2)", mnemonic):
        return 16
    if re.match(r"vinsert[fi](?:64x4|32x8)|vextract[fi](?:64x4|32x8)", mnemonic):
        return 32
    if bits:
        return bits // 8
    return _SUFFIX.get(mnemonic[-1], 8)
