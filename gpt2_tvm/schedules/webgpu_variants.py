"""Kernels of which an artifact holds several versions, for whoever loads it to choose by what the adapter is.

A variant is another schedule of the same function: same name, same bindings, same uniform block, same grid, so the
launches stay as they are and only the source differs. `requires` names what must be so of an adapter: features of
WebGPU ("shader-f16"), "software" for an adapter that is a CPU (wgpu's adapter_type "CPU", a browser's fallback
adapter), or "swiftshader" for the one in Chromium. The last variant whose requirements are all met wins; a kernel
without one is the one in kernels.wgsl.

"shader-f16": float16 weights for float32 arithmetic (`q16f32`) lie in words, which every device unpacks; with float16
they are read as what they are (`webgpu_halves`).

"software": such a device has no fast shared memory (it is memory like all other), and a barrier suspends every thread
of a block, one by one. There products and attention read their operands straight from memory, a thread of a
matrix-vector product has its outputs to itself, and blocks have few threads.

"swiftshader": a browser clears shared memory before each block, and this device compiles that to a store for every
element, almost a millisecond each. So the vector that a block computes first comes in windows.

There is no "subgroups" variant. `WebgpuGemv` has a single barrier left for subgroups to save, and WGSL does not say
which threads of a block make up a subgroup: a kernel must ask for its own place, by built-in values that TVM 0.27
cannot name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

SOFTWARE, SWIFTSHADER, FLOAT16 = "software", "swiftshader", "shader-f16"
OURS = "ours"  # `registry.Hit` of a kernel that came scheduled


@dataclass(frozen=True)
class Variant:
    """rules: for functions that the rule of this name (`schedules.registry`) took, what schedules them here."""

    name: str
    requires: tuple[str, ...]
    rules: Mapping[str, Callable[[], Any]]


def _direct_matmul() -> Any:
    from gpt2_tvm.schedules.webgpu_matmul import MatmulConfig, WebgpuMatmul

    return WebgpuMatmul(MatmulConfig(shared_k=0))


def _lone_gemv() -> Any:
    from gpt2_tvm.schedules.webgpu_gemv import WebgpuGemv

    return WebgpuGemv(lone=4)


def _windowed_gemv() -> Any:
    from gpt2_tvm.schedules.webgpu_gemv import WebgpuGemv

    return WebgpuGemv(lone=8, windowed=True)


class _NativeHalves:
    """A rule after `webgpu_halves.with_native_halves`; for functions without such weights nothing."""

    def __init__(self, rule: str) -> None:
        self.rule = rule

    def apply(self, func: Any, target: Any, tunable: bool) -> Any:
        from gpt2_tvm.schedules.webgpu_gemv import WebgpuGemv
        from gpt2_tvm.schedules.webgpu_halves import with_native_halves
        from gpt2_tvm.schedules.webgpu_matmul import WebgpuMatmul

        found = with_native_halves(func)
        rule = WebgpuGemv() if self.rule == "webgpu-gemv" else WebgpuMatmul()
        return None if found is None else rule.apply(found, target, tunable)


class _OtherForm:
    """Not a schedule but another kernel, of attention and of what follows the logits; for the rest of ours nothing."""

    def apply(self, func: Any, target: Any, tunable: bool) -> Any:
        from tvm.s_tir import Schedule

        from gpt2_tvm.kernels.attention_forms import direct
        from gpt2_tvm.kernels.row_forms import few_threads
        from gpt2_tvm.kernels.spec import GpuLimits

        limits = GpuLimits.of_target(target)
        found = direct(func, limits) or few_threads(func, limits)
        return None if found is None else Schedule(found)


VARIANTS: tuple[Variant, ...] = (
    Variant(FLOAT16, (FLOAT16,), {name: partial(_NativeHalves, name) for name in ("webgpu-gemv", "webgpu-matmul")}),
    Variant(
        SOFTWARE,
        (SOFTWARE,),
        {"webgpu-matmul": _direct_matmul, "webgpu-gemv": _lone_gemv, OURS: _OtherForm},
    ),
    Variant(SWIFTSHADER, (SWIFTSHADER,), {"webgpu-gemv": _windowed_gemv}),
)


def variant_functions(
    variant: Variant, unscheduled: Mapping[str, Any], hits: Sequence[Any], target: Any
) -> dict[str, Any]:
    """{name: PrimFunc} of a variant. unscheduled: the functions before rules; hits: which rule took which
    (`registry.Hit`); target: TVM's."""
    made = {}
    for hit in hits:
        if hit.rule not in variant.rules:
            continue
        with target:
            schedule = variant.rules[hit.rule]().apply(unscheduled[hit.function], target, False)
        if schedule is not None:
            func = schedule.mod["main"].with_attr("global_symbol", hit.function)
            made[hit.function] = func.with_attr("tirx.is_scheduled", True)
    return made
