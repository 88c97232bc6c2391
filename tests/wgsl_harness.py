"""Runs a scheduled PrimFunc as WGSL on whatever WebGPU device is here, numpy in and numpy out.

    run(func, [qkv, positions, lengths, cache, np.empty(shape, dtype)]) -> the arrays after the call

Symbolic shapes take their values from the arrays. The grid and the order of the kernel's arguments are read from the
host code that TVM makes for the very same kernel, so a wrong launch shows up here as it would in an artifact.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import tvm
from tvm import tirx
from tvm.tirx.build import split_host_device_mods

from gpt2_tvm.errors import UserError
from gpt2_tvm.host_code import host_launches
from gpt2_tvm.runners.wgpu_device import Device
from gpt2_tvm.runners.wgsl import Shader, parse_wgsl
from gpt2_tvm.schedules.webgpu_pipeline import tir_pipeline

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
    name = "kernel"
    module = tvm.IRModule({name: func.with_attr("global_symbol", name)})
    module = tirx.transform.BindTarget(target)(module)
    with target:
        pipeline, _, finish_device = tir_pipeline(target)
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


def _children(node: Any) -> list[Any]:
    """What a TIR node holds: TVM 0.27 offers Python no visitor."""
    names = ("body", "seq", "then_case", "else_case", "value", "args", "a", "b", "condition")
    found: list[Any] = []
    for name in names:
        child = getattr(node, name, None)
        if isinstance(child, tvm.runtime.Object):
            found += list(child) if name in ("seq", "args") else [child]
    return found


def _walk(node: Any) -> Iterator[Any]:
    """`node` and all below it, parents first."""
    stack = [node]
    while stack:
        node = stack.pop()
        yield node
        stack += reversed(_children(node))


def _evaluate(expr: Any, sizes: dict[str, int]) -> int:
    """An integer expression over shape variables, by name."""
    analyzer = tvm.sym.Analyzer()
    for node in _walk(expr):
        if isinstance(node, tirx.Var):
            analyzer.bind(node, tirx.IntImm("int64", sizes[str(node.name)]), allow_override=True)
    return int(analyzer.simplify(expr).value)


@dataclass(frozen=True)
class Lowered:
    """A PrimFunc ready to run: its shader, and how the host code calls it."""

    shader: Shader
    arguments: tuple[str, ...]  # names of the buffers, in the kernel's order
    scalars: tuple[Any, ...]  # expressions over shape variables
    grid: dict[str, Any]  # "blockIdx.x" -> an expression over shape variables


ELEMENTS = {"f32": "float32", "f16": "float16", "i32": "int32", "u32": "uint32"}
_lowered: dict[tirx.PrimFunc, Lowered] = {}  # by identity: every PrimFunc is lowered once


def lower_to_wgsl(func: tirx.PrimFunc) -> Lowered:
    if func not in _lowered:
        host, kernels, target = lower(func, tvm.target.Target("webgpu"))
        built = tvm.get_global_func("target.build.webgpu")(kernels, target)
        (shader,) = parse_wgsl(built.inspect_source()).values()
        (call,) = (
            node
            for _, entry in host.functions.items()
            for node in _walk(entry.body)
            if isinstance(node, tvm.ir.Call) and str(getattr(node.op, "name", "")).endswith("call_ffi_kernel")
        )
        buffers, scalars = len(shader.bindings), len(shader.scalars)
        extents = call.args[1 + buffers + scalars :]
        _lowered[func] = Lowered(
            shader=shader,
            arguments=tuple(name.removesuffix("_ptr") for name, _, _ in shader.bindings),
            scalars=tuple(call.args[1 + buffers : 1 + buffers + scalars]),
            grid=dict(zip(map(str, call.attrs.launch_params), extents, strict=False)),
        )
    return _lowered[func]


def run(func: tirx.PrimFunc, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Call `func` with `arrays` (one a parameter, outputs too); returns what they hold afterwards.

    Checks dtypes and static sizes as TVM's own calling convention would. Skips the calling test where the machine
    has no WebGPU device, or none with the float16 that the kernel needs.
    """
    sizes: dict[str, int] = {}
    names = []
    for parameter, array in zip(func.params, arrays, strict=True):
        names.append(str(parameter.name))
        assert str(parameter.dtype) == str(array.dtype), f"{parameter.name}: {array.dtype}"
        for extent, size in zip(parameter.shape, array.shape, strict=True):
            wanted = sizes.setdefault(extent.name, size) if isinstance(extent, tirx.Var) else int(extent)
            assert wanted == size, f"{parameter.name} has shape {array.shape}"
    symbolic = any(isinstance(e, tirx.Var) for p in func.params for e in p.shape)
    if (symbolic and _tells_all(func, sizes)) or (not symbolic and _one_kernel(func)):
        return _run_one(func, names, arrays, sizes)
    return _run_several(func, names, arrays)


def _tells_all(func: tirx.PrimFunc, sizes: dict[str, int]) -> bool:
    """Whether the launch is in terms of the shapes' variables alone, and not of others that host code binds."""
    lowered = lower_to_wgsl(func)
    asked = [*lowered.scalars, *lowered.grid.values()]
    return all(str(node.name) in sizes for expr in asked for node in _walk(expr) if isinstance(node, tirx.Var))


def _one_kernel(func: tirx.PrimFunc) -> bool:
    """One loop nest over blocks at the top, so one kernel."""
    return func in _lowered or len(list(lower(func, tvm.target.Target("webgpu"))[1].functions)) == 1


def _run_several(func: tirx.PrimFunc, names: list[str], arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
    """As `run`, for several kernels with buffers of their own between them, which start as NaN."""
    target = tvm.target.Target("webgpu", host="llvm")
    _, kernels, device_target = lower(func, target)
    shaders = parse_wgsl(tvm.get_global_func("target.build.webgpu")(kernels, device_target).inspect_source())
    gpu = device(f16=any(shader.needs_f16 for shader in shaders.values()))
    held: dict[Any, Any] = {i: gpu.upload(array, names[i]) for i, array in enumerate(arrays)}

    def size(extent: Any) -> int:
        return arrays[extent.argument].shape[extent.axis]

    compute = []
    for launch in host_launches({tvm.ir.GlobalVar("kernel"): func.with_attr("global_symbol", "kernel")}, target)[
        "kernel"
    ]:
        for buffer in launch.buffers:
            if not isinstance(buffer, int) and (scratch := ("scratch", buffer.index)) not in held:
                held[scratch] = gpu.upload(np.full(int(buffer.elements(size)), np.nan, buffer.dtype))
        bound = [held[b if isinstance(b, int) else ("scratch", b.index)] for b in launch.buffers]
        scalars, grid = [int(s(size)) for s in launch.scalars], [int(axis(size)) for axis in launch.grid]
        compute.append(gpu.launch(gpu.compile(shaders[launch.kernel]), bound, scalars, grid))
    gpu.submit(compute)
    return [gpu.read(held[i], array.shape, array.dtype) for i, array in enumerate(arrays)]


def _run_one(
    func: tirx.PrimFunc, names: list[str], arrays: Sequence[np.ndarray], sizes: dict[str, int]
) -> list[np.ndarray]:
    lowered = lower_to_wgsl(func)
    gpu = device(f16=lowered.shader.needs_f16)
    kernel = gpu.compile(lowered.shader)
    types = {name: ELEMENTS[kind] for name, kind in re.findall(r"> (\w+) : array<(\w+)>", lowered.shader.source)}
    twice = {name for name in names if names.count(name) > 1}  # TVM numbers their handles: which is which, types tell
    names = [f"{name} {array.dtype}" if name in twice else name for name, array in zip(names, arrays, strict=True)]
    assert len(set(names)) == len(names), "two parameters of one name and type"
    handles = [(name, re.sub(r"_ptr_\d+$", "", name)) for name in lowered.arguments]
    arguments = [
        f"{base} {types.get(name, types.get(f'{name}_ptr'))}" if base in twice else name for name, base in handles
    ]
    held = {name: gpu.upload(array, name) for name, array in zip(names, arrays, strict=True)}
    scalars = [_evaluate(scalar, sizes) for scalar in lowered.scalars]
    grid = [_evaluate(lowered.grid.get(f"blockIdx.{axis}", tirx.IntImm("int32", 1)), sizes) for axis in "xyz"]
    gpu.submit([gpu.launch(kernel, [held[name] for name in arguments], scalars, grid)])
    return [gpu.read(held[name], array.shape, array.dtype) for name, array in zip(names, arrays, strict=True)]
