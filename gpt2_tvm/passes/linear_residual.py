"""`linear-residual`: a linear layer and the residual add after it are one function.

FuseOps does that by itself; where the pass is off, a fence between the two keeps it from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import tvm_ffi

from gpt2_tvm.passes.graph import arguments, calls, with_fences
from gpt2_tvm.passes.linear_gelu import ACTIVATIONS

if TYPE_CHECKING:
    from targets import DeviceTarget

PRODUCTS = ("NT_matmul", "packed_matmul", "dequantise_matmul")
ELEMENTWISE = ("add", "multiply", "cast", *ACTIVATIONS)


def before_fusion(on: bool, target: DeviceTarget) -> Any:
    return None if on else with_fences("KeepResidualsApart", residual)


def residual(binding: Any, of: Mapping[Any, Any]) -> Any | None:
    """Of an add of a linear layer's result and something of its shape, the former; None for any other binding."""
    if not calls(binding.value, "add"):
        return None
    linear, other = arguments(binding.value)
    if not tvm_ffi.structural_equal(linear.ty.shape, other.ty.shape):
        return None  # a bias
    made = of.get(linear)
    while made is not None and calls(made.value, *ELEMENTWISE):
        made = of.get(arguments(made.value)[0])
    return linear if made is not None and calls(made.value, *PRODUCTS) else None
