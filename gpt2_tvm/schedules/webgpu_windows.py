"""A tensor that is larger than a device binds (128 MiB, WebGPU's default limit), given to a kernel as several bindings.

GPT-2's table of tokens in float32 has 154 MB. A buffer may be that large, only a kernel must not be given all of it in
one binding. So a kernel that reads such a tensor gets it in windows, each a binding of its own over a part of the one
buffer, and picks the window by the index:

    table[i]   ->   i < n ? table_0[i] : table_1[i - n]

The rewrite works on kernels that are ready for code generation, so the schedules, the host code and the model know
nothing of it. Only tensors that are read can be windows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import tvm_ffi
from tvm import DataType, ir, tirx
from tvm.script import tirx as T

ALIGNMENT = 256  # bytes: what WebGPU lets a binding begin at, on every device


@dataclass(frozen=True)
class Window:
    """Bytes [offset, offset + size) of a tensor."""

    offset: int
    size: int


def windows_of(nbytes: int, most: int) -> list[Window]:
    """`nbytes` as windows of at most `most` bytes each, all but the last of one size."""
    count = -(-nbytes // (most // ALIGNMENT * ALIGNMENT))
    size = -(-nbytes // (count * ALIGNMENT)) * ALIGNMENT
    return [Window(at, min(size, nbytes - at)) for at in range(0, nbytes, size)]


def with_windows(kernel: tirx.PrimFunc, windows: Mapping[int, list[Window]]) -> tirx.PrimFunc:
    """A kernel whose parameters number `windows`' keys come as several, in their place.

    Raises ValueError where the kernel writes one of them, or a window does not hold whole elements.
    """
    params: list[Any] = []
    handles: dict[Any, tuple[list[Any], list[Window]]] = {}
    for i, param in enumerate(kernel.params):
        if i not in windows:
            params.append(param)
            continue
        parts = [tirx.Var(f"{param.name}_{j}", param.ty) for j in range(len(windows[i]))]
        handles[param] = parts, windows[i]
        params += parts
    buffers: dict[Any, tuple[list[Any], list[Window], int]] = {}

    def find(node: tirx.DeclBuffer) -> None:
        if node.data in handles:
            parts, of = handles[node.data]
            element = DataType(node.buffer.dtype).itemsize
            if any(w.offset % element or w.size % element for w in of):
                raise ValueError(f"windows {of} do not hold whole elements of {node.buffer.dtype}")
            made = [
                tirx.decl_buffer([w.size // element], node.buffer.dtype, f"{node.buffer.name}_{j}", data=part)
                for j, (part, w) in enumerate(zip(parts, of, strict=True))
            ]
            buffers[node.buffer] = made, of, element

    def refuse(node: tirx.BufferStore) -> None:
        if node.buffer in buffers:
            raise ValueError(f"{node.buffer.name} is written, so it cannot be bound in windows")

    tvm_ffi.structural_walk(kernel.body, [(tirx.DeclBuffer, find)], order="pre")
    tvm_ffi.structural_walk(kernel.body, [(tirx.BufferStore, refuse)], order="pre")

    def declare(node: tirx.DeclBuffer) -> Any:
        if node.buffer not in buffers:
            return node
        made = buffers[node.buffer][0]
        parts = handles[node.data][0]
        declared = [tirx.DeclBuffer(b, data=part) for b, part in zip(made, parts, strict=True)]
        return declared[0] if len(declared) == 1 else tirx.SeqStmt(declared)

    def load(node: ir.TensorLoad) -> Any:
        if node.source not in buffers:
            return node
        made, of, element = buffers[node.source]
        (index,) = node.indices
        base = index.base if isinstance(index, tirx.Ramp) else index
        value = None
        for part, window in reversed(list(zip(made, of, strict=True))):
            first = window.offset // element
            here = tirx.BufferLoad(part, [index - first if first else index])
            inside = base < (window.offset + window.size) // element
            value = here if value is None else T.if_then_else(inside, here, value)
        return value

    body = tvm_ffi.structural_map(kernel.body, [(ir.TensorLoad, load), (tirx.DeclBuffer, declare)])
    return tirx.PrimFunc(params, body, kernel.ret_type, attrs=kernel.attrs)
