"""How many bytes an element of each kind of tensor takes."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from typing import TYPE_CHECKING

from gpt2_tvm.errors import UserError

if TYPE_CHECKING:
    from gpt2_tvm.quantization import Scheme

BITS = {"float32": 32, "bfloat16": 16, "float16": 16, "float8": 8, "int8": 8, "int4": 4}
SCALED = ("int8", "int4")
INT4_GROUP = 32  # weights that share a scale, as in mlc-llm's q4f16_1
TABLES = ("embedding", "head")  # matrices that may stay floats, as in `quantization.TABLES`


@dataclass(frozen=True)
class Dtypes:
    """One dtype for each kind of tensor.

    Attributes:
        weights: of the linear layers and of the token table. int8 carries a float32 scale for each row of the matrix,
            int4 one in the dtype of the activations for each `INT4_GROUP` weights of a row.
        activations: what passes between kernels; also biases, LayerNorm's weights and the position table.
        cache: keys and values.
        accumulation: sums, hence the logits and, where attention writes them to memory, its scores.
    """

    weights: str = "float32"
    activations: str = "float32"
    cache: str = "float32"
    accumulation: str = "float32"

    def __post_init__(self) -> None:
        for kind, name in asdict(self).items():
            if name not in BITS:
                raise UserError(f"unknown dtype {name!r} for {kind}; choose one of {', '.join(BITS)}")
            if kind in ("activations", "accumulation") and name in SCALED:
                raise UserError(f"{kind} of {name} are not modelled: whole numbers need a scale; choose a float dtype")

    def size(self, kind: str) -> Fraction:
        """Bytes an element of `kind` ("weights", "activations", "cache", "accumulation"), scales not counted."""
        return Fraction(BITS[getattr(self, kind)], 8)

    def matrix_bytes(self, rows: int, columns: int) -> Fraction:
        """Bytes of a weight matrix [rows, columns], its scales included."""
        groups = rows * -(-columns // INT4_GROUP)
        scales = {"int8": Fraction(4 * rows), "int4": self.size("activations") * groups}.get(self.weights, Fraction(0))
        return self.size("weights") * rows * columns + scales

    def scales_an_output(self, columns: int) -> int:
        """Multiplications by a scale that one output of a product with such a matrix takes."""
        return {"int8": 1, "int4": -(-columns // INT4_GROUP)}.get(self.weights, 0)

    def row_bytes(self, columns: int) -> Fraction:
        """Bytes of one row of such a matrix."""
        return self.matrix_bytes(1, columns)

    @property
    def as_floats(self) -> Dtypes:
        """The same where a matrix is not quantised: stored in the dtype of the arithmetic."""
        return replace(self, weights=self.activations)

    @property
    def arithmetic(self) -> str:
        """The dtype whose rate bounds the matrix products: that of the activations."""
        return self.activations

    def describe(self) -> str:
        """The four in one line."""
        return ", ".join(f"{kind} {name}" for kind, name in asdict(self).items())


def stored_as(scheme: Scheme) -> tuple[Dtypes, tuple[str, ...]]:
    """(dtypes of a scheme of weights, those of `TABLES` that stay in floats)."""
    return Dtypes(scheme.weight_dtype, scheme.compute_dtype, scheme.compute_dtype), scheme.float_tables
