"""Schedule rules by name, and sets of rules as users write them: full, stock, baseline, only-x, without-x,
with-x, or a list."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gpt2_tvm.errors import UserError

if TYPE_CHECKING:
    from tvm.s_tir.dlight import ScheduleRule

    from targets import DeviceTarget

STOCK_GPU = ("matmul", "gemv", "reduction", "general-reduction", "fallback")
STOCK_CPU = ("dlight-cpu-gemv", "dlight-cpu-reduction")
LETTERS = {"wgmma-matmul": "sm_90a"}  # rules that write what only one architecture of CUDA has
OUTSIDE = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")  # module:Class, a rule that is not ours


def _gpu(name: str) -> Callable[[DeviceTarget], Any]:
    def make(_: DeviceTarget) -> ScheduleRule:
        from tvm.s_tir import dlight

        return getattr(dlight.gpu, name)()

    return make


class _MendedGemv:
    """DLight's GEMV without two defects of TVM 0.27. It accepts some batched products (p·V of materialised attention on
    Metal) and then fails to unpack their loops; here it declines them, so that the next rule can take the function. And
    where nothing follows the product its last block writes past the end of the result (`tunable_gemv`): there the same
    schedule is used with a guard."""

    def __init__(self, rule: ScheduleRule) -> None:
        self.rule = rule

    def apply(self, func: Any, target: Any, tunable: bool) -> Any:
        from gpt2_tvm.schedules.tunable_gemv import TunableGemv, overruns

        try:
            found = self.rule.apply(func, target, tunable)
        except ValueError:
            return None
        if found is None:
            return None
        return TunableGemv().apply(func, target, tunable) if overruns(func, target) else found


def _gemv(target: DeviceTarget) -> Any:
    return _MendedGemv(_gpu("GEMV")(target))


def _quantised_gemv(_: DeviceTarget) -> ScheduleRule:
    from gpt2_tvm.schedules.tunable_gemv import TunableGemv, quantised

    return TunableGemv(quantised)


def _norm_gemv(_: DeviceTarget) -> ScheduleRule:
    from gpt2_tvm.schedules.norm_gemv import NormGemv

    return NormGemv()


def _late_norm_gemv(_: DeviceTarget) -> ScheduleRule:
    from gpt2_tvm.schedules.norm_gemv import NormGemv

    return NormGemv(early=False)


def _matmul(_: DeviceTarget) -> ScheduleRule:
    from gpt2_tvm.schedules.cuda_matmul import MendedMatmul

    return MendedMatmul()


def _multiprocessors(target: DeviceTarget) -> int:
    from gpt2_tvm.schedules.tensor_tiles import MULTIPROCESSORS

    return target.cores.count if target.cores else MULTIPROCESSORS


def _tensor_matmul(target: DeviceTarget) -> ScheduleRule:
    from gpt2_tvm.schedules.tensor_matmul import TensorMatmul

    return TensorMatmul(multiprocessors=_multiprocessors(target))


def _wgmma_matmul(target: DeviceTarget) -> ScheduleRule:
    from gpt2_tvm.schedules.wgmma_matmul import WgmmaMatmul

    return WgmmaMatmul(multiprocessors=_multiprocessors(target))


def _wide_gemv(_: DeviceTarget) -> ScheduleRule:
    from gpt2_tvm.schedules.cuda_gemv import wide_gemv

    return wide_gemv()


def _split_gemv(_: DeviceTarget) -> ScheduleRule:
    from gpt2_tvm.schedules.cuda_gemv import split_gemv

    return split_gemv()


class _Emitted:
    """A rule that takes nothing: the function it stands for comes scheduled, and the model calls it where the rule is
    among a plan's (`kernels.persistent`)."""

    def apply(self, func: Any, target: Any, tunable: bool) -> None:
        return None


def _persistent(_: DeviceTarget) -> Any:
    return _Emitted()


def _dlight_cpu(name: str) -> Callable[[DeviceTarget], Any]:
    def make(_: DeviceTarget) -> ScheduleRule:
        from tvm.s_tir import dlight

        return getattr(dlight.cpu, name)()

    return make


def _cpu_matmul(target: DeviceTarget) -> ScheduleRule:
    from gpt2_tvm.schedules.cpu_matmul import CpuMatmul

    return CpuMatmul(target)


def _cpu_gemv(target: DeviceTarget) -> ScheduleRule:
    from gpt2_tvm.schedules.cpu_gemv import CpuGemv

    return CpuGemv(target)


def _cpu_reduction(target: DeviceTarget) -> ScheduleRule:
    from gpt2_tvm.schedules.cpu_reduction import CpuReduction

    return CpuReduction(target)


def _webgpu_matmul(target: DeviceTarget) -> ScheduleRule:
    from gpt2_tvm.schedules.webgpu_matmul import WebgpuMatmul

    return WebgpuMatmul()


def _webgpu_gemv(target: DeviceTarget) -> ScheduleRule:
    from gpt2_tvm.schedules.webgpu_gemv import WebgpuGemv

    return WebgpuGemv()


RULES: dict[str, Callable[[DeviceTarget], Any]] = {
    "matmul": _matmul,
    "tensor-matmul": _tensor_matmul,
    "wgmma-matmul": _wgmma_matmul,
    "gemv": _gemv,
    "quantised-gemv": _quantised_gemv,
    "wide-gemv": _wide_gemv,
    "split-gemv": _split_gemv,
    "norm-gemv": _norm_gemv,
    "late-norm-gemv": _late_norm_gemv,
    "persistent": _persistent,
    "reduction": _gpu("Reduction"),
    "general-reduction": _gpu("GeneralReduction"),
    "fallback": _gpu("Fallback"),
    "webgpu-gemv": _webgpu_gemv,
    "webgpu-matmul": _webgpu_matmul,
    "dlight-cpu-gemv": _dlight_cpu("GEMV"),
    "dlight-cpu-reduction": _dlight_cpu("Reduction"),
    "cpu-matmul": _cpu_matmul,
    "cpu-gemv": _cpu_gemv,
    "cpu-reduction": _cpu_reduction,
}


def rule_set(text: str, target: DeviceTarget) -> tuple[str, ...]:
    """Rule names, in order, that `text` means on `target`.

    full: the target's list · stock: DLight's own · baseline: Fallback alone (no rule on a CPU) · only-x: x and Fallback
    · without-x: full less x · with-x: x, then full · a,b,c: these (Fallback is added on GPUs, where every function must
    be bound to threads). x may be several rules, joined by +. A rule of somebody else's is written module:Class.
    """
    full = tuple(target.rules)
    gpu = target.kind != "cpu"
    last = ("fallback",) if gpu else ()
    choices = "full, stock, baseline, only-RULE, without-RULE, with-RULE, or a comma list of " + ", ".join(RULES)

    def known(name: str) -> str:
        if OUTSIDE.fullmatch(name):
            return name
        if name not in RULES:
            raise UserError(f"unknown rule {name!r} in {text!r}; choose {choices}")
        if gpu == name.startswith(("cpu-", "dlight-cpu-")):
            raise UserError(f"rule {name!r} is not for {target.kind} targets; this target has {', '.join(full)}")
        return name

    def several(names: str, separator: str) -> tuple[str, ...]:
        found = tuple(dict.fromkeys(known(part.strip()) for part in names.split(separator) if part.strip()))
        if not found:
            raise UserError(f"--rules {text!r} names no rule; choose {choices}")
        return found

    if text == "full":
        return full
    if text == "stock":
        return STOCK_GPU if gpu else STOCK_CPU
    if text == "baseline":
        return last
    if text.startswith("without-"):
        less = several(text.removeprefix("without-"), "+")
        if set(less) & set(last):
            raise UserError(
                f"--rules {text}: Fallback stays on {target.kind} targets, else functions are left unbound to threads"
            )
        return tuple(r for r in full if r not in less)
    if text.startswith("with-"):
        more = several(text.removeprefix("with-"), "+")
        return (*more, *(r for r in full if r not in more))
    only = text.startswith("only-")
    names = several(text.removeprefix("only-"), "+") if only else several(text, ",")
    return names if set(last) <= set(names) else (*names, *last)


@dataclass(frozen=True)
class Hit:
    """Which rule took a function: its registry name, `ours` for kernels that come scheduled, `none` where no rule
    wanted it."""

    function: str
    rule: str


def make_rules(names: Sequence[str], target: DeviceTarget) -> list[tuple[str, ScheduleRule]]:
    """The rules themselves, in order. UserError where a module:Class cannot be imported or made."""
    return [(name, RULES[name](target) if name in RULES else _outside(name, target)) for name in names]


def _outside(name: str, target: DeviceTarget) -> Any:
    """The rule of somebody else's that `name`, module:Class, stands for; made with the target if it takes one."""
    module, _, attribute = name.partition(":")
    try:
        make = getattr(importlib.import_module(module), attribute)
        takes_one = any(
            p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
            for p in inspect.signature(make).parameters.values()
        )
        return make(target) if takes_one else make()
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise UserError(
            f"rule {name} cannot be made ({error}); it is imported as MODULE and called as MODULE.CLASS, with the "
            "target if it takes an argument: is its folder on PYTHONPATH?"
        ) from error
