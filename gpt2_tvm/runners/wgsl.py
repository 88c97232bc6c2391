"""WGSL made by TVM, as text: each kernel's interface, and the grid that a launch needs. No device, no wgpu."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

MAX_BLOCKS = 65535  # along one dimension, WebGPU's limit


@dataclass(frozen=True)
class Shader:
    """One kernel's WGSL and its interface, read from the source itself.

    bindings: ``(name, writable, element type)`` in argument order. scalars: ``(name, type)`` of the uniform
    block, without ``packGridDimX``. block: threads along x, y, z.
    """

    name: str
    source: str
    bindings: tuple[tuple[str, bool, str], ...]
    scalars: tuple[tuple[str, str], ...]
    block: tuple[int, int, int]

    @property
    def needs_f16(self) -> bool:
        return re.search(r"^\s*enable f16;", self.source, re.M) is not None


def parse_wgsl(source: str) -> dict[str, Shader]:
    """The kernels in a WGSL module made by TVM (``// Function: name`` before each), by name."""
    shaders = {}
    for part in re.split(r"(?m)^(?=// Function: )", source):
        entry = re.search(r"@compute\s+@workgroup_size\((\d+),\s*(\d+),\s*(\d+)\)\s*fn\s+(\w+)", part)
        if entry is None:
            continue
        bindings = re.findall(
            r"@binding\((\d+)\)\s*var<storage,\s*(read_write|read)>\s*(\w+)\s*:\s*array<([\w<>]+)>", part
        )
        block = re.search(r"struct PODArgs \{(.*?)\}", part, re.S)
        scalars = re.findall(r"(\w+)\s*:\s*(\w+)", block.group(1)) if block else []
        name = entry.group(4)
        shaders[name] = Shader(
            name=name,
            source=part,
            bindings=tuple(
                (buffer, access == "read_write", element)
                for _, access, buffer, element in sorted(bindings, key=lambda found: int(found[0]))
            ),
            scalars=tuple((scalar, kind) for scalar, kind in scalars if scalar != "packGridDimX"),
            block=(int(entry.group(1)), int(entry.group(2)), int(entry.group(3))),
        )
    return shaders


def fold_grid(grid: Sequence[int]) -> tuple[int, int, int]:
    """`grid` (blocks along x, y, z) as WebGPU can launch it: x at most 65535, the rest in z.

    Raises ValueError where the grid has blocks along z (TVM's WebGPU code keeps z for the folding) or more
    than 65535 along y.
    """
    x, y, z = (int(extent) for extent in (*grid, 1, 1)[:3])
    if z != 1 or y > MAX_BLOCKS:
        raise ValueError(f"grid {(x, y, z)} cannot run on WebGPU: z must be 1 and y at most {MAX_BLOCKS}")
    folds = 1
    while math.ceil(x / folds) > MAX_BLOCKS:
        folds *= 2
    return math.ceil(x / folds), y, folds
