"""Which rule sets an ablation compares (DESIGN, decision 7): their names, and the rules that each means.

A factor is a rule that can be on or off. On a GPU Fallback is none: without it functions stay unbound to threads, and
nothing runs. Sets that mean the same rules in the same order are one experiment under several names.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

from gpt2_tvm.errors import UserError
from gpt2_tvm.schedules.registry import OUTSIDE, STOCK_CPU, STOCK_GPU, rule_set
from targets import DeviceTarget

ALWAYS = "fallback"
JOINT = ("reduction", "general-reduction")  # which the study switched as one
MOST_FACTORS = 6  # 2^6 sets; every further factor doubles hours


@dataclass(frozen=True)
class Variant:
    """A rule set of the experiment.

    Attributes:
        name: as `--sets` and `--rules` take it.
        rules: what it means, in order.
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


def variants(
    target: DeviceTarget,
    names: Sequence[str] | None = None,
    full_factorial: bool = False,
    extra: Sequence[str] = (),
) -> list[Variant]:
    """The sets of an ablation, in the order of its table.

    Args:
        names: these alone (any that `rule_set` understands); default: baseline, only-x of every factor, stock,
            without-x of every rule in `full`, with-x of every `extra` one, and full; and Reduction with
            GeneralReduction as one where the target has both.
        full_factorial: every subset of the factors too.
        extra: rules of somebody else's, module:Class.

    Raises UserError for a set that means nothing here, or for a factorial design of more than 2^6 sets.
    """
    every = factors(target, extra)
    full = [rule for rule in target.rules if rule != ALWAYS]
    if names is None:
        joint = "+".join(JOINT)
        both = set(JOINT) <= set(full)
        names = ["baseline", *(f"only-{rule}" for rule in every), *([f"only-{joint}"] if both else []), "stock"]
        names += [f"without-{rule}" for rule in full] + ([f"without-{joint}"] if both else [])
        names += [*(f"with-{rule}" for rule in extra), "full"]
    found = {name: Variant(name, rule_set(name, target)) for name in names}
    if full_factorial:
        if len(every) > MOST_FACTORS:
            raise UserError(
                f"--full-factorial: {len(every)} rules make {2 ** len(every)} sets, at most {2**MOST_FACTORS} are run; "
                "name what you want with --sets"
            )
        known = {variant.rules for variant in found.values()}
        for size in range(len(every) + 1):
            for subset in combinations(every, size):
                variant = Variant(subset_name(subset, target), rule_set(_text(subset), target))
                if variant.rules not in known:
                    found.setdefault(variant.name, variant)
    return list(found.values())


def _text(subset: Sequence[str]) -> str:
    return "only-" + "+".join(subset) if subset else "baseline"


def subset_name(subset: Sequence[str], target: DeviceTarget) -> str:
    """What a set of factors is called: baseline, full, or only-a+b."""
    full = tuple(rule for rule in target.rules if rule != ALWAYS)
    return "full" if tuple(subset) == full else _text(subset)


def cells(target: DeviceTarget, extra: Sequence[str] = ()) -> dict[tuple[str, ...], frozenset[str]]:
    """The factorial design: for each subset of the factors the rules that it means, in order, and what is on."""
    every = factors(target, extra)
    design = {}
    for size in range(len(every) + 1):
        for subset in combinations(every, size):
            design[rule_set(_text(subset), target)] = frozenset(subset)
    return design
