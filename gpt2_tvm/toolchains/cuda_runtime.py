"""Loading TVM's CUDA runtime, with the NVIDIA driver or, to compile without one, a stub in its place.

Why a stub: `libtvm_runtime_cuda.so` is linked with the driver's libcuda.so.1. Without it the library does not
load, TVM says nothing, and an exported library then carries CUDA source for the receiver to compile.
Compiling calls none of the driver's functions, so a library that has their names and answers each with
CUDA_ERROR_NO_DEVICE is enough, and `tvm.cuda(0).exist` stays False.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import sys
import tempfile
import threading
from pathlib import Path

from gpt2_tvm.errors import UserError
from gpt2_tvm.toolchains import cuda_toolkit, linker

# Every function of the driver that the CUDA runtime of apache-tvm 0.27 is linked with (`nm -D
# --undefined-only`), and cuInit.
DRIVER_FUNCTIONS = (
    "cuInit",
    "cuDeviceGetName",
    "cuFuncSetAttribute",
    "cuGetErrorName",
    "cuGetErrorString",
    "cuLaunchKernelEx",
    "cuModuleGetFunction",
    "cuModuleLoadData",
    "cuModuleUnload",
    "cuTensorMapEncodeTiled",
)
CUDA_ERROR_NO_DEVICE = 100
_DRIVER_NAMES = ("libcuda.so.1", "/usr/lib/wsl/lib/libcuda.so.1")
_loading = threading.Lock()


def load(*, allow_stub: bool = False) -> bool:
    """Load TVM's CUDA runtime into this process, unless `import tvm` already did. May be called before or
    after `import tvm`.

    Args:
        allow_stub: take the stub where there is no driver: enough to compile, never to run.

    Returns:
        Whether the runtime is loaded. False without libcudart 13, or without a driver (and stub).
    """
    with _loading:
        import tvm_ffi

        if tvm_ffi.get_global_func("device_api.cuda", allow_missing=True) is not None:
            return True
        # A library already in the process serves for any of the same soname, wherever it came from.
        if not any(map(_loads, cuda_toolkit.cudart_candidates())):
            return False
        if not any(map(_loads, _DRIVER_NAMES)) and not (allow_stub and _loads(str(stub_driver()))):
            return False
        import tvm  # may load the CUDA runtime by itself, now that what it is linked with is there

        if tvm_ffi.get_global_func("device_api.cuda", allow_missing=True) is None:
            _loads(str(Path(tvm.__file__).parent / "lib" / "libtvm_runtime_cuda.so"))
        return tvm_ffi.get_global_func("device_api.cuda", allow_missing=True) is not None


def stub_driver() -> Path:
    """The stub of libcuda.so.1, built once a user with the system's compiler (or ziglang) and kept.

    Raises:
        UserError: there is no compiler.
    """
    body = "".join(f"int {name}(void) {{ return {CUDA_ERROR_NO_DEVICE}; }}\n" for name in DRIVER_FUNCTIONS)
    here = linker.this_platform()
    digest = hashlib.sha256(f"{here}{body}".encode()).hexdigest()[:12]
    library = cache_folder() / f"cuda-stub-{digest}" / "libcuda.so.1"
    if library.is_file():
        return library
    library.parent.mkdir(parents=True, exist_ok=True)
    command = linker.require_linker(here)
    with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
        source, built = Path(scratch, "stub.c"), Path(scratch, "libcuda.so.1")
        source.write_text(f'#ifdef __cplusplus\nextern "C" {{\n#endif\n{body}#ifdef __cplusplus\n}}\n#endif\n')
        linker.Linker((*command.command, "-Wl,-soname,libcuda.so.1"), here).link(built, [source])
        built.replace(library)  # two processes may build at once; each puts a whole file in place
    return library


def cache_folder() -> Path:
    """This project's folder for what can be made again: `$XDG_CACHE_HOME/gpt2-tvm` or `~/.cache/gpt2-tvm`.

    Where that cannot be written, a folder of this user's alone under the system's temporary folder.

    Raises:
        UserError: that folder belongs to someone else, whose libraries we would load.
    """
    base = os.environ.get("XDG_CACHE_HOME")
    home = Path(base) if base and Path(base).is_absolute() else Path("~/.cache").expanduser()
    folder = home / "gpt2-tvm"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    except OSError:
        pass
    folder = Path(tempfile.gettempdir()) / f"gpt2-tvm-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise UserError(f"{folder} belongs to another user; set XDG_CACHE_HOME to a folder of yours")
    return folder


def driver() -> ctypes.CDLL | None:
    """The NVIDIA driver's library (never our stub), or None where there is none."""
    if sys.platform != "linux":
        return None
    for name in _DRIVER_NAMES:
        try:
            library = ctypes.CDLL(name)
        except OSError:
            continue
        if hasattr(library, "cuDeviceGetAttribute"):  # the stub has no such function
            return library
    return None


def _loads(path: str) -> bool:
    try:
        ctypes.CDLL(path)
    except OSError:
        return False
    return True
