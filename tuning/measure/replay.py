"""Timing the functions of one model call on TVM's virtual machine.

The machine's instrument records the calls of one model call, with the very tensors that they are given; then each is
made again, in the same order. (Timing inside the instrument would count what Python needs to unpack its arguments.)
A model call that is made again computes the same: positions are inputs, and caches are written where they were.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from gpt2_tvm.errors import UserError
from tuning.measure.calls import Call
from tuning.measure.functions import Timed


@dataclass(frozen=True)
class Step:
    """One call of a compiled function."""

    function: str
    run: Callable[..., Any]
    arguments: tuple[Any, ...]


class ReplayTimer:
    """See `functions.Timer`; on a CPU by the clock, on CUDA by events between the kernels.

    engine: on a VmRunner. call: of the model. names: of the functions to time; the virtual machine's own (allocation,
    shapes) are not.
    """

    def __init__(self, engine: Any, call: Call, names: set[str]) -> None:
        import tvm_ffi

        self._runner, self._call = engine.runner, call
        self.steps = _recorded(engine, call, names)
        if not self.steps:
            raise UserError(f"{call.function} of {engine.artifact.path} calls no function that could be timed")
        self._nothing = tvm_ffi.get_global_func("testing.nop")
        self._clock: _Clock | _CudaEvents = _Clock(self._runner)
        if engine.artifact.kind == "cuda" and (events := _CudaEvents.here(self._runner, self._whole)) is not None:
            self._clock = events
        self.method = self._clock.method
        empty = [Step(step.function, self._nothing, step.arguments) for step in self.steps]
        self._floor = [
            statistics.median(times) for times in zip(*(self._clock.time(empty) for _ in range(9)), strict=True)
        ]
        self.overhead_us = statistics.mean(self._floor)

    def round(self, whole: bool = True) -> Timed:
        """See `functions.Timer`."""
        self._runner.sync()
        start = time.perf_counter()
        if whole:
            self._whole()
            self._runner.sync()
        taken = time.perf_counter() - start
        times = self._clock.time(self.steps)
        parts = [
            (step.function, max(0.0, time_us - floor))
            for step, time_us, floor in zip(self.steps, times, self._floor, strict=True)
        ]
        return Timed(parts, taken * 1e6 if whole else sum(time_us for _, time_us in parts))

    def _whole(self) -> None:
        self._runner.call(self._call.function, self._call.inputs)


def _recorded(engine: Any, call: Call, names: set[str]) -> list[Step]:
    """The calls of compiled functions that one model call makes, in order."""
    import tvm
    from tvm.runtime.vm import VirtualMachine

    runner = engine.runner
    # a machine of its own: TVM has no way to take an instrument off again
    machine = VirtualMachine(tvm.runtime.load_module(str(engine.artifact.library)), runner.device)
    steps: list[Step] = []

    def see(function: Any, name: str, before: bool, _: Any, *arguments: Any) -> int:
        if before and name in names:
            steps.append(Step(name, function, arguments))
        return 0  # go on

    machine.set_instrument(see)
    arguments = [tvm.runtime.convert(x) if isinstance(x, list) else x for x in call.inputs]
    machine[call.function](*arguments, runner.params)
    runner.sync()
    return steps


class _Clock:
    """Microseconds of each step by the clock, waiting for the device after each."""

    def __init__(self, runner: Any) -> None:
        self._wait = runner.sync if runner.threads is None else None
        self.method = (
            "each function's call by the clock"
            if self._wait is None
            else "each function's call by the clock, waiting for the device after it"
        )

    def time(self, steps: list[Step]) -> list[float]:
        """Run `steps` in order."""
        clock, wait, times = time.perf_counter_ns, self._wait, []
        for step in steps:
            run, arguments = step.run, step.arguments
            start = clock()
            run(*arguments)
            if wait is not None:
                wait()
            times.append((clock() - start) / 1e3)
        return times


class _CudaEvents:
    """Microseconds of each step by CUDA events around it, the host waiting once at the end.

    The host takes longer to launch a small kernel than the kernel runs. So that events do not count its launching, the
    device is given model calls to work on first, until there is more of that work than the host needs for the steps.
    """

    method = "CUDA events around each function"

    def __init__(self, cudart: Any, runner: Any, whole: Callable[[], Any]) -> None:
        self._cudart, self._runner, self._whole = cudart, runner, whole
        self._events: list[Any] = []
        self._host_s, self._whole_s = 0.0, 1e-3

    @classmethod
    def here(cls, runner: Any, whole: Callable[[], Any]) -> _CudaEvents | None:
        """None where CUDA's Python bindings are not installed (pip install 'gpt2-tvm[cuda]')."""
        try:
            from cuda.bindings import runtime
        except ImportError:
            return None
        return cls(runtime, runner, whole)

    def time(self, steps: list[Step]) -> list[float]:
        """Run `steps` in order."""
        while len(self._events) <= len(steps):
            self._events.append(self._checked(self._cudart.cudaEventCreate())[0])
        self._fill(steps)
        begin = time.perf_counter()
        for step, event in zip(steps, self._events, strict=False):
            self._checked(self._cudart.cudaEventRecord(event, 0))
            step.run(*step.arguments)
        self._checked(self._cudart.cudaEventRecord(self._events[len(steps)], 0))
        self._host_s = time.perf_counter() - begin
        self._runner.sync()
        between = zip(self._events[: len(steps)], self._events[1 : len(steps) + 1], strict=True)
        return [1e3 * float(self._checked(self._cudart.cudaEventElapsedTime(a, b))[0]) for a, b in between]

    def _fill(self, steps: list[Step]) -> None:
        """Queue work for at least twice the time that the host needed for the steps before."""
        start = time.perf_counter()
        self._whole()
        self._runner.sync()
        self._whole_s = time.perf_counter() - start
        for _ in range(min(64, 1 + int(2 * self._host_s / self._whole_s))):
            self._whole()

    @staticmethod
    def _checked(answer: tuple[Any, ...]) -> tuple[Any, ...]:
        """A binding's answer without its status, which must be 0."""
        if int(answer[0]) != 0:
            raise RuntimeError(f"CUDA answers {answer[0]}")
        return tuple(answer[1:])
