"""What every attention kernel is told: the shape of the attention and the limits of the device.

Layouts, the same on all devices (H heads of D elements, capacity S):

==========  ======================  =====================================================================
qkv         ``[b, n, 3*H*D]``       queries | keys | values, head h at ``h*D`` within each
cache       ``[2, b, H, S, D]``     0 = keys, 1 = values; one buffer a layer, written in place
positions   ``[b]`` int32           tokens already in the cache, for each sequence
lengths     ``[b]`` int32           rows of this call that count; rows from there on are right padding
out         ``[b, n, H*D]``         ready for the output projection; zeros in padded rows
==========  ======================  =====================================================================

Tensors are float32, float16 or bfloat16; scores, softmax and sums are float32 always.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from gpt2_tvm.errors import UserError

MAX_HEAD_DIM = 256
DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class AttentionSpec:
    """One layer's attention.

    n_head: heads, H. head_dim: elements a head, D, 1 to 256. capacity: slots in the cache, S.
    dtype: of qkv, cache and out, "float32", "float16" or "bfloat16".
    scale: what ``q . k`` is multiplied by before the softmax (``1/sqrt(D)`` usually).
    Raises UserError for a value outside these ranges.
    """

    n_head: int
    head_dim: int
    capacity: int
    dtype: str
    scale: float

    def __post_init__(self) -> None:
        if self.n_head < 1 or self.capacity < 1:
            raise UserError(
                f"attention needs at least one head and one slot, not {self.n_head} heads and a context of "
                f"{self.capacity}; correct n_head and n_positions in the model's config.json"
            )
        if not 1 <= self.head_dim <= MAX_HEAD_DIM:
            raise UserError(
                f"heads of {self.head_dim} elements are not supported by the flash kernels (1 to {MAX_HEAD_DIM}); "
                "compile with --attention materialized"
            )
        if self.dtype not in DTYPES:
            raise UserError(f"attention in {self.dtype} is not supported; choose one of {', '.join(DTYPES)}")
        if not math.isfinite(self.scale):
            raise UserError(f"the attention scale is {self.scale}; correct the model's config.json")

    @property
    def width(self) -> int:
        """H*D: elements of q, k or v in one row of qkv."""
        return self.n_head * self.head_dim


@dataclass(frozen=True)
class GpuLimits:
    """What one block may use.

    kind: TVM's target kind ("cuda", "metal", "rocm", "webgpu"). threads_per_block: at most.
    shared_memory_bytes: at most, for one block. warp_size: threads that run in step (1 where unknown). arch: of CUDA
    the compute capability, 90 for sm_90a (0 where unknown).
    """

    kind: str
    threads_per_block: int
    shared_memory_bytes: int
    warp_size: int
    arch: int = 0

    @classmethod
    def of_target(cls, target: Any) -> GpuLimits:
        """The limits that a ``tvm.target.Target`` states; 48 KiB of shared memory where it states none."""
        attrs = target.attrs
        kind = str(target.kind.name)
        arch = re.fullmatch(r"sm_(\d+)[a-z]?", str(attrs.get("arch", ""))) if kind == "cuda" else None
        return cls(
            kind=kind,
            threads_per_block=int(attrs.get("max_num_threads", 256)),
            shared_memory_bytes=int(attrs.get("max_shared_memory_per_block", 48 * 1024)),
            warp_size=int(attrs.get("thread_warp_size", 1)),
            arch=int(arch.group(1)) if arch else 0,
        )

    def lanes(self, extent: int) -> int:
        """Elements that one thread moves at once along a contiguous axis of `extent` elements: 4, 2 or 1.

        In WGSL too, where `schedules.webgpu_pipeline` makes arrays of vectors of what is touched in vectors alone.
        """
        return next(lanes for lanes in (4, 2, 1) if extent % lanes == 0)
