"""The spaces that the GEMV tuner searches, as data: for each parameter the values to try.

| space | what grows | from |
| --- | --- | --- |
| schedule1 | the tile along the outputs: TILE_R = 8, TILE_S searched | the 2023 study, its schedule 1 |
| schedule2 | the tile along the reduction: TILE_S = 1, TILE_R a multiple of 8 | the 2023 study, its schedule 2 |
| full | all parameters of `GemvConfig` | |

TS and TR go over powers of two. What a space leaves out has the value that DLight gives it on that kind of target, but
for VEC_LOAD in the study's two: as wide as the tile and the device allow.

A point that cannot be built, or that is known to be slow for a reason of its own, is dropped before it costs a trial:
`CONSTRAINTS` say why, and the sweep shows how many each of them dropped.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from gpt2_tvm.errors import UserError
from gpt2_tvm.schedules.gemv_config import GemvConfig, stock_config
from tuning.workloads import ITEM_BYTES, Workload

if TYPE_CHECKING:
    from targets import DeviceTarget

POWERS = tuple(2**i for i in range(11))
WIDEST = "widest"  # VEC_LOAD: as many bytes as the tile and the device allow
VECTOR_BYTES = 16
WORD_BYTES = 4  # int8 and 4-bit weights are loaded in words of 32 bits
LANES = {"webgpu": 4, "metal": 4}  # of the widest vector that WGSL and MSL have
GRID_X = {"webgpu": 65535}
# Registers of 32 bits that one thread can have. Apple names no figure.
REGISTERS = {"cuda": 255, "rocm": 512}
RESERVED_REGISTERS = 24  # addresses, loop counters, the epilogue
MIN_THREADS = 16


@dataclass(frozen=True)
class Space:
    """A named table of values: parameter (in the study's spelling) -> what to try."""

    name: str
    title: str
    values: Mapping[str, tuple[Any, ...]]


SPACES: dict[str, Space] = {
    space.name: space
    for space in (
        Space(
            "schedule1",
            "TILE_R = 8, TILE_S searched",
            {"TS": POWERS, "TR": POWERS, "TILE_S": (1, 2, 4, 8), "TILE_R": (8,), "VEC_LOAD": (WIDEST,)},
        ),
        Space(
            "schedule2",
            "TILE_S = 1, TILE_R a multiple of 8",
            {"TS": POWERS, "TR": POWERS, "TILE_S": (1,), "TILE_R": (8, 16, 24, 32, 48, 64), "VEC_LOAD": (WIDEST,)},
        ),
        Space(
            "full",
            "every parameter",
            {
                "TS": POWERS,
                "TR": POWERS,
                "TILE_S": (1, 2, 4, 8),
                "TILE_R": (1, 2, 4, 8, 16, 32),
                "VEC_LOAD": (4, 8, 16),
                "VEC_C": (1, 4),
                "S_AXIS": ("x", "y"),
                "SHARED_VECTOR": (False, True),
                "UNROLL": (0, 64, 256),
                "REDUCTION": ("shuffle", "shared"),
                "SPLIT_K": (1, 2, 4, 8),
            },
        ),
    )
}


def get_spaces(text: str) -> list[Space]:
    """The spaces of a comma list; UserError names the known ones."""
    names = [part.strip() for part in text.split(",") if part.strip()]
    unknown = [name for name in names if name not in SPACES]
    if unknown or not names:
        raise UserError(f"unknown space {', '.join(unknown) or text!r}; choose from {', '.join(SPACES)}")
    return [SPACES[name] for name in dict.fromkeys(names)]


@dataclass(frozen=True)
class Context:
    """What a constraint looks at."""

    workload: Workload
    target: DeviceTarget

    @property
    def item(self) -> int:
        return ITEM_BYTES.get(self.workload.dtype, 1)  # of int4 there are two in a byte

    @property
    def loaded_bytes(self) -> int:
        """Of one lane of a load."""
        return WORD_BYTES if self.workload.dtype in ("int8", "int4") else self.item

    def tile_bytes(self, tile_r: int) -> int:
        """Weights of one output in a thread's tile; 0 where they are no whole byte."""
        return tile_r * self.item if self.workload.dtype != "int4" else tile_r // 2 * (tile_r % 2 == 0)

    @property
    def widest_bytes(self) -> int:
        """Of one load."""
        return min(VECTOR_BYTES, LANES.get(self.target.kind, VECTOR_BYTES) * self.loaded_bytes)

    def shared_bytes(self, c: GemvConfig) -> int:
        """Shared memory of one block, as `TunableGemv` and TVM's lowering use it."""
        w = self.workload
        activation = ITEM_BYTES[w.activation_dtype]
        vector = w.reduced * w.rows * activation if c.shared_vector else 0
        across = c.reduction == "shared" or self.target.kind not in ("cuda", "metal")
        if across and c.tr > 1:
            return vector + c.threads * 4  # one float32 a thread at a time
        warps = c.threads // 32 * 4 if c.tr > 32 else 0
        return vector + warps

    def registers(self, c: GemvConfig) -> int:
        """32-bit registers of one thread: weights of a step, sums of all lanes and rows, activations of a step."""
        w = self.workload
        weights = -(-c.tile_s * c.tile_r * self.item // 4)
        sums = c.tile_s * w.rows * (c.vec_c + 1)
        return weights + sums + c.vec_c + RESERVED_REGISTERS


Constraint = Callable[[GemvConfig, Context], bool]


def _thread_limit(c: GemvConfig, at: Context) -> bool:
    return c.threads > (at.target.limits.threads_per_block or 256)


def _shared_limit(c: GemvConfig, at: Context) -> bool:
    return at.shared_bytes(c) > (at.target.limits.shared_memory_bytes or 16384)


def _register_limit(c: GemvConfig, at: Context) -> bool:
    return at.target.kind in REGISTERS and at.registers(c) > REGISTERS[at.target.kind]


def _alignment(c: GemvConfig, at: Context) -> bool:
    return not at.loaded_bytes <= c.vec_load <= at.widest_bytes or at.tile_bytes(c.tile_r) % c.vec_load != 0


@dataclass(frozen=True)
class Reason:
    """Why a point falls. reads: the parameters that decide it, beside those that a space leaves out."""

    why: str
    reads: frozenset[str]
    fails: Constraint


def _reason(why: str, reads: str, fails: Constraint) -> Reason:
    return Reason(why, frozenset(reads.split()), fails)


_DIVIDES = "TR x TILE_R does not divide K"
CONSTRAINTS: tuple[Reason, ...] = (
    _reason(f"fewer than {MIN_THREADS} threads a block", "ts tr", lambda c, at: c.threads < MIN_THREADS),
    _reason("more threads than a block may have", "ts tr", _thread_limit),
    _reason(_DIVIDES, "tr tile_r", lambda c, at: at.workload.reduced % (c.tr * c.tile_r) != 0),
    _reason("a vector load would cross the tile, or is wider than the device loads", "tile_r vec_load", _alignment),
    _reason(
        "one block would own more than all outputs",
        "ts tile_s",
        lambda c, at: c.ts * c.tile_s > at.workload.outputs,
    ),
    _reason(
        "more blocks than the grid's x axis may have",
        "ts tile_s",
        lambda c, at: -(-at.workload.outputs // (c.ts * c.tile_s)) > GRID_X.get(at.target.kind, 2**31 - 1),
    ),
    _reason("more registers than a thread may have", "tile_s tile_r vec_c", _register_limit),
    _reason("more shared memory than a block may have", "ts tr shared_vector reduction", _shared_limit),
    _reason(
        "shared memory for a reduction that one thread does alone",
        "tr reduction",
        lambda c, at: c.reduction == "shared" and c.tr == 1,
    ),
    _reason(
        "shared memory for the reduction is all that the device has",
        "reduction",
        lambda c, at: c.reduction == "shared" and at.target.kind not in ("cuda", "rocm", "metal"),
    ),
    _reason(_DIVIDES, "tr tile_r split_k", lambda c, at: at.workload.reduced % (c.tr * c.tile_r * c.split_k) != 0),
)


@dataclass(frozen=True)
class Points:
    """The points of a space that can be tried for one workload.

    Attributes:
        configs: without doubles, in the order of the space's table.
        dropped: how many each constraint took out, by its reason.
    """

    space: Space
    configs: tuple[GemvConfig, ...]
    dropped: Counter[str]

    @property
    def total(self) -> int:
        """Points of the whole table."""
        return len(self.configs) + sum(self.dropped.values())


def points(space: Space, workload: Workload, target: DeviceTarget) -> Points:
    """Every point of `space` for a product on a device, and why the others are not tried.

    Parameters get their values one after the other, and what some of them rule out takes every point below with it:
    `full` has two million.
    """
    at = Context(workload, target)
    kept: dict[GemvConfig, None] = {}
    dropped: Counter[str] = Counter()
    stock = stock_point(workload, target)
    names = [name.lower() for name in space.values]
    follow = None if "vec_c" in names else stock.vec_c
    below = [math.prod(len(values) for values in list(space.values.values())[i + 1 :]) for i in range(len(names))]
    # each reason as soon as the last parameter that it reads is there; those that a space leaves out may follow TILE_R
    fixed = {name for reason in CONSTRAINTS for name in reason.reads} - set(names)
    when: list[list[Reason]] = [[] for _ in names]
    for reason in CONSTRAINTS:
        reads = {("tile_r" if name in fixed else name) for name in reason.reads}
        when[max(names.index(name) for name in reads)].append(reason)

    def give(config: GemvConfig, depth: int) -> None:
        if depth == len(names):
            if config in kept:
                dropped["the same as another point"] += 1
            kept[config] = None
            return
        for value in space.values[names[depth].upper()]:
            if names[depth] == "vec_c" and config.tile_r % value:  # no GemvConfig
                dropped["VEC_C does not divide TILE_R"] += below[depth]
                continue
            changed = _with(config, names[depth], value, follow, at)
            failed = next((reason.why for reason in when[depth] if reason.fails(changed, at)), None)
            if failed is None:
                give(changed, depth + 1)
            else:
                dropped[failed] += below[depth]

    give(replace(stock, vec_c=1), 0)
    return Points(space, tuple(kept), dropped)


def _with(config: GemvConfig, name: str, value: Any, vec_c: int | None, at: Context) -> GemvConfig:
    """`config` with a parameter of a space. vec_c: goes with TILE_R, as far as it divides the tile."""
    if name == "vec_load" and value == WIDEST:
        value = _widest(config.tile_r, at)
    if name == "tile_r" and vec_c is not None:
        return replace(config, tile_r=value, vec_c=max(v for v in (1, 2, 4, 8) if v <= vec_c and value % v == 0))
    return replace(config, **{name: value})


def stock_point(workload: Workload, target: DeviceTarget) -> GemvConfig:
    """Where dl.gpu.GEMV of TVM 0.27 stands."""
    return stock_config(target.tvm_target(), workload.outputs, workload.reduced)


def why_not(config: GemvConfig, workload: Workload, target: DeviceTarget) -> str | None:
    """The first reason not to try a point, or None."""
    at = Context(workload, target)
    return next((reason.why for reason in CONSTRAINTS if reason.fails(config, at)), None)


def _widest(tile_r: int, at: Context) -> int:
    nbytes = at.widest_bytes
    while nbytes > at.loaded_bytes and at.tile_bytes(tile_r) % nbytes:
        nbytes //= 2
    return nbytes


def describe(config: GemvConfig, stock: GemvConfig | None = None, only: Iterable[str] = ()) -> str:
    """One line: TS=8 TR=16 TILE_S=1 TILE_R=8, and what else differs from `stock`."""
    first = ("TS", "TR", "TILE_S", "TILE_R")
    values = config.to_json()
    against = stock.to_json() if stock else {}
    rest = [
        name for name in values if name not in first and (name in only or (stock and values[name] != against[name]))
    ]
    return " ".join(f"{name}={values[name]}" for name in (*first, *rest))
