"""What a block of a tensor-core product computes, and how many rows make which block the better one."""

from __future__ import annotations

from dataclasses import dataclass

from gpt2_tvm.errors import UserError
from gpt2_tvm.kernels.cuda_prefill_attention import CHUNK
from gpt2_tvm.kernels.spec import GpuLimits

MANY_COLUMNS = 16384  # blocks enough whatever their size: the head
DEPTHS = (128, 64, 32)
FEW_ROWS = 32  # of a number that is only known at run time: up to these have a kernel of their own
MULTIPROCESSORS = 108  # where the GPU is not known: an A100's
GROUP = 8  # rows of blocks done together, where blocks are large and many
SHARED_BYTES = 32 << 10  # of a block with many rows: three are then on a multiprocessor with 100 KiB (RTX 40)


@dataclass(frozen=True)
class TensorTile:
    """What a block computes.

    Attributes:
        rows, columns: of the result. warps_m, warps_n: along them; a warp has a multiple of 16 of both.
        depth: elements of k a step, a multiple of 16. stages: steps in shared memory at a time.
        group: rows of blocks whose columns are all done before the next rows'; 0: a column of blocks after the other.
    """

    rows: int
    columns: int
    warps_m: int
    warps_n: int
    depth: int
    stages: int
    group: int = 0

    def __post_init__(self) -> None:
        if self.rows % (16 * self.warps_m) or self.columns % (16 * self.warps_n) or self.depth % 16 or self.stages < 2:
            raise UserError(f"{self}: a warp needs a multiple of 16 rows and columns, depth one of 16, stages two")

    @property
    def threads(self) -> int:
        return 32 * self.warps_m * self.warps_n

    @property
    def stride(self) -> int:
        """Elements from row to row in shared memory."""
        return self.depth + CHUNK

    @property
    def stage(self) -> int:
        """Elements of one stage: x, then W."""
        return (self.rows + self.columns) * self.stride

    @property
    def shared_bytes(self) -> int:
        return 2 * self.stages * self.stage


def choose_tile(rows: int | None, columns: int, k: int, limits: GpuLimits) -> TensorTile | None:
    """The tile for a product of [rows, k] and [columns, k]; rows None: a shape of the caller's. None where k or the
    device does not fit.

    Few rows are bound by reading W: small blocks, so that there are many, with long steps, so that each has many
    loads under way.
    """
    many, shared = columns >= MANY_COLUMNS, limits.shared_memory_bytes
    depths: tuple[int, ...]
    if rows is not None and rows <= 32:
        height = 16 if rows <= 16 else 32
        shape = (height, 64, 1, 4) if many else (height, 32, height // 16, 2)
        depths = DEPTHS[2:] if many else DEPTHS
    elif rows is not None and rows <= 64:
        shape, depths = ((64, 64, 2, 2) if many else (64, 32, 4, 1)), DEPTHS[1:]
    else:
        shape, depths = ((128, 64, 2, 2) if many else (64, 64, 2, 2)), DEPTHS[2:]
        shared = min(shared, SHARED_BYTES)
    depth = next((d for d in depths if k % d == 0), None)
    if depth is None:
        return None
    for stages in (4, 3, 2):
        tile = TensorTile(*shape, depth, min(stages, max(2, k // depth)))
        if tile.shared_bytes <= shared and tile.threads <= limits.threads_per_block:
            return tile
    return None


def large_tile(k: int, limits: GpuLimits) -> TensorTile | None:
    """For so many rows that blocks of this size fill the GPU: 128 x 128, of which each element of x and W that is
    loaded is multiplied 128 times instead of 64. None where k or the device does not fit."""
    tile = TensorTile(128, 128, 2, 4, 32, 2, GROUP)
    fits = tile.shared_bytes <= limits.shared_memory_bytes and tile.threads <= limits.threads_per_block
    return tile if fits and k % tile.depth == 0 else None


def rows_to_fill(tile: TensorTile, columns: int, multiprocessors: int) -> int:
    """From how many rows on there is a block of `tile` for every multiprocessor; more than half a block's in any
    case."""
    blocks = -(-multiprocessors // -(-columns // tile.columns))  # of rows
    return max((blocks - 1) * tile.rows, tile.rows // 2) + 1
