"""Running a webgpu artifact without a browser and without TVM's virtual machine: its kernel list, replayed on
PyPI's ``wgpu``.

A function's launches are bound to buffers once, and kept for as long as it is called with the same tensors. So a
decode step, whose inputs are the same tensors every time, costs the host one command buffer with one compute pass:
no allocation, no new bind groups, no uniform written. Memory between kernels is shared as TVM planned it
(`kernel_list`); what a function returns is overwritten by its next call of the same kind.
"""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gpt2_tvm.artifact import Artifact
from gpt2_tvm.errors import UserError
from gpt2_tvm.expressions import evaluate

if TYPE_CHECKING:
    from gpt2_tvm.runners.wgpu_device import Device, Launch

Key = tuple[Any, ...]  # identities of a call's inputs, those of a tuple in a tuple

KERNEL_LIST, KERNELS, FORMAT = "kernels.json", "kernels.wgsl", 1


@dataclass(frozen=True, eq=False)
class WgpuTensor:
    """A tensor on the device: a buffer that begins with it."""

    buffer: Any
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Bound:
    """A function bound to its inputs: what to submit, and the tensors to return. Holds the inputs, whose identity
    is its key.
    """

    launches: list[Launch]
    outputs: Any
    inputs: list[Any]


class WgpuRunner:
    """See `runners.base.Runner`.

    device: None or "webgpu" for the adapter that the system calls fastest, "webgpu:<k>" for the k-th of all.
    Raises UserError where wgpu or an adapter is missing, where the artifact's kernel list is damaged, or where the
    device cannot hold a tensor in one binding (the message names it and says what helps).
    """

    def __init__(self, artifact: Artifact, device: str | None = None) -> None:
        from gpt2_tvm.runners.wgsl import parse_wgsl

        listed = _read_list(artifact.path / KERNEL_LIST)
        self._functions = listed["functions"]
        self._windowed = _windowed(self._functions)
        source = artifact.path / KERNELS
        if not source.is_file():
            raise UserError(f"{artifact.path} has no {KERNELS}; compile it again with --target webgpu")
        self._shaders = parse_wgsl(source.read_text(encoding="utf-8"))
        self._device = open_device(device)
        self.device_name = self._device.name
        self._choose_variants(artifact.path, listed.get("variants", []))
        self.threads: int | None = None
        self._params = self._upload_params(artifact)
        self._bound: dict[str, tuple[Key, Bound]] = {}
        self._scratch: list[Any] = []  # memory between kernels, shared by all functions: they run one after another

    def _choose_variants(self, folder: Path, variants: Sequence[Mapping[str, Any]]) -> None:
        """Take the versions of kernels that are for an adapter like this one."""
        from gpt2_tvm.runners.wgsl import parse_wgsl

        for variant in variants:
            if not all(self._device.meets(name) for name in variant["requires"]):
                continue
            file = folder / str(variant["file"])
            if not file.is_file():
                raise UserError(f"{folder} lacks {file.name}, which its {KERNEL_LIST} names; compile it again")
            self._shaders |= parse_wgsl(file.read_text(encoding="utf-8"))

    def _upload_params(self, artifact: Artifact) -> list[WgpuTensor]:
        from gpt2_tvm.tensor_cache import load_arrays

        tensors = load_arrays(artifact.params)  # mapped files: no copy on the host
        names = artifact.manifest["params"]
        missing = [name for name in names if name not in tensors]
        if missing:
            raise UserError(f"{artifact.params} lacks parameter {missing[0]}; compile the artifact again")
        held = []
        for index, name in enumerate(names):
            array = tensors[name]
            buffer = self._device.upload(array, name, whole=index not in self._windowed)
            held.append(WgpuTensor(buffer, array.shape, str(array.dtype)))
        return held

    # runners.base.Runner ---------------------------------------------------------------------------------------------

    def empty(self, shape: Sequence[int], dtype: str) -> WgpuTensor:
        shape = tuple(int(extent) for extent in shape)
        nbytes = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
        label = f"a {dtype} tensor of shape {list(shape)}"
        return WgpuTensor(self._device.empty(nbytes, label), shape, str(dtype))

    def upload(self, tensor: WgpuTensor, array: np.ndarray) -> None:
        if tuple(array.shape) != tensor.shape or str(array.dtype) != tensor.dtype:
            raise ValueError(f"{array.dtype} {array.shape} does not go into {tensor.dtype} {tensor.shape}")
        self._device.write(tensor.buffer, array)

    def download(self, tensor: WgpuTensor) -> np.ndarray:
        return self._device.read(tensor.buffer, tensor.shape, tensor.dtype)

    def later(self, tensor: WgpuTensor) -> Callable[[], np.ndarray]:
        """`download`, of what the calls so far make of a tensor, to be waited for later: calls queued meanwhile do not
        touch it."""
        return self._device.read_later(tensor.buffer, tensor.shape, tensor.dtype)

    def call(self, function: str, inputs: Sequence[WgpuTensor | Sequence[WgpuTensor]], with_params: bool = True) -> Any:
        bound = self.bound(function, inputs)
        self._device.submit(bound.launches)
        return bound.outputs

    def bound(self, function: str, inputs: Sequence[WgpuTensor | Sequence[WgpuTensor]]) -> Bound:
        """A function's launches with these inputs, and what it will return; kept until it is bound to others."""
        key = tuple(tuple(map(id, x)) if isinstance(x, list) else id(x) for x in inputs)
        known, bound = self._bound.get(function, (None, None))
        if bound is None or known != key:
            self._forget(key)
            bound = self._bind(function, list(inputs))
            self._bound[function] = key, bound
        return bound

    def sync(self) -> None:
        self._device.wait()

    # For the laboratory ----------------------------------------------------------------------------------------------

    def launches(
        self, function: str, inputs: Sequence[WgpuTensor | Sequence[WgpuTensor]]
    ) -> tuple[list[str], list[Launch]]:
        """A function's kernels and its bound launches, in order: to be timed one by one
        (`wgpu_device.Device.time_us`).
        """
        bound = self._bind(function, list(inputs))
        return [launch.kernel.shader.name for launch in bound.launches], bound.launches

    @property
    def device(self) -> Device:
        """The device beneath."""
        return self._device

    def _forget(self, key: Key) -> None:
        """Let go of what is bound to other caches than the ones in use now: they would never be freed otherwise."""
        caches = [part for part in key if isinstance(part, tuple)]
        for function, (other, _) in list(self._bound.items()):
            others = [part for part in other if isinstance(part, tuple)]
            if caches and others and caches != others:
                del self._bound[function]

    # Binding ---------------------------------------------------------------------------------------------------------

    def _bind(self, function: str, inputs: list[Any]) -> Bound:
        from gpt2_tvm.runners.wgpu_device import Part

        if function not in self._functions:
            raise UserError(f"the artifact has no function {function!r}; it has {', '.join(self._functions)}")
        program = self._functions[function]
        sizes = _sizes(function, program["inputs"], inputs)
        storages = self._allocate(program, sizes)
        tensors = [
            WgpuTensor(
                storages[tensor["storage"]],
                tuple(evaluate(extent, sizes) for extent in tensor["shape"]),
                tensor["dtype"],
            )
            for tensor in program["tensors"]
        ]

        def find(ref: list[Any]) -> Any:
            if ref and isinstance(ref[0], list):
                return [find(one) for one in ref]
            if ref and ref[0] == "window":
                return Part(find(ref[1]).buffer, int(ref[2]), int(ref[3]))
            kind, *path = ref
            found: Any = {"input": inputs, "param": self._params, "tensor": tensors}[kind]
            for index in path:
                found = found[index]
            return found

        launches = []
        for launch in program["launches"]:
            kernel = self._device.compile(self._shaders[launch["kernel"]])
            found = [find(ref) for ref in launch["buffers"]]
            buffers = [one if isinstance(one, Part) else one.buffer for one in found]
            scalars = [evaluate(scalar, sizes) for scalar in launch["scalars"]]
            grid = [evaluate(extent, sizes) for extent in launch["grid"]]
            launches.append(self._device.launch(kernel, buffers, scalars, grid))
        return Bound(launches, find(program["outputs"]), inputs)

    def _allocate(self, program: Mapping[str, Any], sizes: Mapping[str, int]) -> list[Any]:
        """Buffers for a program's storages: its own for what it returns, else the ones that all programs share."""
        refs = program["outputs"]
        refs = refs if refs and isinstance(refs[0], list) else [refs]
        returned = {program["tensors"][ref[1]]["storage"] for ref in refs if ref[0] == "tensor"}
        storages, rank = [], 0
        for index, text in enumerate(program["storages"]):
            nbytes = evaluate(text, sizes)
            if index in returned:
                storages.append(self._device.empty(nbytes, "a result"))
                continue
            if rank == len(self._scratch):
                self._scratch.append(None)
            if self._scratch[rank] is None or self._scratch[rank].size < nbytes:
                self._scratch[rank] = self._device.empty(nbytes, "memory between kernels")
            storages.append(self._scratch[rank])
            rank += 1
        return storages


def _sizes(function: str, declared: list[Any], inputs: list[Any]) -> dict[str, int]:
    """Values of the symbolic sizes from the inputs' shapes; ValueError where the inputs do not fit the declaration."""
    sizes: dict[str, int] = {}
    if len(declared) != len(inputs):
        raise ValueError(f"{function} takes {len(declared)} inputs, not {len(inputs)}")
    pairs: list[tuple[Any, Any]] = []
    for want, got in zip(declared, inputs, strict=True):
        pairs += zip(want, got, strict=True) if isinstance(want, list) else [(want, got)]
    for want, got in pairs:
        fits = len(want["shape"]) == len(got.shape) and want["dtype"] == got.dtype
        for extent, size in zip(want["shape"], got.shape, strict=False):
            if isinstance(extent, str) and extent.isidentifier():
                fits = fits and sizes.setdefault(extent, size) == size
            else:
                fits = fits and evaluate(extent, sizes) == size
        if not fits:
            raise ValueError(f"{function} wants {want['dtype']} {want['shape']}, not {got.dtype} {list(got.shape)}")
    return sizes


def _windowed(functions: Mapping[str, Any]) -> set[int]:
    """Parameters, by number, that kernels are given in parts only: they may be larger than one binding."""
    refs = [ref for program in functions.values() for launch in program["launches"] for ref in launch["buffers"]]
    return {ref[1][1] for ref in refs if ref[0] == "window" and ref[1][0] == "param"}


def _read_list(path: Path) -> Mapping[str, Any]:
    try:
        listed = json.loads(path.read_text(encoding="utf-8"))
        if listed["format"] == FORMAT and isinstance(listed["functions"], dict):
            return dict(listed)
        reason = f"format {listed['format']}, not {FORMAT}"
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = str(error) or type(error).__name__
    raise UserError(f"{path} cannot be used ({reason}); compile the artifact again with --target webgpu")


_open: weakref.WeakValueDictionary[str, Device] = weakref.WeakValueDictionary()


def open_device(device: str | None) -> Device:
    """The device that "webgpu" (or None: the system's choice) or "webgpu:<number>" names; UserError for others. The
    same one for as long as someone holds it: a model and its draft can share buffers."""
    name = device or "webgpu"
    found = _open.get(name)
    if found is None:
        found = _open[name] = _new_device(name)
    return found


def _new_device(device: str) -> Device:
    from gpt2_tvm.runners.wgpu_device import Device

    kind, _, number = device.partition(":")
    if kind != "webgpu" or (number and not number.isdigit()):
        raise UserError(f"a webgpu artifact runs on webgpu or webgpu:<number>, not on {device}; compile it for {kind}")
    if not number:
        return Device()
    import wgpu

    adapters = wgpu.gpu.enumerate_adapters_sync()
    if int(number) >= len(adapters):
        raise UserError(f"there is no {device}: wgpu finds {len(adapters)} adapters here")
    return Device(adapters[int(number)])
