"""The same parts counted over the module that would be compiled: exported, lowered and fused, nothing built.

Every call of a TIR function is put into a part by the parameters that it is given, so that a LayerNorm that two parts
share counts in both.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gpt2_tvm.expressions import Text, evaluate
from gpt2_tvm.theory.closed import PARTS

if TYPE_CHECKING:
    from gpt2_tvm.build import Plan

PHASES = ("naive", "prefill", "decode")
NOT_THE_MODEL = "scoring"  # what `score` does with the logits after the head
_PARTS = {"attn_c_attn": "MHA", "attn_c_proj": "MHA", "ln_1": "MHA", "mlp_c_fc": "MLP", "mlp_c_proj": "MLP"}
_PARTS |= {"ln_2": "MLP", "ln_f": "head", "wte": "head", "lm_head": "head"}
_WITHOUT_PARAMETERS = {"last_row": "head", "log_prob": NOT_THE_MODEL}  # others without belong to attention


@dataclass(frozen=True)
class Call:
    """A TIR function in one phase and part.

    Attributes:
        name: as in the module. label: what it does, short: "mlp.c_fc", "attention". part: one of `PARTS`, or "scoring".
        times: how often one run of the phase calls it for this part.
        flops, bytes: of one call, over b, n and p; None where `gpt2_tvm.work` has no form of a kernel of ours.
    """

    name: str
    label: str
    part: str
    times: int
    flops: Text | None
    bytes: Text | None

    def work(self, b: int, n: int, p: int) -> tuple[int, int]:
        """(flops, bytes) of one call at these sizes."""
        if self.flops is None or self.bytes is None:
            raise RuntimeError(f"the work of {self.name} has no form (gpt2_tvm/work.py)")
        sizes = {"b": b, "n": n, "p": p}
        return evaluate(self.flops, sizes), evaluate(self.bytes, sizes)


@dataclass(frozen=True)
class Counted:
    """The module's calls by exported function. `splits`: of decode's attention, by batch (1: one kernel)."""

    exported: dict[str, tuple[Call, ...]]
    splits: dict[int, int]

    def calls(self, phase: str, batch: int) -> tuple[Call, ...]:
        """The calls of "naive" (logits of every row: `score` without its scoring), "prefill" or "decode"."""
        function = {"naive": "score", "prefill": "prefill", "decode": f"decode_b{batch}"}[phase]
        return tuple(call for call in self.exported[function] if call.part != NOT_THE_MODEL)

    def parts(self, phase: str, b: int, n: int, p: int) -> dict[str, tuple[int, int]]:
        """(flops, bytes) of each part of one run."""
        sums = {part: [0, 0] for part in PARTS}
        for call in self.calls(phase, b):
            flops, nbytes = call.work(b, n, p)
            sums[call.part][0] += flops * call.times
            sums[call.part][1] += nbytes * call.times
        return {part: (flops, nbytes) for part, (flops, nbytes) in sums.items()}


def count_module(plan: Plan) -> Counted:
    """Lower the model of `plan` as far as its kernels are known, and count; seconds, also for gpt2-xl."""
    import tvm
    from tvm import relax

    from gpt2_tvm.work import work_of

    module = _fused(plan)
    bodies = {var.name_hint: func for var, func in module.functions_items() if isinstance(func, tvm.tirx.PrimFunc)}
    works: dict[str, tuple[Text | None, Text | None]] = {}
    exported = {}
    for var, func in module.functions_items():
        if not isinstance(func, relax.Function):
            continue
        found: Counter[tuple[str, str, str]] = Counter()
        for name, parameters in _calls(func):
            part, label = _part_and_label(name, parameters)
            found[name, part, label] += 1
            if name not in works:
                works[name] = work_of(name, bodies[name])
        exported[var.name_hint] = tuple(
            Call(name, label, part, times, works[name][1], works[name][0])
            for (name, part, label), times in found.items()
        )
    splits = {}
    for batch in plan.batch_sizes:
        combine = [c.name for c in exported[f"decode_b{batch}"] if "attention_combine" in c.name]
        splits[batch] = int(bodies[combine[0]].params[0].shape[3]) if combine else 1
    return Counted(exported, splits)


def _fused(plan: Plan) -> Any:
    """The module after the pipeline's second phase, of the functions that are counted only. Fused as FuseOps does it:
    what GPUs fuse further (passes/registry.py) saves launches, and of bytes those of one row a kernel."""
    import tvm
    from tvm import relax

    from gpt2_tvm import pipeline
    from gpt2_tvm.build import export_module
    from gpt2_tvm.toolchains import tensor_intrin

    if plan.target.kind in ("cuda", "metal"):
        tensor_intrin.load(plan.target.kind)
    with plan.target.tvm_target():
        module, _ = export_module(plan)
        kept = {
            var: func
            for var, func in module.functions_items()
            if not isinstance(func, relax.Function) or re.fullmatch(r"score|prefill|decode_b\d+", var.name_hint)
        }
        module = tvm.IRModule(kept, attrs=module.attrs)
        return tvm.transform.Sequential([make() for make in (*pipeline.GRAPH, *pipeline.PLAIN)])(module)


def _calls(func: Any) -> list[tuple[str, Sequence[str]]]:
    """(TIR function, names of the parameters among its arguments) for each call, in order."""
    from tvm import relax
    from tvm.ir import GlobalVar

    found: list[tuple[str, Sequence[str]]] = []
    for block in func.body.blocks:
        for binding in block.bindings:
            value = binding.value
            if not isinstance(value, relax.Call) or not str(getattr(value.op, "name", "")).startswith("relax.call_tir"):
                continue
            callee, arguments = value.args[0], value.args[1]
            assert isinstance(callee, GlobalVar)
            fields = arguments.fields if isinstance(arguments, relax.Tuple) else [arguments]
            found.append((callee.name_hint, [str(a.name) for a in fields if isinstance(a, relax.Var)]))
    return found


def _part_and_label(name: str, arguments: Sequence[str]) -> tuple[str, str]:
    from gpt2_tvm.inventory import PARAMETER

    modules = list(dict.fromkeys(m["module"] for m in map(PARAMETER.match, arguments) if m))
    base = re.sub(r"\d+(?=_|$)", "", name.removeprefix("fused_"))
    if base.startswith("embed"):
        return "embedding", "embedding"
    known = [m for m in modules if m in _PARTS]
    if known:
        label = {"wte": "logits", "lm_head": "logits"}.get(known[0], re.sub(r"^(attn|mlp)_", r"\1.", known[0]))
        return _PARTS[known[0]], label
    part = next((part for key, part in _WITHOUT_PARAMETERS.items() if base.startswith(key)), "MHA")
    return part, _attention_label(base)


def _attention_label(base: str) -> str:
    """Short names of the kernels that attention consists of, ours or those that the rules schedule."""
    if base.endswith("attention_combine"):
        return "attention, merge"
    if base.endswith(("attention", "attention_append")):
        return "attention"
    for key, label in (("mask_scores", "q k^T, mask"), ("softmax", "softmax"), ("matmul", "scores x v")):
        if key in base:
            return label
    return base.replace("_", " ")
