"""LayerNorm, softmax and everything elementwise on a CPU, and how all our CPU rules see a fused function.

After FuseTIR a function is a list of *stages*: loop nests that each fill one buffer. `read_stages` gives that list,
with the producers that need no reduction inlined into their readers; the rules then write new loops around the same
expressions. `CpuReduction` puts all stages of one row (the last axis) together, so that a row is read while in L1:

    for row in parallel:                       # serial where there is too little to do
        sum, mean, variance: vector accumulators, folded once
        normalised: a vector loop over the axis

A reduction goes through four vector accumulators: one would make every addition wait for the one before it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import tvm_ffi
from tvm import ir, s_tir, tirx
from tvm.s_tir import dlight
from tvm.script import tirx as T
from tvm.script.ir_builder import IRBuilder
from tvm.target import Target
from tvm.target.codegen import target_has_features

from gpt2_tvm.kernels.math import Expr, loads, rewrite, static, uses, vectorise_intrinsics

Buffer = Any

# Waking TVM's thread pool costs 2 to 10 us; one core does about this many vectorised elements meanwhile.
PARALLEL_ELEMENTS = 131072
ACCUMULATORS = 4
VECTOR_BITS = {"avx512f": 512, "avx": 256}  # by LLVM's name of the feature; others have 128 (SSE, NEON)
MIN_VECTOR_BITS = 128
UNROLLED_VECTORS = 4  # loops of up to this many vectors are unrolled, so that what they share stays in registers


@dataclass(frozen=True)
class Loop:
    var: ir.Var
    extent: Expr
    reduces: bool


@dataclass(frozen=True)
class Stage:
    """`buffer[indices] = value` over `loops`; with an `init`, a reduction that starts there."""

    loops: tuple[Loop, ...]
    buffer: Buffer
    indices: tuple[Expr, ...]
    value: Expr
    init: Expr | None = None

    @property
    def spatial(self) -> tuple[Loop, ...]:
        return tuple(loop for loop in self.loops if not loop.reduces)

    @property
    def reduced(self) -> tuple[Loop, ...]:
        return tuple(loop for loop in self.loops if loop.reduces)

    def writes_its_loops(self) -> bool:
        """Whether the indices are the spatial loop variables, each once and in order."""
        loops = self.spatial
        return len(self.indices) == len(loops) and all(
            i.same_as(loop.var) or (static(i) == 0 and static(loop.extent) == 1)
            for i, loop in zip(self.indices, loops, strict=True)
        )


def read_stages(func: tirx.PrimFunc) -> list[Stage] | None:
    """The stages of a function that no schedule has touched, in order; None where it has another form.

    Producers (stages without a reduction, before any) are inlined into their readers, and transcendental functions are
    replaced by ones that vectorise.
    """
    if not isinstance(func, tirx.PrimFunc) or not isinstance(func.body, s_tir.SBlockRealize):
        return None
    root = func.body.block.body
    stages = []
    for nest in root.seq if isinstance(root, tirx.SeqStmt) else [root]:
        stage = _read_stage(nest)
        if stage is None:
            return None
        stages.append(stage)
    return _inline_producers(stages, outputs=func.params)


def _read_stage(nest: tirx.Stmt) -> Stage | None:
    loops: dict[ir.Var, Expr] = {}
    while isinstance(nest, tirx.For):
        if nest.kind != tirx.ForKind.SERIAL or static(nest.min) != 0:
            return None
        loops[nest.loop_var] = nest.extent
        nest = nest.body
    if not isinstance(nest, s_tir.SBlockRealize) or static(nest.predicate) != 1:
        return None
    block = nest.block
    if block.alloc_buffers or block.match_buffers or not isinstance(block.body, tirx.BufferStore):
        return None
    values = {i.var: value for i, value in zip(block.iter_vars, nest.iter_values, strict=True)}
    reduce_vars = {values[i.var] for i in block.iter_vars if i.iter_type == tirx.IterVar.CommReduce}
    if any(v not in loops and static(v) is None for v in values.values()):
        return None  # an axis made of several loops
    if block.init is not None and not isinstance(block.init, tirx.BufferStore):
        return None
    store = block.body
    return Stage(
        loops=tuple(Loop(var, extent, var in reduce_vars) for var, extent in loops.items()),
        buffer=store.buffer,
        indices=tuple(rewrite(i, values) for i in store.indices),
        value=vectorise_intrinsics(rewrite(store.value, values)),
        init=None if block.init is None else block.init.value,
    )


def _inline_producers(stages: list[Stage], outputs: Sequence[Buffer]) -> list[Stage] | None:
    kept: list[Stage] = []
    inlined: dict[Buffer, Callable[[list[Expr]], Expr]] = {}
    reduced: set[Buffer] = set()  # buffers that depend on a reduction
    for stage in stages:
        stage = replace(stage, value=rewrite(stage.value, {}, inlined))
        depends = bool(stage.reduced) or any(load.source in reduced for load in loads(stage.value))
        if depends:
            reduced.add(stage.buffer)
        if depends or stage.buffer in outputs:
            kept.append(stage)
        elif stage.writes_its_loops():
            inlined[stage.buffer] = _as_function(stage)
        else:
            return None
    return kept


def _as_function(stage: Stage) -> Callable[[list[Expr]], Expr]:
    variables = [loop.var for loop in stage.spatial]
    return lambda indices: rewrite(stage.value, dict(zip(variables, indices, strict=True)))


# -- writing loops -----------------------------------------------------------------------------------------------------


@contextmanager
def loop(kind: Callable[..., Any], name: str, extent: Expr) -> Iterator[ir.Var]:
    """A loop of the given kind (T.serial, T.parallel, …) with an int64 variable, inside an IRBuilder."""
    extent = T.int64(extent) if isinstance(extent, int) else extent
    with kind(tirx.const(0, extent.ty), extent) as var:
        yield IRBuilder.name(name, var)


def bind(name: str, value: Expr) -> Expr:
    """A variable that holds `value` in the statements that follow."""
    return IRBuilder.name(name, T.bind(value))


def alloc(name: str, shape: Sequence[Expr], dtype: str, scope: str = "local") -> Buffer:
    """A buffer of the surrounding loop: on the stack (in registers, if small) for scope "local" up to 1 KiB, else from
    the runtime's pool, which keeps it for the next call."""
    return IRBuilder.name(
        name, T.alloc_buffer([T.int64(s) if isinstance(s, int) else s for s in shape], dtype, scope=scope)
    )


def vector_loop(name: str, extent: Expr, lanes: int, body: Callable[[Expr], None], start: Expr | int = 0) -> None:
    """`body(i)` for i in [start, start + extent): whole vectors first, then what is left one by one."""
    size = static(extent)
    if size is None or size >= lanes:
        kind = T.unroll if size is not None and size <= UNROLLED_VECTORS * lanes else T.serial
        with loop(kind, name, extent // lanes) as o, loop(T.vectorized, "lane", lanes) as l:
            body(start + o * lanes + l)
    if size is None or size % lanes:
        with loop(T.serial, f"{name}_tail", extent % lanes) as l:
            body(start + extent // lanes * lanes + l)


def simd_lanes(layout: Any, target: Target) -> int:
    """Float32 lanes of a vector register: from the layout's `simd_bits`, or else from the target's CPU features."""
    bits = layout_value(layout, "simd_bits")
    # not TVM's llvm_get_vector_width: it says 512 for x86-64-v3, which has no AVX-512
    found = (width for feature, width in VECTOR_BITS.items() if target_has_features(feature, target))
    return (bits or next(found, MIN_VECTOR_BITS)) // 32


def layout_value(layout: Any, name: str) -> int | None:
    """A field of a layout, which is an object or a mapping; None where it has none."""
    value = layout.get(name) if isinstance(layout, Mapping) else getattr(layout, name, None)
    return None if value is None else int(value)


def takes(func: Any, target: Target) -> bool:
    """Whether a CPU rule may look at `func`: a PrimFunc for LLVM that has no schedule yet."""
    if not isinstance(func, tirx.PrimFunc) or target.kind.name != "llvm":
        return False
    return not (func.attrs is not None and func.attrs.get("tirx.is_scheduled", False))


def scheduled(func: tirx.PrimFunc, emit: Callable[[], None]) -> s_tir.Schedule:
    """A schedule of `func` whose body is what `emit` writes, in the root block that Relax's passes look for."""
    with IRBuilder() as builder, T.sblock("root"):
        emit()
    root = s_tir.SBlock([], [], [], "root", builder.get().block.body)
    return s_tir.Schedule(func.with_body(s_tir.SBlockRealize([], True, root)))


def row_indices(row: Expr, loops: Sequence[Loop]) -> dict[ir.Var, Expr]:
    """The values of nested loops for a flat row number."""
    values: dict[ir.Var, Expr] = {}
    for nested in reversed(loops):
        outermost = nested is loops[0]
        values[nested.var] = (
            tirx.const(0, nested.var.ty) if static(nested.extent) == 1 else row if outermost else row % nested.extent
        )
        row = row if static(nested.extent) == 1 else row // nested.extent
    return values


def row_count(loops: Sequence[Loop]) -> Expr:
    """How many rows nested loops make: their extents multiplied."""
    total: Expr = T.int64(1)
    for nested in loops:
        total = total * nested.extent
    return total


# -- the rule ----------------------------------------------------------------------------------------------------------


class CpuReduction(dlight.ScheduleRule):
    """Functions over the last axis of their output: reductions (LayerNorm, softmax), elementwise, gathers.

    layout: the target's layout; of it only `simd_bits` counts, and the target's own vector width where it has none.
    """

    def __init__(self, layout: Any = None) -> None:
        self.layout = layout

    def apply(self, func: tirx.PrimFunc, target: Target, tunable: bool) -> s_tir.Schedule | None:
        # Step 1. Only functions made of stages that agree on their rows
        if not takes(func, target):
            return None
        stages = read_stages(func)
        rows = _common_rows(stages, outputs=func.params) if stages else None
        if not stages or rows is None:
            return None
        # Step 2. Work, and whether it is enough for more than one thread
        lanes = simd_lanes(self.layout, target)
        row_loops = stages[-1].spatial[:rows]
        count = row_count(row_loops)
        work = count * max((static(l.extent) or 1 for s in stages for l in s.loops[rows:]), default=1) * len(stages)

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
    rows = len(reductions[0].spatial) if reductions else len(last.spatial) - 1
    if rows < 0 or len(last.spatial) < rows:
        return None
    written: set[Buffer] = set()
    for stage in stages:
        extents = zip(stage.spatial[:rows], last.spatial[:rows], strict=False)
        if (
            len(stage.loops) - rows not in (0, 1)
            or len(stage.spatial) < rows
            or any(l.reduces for l in stage.loops[:rows])
            or not all(tvm_ffi.structural_equal(a.extent, b.extent) for a, b in extents)
            or (stage.reduced and not (_combiner(stage) and _streams(stage)))
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
