"""What TVM's host code does for each PrimFunc: which device kernels it launches, with which buffers, scalars and grid.

TVM splits a scheduled PrimFunc into kernels and host code that launches them. A machine that cannot run that host
code (a browser without TVM, PyPI's wgpu) must make the same launches; here they are read from the host code itself,
not guessed from names.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import tvm
import tvm_ffi
from tvm import tirx
from tvm.ir import Call
from tvm.tirx.build import split_host_device_mods

from gpt2_tvm.expressions import Text, to_text
from gpt2_tvm.schedules.webgpu_pipeline import tir_pipeline

# The fields of tvm_struct_get that the host code reads (TVMStructFieldKind in TVM's include/tvm/tirx/builtin.h).
DATA, SHAPE, ARGUMENT_HANDLE, ELEMENT = 1, 2, 15, 17
# Tags among a launch's parameters that say how it is made and stand for no value.
COOPERATIVE = "tirx.use_cooperative_launch"
MANNERS = (COOPERATIVE, "tirx.use_programtic_dependent_launch")
COMPARISONS: dict[str, Callable[[int, int], bool]] = {
    "LT": operator.lt,
    "LE": operator.le,
    "GT": operator.gt,
    "GE": operator.ge,
    "EQ": operator.eq,
    "NE": operator.ne,
}


@dataclass(frozen=True)
class Extent:
    """Dimension `axis` of a PrimFunc's argument, the only unknowns in a launch."""

    argument: int
    axis: int


@dataclass(frozen=True)
class Scratch:
    """A global buffer that host code allocates between its kernels: its size and dtype."""

    index: int
    elements: Callable[[Callable[[Extent], Text]], Text]
    dtype: str


@dataclass(frozen=True)
class When:
    """A condition that host code asks before a launch: a comparison of two numbers, by its name in `COMPARISONS`, and
    what it has to be."""

    a: Callable[[Callable[[Extent], Text]], Text]
    comparison: str
    b: Callable[[Callable[[Extent], Text]], Text]
    wanted: bool


@dataclass(frozen=True)
class HostLaunch:
    """One launch. buffers: each an argument's index or a Scratch. scalars, grid: called with what stands for an
    `Extent`. cooperative: CUDA must have all blocks resident at once. when: it is made where all of these hold.
    """

    kernel: str
    buffers: tuple[int | Scratch, ...]
    scalars: tuple[Callable[[Callable[[Extent], Text]], Text], ...]
    grid: tuple[Callable[[Callable[[Extent], Text]], Text], ...]
    cooperative: bool = False
    when: tuple[When, ...] = ()

    def is_made(self, size: Callable[[Extent], int]) -> bool:
        """Whether host code makes this launch for arguments of these sizes."""
        return all(COMPARISONS[w.comparison](int(w.a(size)), int(w.b(size))) == w.wanted for w in self.when)


def host_launches(functions: dict[Any, tirx.PrimFunc], target: tvm.target.Target) -> dict[str, list[HostLaunch]]:
    """The launches of each PrimFunc, in order, by its name: TVM's own TIR pipeline for `target`, read after the split.

    Raises RuntimeError for host code that is more than launches, some of them under conditions (loops, library calls):
    nothing could replay it.
    """
    return split_launches(functions, target)[0]


def split_launches(
    functions: dict[Any, tirx.PrimFunc], target: tvm.target.Target, choices: bool = True
) -> tuple[dict[str, list[HostLaunch]], dict[Any, tvm.IRModule]]:
    """`host_launches`, and the kernels ready for code generation: {target: module}. choices: whether the caller knows
    of launches that the host makes or not (`HostLaunch.is_made`); RuntimeError where it does not and there is one."""
    if target.host is None:
        target = target.with_host("llvm")
    with target:
        module = tirx.transform.BindTarget(target)(tvm.IRModule(functions))
        pipeline, _, finish_device = tir_pipeline(target)
        host, devices = split_host_device_mods(pipeline(module))
        kernels = {device: finish_device()(mod) for device, mod in devices.items()}
    launches = {var.name_hint: _Reader(var.name_hint, func).launches for var, func in host.functions_items()}
    if not choices and (chosen := [name for name, made in launches.items() if any(one.when for one in made)]):
        raise RuntimeError(f"the host code of {', '.join(chosen)} chooses between kernels; a list of launches does not")
    return launches, kernels


def launch_values(call: Call) -> dict[str, Any]:
    """The extents, and the bytes of dynamic shared memory, that a call_ffi_kernel ends with, by their tags."""
    tags = [str(tag) for tag in call.attrs.launch_params if str(tag) not in MANNERS]
    return dict(zip(tags, list(call.args)[len(call.args) - len(tags) :], strict=True))


def _is_launch(call: Call) -> bool:
    return str(getattr(call.op, "name", "")).endswith("call_ffi_kernel")


def _launches(node: Any) -> bool:
    found: list[Any] = []
    tvm_ffi.structural_walk(node, [(Call, lambda call: found.append(call) if _is_launch(call) else None)], order="pre")
    return bool(found)


class _Reader:
    """One host function: its definitions, then its launches in terms of its arguments."""

    def __init__(self, name: str, func: tirx.PrimFunc) -> None:
        self.name, self.arguments = name, func.params[1]
        self.values: dict[Any, Any] = {}
        self.scratch: dict[Any, Scratch] = {}
        self.launches: list[HostLaunch] = []
        self.when: tuple[When, ...] = ()
        self._walk(func.body)

    def _walk(self, body: Any) -> None:
        visit = [
            (tirx.Bind, self._bind),
            (tirx.DeclBuffer, self._declare),
            (tirx.AllocBuffer, self._allocate),
            ((tirx.For, tirx.While), self._refuse),
            (tirx.IfThenElse, self._branch),
            (Call, self._call),
        ]
        tvm_ffi.structural_walk(body, visit, order="pre")

    def _branch(self, node: Any) -> Any:
        """Both ways of a condition with launches in it, each of them under it."""
        if not _launches(node):
            return None
        comparison = type(node.condition).__name__
        if comparison not in COMPARISONS:
            raise RuntimeError(f"the host code of {self.name} launches by {node.condition}; it cannot be replayed")
        outer = self.when
        for body, wanted in ((node.then_case, True), (node.else_case, False)):
            if body is not None:
                a, b = self._expression(node.condition.a), self._expression(node.condition.b)
                self.when = (*outer, When(a, comparison, b, wanted))
                self._walk(body)
        self.when = outer
        return tvm_ffi.WalkResult.SKIP

    def _bind(self, node: Any) -> None:
        self.values[node.var] = node.value

    def _declare(self, node: Any) -> None:
        self.values[node.buffer] = node.data

    def _allocate(self, node: Any) -> None:
        buffer = node.buffer
        elements = tirx.const(1, "int64")
        for extent in buffer.shape:
            elements = elements * extent
        self.scratch[buffer] = Scratch(len(self.scratch), self._expression(elements), str(buffer.dtype))

    def _refuse(self, node: Any) -> None:
        raise RuntimeError(f"the host code of {self.name} has a loop around its kernels; it cannot be replayed")

    def _call(self, call: Call) -> None:
        if not _is_launch(call):
            return
        extents = launch_values(call)
        given = list(call.args[1:])
        plain = given[: len(given) - len(extents)]
        pointers = [a for a in plain if self._is_pointer(a)]
        one = tirx.const(1, "int32")
        self.launches.append(
            HostLaunch(
                kernel=str(call.args[0].value),
                buffers=tuple(self._buffer(p) for p in pointers),
                scalars=tuple(self._expression(a) for a in plain[len(pointers) :]),
                grid=tuple(self._expression(extents.get(f"blockIdx.{axis}", one)) for axis in "xyz"),
                cooperative=COOPERATIVE in map(str, call.attrs.launch_params),
                when=self.when,
            )
        )

    @staticmethod
    def _is_pointer(expr: Any) -> bool:
        return isinstance(expr, Call) and str(expr.op.name) in ("tirx.buffer_data", "tirx.reinterpret")

    def _buffer(self, expr: Any) -> int | Scratch:
        """The argument, or the scratch buffer, that a pointer points to."""
        while True:
            if expr in self.scratch:
                return self.scratch[expr]
            if isinstance(expr, Call):
                name = str(expr.op.name)
                if name == "tirx.tvm_struct_get" and int(expr.args[2]) == DATA:
                    return self._argument(expr.args[0])
                if name in ("tirx.buffer_data", "tirx.reinterpret"):
                    expr = expr.args[0]
                    continue
            if expr not in self.values:
                raise RuntimeError(f"the host code of {self.name} passes a pointer of unknown origin: {expr}")
            expr = self.values[expr]

    def _argument(self, handle: Any) -> int:
        """Which argument of the function a handle is."""
        found: list[int] = []

        def see(call: Call) -> None:
            if str(getattr(call.op, "name", "")) != "tirx.tvm_struct_get":
                return
            if call.args[0].same_as(self.arguments) and int(call.args[2]) == ARGUMENT_HANDLE:
                found.append(int(call.args[1]))

        tvm_ffi.structural_walk(self.values[handle], [(Call, see)], order="pre")
        if len(set(found)) != 1:
            raise RuntimeError(f"the host code of {self.name} has a handle of unknown origin: {handle}")
        return found[0]

    def _expression(self, expr: Any) -> Callable[[Callable[[Extent], Text]], Text]:
        def text(extent_text: Callable[[Extent], Text]) -> Text:
            def leaf(node: Any) -> Text | None:
                if isinstance(node, Call) and str(getattr(node.op, "name", "")) == "tirx.tvm_struct_get":
                    return extent_text(self._extent(node))
                if node in self.values:
                    return to_text(self.values[node], leaf)
                return None

            return to_text(expr, leaf)

        return text

    def _extent(self, call: Call) -> Extent:
        shape = self.values.get(call.args[0])
        if int(call.args[2]) != ELEMENT or shape is None or int(shape.args[2]) != SHAPE:
            raise RuntimeError(f"the host code of {self.name} reads {call}, which is no extent of an argument")
        return Extent(self._argument(shape.args[0]), int(call.args[1]))
