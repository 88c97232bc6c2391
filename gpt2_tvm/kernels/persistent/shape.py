"""What a persistent step is made for: a model, a precision and a GPU; and which of them it declines."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gpt2_tvm.config import GPT2Config
from gpt2_tvm.errors import UserError
from gpt2_tvm.quantization import Scheme

if TYPE_CHECKING:
    from targets import DeviceTarget

RULE = "persistent"  # of schedules.registry
LANES = 32
THREADS = 256  # of a block: 255 registers each, and eight warps are enough to keep a multiprocessor's loads coming
VECTOR_BYTES = 16
OLDEST = 80  # cp.async, and barriers with acquire and release
BYTES = {"float32": 4, "float16": 2}
MOST_PACKETS = 32  # in a ring: the hardware counts 63 groups of copies
FEWEST_PACKETS = 3  # of a ring: below, a product would wait for memory
MOST_SPLITS = 16  # of a head's slots: their merge is in registers
RESERVED_BYTES = 1024  # of a block's shared memory, by CUDA
OF_LAYER, OF_MODEL = 13, 5  # pointers: see stream.cuh


def capability(arch: str) -> int:
    """90 for "sm_90" and "sm_90a", 0 where it says none."""
    return int("".join(filter(str.isdigit, arch)) or 0)


def suits(target: DeviceTarget) -> bool:
    """Whether a target can have the rule: NVIDIA's GPUs from Ampere on, their multiprocessors counted."""
    return target.kind == "cuda" and target.cores is not None and capability(target.arch()) >= OLDEST


def _up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


@dataclass(frozen=True)
class StepShape:
    """Everything that decides the kernel's code.

    grid: blocks, one on each multiprocessor. threads: of a block. dtype: of weights and caches. capacity: of the cache,
    in tokens. shared_bytes: that a block may have at most.
    """

    config: GPT2Config
    dtype: str
    capacity: int
    grid: int
    shared_limit: int
    threads: int = THREADS

    @property
    def elements(self) -> int:
        """Of a weight, in a load of 16 bytes."""
        return VECTOR_BYTES // BYTES[self.dtype]

    @property
    def packet(self) -> int:
        """Loads of a thread that are waited for together: a row of E elements is one to a few packets, with little
        left over."""
        a_lane = -(-self.config.n_embd // (self.elements * LANES))
        return -(-a_lane // -(-a_lane // 4))

    @property
    def splits(self) -> int:
        """Of a head's slots, at most: as many as there are blocks for."""
        return max(1, min(MOST_SPLITS, self.grid // self.config.n_head))

    @property
    def areas(self) -> dict[str, int]:
        """Shared memory of a block but for the ring: bytes by name, in order, each a multiple of 16."""
        c, warps = self.config, self.threads // LANES
        widest = max(c.n_embd, c.n_inner, warps * (c.head_dim + 2))
        sizes = {
            "table": 8 * (c.n_layer * OF_LAYER + OF_MODEL),
            "residual": 4 * c.n_embd,
            "x": 4 * widest,
            "factors": 4 * c.n_head * self.splits,
            "meet": 4 * 2 * warps,
        }
        return {name: _up(size, VECTOR_BYTES) for name, size in sizes.items()}

    @property
    def depth(self) -> int:
        """Packets in a thread's ring."""
        left = self.shared_limit - sum(self.areas.values())
        return min(MOST_PACKETS, left // (self.packet * VECTOR_BYTES * self.threads))

    @property
    def shared_bytes(self) -> int:
        """Of a block, all of it."""
        return sum(self.areas.values()) + self.depth * self.packet * VECTOR_BYTES * self.threads

    @property
    def work(self) -> dict[str, int]:
        """The kernel's own global memory: float32 elements by name, in order, each a multiple of 4."""
        c = self.config
        sizes = {
            "query": c.n_embd,
            "parts": c.n_head * self.splits * (c.head_dim + 2),
            "after_attention": c.n_embd,
            "after_mlp": c.n_embd,
            "inner": c.n_inner,
        }
        return {name: _up(size, 4) for name, size in sizes.items()}

    @property
    def barriers(self) -> int:
        """Of the whole grid, in one step."""
        return 5 * self.config.n_layer

    def scale(self, layer: int) -> float:
        """Of scores, for powers of two."""
        return self.config.attention_scale(layer) * math.log2(math.e)


def step_shape(
    config: GPT2Config, scheme: Scheme, target: DeviceTarget, capacity: int, batch_sizes: tuple[int, ...] = (1,)
) -> StepShape:
    """The step for one sequence on `target`, one block a multiprocessor.

    Raises UserError, in a line, for a target, a scheme or a model that it is not made for.
    """

    def refuse(why: str, instead: str) -> UserError:
        return UserError(f"rule {RULE!r}: {why}; {instead}")

    without = f"leave {RULE!r} out of --rules"
    if target.kind != "cuda" or capability(target.arch()) < OLDEST:
        raise refuse(f"its kernel is for NVIDIA GPUs from sm_{OLDEST} on, not {target.name}", without)
    if target.cores is None:
        raise refuse(
            f"its grid is one block for each multiprocessor, and {target.name} does not say how many there are",
            "give the target of one GPU, such as h200",
        )
    if 1 not in batch_sizes:
        raise refuse(
            f"its kernel takes one sequence, --batch-sizes {','.join(map(str, batch_sizes))} has no 1",
            "add 1 (other sizes get the other rules' kernels), or " + without,
        )
    if scheme.weight_dtype != scheme.compute_dtype or scheme.compute_dtype not in BYTES:
        raise refuse(f"its kernel has no {scheme.name}", "choose --quantization q0f16 or q0f32, or " + without)
    if config.pruned:
        raise refuse("its kernel takes layers of one size, and this model is pruned", without)
    shape = StepShape(
        config, scheme.compute_dtype, capacity, target.cores.count, target.cores.shared_memory_bytes - RESERVED_BYTES
    )
    for name, size in (("n_embd", config.n_embd), ("n_inner", config.n_inner), ("head size", config.head_dim)):
        if size % shape.elements:
            raise refuse(
                f"it loads {shape.elements} {shape.dtype} at a time, and {name} {size} is no multiple of that", without
            )
    if config.head_dim > LANES * shape.elements:
        raise refuse(f"a head of {config.head_dim} {shape.dtype} is more than a warp loads at once", without)
    if shape.depth < FEWEST_PACKETS:
        raise refuse(f"a block of {target.name} has {shape.shared_limit} bytes of shared memory, too few", without)
    return shape
