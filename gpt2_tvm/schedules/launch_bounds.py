"""Registers for the loads of a GEMV: what `ptxas` is told of the blocks that share a multiprocessor.

Told nothing but a block's threads, `ptxas` of CUDA 13 saves registers, and puts each load close to where it is used: of
the 25 loads of 16 bytes that a thread of GPT-2 XL's products makes, a few are under way together. What is under way is
what a GEMV lives on (Little: bandwidth times latency, 2.9 MB on an H200), and a GEMV of few blocks has registers to
spare. With a number of blocks to leave room for (`__launch_bounds__(threads, blocks)`), `ptxas` takes what that number
allows, and more loads come before the first wait. tests/test_cuda_loads.py counts, with and without.

A point of `--tuned` is compiled as the sweep measured it, without.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import tvm_ffi
from tvm import s_tir, tirx
from tvm.s_tir.dlight.base import get_bytes

if TYPE_CHECKING:
    from tvm.target import Target

    from gpt2_tvm.schedules.gemv_config import GemvConfig
    from gpt2_tvm.schedules.tunable_gemv import GemvShape

KEY = "tirx.launch_bounds_min_blocks_per_sm"
# Of 65,536 registers: 64 for each of 1,024 threads, or 128 for each of 512
SHORT_BYTES = 128  # of weights a thread that 64 registers hold, beside what else it does
SHORT, LONG = 1024, 512
ALONE = 108  # blocks that have a multiprocessor each on an A100 and what is larger
MOST_BLOCKS = 16  # that a multiprocessor holds, on every architecture from sm_75 on


def least_blocks(shape: GemvShape, config: GemvConfig) -> int | None:
    """The blocks of a multiprocessor to leave registers for; None leaves that to the compiler: several rows keep it
    busy with their sums, and more registers would leave some of a small product's blocks to wait for the others; packed
    weights have few loads."""
    if shape.rows > 1 or not shape.dtype.startswith("float"):
        return None
    weights = config.weight_bytes(shape.reduced or 0, get_bytes(shape.dtype))
    if weights <= SHORT_BYTES:
        return min(MOST_BLOCKS, max(1, SHORT // config.threads))
    blocks = -(-(shape.outputs or 0) // (config.ts * config.tile_s)) * config.split_k
    return 1 if blocks <= ALONE else min(MOST_BLOCKS, max(1, LONG // config.threads))


def with_room(sch: s_tir.Schedule, shape: GemvShape, config: GemvConfig, target: Target) -> s_tir.Schedule:
    """The schedule with `least_blocks` for the compiler; on targets other than CUDA as it is."""
    blocks = least_blocks(shape, config)
    if str(target.kind.name) != "cuda" or blocks is None:
        return sch

    seen: list[Any] = []

    def block_loop(node: tirx.For) -> Any:
        thread = node.thread_binding
        if seen or thread is None or thread.thread_tag != "blockIdx.x":  # a second kernel adds slices
            return node
        seen.append(node)
        told = tirx.AttrStmt(tirx.const(0, "int32"), KEY, tirx.const(blocks, "int32"), node.body)
        return tirx.For(
            node.loop_var, node.min, node.extent, node.kind, told, node.thread_binding, node.annotations, node.step
        )

    func = sch.mod["main"]
    return s_tir.Schedule(func.with_body(tvm_ffi.structural_map(func.body, [(tirx.For, block_loop)])))
