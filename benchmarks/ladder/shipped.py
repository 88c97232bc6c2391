"""The last steps: the project's own layer, through its own passes and rules, for each way to store a weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import tvm
from tvm import relax
from tvm.relax.frontend import nn

from gpt2_tvm.build import weight_layout
from gpt2_tvm.passes.apply_rules import apply_rules
from gpt2_tvm.pipeline import PLAIN
from gpt2_tvm.quantization import get_scheme
from gpt2_tvm.quantization.layers import Linear, Matrix
from gpt2_tvm.quantization.rows import dequantise_rows, quantise_rows
from gpt2_tvm.schedules.registry import make_rules
from ladder.problem import Problem


@dataclass(frozen=True)
class Shipped:
    """A layer's one function. arguments: names of its inputs in order: x, weight, bias and what the scheme adds. rule:
    which took it. stored: the parameters by these names, as the model stores them. values: the weight [n, k] that
    they stand for, float32.
    """

    executable: Any
    arguments: tuple[str, ...]
    rule: str
    stored: dict[str, np.ndarray]
    values: np.ndarray


def build_layer(p: Problem, scheme_name: str, data: dict[str, np.ndarray]) -> Shipped:
    """The problem as a `Linear` (with GELU) or a `Matrix` (without bias) of the model, compiled as the model is."""
    scheme, target = get_scheme(scheme_name), p.target
    layout = weight_layout(target)

    class Layer(nn.Module):
        def __init__(self) -> None:
            self.layer: Any = (Linear if p.gelu else Matrix)(p.k, p.n, scheme, layout)

        def forward(self, x: nn.Tensor) -> nn.Tensor:
            return self.layer(x, activation="gelu_new") if p.gelu else self.layer.product(x)

    rows: Any = p.rows if p.rows == 1 else "n"
    mod, _ = Layer().export_tvm({"forward": {"x": nn.spec.Tensor((1, rows, p.k), scheme.compute_dtype)}})
    with target.tvm_target():
        mod = tvm.transform.Sequential([make() for make in PLAIN])(mod)
    ((callee, names),) = _calls(mod["forward"])
    func = mod[callee].with_attr("global_symbol", "main")
    scheduled, hits = apply_rules(tvm.IRModule({"main": func}), make_rules(target.rules, target), target.tvm_target())
    executable = tvm.compile(scheduled, target=target.tvm_target())
    arguments = tuple(name.removeprefix("layer.") for name in names)
    stored, values = _stored(data, scheme, layout)
    return Shipped(executable, arguments, hits[0].rule, stored, values)


def _calls(function: Any) -> list[tuple[Any, list[str]]]:
    """(function, names of its arguments) of each call of a PrimFunc."""
    found = []
    for block in function.body.blocks:
        for binding in block.bindings:
            value = binding.value
            if isinstance(value, relax.Call) and value.op == tvm.ir.Op.get("relax.call_tir"):
                found.append((value.args[0], [str(a.name) for a in value.args[1].fields]))
    return found


def _stored(data: dict[str, np.ndarray], scheme: Any, layout: Any) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The layer's parameters as the model's own conversion makes them, and the weight that they stand for."""
    bias = data["bias"].astype(scheme.compute_dtype)
    if scheme.scaled:
        quantised, scales = quantise_rows("weight", data["weight"])
        values = dequantise_rows(quantised, scales)
        return {"weight": layout.store(quantised), "weight_scale": scales, "bias": bias}, values
    weight = data["weight"].astype(scheme.weight_dtype)
    return {"weight": layout.store(weight), "bias": bias}, weight.astype(np.float32)
