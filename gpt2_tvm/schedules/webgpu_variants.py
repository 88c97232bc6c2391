"""Kernels of which an artifact holds several versions, for whoever loads it to choose by what the adapter is.

A variant is another schedule of the same function: same name, same bindings, same uniform block, same grid, so the
launches stay as they are and only the source differs. `requires` names what must be so of an adapter: features of
WebGPU ("shader-f16", "subgroups"), or "software" for an adapter that is a CPU (wgpu's adapter_type "CPU", a browser's
fallback adapter). The last variant whose requirements are all met wins; a kernel without one is the one in
kernels.wgsl.

"software": such a device has no fast shared memory (it is memory like all other), a barrier suspends every thread of a
block, one by one, and a browser clears shared memory before each block, which SwiftShader compiles to a store for every
element. There products and attention read their operands straight from memory, and a thread of a matrix-vector
product has its outputs to itself.

There is no "subgroups" variant. `WebgpuGemv` has a single barrier left for subgroupAdd to save, and TVM 0.27 writes
subgroupShuffleDown for a width that is fixed at compile time, where WebGPU only says between which two a device's lies
(4 on SwiftShader, 8 on lavapipe, 32 or 64 on GPUs). A float16 variant of a float32 artifact would need other weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

SOFTWARE = "software"
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

    return WebgpuGemv(lone=True)


class _DirectAttention:
    """Not a schedule but another kernel; for the rest of ours nothing."""

    def apply(self, func: Any, target: Any, tunable: bool) -> Any:
        from tvm.s_tir import Schedule

        from gpt2_tvm.kernels.attention_forms import direct
        from gpt2_tvm.kernels.spec import GpuLimits

        found = direct(func, GpuLimits.of_target(target))
        return None if found is None else Schedule(found)


VARIANTS: tuple[Variant, ...] = (
    Variant(
        SOFTWARE,
        (SOFTWARE,),
        {"webgpu-matmul": _direct_matmul, "webgpu-gemv": _lone_gemv, OURS: _DirectAttention},
    ),
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
