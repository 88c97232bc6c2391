"""`--target cuda` on a machine with a GPU means that GPU."""

from __future__ import annotations

from dataclasses import replace
from fnmatch import fnmatchcase

from targets import detect
from targets.detect import Gpu
from targets.device import DeviceTarget
from targets.load import list_targets


def specialise(target: DeviceTarget) -> DeviceTarget:
    """`target` for the GPU that is present; unchanged if it names a device already or no GPU is there."""
    gpu = detect.present_gpu(target.kind) if target.generic else None
    return as_gpu(target, gpu) if gpu else target


def as_gpu(target: DeviceTarget, gpu: Gpu) -> DeviceTarget:
    """The generic `target` as `gpu`: the named target that lists it, else with its architecture put in.

    The second has no peak rates (nobody has written them down), and keeps the name and the limits of the
    generic target, which every GPU of its kind meets.
    """
    for known in list_targets():
        if known.kind == target.kind and any(fnmatchcase(gpu.name, pattern) for pattern in known.devices):
            return known
    description = f"{gpu.name} ({gpu.arch})" if gpu.arch else gpu.name
    if target.kind == "cuda":
        return replace(
            target,
            description=description,
            generic=False,
            tvm={**target.tvm, "arch": gpu.arch},
            archs=(gpu.arch,),
        )
    if target.kind == "rocm":
        # GCN and CDNA (gfx9) run waves of 64 threads; for RDNA (gfx10 and later) LLVM compiles waves of 32
        wave = 64 if gpu.arch.removeprefix("gfx")[:-2] == "9" else 32
        tvm = {**target.tvm, "mcpu": gpu.arch, "thread_warp_size": wave}
        return replace(target, description=description, generic=False, tvm=tvm)
    return replace(target, description=description, generic=False)
