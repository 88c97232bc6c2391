"""Importing TVM's tensor intrinsics (tensor cores, simdgroup matrices) in 2 s instead of 20 s.

DLight's matmul rules import them when they first meet a float16 matmul. Each of the about 500 intrinsics is a
TVMScript function, and TVMScript calls `inspect.stack()` once a function, which for every frame of the stack
searches all loaded modules for its source: 0.04 to 0.12 s a call, the more the more modules (torch, say) are
loaded. Of the answer only the frames and one line of source are used, so a stack that reads its lines
straight from the file gives the same result. The same holds for kernels of ours: each call of a `T.inline` asks for
the frames around it.
"""

from __future__ import annotations

import importlib
import inspect
import linecache
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# The kinds whose DLight rules tensorize. (rocm's matmul uses no matrix instructions, webgpu has none.)
KINDS = ("cuda", "metal")
_patching = threading.RLock()


def load(kind: str) -> None:
    """Register the tensor intrinsics that scheduling for `kind` asks for, if it asks for any."""
    if kind in KINDS:
        with light_stack():
            importlib.import_module(f"tvm.s_tir.tensor_intrin.{kind}")


@contextmanager
def light_stack() -> Iterator[None]:
    """Make `inspect.getouterframes()`, and `inspect.stack()`, which calls it, take microseconds: worth it around an
    import of many TVMScript functions, and where kernels are parsed.

    Other threads see it too meanwhile, and get one line of source a frame where they ask for more; one that enters
    here waits for the first to leave.
    """
    with _patching:
        original = inspect.getouterframes
        inspect.getouterframes = _outer_frames
        try:
            yield
        finally:
            inspect.getouterframes = original


def _outer_frames(frame: Any, context: int = 1) -> list[inspect.FrameInfo]:
    """`inspect.getouterframes` of a frame, with at most one line of source each."""
    frames: list[inspect.FrameInfo] = []
    while frame is not None:
        code = frame.f_code
        line = linecache.getline(code.co_filename, frame.f_lineno, frame.f_globals) if context else ""
        lines, index = ([line], 0) if line else (None, None)
        frames.append(inspect.FrameInfo(frame, code.co_filename, frame.f_lineno, code.co_name, lines, index))
        frame = frame.f_back
    return frames
