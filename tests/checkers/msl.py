"""Type-checking Metal source on any machine, with libclang (PyPI) and declarations of Metal's library.

It knows the types of Metal, not its semantics: an undeclared name, a call that fits no overload, a wrong
number of arguments, an assignment between vectors of different types are found; a missing barrier is not.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

SHIM = Path(__file__).parent / "metal_shim"
_ARGUMENTS = (
    *("-x", "c++", "-std=c++17", "-target", "arm64-apple-macos13", "-nostdinc", "-nostdinc++", f"-I{SHIM}"),
    *(
        "-Wno-unknown-attributes",
        "-Wno-user-defined-literals",
        "-Wno-reserved-user-defined-literal",
        "-ferror-limit=20",
    ),
)


_CAST = re.compile(r"\(((?:half|float|u?int|u?short|u?char|u?long)[234])\)(?=[\w(*])")  # of a vector, see the shim


@dataclass(frozen=True)
class Report:
    """The kernels that were looked at, and the errors: "kernel:line:column: message", lines of the kernel."""

    kernels: tuple[str, ...]
    errors: tuple[str, ...]


def check(source: str) -> Report:
    """Type-check MSL as TVM writes it, one part a kernel, each a program of its own to Metal."""
    from clang import cindex

    index = cindex.Index.create()
    names, errors = [], []
    for part in re.split(r"^(?=// Function: )", source, flags=re.MULTILINE):
        kernel = re.search(r"kernel void\s+(\w+)", part)
        if kernel is None:
            continue
        names.append(kernel.group(1))
        # In C++ an automatic variable can have no address space; a static one can, and nothing else changes.
        text = re.sub(r"^(\s*)threadgroup\s+(\w+\s+\w+\s*\[)", r"\1static threadgroup \2", part, flags=re.MULTILINE)
        text = _CAST.sub(r"shim_to<\1>() ->* ", text)
        unit = index.parse("kernel.cpp", args=list(_ARGUMENTS), unsaved_files=[("kernel.cpp", text)])
        for found in unit.diagnostics:
            if found.severity >= cindex.Diagnostic.Error:
                errors.append(f"{names[-1]}:{found.location.line}:{found.location.column}: {found.spelling}")
    return Report(tuple(names), tuple(errors))
