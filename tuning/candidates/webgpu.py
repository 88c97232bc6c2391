"""Points on a WebGPU device through PyPI's wgpu: WGSL made by TVM, times from the device's own timestamps."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

from gpt2_tvm.schedules.gemv_config import GemvConfig
from tuning.candidates.loading import Workloads
from tuning.candidates.numerics import compare, dtype_of
from tuning.candidates.sampling import Budget, collect
from tuning.candidates.scheduling import Task, schedule

# Copies of a weight that are read in turn, so that none is found in a cache: bytes in all, and how many at most.
COLD_BYTES = 96 << 20
MAX_COPIES = 32
FLOOR_SHADER = """
@group(0) @binding(0) var<storage, read_write> data : array<f32>;
struct PODArgs { packGridDimX: u32 }
@group(0) @binding(1) var<uniform> podArgs : PODArgs;
@compute @workgroup_size(1, 1, 1)
fn floor_kernel() { if (podArgs.packGridDimX == 0u) { data[0] = 0.0; } }
"""


class WebgpuCandidates:
    """See the package's docstring. `facts`: device, method, launch_floor_us."""

    def __init__(
        self, announce: Callable[..., None], target: str, tasks: Mapping[str, Task], budget: Budget | None = None
    ) -> None:
        from gpt2_tvm.runners.wgpu_device import Device
        from gpt2_tvm.tvm_alone import import_tvm
        from targets import load_target, specialise

        import_tvm()
        announce("start the device")
        self.announce, self.tasks, self.budget = announce, tasks, budget or Budget()
        self.device = Device()
        self.tvm_target = specialise(load_target(target)).tvm_target()
        self.workloads = Workloads(tasks, self.device.upload, announce, COLD_BYTES, MAX_COPIES)
        self.built: dict[tuple[str, GemvConfig], tuple[list[Any], list[Any]]] = {}
        self.facts = {
            "device": self.device.name,
            "software": self.device.is_software,
            "method": "timestamps" if self.device.has_timestamps else "wall clock",
            "launch_floor_us": self._floor(),
        }

    def build(self, name: str, config: GemvConfig) -> dict[str, Any]:
        """Make the pipelines of a point; returns how long it took."""
        import tvm

        from gpt2_tvm.host_code import split_launches
        from gpt2_tvm.runners.wgsl import parse_wgsl

        begin = time.perf_counter()
        self.announce("schedule")
        func = schedule(self.workloads[name].func, config, self.tvm_target)
        self.announce("build WGSL")
        launches, devices = split_launches({tvm.ir.GlobalVar("kernel"): func}, self.tvm_target, choices=False)
        build = tvm.get_global_func("target.build.webgpu")
        shaders: dict[str, Any] = {}
        for device_target, kernels in devices.items():
            shaders |= parse_wgsl(build(kernels, device_target).inspect_source())
        self.announce("shader")
        pipelines = [self.device.compile(shaders[launch.kernel]) for launch in launches["kernel"]]
        self.built[name, config] = (pipelines, launches["kernel"])
        return {"build_s": time.perf_counter() - begin}

    def run(self, name: str, config: GemvConfig, best_us: float | None = None) -> dict[str, Any]:
        """Check a built point's numbers, then time it. Returns time_us, time_us_sd, samples, error."""
        pipelines, launches = self.built.pop((name, config))
        loaded = self.workloads[name]
        scratch: dict[int, Any] = {}
        calls = []
        for arguments in loaded.calls():
            call = []
            for pipeline, launch in zip(pipelines, launches, strict=True):
                bound = []
                for buffer in launch.buffers:
                    if isinstance(buffer, int):
                        bound.append(arguments[buffer])
                        continue
                    if buffer.index not in scratch:
                        elements = int(buffer.elements(_static))
                        scratch[buffer.index] = self.device.empty(elements * dtype_of(buffer.dtype).itemsize)
                    bound.append(scratch[buffer.index])
                scalars = [int(s(_static)) for s in launch.scalars]
                grid = [int(axis(_static)) for axis in launch.grid]
                call.append(self.device.launch(pipeline, bound, scalars, grid))
            calls.append(call)
        self.announce("check")
        unwritten = loaded.unwritten()
        self.device.write(loaded.output, unwritten)
        self.device.submit(calls[0])
        error = compare(self.device.read(loaded.output, unwritten.shape, unwritten.dtype), loaded.example)
        self.announce("time")
        take = self._timestamps(calls) if self.device.has_timestamps else self._wall(calls)
        return {**collect(take, self.budget, best_us), "error": error}

    def _timestamps(self, calls: list[list[Any]]) -> Callable[[], list[float]]:
        kernels = len(calls[0])

        def take() -> list[float]:
            times = self.device.time_us([launch for call in calls for launch in call])
            return [sum(times[i : i + kernels]) for i in range(0, len(times), kernels)]

        return take

    def _wall(self, calls: list[list[Any]]) -> Callable[[], list[float]]:
        """Where the device has no timestamps: one submission of all copies, over their number."""

        def take() -> list[float]:
            begin = time.perf_counter()
            self.device.submit([launch for call in calls for launch in call])
            self.device.wait()
            return [(time.perf_counter() - begin) * 1e6 / len(calls)]

        return take

    def _floor(self) -> float | None:
        """Microseconds of a kernel that does nothing: the median of many."""
        from gpt2_tvm.runners.wgsl import parse_wgsl

        if not self.device.has_timestamps:
            return None
        (shader,) = parse_wgsl(FLOOR_SHADER).values()
        launch = self.device.launch(self.device.compile(shader), [self.device.empty(16)], [], [1, 1, 1])
        return statistics.median(self.device.time_us([launch] * 64))


def _static(extent: Any) -> int:
    raise ValueError(f"a product with a symbolic size: {extent}")
