"""WGSL kernels made by TVM, on a GPU (or a software one) through PyPI ``wgpu``, with no browser.

The lowest layer of the project's one executor for WGSL: a device, its buffers, pipelines made once for each
source, and command buffers of many launches. What TVM's WebGPU code expects of its caller is kept here and
nowhere else (its reference is ``web/src/webgpu.ts`` in TVM's sources):

- bindings are the buffers in the kernel's argument order, then one uniform block of the scalar arguments and
  ``packGridDimX``, the grid's true extent along x;
- a grid wider than 65535 along x is folded: extra blocks go to z, and the kernel unfolds them (`wgsl.fold_grid`);
- TVM 0.27's guard against the blocks that folding adds reads ``>`` where ``>=`` is meant, so that one block
  too many would run; the guard is mended in the source before it is compiled.
"""

from __future__ import annotations

import math
import os
import re
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gpt2_tvm.errors import UserError
from gpt2_tvm.runners.wgsl import Shader, fold_grid

FEATURES = ("shader-f16", "timestamp-query")
LIMITS = (
    "max-buffer-size",
    "max-storage-buffer-binding-size",
    "max-storage-buffers-per-shader-stage",
    "max-compute-workgroup-storage-size",
    "max-compute-invocations-per-workgroup",
    "max-compute-workgroup-size-x",
    "max-compute-workgroup-size-y",
    "max-compute-workgroup-size-z",
)
GUARD = re.compile(r">(\s*podArgs\.packGridDimX\))")  # TVM's test for blocks that folding added
SCALARS: dict[str, Any] = {"i32": np.int32, "u32": np.uint32, "f32": np.float32}


@dataclass(frozen=True)
class Kernel:
    """A compiled kernel: the pipeline of one `Shader` on one device."""

    shader: Shader
    pipeline: Any
    layout: Any


@dataclass(frozen=True)
class Part:
    """Bytes [offset, offset + size) of a buffer, to be bound in place of all of it."""

    buffer: Any
    offset: int
    size: int


@dataclass(frozen=True)
class Launch:
    """A kernel with its buffers, scalars and grid: record it in any number of submissions."""

    kernel: Kernel
    bind_group: Any
    blocks: tuple[int, int, int]


class Device:
    """A WebGPU device.

    adapter: a ``wgpu.GPUAdapter``; by default the one that the system calls fastest. All the limits that the
    adapter has, and those of `FEATURES` that it has, are requested. Raises UserError where wgpu is not
    installed or no adapter is found.
    """

    def __init__(self, adapter: Any = None) -> None:
        # Mesa's software device complains on stderr where the session has no runtime directory.
        os.environ.setdefault("XDG_RUNTIME_DIR", tempfile.gettempdir())
        try:
            import wgpu
        except (ImportError, OSError) as error:
            raise UserError(
                f"WebGPU kernels run through wgpu, which cannot be loaded ({error}): pip install 'gpt2-tvm[webgpu]'"
            ) from error
        self._wgpu = wgpu
        if adapter is None:
            try:
                adapter = wgpu.gpu.request_adapter_sync(power_preference="high-performance")
            except RuntimeError as error:
                raise UserError(
                    f"no WebGPU adapter here ({error}); install the GPU's Vulkan driver, or a software one: "
                    "apt install mesa-vulkan-drivers"
                ) from error
        self.adapter = adapter
        self.name = f"{adapter.info['device']} via {adapter.info['backend_type']}"
        self.is_software = adapter.info["adapter_type"] == "CPU"
        self.features = frozenset(feature for feature in FEATURES if feature in adapter.features)
        self.device = adapter.request_device_sync(
            required_features=sorted(self.features),
            required_limits={name: adapter.limits[name] for name in LIMITS if name in adapter.limits},
        )
        self._kernels: dict[Shader, Kernel] = {}
        self._staging: dict[int, list[Any]] = {}  # host-side buffers that `read_later` may use again, by size
        self._fence = self.empty(4, "fence")
        self._period_ns = _timestamp_period(self.device)

    @property
    def has_f16(self) -> bool:
        return "shader-f16" in self.features

    @property
    def has_timestamps(self) -> bool:
        return "timestamp-query" in self.features

    def meets(self, requirement: str) -> bool:
        """Whether the adapter is what a variant of kernels requires (`schedules.webgpu_variants`): "software",
        "swiftshader", or a feature of WebGPU that this device was opened with."""
        if requirement == "swiftshader":
            return "swiftshader" in self.name.lower()
        return self.is_software if requirement == "software" else requirement in self.features

    @property
    def max_binding_bytes(self) -> int:
        """The largest buffer that a kernel can be given."""
        limits = self.device.limits
        return min(int(limits["max-storage-buffer-binding-size"]), int(limits["max-buffer-size"]))

    # -- buffers -----------------------------------------------------------------------------------------------

    def empty(self, nbytes: int, label: str = "", whole: bool = True) -> Any:
        """A buffer of `nbytes` zero bytes (rounded up to 4). whole: kernels are given all of it at once.

        Raises UserError where the device cannot hold it, or cannot bind it.
        """
        size = max(4, -(-nbytes // 4) * 4)
        most = self.max_binding_bytes if whole else int(self.device.limits["max-buffer-size"])
        if size > most:
            raise UserError(
                f"{label or 'a tensor'} has {size:,} bytes, and {self.name} {'binds' if whole else 'holds'} at most "
                f"{most:,}; compile in float16, with a smaller quantization, batch or context, or for another device"
            )
        usage = self._wgpu.BufferUsage
        try:
            return self.device.create_buffer(
                label=label, size=size, usage=usage.STORAGE | usage.COPY_SRC | usage.COPY_DST
            )
        except self._wgpu.GPUOutOfMemoryError as error:
            raise UserError(f"{self.name} has no memory left for {size:,} bytes ({label or 'a tensor'})") from error

    def upload(self, array: np.ndarray, label: str = "", whole: bool = True) -> Any:
        """A new buffer that holds `array` (C order); see `empty`."""
        buffer = self.empty(array.nbytes, label, whole)
        self.write(buffer, array)
        return buffer

    def write(self, buffer: Any, array: np.ndarray, offset: int = 0) -> None:
        """Copy `array` (C order) into `buffer` from byte `offset`, a multiple of 4."""
        data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        if data.size == 0:
            return
        if data.size % 4:  # WebGPU writes whole words
            data = np.concatenate([data, np.zeros(-data.size % 4, np.uint8)])
        self.device.queue.write_buffer(buffer, offset, data)

    def read(self, buffer: Any, shape: Sequence[int], dtype: Any) -> np.ndarray:
        """A copy of what `buffer` begins with, after all work submitted so far."""
        dtype = np.dtype(dtype)
        nbytes = math.prod(shape) * dtype.itemsize
        if nbytes == 0:
            return np.empty(tuple(shape), dtype)
        data = self.device.queue.read_buffer(buffer, 0, -(-nbytes // 4) * 4)
        return np.frombuffer(data, np.uint8)[:nbytes].copy().view(dtype).reshape(tuple(shape))

    def read_later(self, buffer: Any, shape: Sequence[int], dtype: Any) -> Callable[[], np.ndarray]:
        """A copy of what `buffer` begins with, made on the device after all work submitted so far; the function that
        comes back waits for it. At least one element."""
        dtype = np.dtype(dtype)
        nbytes = math.prod(shape) * dtype.itemsize
        size = -(-nbytes // 4) * 4
        free = self._staging.setdefault(size, [])
        usage = self._wgpu.BufferUsage
        held = free.pop() if free else self.device.create_buffer(size=size, usage=usage.MAP_READ | usage.COPY_DST)
        encoder = self.device.create_command_encoder()
        encoder.copy_buffer_to_buffer(buffer, 0, held, 0, size)
        self.device.queue.submit([encoder.finish()])

        def wait() -> np.ndarray:
            held.map_sync(self._wgpu.MapMode.READ)
            data = bytes(held.read_mapped())
            held.unmap()
            free.append(held)
            return np.frombuffer(data, np.uint8)[:nbytes].view(dtype).reshape(tuple(shape))

        return wait

    # -- kernels -----------------------------------------------------------------------------------------------

    def compile(self, shader: Shader) -> Kernel:
        """The pipeline for `shader`, made once and kept.

        Raises UserError where the kernel needs float16, more threads or more shared memory than the device has,
        and RuntimeError with the compiler's message where it refuses the source.
        """
        if shader not in self._kernels:
            self._kernels[shader] = self._compile(shader)
        return self._kernels[shader]

    def _compile(self, shader: Shader) -> Kernel:
        self._check(shader)
        wgpu = self._wgpu
        visible = wgpu.ShaderStage.COMPUTE
        entries: list[dict[str, Any]] = [
            {
                "binding": index,
                "visibility": visible,
                "buffer": {"type": "storage" if writable else "read-only-storage"},
            }
            for index, (_, writable, _) in enumerate(shader.bindings)
        ]
        entries.append({"binding": len(entries), "visibility": visible, "buffer": {"type": "uniform"}})
        source = GUARD.sub(r">=\1", shader.source)
        try:
            layout = self.device.create_bind_group_layout(entries=entries)
            module = self.device.create_shader_module(label=shader.name, code=source)
            pipeline = self.device.create_compute_pipeline(
                label=shader.name,
                layout=self.device.create_pipeline_layout(bind_group_layouts=[layout]),
                compute={"module": module, "entry_point": shader.name},
            )
        except wgpu.GPUError as error:
            raise RuntimeError(f"{self.name} refuses kernel {shader.name}: {error}") from error
        return Kernel(shader, pipeline, layout)

    def _check(self, shader: Shader) -> None:
        if shader.needs_f16 and not self.has_f16:
            raise UserError(
                f"{self.name} has no float16 (shader-f16), which kernel {shader.name} needs; compile the model in "
                "float32 (--quantization q0f32)"
            )
        if re.search(r"^\s*enable subgroups;", shader.source, re.M):
            raise UserError(
                f"kernel {shader.name} uses subgroups, which wgpu cannot run; compile for webgpu without them"
            )
        limits = self.device.limits
        threads, most = math.prod(shader.block), int(limits["max-compute-invocations-per-workgroup"])
        if threads > most:
            raise UserError(f"kernel {shader.name} has blocks of {threads} threads; {self.name} allows {most}")
        buffers, most = len(shader.bindings), int(limits["max-storage-buffers-per-shader-stage"])
        if buffers > most:
            raise UserError(f"kernel {shader.name} takes {buffers} buffers; {self.name} allows {most}")

    def launch(
        self, kernel: Kernel, buffers: Sequence[Any], scalars: Sequence[int | float], grid: Sequence[int]
    ) -> Launch:
        """Bind `kernel` to buffers (or a `Part` of one) and scalars, both in the order of its `Shader`, over `grid`
        blocks."""
        shader = kernel.shader
        if len(buffers) != len(shader.bindings) or len(scalars) != len(shader.scalars):
            raise ValueError(
                f"{shader.name} takes {len(shader.bindings)} buffers and {len(shader.scalars)} scalars, "
                f"not {len(buffers)} and {len(scalars)}"
            )
        block = b"".join(
            SCALARS[kind](value).tobytes() for value, (_, kind) in zip(scalars, shader.scalars, strict=True)
        )
        block += np.uint32(grid[0]).tobytes()
        block += b"\0" * (-len(block) % 16)
        uniform = self.device.create_buffer_with_data(data=block, usage=self._wgpu.BufferUsage.UNIFORM)
        parts = [b if isinstance(b, Part) else Part(b, 0, b.size) for b in (*buffers, uniform)]
        entries = [
            {"binding": index, "resource": {"buffer": part.buffer, "offset": part.offset, "size": part.size}}
            for index, part in enumerate(parts)
        ]
        bind_group = self.device.create_bind_group(layout=kernel.layout, entries=entries)
        return Launch(kernel, bind_group, fold_grid(grid))

    # -- running -----------------------------------------------------------------------------------------------

    def submit(self, launches: Sequence[Launch]) -> None:
        """Run `launches` in order, in one command buffer. Does not wait."""
        encoder = self.device.create_command_encoder()
        run = encoder.begin_compute_pass()
        self._record(run, launches)
        run.end()
        self.device.queue.submit([encoder.finish()])

    def wait(self) -> None:
        """Return when all work submitted so far is done."""
        # The queue runs in order, so that a read waits for all before it (wgpu 0.32's own wait raises TypeError).
        self.device.queue.read_buffer(self._fence)

    def time_us(self, launches: Sequence[Launch], repeats: int = 1) -> list[float]:
        """Microseconds on the device for each launch, the mean of `repeats` runs back to back.

        From timestamps around a pass for each launch. Raises UserError where the device has none.
        """
        if not self.has_timestamps:
            raise UserError(f"{self.name} has no timestamps (timestamp-query); time whole submissions instead")
        if not launches:
            return []
        usage = self._wgpu.BufferUsage
        times: list[float] = []
        for start in range(0, len(launches), 2048):  # a query set holds at most 4096 timestamps
            part = launches[start : start + 2048]
            count = 2 * len(part)
            queries = self.device.create_query_set(type="timestamp", count=count)
            stamps = self.device.create_buffer(
                size=8 * count, usage=usage.QUERY_RESOLVE | usage.COPY_SRC | usage.COPY_DST
            )
            encoder = self.device.create_command_encoder()
            for index, launch in enumerate(part):
                run = encoder.begin_compute_pass(
                    timestamp_writes={
                        "query_set": queries,
                        "beginning_of_pass_write_index": 2 * index,
                        "end_of_pass_write_index": 2 * index + 1,
                    }
                )
                self._record(run, [launch] * repeats)
                run.end()
            encoder.resolve_query_set(queries, 0, count, stamps, 0)
            self.device.queue.submit([encoder.finish()])
            ticks = np.frombuffer(self.device.queue.read_buffer(stamps), np.uint64).astype(np.int64)
            times += ((ticks[1::2] - ticks[::2]) * self._period_ns / 1e3 / repeats).tolist()
        return times

    @staticmethod
    def _record(run: Any, launches: Sequence[Launch]) -> None:
        pipeline = bound = None
        for launch in launches:
            if math.prod(launch.blocks) == 0:
                continue
            if launch.kernel.pipeline is not pipeline:
                pipeline = launch.kernel.pipeline
                run.set_pipeline(pipeline)
                bound = None
            if launch.bind_group is not bound:
                bound = launch.bind_group
                run.set_bind_group(0, bound)
            run.dispatch_workgroups(*launch.blocks)


def _timestamp_period(device: Any) -> float:
    """Nanoseconds a tick: WebGPU says 1, wgpu-native hands out the driver's raw ticks."""
    try:
        from wgpu.backends.wgpu_native import lib

        return float(lib.wgpuQueueGetTimestampPeriod(device.queue._internal))
    except (ImportError, AttributeError):
        return 1.0
