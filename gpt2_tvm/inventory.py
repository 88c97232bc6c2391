"""The table of functions in a manifest: what each compiled PrimFunc is for, which rule took it, what it moves and
computes, and how often a call of the model runs it.

Sizes that depend on the caller are texts in the grammar of `expressions`: over b (sequences), n (rows of this call)
and p (tokens that a sequence has in its cache before the call, where attention reads them).
"""

from __future__ import annotations

import re
from collections import Counter
from typing import TYPE_CHECKING, Any

import tvm
import tvm_ffi
from tvm import relax, s_tir, tirx
from tvm.ir import GlobalVar

from gpt2_tvm.artifact import MLC
from gpt2_tvm.expressions import Text, combine, to_text
from gpt2_tvm.schedules.registry import Hit
from gpt2_tvm.work import work_of

if TYPE_CHECKING:
    from gpt2_tvm.build import Plan
    from gpt2_tvm.pipeline import Lowered

AXES = "xyz"
WRITTEN = ("ours", "persistent")  # what stands for rules of functions that come scheduled
ACTIVATIONS = ("gelu_new", "gelu", "relu", "silu", "tanh")
# A parameter's name as Relax has it: transformer_h_0_attn_c_attn_weight.
PARAMETER = re.compile(r"^(?:transformer_)?(?:h_\d+_)?(?P<module>\w+?)_(?P<what>weight|bias)\d*$")


def function_table(lowered: Lowered, plan: Plan) -> dict[str, Any]:
    """The manifest's entries about the compiled functions.

    Returns a dictionary of
    compute_dtype: dtype of activations and caches.
    functions: a row for each PrimFunc that is called: name · role, from the parameters it is called with · rule ·
    kernels, the device kernels it consists of · launched, how many of them one call launches: fewer where the host
    takes one of several by the number of rows · grid, block (of the first; None on a CPU) · shared_memory_bytes a
    block, of the kernel that has most, as scheduled (what TVM adds for reductions across threads is not in it) ·
    bytes, each input read and each output written once · flops, see `work` · calls, {exported function: times it is
    called}. launches: {exported function: kernels launched by one call}. launches_per_decode: of one greedy step at
    the smallest batch.
    """
    bodies = {var.name_hint: f for var, f in lowered.scheduled.functions_items() if isinstance(f, tirx.PrimFunc)}
    unscheduled = {var.name_hint: f for var, f in lowered.fused.functions_items()}
    calls: dict[str, Counter[str]] = {}
    parameters: dict[str, list[str]] = {}
    for var, func in lowered.lowered.functions_items():
        if not isinstance(func, relax.Function):
            continue
        calls[var.name_hint] = Counter()
        for callee, names in _calls(func):
            calls[var.name_hint][callee] += 1
            seen = parameters.setdefault(callee, [])
            seen += [name for name in names if name not in seen]
    on_cpu = plan.target.kind == "cpu"
    shared = {} if on_cpu else _shared_memory(bodies, lowered.hits)
    rows, launched = [], {}
    for hit in lowered.hits:
        name = hit.function
        callers = {caller: count[name] for caller, count in calls.items() if count[name]}
        if not callers:  # became a view, or folded away
            continue
        nests = [] if on_cpu else _nests(bodies[name])
        launched[name] = 1 if on_cpu else _launched(bodies[name])
        grid, block = nests[0] if nests else (None, None)
        nbytes, flops = work_of(name, unscheduled[name])
        rows.append(
            {
                "name": name,
                "role": _role(name, list(callers), parameters[name]),
                "rule": hit.rule,
                "kernels": 1 if on_cpu else len(nests),
                "launched": launched[name],
                "grid": grid,
                "block": block,
                "shared_memory_bytes": None if on_cpu else shared.get(name, 0),
                "bytes": nbytes,
                "flops": flops,
                "calls": callers,
            }
        )
    launches = {caller: sum(launched[f] * times for f, times in count.items()) for caller, count in calls.items()}
    return {
        "compute_dtype": plan.scheme.compute_dtype,
        "functions": rows,
        "launches": dict(sorted(launches.items())),
        "launches_per_decode": launches["decode" if plan.interface == MLC else f"greedy_b{min(plan.batch_sizes)}"],
    }


def _calls(func: relax.Function) -> list[tuple[str, list[str]]]:
    """(PrimFunc, names of the parameters among its arguments) for each call, in order."""
    found = []
    for block in func.body.blocks:
        for binding in block.bindings:
            value = binding.value
            if isinstance(value, relax.Call) and isinstance(value.op, GlobalVar):
                found.append((value.op.name_hint, [str(a.name) for a in value.args if isinstance(a, relax.Var)]))
    return found


def _role(name: str, callers: list[str], arguments: list[str]) -> str:
    """ "decode, greedy: mlp.c_fc + bias + gelu_new": which functions run it, and the layers whose parameters it is
    given.
    """
    kinds = list(dict.fromkeys(re.sub(r"_b\d+(_m\d+)?$", "", caller) for caller in sorted(callers)))
    matches = [m for m in map(PARAMETER.match, arguments) if m]
    modules = list(dict.fromkeys(re.sub(r"^(attn|mlp)_", r"\1.", m["module"]) for m in matches))
    base = re.sub(r"\d+(?=_|$)", "", name.removeprefix("fused_"))
    parts = base.split("_")
    what = base
    norms = [m for m in modules if m.rpartition("_")[0] == "ln"]  # LayerNorm in the product's prologue
    if "matmul" in parts and norms:
        modules = [m for m in modules if m not in norms]
        matches = [m for m in matches if m["module"] not in norms]
    if "matmul" in parts and modules:
        bias = any(m["what"] == "bias" for m in matches)
        what = " / ".join(modules) + (" + bias" if bias else "")
        what = f"logits ({what})" if modules[0] in ("wte", "lm_head") else what
        activation = next((a for a in ACTIVATIONS if re.search(rf"(^|_){a}(_|$)", base)), None)
        what += f" + {activation}" if activation else ""
        what += " + residual" if parts.count("add") > bias else ""
        what = f"{' / '.join(norms)}, {what}" if norms else what
        what = f"merged splits, {what}" if base.startswith("merge_splits") else what
    elif modules and base != "embed":
        what = f"{base} ({' / '.join(modules)})"
    return f"{', '.join(kinds)}: {what}"


def _extent_text(extent: Any) -> Text:
    return to_text(extent, lambda node: str(node.name) if isinstance(node, tirx.Var) else None)


def launch_shapes(func: tirx.PrimFunc) -> list[tuple[list[Text], list[Text]]]:
    """(grid, block) of each device kernel of a scheduled PrimFunc, in the order in which it launches them."""
    return _nests(func)


def _nests(func: tirx.PrimFunc) -> list[tuple[list[Text], list[Text]]]:
    """(grid, block) of each device kernel of a scheduled PrimFunc: of each outermost loop that is bound to threads."""
    nests: list[dict[str, Text]] = []

    def bound(loop: tirx.For) -> tuple[str, Text] | None:
        binding = loop.thread_binding
        return None if binding is None else (str(binding.thread_tag), _extent_text(loop.extent))

    def inside(extents: dict[str, Text]) -> Any:
        def see(loop: tirx.For) -> None:
            found = bound(loop)
            if found is not None:  # a kernel may bind an axis again in each of its stages, always to the same extent
                extents[found[0]] = found[1]

        return see

    def outside(loop: tirx.For) -> Any:
        if bound(loop) is None:
            return None
        extents: dict[str, Text] = {}
        tvm_ffi.structural_walk(loop, [(tirx.For, inside(extents))], order="pre")
        nests.append(extents)
        return tvm_ffi.WalkResult.SKIP

    tvm_ffi.structural_walk(func.body, [(tirx.For, outside)], order="pre")
    return [([e.get(f"blockIdx.{a}", 1) for a in AXES], [e.get(f"threadIdx.{a}", 1) for a in AXES]) for e in nests]


def _launched(node: Any) -> int:
    """The kernels that one call launches: where the host takes one of two ways, those of the longer one."""
    total = 0

    def kernel(loop: tirx.For) -> Any:
        nonlocal total
        if loop.thread_binding is None:
            return None
        total += 1
        return tvm_ffi.WalkResult.SKIP

    def ways(branch: tirx.IfThenElse) -> Any:
        nonlocal total
        total += max(_launched(branch.then_case), _launched(branch.else_case) if branch.else_case is not None else 0)
        return tvm_ffi.WalkResult.SKIP

    body = node.body if isinstance(node, tirx.PrimFunc) else node
    tvm_ffi.structural_walk(body, [(tirx.For, kernel), (tirx.IfThenElse, ways)], order="pre")
    return total


def _shared_memory(bodies: dict[str, tirx.PrimFunc], hits: list[Hit]) -> dict[str, Text]:
    """Bytes of shared memory a block, by function. A rule's buffers have their whole shape until TVM compacts them
    to what one block touches, so those functions go through the passes that do; our own kernels are written that
    way.
    """
    rules = {hit.function: hit.rule for hit in hits}
    needing = {name: func for name, func in bodies.items() if _shared_bytes(func)}
    compact = {name: func for name, func in needing.items() if rules[name] not in WRITTEN}
    if compact:
        passes = s_tir.transform
        module = tvm.transform.Sequential(
            [
                passes.LowerInitBlock(),
                passes.PlanAndUpdateBufferAllocationLocation(),
                passes.ConvertBlocksToOpaque(),
                passes.LiftThreadBinding(),
                passes.CompactBufferAllocation(),
            ]
        )(tvm.IRModule(compact))
        needing.update({var.name_hint: func for var, func in module.functions_items()})
    return {name: _shared_bytes(func) for name, func in needing.items()}


def _shared_bytes(func: tirx.PrimFunc) -> Text:
    """Of the kernel that needs most; what stands outside of all kernels is each one's."""
    most: list[Text] = [0]

    def kernel(loop: tirx.For) -> Any:
        if loop.thread_binding is None:
            return None
        found = _allocated(loop)
        most[0] = combine("max", most[0], found) if most[0] != 0 else found
        return tvm_ffi.WalkResult.SKIP

    tvm_ffi.structural_walk(func.body, [(tirx.For, kernel)], order="pre")
    return combine("+", _allocated(func.body, outside=True), most[0])


def _allocated(body: Any, outside: bool = False) -> Text:
    """Bytes of the shared buffers in `body`; outside: only those that stand in no kernel."""
    total: list[Text] = [0]

    def see(block: s_tir.SBlock) -> None:
        for buffer in block.alloc_buffers:
            if buffer.scope().startswith("shared"):
                nbytes: Text = tvm.DataType(buffer.dtype).bits // 8
                for extent in buffer.shape:
                    nbytes = combine("*", nbytes, _extent_text(extent))
                total[0] = combine("+", total[0], nbytes)

    def kernel(loop: tirx.For) -> Any:
        return tvm_ffi.WalkResult.SKIP if outside and loop.thread_binding is not None else None

    tvm_ffi.structural_walk(body, [(s_tir.SBlock, see), (tirx.For, kernel)], order="pre")
    return total[0]
