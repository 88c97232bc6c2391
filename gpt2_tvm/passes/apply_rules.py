"""Apply schedule rules in order, first match wins, and remember who won (DESIGN, decision 2)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tvm
from tvm import s_tir, tirx
from tvm.target import Target

from gpt2_tvm.schedules.registry import Hit

OURS, NONE = "ours", "none"


def is_scheduled(func: Any) -> bool:
    """Whether a PrimFunc comes with its schedule (our kernels, or one that a rule has taken already)."""
    return bool(func.attrs is not None and "tirx.is_scheduled" in func.attrs and func.attrs["tirx.is_scheduled"])


def apply_rules(mod: tvm.IRModule, rules: Sequence[tuple[str, Any]], target: Target) -> tuple[tvm.IRModule, list[Hit]]:
    """Ask each rule in turn for every unscheduled PrimFunc of `mod`; returns the new module and a Hit a PrimFunc, in
    name order.

    A rule that raises ends the compilation: the error names the rule and the function.
    """
    hits: list[Hit] = []
    updates: dict[Any, Any] = {}
    for global_var, func in sorted(mod.functions_items(), key=lambda item: item[0].name_hint):
        if not isinstance(func, tirx.PrimFunc):
            continue
        name = global_var.name_hint
        if is_scheduled(func):
            hits.append(Hit(name, str(func.attrs.get("scheduled_by", OURS))))
            continue
        for rule_name, rule in rules:
            try:
                with target:
                    result = rule.apply(func, target, False)
            except Exception as error:
                raise RuntimeError(f"rule {rule_name} failed on function {name}: {error}") from error
            if result is None:
                continue
            schedule = result if isinstance(result, s_tir.Schedule) else result[0]
            updates[global_var] = schedule.mod["main"].with_attr("tirx.is_scheduled", True)
            hits.append(Hit(name, rule_name))
            break
        else:
            hits.append(Hit(name, NONE))
    out = mod.clone() if hasattr(mod, "clone") else tvm.IRModule(dict(mod.functions_items()), attrs=mod.attrs)
    for global_var, func in updates.items():
        out[global_var] = func
    return out, hits
