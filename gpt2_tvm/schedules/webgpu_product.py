"""What our rules for WGSL share: recognising a product with what follows it, and writing a kernel in its place.

The rules write loops themselves (TVM's IRBuilder) instead of transforming the ones that are there: how many statements
a kernel has is then in our hands, and a browser compiles every one of them while somebody waits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import tvm_ffi
from tvm import ir, s_tir, sym, tirx
from tvm.script import tirx as T
from tvm.script.ir_builder import IRBuilder

from gpt2_tvm.kernels.dequantise import unpacked
from gpt2_tvm.kernels.math import Expr, loads, rewrite, static, uses
from gpt2_tvm.quantization.words import HALVES
from gpt2_tvm.schedules.cpu_matmul import _follows
from gpt2_tvm.schedules.stages import Buffer, Loop, Stage, read_stages, row_count, row_indices
from gpt2_tvm.schedules.webgpu_halves import half_of

LANES = 4  # elements that a thread loads at once: what a WGSL vector holds
SMALL_BATCH = 4  # what a batch of unknown size is taken for, where only it is unknown


@dataclass(frozen=True)
class Product:
    """A function that is y = x Wᵀ and what follows it elementwise.

    row_loops: the loops over rows; column, k: the loops over N and K. x, w: the factors, over (row_loops, k) and
    (column, k). prologue: stages that make what x reads. epilogue: stages over row_loops and the column, the product
    among their loads.
    """

    row_loops: tuple[Loop, ...]
    column: Loop
    k: Loop
    x: Expr
    w: Expr
    buffer: Buffer
    prologue: tuple[Stage, ...]
    epilogue: tuple[Stage, ...]
    outputs: tuple[Buffer, ...]

    @property
    def rows(self) -> Expr:
        """How many rows, an integer expression."""
        return sym.Analyzer().simplify(row_count(self.row_loops))

    def few_rows(self) -> int | None:
        """The number of rows where it is known; where only the batch is not, that of a small batch. None where the
        length of a prompt is not known, the last loop of several: of one sequence too, as MLC has it."""
        known = static(self.rows)
        if known is not None:
            return known
        unknown = [loop for loop in self.row_loops if static(loop.extent) is None]
        if len(unknown) > 1 or (len(self.row_loops) > 1 and unknown[0] is self.row_loops[-1]):
            return None
        rest = 1
        for loop in self.row_loops:
            rest *= static(loop.extent) or 1
        return SMALL_BATCH * rest

    def x_at(self, row: Expr, k: Expr, made: Mapping[Buffer, Callable[[list[Expr]], Expr]] | None = None) -> Expr:
        """x[row, k], `row` counted over all row loops; made: where the prologue's results are."""
        at_row = {var: typed(i, var) for var, i in row_indices(row, self.row_loops).items()}
        return rewrite(self.x, {**at_row, self.k.var: typed(k, self.k.var)}, made)

    def w_at(self, column: Expr, k: Expr) -> Expr:
        """W[column, k]."""
        at = {self.column.var: typed(column, self.column.var), self.k.var: typed(k, self.k.var)}
        return _divided_narrow(rewrite(self.w, at))

    @property
    def halves(self) -> Buffer | None:
        """The words [N, K/2] that W lies in, where its elements are the float16 in them, else None."""
        load = half_of(self.w)
        is_element = load is not None and len(load.indices) == 2 and load.indices[0].same_as(self.column.var)
        return load.source if is_element else None

    def load_weights(self, to: Buffer, j: int, lanes: int, column: Expr, k: Expr) -> None:
        """to[j, :lanes] = W[column, k : k + lanes]; k divides by `lanes`."""
        words = self.halves
        if words is None or lanes % HALVES:
            vector(to, [j], lanes, lambda lane: self.w_at(column, k + lane))
            return
        count = lanes // HALVES
        part = buffer("words", [count], "uint32")
        first = tirx.floordiv(k, HALVES)
        vector(part, [], count, lambda lane: tirx.BufferLoad(words, [column, first + lane]))
        for i in range(count):
            pair = unpacked(tirx.BufferLoad(part, [i]))
            T.buffer_store(to, pair, [j, tirx.Ramp(i * HALVES, 1, HALVES)])


def match_product(func: tirx.PrimFunc) -> Product | None:
    """Recognise a product with an elementwise epilogue; None for any other function."""
    stages = read_stages(func, fast_math=False)
    at = max((i for i, stage in enumerate(stages or ()) if stage.reduced), default=None)
    if stages is None or at is None:
        return None
    stages = [_with_unit_loops(stage) for stage in stages]
    prologue, product, epilogue = stages[:at], stages[at], stages[at + 1 :]
    if not product.writes_its_loops() or len(product.reduced) != 1 or len(product.spatial) < 2:
        return None
    *row_loops, column = product.spatial
    k = product.reduced[0]
    factors = _factors(product)
    if factors is None or static(column.extent) is None or static(k.extent) is None:
        return None
    rows = [loop.var for loop in row_loops if static(loop.extent) != 1]
    for x, w in (factors, factors[::-1]):
        if not uses(x, column.var) and uses(w, column.var) and not any(uses(w, row) for row in rows):
            break
    else:
        return None
    if not all(_follows(stage, product, stages) for stage in epilogue):
        return None
    made = {stage.buffer for stage in prologue}
    if any(load.source in made for load in loads(w)) or any(stage.buffer in func.params for stage in prologue):
        return None
    return Product(
        tuple(row_loops), column, k, x, w, product.buffer, tuple(prologue), tuple(epilogue), tuple(func.params)
    )


def _divided_narrow(e: Expr) -> Expr:
    """`e` with int64(i) // c as int64(i // c), and % likewise: which word a packed weight is in, the simplifier finds
    out for a whole vector only where no cast stands between, and WGSL has no division of vectors by floor."""

    def inside(operator: Callable[[Expr, Expr], Expr]) -> Callable[[Any], Expr]:
        def swap(node: Any) -> Expr:
            wide, by = node.a, static(node.b)
            if not isinstance(wide, tirx.Cast) or by is None or wide.value.ty.dtype != "int32":
                return node
            return tirx.Cast(wide.ty.dtype, operator(wide.value, tirx.const(by, "int32")))

        return swap

    return tvm_ffi.structural_map(e, [(tirx.FloorDiv, inside(tirx.floordiv)), (tirx.FloorMod, inside(tirx.floormod))])


def _with_unit_loops(stage: Stage) -> Stage:
    """A stage whose loops over one element were left out (a fused dequantisation's are) with these loops again."""
    loops = list(stage.spatial)
    if len(loops) == len(stage.indices):
        return stage
    found: list[Loop] = []
    for index in stage.indices:
        own = next((one for one in loops if index.same_as(one.var)), None)
        if own is None and static(index) != 0:
            return stage
        found.append(own or Loop(tirx.Var("unit", index.ty), tirx.const(1, index.ty.dtype), False))
    if sum(one in loops for one in found) < len(loops):
        return stage
    return replace(stage, loops=(*found, *stage.reduced), indices=tuple(one.var for one in found))


def _factors(product: Stage) -> tuple[Expr, Expr] | None:
    """(x, w) of `acc + x * w`, each as it is before it becomes float32."""
    total = product.value
    if not (isinstance(total, tirx.Add) and isinstance(product.init, tirx.FloatImm) and product.init.value == 0):
        return None
    own, term = total.a, total.b
    if not (isinstance(own, ir.TensorLoad) and own.source.same_as(product.buffer) and isinstance(term, tirx.Mul)):
        return None
    if product.buffer.dtype != "float32":
        return None
    return _narrow(term.a), _narrow(term.b)


def _narrow(factor: Expr) -> Expr:
    """A factor without the cast of float16 to float32."""
    is_half = isinstance(factor, tirx.Cast) and factor.value.ty.dtype == "float16"
    return factor.value if is_half else factor


def kernel(func: tirx.PrimFunc, emit: Callable[[], None]) -> s_tir.Schedule:
    """A schedule of `func` whose body is what `emit` writes, its buffers those of the root block."""
    with IRBuilder() as builder, T.sblock("root"):
        emit()
    block = builder.get().block
    root = s_tir.SBlock([], [], [], "root", block.body, alloc_buffers=list(block.alloc_buffers))
    return s_tir.Schedule(func.with_body(s_tir.SBlockRealize([], True, root)))


def typed(value: Expr, var: ir.Var) -> Expr:
    """`value` in the integer type of a variable that it takes the place of."""
    return value if value.ty.dtype == var.ty.dtype else tirx.Cast(var.ty.dtype, value)


def store_epilogue(m: Product, row: Expr, column: Expr, total: Expr) -> None:
    """Store one element of the result: `total`, the finished sum, and what follows it."""
    at_row = row_indices(row, m.row_loops)
    place = [typed(at_row[loop.var], loop.var) for loop in m.row_loops]
    column = typed(column, m.column.var)
    known: dict[Buffer, Callable[[Sequence[Expr]], Expr]] = {}

    def settle(target: Buffer, value: Expr, last: bool) -> None:
        if last:
            T.buffer_store(target, value, [*place, column])
            return
        held = buffer(f"{target.name}_one", [1], target.dtype)  # a let would be written out wherever it is used
        T.buffer_store(held, value, [0])
        known[target] = partial(_one, held)
        if target in m.outputs:
            T.buffer_store(target, tirx.BufferLoad(held, [0]), [*place, column])

    settle(m.buffer, total, not m.epilogue)
    for i, stage in enumerate(m.epilogue):
        *rows, last = (loop.var for loop in stage.spatial)
        value = rewrite(stage.value, {**dict(zip(rows, place, strict=True)), last: column}, known)
        settle(stage.buffer, value, i + 1 == len(m.epilogue))


def _one(held: Buffer, indices: Sequence[Expr]) -> Expr:
    return tirx.BufferLoad(held, [0])


def buffer(name: str, shape: Sequence[int], dtype: str, scope: str = "local") -> Buffer:
    return IRBuilder.name(name, T.sblock_alloc_buffer(list(shape), dtype, scope=scope))


def binding(name: str, extent: Expr, thread: str) -> Any:
    return named(T.thread_binding(extent, thread=thread), name)


def loop(name: str, extent: int, kind: Callable[..., Any] = T.serial) -> Any:
    return named(kind(extent), name)


class named:
    """A loop frame whose variable has a name."""

    def __init__(self, frame: Any, name: str) -> None:
        self.frame, self.name = frame, name

    def __enter__(self) -> Any:
        return IRBuilder.name(self.name, self.frame.__enter__())

    def __exit__(self, *error: Any) -> Any:
        return self.frame.__exit__(*error)


class where:
    """`if condition` around what follows, where it is `needed`."""

    def __init__(self, condition: Expr, needed: bool) -> None:
        self.frames = [T.If(condition), T.Then()] if needed else []

    def __enter__(self) -> None:
        for frame in self.frames:
            frame.__enter__()

    def __exit__(self, *error: Any) -> None:
        for frame in reversed(self.frames):
            frame.__exit__(*error)


def vector(to: Buffer, at: Sequence[int], lanes: int, value: Callable[[Expr], Expr], offset: Expr | int = 0) -> None:
    """to[*at, offset + lane] = value(lane) for all lanes at once."""
    with named(T.vectorized(lanes), "lane") as lane:
        T.buffer_store(to, value(lane), [*at, offset + lane])


def along(of: Buffer, at: Expr) -> Callable[[Expr], Expr]:
    """lane -> of[at + lane]."""
    return lambda lane: tirx.BufferLoad(of, [at + lane])
