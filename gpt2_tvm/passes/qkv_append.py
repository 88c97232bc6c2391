"""`qkv-append`: a few rows' keys and values go into the cache in the attention kernel that reads them from qkv.

Of two launches one is left; the kernel (`kernels/gpu_decode_attention.py`) comes in both forms.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import tvm
from tvm import relax

from gpt2_tvm.kernels.spec import GpuLimits
from gpt2_tvm.passes.graph import (
    INPLACE,
    add_function,
    arguments,
    bindings,
    call_tir,
    callee,
    calls,
    rewriting,
    uses,
    without_unused,
)

if TYPE_CHECKING:
    from targets import DeviceTarget

ATTENTION = ("decode_attention", "tree_attention")


def before_fusion(on: bool, target: DeviceTarget) -> Any:
    if not on:
        return None
    from gpt2_tvm.kernels.attention_forms import appending

    limits = GpuLimits.of_target(target.tvm_target())

    def rewrite(mod: tvm.IRModule, func: relax.Function) -> relax.Function | None:
        of = {binding.var: binding for binding in bindings(func)}
        readers = uses(func)
        made: list[Any] = []
        for binding in bindings(func):
            append = _append(binding, of)
            kernel = None
            if append is not None and readers[append.var] == [binding.var]:
                kernel = appending(mod[callee(binding.value)], limits)
            if kernel is None or append is None:
                made.append(binding)
                continue
            qkv, positions, lengths, cache = arguments(append.value)
            inputs = [qkv, positions, lengths, cache, *arguments(binding.value)[4:]]
            name = callee(binding.value).name_hint
            prim = add_function(mod, f"{name.rstrip('0123456789')}_append", kernel)
            value = call_tir(prim, inputs, [cache.ty, binding.var.ty], inplace=[3, -1])
            both = relax.DataflowVar(f"{binding.var.name}_both", relax.TupleType([cache.ty, binding.var.ty]))
            made += [relax.VarBinding(both, value), relax.VarBinding(binding.var, relax.TupleGetItem(both, 1))]
        return without_unused(func, made, "kv_append") if len(made) > len(of) else None

    return rewriting("AppendInAttention", rewrite)


def _append(binding: Any, of: dict[Any, Any]) -> Any | None:
    """The kv_append whose cache an attention of a fixed number of rows reads, of the same qkv."""
    if not calls(binding.value, *ATTENTION):
        return None
    qkv, cache = arguments(binding.value)[0], arguments(binding.value)[3]
    append = of.get(cache)
    if append is None or not calls(append.value, "kv_append") or str(append.value.op.name) != INPLACE:
        return None
    return append if arguments(append.value)[0].same_as(qkv) else None
