"""Runs scheduled PrimFuncs' CUDA source on the CPU, numpy in and numpy out: the very code that a GPU gets.

    run(func, [qkv, positions, lengths, cache, np.empty(shape, dtype)]) -> the arrays after the call

g++ compiles the source with `cuda_on_cpu.h`, where the threads of a block are coroutines. Every call runs twice, with
the threads in opposite orders, and fails where the results differ: between two barriers the order must not matter.
"""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import tvm
from tvm import tirx

from gpt2_tvm.host_code import Extent, HostLaunch, split_launches
from gpt2_tvm.inventory import launch_shapes
from gpt2_tvm.toolchains import callbacks, cuda

HEADER = Path(__file__).parent / "cuda_on_cpu.h"
NAME = "kernel"
ASM = re.compile(r"(?:__asm__ __volatile__|asm volatile)\(")
DYNAMIC = re.compile(r"extern __shared__ (?:alignas|__align__)\(\d+\) (\w+(?: \w+)*) (\w+)\[\];")


@dataclass(frozen=True)
class Built:
    launches: list[HostLaunch]
    blocks: list[tuple[int, ...]]
    library: ctypes.CDLL


_built: dict[tuple[tirx.PrimFunc, str], Built] = {}


def run(func: tirx.PrimFunc, arrays: Sequence[np.ndarray], arch: str = "sm_80") -> list[np.ndarray]:
    """Call `func` with `arrays` (one a parameter, outputs too); returns what they hold afterwards.

    Skips the calling test without g++. The process ends with a line on stderr where a block would hang a GPU.
    """
    built = build(func, arch)
    once, again = (_run(built, [np.copy(a, order="C") for a in arrays], order) for order in (0, 1))
    for one, other in zip(once, again, strict=True):
        np.testing.assert_array_equal(one, other, "the order of threads between two barriers changes the result")
    return once


def build(func: tirx.PrimFunc, arch: str) -> Built:
    key = func, arch
    if key in _built:
        return _built[key]
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")
    launches, source = _generated(func, arch)
    blocks = [tuple(int(extent) for extent in block) for _, block in launch_shapes(func)]
    code = [f'#include "{HEADER}"', translated(source), *map(_entry, launches)]
    with tempfile.TemporaryDirectory(prefix="cuda-on-cpu-") as scratch:
        file = Path(scratch, "kernel.cc")
        file.write_text("\n".join(code))
        options = ["-std=c++17", "-O1", "-w", "-fno-strict-aliasing", "-fPIC", "-shared", "-march=native"]
        done = subprocess.run(
            [compiler, *options, str(file), "-o", f"{scratch}/kernel.so"], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[:4000]
        _built[key] = Built(launches, blocks, ctypes.CDLL(f"{scratch}/kernel.so"))
    return _built[key]


def _generated(func: tirx.PrimFunc, arch: str) -> tuple[list[HostLaunch], str]:
    target = tvm.target.Target({"kind": "cuda", "arch": arch, "max_num_threads": 1024})
    launches, modules = split_launches({tvm.ir.GlobalVar(NAME): func.with_attr("global_symbol", NAME)}, target)
    ((device, kernels),) = modules.items()
    return launches[NAME], cuda_source(kernels, device)


def kernel_source(func: tirx.PrimFunc, arch: str) -> str:
    """The CUDA source of a scheduled PrimFunc."""
    return _generated(func, arch)[1]


def cuda_source(kernels: tvm.IRModule, target: tvm.target.Target) -> str:
    """What TVM writes for kernels. With CUDA's runtime loaded it would call a compiler with it: that has to wait."""
    with callbacks.replaced({cuda.CALLBACK: lambda *_: b"not compiled"}):
        return str(tvm.get_global_func("target.build.cuda")(kernels, target).inspect_source())


def _run(built: Built, arrays: list[np.ndarray], order: int) -> list[np.ndarray]:
    def size(extent: Extent) -> int:
        return arrays[extent.argument].shape[extent.axis]

    scratch: dict[int, np.ndarray] = {}
    for launch, block in zip(built.launches, built.blocks, strict=True):
        if not launch.is_made(size):
            continue
        held = []
        for buffer in launch.buffers:
            if not isinstance(buffer, int):
                made = np.full(int(buffer.elements(size)), np.nan, buffer.dtype)
                held.append(scratch.setdefault(buffer.index, made))
            else:
                held.append(arrays[buffer])
        pointers = (ctypes.c_void_p * len(held))(*(array.ctypes.data for array in held))
        scalars = [int(scalar(size)) for scalar in launch.scalars]
        dims = [*(int(axis(size)) for axis in launch.grid), *block]
        getattr(built.library, f"run_{launch.kernel}")(
            pointers, (ctypes.c_int64 * max(1, len(scalars)))(*scalars), (ctypes.c_int * 6)(*dims), order
        )
    return arrays


def _entry(launch: HostLaunch) -> str:
    """C that runs a kernel's blocks one after the other."""
    given = [f"Pointer{{buffers[{i}]}}" for i in range(len(launch.buffers))]
    given += [f"scalars[{i}]" for i in range(len(launch.scalars))]
    return f"""
extern "C" void run_{launch.kernel}(void **buffers, const int64_t *scalars, const int *dims, int order) {{
  emulated::run_grid(dims, order, {str(launch.cooperative).lower()}, [=] {{ {launch.kernel}({", ".join(given)}); }});
}}"""


# ---- from CUDA to C++


def translated(source: str) -> str:
    """The kernels of a CUDA source and the functions TVM gives them, inline assembly as calls of the header's.

    Raises AssertionError for assembly that the header knows nothing of.
    """
    start = re.search(r"(?m)^(?:// gpt2_tvm|__forceinline__ __device__|extern \"C\" __global__)", source)
    assert start, "no kernel in this source"
    code = re.sub(r"(?m)^extern \"C\" __global__ [^;{]*;\n", "", source[start.start() :])  # declarations
    code = DYNAMIC.sub(r"\1 *\2 = (\1 *)emulated::dynamic();", code)
    code = code.replace("__shared__ alignas(64)", "alignas(64) static")
    code = code.replace("unsigned int addr = __cvta_generic_to_shared(", "const half *addr = (const half *)(")
    pieces, at = [], 0
    for found in ASM.finditer(code):
        end = _closing(code, found.end() - 1)
        pieces += [code[at : found.start()], _called(code[found.end() : end])]
        at = end + 2  # past ");"
    return "".join([*pieces, code[at:]])


def _closing(text: str, opening: int) -> int:
    """Where the bracket at `opening` is closed; brackets in strings do not count."""
    depth, quoted = 0, False
    for i in range(opening, len(text)):
        if text[i] == '"' and text[i - 1] != "\\":
            quoted = not quoted
        elif not quoted:
            depth += (text[i] == "(") - (text[i] == ")")
            if depth == 0:
                return i
    raise AssertionError("a bracket that is not closed")


def _operands(statement: str) -> Iterator[str]:
    for found in re.finditer(r'"[=+]?[a-z]+"\s*\(', statement):
        yield statement[found.end() : _closing(statement, found.end() - 1)]


def _called(statement: str) -> str:
    """The call for one assembly statement: its text, then operands."""
    text = "".join(re.findall(r'"((?:[^"\\]|\\.)*)"', re.split(r'"\s*:', statement)[0] + '"'))
    given = list(_operands(statement))

    def results(name: str) -> str:
        return "".join(f" {place} = {name}[{i}];" for i, place in enumerate(given[:4]))

    if "ldmatrix.sync.aligned.m8n8.x4" in text:
        transposed = "true" if ".trans" in text else "false"
        return f"unsigned part[4]; emulated::ldmatrix({given[4]}, {transposed}, part);{results('part')}"
    if "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32" in text:
        a, b, c = (", ".join(part) for part in (given[4:8], given[8:10], given[10:14]))
        return (
            f"unsigned a[] = {{{a}}}, b[] = {{{b}}}; float c[] = {{{c}}}, d[4]; "
            f"emulated::mma(a, b, c, d);{results('d')}"
        )
    if re.search(r"wgmma\.mma_async\.sync\.aligned\.m64n\d+k16\.f32\.f16\.f16 .*, 1, 1, 0, 0;", text):
        *sums, a, b, onto = given
        return f"emulated::wgmma({{{', '.join(f'&{s}' for s in sums)}}}, {a}, {b}, {onto});"
    if text == "wgmma.commit_group.sync.aligned;":
        return "emulated::products_committed();"
    if wait := re.fullmatch(r"wgmma\.wait_group\.sync\.aligned (\d+);", text):
        return f"emulated::products_done({wait.group(1)});"
    if text == "fence.proxy.async.shared::cta;":
        return "emulated::fence_async();"
    if text == "wgmma.fence.sync.aligned;":
        return "emulated::fence_registers();"
    if text == "":  # for compilers
        return ""
    if "cp.async.cg.shared.global [%0], [%1], %2;" in text:
        return "copy_async(dst_p, src_p, 16);"
    if "cp.async.commit_group;" in text:
        return "copies_committed();"
    if wait := re.search(r"cp\.async\.wait_group (\d+);", text):
        return f"copies_arrived({wait.group(1)});"
    if text == "cp.async.cg.shared.global [%0], [%1], 16;":
        return f"copy_async({given[0].removeprefix('shared_address')}, {given[1]}, 16);"
    if text == "cp.async.wait_group %0;":
        return f"copies_arrived({given[0]});"
    if text == "red.release.gpu.global.add.u32 [%0], %1;":
        return f"*({given[0]}) += {given[1]};"
    if text in ("ld.acquire.gpu.global.u32 %0, [%1];", "ld.global.cg.f32 %0, [%1];"):
        return f"{given[0]} = *({given[1]});"
    if re.match(r"ld\.global\.(cg|L1::no_allocate)\.v4\.[fu]32 ", text):
        loads = (f"std::memcpy(&{to}, (const char *)({given[4]}) + {4 * i}, 4);" for i, to in enumerate(given[:4]))
        return f'if ((uintptr_t)({given[4]}) % 16) emulated::fail("a wide load is not aligned"); {" ".join(loads)}'
    if text == "prefetch.global.L2 [%0];":
        return f"(void)*(const volatile char *)({given[0]});"
    raise AssertionError(f"assembly that the emulator does not know: {text}")
