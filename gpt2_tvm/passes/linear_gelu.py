"""`linear-gelu`: a linear layer and the activation after it are one function.

FuseOps does that by itself; where the pass is off, a fence between the two keeps it from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from gpt2_tvm.passes.graph import arguments, calls, with_fences

if TYPE_CHECKING:
    from targets import DeviceTarget

ACTIVATIONS = ("gelu_new", "gelu", "relu", "silu", "tanh")


def before_fusion(on: bool, target: DeviceTarget) -> Any:
    return None if on else with_fences("KeepActivationsApart", _cut)


def _cut(binding: Any, of: Mapping[Any, Any]) -> Any | None:
    return arguments(binding.value)[0] if calls(binding.value, *ACTIVATIONS) else None
