"""WebGPU: WGSL source, in a library for this machine's CPU and as a file of its own.

The apache-tvm wheel has no WebGPU runtime, so the library is the record of the compiled host code;
`kernels.wgsl` is what the runners execute (through PyPI's wgpu, or in a browser).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpt2_tvm.toolchains import cpu, linker, modules

if TYPE_CHECKING:
    from targets import DeviceTarget

KERNELS = "kernels.wgsl"

missing = cpu.missing
prepare = cpu.prepare
compiling = cpu.compiling  # the code generator is inside TVM


def export(executable: Any, target: DeviceTarget, folder: Path) -> list[str]:
    """See `gpt2_tvm.toolchains.export`: `lib.so`, and the WGSL, `// Function: <name>` above each kernel."""
    text = modules.sources(executable, "webgpu")
    if "@compute" not in text:
        raise RuntimeError("the executable holds no WGSL kernel: was it built for another target?")
    where = cpu.platform(target)
    library = folder / f"lib{where.library_suffix}"
    executable.export_library(str(library), fcompile=linker.fcompile(linker.require_linker(where)))
    if b"@compute" not in library.read_bytes():
        raise RuntimeError(f"{library.name} lost its WGSL kernels in linking")
    (folder / KERNELS).write_text(text, encoding="utf-8")
    return [library.name, KERNELS]
