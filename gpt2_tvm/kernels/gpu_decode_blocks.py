"""How attention of few rows is cut into blocks, threads and splits (`gpu_decode_attention`)."""

from __future__ import annotations

from typing import NamedTuple

from tvm.tirx import PrimFunc

from gpt2_tvm.errors import UserError
from gpt2_tvm.kernels.gpu_prefill_attention import padded, steps
from gpt2_tvm.kernels.spec import AttentionSpec, GpuLimits

THREADS = 128
SLOTS = 8  # of a tile, in one group of threads: eight loads of values in flight a thread
MAX_TREE_ROWS = 32  # bits in a row of the tree
SHARED_ROWS = 8  # rows of a sequence that share the loads: their sums are 4 registers each
MAX_SPLITS = 32
# Blocks wanted in flight: a large GPU has some 130 cores that each hold several; the smaller ones behind Metal and
# WebGPU are full sooner, and every split costs the merge.
BLOCKS = {"cuda": 256, "rocm": 256}
FEWER_BLOCKS = 64


class DecodeKernels(NamedTuple):
    """partial: ``(qkv [B, m, 3HD], positions [B], lengths [B], cache [2, B, H, S, D], [tree [B, m],] parts)``.

    combine: ``(parts, positions [B], lengths [B], out [B, m, HD])``; None where there is one split: then the last
    argument of partial is ``out`` itself. workspace: shape of parts, float32 ``[B, m, H, splits, D + 2]`` (weighted sum
    of values, maximum, sum of weights), or None with combine.
    """

    partial: PrimFunc
    combine: PrimFunc | None
    workspace: tuple[int, ...] | None


def choose_splits(spec: AttentionSpec, limits: GpuLimits, blocks: int, tile: int) -> int:
    """Splits of a head where there are `blocks` blocks without: enough to fill the device, none without work."""
    wanted = BLOCKS.get(limits.kind, FEWER_BLOCKS) // blocks
    return max(1, min(wanted, steps(spec.capacity, tile), MAX_SPLITS))


class DecodeBlocks(NamedTuple):
    """A block: threads in groups, each group with `runs` threads of four elements and SLOTS slots of a tile."""

    threads: int
    groups: int
    tile: int  # slots that a block takes at a time
    runs: int  # of four elements in a row: threads in a group
    lanes: int  # elements of a load
    unit: int  # slots that splits are made of
    merging: int  # threads of the kernel that merges the splits
    chunks: int  # of rows, a block each
    height: int  # rows in a chunk; those past the last one are left out
    stride: int  # of a key in shared memory
    staged: int  # elements of shared memory for keys
    q_staged: int  # and for queries
    splits: int

    @property
    def lines(self) -> int:
        """Threads with the same key: each takes every lines-th row."""
        return self.threads // self.tile

    @property
    def per_line(self) -> int:
        return steps(self.height, self.lines)

    @property
    def pieces(self) -> int:
        """Loads of a run."""
        return 4 // self.lanes


def plan_blocks(
    spec: AttentionSpec, limits: GpuLimits, batch: int, rows: int, splits: int | None, direct: bool
) -> DecodeBlocks:
    """Raises UserError for rows outside 1 to 32, or where a block does not fit the device."""
    if not 1 <= rows <= MAX_TREE_ROWS:
        raise UserError(f"one call can verify 1 to {MAX_TREE_ROWS} tokens a sequence, not {rows}")
    n_head, head_dim = spec.n_head, spec.head_dim
    threads = min(THREADS, limits.threads_per_block)
    lanes = limits.lanes(head_dim)
    runs = steps(head_dim, 4)  # of four elements in a row: threads in a group
    groups = min(threads // runs, threads // SLOTS, SLOTS)
    tile = groups * SLOTS
    unit, merging = tile, threads  # what splits are made of, and threads of the kernel that merges them
    if direct and groups:
        threads, groups, tile = max(runs, SLOTS), 1, SLOTS
    chunks = steps(rows, SHARED_ROWS)  # of rows, a block each
    height = steps(rows, chunks)  # rows in a chunk; those past the last one are left out
    stride = padded(head_dim)
    staged, q_staged = (1, 1) if direct else (tile * stride, height * runs * 4)
    shared = 4 * (staged + q_staged + height * tile + 2 * groups * height)
    if groups < 1 or shared > limits.shared_memory_bytes:
        raise UserError(
            f"flash attention over heads of {head_dim} needs blocks of {max(runs, SLOTS)} threads and {shared} bytes "
            f"of shared memory; the target allows {limits.threads_per_block} and {limits.shared_memory_bytes}: "
            "compile with --attention materialized"
        )
    count = splits or choose_splits(spec, limits, batch * chunks * n_head, unit)
    return DecodeBlocks(
        threads, groups, tile, runs, lanes, unit, merging, chunks, height, stride, staged, q_staged, count
    )
