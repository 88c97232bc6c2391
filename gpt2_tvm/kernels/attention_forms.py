"""Other forms of an attention kernel that is in a module already: one that also appends, one for software devices."""

from __future__ import annotations

from tvm.tirx import PrimFunc

from gpt2_tvm.kernels.gpu_decode_attention import decode_attention
from gpt2_tvm.kernels.gpu_prefill_attention import prefill_attention
from gpt2_tvm.kernels.spec import AttentionSpec, GpuLimits

VECTOR = 4  # elements that a direct kernel reads at once


def appending(func: PrimFunc, limits: GpuLimits) -> PrimFunc | None:
    """The `decode_attention` that also writes the new keys and values (``append``) in place of one that does not; None
    for any other function."""
    return _decode(func, limits, append=True) if "attention_scale" in func.attrs else None


def direct(func: PrimFunc, limits: GpuLimits) -> PrimFunc | None:
    """The ``direct`` kernel, with the same grid and arguments, in place of a `prefill_attention` or `decode_attention`.

    None for any other function, and for heads that vectors of `VECTOR` do not divide.
    """
    if "attention_scale" not in func.attrs and "prefill_scale" not in func.attrs:
        return None
    if int(func.params[3].shape[-1]) % VECTOR:
        return None
    if "prefill_scale" in func.attrs:
        return prefill_attention(_spec(func, "prefill_scale"), limits, direct=True)
    return _decode(func, limits, direct=True)


def _decode(func: PrimFunc, limits: GpuLimits, append: bool = False, direct: bool = False) -> PrimFunc:
    batch, rows = (int(extent) for extent in func.params[0].shape[:2])
    splits = int(func.attrs["attention_splits"]) if "attention_splits" in func.attrs else None
    tree, append = len(func.params) == 6, append or bool(func.attrs["attention_append"])
    return decode_attention(_spec(func, "attention_scale"), limits, batch, rows, tree, append, splits, direct).partial


def _spec(func: PrimFunc, scale: str) -> AttentionSpec:
    """From the shape of the cache, [2, b, H, S, D], and an attribute."""
    cache = func.params[3]
    n_head, capacity, head_dim = (int(extent) for extent in cache.shape[2:])
    return AttentionSpec(n_head, head_dim, capacity, str(cache.dtype), float(func.attrs[scale].value))
