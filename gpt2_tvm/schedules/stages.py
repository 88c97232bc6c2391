"""How our CPU rules see a fused function, and how they write new loops for it.

After FuseTIR a function is a list of *stages*: loop nests that each fill one buffer. `read_stages` gives that list,
with the producers that need no reduction inlined into their readers; a rule then writes new loops around the same
expressions with the helpers below, inside TVM's IRBuilder (`scheduled`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from tvm import ir, s_tir, tirx
from tvm.script import tirx as T
from tvm.script.ir_builder import IRBuilder
from tvm.target import Target

from gpt2_tvm.kernels.math import Expr, loads, rewrite, static, vectorise_intrinsics

Buffer = Any

STACK_BYTES = 1024  # TVM's runtime::kMaxStackAlloca: a buffer of more is taken from the pool
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


def read_stages(func: tirx.PrimFunc, fast_math: bool = True) -> list[Stage] | None:
    """The stages of a function that no schedule has touched, in order; None where it has another form.

    Producers (stages without a reduction, before any) are inlined into their readers, and with `fast_math`
    transcendental functions are replaced by ones that vectorise (CPUs).
    """
    if not isinstance(func, tirx.PrimFunc) or not isinstance(func.body, s_tir.SBlockRealize):
        return None
    root = func.body.block.body
    stages = []
    for nest in root.seq if isinstance(root, tirx.SeqStmt) else [root]:
        stage = _read_stage(nest, fast_math)
        if stage is None:
            return None
        stages.append(stage)
    return _inline_producers(stages, outputs=func.params)


def _read_stage(nest: tirx.Stmt, fast_math: bool) -> Stage | None:
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
    value = rewrite(store.value, values)
    return Stage(
        loops=tuple(Loop(var, extent, var in reduce_vars) for var, extent in loops.items()),
        buffer=store.buffer,
        indices=tuple(rewrite(i, values) for i in store.indices),
        value=vectorise_intrinsics(value) if fast_math else value,
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


def alloc(name: str, shape: Sequence[Expr], dtype: str) -> Buffer:
    """A buffer of the surrounding loop: on the stack (and so in registers, where LLVM finds every index constant) up to
    `STACK_BYTES`, else from the runtime's pool, which is a call, and keeps the memory for the next one.

    Its scope is "global": for a CPU TVM takes "local" ones from the pool whatever their size.
    """
    extents = [T.int64(s) if isinstance(s, int) else s for s in shape]
    return IRBuilder.name(name, T.alloc_buffer(extents, dtype, scope="global"))


def prefetch(buffer: Buffer, indices: list[Expr]) -> None:
    """Ask for the line that holds an element, for reading, into all caches; one past the buffer's end is no fault."""
    address = tirx.address_of(tirx.BufferLoad(buffer, indices))
    read, everywhere, data = (tirx.const(v, "int32") for v in (0, 3, 1))
    T.evaluate(tirx.call_intrin("void", "tirx.prefetch", address, read, everywhere, data))


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
