"""Running an artifact on TVM's virtual machine, with the runtime alone (no compiler needed)."""

from __future__ import annotations

import mmap
import platform
from collections.abc import Sequence
from contextlib import nullcontext
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from gpt2_tvm.artifact import Artifact
from gpt2_tvm.errors import UserError
from gpt2_tvm.runners.base import Handle
from gpt2_tvm.runners.cuda_graph import PREFIX, CudaDriver, StepGraphs
from gpt2_tvm.runners.threads import check_threads, prepare_pools, use_threads
from gpt2_tvm.tensor_cache import load_tensors
from gpt2_tvm.tvm_alone import import_tvm

UNTOUCHED_ELEMENTS = 1 << 18  # from here on a tensor is worth a mapping of its own


class VmRunner:
    """See `runners.base.Runner`. threads: as for `Engine`.

    graphs: the steps that run as CUDA graphs, where the artifact has any; `graphs.enabled = False` runs them plain.
    """

    def __init__(self, artifact: Artifact, device: str | None = None, threads: int | None = None) -> None:
        if artifact.kind == "cpu":
            import_tvm()
        import tvm
        from tvm.runtime.vm import VirtualMachine

        self.device = _device(artifact, device)
        self.threads = set_up_pool(threads) if artifact.kind == "cpu" else None
        self._graphed = frozenset(artifact.manifest.get("cuda_graph") or ())
        self.graphs = StepGraphs(CudaDriver(self.device)) if self._graphed else None
        try:
            library = tvm.runtime.load_module(str(artifact.library))
            with self.graphs.builtins() if self.graphs else nullcontext():
                self._vm = VirtualMachine(library, self.device)
        except Exception as error:
            first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise UserError(
                f"{artifact.library} does not load here ({first}); compile it again for this machine"
            ) from error
        self.device_name = device_name(self.device, artifact.kind)
        tensors = load_tensors(artifact.params, None if artifact.kind == "cpu" else self.device)
        missing = [name for name in artifact.manifest["params"] if name not in tensors]
        if missing:
            raise UserError(f"{artifact.params} lacks parameter {missing[0]}; compile the artifact again")
        # one tuple, converted once: the VM takes its elements without copies
        self._params = tvm.runtime.convert([tensors[name] for name in artifact.manifest["params"]])
        self._functions: dict[str, Any] = {}
        self._tvm = tvm

    def empty(self, shape: Sequence[int], dtype: str) -> Handle:
        if self.threads is not None and prod(shape) >= UNTOUCHED_ELEMENTS:
            return _untouched(shape, dtype)
        return self._tvm.runtime.tensor(np.zeros(tuple(shape), dtype), self.device)

    def upload(self, tensor: Handle, array: np.ndarray) -> None:
        tensor.copyfrom(np.ascontiguousarray(array))

    def download(self, tensor: Handle) -> np.ndarray:
        return tensor.numpy()

    def call(self, function: str, inputs: Sequence[Handle | Sequence[Handle]], with_params: bool = True) -> Any:
        if self.threads is not None:  # pools are a calling thread's own, and another engine may have set this one
            use_threads(self.threads)
        if self.graphs and self.graphs.enabled and function in self._graphed:
            name = PREFIX + function
            return self.graphs.call(name, inputs, lambda: self._call(name, inputs, with_params))
        return self._call(function, inputs, with_params)

    def has_graph(self, function: str) -> bool:
        """Whether the artifact has `function` as a CUDA graph."""
        return function in self._graphed

    def replayed(self, function: str, inputs: Sequence[Handle | Sequence[Handle]], with_params: bool = True) -> Any:
        """`call` of a function that `has_graph`, for a graph that somebody else captures: its kernels, no more."""
        assert self.graphs is not None
        return self.graphs.plainly(lambda: self._call(PREFIX + function, inputs, with_params))

    def _call(self, function: str, inputs: Sequence[Handle | Sequence[Handle]], with_params: bool) -> Any:
        if function not in self._functions:
            self._functions[function] = self._vm[function]
        arguments = [self._tuple(x) if isinstance(x, list) else x for x in inputs]
        return self._functions[function](*arguments, *([self._params] if with_params else []))

    def _tuple(self, tensors: list[Handle]) -> Any:
        return self._tvm.runtime.convert(tensors)

    def sync(self) -> None:
        self.device.sync()

    @property
    def vm(self) -> Any:
        """The virtual machine, for engines that call it in their own way (`mlc.engine`)."""
        return self._vm

    @property
    def params(self) -> Any:
        """The tuple of parameters that an exported function takes last: for the laboratory."""
        return self._params


def _untouched(shape: Sequence[int], dtype: str) -> Handle:
    """Zeros on the CPU that take memory as they are first used, page by page: of a KV cache the slots in use."""
    import tvm

    nbytes = prod(shape) * tvm.DataType(dtype).itemsize
    pages = np.frombuffer(mmap.mmap(-1, nbytes), np.uint8)
    return tvm.runtime.from_dlpack(pages)._create_view(tuple(shape), dtype)


def _device(artifact: Artifact, wanted: str | None) -> Any:
    kind, name = artifact.kind, artifact.path
    if wanted is not None and wanted.split(":")[0] != kind:
        raise UserError(
            f"{name} was compiled for {kind}, not for {wanted}; compile it with --target {wanted.split(':')[0]}"
        )
    if kind == "cpu":
        _check_cpu(artifact)
    return tvm_device(kind, wanted, name)


def tvm_device(kind: str, wanted: str | None, name: object) -> Any:
    """TVM's device: `wanted` ("cuda:1"), or the first of its kind. UserError, which calls what is for it `name`, where
    there is none."""
    import tvm

    if kind == "cpu":
        return tvm.cpu(0)
    if kind == "cuda":
        from gpt2_tvm.toolchains import cuda_runtime

        cuda_runtime.load()
    try:
        device = tvm.device(wanted or kind)
        present = bool(device.exist)
    except Exception:
        present = False
    if not present:
        raise UserError(
            f"{name} is for {kind}, and this machine has no {kind} device that TVM's runtime can use; "
            "run it where there is one"
        )
    return device


def _check_cpu(artifact: Artifact) -> None:
    """Refuse code that this processor cannot execute: it would die of an illegal instruction."""
    from targets.detect import missing_features

    lacking = missing_features(artifact.manifest["target"].get("requires", ()))
    if lacking:
        raise UserError(
            f"{artifact.path} needs a CPU with {', '.join(lacking)}, which this one lacks; "
            "compile it here with --target cpu"
        )


def set_up_pool(wanted: int | None) -> int:
    """Set up this thread's pool -> how many threads it runs."""
    threads = check_threads(wanted)
    prepare_pools()
    found = use_threads(threads)
    if wanted is not None and found < threads:
        raise UserError(
            f"--threads {threads}: TVM already runs {found} in this process; "
            f"load the engine with the most threads first, or set TVM_NUM_THREADS={threads}"
        )
    return found


def processor_name() -> str:
    """The processor's name as the system gives it, for tables and records."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def device_name(device: Any, kind: str) -> str:
    """A device's name for tables and records."""
    if kind == "cpu":
        return processor_name()
    return str(getattr(device, "device_name", kind))
