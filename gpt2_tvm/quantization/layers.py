"""Linear layers and token tables for each layout of a weight.

`rows`: [N, K] as in PyTorch; the product becomes NT_matmul, which DLight's GEMV and Matmul take.
`packed`: panels [ceil(N/NR), K, NR] (`kernels/packed_linear.py`): a CPU streams it once, a vector register wide, for
one row or many.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from tvm import te, tirx
from tvm.relax.frontend import nn
from tvm.relax.frontend.nn import Tensor, op

from gpt2_tvm.kernels.math import activation as activate
from gpt2_tvm.kernels.packed_linear import pack, packed_matmul
from gpt2_tvm.quantization import Scheme


@dataclass(frozen=True)
class WeightLayout:
    """panel_rows: NR of the packed layout, 0 for plain rows · fast_math: vectorisable activations instead of libm calls
    (CPUs)."""

    panel_rows: int = 0
    fast_math: bool = False

    def shape(self, n: int, k: int) -> list[int]:
        """Stored shape of a weight that maps k inputs to n outputs."""
        return [-(-n // self.panel_rows), k, self.panel_rows] if self.panel_rows else [n, k]

    def store(self, weight: np.ndarray) -> np.ndarray:
        """[n, k] -> the stored array."""
        return pack(weight, self.panel_rows) if self.panel_rows else np.ascontiguousarray(weight)

    def element(self, stored: te.Tensor, row: tirx.Expr, column: tirx.Expr) -> tirx.Expr:
        """Element [row, column] of the matrix that `stored` holds."""
        if self.panel_rows:
            return stored[row // self.panel_rows, column, row % self.panel_rows]
        return stored[row, column]


class Matrix(nn.Module):
    """A stored weight [out_features, in_features], with its scales where the scheme has them, and its product; no bias.

    Used as the token table too: `parameters_of_rows` and `row_element`.
    """

    def __init__(self, in_features: int, out_features: int, scheme: Scheme, layout: WeightLayout) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.layout = layout
        self.weight = nn.Parameter(layout.shape(out_features, in_features), scheme.weight_dtype)
        if scheme.scaled:
            self.weight_scale = nn.Parameter([out_features], "float32")
        self.scaled = scheme.scaled

    def product(self, x: Tensor) -> Tensor:
        """[b, n, K] -> [b, n, N] float32. A scale multiplies the finished sum, once an output."""
        if not self.layout.panel_rows:
            return op.matmul(x, op.permute_dims(self.weight), out_dtype="float32")
        out_features = self.out_features
        y = op.tensor_expr_op(lambda x, w: packed_matmul(x, w, out_features), "packed_matmul", [x, self.weight])
        return op.multiply(y, self.weight_scale) if self.scaled else y

    def parameters_of_rows(self) -> list[Tensor]:
        """What `row_element` needs as arguments of the function that it is used in."""
        return [self.weight, self.weight_scale] if self.scaled else [self.weight]

    def row_element(self, parameters: Sequence[te.Tensor], row: tirx.Expr, column: tirx.Expr, dtype: str) -> tirx.Expr:
        """Element [row, column] of the matrix as `dtype`, dequantised."""
        element = self.layout.element(parameters[0], row, column)
        if not self.scaled:
            return element.astype(dtype)
        return (element.astype("float32") * parameters[1][row]).astype(dtype)


class Linear(Matrix):
    """y = activation(x W^T + bias) [+ residual]: accumulated, biased and activated in float32, then stored as computed
    dtype."""

    def __init__(self, in_features: int, out_features: int, scheme: Scheme, layout: WeightLayout) -> None:
        super().__init__(in_features, out_features, scheme, layout)
        self.bias = nn.Parameter([out_features], scheme.compute_dtype)
        self.dtype = scheme.compute_dtype

    def forward(self, x: Tensor, activation: str | None = None, residual: Tensor | None = None) -> Tensor:
        """[b, n, K] -> [b, n, N]."""
        y = op.add(self.product(x), self.bias.astype("float32"))
        if activation is not None:
            fast = self.layout.fast_math
            y = op.tensor_expr_op(lambda y: _elementwise(y, lambda v: activate(activation, v, fast)), activation, [y])
        if residual is not None:
            y = op.add(y, residual.astype("float32"))
        return y.astype(self.dtype)


def _elementwise(y: te.Tensor, f: Callable[[tirx.Expr], tirx.Expr]) -> te.Tensor:
    return te.compute(y.shape, lambda *i: f(y(*i)), name="activation")
