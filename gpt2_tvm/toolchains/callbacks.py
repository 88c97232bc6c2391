"""TVM compiles and links device code through functions under global names; this puts ours there."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

_names = threading.RLock()  # the names are global to the process, so one build at a time may own them


@contextmanager
def replaced(functions: Mapping[str, Callable[..., Any]]) -> Iterator[None]:
    """Register `functions` under TVM's global names inside this context; what stood there before returns."""
    import tvm_ffi

    with _names:
        before: dict[str, Any] = {name: tvm_ffi.get_global_func(name, allow_missing=True) for name in functions}
        try:
            for name, function in functions.items():
                tvm_ffi.register_global_func(name, function, override=True)
            yield
        finally:
            for name, earlier in before.items():
                if earlier is not None:
                    tvm_ffi.register_global_func(name, earlier, override=True)
                else:
                    tvm_ffi.remove_global_func(name)
