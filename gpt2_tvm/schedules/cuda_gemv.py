"""`wide-gemv`: where a product of one to eight rows stands on CUDA until it is tuned.

DLight's point reads the weight four bytes a load, in blocks of 512 threads. A GEMV is bound by the bytes it has in
flight, so here

- one load is 16 bytes, the widest there is, and neighbouring threads read neighbouring 16 bytes of one row;
- a warp (or what divides K) shares a row, several where K is long and rows are few: every thread then has a handful of
  loads, all of them under way together;
- blocks are small, so that 768 outputs still reach every multiprocessor;
- x is read through the first-level cache, 16 bytes a load: no barrier before the first weight arrives.

What follows the product (bias, GELU, residual) is in the same kernel.

Split-K over blocks, with a second kernel that adds the slices, is not done here, nor in `norm-gemv` ever (its prologue
would be computed once more for each slice). It buys bytes in flight, and the small matrices have none to gain: the
four loads of a thread, in 384 blocks of 64 threads, are the whole of a 768 x 768 float16 matrix (1.2 MB; an H200 hides
its latency from 2.9 MB on), for K = 3072 the slices are warps of one block, without a second launch, and for K = 1600
(GPT-2 XL), where eight threads share a row, a thread has registers for its 25 loads (`launch_bounds.py`). Whether
more blocks pay there is for a GPU to say: `split-gemv` is the same rule with slices (`--rules with-split-gemv`, and
`--passes without-combine-gemv` for the output projection of attention, which is else `norm-gemv`'s). Measure it
function by function: between its kernels the sums lie in TVM's workspace, which a captured graph does not own.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from tvm.s_tir.dlight.base import get_bytes

from gpt2_tvm.schedules.gemv_config import LOAD_BYTES, GemvConfig
from gpt2_tvm.schedules.launch_bounds import with_room
from gpt2_tvm.schedules.tunable_gemv import GemvShape, TunableGemv

if TYPE_CHECKING:
    from tvm import s_tir
    from tvm.target import Target

RULE = "wide-gemv"
WARP = 32
THREADS = 128  # of a block
BLOCKS = 256  # wanted at least: about two on each multiprocessor of a large GPU
LOADS = 4  # of weights a thread and row: enough to hide the latency, few enough to stay in registers
FLIGHT = 65536  # threads that fill a large GPU: from there on a row needs no second warp
MOST_ALONG_R = 128
VECTOR = 4  # multiply-adds as one vector: TVM writes no valid CUDA for eight float32 from scattered places
LEAST_ALONG_R = 4  # fewer threads a row, and a warp's loads are scattered: left to the next rule
SLICES = (5, 4, 3, 2)  # of K, tried in this order: 1600 is 8 threads x 25 loads
FLOATS = ("float32", "float16", "bfloat16")


def wide_config(shape: GemvShape, target: Target) -> GemvConfig | None:
    """The point for a shape; None where 16-byte loads do not fit it (K, weights in groups, a size that is not known).

    A chooser for `TunableGemv` and `NormGemv`.
    """
    if shape.outputs is None or shape.reduced is None or shape.grouped != 1 or shape.dtype not in FLOATS:
        return None
    lanes = LOAD_BYTES // get_bytes(shape.dtype)
    if shape.reduced % lanes:
        return None
    loads = shape.reduced // lanes  # of one row
    tr = 1
    while tr < WARP and loads % (2 * tr) == 0:
        tr *= 2
    if tr < LEAST_ALONG_R:
        return None
    while (
        tr < MOST_ALONG_R
        and tr % WARP == 0
        and loads % (2 * tr) == 0
        and loads // tr > LOADS
        and shape.outputs * tr < FLIGHT
    ):
        tr *= 2
    ts = max(1, min(THREADS, int(target.attrs["max_num_threads"])) // tr)
    while ts > 1 and ts * tr > WARP and -(-shape.outputs // ts) < BLOCKS:
        ts //= 2
    return GemvConfig(
        ts=ts,
        tr=tr,
        tile_s=1,
        tile_r=lanes,
        vec_load=LOAD_BYTES,
        vec_c=VECTOR,
        s_axis="y",
        shared_vector=False,
        unroll=256,
    )


def split_config(shape: GemvShape, target: Target) -> GemvConfig | None:
    """`wide_config`'s point with K cut into slices, instead of into warps; None where the rows alone fill a large GPU,
    or where no slice is a whole number of loads."""
    point = wide_config(shape, target)
    if point is None or shape.outputs is None or shape.reduced is None or shape.outputs * WARP >= FLIGHT:
        return None
    tr = min(point.tr, WARP)
    slices = next((s for s in SLICES if shape.reduced % (tr * point.tile_r * s) == 0), None)
    return None if slices is None else replace(point, ts=max(point.ts, WARP // tr), tr=tr, split_k=slices)


class _RoomForLoads(TunableGemv):
    """`TunableGemv` with registers for all loads of a thread (`launch_bounds.py`)."""

    def finish(self, sch: s_tir.Schedule, shape: GemvShape, config: GemvConfig, target: Target) -> s_tir.Schedule:
        return with_room(sch, shape, config, target)


def wide_gemv() -> TunableGemv:
    """The rule: `TunableGemv` at `wide_config`'s points."""
    return _RoomForLoads(wide_config)


def split_gemv() -> TunableGemv:
    """The rule: `TunableGemv` at `split_config`'s points."""
    return _RoomForLoads(split_config)
