"""`GemvConfig`: every choice that `TunableGemv` takes as data, and the point of that space where DLight's GEMV stands.

A matrix-vector product y[s] = sum over r of W[s, r] x[r] is cut twice:

    s = (block · TS + thread s) · TILE_S + row of the tile
    r = ((step · TR + thread r) · TILE_R / VEC_C + vector) · VEC_C + lane

so that a block of TS x TR threads owns TS · TILE_S outputs, and each thread reads TILE_R neighbouring weights of
TILE_S rows a step.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from gpt2_tvm.errors import UserError

if TYPE_CHECKING:
    from tvm.target import Target

AXES = ("x", "y")
LOAD_BYTES = 16  # of the widest load there is
REDUCTIONS = ("shuffle", "shared")


@dataclass(frozen=True)
class GemvConfig:
    """One point.

    Attributes:
        ts: threads along the outputs.
        tr: threads along the reduction.
        tile_s: outputs a thread.
        tile_r: neighbouring weights of one row that a thread takes a step; a multiple of vec_c.
        vec_load: bytes of one load of weights, up to 16; at least the size of a weight.
        vec_c: multiply-adds written as one vector.
        s_axis: which of threadIdx.x and .y carries ts; the other carries tr.
        shared_vector: x is read into shared memory once a block.
        vec_shared: elements of one such read, at most.
        unroll: unroll the inner loops up to so many steps.
        reduction: how the tr partial sums meet: "shuffle" within a warp (through shared memory only between
            warps), or "shared" memory throughout.
        split_k: blocks that share one output; above 1 a second kernel adds their sums and does the epilogue.
    """

    ts: int
    tr: int
    tile_s: int = 1
    tile_r: int = 1
    vec_load: int = 4
    vec_c: int = 1
    s_axis: str = "y"
    shared_vector: bool = False
    vec_shared: int = 1
    unroll: int = 64
    reduction: str = "shuffle"
    split_k: int = 1

    def __post_init__(self) -> None:
        for name in ("ts", "tr", "tile_s", "tile_r", "vec_load", "vec_c", "vec_shared", "split_k"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise UserError(f"GemvConfig: {name.upper()} = {value!r} must be a whole number of at least 1")
        if self.unroll < 0:
            raise UserError(f"GemvConfig: UNROLL = {self.unroll} must not be negative")
        if self.s_axis not in AXES:
            raise UserError(f"GemvConfig: S_AXIS = {self.s_axis!r} must be one of {', '.join(AXES)}")
        if self.reduction not in REDUCTIONS:
            raise UserError(f"GemvConfig: REDUCTION = {self.reduction!r} must be one of {', '.join(REDUCTIONS)}")
        if self.tile_r % self.vec_c:
            raise UserError(f"GemvConfig: TILE_R = {self.tile_r} must be a multiple of VEC_C = {self.vec_c}")

    @property
    def threads(self) -> int:
        """Threads of one block."""
        return self.ts * self.tr

    def weight_bytes(self, reduced: int, item: int) -> int:
        """Bytes of weights that one thread reads, of rows of `reduced` weights of `item` bytes."""
        return reduced // self.tr // self.split_k * self.tile_s * item

    @property
    def s_tag(self) -> str:
        return f"threadIdx.{self.s_axis}"

    @property
    def r_tag(self) -> str:
        return "threadIdx.x" if self.s_axis == "y" else "threadIdx.y"

    def to_json(self) -> dict[str, Any]:
        """Keys in the study's spelling: TS, TR, TILE_S, TILE_R, VEC_LOAD, ..."""
        return {name.upper(): value for name, value in asdict(self).items()}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> GemvConfig:
        """The inverse of `to_json`; what is left out keeps its default. UserError names an unknown key."""
        names = {f.name.upper(): f.name for f in fields(cls)}
        unknown = sorted(set(values) - set(names))
        if unknown:
            raise UserError(f"GemvConfig: unknown parameter {', '.join(unknown)}; known are {', '.join(names)}")
        missing = sorted({"TS", "TR"} - set(values))
        if missing:
            raise UserError(f"GemvConfig: {', '.join(missing)} missing")
        return cls(**{names[key]: value for key, value in values.items()})


def largest_factor(n: int, candidates: tuple[int, ...]) -> int:
    """The largest candidate that divides n, or 1."""
    return max((c for c in candidates if n % c == 0), default=1)


# What dl.gpu.GEMV of TVM 0.27 fixes, for each kind of target it names: the same on every device of that kind.
_STOCK: dict[str, dict[str, Any]] = {
    "cuda": {"vec_load": 4, "vec_c": 4, "s_axis": "y", "shared_vector": True, "vec_shared": 8, "unroll": 256},
    "metal": {"vec_load": 1, "vec_c": 1, "s_axis": "x", "unroll": 256},
    "rocm": {"vec_load": 1, "vec_c": 4, "s_axis": "y", "unroll": 256},
}
_STOCK_ELSE: dict[str, Any] = {"vec_load": 1, "vec_c": 1, "s_axis": "y", "unroll": 64}
_SYMBOLIC = (1, 64)


def _stock_threads(kind: str, outputs: int | None, reduction: int | None) -> tuple[int, int]:
    if outputs is None:
        return _SYMBOLIC
    wide = reduction is not None and outputs > reduction
    if kind == "cuda":
        return 16, 32
    if kind == "metal":
        return (4, 16) if wide else (2, 64)
    if kind == "rocm":
        return (1, 128) if wide else (8, 64)
    return _SYMBOLIC


def stock_config(target: Target, outputs: int | None, reduction: int | None, group: int = 1) -> GemvConfig:
    """The point at which dl.gpu.GEMV stands, for `outputs` x `reduction` weights (None: known only at run time).

    group: neighbouring weights that share a scale (the c axis of DLight's analysis); 1 for plain weights.
    """
    kind = str(target.kind.name)
    ts, tr = _stock_threads(kind, outputs, reduction)
    while ts * tr > int(target.attrs["max_num_threads"]):
        ts, tr = (ts // 2, tr) if ts > 1 else (ts, tr // 2)
    tile_r = group
    if group == 1 and reduction is not None:
        tile_r = max(largest_factor(reduction, tuple(tr * f for f in (1, 2, 4, 8))) // tr, 1)
    fixed = _STOCK.get(kind, _STOCK_ELSE)
    vec_c = min(largest_factor(tile_r, (1, 2, 4, 8)), fixed["vec_c"])
    return replace(GemvConfig(ts, tr), **{**fixed, "vec_c": vec_c, "tile_r": tile_r, "tile_s": 1})


QUANTISED_THREADS = 128  # of a block: enough blocks for a large GPU even where there are 768 outputs
_POWERS = (1, 2, 4, 8, 16, 32)  # threads along the reduction: what a warp folds without shared memory


def quantised_config(target: Target, outputs: int | None, reduction: int | None, a_word: int) -> GemvConfig:
    """Where a product with quantised weights stands untuned: loads of 16 bytes (of fewer where rows are no multiple of
    them), and as many threads along r as leave no predicate.

    a_word: weights in a word of 32 bits, 4 (int8) or 8.
    """
    kind = str(target.kind.name)
    words = [w for w in (4, 2, 1) if reduction and reduction % (w * a_word) == 0] or [1]
    along = [largest_factor(reduction // (w * a_word), _POWERS) if reduction else 1 for w in words]
    # a row that is no whole number of loads, or too few threads along it: some of them have nothing to do at its end
    loaded, tr = next(((w, t) for w, t in zip(words, along, strict=True) if t >= 4), (words[0], 8))
    threads = min(QUANTISED_THREADS, int(target.attrs["max_num_threads"]))
    return GemvConfig(
        ts=max(1, threads // tr),
        tr=tr,
        tile_s=1,
        tile_r=loaded * a_word,
        vec_load=4 * loaded,
        vec_c=4,
        s_axis="y",
        shared_vector=kind == "cuda",
        vec_shared=8,
        unroll=256,
    )
