"""Timing the kernels of one model call on WebGPU."""

from __future__ import annotations

import statistics
import time
from typing import TYPE_CHECKING, Any

from tuning.measure.calls import Call
from tuning.measure.functions import Timed
from tuning.static.resources import function_of

if TYPE_CHECKING:
    from gpt2_tvm.runners.web import WebRunner
    from gpt2_tvm.runners.wgpu import WgpuRunner


class ShaderTimer:
    """See `functions.Timer`: the device's timestamps where it has them, else a submission a kernel by the clock, less
    what an empty one takes."""

    def __init__(self, runner: WgpuRunner, call: Call) -> None:
        self._runner, self._call = runner, call
        self._device = runner.device
        names, self._launches = runner.launches(call.function, call.inputs)
        self._functions = [function_of(name) for name in names]
        self.overhead_us = 0.0
        if self._device.has_timestamps:
            self.method = "the device's timestamps around each kernel"
        else:
            self.method = "a submission a kernel by the clock, less an empty one's"
            self.overhead_us = statistics.median(self._submitted([]) for _ in range(15))

    def round(self, whole: bool = True) -> Timed:
        """See `functions.Timer`. A function of several kernels has a part for each; they are added up."""
        self._runner.sync()
        start = time.perf_counter()
        if whole:
            self._runner.call(self._call.function, self._call.inputs)
            self._runner.sync()
        taken = time.perf_counter() - start
        if self._device.has_timestamps:
            times = self._device.time_us(self._launches)
        else:
            times = [max(0.0, self._submitted([launch]) - self.overhead_us) for launch in self._launches]
        return Timed(_merged(self._functions, times), taken * 1e6 if whole else sum(times))

    def _submitted(self, launches: list[Any]) -> float:
        start = time.perf_counter()
        self._device.submit(launches)
        self._device.wait()
        return (time.perf_counter() - start) * 1e6


class PageTimer:
    """See `functions.Timer`: a page's or node's kernels, by the device's timestamps."""

    method = "the device's timestamps around each kernel"
    overhead_us = 0.0

    def __init__(self, runner: WebRunner, call: Call) -> None:
        self._runner, self._call = runner, call

    def round(self, whole: bool = True) -> Timed:
        """See `functions.Timer`; the whole by the page's clock, always."""
        kernels, whole_us = self._runner.kernels(self._call.function, self._call.inputs)
        return Timed(_merged([function_of(name) for name, _ in kernels], [us for _, us in kernels]), whole_us)


def _merged(functions: list[str], times: list[float]) -> list[tuple[str, float]]:
    """Neighbouring kernels of one function as one part. Two calls of a function in a row, which no model makes, would
    count as one."""
    parts: list[tuple[str, float]] = []
    for function, time_us in zip(functions, times, strict=True):
        if parts and parts[-1][0] == function:
            parts[-1] = function, parts[-1][1] + time_us
        else:
            parts.append((function, time_us))
    return parts
