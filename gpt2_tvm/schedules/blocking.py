"""What the CPU rules know of a processor: everything that a loop's extent may depend on, from the target's TOML."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from tvm.target import Target
from tvm.target.codegen import target_has_features

VECTOR_BITS = {"avx512f": 512, "avx": 256}  # by LLVM's name of the feature; others have 128 (SSE, NEON)
LINE_BYTES = 64  # a cache line; where it is longer (Apple, 128), a line is asked for twice


@dataclass(frozen=True)
class Blocking:
    """Sizes that the kernels are blocked for.

    Attributes:
        vector_bits, vector_registers: the vector registers' width, and how many there are.
        tile_rows: MR, rows of x in a register tile of the matrix product.
        l1_kib, l2_kib: the data caches that one core has to itself.
        prefetch_bytes: how far ahead of its loads a core that streams memory asks for it.
    """

    # what a target that does not say gets: the least among the processors of the last ten years
    vector_bits: int = 128
    vector_registers: int = 16
    tile_rows: int = 6
    l1_kib: int = 32
    l2_kib: int = 256
    prefetch_bytes: int = 16384

    @staticmethod
    def of(processor: Any, target: Target) -> Blocking:
        """From a `targets.DeviceTarget`, one of its parts (Layout, Limits), a mapping with some of the fields, or None.

        The vector width that is not named comes from `target`'s CPU features.
        """
        known = {f.name for f in fields(Blocking)}
        found: dict[str, int] = {}
        if isinstance(processor, Mapping):
            if unknown := set(processor) - known:
                raise TypeError(f"Blocking has no {', '.join(sorted(unknown))}; it has {', '.join(sorted(known))}")
            found.update(processor)
        else:
            for part in (processor, getattr(processor, "layout", None), getattr(processor, "limits", None)):
                found.update({k: v for k in known if (v := getattr(part, k, None)) is not None})
        if "vector_bits" not in found:
            # not TVM's llvm_get_vector_width: it says 512 for x86-64-v3, which has no AVX-512
            widths = (width for feature, width in VECTOR_BITS.items() if target_has_features(feature, target))
            found["vector_bits"] = next(widths, Blocking.vector_bits)
        return Blocking(**found)

    @property
    def lanes(self) -> int:
        """Float32 values of a vector register."""
        return self.vector_bits // 32

    def lanes_in(self, extent: int) -> int:
        """The widest vector, of at most `lanes`, that divides `extent`."""
        lanes = self.lanes
        while extent % lanes:
            lanes //= 2
        return lanes

    def rows_in_registers(self, columns: int) -> int:
        """How many rows of sums, `columns` registers each, fit beside a row of the weight and an element of x."""
        return max(1, (self.vector_registers - columns - 1) // columns)
