"""Running an artifact on TVM's virtual machine, with the runtime alone (no compiler needed)."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gpt2_tvm.artifact import Artifact
from gpt2_tvm.errors import UserError
from gpt2_tvm.runners.base import Handle
from gpt2_tvm.tensor_cache import load_tensors


class VmRunner:
    """See `runners.base.Runner`."""

    def __init__(self, artifact: Artifact, device: str | None = None) -> None:
        import tvm
        from tvm.runtime.vm import VirtualMachine

        self.device = _device(artifact, device)
        try:
            library = tvm.runtime.load_module(str(artifact.library))
            self._vm = VirtualMachine(library, self.device)
        except Exception as error:
            first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise UserError(
                f"{artifact.library} does not load here ({first}); compile it again for this machine"
            ) from error
        self.device_name = _device_name(self.device, artifact.kind)
        tensors = load_tensors(artifact.params, None if artifact.kind == "cpu" else self.device)
        missing = [name for name in artifact.manifest["params"] if name not in tensors]
        if missing:
            raise UserError(f"{artifact.params} lacks parameter {missing[0]}; compile the artifact again")
        # one tuple, converted once: the VM takes its elements without copies
        self._params = tvm.runtime.convert([tensors[name] for name in artifact.manifest["params"]])
        self._functions: dict[str, Any] = {}
        self._tvm = tvm

    def empty(self, shape: Sequence[int], dtype: str) -> Handle:
        return self._tvm.runtime.tensor(np.zeros(tuple(shape), dtype), self.device)

    def upload(self, tensor: Handle, array: np.ndarray) -> None:
        tensor.copyfrom(np.ascontiguousarray(array))

    def download(self, tensor: Handle) -> np.ndarray:
        return tensor.numpy()

    def call(self, function: str, inputs: Sequence[Handle | Sequence[Handle]], with_params: bool = True) -> Any:
        if function not in self._functions:
            self._functions[function] = self._vm[function]
        arguments = [self._tuple(x) if isinstance(x, list) else x for x in inputs]
        return self._functions[function](*arguments, *([self._params] if with_params else []))

    def _tuple(self, tensors: list[Handle]) -> Any:
        return self._tvm.runtime.convert(tensors)

    def sync(self) -> None:
        self.device.sync()


def _device(artifact: Artifact, wanted: str | None) -> Any:
    import tvm

    kind, name = artifact.kind, artifact.path
    if wanted is not None and wanted.split(":")[0] != kind:
        raise UserError(
            f"{name} was compiled for {kind}, not for {wanted}; compile it with --target {wanted.split(':')[0]}"
        )
    if kind == "cpu":
        _check_cpu(artifact)
        # TVM takes half the logical processors on x86, which halves a machine without hyper-threads. Read once, when
        # the pool starts; a number that the user has set stands.
        os.environ.setdefault("TVM_NUM_THREADS", str(physical_cores()))
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


def physical_cores() -> int:
    """Physical cores that this process may use: a second hyper-thread adds nothing to loops that keep its core's units
    busy."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        import psutil
    except ImportError:  # a packed bundle brings numpy alone
        return allowed
    return max(1, min(allowed, psutil.cpu_count(logical=False) or allowed))


def processor_name() -> str:
    """The processor's name as the system gives it, for tables and records."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _device_name(device: Any, kind: str) -> str:
    if kind == "cpu":
        return processor_name()
    return str(getattr(device, "device_name", kind))
