"""A product's vector, computed by each block for itself in shared memory: LayerNorm, or the merge of split attention.

The stages before the product, in order; all threads of the block share the work of each:

- a reduction over much (a row's sum): some of the threads take a share each, the partial results meet in shared memory,
  and every thread adds them up for itself: one barrier, and the result is in a register of all
- a reduction over little (the splits of a head): one thread a place
- elementwise, a few numbers (mean, 1/deviation): written out where they are read
- elementwise, a whole vector: shared memory

What one place of a later stage alone reads stays in a register of the thread that computes both.

`windowed`: the last stage, the vector that is multiplied, is not all there at once. The product asks for it a few
columns at a time (`fill`), so that it takes `window` elements of shared memory however long it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod

from tvm import DataType, ir, tirx
from tvm.script import tirx as T

from gpt2_tvm.kernels.math import Expr, loads, rewrite, static
from gpt2_tvm.schedules.stages import Buffer, Stage, bind
from gpt2_tvm.schedules.webgpu_product import LANES, Product, along, buffer, loop, typed, vector, where

FEW = 32  # a reduction over no more elements is one thread's
MEETING = 32  # threads that share a large reduction: every thread of the block reads their results
SCALARS = 8  # so many numbers are written out where they are read; the rows of a product at most
WINDOW = 128  # elements of the vector in shared memory at a time, where memory is to be saved

At = Callable[[list[Expr]], Expr]  # indices of a stage's buffer -> its element


@contextmanager
def each(name: str, count: int) -> Iterator[Expr]:
    """A loop over `count` places: written once, for a browser compiles every statement. One place needs no loop."""
    if count == 1:
        yield tirx.const(0, "int32")
        return
    with loop(name, count) as place:
        yield place


@dataclass(frozen=True)
class Prologue:
    """Stages to compute before a product by `threads` threads. width: columns of the last one in shared memory at a
    time; 0: all."""

    stages: tuple[Stage, ...]
    threads: int
    width: int = 0
    _made: dict[Buffer, At] = field(default_factory=dict, init=False)

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a block, at most."""
        total = 0
        for stage in self.stages:
            size = DataType(stage.buffer.dtype).bits // 8
            places = _rows_of(stage) * self.width if self.width and stage is self.stages[-1] else _places(stage)
            total += places * size * (self.meeting if _meets(stage) else 1)
        return total

    @property
    def meeting(self) -> int:
        """Threads that share a large reduction."""
        return min(MEETING, self.threads)

    def emit(self, tid: Expr) -> Mapping[Buffer, At]:
        """Write the stages, all but the last where it comes in windows; returns where each result is. Nothing may write
        shared memory of this prologue after."""
        self._made.clear()
        for stage, before in _together(self.stages):
            if self.width and stage is self.stages[-1]:
                break
            if _meets(stage):
                self._meet(stage, tid)
            elif not stage.reduced and before is None and _places(stage) <= SCALARS:
                self._made[stage.buffer] = _written_out(stage, dict(self._made))
            else:
                self._fill(stage, tid, before)
        return dict(self._made)

    def fill(self, tid: Expr, first: Expr) -> Mapping[Buffer, At]:
        """Write columns [first, first + width) of the last stage; returns where the results are, for these columns
        alone. All threads must be done with the columns before."""
        ((stage, before),) = (pair for pair in _together(self.stages) if pair[0] is self.stages[-1])
        self._fill(stage, tid, before, first)
        return dict(self._made)

    def _meet(self, stage: Stage, tid: Expr) -> None:
        """A result for each place (few), in a register of every thread."""
        (k,) = stage.reduced
        extent, count = static(k.extent) or 1, _places(stage)
        lanes = next(n for n in (LANES, 2, 1) if extent % n == 0)
        name, threads = stage.buffer.name, self.meeting
        part = buffer(f"{name}_part", [lanes], stage.buffer.dtype)
        parts = buffer(f"{name}_parts", [count * threads], stage.buffer.dtype, "shared")
        result = buffer(f"{name}_all", [count], stage.buffer.dtype)
        with where(tid < threads, threads < self.threads), each("place", count) as place:
            values = _indices(stage, place)
            vector(part, [], lanes, lambda lane: stage.init)
            with loop("turn", -(-extent // (lanes * threads))) as turn:
                first = bind("first", (turn * threads + tid) * lanes)
                with where(first < extent, extent % (lanes * threads) != 0):
                    self._accumulate(stage, part, lanes, {**values, k.var: typed(first, k.var)})
            total = tirx.BufferLoad(part, [0])
            for lane in range(1, lanes):
                total = _combined(stage, total, tirx.BufferLoad(part, [lane]))
            T.buffer_store(parts, total, [place * threads + tid])
        T.evaluate(T.tvm_storage_sync("shared"))
        wide = next(n for n in (LANES, 2, 1) if threads % n == 0)
        some = buffer(f"{name}_some", [wide], stage.buffer.dtype)
        with each("place", count) as place:
            T.buffer_store(result, stage.init, [place])
            with loop("i", threads // wide) as i:
                at = place * threads + i * wide
                vector(some, [], wide, along(parts, at))
                for lane in range(wide):
                    more = _combined(stage, tirx.BufferLoad(result, [place]), tirx.BufferLoad(some, [lane]))
                    T.buffer_store(result, more, [place])
        self._made[stage.buffer] = _flat(result, stage)

    def _accumulate(self, stage: Stage, part: Buffer, lanes: int, values: Mapping[ir.Var, Expr]) -> None:
        (k,) = stage.reduced

        def more(lane: Expr) -> Expr:
            own = {stage.buffer: lambda _: tirx.BufferLoad(part, [lane])}
            return rewrite(stage.value, {**values, k.var: values[k.var] + lane}, {**self._made, **own})

        vector(part, [], lanes, more)

    def _fill(self, stage: Stage, tid: Expr, before: Stage | None = None, first: Expr | None = None) -> None:
        """Every place of a stage into shared memory, a vector a thread and turn; `before` is computed at each. first:
        only the window of columns from there on."""
        reduces = stage.reduced or before is not None
        last = static(stage.spatial[-1].extent) or 1
        held = last if first is None else self.width
        count = _places(stage) // last * held
        lanes = 1 if reduces else next(n for n in (LANES, 2, 1) if held % n == 0)
        made = buffer(f"{stage.buffer.name}_shared", [count], stage.buffer.dtype, "shared")
        known = dict(self._made)
        with loop("turn", -(-count // (lanes * self.threads))) as turn:
            place = bind("place", (turn * self.threads + tid) * lanes)
            with where(place < count, count % (lanes * self.threads) != 0):
                # of the whole stage, which a window is part of
                of_all = place if first is None else place // held * last + (first + place % held)
                if before is not None:
                    known[before.buffer] = _first(self._reduce(before, of_all))
                if stage.reduced:
                    T.buffer_store(made, tirx.BufferLoad(self._reduce(stage, of_all), [0]), [place])
                else:
                    values = _indices(stage, of_all)
                    last_var = stage.spatial[-1].var

                    def element(lane: Expr) -> Expr:
                        at = values if lanes == 1 else {**values, last_var: values[last_var] + lane}
                        return rewrite(stage.value, at, known)

                    vector(made, [], lanes, element, offset=place)
        T.evaluate(T.tvm_storage_sync("shared"))
        self._made[stage.buffer] = _flat(made, stage) if first is None else _window(made, stage, first, held)

    def _reduce(self, stage: Stage, place: Expr) -> Buffer:
        """One place of a reduction over little, by this thread."""
        (k,) = stage.reduced
        total = buffer(f"{stage.buffer.name}_total", [1], stage.buffer.dtype)
        T.buffer_store(total, stage.init, [0])
        with loop("i", static(k.extent) or 1) as of:
            own = {stage.buffer: lambda _: tirx.BufferLoad(total, [0])}
            values = {**_indices(stage, place), k.var: typed(of, k.var)}
            T.buffer_store(total, rewrite(stage.value, values, {**self._made, **own}), [0])
        return total


def plan_prologue(m: Product, threads: int, windowed: bool = False) -> Prologue | None:
    """The prologue of a product; None for stages of another kind. windowed: its vector in windows, where it is one that
    the product reads along k."""
    for stage in m.prologue:
        fixed = all(static(one.extent) is not None for one in stage.loops)
        if not fixed or not stage.writes_its_loops() or len(stage.reduced) > 1:
            return None
        if stage.reduced and (stage.init is None or not _is_known(stage)):
            return None
    return Prologue(m.prologue, threads, _width(m) if windowed else 0)


def _width(m: Product) -> int:
    """Columns of the last stage in a window: as many as divide k evenly, in whole vectors; 0 where it cannot come in
    windows."""
    last, extent = m.prologue[-1], static(m.k.extent) or 0
    reads = [load for load in loads(m.x) if load.source == last.buffer]
    along_k = reads and all(load.indices[-1].same_as(m.k.var) for load in reads)
    if not along_k or static(last.spatial[-1].extent) != extent or _meets(last) or _places(last) <= WINDOW:
        return 0
    most = max(WINDOW // _rows_of(last), LANES)
    return next((width for width in range(most - most % LANES, 0, -LANES) if extent % width == 0), 0)


def _together(stages: tuple[Stage, ...]) -> Iterator[tuple[Stage, Stage | None]]:
    """Stages in order, each with the one that is computed place by place with it, or None."""
    at = 0
    while at < len(stages):
        stage, *rest = stages[at:]
        joined = rest and stage.reduced and not _meets(stage) and _reads_own_place(rest[0], stage, tuple(rest[1:]))
        yield (rest[0], stage) if joined else (stage, None)
        at += 2 if joined else 1


def _is_known(stage: Stage) -> bool:
    """Whether a reduction is `own + x` or `max(own, x)`."""
    value = stage.value
    own = getattr(value, "a", None)
    return isinstance(value, tirx.Add | tirx.Max) and isinstance(own, ir.TensorLoad) and own.source == stage.buffer


def _combined(stage: Stage, a: Expr, b: Expr) -> Expr:
    return a + b if isinstance(stage.value, tirx.Add) else tirx.max(a, b)


def _places(stage: Stage) -> int:
    return prod(static(one.extent) or 1 for one in stage.spatial)


def _rows_of(stage: Stage) -> int:
    """Places beside those along the last axis."""
    return _places(stage) // (static(stage.spatial[-1].extent) or 1)


def _meets(stage: Stage) -> bool:
    """Whether the threads of a block share one reduction."""
    return bool(stage.reduced) and (static(stage.reduced[0].extent) or 1) > FEW and _places(stage) <= SCALARS


def _reads_own_place(reader: Stage, stage: Stage, others: tuple[Stage, ...]) -> bool:
    """Whether `reader` alone reads `stage`, and only where it writes itself."""
    own, of = reader.spatial, stage.spatial
    if reader.reduced or [static(a.extent) for a in own] != [static(b.extent) for b in of]:
        return False
    if any(load.source == stage.buffer for other in others for load in loads(other.value)):
        return False
    found = [load for load in loads(reader.value) if load.source == stage.buffer]
    return bool(found) and all(
        all(i.same_as(one.var) or static(one.extent) == 1 for i, one in zip(load.indices, own, strict=True))
        for load in found
    )


def _indices(stage: Stage, place: Expr) -> dict[ir.Var, Expr]:
    """The spatial loop variables at a flat place."""
    values: dict[ir.Var, Expr] = {}
    first = next((one for one in stage.spatial if static(one.extent) != 1), None)
    for one in reversed(stage.spatial):
        extent = static(one.extent) or 1
        outermost = one is first
        value = tirx.const(0, "int32") if extent == 1 else place if outermost else place % extent
        values[one.var] = typed(value, one.var)
        place = place if extent == 1 else place // extent
    return values


def _written_out(stage: Stage, made: Mapping[Buffer, At]) -> At:
    variables = [one.var for one in stage.spatial]
    return lambda indices: rewrite(stage.value, dict(zip(variables, indices, strict=True)), made)


def _flat(held: Buffer, stage: Stage) -> At:
    """Where `held` has all places of a stage, in order."""
    extents = [static(one.extent) or 1 for one in stage.spatial]

    def at(indices: list[Expr]) -> Expr:
        place: Expr = tirx.const(0, "int32")
        for index, extent in zip(indices, extents, strict=True):
            place = place * extent + index if extent > 1 else place * extent
        return tirx.BufferLoad(held, [place])

    return at


def _window(held: Buffer, stage: Stage, first: Expr, width: int) -> At:
    """Where `held` has columns [first, first + width) of all rows of a stage."""
    extents = [static(one.extent) or 1 for one in stage.spatial[:-1]]

    def at(indices: list[Expr]) -> Expr:
        *rows, column = indices
        place: Expr = tirx.const(0, "int32")
        for index, extent in zip(rows, extents, strict=True):
            place = place * extent + index if extent > 1 else place * extent
        return tirx.BufferLoad(held, [place * width + (column - first)])

    return at


def _first(held: Buffer) -> At:
    return lambda indices: tirx.BufferLoad(held, [0])
