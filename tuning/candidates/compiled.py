"""Points through TVM's runtime: compiled here, timed by TVM's evaluator in this process or over an RPC session."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gpt2_tvm.schedules.gemv_config import GemvConfig
from tuning.candidates.loading import Workloads
from tuning.candidates.numerics import compare
from tuning.candidates.sampling import Budget, collect
from tuning.candidates.scheduling import Task, empty_kernel, schedule

# Copies of a weight that are read in turn: more bytes than a GPU's last-level cache (H200: 50 MB, RTX 4090: 72 MB).
COLD_BYTES = 256 << 20
MAX_COPIES = 128


class CompiledCandidates:
    """See the package's docstring. session: of `gpt2_tvm.runners.rpc_session`, or None for a device of this machine.

    A call's time is that of one launch by the evaluator, on the device's own clock, with another copy of the weight
    each time. It has the floor in it that an empty kernel's call has too, `facts["launch_floor_us"]`.
    """

    def __init__(
        self,
        announce: Callable[..., None],
        target: str,
        tasks: Mapping[str, Task],
        budget: Budget | None = None,
        session: Any = None,
    ) -> None:
        from gpt2_tvm import toolchains
        from targets import load_target, specialise

        announce("start the device")
        self.announce, self.tasks, self.budget, self.session = announce, tasks, budget or Budget(), session
        self.target = specialise(load_target(target))
        toolchains.prepare(self.target)
        import tvm

        self.tvm = tvm
        self.device = session.device(self.target.kind) if session else tvm.device(self.target.kind, 0)
        if not self.device.exist:
            from tuning.children import Failure

            raise Failure("run-error", f"TVM's runtime finds no {self.target.kind} device here")
        self.workloads = Workloads(tasks, self._tensor, announce, COLD_BYTES, MAX_COPIES)
        self.built: dict[tuple[str, GemvConfig], Any] = {}
        self.facts = {
            "device": str(self.device.device_name or self.target.name),
            "software": False,
            "method": "time_evaluator",
            "launch_floor_us": self._floor(),
        }

    def build(self, name: str, config: GemvConfig) -> dict[str, Any]:
        """Compile a point and load it; returns how long it took."""
        begin = time.perf_counter()
        self.announce("schedule")
        func = schedule(self.tasks[name].load(), config, self.target.tvm_target())
        self.announce("build")
        self.built[name, config] = self._compile({"kernel": func}, f"{abs(hash((name, config)))}")
        return {"build_s": time.perf_counter() - begin}

    def run(self, name: str, config: GemvConfig, best_us: float | None = None) -> dict[str, Any]:
        """Check a built point's numbers, then time it. Returns time_us, time_us_sd, samples, error."""
        module = self.built.pop((name, config))
        loaded = self.workloads[name]
        calls = loaded.calls()
        self.announce("check")
        loaded.output.copyfrom(loaded.unwritten())
        module["kernel"](*calls[0])
        error = compare(loaded.output.numpy(), loaded.example)
        self.announce("time")
        evaluator = module.time_evaluator("kernel", self.device, number=1, repeat=1)

        def take() -> list[float]:
            return [evaluator(*arguments).mean * 1e6 for arguments in calls]

        return {**collect(take, self.budget, best_us), "error": error}

    def _compile(self, functions: dict[str, Any], name: str) -> Any:
        """A module whose functions can be called: built in place, or exported, uploaded and loaded there."""
        from gpt2_tvm import toolchains

        with toolchains.compiling(self.target) as tvm_target:
            executable = toolchains.build(self.tvm.IRModule(functions), tvm_target)
            if self.session is None:
                return executable.jit() if hasattr(executable, "jit") else executable
            with tempfile.TemporaryDirectory(prefix="gpt2-tvm-point-") as folder:
                library = Path(folder, toolchains.export(executable, self.target, Path(folder))[0])
                return self.session.load(self.session.upload(library, f"{name}{library.stat().st_size}"))

    def _tensor(self, array: np.ndarray) -> Any:
        return self.tvm.runtime.tensor(array, self.device)

    def _floor(self) -> float:
        """Microseconds of a kernel that stores one number: the median of many."""
        module = self._compile({"kernel": empty_kernel()}, "floor")
        arguments = [self._tensor(np.zeros(1, np.float32)) for _ in range(2)]
        evaluator = module.time_evaluator("kernel", self.device, number=1, repeat=1)
        return statistics.median(evaluator(*arguments).mean * 1e6 for _ in range(64))
