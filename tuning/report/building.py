"""Compile the functions of a report for the device, once, and read what came out: source and resources."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from gpt2_tvm import toolchains
from tuning.report import sources

if TYPE_CHECKING:
    from gpt2_tvm.build import Plan
    from gpt2_tvm.pipeline import Lowered
    from targets import DeviceTarget

# Why a device's compiler tells nothing here.
ELSEWHERE = {
    "metal": "macOS compiles the MSL where it runs, so registers and spills are decided there",
    "webgpu": "the browser's driver compiles the WGSL where it runs, so registers and spills are decided there",
    "cpu": "a CPU has no occupancy; its registers are in the assembly",
}


@dataclass
class Built:
    """kernels: generated code by function. resources: by kernel name, as `tuning.static` gives them. note: what could
    not be found out, and why; "" if nothing."""

    kernels: dict[str, list[sources.Kernel]] = field(default_factory=dict)
    resources: dict[str, Any] = field(default_factory=dict)
    note: str = ""


def build(plan: Plan, lowered: Lowered, functions: dict[str, Any]) -> Built:
    """Compile scheduled PrimFuncs by name, without the model around them. `lowered`: of the same rules.

    A toolchain that is missing, or a compiler that refuses, is a note and no error: the rest of the report does not
    need it.
    """
    import tvm

    if not functions:
        return Built()
    lack = toolchains.missing(plan.target)
    if lack:
        return Built(note=f"not compiled: it needs {lack}")
    module = tvm.IRModule({name: func.with_attr("global_symbol", name) for name, func in functions.items()})
    try:
        with _compiling(plan.target) as target:
            executable = toolchains.build(module, target)
    except Exception as error:
        lines = [line for line in str(error).strip().splitlines() if line.strip()] or [type(error).__name__]
        return Built(note=f"not compiled: {lines[-1].strip()[:300]}")
    resources, note = _resources(plan, lowered, executable)
    return Built(sources.generated(executable, plan.target.kind), resources, note)


@contextmanager
def _compiling(target: DeviceTarget) -> Iterator[Any]:
    """For CUDA one architecture is enough to look at: the one that TVM's target names."""
    if target.kind == "cuda":
        from gpt2_tvm.toolchains import cuda

        with cuda.compiling(target, archs=(target.arch(),), ptx=False) as tvm_target:
            yield tvm_target
    else:
        with toolchains.compiling(target) as tvm_target:
            yield tvm_target


def _resources(plan: Plan, lowered: Lowered, executable: Any) -> tuple[dict[str, Any], str]:
    note = ELSEWHERE.get(plan.target.kind, "")
    try:
        from tuning.static import kernel_resources
    except ImportError:
        return {}, note or "tuning.static is not there to read registers from the compiled code"
    try:
        return dict(kernel_resources(plan, lowered, executable)), note
    except Exception as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return {}, f"{note + '; ' if note else ''}resources could not be read: {first[:200]}"
