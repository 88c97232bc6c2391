"""TVM without torch, where a process has no use for torch.

apache-tvm-ffi imports torch where it is installed, to exchange tensors with it; that is most of the time that
`import tvm` takes. Processes that are started by the dozen leave it out.
"""

from __future__ import annotations

import sys


def import_tvm() -> None:
    """Import TVM, and torch only if it is there already. Torch can be imported later; tensors then go between the two
    by DLPack's own protocol."""
    if "torch" in sys.modules or "tvm_ffi" in sys.modules:
        import tvm

        return
    sys.modules["torch"] = None  # type: ignore[assignment]  # an import of it raises ImportError, which tvm_ffi expects
    try:
        import tvm  # noqa: F401
    finally:
        del sys.modules["torch"]
