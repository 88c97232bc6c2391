"""What this machine can do with each target: the table of `compile --list-targets`. Imports no TVM."""

from __future__ import annotations

import importlib.util
import os
import platform
import tempfile
from typing import TYPE_CHECKING

from targets import detect
from targets.adapt import as_gpu
from targets.device import DeviceTarget
from targets.load import list_targets

if TYPE_CHECKING:
    from rich.console import Console


def runs_here(target: DeviceTarget) -> str:
    """What can be done with `target` on this machine, in a few words:

    "yes" (compile and run), "yes: ..." with how, "runs; ..." (run only: what compiling lacks), "compiles:
    ..." (why it cannot run) or "needs: ..." with how to get what compiling lacks.
    """
    from gpt2_tvm import toolchains

    lack = toolchains.missing(target)
    why_not, how = _running(target)
    if why_not is None:
        return f"runs; to compile: {lack}" if lack else f"yes: {how}" if how else "yes"
    return f"needs: {lack}" if lack else f"compiles: {why_not}"


def _running(target: DeviceTarget) -> tuple[str | None, str]:
    """(why `target` cannot run on this machine or None, how it runs)."""
    return {"cpu": _cpu, "cuda": _cuda, "metal": _metal, "webgpu": _webgpu, "rocm": _rocm}[target.kind](target)


def _cpu(target: DeviceTarget) -> tuple[str | None, str]:
    from gpt2_tvm.toolchains import cpu, linker

    there, here = cpu.platform(target), linker.this_platform()
    if there != here:
        form = "a library" if linker.find_linker(there) else "objects in a tar (a library with `pip install ziglang`)"
        return f"{form} for {there.system} on {there.arch}", ""
    lacking = detect.missing_features(target.requires)
    return (f"this CPU has no {', '.join(lacking)}" if lacking else None), ""


def _cuda(target: DeviceTarget) -> tuple[str | None, str]:
    gpu = detect.present_gpu("cuda")
    if gpu is None:
        return "no NVIDIA GPU here", ""
    if target.generic:
        return None, f"as {as_gpu(target, gpu).name}, {gpu.name}"
    return (None if gpu.arch in target.archs else f"the GPU here is {gpu.name} ({gpu.arch})"), ""


def _metal(target: DeviceTarget) -> tuple[str | None, str]:
    if platform.system() == "Darwin" and platform.machine() == "arm64":
        return None, ""
    return "to run on a Mac with Apple silicon", ""


def _rocm(target: DeviceTarget) -> tuple[str | None, str]:
    gpu = detect.present_gpu("rocm")
    if gpu is None:
        return "no AMD GPU here", ""
    return (
        f"{gpu.name} is here, but the apache-tvm wheel has no ROCm runtime (a TVM built with USE_ROCM has)",
        "",
    )


def _webgpu(target: DeviceTarget) -> tuple[str | None, str]:
    if importlib.util.find_spec("wgpu") is None:
        return "to run: pip install 'gpt2-tvm[webgpu]'", ""
    adapters = _wgpu_adapters()
    if not adapters:
        return "wgpu finds no adapter (on Linux without a GPU: apt install mesa-vulkan-drivers)", ""
    return None, f"through wgpu on {adapters[0]}"


def _wgpu_adapters() -> list[str]:
    """The adapters that wgpu finds, as "device (backend)"."""
    import wgpu

    unset = "XDG_RUNTIME_DIR" not in os.environ
    if unset:  # Mesa complains on stderr without it
        os.environ["XDG_RUNTIME_DIR"] = tempfile.gettempdir()
    try:
        found = [adapter.info for adapter in wgpu.gpu.enumerate_adapters_sync()]
    except Exception:  # wgpu-native fails in its own ways where there is no graphics library at all
        return []
    finally:
        if unset:
            del os.environ["XDG_RUNTIME_DIR"]
    return [f"{info['device'] or info['description']} ({info['backend_type']})" for info in found]


def print_table(console: Console | None = None) -> None:
    """Print all targets: name, kind, architecture, peak rates, limits, and what this machine can do with
    each, with the reasons below.
    """
    from rich.console import Console
    from rich.table import Table

    def number(value: float | None) -> str:
        return "" if value is None else f"{value:,.3g}" if value < 1000 else f"{value:,.0f}"

    console = console or Console()
    table = Table(box=None, header_style="bold", pad_edge=False)
    for heading in ("target", "kind", "arch"):
        table.add_column(heading, no_wrap=True)
    for heading in ("GB/s", "fp32\nTFLOP/s", "fp16\nTFLOP/s", "threads", "shared\nKiB"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("here?", no_wrap=True)
    reasons: dict[str, list[str]] = {}
    for target in list_targets():
        peak, limits = target.peak, target.limits
        rates = (peak.bandwidth_gb_s, peak.fp32_tflops, peak.fp16_tflops) if peak else (None, None, None)
        shared = limits.shared_memory_bytes // 1024 if limits.shared_memory_bytes else None
        answer = runs_here(target)
        if len(answer.split()) > 1:
            reasons.setdefault(answer, []).append(target.name)
        table.add_row(
            *(target.name, target.kind, target.arch()),
            *map(number, (*rates, limits.threads_per_block, shared)),
            answer.split()[0].rstrip(":;"),
        )
    console.print(table)
    if reasons:
        console.print()
    for answer, names in reasons.items():
        console.print(f"{', '.join(names)} — {answer}", markup=False, highlight=False, soft_wrap=True)
