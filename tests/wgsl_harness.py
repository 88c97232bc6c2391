"""Runs a scheduled PrimFunc as WGSL on whatever WebGPU device is here, numpy in and numpy out.

    run(func, [qkv, positions, lengths, cache, np.empty(shape, dtype)]) -> the arrays after the call

Symbolic shapes take their values from the arrays. The grid and the order of the kernel's arguments are read from the
host code that TVM makes for the very same kernel, so a wrong launch shows up here as it would in an artifact.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import tvm
from tvm import tirx
from tvm.tirx.build import split_host_device_mods

from gpt2_tvm.errors import UserError
from gpt2_tvm.runners.wgpu_device import Device, Shader, parse_wgsl

WEBGPU = "webgpu"


@functools.cache
def _device() -> Device | str:
    try:
        return Device()
    except UserError as error:
        return str(error)


def device(f16: bool = False) -> Device:
    """The WebGPU device of this machine; skips the calling test where there is none (or none with float16)."""
    found = _device()
    if isinstance(found, str):
        pytest.skip(found)
    if f16 and not found.has_f16:
        pytest.skip(f"{found.name} has no float16 (shader-f16)")
    return found


def lower(func: tirx.PrimFunc, target: tvm.target.Target) -> tuple[tvm.IRModule, tvm.IRModule, Any]:
    """`func` through TVM's own pipeline: host code, device code ready for code generation, and its target."""
    if target.host is None:
        target = target.with_host("llvm")
    name = str(func.attrs["global_symbol"]) if "global_symbol" in func.attrs else "main"
    module = tirx.transform.BindTarget(target)(tvm.IRModule({name: func}))
    with target:
        pipeline, _, finish_device = tirx.get_default_tir_pipeline(target)
        host, devices = split_host_device_mods(pipeline(module))
        assert len(devices) == 1, "one kernel, one target"
        device_target, kernels = next(iter(devices.items()))
        return host, finish_device()(kernels), device_target


def source(func: tirx.PrimFunc, target: tvm.target.Target) -> str:
    """Device source of `func` for a target (WGSL, MSL, CUDA C++, or AMD assembly)."""
    _, kernels, device_target = lower(func, target)
    with target:
        built = tvm.get_global_func(f"target.build.{target.kind.name}")(kernels, device_target)
        return str(built.inspect_source("asm") if target.kind.name == "rocm" else built.inspect_source())


def children(node: Any) -> list[Any]:
    """What a TIR node holds: TVM 0.27 offers Python no visitor."""
    names = ("body", "seq", "then_case", "else_case", "value", "args", "a", "b", "condition", "true_value")
    found: list[Any] = []
    for name in (*names, "false_value"):
        child = getattr(node, name, None)
        if child is None or isinstance(child, int | float | str | bool):
            continue
        found += list(child) if hasattr(child, "__len__") and not isinstance(child, tirx.Expr) else [child]
    return found


def walk(node: Any) -> list[Any]:
    """`node` and all below it, parents first."""
    found, stack = [], [node]
    while stack:
        node = stack.pop()
        found.append(node)
        stack += reversed(children(node))
    return found


def evaluate(expr: Any, sizes: dict[str, int]) -> int:
    """An integer expression over shape variables, by name."""
    analyzer = tvm.sym.Analyzer()
    for node in walk(expr):
        if isinstance(node, tirx.Var):
            analyzer.bind(node, tirx.IntImm(str(node.ty.dtype), sizes[node.name]), allow_override=True)
    return int(analyzer.simplify(expr).value)


def launch_grid(host: tvm.IRModule, sizes: dict[str, int]) -> tuple[int, int, int]:
    """Blocks along x, y, z that the host code asks for."""
    calls = [
        node
        for _, entry in host.functions.items()
        for node in walk(entry.body)
        if isinstance(node, tvm.ir.Call) and str(getattr(node.op, "name", "")).endswith("call_ffi_kernel")
    ]
    assert len(calls) == 1, f"one kernel, one launch, not {len(calls)}"
    return calls[0]
