"""TVM's TIR pipeline for WebGPU, and one pass more: what a kernel touches in whole vectors becomes an array of them.

TVM 0.27 writes every tensor of a WGSL kernel as `array<f32>`, and a load of four neighbours as four loads. A browser
guards each load against the array's end, and neither it nor the driver puts the four together again. Where all loads
and stores of a tensor are aligned vectors of one width, the kernel can declare `array<vec4<f32>>` over the same bytes
and move four at once. TVM has such a pass for SPIR-V, but it leaves a kernel's arguments alone.

It runs on kernels after they were split from host code, so the host sees every tensor as it was. TVM's builds take a
pipeline by name; `pipeline_name` gives it.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import tvm_ffi
from tvm import ir, sym, tirx, transform
from tvm.ir import PointerType, PrimType
from tvm.target import Target
from tvm.tirx.compilation_pipeline import register_tir_pipeline

NAME = "gpt2-tvm-webgpu"
WIDTHS = (2, 4)  # of a WGSL vector; three elements have the stride of four


def pipeline_name(target: Target) -> str | None:
    """What to give `tvm.compile` and `tvm.tirx.build` as pipeline; None: TVM's own for that target."""
    return NAME if target.kind.name == "webgpu" else None


def tir_pipeline(target: Target) -> Any:
    """(pipeline, passes for host code, passes for kernels), as `tirx.get_default_tir_pipeline` gives them."""
    return _with_vectors() if target.kind.name == "webgpu" else tirx.get_default_tir_pipeline(target)


def _with_vectors() -> Any:
    pipeline, finish_host, finish_device = tirx.get_default_tir_pipeline(Target("webgpu"))

    def finish() -> transform.Pass:
        return transform.Sequential([finish_device(), tirx.transform.PointerValueTypeRewrite(), vector_arguments()])

    return pipeline, finish_host, finish


def vector_arguments() -> transform.Pass:
    """Kernels' arguments as arrays of vectors, where all accesses are aligned vectors of one width."""

    @transform.module_pass(opt_level=0, name="VectorArguments")
    def run(mod: ir.IRModule, _: Any) -> ir.IRModule:
        return ir.IRModule({var: _rewrite(func) for var, func in mod.functions_items()}, attrs=mod.attrs)

    return run


def _rewrite(func: tirx.PrimFunc) -> tirx.PrimFunc:
    widths = _widths(func)
    if not widths:
        return func
    params: dict[Any, Any] = {}  # old handle -> new
    buffers: dict[Any, Any] = {}  # old buffer -> new
    for buffer, (handle, width) in widths.items():
        dtype = f"{buffer.dtype}x{width}"
        params[handle] = tirx.Var(handle.name, PointerType(PrimType(dtype), "global"))
        extent = tirx.floordiv(buffer.shape[0], width)
        buffers[buffer] = tirx.decl_buffer([extent], dtype, buffer.name, data=params[handle])

    def at(access: Any) -> list[Any]:
        buffer = access.source if isinstance(access, ir.TensorLoad) else access.buffer
        (index,) = access.indices
        width = widths[buffer][1]
        # Floor divisions were lowered before this pass: one that does not go away is written as it will be compiled.
        found = sym.Analyzer().simplify(tirx.floordiv(index.base, width))
        return [tirx.truncdiv(index.base, width) if _divides(found) else found]

    def load(node: ir.TensorLoad) -> Any:
        return tirx.BufferLoad(buffers[node.source], at(node)) if node.source in buffers else node

    def store(node: tirx.BufferStore) -> Any:
        return tirx.BufferStore(buffers[node.buffer], node.value, at(node)) if node.buffer in buffers else node

    def declare(node: tirx.DeclBuffer) -> Any:
        return tirx.DeclBuffer(buffers[node.buffer], data=params[node.data]) if node.buffer in buffers else node

    body = tvm_ffi.structural_map(
        func.body, [(ir.TensorLoad, load), (tirx.BufferStore, store), (tirx.DeclBuffer, declare)]
    )
    return tirx.PrimFunc([params.get(p, p) for p in func.params], body, func.ret_type, attrs=func.attrs)


def _divides(e: Any) -> bool:
    seen: list[Any] = []
    tvm_ffi.structural_walk(e, [((tirx.FloorDiv, tirx.FloorMod), seen.append)], order="pre")
    return bool(seen)


def _widths(func: tirx.PrimFunc) -> dict[Any, tuple[Any, int]]:
    """{buffer: (its handle, lanes)} for the arguments that can be arrays of vectors."""
    declared: dict[Any, Any] = {}
    widths: dict[Any, set[int]] = defaultdict(set)
    analyzer = sym.Analyzer()

    def declare(node: tirx.DeclBuffer) -> None:
        if any(node.data.same_as(p) for p in func.params) and len(node.buffer.shape) == 1:
            declared[node.buffer] = node.data

    def bind(node: tirx.Bind) -> None:
        analyzer.bind(node.var, node.value)

    def opaque(node: ir.Call) -> None:  # the buffer as a pointer: nobody knows how it is read
        for argument in node.args:
            if isinstance(argument, ir.Var):
                widths[argument].add(1)

    def access(buffer: Any, indices: Any) -> None:
        index = indices[0]
        lanes = int(index.lanes) if isinstance(index, tirx.Ramp) and _is_one(index.stride) else 1
        aligned = lanes in WIDTHS and analyzer.can_prove_equal(tirx.floormod(index.base, lanes), 0)
        widths[buffer].add(lanes if aligned else 1)

    tvm_ffi.structural_walk(
        func.body,
        [
            (tirx.DeclBuffer, declare),
            (tirx.Bind, bind),
            (ir.TensorLoad, lambda node: access(node.source, node.indices)),
            (tirx.BufferStore, lambda node: access(node.buffer, node.indices)),
            (ir.Call, opaque),
        ],
        order="pre",
    )
    return {
        buffer: (handle, next(iter(widths[buffer])))
        for buffer, handle in declared.items()
        if len(widths[buffer]) == 1 and widths[buffer] != {1}
    }


def _is_one(stride: Any) -> bool:
    return isinstance(stride, tirx.IntImm) and int(stride) == 1


register_tir_pipeline(NAME, _with_vectors)
