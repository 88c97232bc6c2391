"""A second form of every step with static shapes, `graph_<name>`, whose launches all fall into one CUDA graph.

TVM's `RewriteCUDAGraph` cuts a function into regions whose addresses never change and hands each to
`vm.builtin.cuda_graph.run_or_capture`. Three things stand between a decode step and *one* region:

- Inputs count as moving. Here every argument is a buffer that the runner keeps (ids, positions, lengths, caches), so
  `num_input` is 0.
- The storage of a function's result is left out, since a caller may hold on to it; with it the kernel that writes it.
  Here the result is a view of a buffer that the next step writes again.
- The rewrite also looks at functions that were not meant (a kernel between two intermediates of `prefill` is static to
  it). So it sees the steps' copies alone, and the module keeps the plain functions beside them, for a runner without
  graphs, RPC or another program.

`runners/cuda_graph.py` captures and replays; TVM's own builtin runs the same code where the caller keeps its buffers.
"""

from __future__ import annotations

import re
from collections import Counter
from math import prod
from typing import Any

import tvm
from tvm import relax, tirx
from tvm.ir import GlobalVar

PREFIX = "graph_"
STEPS = re.compile(r"(decode|greedy|sample|verify|keep|speculate|propose|decide|stream)_b\d+(_m\d+)?")
RUN_OR_CAPTURE = "vm.builtin.cuda_graph.run_or_capture"
CACHED_ALLOC = "vm.builtin.cuda_graph.get_cached_alloc"


def graph_steps(mod: tvm.IRModule) -> list[str]:
    """Names of the functions that get a captured form: the steps whose shapes are all known when compiling."""
    names = (var.name_hint for var, func in mod.functions_items() if isinstance(func, relax.Function))
    return sorted(name for name in names if STEPS.fullmatch(name))


def add_graph_steps(mod: tvm.IRModule) -> tvm.IRModule:
    """The module after memory planning (phase "lowered") with `graph_<name>` beside each of `graph_steps`.

    Raises RuntimeError where a step would need more than one graph: it would be no faster, and nobody would see why.
    """
    steps = graph_steps(mod)
    copies: dict[GlobalVar, Any] = {v: f for v, f in mod.functions_items() if isinstance(f, tirx.PrimFunc)}
    for name in steps:
        func = _in_one_region(mod[name])
        func = func.with_attr("global_symbol", PREFIX + name).with_attr("num_input", 0)
        copies[GlobalVar(PREFIX + name)] = func
    with tvm.transform.PassContext(config={"relax.backend.use_cuda_graph": True}):
        rewritten = relax.transform.RewriteCUDAGraph()(tvm.IRModule(copies))
    out = tvm.IRModule(dict(mod.functions_items()), attrs=mod.attrs)
    for var, func in rewritten.functions_items():
        if not isinstance(func, tirx.PrimFunc):
            out[var] = func
    for name in steps:
        outside, graphs = launches(out, PREFIX + name)
        if outside or len(graphs) != 1:
            raise RuntimeError(f"{name} does not fall into one CUDA graph: {len(graphs)} graphs, outside {outside}")
    return out


def _in_one_region(func: relax.Function) -> relax.Function:
    """The function as `RewriteCUDAGraph` needs it: one block, what it returns made outside of the region, from its own
    arguments or, for a new tensor, from planned memory."""
    bindings = [binding for block in func.body.blocks for binding in block.bindings]
    # before the first launch, else they would go into the region and the result, which names them, could not
    first: list[Any] = []
    rest: list[Any] = []
    for binding in bindings:
        value = binding.value
        of_argument = isinstance(value, relax.TupleGetItem) and any(value.tuple_value.same_as(p) for p in func.params)
        (first if of_argument else rest).append(binding)
    result = _origin(func.body.body, {b.var: b.value for b in rest})
    builder = relax.BlockBuilder()
    fields = list(result.fields) if isinstance(result, relax.Tuple) else [result]
    head = fields[0]
    rest = [new for b in rest for new in (_planned(b, builder) if _allocates(b, head) else (b,))]
    # the region must hand out something: TVM's virtual machine cannot return from a closure without a value
    inside = relax.Var("made", head.ty)
    # a builtin ends the region: this is the first thing after the graph
    view = relax.Call(relax.ExternFunc("vm.builtin.reshape"), [inside, head.ty.shape], ty_args=[head.ty])
    view = builder.normalize(view)
    fields[0] = relax.Var("result", view.ty)
    rest += [relax.VarBinding(inside, head), relax.VarBinding(fields[0], view)]
    result = relax.Tuple(fields) if isinstance(result, relax.Tuple) else fields[0]
    body = relax.SeqExpr([relax.BindingBlock([*first, *rest])], result)
    return relax.Function(func.params, body, func.ret_ty, func.is_pure, func.attrs, func.span)


def _origin(expr: Any, values: dict[Any, Any]) -> Any:
    """What a result is made of, through names, tuples and their elements: arguments, and tensors made inside."""
    if isinstance(expr, relax.Tuple):
        return relax.Tuple([_origin(field, values) for field in expr.fields])
    if isinstance(expr, relax.TupleGetItem):
        made = _origin(expr.tuple_value, values)
        return made.fields[expr.index] if isinstance(made, relax.Tuple) else expr
    value = values.get(expr)
    return expr if value is None or isinstance(value, relax.Call) else _origin(value, values)


def _allocates(binding: Any, var: relax.Var) -> bool:
    value = binding.value
    allocates = isinstance(value, relax.Call) and str(getattr(value.op, "name", "")) == "relax.builtin.alloc_tensor"
    return allocates and bool(binding.var.same_as(var))


def _planned(binding: Any, builder: relax.BlockBuilder) -> tuple[Any, Any]:
    """Storage and tensor in place of `R.builtin.alloc_tensor`, which memory planning leaves for results."""
    shape, dtype = binding.value.args[0], str(binding.value.args[1].value)
    nbytes = prod(int(extent) for extent in shape.values) * tvm.DataType(dtype).itemsize
    made = builder.normalize(relax.op.memory.alloc_storage(relax.ShapeExpr([nbytes]), 0, "global", dtype))
    storage = relax.Var("result_storage", made.ty)
    tensor = builder.normalize(relax.op.memory.alloc_tensor(storage, 0, shape, dtype))
    return relax.VarBinding(storage, made), relax.VarBinding(binding.var, tensor)


def launches(mod: tvm.IRModule, name: str) -> tuple[Counter[str], list[Counter[str]]]:
    """(PrimFuncs that function `name` calls itself, for each graph that it runs the PrimFuncs inside), by walking the
    module. Works after `add_graph_steps` and on the final module."""
    outside: Counter[str] = Counter()
    graphs: list[Counter[str]] = []
    for call in _calls(mod[name]):
        target = _callee(call)
        if target is not None and isinstance(mod[target], tirx.PrimFunc):
            outside[target] += 1
        elif captured := _captured(call):
            inner: Counter[str] = Counter()
            for launch in _calls(mod[captured]):
                callee = _callee(launch)
                if callee is not None and isinstance(mod[callee], tirx.PrimFunc):
                    inner[callee] += 1
            graphs.append(inner)
    return outside, graphs


def _calls(func: relax.Function) -> list[relax.Call]:
    found: list[relax.Call] = []
    for block in func.body.blocks:
        found += [b.value for b in block.bindings if isinstance(b.value, relax.Call)]
    return found


def _callee(call: relax.Call) -> str | None:
    """The module's function that a call runs; before and after LowerRuntimeBuiltin."""
    if isinstance(call.op, GlobalVar):
        return str(call.op.name_hint)
    if str(getattr(call.op, "name", "")) == "relax.vm.call_tir_dyn":
        return str(call.args[0].name_hint)
    return None


def _captured(call: relax.Call) -> str | None:
    """The function that a call of run_or_capture captures, None for any other call."""
    flat = [call.op, *call.args]
    if not any(isinstance(a, relax.ExternFunc) and str(a.global_symbol) == RUN_OR_CAPTURE for a in flat):
        return None

    def find(node: Any) -> str | None:
        for part in node.args if isinstance(node, relax.Call) else node.fields if isinstance(node, relax.Tuple) else ():
            if isinstance(part, GlobalVar):
                return str(part.name_hint)
            if (found := find(part)) is not None:
                return found
        return None

    return find(call)
