"""Schemes by name: how a weight is stored, and how a layer uses it.

| scheme | matrices (linear weights, token table) | arithmetic, KV cache | targets |
| --- | --- | --- | --- |
| q0f32 | float32 | float32 | all |
| q0f16 | float16 | float16, accumulated in float32 | all |
| q0bf16 | bfloat16 | bfloat16, accumulated in float32 | CPUs |
| q16f32 | float16 | float32 | CPUs, WebGPU |
| q8f32 | int8 and a float32 scale a row | float32 | all |
| q8f16 | int8 and a float32 scale a row | float16, accumulated in float32 | all |
| q4f32_1 | 4 bits and a float32 scale for 32 neighbours of a row | float32 | all |
| q4f16_1 | 4 bits and a float16 scale for 32 neighbours of a row | float16, accumulated in float32 | all |

A scheme that stores a matrix in another dtype than it computes with widens it in registers, or in the tile of shared
memory that a block multiplies: no dequantised matrix ever lies in memory. Biases, LayerNorms and position embeddings
stay in the dtype of the arithmetic.

A quantised matrix `<name>.weight` is followed by its parameter `<name>.weight_scale`. Int8: float32 [N] for N rows
(outputs, or tokens), weight[n, k] = weight_scale[n] * int8[n, k], symmetric, see `rows.py`. 4 bits: [N, K/32],
weight[n, k] = weight_scale[n, k // 32] * (q[n, k] - 7), mlc-llm's layout, see `groups.py`. The tied token table is one
such matrix, which serves as embedding (a row is dequantised when it is taken) and as head. How each lies in memory is
the target's choice: `forms.py`.

`-float-embedding` and `-float-head` after a quantised scheme's name (q8f32-float-embedding) keep the token table, or an
untied head, in the dtype of the arithmetic; in a tied model the table is both, and either keeps it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from gpt2_tvm.errors import UserError

SCALE = "_scale"  # what the name of a matrix's scale adds to the matrix's own name
TABLES = ("embedding", "head")  # matrices that may stay floats


@dataclass(frozen=True)
class Scheme:
    """weight_dtype: how matrices are stored ("int4": 4 bits) · compute_dtype: activations, KV cache and all other
    parameters (accumulation is float32) · kinds: of the targets that have it, () for all · float_tables: those of
    `TABLES` that are not quantised."""

    name: str
    weight_dtype: str
    compute_dtype: str
    kinds: tuple[str, ...] = ()
    float_tables: tuple[str, ...] = ()

    @property
    def scaled(self) -> bool:
        """Whether a matrix has scales."""
        return self.weight_dtype in ("int8", "int4")

    @property
    def widened(self) -> bool:
        """Whether matrices are stored in another dtype than they are computed with."""
        return self.weight_dtype != self.compute_dtype

    def of_table(self, *roles: str) -> Scheme:
        """The scheme of a matrix with these roles in `TABLES`: this one, or one of floats."""
        if not set(roles) & set(self.float_tables):
            return self
        return replace(self, weight_dtype=self.compute_dtype, float_tables=())

    def fits(self, kind: str) -> bool:
        """Whether targets of that kind have the scheme."""
        return not self.kinds or kind in self.kinds


SCHEMES: dict[str, Scheme] = {
    s.name: s
    for s in (
        Scheme("q0f32", "float32", "float32"),
        Scheme("q0f16", "float16", "float16"),
        Scheme("q0bf16", "bfloat16", "bfloat16", kinds=("cpu",)),
        Scheme("q16f32", "float16", "float32", kinds=("cpu", "webgpu")),
        Scheme("q8f32", "int8", "float32"),
        Scheme("q8f16", "int8", "float16"),
        Scheme("q4f32_1", "int4", "float32"),
        Scheme("q4f16_1", "int4", "float16"),
    )
}


def get_scheme(name: str) -> Scheme:
    """The scheme of that name, with its -float- options; UserError lists the known ones."""
    base, *options = name.split("-float-")
    scheme = SCHEMES.get(base)
    if scheme is None or not set(options) <= set(TABLES):
        more = " (after a quantised one: " + ", ".join(f"-float-{table}" for table in TABLES) + ")"
        raise UserError(f"unknown quantization {name!r}; choose one of {', '.join(SCHEMES)}{more}")
    if options and not scheme.scaled:
        raise UserError(f"quantization {name!r}: {base} has no quantised matrices to keep as floats; choose {base}")
    return replace(scheme, name=name, float_tables=tuple(options))


def scheme_for(name: str, target: str, kind: str) -> Scheme:
    """The scheme of that name for a target of a kind; UserError where the target cannot have it."""
    scheme = get_scheme(name)
    if not scheme.fits(kind):
        there = ", ".join(s.name for s in SCHEMES.values() if s.fits(kind))
        only = " and ".join("CPU" if kind == "cpu" else kind for kind in scheme.kinds)
        raise UserError(f"--quantization {name} is for {only} targets; for {target} choose one of {there}")
    return scheme
