"""Points on the GPU of a browser: each a small WebAssembly module with TVM's RPC server, timed in the page.

The page's clock is the wall clock from a queue that is empty to one that is empty again, over as many launches as fill
`CALLS_MS`: what a page can know without timestamps. The weight is the same in every launch, so a product that fits the
device's last cache is read from there.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gpt2_tvm import toolchains
from gpt2_tvm.schedules.gemv_config import GemvConfig
from gpt2_tvm.toolchains import web
from tuning.candidates.numerics import compare, dtype_of, make_example
from tuning.candidates.page import Page, leave, page_facts
from tuning.candidates.sampling import Budget, collect
from tuning.candidates.scheduling import Task, empty_kernel, parameters, schedule
from tuning.children import Failure, one_line
from tuning.sweeping import LOST

if TYPE_CHECKING:
    from collections.abc import Iterator

CALLS_MS = 20  # of launches for one time, far above the 0.1 ms that a page's clock is rounded to
SOFTWARE = ("swiftshader", "llvmpipe", "microsoft basic render")


class BrowserCandidates:
    """See the package's docstring. port, browser: of `page.Page`. The page is this object's own, and ends with its
    process."""

    def __init__(
        self,
        announce: Callable[..., None],
        target: str,
        tasks: Mapping[str, Task],
        budget: Budget | None = None,
        port: int | None = None,
        browser: str | None = None,
    ) -> None:
        from targets import load_target, specialise

        announce("start the browser")
        self.announce, self.tasks, self.budget = announce, tasks, budget or Budget()
        self.target = web.wasm_target(specialise(load_target(target)))
        self.built: dict[tuple[str, GemvConfig], bytes] = {}
        self.page = Page(port, browser)
        self.facts = self._introduce()

    def build(self, name: str, config: GemvConfig) -> dict[str, Any]:
        """Compile and link a point; returns how long it took."""
        begin = time.perf_counter()
        self.announce("schedule")
        func = schedule(self.tasks[name].load(), config, self.target)
        self.announce("build")
        self.built[name, config] = self._compile(func)
        return {"build_s": time.perf_counter() - begin}

    def run(self, name: str, config: GemvConfig, best_us: float | None = None) -> dict[str, Any]:
        """Check a built point's numbers in the page, then time it. Returns time_us, time_us_sd, samples, error."""
        module = self.built.pop((name, config))
        task = self.tasks[name]
        shapes, dtypes = parameters(task.load())
        example = make_example(task.workload, shapes, dtypes)
        with self._session(module) as (session, kernel):
            device = session.webgpu(0)
            self.announce("load inputs")
            blank = np.full(shapes[-1], np.nan, dtype_of(dtypes[-1]))
            tensors = [_tensor(array, device) for array in (*example.arrays, blank)]
            self.announce("shader")
            kernel["kernel"](*tensors)
            result = tensors[-1].numpy()
            if faults := page_facts(session)["faults"]:
                raise Failure("compile-error", f"WebGPU: {one_line(faults[0])}")
            self.announce("check")
            error = compare(result, example)
            self.announce("time")
            evaluator = kernel.time_evaluator("kernel", device, number=1, repeat=3, min_repeat_ms=CALLS_MS)
            return {**collect(lambda: _microseconds(evaluator, tensors), self.budget, best_us), "error": error}

    def _introduce(self) -> dict[str, Any]:
        """What the records' header says of the device, with the time of an empty launch."""
        module = self._compile(empty_kernel())
        try:
            with self._session(module) as (session, kernel):
                told = page_facts(session)
                device = session.webgpu(0)
                tensors = [_tensor(np.zeros(1, np.float32), device) for _ in range(2)]
                evaluator = kernel.time_evaluator("kernel", device, number=64, repeat=5, min_repeat_ms=CALLS_MS)
                floor = float(np.median(_microseconds(evaluator, tensors)))
        except Failure as failure:
            raise Failure("run-error", f"{LOST}: {failure.detail}") from None
        name = told["description"] or " ".join(filter(None, (told["vendor"], told["architecture"], told["device"])))
        return {
            "device": f"{name or 'unnamed adapter'} in a browser",
            "software": bool(told["fallback"]) or any(word in name.lower() for word in SOFTWARE),
            "method": "time_evaluator in a page",
            "launch_floor_us": floor,
            "browser": told["agent"],
        }

    def _compile(self, func: Any) -> bytes:
        """A module with the one function "kernel" for the page."""
        import tvm

        module = tvm.IRModule({"kernel": func.with_attr("global_symbol", "kernel")})
        executable = toolchains.build(module.with_attr("system_lib_prefix", ""), self.target)
        with tempfile.TemporaryDirectory(prefix="gpt2-tvm-point-") as folder:
            path = Path(folder) / "kernel.wasm"
            web.export(executable, path)
            return path.read_bytes()

    @contextmanager
    def _session(self, module: bytes) -> Iterator[tuple[Any, Any]]:
        """(session, the module's functions) in the page; Failure where it does not connect, or its runtime ends."""
        self.announce("open the page")
        session = None
        try:
            session = self.page.connect(module)
            yield session, session.system_lib()
        except (RuntimeError, OSError) as error:
            said = self.page.complaint() or one_line(str(error) or repr(error))
            raise Failure("crash", f"the page ended: {said}") from None
        finally:
            if session is not None:
                leave(session)


def _tensor(array: np.ndarray, device: Any) -> Any:
    import tvm

    return tvm.runtime.tensor(array, device)


def _microseconds(evaluator: Any, tensors: list[Any]) -> list[float]:
    return [seconds * 1e6 for seconds in evaluator(*tensors).results]
