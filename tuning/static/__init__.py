"""What a compiled model's kernels are made of, without a device to run them on.

| file | holds |
| --- | --- |
| `resources.py` | `KernelResources` and `kernel_resources`: one record a kernel, for every kind of target |
| `sass.py` | NVIDIA: cubins, through cuobjdump |
| `amd.py` | AMD: code objects, through LLVM's tools |
| `shaders.py` | WebGPU and Metal: what the shaders' source says |
| `assembly.py` | CPUs: LLVM's assembly, its loops and what the hottest one does |
| `instruction.py`, `x86.py`, `arm.py` | one line of it |
| `occupancy.py` | how many blocks of a kernel a multiprocessor holds at once |
| `pipelines.py` | whether WebGPU's compiler takes the shaders |
| `rows.py` | the table: a row a kernel with its rule, role and calls; `static_rows`, `summary`, `render` |

`python -m tuning.static --model gpt2 --target rtx-4090` prints it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tuning.static.resources import KernelResources, kernel_resources
    from tuning.static.rows import render, static_rows, summary

_WHERE = {
    "KernelResources": "resources",
    "kernel_resources": "resources",
    "render": "rows",
    "static_rows": "rows",
    "summary": "rows",
}
__all__ = ["KernelResources", "kernel_resources", "render", "static_rows", "summary"]


def __getattr__(name: str) -> Any:
    """Import what is asked for when it is asked for: TVM takes seconds, and --help needs none of it."""
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"tuning.static.{_WHERE[name]}"), name)
