"""Which sets of rules, or of graph passes, an ablation compares (DESIGN, decision 7): their names, and what each means.

A factor is a rule that can be on or off. On a GPU Fallback is none: without it functions stay unbound to threads, and
nothing runs. Sets that mean the same rules in the same order are one experiment under several names.

With --passes the factors are the fusions of `gpt2_tvm.passes.registry` instead, under the target's full rules: baseline
is none of them, then only-x, without-x and all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

from gpt2_tvm.errors import UserError
from gpt2_tvm.kernels.persistent.shape import RULE as PERSISTENT
from gpt2_tvm.kernels.persistent.shape import suits
from gpt2_tvm.passes.registry import applicable, pass_set
from gpt2_tvm.schedules.registry import OUTSIDE, STOCK_CPU, STOCK_GPU, rule_set
from targets import DeviceTarget

ALWAYS = "fallback"
JOINT = ("reduction", "general-reduction")  # which the study switched as one
MOST_FACTORS = 6  # 2^6 sets; every further factor doubles hours
DEQUANTIZE = "dequantize-gemv"  # the pass that does nothing for plain weights


@dataclass(frozen=True)
class Variant:
    """A rule set of the experiment.

    Attributes:
        name: as `--sets` and `--rules` take it.
        rules: what it means, in order: rules, or passes.
    """

    name: str
    rules: tuple[str, ...]

    @property
    def on(self) -> frozenset[str]:
        """The factors that are on."""
        return frozenset(self.rules) - {ALWAYS}


def factors(target: DeviceTarget, extra: Sequence[str] = ()) -> tuple[str, ...]:
    """The rules of a target that can be on or off, in the order in which they are tried: `extra` (module:Class), the
    target's own list, then what DLight has beside it."""
    for name in extra:
        if not OUTSIDE.fullmatch(name):
            raise UserError(f"--rule {name}: write MODULE:CLASS, the rule's module and its class")
    stock = STOCK_CPU if target.kind == "cpu" else STOCK_GPU
    return tuple(name for name in dict.fromkeys((*extra, *target.rules, *stock)) if name != ALWAYS)


def alternatives(target: DeviceTarget) -> tuple[str, ...]:
    """Rules outside `full` that the target can have: the decode step as one kernel."""
    return (PERSISTENT,) if suits(target) else ()


def variants(
    target: DeviceTarget,
    names: Sequence[str] | None = None,
    full_factorial: bool = False,
    extra: Sequence[str] = (),
    chosen: Sequence[str] | None = None,
) -> list[Variant]:
    """The sets of an ablation, in the order of its table.

    Args:
        names: these alone (any that `rule_set` understands); default: baseline, only-x of every factor, stock,
            without-x of every rule in `full`, with-x of every `extra` one and of the `alternatives`, and full; and
            Reduction with GeneralReduction as one where the target has both.
        full_factorial: every subset of the factors too.
        extra: rules of somebody else's, module:Class.
        chosen: the factors of the factorial design, others are off in it; default all, or where these are too many
            DLight's own, which the study crossed, and `extra`.

    Raises UserError for a set that means nothing here, or for a factorial design of more than 2^6 sets.
    """
    every = factors(target, extra)
    crossed = crossed_factors(target, extra, chosen)
    full = [rule for rule in target.rules if rule != ALWAYS]
    if names is None:
        joint = "+".join(JOINT)
        both = set(JOINT) <= set(full)
        names = ["baseline", *(f"only-{rule}" for rule in every), *([f"only-{joint}"] if both else []), "stock"]
        names += [f"without-{rule}" for rule in full] + ([f"without-{joint}"] if both else [])
        names += [*(f"with-{rule}" for rule in (*extra, *alternatives(target))), "full"]
    found = {name: Variant(name, rule_set(name, target)) for name in names}
    if full_factorial:
        _check_few(crossed)
        known = {variant.rules for variant in found.values()}
        for subset in _subsets(crossed):
            variant = Variant(subset_name(subset, target), rule_set(_text(subset), target))
            if variant.rules not in known:
                found.setdefault(variant.name, variant)
    return list(found.values())


def crossing(every: Sequence[str], chosen: Sequence[str] | None) -> tuple[str, ...]:
    """The factors of a factorial design, in the order in which they are tried. UserError for one that is none here."""
    unknown = sorted(set(chosen or ()) - set(every))
    if unknown:
        raise UserError(f"--factors: {unknown[0]} is none of {', '.join(every)}")
    return tuple(name for name in every if chosen is None or name in chosen)


def crossed_factors(
    target: DeviceTarget, extra: Sequence[str] = (), chosen: Sequence[str] | None = None
) -> tuple[str, ...]:
    """The rules that a factorial design of a target crosses; see `variants`."""
    every = factors(target, extra)
    if chosen is None and len(every) > MOST_FACTORS:
        stock = STOCK_CPU if target.kind == "cpu" else STOCK_GPU
        chosen = [name for name in every if name in extra or name in stock]
    return crossing(every, chosen)


def _check_few(crossed: Sequence[str]) -> None:
    if len(crossed) > MOST_FACTORS:
        raise UserError(
            f"--full-factorial: {len(crossed)} factors make {2 ** len(crossed)} sets, at most {2**MOST_FACTORS} run; "
            f"name up to {MOST_FACTORS} with --factors, of {', '.join(crossed)}"
        )


def _subsets(names: Sequence[str]) -> list[tuple[str, ...]]:
    return [subset for size in range(len(names) + 1) for subset in combinations(names, size)]


def _text(subset: Sequence[str]) -> str:
    return "only-" + "+".join(subset) if subset else "baseline"


def subset_name(subset: Sequence[str], target: DeviceTarget) -> str:
    """What a set of factors is called: baseline, full, or only-a+b."""
    full = tuple(rule for rule in target.rules if rule != ALWAYS)
    return "full" if tuple(subset) == full else _text(subset)


def cells(
    target: DeviceTarget, extra: Sequence[str] = (), chosen: Sequence[str] | None = None
) -> dict[tuple[str, ...], frozenset[str]]:
    """The factorial design: for each subset of the factors the rules that it means, in order, and what is on."""
    crossed = crossed_factors(target, extra, chosen)
    return {rule_set(_text(subset), target): frozenset(subset) for subset in _subsets(crossed)}


# Passes -------------------------------------------------------------------------------------------------------------


def pass_factors(target: DeviceTarget, quantised: bool = False) -> tuple[str, ...]:
    """The passes of a target with its full rules that can be on or off, in the order in which they run."""
    return tuple(n for n in applicable(target, rule_set("full", target)) if quantised or n != DEQUANTIZE)


def pass_variants(
    target: DeviceTarget,
    names: Sequence[str] | None = None,
    full_factorial: bool = False,
    quantised: bool = False,
    chosen: Sequence[str] | None = None,
) -> list[Variant]:
    """`variants` of the passes: baseline (none), only-x and without-x of each, all. names: any that `pass_set`
    understands, and baseline."""
    every = pass_factors(target, quantised)
    if names is None:
        names = ["baseline", *(f"only-{name}" for name in every), *(f"without-{name}" for name in every), "all"]
    found = {name: Variant(name, _passes(name, target, quantised)) for name in names}
    if full_factorial:
        crossed = crossing(every, chosen)
        _check_few(crossed)
        known = {variant.rules for variant in found.values()}
        for subset in _subsets(crossed):
            if subset not in known:
                found.setdefault(_text(subset), Variant(_text(subset), subset))
    return list(found.values())


def _passes(name: str, target: DeviceTarget, quantised: bool) -> tuple[str, ...]:
    found = pass_set("none" if name == "baseline" else name, target, rule_set("full", target))
    return tuple(n for n in found if quantised or n != DEQUANTIZE)


def pass_cells(
    target: DeviceTarget, quantised: bool = False, chosen: Sequence[str] | None = None
) -> dict[tuple[str, ...], frozenset[str]]:
    """The factorial design of the passes."""
    return {s: frozenset(s) for s in _subsets(crossing(pass_factors(target, quantised), chosen))}
