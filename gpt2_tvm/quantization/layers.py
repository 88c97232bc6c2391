"""Linear layers and token tables for each layout of a weight.

`rows`: [N, K] as in PyTorch; the product becomes NT_matmul, which DLight's GEMV and Matmul take. Quantised, it is
words [N, K/2, K/4 or K/8], and the product spreads them where it loads them (`kernels/dequantise.py`).
`packed`: panels [ceil(N/NR), K, NR] (`kernels/packed_linear.py`): a CPU streams it once, a vector register wide, for
one row or many.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tvm import te, tirx
from tvm.relax.frontend import nn
from tvm.relax.frontend.nn import Tensor, op

from gpt2_tvm.kernels.dequantise import ATTRIBUTES, dequantised_matmul, grouped_matmul
from gpt2_tvm.kernels.math import activation as activate
from gpt2_tvm.kernels.packed_linear import packed_matmul
from gpt2_tvm.quantization import SCALE, Scheme
from gpt2_tvm.quantization.forms import WeightLayout, form_of

__all__ = ["Linear", "Matrix", "WeightLayout"]


class Matrix(nn.Module):
    """A stored weight [out_features, in_features], with its scales where the scheme has them, and its product; no bias.

    Used as the token table too: `parameters_of_rows` and `row_element`.
    """

    def __init__(self, in_features: int, out_features: int, scheme: Scheme, layout: WeightLayout) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.layout = layout
        self.form = form_of(scheme, layout)
        self.compute_dtype = scheme.compute_dtype
        self.quantised = scheme.scaled
        shapes = self.form.parameters(out_features, in_features)
        self.weight = nn.Parameter(*shapes[""])
        if SCALE in shapes:
            self.weight_scale = nn.Parameter(*shapes[SCALE])

    def product(self, x: Tensor) -> Tensor:
        """[b, n, K] -> [b, n, N] float32. A row's scale multiplies the finished sum, once an output."""
        n, form, packed = self.out_features, self.form, bool(self.layout.panel_rows)
        if not (self.quantised or form.in_words):
            if not packed:
                return op.matmul(x, op.permute_dims(self.weight), out_dtype="float32")
            return op.tensor_expr_op(lambda x, w: packed_matmul(x, w, n), "packed_matmul", [x, self.weight])
        stored = [self.weight, self.weight_scale] if self.quantised and not form.row_scale else [self.weight]
        if not packed:
            y = op.tensor_expr_op(
                lambda x, *w: dequantised_matmul(x, w, form.unscaled_element, n, self.compute_dtype),
                "dequantise_matmul",
                [x, *stored],
                attrs=ATTRIBUTES,
            )
        elif form.row_scale:
            y = op.tensor_expr_op(lambda x, w: packed_matmul(x, w, n), "packed_matmul", [x, self.weight])
        else:
            y = op.tensor_expr_op(
                lambda x, *w: grouped_matmul(x, w, form.unscaled_element, n), "packed_matmul", [x, *stored]
            )
        return op.multiply(y, self.weight_scale) if form.row_scale else y

    def parameters_of_rows(self) -> list[Tensor]:
        """What `row_element` needs as arguments of the function that it is used in."""
        return [self.weight, self.weight_scale] if self.quantised else [self.weight]

    def row_element(self, parameters: Sequence[te.Tensor], row: tirx.Expr, column: tirx.Expr, dtype: str) -> tirx.Expr:
        """Element [row, column] of the matrix as `dtype`, dequantised."""
        if not (self.quantised or self.form.in_words):
            return self.layout.element(parameters[0], row, column).astype(dtype)
        return self.form.element(parameters, row, column).astype(dtype)


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
