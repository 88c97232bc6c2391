"""Schemes by name: how a weight is stored, and how a layer uses it.

| scheme | linear weights | arithmetic |
| --- | --- | --- |
| q0f32 | float32 | float32 |
| q0f16 | float16 | float16, accumulated in float32 |
"""

from __future__ import annotations

from dataclasses import dataclass

from gpt2_tvm.errors import UserError


@dataclass(frozen=True)
class Scheme:
    """weight_dtype: how linear weights and tables are stored · compute_dtype: activations and KV cache (accumulation is
    float32)."""

    name: str
    weight_dtype: str
    compute_dtype: str


SCHEMES: dict[str, Scheme] = {
    s.name: s for s in (Scheme("q0f32", "float32", "float32"), Scheme("q0f16", "float16", "float16"))
}


def get_scheme(name: str) -> Scheme:
    """The scheme of that name; UserError lists the known ones."""
    if name not in SCHEMES:
        raise UserError(f"unknown quantization {name!r}; choose one of {', '.join(SCHEMES)}")
    return SCHEMES[name]
