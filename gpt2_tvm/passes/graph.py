"""Reading and rewriting the bindings of a Relax function: what our graph passes have in common.

The exported functions are flat: one dataflow block of calls, each bound to a variable. A pass here takes that list,
makes another, and puts it back; variables keep their identity, so what is not rewritten stays as it is.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import tvm
import tvm_ffi
from tvm import relax, tirx
from tvm.ir import Call, GlobalVar

CALL_TIR, INPLACE = "relax.call_tir", "relax.call_tir_inplace"
FENCE = "relax.builtin.stop_lift_params"  # an identity that FuseOps knows nothing of, and so does not cross
SKIPPED = re.compile(r"_?\d+(?=_|$)")


def functions(mod: tvm.IRModule) -> Iterator[tuple[GlobalVar, relax.Function]]:
    """The module's exported Relax functions (not the ones that FuseOps made), in name order."""
    for var, func in sorted(mod.functions_items(), key=lambda item: item[0].name_hint):
        if isinstance(func, relax.Function) and not is_group(func):
            yield var, func


def is_group(func: Any) -> bool:
    """Whether FuseOps made this function, to become one PrimFunc."""
    return isinstance(func, relax.Function) and func.attrs is not None and "Primitive" in func.attrs


def bindings(func: relax.Function) -> list[Any]:
    """All bindings, in order."""
    return [binding for block in func.body.blocks for binding in block.bindings]


def with_bindings(func: relax.Function, made: Sequence[Any]) -> relax.Function:
    """`func` with these bindings, in one dataflow block, instead of its own."""
    body = relax.SeqExpr([relax.DataflowBlock(list(made))], func.body.body)
    return relax.Function(func.params, body, func.ret_ty, func.is_pure, func.attrs)


def callee(value: Any) -> Any:
    """The GlobalVar of the function of this module that a value calls; None for anything else."""
    if not isinstance(value, Call):
        return None
    if isinstance(value.op, GlobalVar):
        return value.op
    return value.args[0] if str(getattr(value.op, "name", "")) in (CALL_TIR, INPLACE) else None


def arguments(value: Any) -> list[Any]:
    """What a value passes to its `callee`."""
    return list(value.args) if isinstance(value.op, GlobalVar) else list(value.args[1].fields)


def calls(value: Any, *names: str) -> bool:
    """Whether a value calls a PrimFunc of one of these names, whatever number TVM added."""
    found = callee(value)
    return found is not None and SKIPPED.sub("", found.name_hint) in names


def used(value: Any) -> list[Any]:
    """The variables that a value reads."""
    if isinstance(value, Call):
        return [var for argument in value.args for var in used(argument)]
    if isinstance(value, relax.Tuple):
        return [var for field in value.fields for var in used(field)]
    if isinstance(value, relax.TupleGetItem):
        return used(value.tuple_value)
    return [value] if isinstance(value, relax.Var) else []


def uses(func: relax.Function) -> dict[Any, list[Any]]:
    """{variable: the variables whose bindings read it, None for the result of the function}."""
    found: dict[Any, list[Any]] = {}
    for binding in bindings(func):
        for var in used(binding.value):
            found.setdefault(var, []).append(binding.var)
    for var in used(func.body.body):
        found.setdefault(var, []).append(None)
    return found


def call_tir(prim: GlobalVar, given: Sequence[Any], out: Any, inplace: Sequence[int] | None = None) -> Call:
    """A call of a PrimFunc; out: its result's type, or a list of them."""
    if inplace is None:
        made = relax.op.call_tir(prim, relax.Tuple(list(given)), out)
    else:
        made = relax.op.call_tir_inplace(prim, relax.Tuple(list(given)), list(inplace), out)
    # typed at once: FuseOps knows functions by their hash, which must not change when a type is found out later
    result = relax.TupleType(out) if isinstance(out, list) else out
    return Call(made.op, made.args, made.attrs, made.ty_args, made.span, ret_ty=result)


def fresh_name(mod: tvm.IRModule, name: str) -> str:
    """`name`, with the first number behind it that the module has not taken."""
    taken = {var.name_hint for var in mod.get_global_vars()}
    if name not in taken:
        return name
    return next(f"{name}{i}" for i in range(1, len(taken) + 2) if f"{name}{i}" not in taken)


def add_function(mod: tvm.IRModule, name: str, func: Any) -> GlobalVar:
    """Put `func` into the module, or find the equal one that is there."""
    if isinstance(func, tirx.PrimFunc) and func.attrs and "global_symbol" in func.attrs:
        func = func.without_attr("global_symbol")
    for var, known in mod.functions_items():
        if type(known) is type(func) and var.name_hint.startswith(name) and tvm_ffi.structural_equal(known, func):
            return var
    var = GlobalVar(fresh_name(mod, name))
    relax.expr._update_type(var, func.ty)
    mod[var] = func
    return mod.get_global_var(var.name_hint)


def substitute(value: Any, instead: Mapping[Any, Any], sizes: Mapping[Any, Any] | None = None) -> Any:
    """`value` with other variables, and other symbolic sizes in its types."""
    if isinstance(value, relax.Var):
        return instead.get(value, value)
    if isinstance(value, relax.Tuple):
        return relax.Tuple([substitute(field, instead, sizes) for field in value.fields])
    if isinstance(value, relax.TupleGetItem):
        return relax.TupleGetItem(substitute(value.tuple_value, instead, sizes), value.index)
    if isinstance(value, Call):
        given = [substitute(argument, instead, sizes) for argument in value.args]
        types = [_resized(ty, sizes) for ty in value.ty_args]
        return Call(value.op, given, value.attrs, types, value.span, ret_ty=_resized(value.ty, sizes))
    return value


def _resized(ty: Any, sizes: Mapping[Any, Any] | None) -> Any:
    """A tensor's type, or a tuple of them, with other symbolic sizes."""
    if not sizes:
        return ty
    if isinstance(ty, relax.TupleType):
        return relax.TupleType([_resized(field, sizes) for field in ty.fields])
    if not isinstance(ty, relax.TensorType) or ty.shape is None:
        return ty
    return relax.TensorType([sizes.get(e, e) if isinstance(e, tirx.Var) else e for e in ty.shape.values], ty.dtype)


def outline(mod: tvm.IRModule, name: str, inside: Sequence[Any], results: Sequence[Any]) -> tuple[GlobalVar, list[Any]]:
    """Make one group of several bindings, to become one PrimFunc: a new function of `mod` that holds them, the groups
    that they call taken apart. Returns it and what it must be called with. results: the variables that others need."""
    bound = {binding.var for binding in inside}
    inputs = list(dict.fromkeys(var for binding in inside for var in used(binding.value) if var not in bound))
    params = [relax.Var(str(var.name), var.ty) for var in inputs]
    known: dict[Any, Any] = dict(zip(inputs, params, strict=True))
    block: list[Any] = []

    def copy(binding: Any, value: Any, sizes: Mapping[Any, Any] | None = None) -> Any:
        var = relax.DataflowVar(str(binding.var.name), _resized(binding.var.ty, sizes))
        block.append(relax.VarBinding(var, value))
        return var

    for binding in inside:
        group = mod[binding.value.op] if isinstance(binding.value.op, GlobalVar) else None
        if group is None:
            known[binding.var] = copy(binding, substitute(binding.value, known))
            continue
        given = [substitute(argument, known) for argument in binding.value.args]
        local: dict[Any, Any] = dict(zip(group.params, given, strict=True))
        sizes = {  # the group has symbolic sizes of its own
            inner: outer
            for param, argument in local.items()
            for inner, outer in zip(param.ty.shape.values, argument.ty.shape.values, strict=True)
            if isinstance(inner, tirx.Var)
        }
        for inner in bindings(group):
            local[inner.var] = copy(inner, substitute(inner.value, local, sizes), sizes)
        known[binding.var] = local[group.body.body]
    made = [known[var] for var in results]
    value = made[0] if len(made) == 1 else relax.Tuple(made)
    if len(made) == 1 and block[-1].var.same_as(value):
        value = block.pop().value
    result = relax.Var("result", _type_of(results))
    body = relax.SeqExpr([relax.DataflowBlock([*block, relax.VarBinding(result, value)])], result)
    func = relax.Function(params, body, result.ty, True, tvm.ir.make_node("ir.DictAttrs", Primitive=True))
    return add_function(mod, name, relax.utils.copy_with_new_vars(func)), inputs


def _type_of(results: Sequence[Any]) -> Any:
    return results[0].ty if len(results) == 1 else relax.TupleType([var.ty for var in results])


def rewriting(name: str, rewrite: Callable[[tvm.IRModule, relax.Function], relax.Function | None]) -> Any:
    """A module pass that gives every exported function to `rewrite`, which may add functions to the module it is
    given; None leaves the function as it is."""

    @tvm.transform.module_pass(opt_level=0, name=name)
    def run(mod: tvm.IRModule, _: Any) -> tvm.IRModule:
        out = tvm.IRModule(dict(mod.functions_items()), attrs=mod.attrs)
        for var, func in list(functions(mod)):
            made = rewrite(out, func)
            if made is not None:
                out[var] = made
        return out

    return run


def with_fences(name: str, cut: Callable[[Any, Mapping[Any, Any]], Any | None]) -> Any:
    """A pass that keeps FuseOps from joining across some edges: `cut(binding, bindings by variable)` says which
    variable the binding's function must read as if it came from elsewhere, None for none."""

    def rewrite(mod: tvm.IRModule, func: relax.Function) -> relax.Function | None:
        of = {binding.var: binding for binding in bindings(func)}
        made: list[Any] = []
        for binding in bindings(func):
            read = cut(binding, of)
            if read is None:
                made.append(binding)
                continue
            apart = relax.DataflowVar(f"{read.name}_apart", read.ty)
            made.append(relax.VarBinding(apart, Call(tvm.ir.Op.get(FENCE), [read], ret_ty=read.ty)))
            made.append(relax.VarBinding(binding.var, substitute(binding.value, {read: apart})))
        return with_bindings(func, made) if len(made) > len(of) else None

    return rewriting(name, rewrite)


def remove_fences() -> Any:
    """A pass that takes away what `with_fences` put in."""

    def rewrite(mod: tvm.IRModule, func: relax.Function) -> relax.Function | None:
        instead: dict[Any, Any] = {}
        made = []
        for binding in bindings(func):
            value = substitute(binding.value, instead)
            if isinstance(value, Call) and str(getattr(value.op, "name", "")) == FENCE:
                instead[binding.var] = value.args[0]
            else:
                made.append(relax.VarBinding(binding.var, value))
        return with_bindings(func, made) if instead else None

    return rewriting("RemoveFences", rewrite)


def without_unused(func: relax.Function, made: Sequence[Any], *names: str) -> relax.Function:
    """`func` with the bindings `made`, less calls of `names` whose results nothing reads any more."""
    read = {var for binding in made for var in used(binding.value)} | set(used(func.body.body))
    return with_bindings(func, [b for b in made if b.var in read or not calls(b.value, *names)])
