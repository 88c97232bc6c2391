"""Steps as CUDA graphs: captured at their first call, then one launch each.

TVM's own builtin would replay from inside the virtual machine, after it has checked every parameter of the model: more
host time than the kernels of a small model take. And it knows a graph by its number alone, so it would go on writing
into caches that the engine has since replaced. Here a graph belongs to the buffers it was captured with: the same call
again is one `cudaGraphLaunch` and nothing else, other buffers make a new graph in its place.

What a graph keeps alive: the buffers of its call, and the intermediates, which the artifact allocates once for all its
graphs. A step's result lies in one of those: read it before the next step.
"""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from gpt2_tvm.runners.base import Handle

PREFIX = "graph_"  # of the functions that passes/cuda_graph.py adds
SUCCESS = 0
NON_BLOCKING = 1  # cudaStreamNonBlocking
THREAD_LOCAL = 1  # cudaStreamCaptureModeThreadLocal: other threads may go on allocating meanwhile


class GraphDriver(Protocol):
    """What is needed of CUDA."""

    def capture(self, run: Callable[[], Any]) -> Any:
        """A graph of what `run` launches, without executing it. Raises RuntimeError where CUDA refuses."""
        ...

    def launch(self, graph: Any) -> None:
        """Queue it."""
        ...

    def destroy(self, graph: Any) -> None:
        """Give it back. It may still be running."""
        ...


class CudaDriver:
    """Graphs through libcudart (13), the one that TVM's runtime is linked with. device: a `tvm.runtime.Device`."""

    def __init__(self, device: Any, library: Any = None) -> None:
        self.device = device
        self._cudart = library or _cudart()
        self._stream: ctypes.c_void_p | None = None

    def capture(self, run: Callable[[], Any]) -> ctypes.c_void_p:
        """See `GraphDriver.capture`. What the kernels need must be loaded: run them once before."""
        import tvm_ffi

        if self._stream is None:  # the default stream cannot be captured
            self._stream = ctypes.c_void_p()
            self._call("cudaStreamCreateWithFlags", ctypes.byref(self._stream), ctypes.c_uint(NON_BLOCKING))
        graph, executable = ctypes.c_void_p(), ctypes.c_void_p()
        collecting = gc.isenabled()
        gc.disable()  # a collected tensor's cudaFree would break the capture
        try:
            with tvm_ffi.use_raw_stream(self.device, self._stream.value or 0):
                self._call("cudaStreamBeginCapture", self._stream, ctypes.c_int(THREAD_LOCAL))
                try:
                    run()
                finally:
                    status = self._cudart.cudaStreamEndCapture(self._stream, ctypes.byref(graph))
        except BaseException:
            self._clear_error()
            if graph:
                self._cudart.cudaGraphDestroy(graph)
            raise
        finally:
            if collecting:
                gc.enable()
        self._check("cudaStreamEndCapture", status)
        try:
            self._call("cudaGraphInstantiate", ctypes.byref(executable), graph, ctypes.c_ulonglong(0))
        finally:
            self._cudart.cudaGraphDestroy(graph)
        return executable

    def launch(self, graph: ctypes.c_void_p) -> None:
        """See `GraphDriver.launch`; on the default stream, like all that TVM runs here."""
        status = self._cudart.cudaGraphLaunch(graph, None)
        if status:
            self._check("cudaGraphLaunch", status)

    def destroy(self, graph: ctypes.c_void_p) -> None:
        """See `GraphDriver.destroy`."""
        self._cudart.cudaGraphExecDestroy(graph)

    def _call(self, name: str, *arguments: Any) -> None:
        self._check(name, getattr(self._cudart, name)(*arguments))

    def _check(self, name: str, status: int) -> None:
        if status != SUCCESS:
            self._clear_error()
            raise RuntimeError(f"{name}: {self._error_name(status)}")

    def _clear_error(self) -> None:
        self._cudart.cudaGetLastError()  # else TVM's next call reports it as its own

    def _error_name(self, status: int) -> str:
        name = self._cudart.cudaGetErrorName(status)
        return name.decode() if isinstance(name, bytes) else f"error {status}"


def _cudart() -> Any:
    """libcudart, with the argument types of what is called here."""
    from gpt2_tvm.toolchains import cuda_toolkit

    for candidate in cuda_toolkit.cudart_candidates():
        try:
            library = ctypes.CDLL(candidate)
        except OSError:
            continue
        pointer = ctypes.c_void_p
        library.cudaGetErrorName.restype = ctypes.c_char_p
        library.cudaGraphLaunch.argtypes = [pointer, pointer]
        library.cudaGraphDestroy.argtypes = [pointer]
        library.cudaGraphExecDestroy.argtypes = [pointer]
        library.cudaGraphInstantiate.argtypes = [pointer, pointer, ctypes.c_ulonglong]
        library.cudaStreamBeginCapture.argtypes = [pointer, ctypes.c_int]
        library.cudaStreamEndCapture.argtypes = [pointer, pointer]
        return library
    raise RuntimeError(f"libcudart.so.{cuda_toolkit.MAJOR} does not load")


@dataclass(frozen=True)
class _Step:
    """A captured call. handles: its buffers, in order; held, so that none of their addresses is used again."""

    handles: tuple[Handle, ...]
    graph: Any
    result: Any


class StepGraphs:
    """The graphs of one artifact on one device.

    Attributes:
        enabled: False runs the plain functions instead.
        refused: why CUDA would not capture, "" so far; from then on all runs ungraphed.
        captures, replays: how often either happened.
    """

    def __init__(self, driver: GraphDriver) -> None:
        self.driver = driver
        self.enabled = True
        self.refused = ""
        self.captures = self.replays = 0
        self._steps: dict[str, _Step] = {}
        self._owner: Handle | None = None  # the first cache of the call before: another one, another batch
        self._allocated: dict[int, Any] = {}
        self._made: Any = None
        self._plainly = False

    @contextmanager
    def builtins(self) -> Iterator[None]:
        """A virtual machine that is made inside this context captures through this object."""
        from gpt2_tvm.toolchains import callbacks

        with callbacks.replaced(
            {
                "vm.builtin.cuda_graph.run_or_capture": self._run_or_capture,
                "vm.builtin.cuda_graph.get_cached_alloc": self._cached_alloc,
            }
        ):
            yield

    def call(self, name: str, inputs: Sequence[Handle | Sequence[Handle]], invoke: Callable[[], Any]) -> Any:
        """The result of one step. invoke: calls function `name` of the virtual machine with `inputs`, for the first
        time, or where the buffers are not those of the last time."""
        step = self._steps.get(name)
        handles = [handle for x in inputs for handle in (x if isinstance(x, list) else (x,))]
        if step is not None and len(handles) == len(step.handles) and all(map(_same, handles, step.handles)):
            self.driver.launch(step.graph)
            self.replays += 1
            return step.result
        owner = next((x[0] for x in inputs if isinstance(x, list) and x), None)
        if owner is not None and owner is not self._owner:
            self.clear()  # the old caches are needed no more: let go of them
            self._owner = owner
        self._drop(name)
        self._made = None
        result = invoke()
        if self._made is not None:
            self._steps[name] = _Step(tuple(handles), self._made, result)
            self._made = None
        return result

    def plainly(self, invoke: Callable[[], Any]) -> Any:
        """`invoke` a step without a graph of its own: as part of one that somebody else captures."""
        before, self._plainly = self._plainly, True
        try:
            return invoke()
        finally:
            self._plainly = before

    def refuse(self, error: Exception) -> None:
        """Capture no more, because of `error`."""
        self.refused = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__

    def clear(self) -> None:
        """Drop every graph, and what it holds."""
        for name in list(self._steps):
            self._drop(name)
        self._owner = None

    def _drop(self, name: str) -> None:
        step = self._steps.pop(name, None)
        if step is not None:
            self.driver.destroy(step.graph)

    def _run_or_capture(self, machine: Any, closure: Any, arguments: Any, index: int, *_: Any) -> Any:
        """TVM's builtin: run `closure` (which loads its kernels), then capture the same call."""
        import tvm_ffi

        run = tvm_ffi.get_global_func("vm.builtin.invoke_closure")
        result = run(machine, closure, *arguments)
        if not self.refused and not self._plainly:
            try:
                self._made = self.driver.capture(lambda: run(machine, closure, *arguments))
                self.captures += 1
            except Exception as error:
                self.refuse(error)
        return result

    def _cached_alloc(self, machine: Any, allocate: Any, index: int) -> Any:
        """TVM's builtin: the memory of the intermediates, allocated once."""
        import tvm_ffi

        if index not in self._allocated:
            self._allocated[index] = tvm_ffi.get_global_func("vm.builtin.invoke_closure")(machine, allocate)
        return self._allocated[index]


def _same(a: Any, b: Any) -> bool:
    return a is b
