"""Fusions of the graph by name, and sets of them as users write them: all, none, only-x, without-x, or a list.

Each is a pass of its own (a file here), that can be left out: then what it would join stays apart, each part a function
with its own launch and its own trip to memory. `tuning.ablation --passes` toggles them as it toggles schedule rules.

| pass | joins | on |
| --- | --- | --- |
| linear-gelu | linear layer and activation | all targets |
| linear-residual | linear layer and residual add | all |
| dequantize-gemv | dequantised weights and the product that reads them | all |
| norm-residual | residual add and LayerNorm, where the add is alone (linear-residual takes it otherwise) | all |
| qkv-append | this call's keys and values into the cache, by the attention kernel that reads them | GPUs |
| combine-gemv | the merge of split attention, in the output projection's prologue | GPUs |
| norm-gemv | LayerNorm, in the prologue of the product of few rows that reads it | GPUs |

On GPUs norm-residual, combine-gemv and norm-gemv make functions that only the rule of `schedules/norm_gemv.py`
schedules as one kernel: they go with that rule.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gpt2_tvm.errors import UserError

if TYPE_CHECKING:
    from targets import DeviceTarget

GPUS = ("cuda", "metal", "rocm", "webgpu")
NORM_RULE = "norm-gemv"  # of schedules.registry


@dataclass(frozen=True)
class Fusion:
    """One pass. what: what it joins, in words · kinds: of the targets that it is for · rule: the schedule rule without
    which GPUs cannot have it.

    Its module `passes.<name with underscores>` has `before_fusion(on, target)` or `after_fusion(on, target)`, or both:
    the pass to run before or after FuseOps where the fusion is on, or off; None for none.
    """

    name: str
    what: str
    kinds: tuple[str, ...] = ("cpu", *GPUS)
    rule: str | None = None

    @property
    def module(self) -> Any:
        return importlib.import_module(f"gpt2_tvm.passes.{self.name.replace('-', '_')}")


FUSIONS: dict[str, Fusion] = {  # in the order in which they run
    fusion.name: fusion
    for fusion in (
        Fusion("dequantize-gemv", "dequantised weights and the product that reads them"),
        Fusion("linear-gelu", "linear layer and activation"),
        Fusion("linear-residual", "linear layer and residual add"),
        Fusion("qkv-append", "new keys and values into the cache, in the attention kernel", GPUS),
        Fusion("combine-gemv", "merge of split attention, in the output projection", GPUS, NORM_RULE),
        Fusion("norm-gemv", "LayerNorm, in the product of few rows that reads it", GPUS, NORM_RULE),
        Fusion("norm-residual", "residual add and LayerNorm, where the add is alone", rule=NORM_RULE),
    )
}


def applicable(target: DeviceTarget, rules: Sequence[str]) -> tuple[str, ...]:
    """The fusions that a target with these rules can have, in order."""
    known = (None, *rules) if target.kind in GPUS else (None, NORM_RULE)
    return tuple(f.name for f in FUSIONS.values() if target.kind in f.kinds and f.rule in known)


def pass_set(text: str, target: DeviceTarget, rules: Sequence[str]) -> tuple[str, ...]:
    """Names, in order, that `text` means on `target` with these rules.

    all: every one that it can have · none · only-x · without-x · a,b,c: these. x may be several, joined by +.
    UserError for an unknown one, or one that the target or the rules cannot have.
    """
    every = applicable(target, rules)
    choices = "all, none, only-PASS, without-PASS, or a comma list of " + ", ".join(every)

    def several(names: str, separator: str) -> set[str]:
        found = {part.strip() for part in names.split(separator) if part.strip()}
        for name in sorted(found):
            if name not in FUSIONS:
                raise UserError(f"unknown pass {name!r} in --passes {text}; choose {choices}")
            if target.kind not in FUSIONS[name].kinds:
                raise UserError(f"pass {name!r} is not for {target.kind} targets; this target has {', '.join(every)}")
            if name not in every:
                raise UserError(f"pass {name!r} needs rule {FUSIONS[name].rule!r} among --rules")
        if not found:
            raise UserError(f"--passes {text!r} names no pass; choose {choices}")
        return found

    if text == "all":
        return every
    if text == "none":
        return ()
    if text.startswith("without-"):
        less = several(text.removeprefix("without-"), "+")
        return tuple(name for name in every if name not in less)
    only = text.startswith("only-")
    wanted = several(text.removeprefix("only-"), "+") if only else several(text, ",")
    return tuple(name for name in every if name in wanted)


def graph_passes(names: Sequence[str], target: DeviceTarget) -> tuple[list[Any], list[Any]]:
    """(passes to run before FuseOps, passes to run after it) that join what `names` say and keep the rest apart."""
    from gpt2_tvm.passes.graph import remove_fences

    before: list[Any] = []
    after: list[Any] = [remove_fences()]
    for fusion in FUSIONS.values():
        if target.kind not in fusion.kinds:
            continue
        for stage, made in (("before_fusion", before), ("after_fusion", after)):
            make = getattr(fusion.module, stage, None)
            found = make(fusion.name in names, target) if make is not None else None
            if found is not None:
                made.append(found)
    return before, after
