"""The loop nest of a PrimFunc as plain data, whatever made it: a rule's schedule, a rule that writes TIR, or a kernel
written by hand.

Loops keep their kind (grid, thread, vector, ...), and statements say which buffers they read and write and where those
live, which is what `drawing` shows and what `tile` reasons about.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import tvm
import tvm_ffi
from tvm import ir, s_tir, tirx

from gpt2_tvm.expressions import Text, combine, to_text

GRID, THREAD, VTHREAD, VECTOR, UNROLL, PARALLEL, SERIAL = (
    *("grid", "thread", "vthread", "vector", "unroll", "parallel", "serial"),
)
KINDS = (GRID, THREAD, VTHREAD, PARALLEL, SERIAL, UNROLL, VECTOR)
_FOR_KINDS = {
    tirx.ForKind.SERIAL: SERIAL,
    tirx.ForKind.PARALLEL: PARALLEL,
    tirx.ForKind.VECTORIZED: VECTOR,
    tirx.ForKind.UNROLLED: UNROLL,
}


@dataclass(frozen=True)
class Place:
    """A buffer that a statement touches. bytes: of one block's (or, for local, one thread's) part, None if unknown;
    only for buffers that the function allocates.
    """

    buffer: str
    scope: str
    dtype: str
    bytes: Text | None = None

    @property
    def staged(self) -> bool:
        """Whether it is a cache stage: shared memory, registers, or fragments of a matrix unit."""
        return self.scope != "global"


@dataclass(frozen=True)
class Loop:
    """kind: one of `KINDS`. axis: "blockIdx.x", "threadIdx.y", "" if not bound. notes: pragmas, as "name = value".
    repeats: how many loops of this form follow each other.
    """

    kind: str
    axis: str
    variable: str
    extent: Text
    notes: tuple[str, ...] = ()
    children: tuple[Node, ...] = ()
    repeats: int = 1


@dataclass(frozen=True)
class Stage:
    """A statement, or an s-block: what one iteration of the loops around it does.

    name: of the block; "" for plain statements. reduces: whether it adds to what it wrote before. calls: intrinsics
    ("tvm_mma_sync", "tvm_storage_sync"). repeats: how many such statements follow each other.
    """

    name: str
    writes: tuple[Place, ...]
    reads: tuple[Place, ...]
    reduces: bool = False
    calls: tuple[str, ...] = ()
    repeats: int = 1
    children: tuple[Node, ...] = ()


@dataclass(frozen=True)
class Branch:
    """An `if`; the children of its `else` come in a second Branch."""

    condition: str
    children: tuple[Node, ...] = ()


Node = Loop | Stage | Branch


def walk(nodes: tuple[Node, ...]) -> Iterator[Node]:
    """Every node, outer before inner, in the order of the program."""
    for node in nodes:
        yield node
        yield from walk(node.children)


def loop_nest(func: tirx.PrimFunc) -> tuple[Node, ...]:
    """The nest of a PrimFunc, scheduled or not."""
    return _merged(_Reader(func).read(func.body))


def stages(nodes: tuple[Node, ...]) -> list[Place]:
    """The cache stages that are filled in a nest, each once, in order."""
    found: dict[tuple[str, str], Place] = {}
    for node in walk(nodes):
        if isinstance(node, Stage):
            for place in node.writes:
                if place.staged:
                    found.setdefault((place.buffer, place.scope), place)
    return list(found.values())


def extent_text(extent: Any) -> Text:
    """An extent as a number, or as text over the function's symbolic sizes and outer loops."""
    try:
        return to_text(extent, lambda node: str(node.name) if isinstance(node, tirx.Var) else None)
    except RuntimeError:  # an extent that the grammar of sizes cannot say, such as one read from a buffer
        return str(extent)


def _buffer_bytes(buffer: Any) -> Text:
    total: Text = max(1, tvm.DataType(buffer.dtype).bits // 8)
    for extent in buffer.shape:
        size = extent_text(extent)
        total = combine("*", total, size) if isinstance(size, int) or size.isidentifier() else f"{total} * ({size})"
    return total


class _Reader:
    def __init__(self, func: tirx.PrimFunc) -> None:
        self.names: dict[Any, str] = {}
        self.taken: defaultdict[str, int] = defaultdict(int)
        self.sizes = _sizes(func)
        self.parameters = set(func.params)

    def place(self, buffer: Any) -> Place:
        return Place(self.name(buffer), str(buffer.scope()), str(buffer.dtype), self.sizes.get(buffer))

    def name(self, buffer: Any) -> str:
        """Its name, with a number where another buffer of the function has the same: as TVMScript prints it."""
        if buffer not in self.names:
            base = str(buffer.name)
            self.names[buffer] = f"{base}_{self.taken[base]}" if self.taken[base] else base
            self.taken[base] += 1
        return self.names[buffer]

    def read(self, node: Any) -> tuple[Node, ...]:
        if isinstance(node, tirx.SeqStmt):
            return tuple(found for child in node.seq for found in self.read(child))
        if isinstance(node, tirx.For):
            return (self._loop(node),)
        if isinstance(node, s_tir.SBlockRealize):
            return self._block(node.block)
        if isinstance(node, tirx.IfThenElse):
            condition = _condition(node.condition)
            branches = [Branch(condition, _merged(self.read(node.then_case)))]
            if node.else_case is not None:
                branches.append(Branch(f"else of {condition}", _merged(self.read(node.else_case))))
            return tuple(branches)
        if isinstance(node, tirx.While):
            return (Loop(SERIAL, "", f"while {_condition(node.condition)}", "?", (), _merged(self.read(node.body))),)
        if isinstance(node, tirx.BufferStore):
            own = [load for load in _loads(node.value) if load.source.same_as(node.buffer)]
            reads = _unique(self.place(load.source) for load in _loads(node.value))
            return (Stage("", (self.place(node.buffer),), reads, bool(own)),)
        if isinstance(node, tirx.Evaluate):
            return (Stage("", (), _unique(self.place(x.source) for x in _loads(node.value)), calls=_calls(node.value)),)
        body = getattr(node, "body", None)  # AttrStmt, DeclBuffer and others that only wrap
        return self.read(body) if body is not None else ()

    def _loop(self, loop: tirx.For) -> Loop:
        axis = str(loop.thread_binding.thread_tag) if loop.thread_binding is not None else ""
        kind = _FOR_KINDS.get(tirx.ForKind(int(loop.kind)), SERIAL)
        if axis:
            kind = GRID if axis.startswith("blockIdx") else VTHREAD if axis.startswith("vthread") else THREAD
        notes = tuple(f"{key} = {_plain(value)}" for key, value in sorted(dict(loop.annotations).items()))
        variable = str(loop.loop_var.name)
        return Loop(kind, axis, variable, extent_text(loop.extent), notes, _merged(self.read(loop.body)))

    def _block(self, block: s_tir.SBlock) -> tuple[Node, ...]:
        inside = _merged(self.read(block.body))
        if not block.iter_vars and not block.writes:  # the root block: a scope for buffers and no work
            return inside
        writes = _unique(self.place(region.source) for region in block.writes)
        reads = _unique(self.place(region.source) for region in block.reads)
        calls = tuple(dict.fromkeys(c for node in walk(inside) if isinstance(node, Stage) for c in node.calls))
        reduces = any(isinstance(node, Stage) and node.reduces for node in walk(inside)) or bool(calls and block.init)
        loops = tuple(node for node in inside if not isinstance(node, Stage))
        return (Stage(str(block.name_hint), writes, reads, reduces, calls, 1, loops if not calls else ()),)


def _sizes(func: tirx.PrimFunc) -> dict[Any, Text]:
    """Bytes of the buffers that a function allocates.

    A rule's buffers keep their whole shape until TVM compacts them to what one block (for registers: one thread)
    touches, so the function goes through the passes that do; statements keep their order, which tells buffers of one
    name apart.
    """
    outer: list[Any] = []
    tvm_ffi.structural_walk(func.body, [(s_tir.SBlock, lambda block: outer.extend(block.alloc_buffers))], order="pre")
    sizes: dict[Any, Text] = {}
    allocated: list[Any] = []
    tvm_ffi.structural_walk(func.body, [(tirx.AllocBuffer, lambda node: allocated.append(node.buffer))], order="pre")
    for buffer in allocated:
        sizes[buffer] = _buffer_bytes(buffer)
    if not outer:
        return sizes
    passes = s_tir.transform
    try:
        compact = tvm.transform.Sequential(
            [
                passes.LowerInitBlock(),
                passes.PlanAndUpdateBufferAllocationLocation(),
                passes.ConvertBlocksToOpaque(),
                passes.LiftThreadBinding(),
                passes.CompactBufferAllocation(),
            ]
        )(tvm.IRModule({"main": func}))["main"]
    except Exception:  # a form that these passes do not take: the drawing leaves the sizes out
        return sizes
    before, after = _written(func), _written(compact)
    for name, buffers in before.items():
        for old, new in zip(buffers, after.get(name, []), strict=False):
            if old.scope() != "global" or any(old.same_as(buffer) for buffer in outer):
                sizes[old] = _buffer_bytes(new)
    return sizes


def _written(func: tirx.PrimFunc) -> dict[str, list[Any]]:
    """The buffers that blocks write, by name, in the order of their first write."""
    found: defaultdict[str, list[Any]] = defaultdict(list)

    def see(block: s_tir.SBlock) -> None:
        for region in block.writes:
            known = found[str(region.source.name)]
            if not any(region.source.same_as(buffer) for buffer in known):
                known.append(region.source)

    tvm_ffi.structural_walk(func.body, [(s_tir.SBlock, see)], order="pre")
    return found


def _merged(nodes: tuple[Node, ...]) -> tuple[Node, ...]:
    """Neighbours of the same form as one, with how many they are: code unrolled by hand is read once."""
    out: list[Node] = []
    for node in nodes:
        if out and _form(out[-1]) == _form(node):
            out[-1] = _both(out[-1], node)
        else:
            out.append(node)
    return tuple(out)


def _form(node: Node) -> Any:
    inside = tuple(_form(child) for child in node.children)
    if isinstance(node, Loop):
        return node.kind, node.axis, node.extent, node.notes, inside
    if isinstance(node, Branch):
        return node.condition, inside
    scopes = tuple({place.scope: None for place in places} for places in (node.writes, node.reads))
    return node.name, node.reduces, node.calls, tuple(map(tuple, scopes)), inside


def _both(a: Node, b: Node) -> Node:
    children = tuple(_both(x, y) for x, y in zip(a.children, b.children, strict=True))
    if isinstance(a, Stage) and isinstance(b, Stage):
        writes, reads = _unique([*a.writes, *b.writes]), _unique([*a.reads, *b.reads])
        return replace(a, writes=writes, reads=reads, children=children, repeats=a.repeats + b.repeats)
    if isinstance(a, Loop) and isinstance(b, Loop):  # the loops inside count for themselves: keep one loop's statements
        return replace(a, children=children, repeats=a.repeats + b.repeats)
    return replace(a, children=children)


def _unique(places: Any) -> tuple[Place, ...]:
    return tuple(dict.fromkeys(places))


def _loads(expression: Any) -> list[Any]:
    found: list[Any] = []
    tvm_ffi.structural_walk(expression, [(ir.TensorLoad, found.append)])
    return found


def _calls(expression: Any) -> tuple[str, ...]:
    name = str(getattr(getattr(expression, "op", None), "name", ""))
    return (name.rpartition(".")[2],) if name else ()


def _condition(expression: Any) -> str:
    text = " ".join(str(expression).split())
    return text if len(text) <= 120 else text[:117] + "..."


def _plain(value: Any) -> str:
    value = getattr(value, "value", value)
    return str(list(value) if not isinstance(value, (int, str)) and hasattr(value, "__iter__") else value)
