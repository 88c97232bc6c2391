"""LayerNorm, softmax, sums down columns and everything elementwise on a CPU.

`CpuReduction` puts all stages (`stages.py`) of one row, the last axis, together, so that a row is read while in L1:

    for row in parallel:                       # serial where there is too little to do
        sum, mean, variance: vector accumulators, folded once
        normalised: a vector loop over the axis

A reduction goes through four vector accumulators: one would make every addition wait for the one before it. A sum down
columns (probabilities times values, where attention is materialised) keeps a block of columns in registers instead:

    for row in parallel:
        for block of columns: acc[:] = 0; for k: acc[:] += p[row, k] * v[k, block]
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from math import prod
from typing import Any

import tvm_ffi
from tvm import ir, s_tir, tirx
from tvm.s_tir import dlight
from tvm.script import tirx as T
from tvm.target import Target

from gpt2_tvm.kernels.math import Expr, loads, rewrite, static, uses
from gpt2_tvm.schedules.blocking import Blocking
from gpt2_tvm.schedules.stages import (
    Buffer,
    Stage,
    alloc,
    loop,
    read_stages,
    row_count,
    row_indices,
    scheduled,
    takes,
    vector_loop,
)

# Waking TVM's thread pool costs 2 to 10 us; one core does about this many vectorised elements meanwhile.
PARALLEL_ELEMENTS = 131072
ACCUMULATORS = 4
COLUMN_VECTORS = 8  # vectors of columns whose sums are in registers together: enough to hide the latency of an addition


class CpuReduction(dlight.ScheduleRule):
    """Functions over the last axis of their output: reductions (LayerNorm, softmax), elementwise, gathers.

    processor: see `Blocking.of`; of it only the vector width counts.
    """

    def __init__(self, processor: Any = None) -> None:
        self.processor = processor

    def apply(self, func: tirx.PrimFunc, target: Target, tunable: bool) -> s_tir.Schedule | None:
        # Step 1. Only functions made of stages that agree on their rows
        if not takes(func, target):
            return None
        stages = read_stages(func)
        rows = _common_rows(stages, outputs=func.params) if stages else None
        if not stages or rows is None:
            return None
        # Step 2. Work, and whether it is enough for more than one thread
        lanes = Blocking.of(self.processor, target).lanes
        row_loops = stages[-1].spatial[:rows]
        count = row_count(row_loops)
        work = count * max(prod(static(l.extent) or 1 for l in s.loops[rows:]) for s in stages) * len(stages)

        def emit(kind: Callable[..., Any]) -> None:
            with loop(kind, "row", count) as row:
                _emit_row(stages, rows, row, lanes, outputs=func.params)

        # Step 3. All stages of a row in one loop over rows
        def body() -> None:
            size = static(work)
            if static(count) == 1:
                emit(T.serial)
            elif size is not None:
                emit(T.parallel if size >= PARALLEL_ELEMENTS else T.serial)
            else:
                with T.If(work >= PARALLEL_ELEMENTS):
                    with T.Then():
                        emit(T.parallel)
                    with T.Else():
                        emit(T.serial)

        return scheduled(func, body)


def _common_rows(stages: Sequence[Stage], outputs: Sequence[Buffer]) -> int | None:
    """How many leading loops are the rows that all stages share; None where a stage would need another row's result."""
    last = stages[-1]
    reductions = [s for s in stages if s.reduced]
    rows = len(reductions[0].spatial) - _sums_columns(reductions[0]) if reductions else len(last.spatial) - 1
    if rows < 0 or len(last.spatial) < rows:
        return None
    written: set[Buffer] = set()
    for stage in stages:
        extents = zip(stage.spatial[:rows], last.spatial[:rows], strict=False)
        if (
            len(stage.loops) - rows not in ((2,) if _sums_columns(stage) else (0, 1))
            or len(stage.spatial) < rows
            or any(l.reduces for l in stage.loops[:rows])
            or not all(tvm_ffi.structural_equal(a.extent, b.extent) for a, b in extents)
            or (stage.reduced and not (_combiner(stage) and (_streams(stage) or _sums_columns(stage))))
            or not (stage.writes_its_loops() or (stage.buffer in outputs and len(stages) == 1))
        ):
            return None
        for load in loads(stage.value):
            own = load.source.same_as(stage.buffer)
            if not own and load.source in written and not _same_row(load, stage, rows):
                return None
        written.add(stage.buffer)
    return rows


def _same_row(load: ir.TensorLoad, stage: Stage, rows: int) -> bool:
    pairs = zip(load.indices[:rows], stage.spatial[:rows], strict=True)
    return all(i.same_as(l.var) or (static(i) == 0 and static(l.extent) == 1) for i, l in pairs)


def _streams(stage: Stage) -> bool:
    """Whether a reduction reads memory forwards: its variable only ever moves the last index of a load."""
    (axis,) = stage.reduced
    return not any(uses(i, axis.var) for load in loads(stage.value) for i in load.indices[:-1])


def _sums_columns(stage: Stage) -> bool:
    """Whether a reduction reads memory forwards along its last spatial axis instead: that only ever is the last index
    of a load, and then the reduction's own variable moves an earlier one.
    """
    if len(stage.reduced) != 1 or not stage.spatial or not stage.loops[-1].reduces or _streams(stage):
        return False
    column, axis = stage.loops[-2:]
    moving = [l for l in loads(stage.value) if any(uses(i, column.var) for i in l.indices)]
    return (
        static(column.extent) is not None
        and all(
            l.indices[-1].same_as(column.var) and not any(uses(i, column.var) for i in l.indices[:-1]) for l in moving
        )
        and any(uses(i, axis.var) for l in moving for i in l.indices[:-1])
    )


def _combiner(stage: Stage) -> tuple[Callable[[Expr, Expr], Expr], Expr] | None:
    """(how two partial results combine, the term of one step) of a sum, maximum or minimum."""
    operation = {tirx.Add: lambda a, b: a + b, tirx.Max: tirx.max, tirx.Min: tirx.min}.get(type(stage.value))
    if operation is None or stage.init is None:
        return None
    if isinstance(stage.value, tirx.Add) and not (isinstance(stage.init, tirx.FloatImm) and stage.init.value == 0):
        return None  # every accumulator starts at `init`: it must be neutral
    for own, term in ((stage.value.a, stage.value.b), (stage.value.b, stage.value.a)):
        if isinstance(own, ir.TensorLoad) and own.source.same_as(stage.buffer):
            return None if any(l.source.same_as(stage.buffer) for l in loads(term)) else (operation, term)
    return None


def _emit_row(stages: Sequence[Stage], rows: int, row: Expr, lanes: int, outputs: Sequence[Buffer]) -> None:
    local: dict[Buffer, Callable[[list[Expr]], Expr]] = {}
    for stage in stages:
        variables = row_indices(row, stage.spatial[:rows])
        inner = stage.loops[rows:]
        if stage.buffer in outputs:
            buffer, place = stage.buffer, [rewrite(i, variables) for i in stage.indices]
        else:
            keeps_axis = bool(inner) and not inner[0].reduces
            buffer = alloc(stage.buffer.name, [inner[0].extent if keeps_axis else 1], stage.buffer.dtype)
            place = [inner[0].var if keeps_axis else T.int64(0)]
            local[stage.buffer] = _local_load(buffer, rows if keeps_axis else None)

        if _sums_columns(stage):
            operation, term = _combiner(stage) or (None, None)
            _emit_columns(stage, operation, rewrite(term, variables, local), lanes, buffer, place)
            continue
        if stage.reduced:
            operation, term = _combiner(stage) or (None, None)
            T.buffer_store(buffer, _emit_reduce(stage, operation, rewrite(term, variables, local), lanes), place)
            continue
        value = rewrite(stage.value, variables, local)
        if inner:
            write = partial(_store_at, buffer, value, place, inner[0].var)
            vector_loop(inner[0].var.name, inner[0].extent, lanes, write)
        else:
            T.buffer_store(buffer, value, place)


def _store_at(buffer: Buffer, value: Expr, place: Sequence[Expr], var: ir.Var, i: Expr) -> None:
    """buffer[place] := value, both with `var` at i."""
    T.buffer_store(buffer, rewrite(value, {var: i}), [rewrite(p, {var: i}) for p in place])


def _local_load(buffer: Buffer, axis: int | None) -> Callable[[list[Expr]], Expr]:
    """What a load of a stage's buffer becomes: the row's own copy, indexed by the last axis or a single value."""
    return lambda indices: tirx.BufferLoad(buffer, [T.int64(0) if axis is None else indices[axis]])


def _emit_columns(stage: Stage, combine: Any, term: Expr, lanes: int, buffer: Buffer, place: Sequence[Expr]) -> None:
    """Loops that reduce `term` over the last loop and store it at each column."""
    column, axis = stage.loops[-2:]
    size = int(column.extent)
    while size % lanes:
        lanes //= 2
    vectors = next(v for v in range(COLUMN_VECTORS, 0, -1) if size // lanes % v == 0)
    with loop(T.serial, "block", size // (vectors * lanes)) as block:
        acc = [alloc(f"{stage.buffer.name}_{v}", [lanes], stage.buffer.dtype) for v in range(vectors)]

        def each(body: Callable[[Buffer, Expr, Expr], None]) -> None:
            for v, a in enumerate(acc):
                with loop(T.vectorized, "lane", lanes) as lane:
                    body(a, lane, block * (vectors * lanes) + (v * lanes + lane))

        def add(k: Expr, a: Buffer, lane: Expr, c: Expr) -> None:
            value = rewrite(term, {axis.var: k, column.var: c})
            T.buffer_store(a, combine(tirx.BufferLoad(a, [lane]), value), [lane])

        each(lambda a, lane, c: T.buffer_store(a, stage.init, [lane]))
        with loop(T.serial, axis.var.name, axis.extent) as k:
            each(partial(add, k))
        each(lambda a, lane, c: _store_at(buffer, tirx.BufferLoad(a, [lane]), place, column.var, c))


def _emit_reduce(stage: Stage, combine: Any, term: Expr, lanes: int) -> Expr:
    """Loops that reduce `term` over the stage's last loop; returns the load of the result."""
    (axis,) = stage.reduced
    size = static(axis.extent)
    count = ACCUMULATORS if size is None or size >= ACCUMULATORS * lanes else 1
    width = count * lanes
    sums = alloc(f"{stage.buffer.name}_partial", [width], stage.buffer.dtype)

    def step(slot: Expr, k: Expr) -> None:
        T.buffer_store(sums, combine(tirx.BufferLoad(sums, [slot]), rewrite(term, {axis.var: k})), [slot])

    with loop(T.unroll, "u", count) as u, loop(T.vectorized, "lane", lanes) as l:
        T.buffer_store(sums, stage.init, [u * lanes + l])
    with (
        loop(T.serial, axis.var.name, axis.extent // width) as o,
        loop(T.unroll, "u", count) as u,
        loop(T.vectorized, "lane", lanes) as l,
    ):
        step(u * lanes + l, o * width + u * lanes + l)
    if size is None or size % width:
        done, rest = axis.extent // width * width, axis.extent % width
        with loop(T.serial, "rest", rest // lanes) as o, loop(T.vectorized, "lane", lanes) as l:
            step(l, done + o * lanes + l)
        with loop(T.serial, "tail", rest % lanes) as l:
            step(T.int64(0), done + rest // lanes * lanes + l)
    while width > 1:
        width //= 2
        with loop(T.vectorized, "lane", width) as l:
            halves = [tirx.BufferLoad(sums, [l]), tirx.BufferLoad(sums, [l + width])]
            T.buffer_store(sums, combine(*halves), [l])
    return tirx.BufferLoad(sums, [T.int64(0)])
