"""Schemes by name: how a weight is stored, and how a layer uses it.

| scheme | matrices (linear weights, token table) | arithmetic, KV cache | targets |
| --- | --- | --- | --- |
| q0f32 | float32 | float32 | all |
| q0f16 | float16 | float16, accumulated in float32 | all |
| q16f32 | float16 | float32 | CPUs |
| q8f32 | int8 and a float32 scale a row | float32 | CPUs |

A scheme that stores a matrix in another dtype than it computes with widens it in registers: no dequantised matrix ever
lies in memory. Biases, LayerNorms and position embeddings stay in the dtype of the arithmetic.

An int8 matrix `<name>.weight` is followed by its parameter `<name>.weight_scale`, float32 [N] for N rows (outputs, or
tokens): weight[n, k] = weight_scale[n] * int8[n, k], symmetric, see `rows.py`. The tied token table is one such matrix,
which serves as embedding (a row is dequantised when it is taken) and as head.
"""

from __future__ import annotations

from dataclasses import dataclass

from gpt2_tvm.errors import UserError

SCALE = "_scale"  # what the name of a matrix's scale adds to the matrix's own name


@dataclass(frozen=True)
class Scheme:
    """weight_dtype: how matrices are stored · compute_dtype: activations, KV cache and all other parameters
    (accumulation is float32)."""

    name: str
    weight_dtype: str
    compute_dtype: str

    @property
    def scaled(self) -> bool:
        """Whether a matrix has a scale a row."""
        return self.weight_dtype == "int8"

    @property
    def widened(self) -> bool:
        """Whether matrices are stored in another dtype than they are computed with."""
        return self.weight_dtype != self.compute_dtype


SCHEMES: dict[str, Scheme] = {
    s.name: s
    for s in (
        Scheme("q0f32", "float32", "float32"),
        Scheme("q0f16", "float16", "float16"),
        Scheme("q16f32", "float16", "float32"),
        Scheme("q8f32", "int8", "float32"),
    )
}


def get_scheme(name: str) -> Scheme:
    """The scheme of that name; UserError lists the known ones."""
    if name not in SCHEMES:
        raise UserError(f"unknown quantization {name!r}; choose one of {', '.join(SCHEMES)}")
    return SCHEMES[name]
