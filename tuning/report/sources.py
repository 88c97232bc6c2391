"""The code that TVM generated, cut into the functions that it belongs to: CUDA, MSL and WGSL sources; assembly of AMD
GPUs and CPUs."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from gpt2_tvm.toolchains import modules

LANGUAGES = {"cuda": "CUDA", "metal": "Metal (MSL)", "webgpu": "WGSL", "rocm": "AMD GPU assembly", "cpu": "assembly"}
KERNEL = re.compile(r"^(?P<function>.*)_kernel(_\d+)?$")
_MODULES = {"rocm": "hip"}  # what TVM calls the module of a kind, where not the same
_CUDA = re.compile(r'^extern "C" __global__ (?:.*?__launch_bounds__\([^)]*\) *)?[^(\n]*?\b(\w+)\(', re.M)
_SECTION = re.compile(r"^// Function: (\w+)\s*$", re.M)
_LABEL = re.compile(r"^(?:\"([^\"]+)\"|([A-Za-z_.$][\w.$]*)):", re.M)
_LAMBDA = re.compile(r"\.?L?_*tvm_parallel_lambda(?:\.\d+)?\b")
# Of assembly, what says nothing about the code: unwinding, debugging, symbol tables
_NOISE = re.compile(
    r"^\s*\.(cfi_|loc\b|file\b|type\b|size\b|p2align|globl|hidden|section|ident|addrsig|L(tmp|func)\w*:)"
)
_DEBUG_LABEL = re.compile(r"^\.L(tmp|func_begin|func_end|cfi)\w*:")


@dataclass(frozen=True)
class Kernel:
    """One kernel (on a CPU: one machine function) of a PrimFunc."""

    name: str
    text: str

    @property
    def lines(self) -> int:
        return self.text.count("\n") + 1


def generated(executable: Any, kind: str) -> dict[str, list[Kernel]]:
    """Kernels by PrimFunc, in the order in which they were generated. Empty where the executable holds no code of the
    kind (`DeviceTarget.kind`)."""
    if kind == "cpu":
        text = "\n".join(m.inspect_source("s") for m in modules.tree(executable) if m.kind == "llvm")
        return _cpu(text)
    wanted = _MODULES.get(kind, kind)
    form = "asm" if kind == "rocm" else ""
    text = "\n".join(m.inspect_source(form) for m in modules.tree(executable) if m.kind == wanted)
    kernels = _cuda(text) if kind == "cuda" else _assembly(text) if kind == "rocm" else _sections(text)
    found: defaultdict[str, list[Kernel]] = defaultdict(list)
    for kernel in kernels:
        match = KERNEL.match(kernel.name)
        if match:
            found[match["function"]].append(kernel)
    return dict(found)


def _cuda(text: str) -> list[Kernel]:
    """Definitions `extern "C" __global__ ... name(...) {`, up to the closing brace in the first column."""
    kernels = []
    for match in _CUDA.finditer(text):
        brace, semicolon = text.find("{", match.end()), text.find(";", match.end())
        if brace < 0 or 0 <= semicolon < brace:  # a declaration
            continue
        end = text.find("\n}", brace)
        kernels.append(Kernel(match[1], text[match.start() : end + 2] if end > 0 else text[match.start() :]))
    return kernels


def _sections(text: str) -> list[Kernel]:
    """MSL and WGSL: `// Function: name` stands before each."""
    starts = list(_SECTION.finditer(text))
    ends = [*(match.start() for match in starts[1:]), len(text)]
    found = [Kernel(m[1], text[m.end() : end].strip("\n")) for m, end in zip(starts, ends, strict=True)]
    return [kernel for kernel in found if not re.fullmatch(r"(\s*//.*)*", kernel.text)]  # WGSL has the line twice


def _assembly(text: str) -> list[Kernel]:
    """Every function between its label and the one after `.Lfunc_end`."""
    kernels = []
    for match in _LABEL.finditer(text):
        name = match[1] or match[2]
        if name.startswith(".L") and not _LAMBDA.fullmatch(name):
            continue
        end = re.compile(r"^\.?Lfunc_end\d+:", re.M).search(text, match.end())
        following = re.compile(r"^[A-Za-z_][\w.$]*:", re.M).search(text, match.end())
        if end is None or (following and following.start() < end.start()):  # data, not a function
            continue
        kernels.append(Kernel(name, _tidy(text[match.start() : end.start()])))
    return kernels


def _tidy(assembly: str) -> str:
    lines = [line.rstrip() for line in assembly.splitlines()]
    return "\n".join(x for x in lines if x and not _NOISE.match(x) and not _DEBUG_LABEL.match(x))


def _cpu(text: str) -> dict[str, list[Kernel]]:
    """`NAME_compute_`, with the lambdas that it runs in parallel.

    What checks the arguments of a call (`__tvm_ffi_NAME`) is left out, unless LLVM has put the computation into it.
    """
    functions = {kernel.name: kernel for kernel in _assembly(text)}
    found: dict[str, list[Kernel]] = {}
    for name, kernel in functions.items():
        function = name.removeprefix("_").removesuffix("_compute_") if name.endswith("_compute_") else ""
        if name.lstrip("_").startswith("tvm_ffi_"):
            function = name.lstrip("_").removeprefix("tvm_ffi_")
            if f"{function}_compute_" in functions or f"_{function}_compute_" in functions:
                continue
        if function:
            inner = [functions[called] for called in _called(kernel.text) if called in functions]
            found[function] = [kernel, *inner]
    return found


def _called(assembly: str) -> list[str]:
    return list(dict.fromkeys(_LAMBDA.findall(assembly)))
