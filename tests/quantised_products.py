"""Products with quantised weights for tests: a layer's function as the pipeline's fusion phase makes it, the arrays
that it takes, and its result in float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import tvm
from tvm import tirx
from tvm.relax.frontend import nn
from tvm.target import Target

from gpt2_tvm.pipeline import FUSE, FUSED, GRAPH, LEGALIZE
from gpt2_tvm.quantization import get_scheme
from gpt2_tvm.quantization.forms import WeightLayout, form_of
from gpt2_tvm.quantization.layers import Linear, Matrix
from gpt2_tvm.schedules.tunable_gemv import TunableGemv, quantised
from targets import load_target

EPILOGUES = ("none", "bias", "gelu", "residual")
ROWS = WeightLayout()  # as on GPUs


@dataclass(frozen=True)
class Layer:
    """x [1, rows, k] (rows: None for symbolic) times a weight [n, k] in a scheme, and what follows it."""

    scheme: str
    rows: int | None
    n: int
    k: int
    epilogue: str = "none"
    layout: WeightLayout = ROWS

    @property
    def dtype(self) -> str:
        """Of x, bias, residual, and with an epilogue of the result."""
        return get_scheme(self.scheme).compute_dtype

    @property
    def out_dtype(self) -> str:
        return "float32" if self.epilogue == "none" else self.dtype


@cache
def function(layer: Layer, target: str = "webgpu") -> tirx.PrimFunc:
    """The layer as one unscheduled function: x, what the scheme stores, [bias, residual], y."""
    scheme = get_scheme(layer.scheme)
    base: Any = Matrix if layer.epilogue == "none" else Linear

    class Wrapped(base):  # parameters by their plain names, which the WGSL harness looks for
        def forward(self, x: nn.Tensor, residual: nn.Tensor) -> nn.Tensor:
            if layer.epilogue == "none":
                return self.product(x)
            activation = "gelu_new" if layer.epilogue == "gelu" else None
            return super().forward(x, activation, residual if layer.epilogue == "residual" else None)

    rows: Any = layer.rows or "rows"
    shapes = {"x": (1, rows, layer.k), "residual": (1, rows, layer.n)}
    made = Wrapped(layer.k, layer.n, scheme, layer.layout)
    mod, _ = made.export_tvm({"forward": {k: nn.spec.Tensor(s, scheme.compute_dtype) for k, s in shapes.items()}})
    with load_target(target).tvm_target():
        mod = tvm.transform.Sequential([make() for make in (*GRAPH, *LEGALIZE, *FUSE, *FUSED)])(mod)
    (func,) = [f for _, f in mod.functions_items() if isinstance(f, tirx.PrimFunc)]
    return func.with_attr("global_symbol", "main")


def gemv(layer: Layer, target: str = "webgpu", choose: Any = None) -> tirx.PrimFunc:
    """The function scheduled by our rule, at `choose`'s point or its own."""
    return scheduled(function(layer, target), TunableGemv(choose or quantised), load_target(target).tvm_target())


def scheduled(func: tirx.PrimFunc, rule: Any, target: Target) -> tirx.PrimFunc:
    with target:
        result = rule.apply(func, target, False)
    assert result is not None, "the rule declined"
    return next(iter(result.mod.functions.values()))


def arguments(layer: Layer, rows: int | None = None, weight: np.ndarray | None = None) -> list[np.ndarray]:
    """The function's arguments in its own order, random; the result's place holds NaN."""
    n, k, count = layer.n, layer.k, rows or layer.rows or 1
    random = np.random.default_rng(n * 1000 + k)
    weight = random.standard_normal((n, k)).astype(np.float32) if weight is None else weight
    stored = [array for _, array in form_of(get_scheme(layer.scheme), layer.layout).store("weight", weight)]
    x = (random.standard_normal((1, count, k)) / k**0.5).astype(layer.dtype)
    given = [x, *stored]
    if layer.epilogue != "none":
        given.append(random.standard_normal(n).astype(layer.dtype))
    if layer.epilogue == "residual":
        given.append(random.standard_normal((1, count, n)).astype(layer.dtype))
    return [*given, np.full((1, count, n), np.nan, layer.out_dtype)]


def expected(layer: Layer, given: Sequence[np.ndarray]) -> np.ndarray:
    """y in float64, of the weight that the stored arrays stand for."""
    form = form_of(get_scheme(layer.scheme), layer.layout)
    count = len(form.parameters(layer.n, layer.k))
    x, stored, rest = given[0], given[1 : 1 + count], [a.astype(np.float64) for a in given[1 + count : -1]]
    y = x.astype(np.float64) @ form.values(stored, layer.n, layer.k).astype(np.float64).T
    if layer.epilogue != "none":
        y = y + rest[0]
    if layer.epilogue == "gelu":
        y = 0.5 * y * (1 + np.tanh(np.sqrt(2 / np.pi) * (y + 0.044715 * y**3)))
    return y + rest[1] if layer.epilogue == "residual" else y


def check(layer: Layer, result: np.ndarray, given: Sequence[np.ndarray]) -> None:
    """Every element is written and within what the dtypes allow of float64."""
    wanted = expected(layer, given)
    assert result.dtype == layer.out_dtype and result.shape == wanted.shape
    share = {"float32": 3e-6, "float16": 1e-3, "bfloat16": 8e-3}[layer.out_dtype]
    assert float(np.abs(result.astype(np.float64) - wanted).max()) <= share * max(1.0, float(np.abs(wanted).max()))
