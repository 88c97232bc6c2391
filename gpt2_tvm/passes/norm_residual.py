"""`norm-residual`: a residual add that stands alone, and the LayerNorm that reads its result, are one function.

It has two results: the sum, which the next residual add reads again, and the normalised rows. Where `linear-residual`
is on the add is part of the linear layer before it, and nothing is left to do here; where `norm-gemv` is on, LayerNorm
has joined the product after it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import tvm
from tvm import relax
from tvm.ir import Call

from gpt2_tvm.passes.graph import arguments, bindings, callee, calls, is_group, outline, rewriting, used, with_bindings

if TYPE_CHECKING:
    from targets import DeviceTarget


def after_fusion(on: bool, target: DeviceTarget) -> Any:
    return rewriting("NormWithResidual", _rewrite) if on else None


def _rewrite(mod: tvm.IRModule, func: relax.Function) -> relax.Function | None:
    of = {binding.var: binding for binding in bindings(func)}
    made: list[Any] = []
    joined = False
    for binding in bindings(func):
        add = of.get(arguments(binding.value)[0]) if calls(binding.value, "layer_norm") else None
        if add is None or not made or not _is_add(mod, add) or not _untouched(made, add):
            made.append(binding)
            continue
        made = [b for b in made if not b.var.same_as(add.var)]
        called = callee(add.value).name_hint.removeprefix("fused_")
        name = f"fused_{called}_{callee(binding.value).name_hint}"
        group, given = outline(mod, name, [add, binding], [add.var, binding.var])
        ty = relax.TupleType([add.var.ty, binding.var.ty])
        both = relax.DataflowVar(f"{binding.var.name}_both", ty)
        made.append(relax.VarBinding(both, Call(group, given, ret_ty=ty)))
        made += [relax.VarBinding(v, relax.TupleGetItem(both, i)) for i, v in enumerate((add.var, binding.var))]
        joined = True
    return with_bindings(func, made) if joined else None


def _is_add(mod: tvm.IRModule, binding: Any) -> bool:
    """Whether a binding is an add of two tensors of its result's shape, with casts."""
    target = callee(binding.value)
    group = mod[target] if target is not None else None
    inside = bindings(group) if is_group(group) else [binding]
    if target is None or not all(calls(b.value, "add", "cast") for b in inside):
        return False
    (add,) = [b for b in inside if calls(b.value, "add")] or [None]
    return add is not None and all(len(a.ty.shape.values) == 3 for a in arguments(add.value))


def _untouched(made: list[Any], add: Any) -> bool:
    """Whether nothing between the add and here reads its result."""
    at = next((i for i, b in enumerate(made) if b.var.same_as(add.var)), None)
    return at is not None and not any(v.same_as(add.var) for b in made[at + 1 :] for v in used(b.value))
