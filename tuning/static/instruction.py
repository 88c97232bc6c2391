"""One line of assembly, as the readers of the two CPU architectures describe it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

ARITHMETIC = ("fma", "mul", "add", "minmax", "divide", "dot")


@dataclass(frozen=True)
class Instruction:
    """An instruction, or (without a mnemonic) the label of a block.

    Attributes:
        mnemonic: as written; "" for a label.
        kind: one of `ARITHMETIC`, "convert", "broadcast", "shuffle", "load", "store", "move", "branch", "call",
            "prefetch", "other".
        bits: width of the vector registers that it works on (a scalar float's own width); 0 if it touches none.
        load_bytes, store_bytes: of memory that is neither the stack nor a constant.
        stack_slot, stack_bytes: the address on the stack that it touches, "" if none, and how much of it.
        registers: vector registers that it names, under one name whatever the width.
        symbols: names that its operands refer to. label: of a block. target: of a branch.
    """

    mnemonic: str
    kind: str = "other"
    bits: int = 0
    load_bytes: int = 0
    store_bytes: int = 0
    stack_slot: str = ""
    stack_bytes: int = 0
    registers: tuple[str, ...] = ()
    symbols: tuple[str, ...] = ()
    label: str = ""
    target: str = ""

    @property
    def is_arithmetic(self) -> bool:
        """Whether it computes with floating-point numbers."""
        return self.kind in ARITHMETIC


class Reader(Protocol):
    """Reads the lines of one architecture."""

    def read(self, line: str) -> Instruction:
        """What `line`, an instruction or a block's label, says."""
        ...
