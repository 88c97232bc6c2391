"""Products with weights that are whole numbers, or float16, packed into words of 32 bits, as `te` expressions.

Two forms, for two layouts of a weight (`quantization/forms.py`):

`dequantised_matmul`, for weights [N, words]: a stage that spreads the words into elements, and the product that reads
them. A schedule rule inlines the first stage into whatever loads a weight (registers of a GEMV, a shared-memory tile of
a matmul), so that the matrix of floats, which the stage would be by itself, never exists.

`grouped_matmul`, for weights in panels on a CPU: one stage that spreads as it multiplies.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tvm import te, tirx

WORD_BITS = 32
# FuseOps must see a product that elementwise operators may follow; two stages look opaque to it
ATTRIBUTES = {"op_pattern": 4}

Element = Callable[[Sequence[te.Tensor], Any, Any], Any]  # (stored arrays, row, column) -> float32


# uint32 becomes int32 by reinterpretation: TVM's WebGPU code generation fails on casts between vectors of integers


def signed_byte(word: Any, column: Any) -> Any:
    """Byte `column` % 4 of a uint32, lowest first, as a float32 from -128 to 127."""
    shift = (column % 4).astype("uint32") * tirx.const(8, "uint32")  # a product: TVM's simplifier breaks on differences
    # the byte to the top, then down again with its sign
    top = tirx.const(WORD_BITS - 8, "int32")
    return ((tirx.reinterpret("int32", word >> shift) << top) >> top).astype("float32")


def nibble(word: Any, column: Any) -> Any:
    """Four bits, number `column` % 8 of a uint32, lowest first, as a float32 from 0 to 15."""
    shift = (column % 8).astype("uint32") * tirx.const(4, "uint32")
    # as int32, which every device converts in one instruction
    return tirx.reinterpret("int32", (word >> shift) & tirx.const(15, "uint32")).astype("float32")


UNPACK = "unpack2x16float"  # of WGSL: two float16 in a uint32 -> two float32


def unpacked(word: Any) -> Any:
    """The two float16 of a uint32 as a vector of two float32, on WebGPU."""
    return tirx.call_pure_extern("float32x2", UNPACK, word)


def half(word: Any, column: Any) -> Any:
    """Float16 number `column` % 2 of a uint32, lowest first, as a float32, on WebGPU."""
    shift = (column % 2).astype("uint32") * tirx.const(16, "uint32")
    return tirx.Shuffle([unpacked(word >> shift)], [tirx.const(0, "int32")])


def dequantised_matmul(
    x: te.Tensor, stored: Sequence[te.Tensor], element: Element, out_features: int, dtype: str
) -> te.Tensor:
    """x [b, n, K] times the transpose of the weight that `element` reads from `stored` -> [b, n, N] float32.

    dtype: of the spread elements, which decides what a matmul may multiply with: "float16" for tensor cores. The sum is
    float32. To be emitted with `ATTRIBUTES`.
    """
    b, n, k_extent = x.shape
    spread = te.compute((out_features, k_extent), lambda o, k: element(stored, o, k).astype(dtype), name="dequantise")
    k = te.reduce_axis((0, k_extent), name="k")
    return te.compute(
        (b, n, out_features),
        lambda i, t, o: te.sum(x[i, t, k].astype("float32") * spread[o, k].astype("float32"), axis=k),
        name="matmul",
    )


def grouped_matmul(x: te.Tensor, stored: Sequence[te.Tensor], element: Element, out_features: int) -> te.Tensor:
    """The same as one stage, x [b, n, K] -> [b, n, N] float32, for the CPU's rules (`schedules/cpu_matmul.py`)."""
    b, n, k_extent = x.shape
    k = te.reduce_axis((0, k_extent), name="k")
    return te.compute(
        (b, n, out_features),
        lambda i, t, o: te.sum(x[i, t, k].astype("float32") * element(stored, o, k), axis=k),
        name="packed_matmul",
    )
