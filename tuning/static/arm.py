"""Reading AArch64 assembly (ELF and Mach-O) with NEON. SVE's registers have no width that the code says."""

from __future__ import annotations

import re

from tuning.static.instruction import Instruction

_KINDS = (
    ("fma", r"fml[as]l?2?$|fn?m(?:add|sub)$"),
    ("dot", r"[su]dot$|[su]mml?a$|bfdot$|bfmmla$"),
    ("mul", r"fn?mul[x]?$"),
    ("divide", r"fdiv$|fsqrt$|frecp\w|frsqrt\w"),
    ("add", r"fadd\w*$|fsub$|fabd$"),
    ("minmax", r"f(?:min|max)\w*$"),
    ("convert", r"fcvt\w*$|[su]cvtf$|[su]shll2?$|[su]xtl2?$|frint\w$"),
    ("broadcast", r"dup$|ld1r$"),
    ("shuffle", r"zip[12]$|uzp[12]$|trn[12]$|ext$|tbl$|ins$|rev\d+$"),
    ("prefetch", r"prfm$|prfum$"),
    ("branch", r"b(?:\.\w+)?$|cbn?z$|tbn?z$"),
    ("call", r"blr?$"),
    ("load", r"ld\w+$"),
    ("store", r"st\w+$"),
    ("move", r"f?mov\w*$"),
)
_KIND = [(kind, re.compile(pattern)) for kind, pattern in _KINDS]
_LABEL = re.compile(r"^(\.?LBB\d+_\d+):")
_VECTOR = re.compile(r"\bv(\d+)(?:\.(16b|8h|4s|2d|8b|4h|2s|1d))?")
_SCALAR = re.compile(r"\b([qdshb])(\d+)\b")
_BITS = {"16b": 128, "8h": 128, "4s": 128, "2d": 128, "8b": 64, "4h": 64, "2s": 64, "1d": 64}
_SIZE = {"q": 128, "d": 64, "s": 32, "h": 16, "b": 8, "x": 64, "w": 32}
_SYMBOL = re.compile(r"(?:^|:)([A-Za-z_.$][\w.$]*)(?=@|$)")


class AArch64:
    """See `instruction.Reader`."""

    def read(self, line: str) -> Instruction:
        label = _LABEL.match(line)
        if label:
            return Instruction("", label=label.group(1))
        text = re.split(r"//|;", line, maxsplit=1)[0].strip()
        parts = text.split(None, 1)
        mnemonic, rest = parts[0], parts[1] if len(parts) > 1 else ""
        kind = next((kind for kind, pattern in _KIND if pattern.match(mnemonic)), "other")
        if kind == "branch":
            return Instruction(mnemonic, kind, target=rest.split(",")[-1].strip())
        vectors, scalars = _VECTOR.findall(rest), _SCALAR.findall(rest)
        bits = max([_BITS[size] for _, size in vectors if size] + [_SIZE[size] for size, _ in scalars], default=0)
        registers = tuple(dict.fromkeys([n for n, _ in vectors] + [n for _, n in scalars]))
        symbols = tuple(s for operand in rest.split(",") for s in _SYMBOL.findall(operand.strip()))
        symbols = symbols if kind == "call" or "@" in rest or ":" in rest else ()
        address = re.search(r"\[([^\]]+)\]", rest)
        if kind not in ("load", "store") and not (kind == "broadcast" and mnemonic == "ld1r"):
            return Instruction(mnemonic, kind, bits, registers=registers, symbols=symbols)
        nbytes = self._bytes(mnemonic, rest, bits)
        slot = address.group(1).replace(" ", "") if address and re.match(r"(?:sp|x29)\b(?!,\s*x)", address[1]) else ""
        return Instruction(
            mnemonic,
            kind,
            bits,
            load_bytes=nbytes if kind != "store" and not slot else 0,
            store_bytes=nbytes if kind == "store" and not slot else 0,
            stack_slot=slot,
            stack_bytes=nbytes if slot else 0,
            registers=registers,
            symbols=symbols,
        )

    @staticmethod
    def _bytes(mnemonic: str, rest: str, bits: int) -> int:
        """Bytes of memory that a load or store touches."""
        listed = re.search(r"\{([^}]*)\}", rest)
        if listed:  # ld1 { v0.4s, v1.4s }, [x0], and a range v0.4s - v3.4s
            numbers = [int(n) for n in re.findall(r"v(\d+)", listed.group(1))]
            count = (numbers[-1] - numbers[0]) % 32 + 1 if "-" in listed.group(1) else len(numbers)
            if mnemonic.endswith("r"):
                lane = re.search(r"\.\d*([bhsd])", listed.group(1))
                return _SIZE[lane.group(1)] // 8 if lane else 4
            lane = re.search(r"\.([bhsd])\s*\}?\s*\[", rest)  # one lane of a vector
            return _SIZE[lane.group(1)] // 8 if lane else count * bits // 8
        sized = re.match(r"(?:ld|st)(?:u?r|p|nt?p)s?([bhw])?", mnemonic)
        first = re.match(r"\s*([a-z])\d+", rest)
        width = _SIZE.get(first.group(1), 64) if first else 64
        if sized and sized.group(1):
            width = {"b": 8, "h": 16, "w": 32}[sized.group(1)]
        return width // 8 * (2 if re.match(r"(?:ld|st)n?p", mnemonic) else 1)
