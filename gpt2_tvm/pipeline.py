"""From the exported module to a module that the virtual machine runs: the phases in order, each a list of passes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import tvm
from tvm import relax

from gpt2_tvm.passes.apply_rules import apply_rules
from gpt2_tvm.passes.cuda_graph import add_graph_steps
from gpt2_tvm.passes.registry import applicable, graph_passes
from gpt2_tvm.schedules.norm_gemv import LATE_RULE, NormGemv
from gpt2_tvm.schedules.norm_gemv import RULE as NORM_RULE
from gpt2_tvm.schedules.registry import Hit, make_rules
from gpt2_tvm.schedules.tunable_gemv import TunableGemv
from gpt2_tvm.schedules.tuned import RULE, Tuned
from gpt2_tvm.schedules.webgpu_gemv import RULE as WEBGPU_RULE
from gpt2_tvm.schedules.webgpu_gemv import WebgpuGemv

if TYPE_CHECKING:
    from targets import DeviceTarget

# Phase 1: rewrite the graph. permute_dims + matmul becomes NT_matmul: without it decode never reaches a GEMV rule.
GRAPH = (relax.transform.FuseTransposeMatmul,)

# Phase 2: operators become TIR, and neighbours become one function (matmul + bias + activation + residual). Which ones
# is for the passes of passes/registry.py to say: some run before FuseOps, some on the groups that it made.
LEGALIZE = (
    relax.transform.LegalizeOps,
    relax.transform.AnnotateTIROpPattern,
    relax.transform.FoldConstant,
)
FUSE = (relax.transform.FuseOps,)
FUSED = (
    relax.transform.FuseTIR,
    relax.transform.RewriteDataflowReshape,  # a reshape is a view, not a kernel for the rules to schedule
    relax.transform.DeadCodeElimination,
)

PLAIN = (*LEGALIZE, *FUSE, *FUSED)  # phase 2 with FuseOps' own fusions and no others

# Phase 3 is the schedule: rules in order, first match wins (passes/apply_rules.py).

# Phase 4: calls by destination, memory planned once for the whole function, shapes computed by the VM.
LOWER = (
    relax.transform.ToNonDataflow,
    relax.transform.RemovePurityChecking,
    relax.transform.CallTIRRewrite,
    relax.transform.StaticPlanBlockMemory,
)

# Phase 5: to instructions of the virtual machine.
FINALISE = (
    relax.transform.LowerAllocTensor,
    relax.transform.KillAfterLastUse,
    relax.transform.LowerRuntimeBuiltin,
    relax.transform.ComputePrimValue,
    relax.transform.VMShapeLower,
    relax.transform.AttachGlobalSymbol,
)

PHASES = ("1-exported", "2-graph", "3-fused", "4-scheduled", "5-lowered", "6-final")


@dataclass
class Lowered:
    """What the pipeline leaves: the module after each stage that others look into, and which rule took which
    function."""

    fused: tvm.IRModule
    scheduled: tvm.IRModule
    lowered: tvm.IRModule
    final: tvm.IRModule
    hits: list[Hit] = field(default_factory=list)


def _run(mod: tvm.IRModule, passes: Sequence[Callable[[], tvm.transform.Pass]]) -> tvm.IRModule:
    return tvm.transform.Sequential([make() for make in passes])(mod)


def _fuse(mod: tvm.IRModule, passes: Sequence[str], target: DeviceTarget) -> tvm.IRModule:
    before, after = graph_passes(passes, target)
    mod = tvm.transform.Sequential(before)(_run(mod, LEGALIZE))
    return _run(tvm.transform.Sequential(after)(_run(mod, FUSE)), FUSED)


def lower(
    mod: tvm.IRModule,
    target: DeviceTarget,
    rules: tuple[str, ...],
    upper_bounds: dict[str, dict[str, int]] | None = None,
    dump_ir: Path | None = None,
    tuned: Tuned | None = None,
    cuda_graph: bool = False,
    passes: Sequence[str] | None = None,
) -> Lowered:
    """Run every phase. `upper_bounds`: for a function with symbolic sizes, the largest value of each, so that its
    memory is planned once and never grows; `dump_ir`: a folder that gets the IR after each phase; `tuned`: points for
    matrix-vector products, which then go before the rules; `cuda_graph`: also give each step with static shapes a form
    that is one CUDA graph (passes/cuda_graph.py), in `final` alone; `passes`: names of fusions (passes/registry.py),
    default all that the target and the rules can have."""
    tvm_target = target.tvm_target()

    def dump(phase: int, mod: tvm.IRModule) -> None:
        if dump_ir is not None:
            dump_ir.mkdir(parents=True, exist_ok=True)
            (dump_ir / f"{PHASES[phase]}.py").write_text(mod.script(show_meta=False) + "\n")

    with tvm_target:
        dump(0, mod)
        mod = _run(mod, GRAPH)
        dump(1, mod)
        fused = _fuse(mod, applicable(target, rules) if passes is None else passes, target)
        for name, bounds in (upper_bounds or {}).items():
            fused.update_func(fused.get_global_var(name), fused[name].with_attr("tir_var_upper_bound", bounds))
        dump(2, fused)
        chosen = make_rules(rules, target)
        if tuned is not None:
            ours = (NORM_RULE, LATE_RULE)
            chosen = [(n, NormGemv(tuned.choose, n == NORM_RULE) if n in ours else rule) for n, rule in chosen]
            # a point is for every product of its shape; on WebGPU those with a prologue are written by their own rule
            of_ours = [WebgpuGemv(tuned.choose)] if any(n == WEBGPU_RULE for n, _ in chosen) else []
            chosen = [*((RULE, rule) for rule in (TunableGemv(tuned.choose), *of_ours)), *chosen]
        scheduled, hits = apply_rules(fused, chosen, tvm_target)
        dump(3, scheduled)
        lowered = _run(scheduled, LOWER)
        dump(4, lowered)
        final = _run(add_graph_steps(lowered) if cuda_graph else lowered, FINALISE)
        dump(5, final)
    return Lowered(fused, scheduled, lowered, final, hits)
