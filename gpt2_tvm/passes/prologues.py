"""Joining a product of few rows with what computes its vector: what `norm-gemv` and `combine-gemv` have in common."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import tvm
from tvm import relax, tirx
from tvm.ir import Call

from gpt2_tvm.passes.graph import arguments, bindings, callee, calls, outline, rewriting, uses, without_unused
from gpt2_tvm.passes.linear_residual import PRODUCTS
from gpt2_tvm.schedules.gemv_match import MAX_ROWS

Prepare = Callable[[tvm.IRModule, Any], Any | None]  # (module, producer's binding) -> the binding to join, or None


def join_prologues(name: str, producers: Sequence[str], prepare: Prepare) -> Any:
    """A pass that makes one group of each call of `producers` and the product that alone reads its result, where the
    rows are at most eight and `prepare` agrees."""

    def rewrite(mod: tvm.IRModule, func: relax.Function) -> relax.Function | None:
        readers = uses(func)
        of = {binding.var: binding for binding in bindings(func)}
        made: list[Any] = []
        joined = False
        for binding in bindings(func):
            producer = _producer(mod, binding.value, of, producers)
            if producer is not None and readers[producer.var] == [binding.var] and few_rows(producer.var):
                prepared = prepare(mod, producer)
                if prepared is not None:
                    called = [callee(b.value).name_hint for b in (prepared, binding)]
                    label = f"fused_{called[0]}_{called[1].removeprefix('fused_')}"
                    group, given = outline(mod, label, [prepared, binding], [binding.var])
                    binding = relax.VarBinding(binding.var, Call(group, given, ret_ty=binding.var.ty))
                    joined = True
            made.append(binding)
        return without_unused(func, made, *producers) if joined else None

    return rewriting(name, rewrite)


def few_rows(var: Any) -> tuple[int, int] | None:
    """(rows, elements of one) of a tensor [b, n, K] with one to eight rows, a fixed number; None for others."""
    extents = [int(e) if isinstance(e, tirx.IntImm) else None for e in var.ty.shape.values]
    if len(extents) != 3 or None in extents:
        return None
    b, n, k = (int(e or 0) for e in extents)
    return (b * n, k) if b * n <= MAX_ROWS else None


def _producer(mod: tvm.IRModule, value: Any, of: dict[Any, Any], names: Sequence[str]) -> Any | None:
    """The binding that computes the vector of the product that `value` is (with what follows it)."""
    target = callee(value)
    if target is None:
        return None
    given = arguments(value)
    vector = _vector(mod[target], value, given)
    made = of.get(vector) if vector is not None and given.count(vector) == 1 else None
    return made if made is not None and calls(made.value, *names) else None


def _vector(func: Any, value: Any, given: Sequence[Any]) -> Any | None:
    """Of what a product is called with, the vector; None for a function that is no product, or reads it elsewhere."""
    if not isinstance(func, relax.Function):
        return given[0] if calls(value, *PRODUCTS) else None
    products = [b.value for b in bindings(func) if calls(b.value, *PRODUCTS)]
    if len(products) != 1:
        return None
    inner = arguments(products[0])[0]
    if sum(any(a.same_as(inner) for a in arguments(b.value)) for b in bindings(func)) != 1:
        return None
    return next((outer for param, outer in zip(func.params, given, strict=True) if param.same_as(inner)), None)
