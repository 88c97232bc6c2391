"""Float16 weights that lie in words of 32 bits, read as what they are where the device has float16 (`shader-f16`).

    unpack2x16float(words[n, k // 2] >> 16 * (k % 2)).x   ->   f32(weights[n, k])

The bytes are the same and so are the numbers; a kernel then loads four weights as a vector of the type that the device
converts in one instruction. Kernels without it run everywhere.
"""

from __future__ import annotations

from typing import Any

import tvm_ffi
from tvm import ir, tirx

from gpt2_tvm.kernels.dequantise import UNPACK
from gpt2_tvm.kernels.math import loads
from gpt2_tvm.quantization.words import HALVES


def with_native_halves(func: tirx.PrimFunc) -> tirx.PrimFunc | None:
    """An unscheduled function whose parameters of words [N, W] that hold float16 are float16 [N, 2 W]; None where it
    has none, or reads one in another way too."""
    found: dict[Any, Any] = {}  # words -> the same as float16

    def swap(node: tirx.Shuffle) -> Any:
        load = half_of(node)
        if load is None or load.source not in func.params:
            return node
        row, word = load.indices
        if not isinstance(word, tirx.FloorDiv):
            return node
        words = load.source
        if words not in found:
            n, w = words.shape
            found[words] = tirx.decl_buffer([n, w * HALVES], "float16", words.name)
        return tirx.Cast("float32", tirx.BufferLoad(found[words], [row, word.a]))

    body = tvm_ffi.structural_map(func.body, [(tirx.Shuffle, swap)])
    left: list[Any] = []
    tvm_ffi.structural_walk(body, [(ir.TensorLoad, left.append)], order="pre")
    if not found or any(load.source in found for load in left):
        return None
    return tirx.PrimFunc([found.get(p, p) for p in func.params], body, func.ret_type, attrs=func.attrs)


def half_of(e: Any) -> Any:
    """The load of a word whose float16 `e` is (`kernels.dequantise.half`); None for any other expression."""
    call = e.vectors[0] if isinstance(e, tirx.Shuffle) else None
    if not isinstance(call, ir.Call) or not any(getattr(a, "value", None) == UNPACK for a in call.args):
        return None
    (load,) = loads(call)
    return load
