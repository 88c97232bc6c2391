"""How a matrix [N, K] lies in memory, by scheme and layout: its arrays, their conversion, and an element of it in TIR.

| stored as | rows (GPUs) | panels of NR rows (CPUs) |
| --- | --- | --- |
| a float dtype | [N, K] | [P, K, NR] |
| float16 for float32 arithmetic | words [N, K/2] | float16 [P, K, NR] |
| int8 | words [N, K/4], scales [N] | int8 [P, K, NR], scales [N] |
| 4 bits | words [N, K/8], scales [N, K/32] | words [P, K/8, NR], scales [P, K/32, NR] |

Words are uint32, P is ceil(N / NR), and what K/2, K/4, K/8, K/32 leave over is filled up with zeros. On a CPU a vector
register holds neighbouring rows, so there the words of NR rows lie beside each other; a GPU's thread takes neighbouring
words of one row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from gpt2_tvm.quantization import SCALE, Scheme, groups, words
from gpt2_tvm.quantization.rows import quantise_rows

if TYPE_CHECKING:
    from tvm import te

Arrays = Iterator[tuple[str, np.ndarray]]  # (what the array adds to the matrix's name, the array)
Shapes = dict[str, tuple[list[int], str]]  # the same to (shape, dtype)


@dataclass(frozen=True)
class WeightLayout:
    """panel_rows: NR of the packed layout, 0 for plain rows · fast_math: vectorisable activations instead of libm calls
    (CPUs)."""

    panel_rows: int = 0
    fast_math: bool = False

    def shape(self, n: int, k: int) -> list[int]:
        """Stored shape of an array [n, k]: of a weight that maps k inputs to n outputs."""
        return [-(-n // self.panel_rows), k, self.panel_rows] if self.panel_rows else [n, k]

    def store(self, weight: np.ndarray) -> np.ndarray:
        """[n, k] -> the stored array."""
        from gpt2_tvm.kernels.packed_linear import pack

        return pack(weight, self.panel_rows) if self.panel_rows else np.ascontiguousarray(weight)

    def element(self, stored: te.Tensor, row: Any, column: Any) -> Any:
        """Element [row, column] of the array that `stored` holds."""
        if self.panel_rows:
            return stored[row // self.panel_rows, column, row % self.panel_rows]
        return stored[row, column]


class Form:
    """A matrix in a float dtype; the base of the others.

    row_scale: whether `unscaled_element` leaves out a scale that belongs to the whole row, which the product multiplies
    its sum by. in_words: whether an element is a part of a word.
    """

    row_scale = False
    in_words = False

    def __init__(self, dtype: str, layout: WeightLayout) -> None:
        self.dtype, self.layout = dtype, layout

    def parameters(self, n: int, k: int) -> Shapes:
        """The arrays of a matrix [n, k], in order."""
        return {"": (self.layout.shape(n, k), self.dtype)}

    def store(self, name: str, weight: np.ndarray) -> Arrays:
        """A matrix of any float dtype -> its arrays, in order. UserError, with `name`, for what cannot be stored."""
        from gpt2_tvm.weights import convert

        yield "", self.layout.store(convert(name, weight, self.dtype))

    def values(self, arrays: Sequence[np.ndarray], n: int, k: int) -> np.ndarray:
        """float32 [n, k]: the matrix that stored arrays stand for."""
        return self._rows(arrays[0], n, k).astype(np.float32)

    def unscaled_element(self, stored: Sequence[te.Tensor], row: Any, column: Any) -> Any:
        """Element [row, column], float32, in TIR, but for the scale of its row."""
        return self.layout.element(stored[0], row, column).astype("float32")

    def element(self, stored: Sequence[te.Tensor], row: Any, column: Any) -> Any:
        """Element [row, column], float32, in TIR."""
        value = self.unscaled_element(stored, row, column)
        return value * stored[1][row] if self.row_scale else value

    def _rows(self, array: np.ndarray, n: int, k: int) -> np.ndarray:
        """A stored array back as [n, k]."""
        if not self.layout.panel_rows:
            return array
        return array.transpose(0, 2, 1).reshape(-1, k)[:n]


class HalfWords(Form):
    """Float16 in words, two neighbours of a row in each."""

    in_words = True

    def parameters(self, n: int, k: int) -> Shapes:
        return {"": ([n, words.half_words_of(k)], "uint32")}

    def store(self, name: str, weight: np.ndarray) -> Arrays:
        from gpt2_tvm.weights import convert

        yield "", words.pack_halves(convert(name, weight, self.dtype))

    def values(self, arrays: Sequence[np.ndarray], n: int, k: int) -> np.ndarray:
        return words.unpack_halves(arrays[0], k).astype(np.float32)

    def unscaled_element(self, stored: Sequence[te.Tensor], row: Any, column: Any) -> Any:
        from gpt2_tvm.kernels.dequantise import half

        return half(stored[0][row, column // words.HALVES], column)


class Int8(Form):
    """Int8 with a scale a row, in panels."""

    row_scale = True

    def parameters(self, n: int, k: int) -> Shapes:
        return {"": (self.layout.shape(n, k), "int8"), SCALE: ([n], "float32")}

    def store(self, name: str, weight: np.ndarray) -> Arrays:
        quantised, scales = quantise_rows(name, weight)
        yield "", self.layout.store(quantised)
        yield SCALE, scales

    def values(self, arrays: Sequence[np.ndarray], n: int, k: int) -> np.ndarray:
        return self._rows(arrays[0], n, k) * arrays[1][:, None]


class Int8Words(Int8):
    """The same in words, four neighbours of a row in each."""

    in_words = True

    def parameters(self, n: int, k: int) -> Shapes:
        return {"": ([n, words.words_of(k)], "uint32"), SCALE: ([n], "float32")}

    def store(self, name: str, weight: np.ndarray) -> Arrays:
        quantised, scales = quantise_rows(name, weight)
        yield "", words.pack_words(quantised)
        yield SCALE, scales

    def values(self, arrays: Sequence[np.ndarray], n: int, k: int) -> np.ndarray:
        return words.unpack_words(arrays[0], k) * arrays[1][:, None]

    def unscaled_element(self, stored: Sequence[te.Tensor], row: Any, column: Any) -> Any:
        from gpt2_tvm.kernels.dequantise import signed_byte

        return signed_byte(stored[0][row, column // words.A_WORD], column)


class Int4(Form):
    """Four bits with a scale for 32 neighbours, in words of eight; in rows or in panels of rows."""

    in_words = True

    def __init__(self, scale_dtype: str, layout: WeightLayout) -> None:
        super().__init__("uint32", layout)
        self.scale_dtype = scale_dtype

    def parameters(self, n: int, k: int) -> Shapes:
        return {
            "": (self.layout.shape(n, groups.words_of(k)), "uint32"),
            SCALE: (self.layout.shape(n, groups.groups_of(k)), self.scale_dtype),
        }

    def store(self, name: str, weight: np.ndarray) -> Arrays:
        packed, scales = groups.quantise_groups(name, weight, self.scale_dtype)
        yield "", self.layout.store(packed)
        yield SCALE, self.layout.store(scales)

    def values(self, arrays: Sequence[np.ndarray], n: int, k: int) -> np.ndarray:
        packed = self._rows(arrays[0], n, groups.words_of(k))
        return groups.dequantise_groups(packed, self._rows(arrays[1], n, groups.groups_of(k)), k)

    def unscaled_element(self, stored: Sequence[te.Tensor], row: Any, column: Any) -> Any:
        from gpt2_tvm.kernels.dequantise import nibble

        q = nibble(self.layout.element(stored[0], row, column // groups.A_WORD), column)
        scale = self.layout.element(stored[1], row, column // groups.GROUP)
        return (q - float(groups.ZERO)) * scale.astype("float32")


def form_of(scheme: Scheme, layout: WeightLayout) -> Form:
    """How `scheme` stores a matrix on a target with that layout."""
    if scheme.weight_dtype == "int8":
        return (Int8 if layout.panel_rows else Int8Words)("int8", layout)
    if scheme.weight_dtype == "int4":
        return Int4(scheme.compute_dtype, layout)
    if scheme.widened and not layout.panel_rows:
        return HalfWords(scheme.weight_dtype, layout)
    return Form(scheme.weight_dtype, layout)
