"""How a scheduled product divides its matrix among blocks, threads and steps: TS, TR, TILE_S and TILE_R, read from the
TIR itself and not from the rule that wrote it.

The statement that multiplies a matrix with something else is found, its indices are written over the loops around it,
and each loop's step along each axis of the matrix is measured. The axis that both factors share is the one that is
summed over (R); the matrix's other axis is S.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import tvm_ffi
from tvm import ir, s_tir, sym, tirx

from tuning.report.loops import GRID, SERIAL, THREAD, VECTOR, VTHREAD, Loop, extent_text

CHECKED = 64  # points at which an index must agree with its linear form


@dataclass(frozen=True)
class Factor:
    """A loop that runs along an axis. stride: elements of the axis from one iteration to the next."""

    kind: str
    axis: str
    extent: int
    stride: int


@dataclass(frozen=True)
class Tile:
    """A matrix [rows, columns] (S x R) as a kernel cuts it.

    ts, tr: threads of a block along S and R, on the axes tag_s and tag_r ("" where there are none). tile_s, tile_r:
    the elements that one thread takes in one step. vec: how many of tile_r are one vector. steps: how often a block
    moves along R. blocks: how many blocks share the rows. outer: further loops along S that no thread is bound to.
    """

    buffer: str
    dtype: str
    rows: int
    columns: int
    ts: int
    tr: int
    tile_s: int
    tile_r: int
    vec: int
    steps: int
    blocks: int
    tag_s: str
    tag_r: str
    s: tuple[Factor, ...]
    r: tuple[Factor, ...]


def find_tile(func: tirx.PrimFunc) -> Tile | None:
    """The tile of a scheduled matrix-vector product; None for any other function, and where its indices are not linear
    in the loops (tensor cores, data-dependent addresses)."""
    best: Tile | None = None
    for access in _products(func):
        tile = _tile(access)
        if tile is not None and (best is None or tile.rows * tile.columns > best.rows * best.columns):
            best = tile
    return best


@dataclass(frozen=True)
class _Product:
    """matrix, other: the factors' loads, indices written over the loops. loops: those around it, outermost first."""

    matrix: Any
    other: Any
    output: Sequence[Any]
    loops: tuple[tuple[Any, Loop], ...]


def _products(func: tirx.PrimFunc) -> Iterator[_Product]:
    """Statements `y = y + a * b` whose a is a matrix, both ways round."""
    found: list[_Product] = []

    def visit(node: Any, loops: tuple[tuple[Any, Loop], ...], values: dict[Any, Any]) -> None:
        if isinstance(node, tirx.SeqStmt):
            for child in node.seq:
                visit(child, loops, values)
        elif isinstance(node, tirx.For):
            visit(node.body, (*loops, (node.loop_var, _head(node))), values)
        elif isinstance(node, s_tir.SBlockRealize):
            bound = zip(node.block.iter_vars, node.iter_values, strict=True)
            inner = {**values, **{iv.var: _substitute(value, values) for iv, value in bound}}
            visit(node.block.body, loops, inner)
        elif isinstance(node, tirx.BufferStore):
            found.extend(_product(node, loops, values))
        elif getattr(node, "body", None) is not None:
            visit(node.body, loops, values)

    visit(func.body, (), {})
    yield from found


def _product(store: Any, loops: tuple[tuple[Any, Loop], ...], values: dict[Any, Any]) -> Iterator[_Product]:
    value = store.value
    if not isinstance(value, tirx.Add):
        return
    own = [side for side in (value.a, value.b) if isinstance(side, ir.TensorLoad) and side.source.same_as(store.buffer)]
    terms = [side for side in (value.a, value.b) if not (own and side.same_as(own[0]))]
    if len(own) != 1 or not isinstance(terms[0], tirx.Mul):
        return
    sides = [_one_load(terms[0].a), _one_load(terms[0].b)]
    if None in sides:
        return
    places = [[_substitute(index, values) for index in load.indices] for load in sides]
    output = [_substitute(index, values) for index in store.indices]
    for i in (0, 1):
        matrix, other = (sides[i], places[i]), (sides[1 - i], places[1 - i])
        yield _Product(matrix, other, output, loops)


def _tile(product: _Product) -> Tile | None:
    (load, given), (_, other) = product.matrix, product.other
    shape, indices = _joined(load, given)
    axes = [i for i, extent in enumerate(shape) if extent != 1]
    if len(axes) != 2 or any(shape[i] is None for i in axes):
        return None
    same = partial(_same, product.loops)
    shared = [i for i in axes if any(same(indices[i], index) for index in other)]
    if len(shared) != 1:
        return None
    (r_axis,) = shared
    (s_axis,) = (i for i in axes if i != r_axis)
    if any(_depends(index, product.loops, indices[s_axis]) for index in other if not same(index, indices[r_axis])):
        return None  # a row of the other factor: a matrix product
    if any(
        _static(index) is None and not same(index, indices[r_axis]) for index in other
    ):  # several rows of it: neither
        return None
    s, r = (_factors(indices[axis], product.loops) for axis in (s_axis, r_axis))
    if s is None or r is None:
        return None
    rows, columns = shape[s_axis], shape[r_axis]
    assert rows is not None and columns is not None
    ts, tag_s, tile_s, _ = _split(s)
    tr, tag_r, tile_r, steps = _split(r)
    vec = prod(f.extent for f in r if f.kind == VECTOR)
    blocks = prod(f.extent for f in s if f.kind == GRID)
    name, dtype = str(load.source.name), str(load.source.dtype)
    return Tile(name, dtype, rows, columns, ts, tr, tile_s, tile_r, vec, steps, blocks, tag_s, tag_r, s, r)


def _joined(load: Any, indices: Sequence[Any]) -> tuple[list[int | None], Sequence[Any]]:
    """The matrix's shape and indices. Registers may hold a row cut into several axes (`schedules.early_loads`: steps,
    threads, neighbours): they are one again."""
    shape = [int(e) if isinstance(e, tirx.IntImm) else None for e in load.source.shape]
    if load.source.scope() != "local" or len(shape) != 4 or shape[0] == 1 or None in shape:
        return shape, indices
    column: Any = 0
    for extent, index in zip(shape[1:], indices[1:], strict=True):
        column = column * extent + index
    return [shape[0], prod(extent for extent in shape[1:] if extent is not None)], [indices[0], column]


def _split(factors: tuple[Factor, ...]) -> tuple[int, str, int, int]:
    """(threads, their axes, elements of one thread in one step, steps) along one axis of the matrix."""
    threads = [f for f in factors if f.kind in (THREAD, VTHREAD)]
    span = max((f.stride * f.extent for f in threads), default=0)
    own = [f for f in factors if f.kind not in (THREAD, VTHREAD, GRID)]
    # a serial loop that moves past all that the threads cover at once is a step; the others stay inside a thread's part
    steps = [f for f in own if f.kind == SERIAL and threads and f.stride >= span and f.extent > 1]
    inside = prod(f.extent for f in own if f not in steps)
    axes = " ".join(f.axis for f in threads)
    return prod(f.extent for f in threads), axes, inside, prod(f.extent for f in steps)


def _factors(index: Any, loops: tuple[tuple[Any, Loop], ...]) -> tuple[Factor, ...] | None:
    """The loops that an index depends on with their strides, largest first; None if it is not linear in them."""
    analyzer = sym.Analyzer()
    variables = [(var, loop) for var, loop in loops]
    for _, loop in variables:
        if not isinstance(loop.extent, int) and any(_uses(index, v) for v, other in variables if other is loop):
            return None

    def at(point: dict[Any, int]) -> int | None:
        # indices are int64 or int32 throughout a function; an IntImm of each variable's own type keeps them so
        values = {var: tirx.IntImm(str(var.ty.dtype), point.get(var, 0)) for var, _ in variables}
        return _static(analyzer.simplify(_substitute(index, values)))

    origin = at({})
    if origin is None:
        return None
    factors: list[Factor] = []
    strides: list[tuple[Any, int, int]] = []
    for var, loop in variables:
        if not _uses(index, var) or not isinstance(loop.extent, int):
            continue
        stride = 0
        if loop.extent > 1:
            one = at({var: 1})
            if one is None:
                return None
            stride = one - origin
        factors.append(Factor(loop.kind, loop.axis, loop.extent, stride))
        strides.append((var, loop.extent, stride))
    # a point of every combination of first and last iterations, up to a limit: div and mod would show there
    for number in range(min(CHECKED, 1 << len(strides))):
        point = {var: (extent - 1) * (number >> i & 1) for i, (var, extent, _) in enumerate(strides)}
        value = at(point)
        if value is None or value != origin + sum(point[var] * stride for var, _, stride in strides):
            return None
    return tuple(sorted(factors, key=lambda f: -f.stride))


def _head(node: tirx.For) -> Loop:
    """A loop without what is inside it."""
    axis = str(node.thread_binding.thread_tag) if node.thread_binding is not None else ""
    kind = GRID if axis.startswith("blockIdx") else VTHREAD if axis.startswith("vthread") else THREAD
    if not axis:
        kind = VECTOR if int(node.kind) == int(tirx.ForKind.VECTORIZED) else SERIAL
    return Loop(kind, axis, str(node.loop_var.name), extent_text(node.extent))


def _one_load(expression: Any) -> Any:
    """The only buffer load of a factor, through casts and scalings; None if there is none, or several."""
    found: list[Any] = []
    tvm_ffi.structural_walk(expression, [(ir.TensorLoad, found.append)])
    return found[0] if len(found) == 1 else None


def _substitute(expression: Any, values: dict[Any, Any]) -> Any:
    return tvm_ffi.structural_map(expression, [(ir.Var, lambda var: values.get(var, var))]) if values else expression


def _uses(expression: Any, var: Any) -> bool:
    found: list[bool] = []
    tvm_ffi.structural_walk(expression, [(ir.Var, lambda v: found.append(True) if v.same_as(var) else None)])
    return bool(found)


def _same(loops: tuple[tuple[Any, Loop], ...], a: Any, b: Any) -> bool:
    """Whether two indices run along the same axis: equal, in whatever order their terms are written, and no number."""
    if _static(a) is not None or _static(b) is not None:
        return False
    analyzer = sym.Analyzer()
    for var, loop in loops:
        if isinstance(loop.extent, int):
            zero, extent = (tirx.IntImm(str(var.ty.dtype), number) for number in (0, loop.extent))
            analyzer.bind(var, ir.Range.from_min_extent(zero, extent))
    return bool(tvm_ffi.structural_equal(a, b) or analyzer.can_prove_equal(a, b))


def _depends(index: Any, loops: tuple[tuple[Any, Loop], ...], other: Any) -> bool:
    """Whether an index shares a loop with another."""
    return any(_uses(index, var) and _uses(other, var) for var, _ in loops)


def _static(expression: Any) -> int | None:
    return int(expression) if isinstance(expression, (int, tirx.IntImm)) else None
