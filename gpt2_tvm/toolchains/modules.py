"""Looking into what `tvm.compile` returned."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def tree(executable: Any) -> Iterator[Any]:
    """Every runtime module of an executable: its own, then what that imports, depth first, each once."""
    seen: set[int] = set()
    stack = [getattr(executable, "mod", executable)]
    while stack:
        module = stack.pop()
        handle = module.__chandle__()
        if handle in seen:
            continue
        seen.add(handle)
        yield module
        stack.extend(reversed(list(module.imports)))


def sources(executable: Any, kind: str) -> str:
    """The source in all modules of `kind` ("metal", "webgpu", ...) of `executable`; "" if there is none."""
    return "\n".join(module.inspect_source() for module in tree(executable) if module.kind == kind)
