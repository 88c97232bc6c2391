"""Schedule rules by name, and sets of rules as users write them: full, stock, baseline, only-x, without-x, or a
list."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gpt2_tvm.errors import UserError

if TYPE_CHECKING:
    from tvm.s_tir.dlight import ScheduleRule

    from targets import DeviceTarget

STOCK_GPU = ("matmul", "gemv", "reduction", "general-reduction", "fallback")
STOCK_CPU = ("dlight-cpu-gemv", "dlight-cpu-reduction")


def _gpu(name: str) -> Callable[[DeviceTarget], Any]:
    def make(_: DeviceTarget) -> ScheduleRule:
        from tvm.s_tir import dlight

        return getattr(dlight.gpu, name)()

    return make


class _DeclinesWhereItFails:
    """DLight's GEMV accepts some batched products (p·V of materialised attention on Metal) and then fails to unpack
    their loops; here it declines them, so that the next rule can take the function."""

    def __init__(self, rule: ScheduleRule) -> None:
        self.rule = rule

    def apply(self, func: Any, target: Any, tunable: bool) -> Any:
        try:
            return self.rule.apply(func, target, tunable)
        except ValueError:
            return None


def _gemv(target: DeviceTarget) -> Any:
    return _DeclinesWhereItFails(_gpu("GEMV")(target))


def _dlight_cpu(name: str) -> Callable[[DeviceTarget], Any]:
    def make(_: DeviceTarget) -> ScheduleRule:
        from tvm.s_tir import dlight

        return getattr(dlight.cpu, name)()

    return make


def _cpu_matmul(target: DeviceTarget) -> ScheduleRule:
    from gpt2_tvm.schedules.cpu_matmul import CpuMatmul

    return CpuMatmul(target.layout)


def _cpu_gemv(target: DeviceTarget) -> ScheduleRule:
    from gpt2_tvm.schedules.cpu_gemv import CpuGemv

    return CpuGemv(target.layout)


def _cpu_reduction(target: DeviceTarget) -> ScheduleRule:
    from gpt2_tvm.schedules.cpu_reduction import CpuReduction

    return CpuReduction(target.layout)


RULES: dict[str, Callable[[DeviceTarget], Any]] = {
    "matmul": _gpu("Matmul"),
    "gemv": _gemv,
    "reduction": _gpu("Reduction"),
    "general-reduction": _gpu("GeneralReduction"),
    "fallback": _gpu("Fallback"),
    "dlight-cpu-gemv": _dlight_cpu("GEMV"),
    "dlight-cpu-reduction": _dlight_cpu("Reduction"),
    "cpu-matmul": _cpu_matmul,
    "cpu-gemv": _cpu_gemv,
    "cpu-reduction": _cpu_reduction,
}


def rule_set(text: str, target: DeviceTarget) -> tuple[str, ...]:
    """Rule names, in order, that `text` means on `target`.

    full: the target's list · stock: DLight's own · baseline: Fallback alone (no rule on a CPU) · only-x: x and Fallback
    · without-x: full less x · a,b,c: these (Fallback is added on GPUs, where every function must be bound to threads).
    """
    full = tuple(target.rules)
    gpu = target.kind != "cpu"
    last = ("fallback",) if gpu else ()
    choices = "full, stock, baseline, only-RULE, without-RULE, or a comma list of " + ", ".join(RULES)

    def known(name: str) -> str:
        if name not in RULES:
            raise UserError(f"unknown rule {name!r} in --rules {text}; choose {choices}")
        if gpu == name.startswith(("cpu-", "dlight-cpu-")):
            raise UserError(f"rule {name!r} is not for {target.kind} targets; this target has {', '.join(full)}")
        return name

    if text == "full":
        return full
    if text == "stock":
        return STOCK_GPU if gpu else STOCK_CPU
    if text == "baseline":
        return last
    if text.startswith("only-"):
        name = known(text.removeprefix("only-"))
        return (name,) if name in last else (name, *last)
    if text.startswith("without-"):
        name = known(text.removeprefix("without-"))
        if name in last:
            raise UserError(
                f"--rules {text}: Fallback stays on {target.kind} targets, else functions are left unbound to threads"
            )
        return tuple(r for r in full if r != name)
    names = tuple(known(part.strip()) for part in text.split(",") if part.strip())
    if not names:
        raise UserError(f"--rules is empty; choose {choices}")
    return names if set(last) <= set(names) else (*names, *last)


@dataclass(frozen=True)
class Hit:
    """Which rule took a function: its registry name, `ours` for kernels that come scheduled, `none` where no rule
    wanted it."""

    function: str
    rule: str


def make_rules(names: Sequence[str], target: DeviceTarget) -> list[tuple[str, ScheduleRule]]:
    """The rules themselves, in order."""
    return [(name, RULES[name](target)) for name in names]
