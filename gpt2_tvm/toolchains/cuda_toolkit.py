"""Where the parts of CUDA 13 lie that compile without a GPU: pip wheels, or an installed toolkit."""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

HOW_TO_GET_IT = "pip install 'gpt2-tvm[cuda]', or install the CUDA 13 toolkit and set CUDA_PATH"
# The major version whose libcudart the CUDA runtime of the apache-tvm wheel is linked with.
MAJOR = 13
# NVRTC needs all of these. (torch's wheels bring cuda_runtime.h alone, which is not enough.)
_HEADERS = ("cuda_runtime.h", "cuda_fp16.h", "mma.h", "crt/host_defines.h")


@dataclass(frozen=True)
class Toolkit:
    """A folder with CUDA's headers, and what else was found.

    Attributes:
        root: the folder that holds `include`.
        includes: folders for the compiler's -I beyond `root/include` (CUDA's C++ library, cccl).
        fatbinary: the program that bundles images for several architectures, or None.
    """

    root: Path
    includes: tuple[Path, ...]
    fatbinary: Path | None


def find() -> Toolkit | None:
    """The first complete CUDA 13 of CUDA_PATH, the pip wheels (nvidia/cu13), /usr/local/cuda; or None."""
    return next((toolkit for root in _roots() if (toolkit := _toolkit_at(root))), None)


def nvrtc_installed() -> bool:
    """Whether `cuda.bindings`, through which NVRTC is called, can be imported."""
    try:
        return importlib.util.find_spec("cuda.bindings.nvrtc") is not None
    except ModuleNotFoundError:
        return False


def cudart_candidates() -> list[str]:
    """Paths (or, last, the bare name) under which libcudart.so.13 may be loaded, best first."""
    name = f"libcudart.so.{MAJOR}"
    found = [root / folder / name for root in _roots() for folder in ("lib", "lib64")]
    return [*(str(path) for path in found if path.is_file()), name]


def _roots() -> list[Path]:
    named = [Path(os.environ["CUDA_PATH"])] if os.environ.get("CUDA_PATH") else []
    wheels = [Path(entry) / "nvidia" / f"cu{MAJOR}" for entry in sys.path if entry]
    return [*named, *wheels, Path("/usr/local/cuda"), Path(f"/usr/local/cuda-{MAJOR}")]


def _toolkit_at(root: Path) -> Toolkit | None:
    include = root / "include"
    if not all((include / header).is_file() for header in _HEADERS) or _major_version(include) != MAJOR:
        return None
    cccl = include / "cccl"  # where CUDA 13 keeps cuda/std; earlier in `include` itself
    includes = (cccl,) if cccl.is_dir() else ()
    if not any((folder / "cuda" / "std" / "cstdint").is_file() for folder in (include, *includes)):
        return None
    fatbinary = root / "bin" / "fatbinary"
    return Toolkit(root, includes, fatbinary if os.access(fatbinary, os.X_OK) else None)


def _major_version(include: Path) -> int | None:
    try:
        text = (include / "cuda_runtime_api.h").read_text(errors="replace")
    except OSError:
        return None
    version = re.search(r"^\s*#\s*define\s+CUDART_VERSION\s+(\d+)", text, re.MULTILINE)
    return int(version.group(1)) // 1000 if version else None
