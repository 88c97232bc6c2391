"""The run of a sweep: workers build and time points, one thread and one child process each, and every result is on the
disk before the next point is taken.

Workers that share a device take turns on it, so that one builds while another measures. A child that dies takes its
point's status with it and is replaced; a worker whose machine is gone gives its point back to the others.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from gpt2_tvm.errors import UserError
from gpt2_tvm.schedules.gemv_config import GemvConfig
from tuning.children import Child, Outcome
from tuning.records import STOCK, Point, Records
from tuning.search import Strategy
from tuning.workloads import Workload

# What a child's outcome is called in the records.
STATUS = {
    "ok": "ok",
    "invalid": "invalid",
    "compile-error": "compile-error",
    "unbound-thread": "compile-error",
    "wrong-result": "wrong-result",
    "timeout": "timeout",
    "shader-timeout": "timeout",
    "crash": "crash",
    "out-of-memory": "crash",
    "run-error": "crash",
}
LOST = "worker-lost"  # detail of an outcome whose machine went away: the point is tried elsewhere
START_S = 120.0  # a child imports TVM and uploads weights
RESTARTS = 20  # in a row, without one point in between: then something is wrong with the machine, not with points


@dataclass
class Search:
    """One workload's part of a sweep."""

    workload: Workload
    space: str
    strategy: Strategy
    stock: GemvConfig
    running: set[GemvConfig] = field(default_factory=set)


@dataclass(frozen=True)
class WorkerSpec:
    """How to start a worker's child.

    name: as records call it · make, arguments: of `children.Child` · device: workers with the same take turns.
    """

    name: str
    make: Callable[..., Any]
    arguments: tuple[Any, ...]
    device: str


Say = Callable[[str], None]
Done = Callable[[Search, Point], None]


class Sweep:
    """Runs searches to their end, or until stopped.

    facts: what the first worker said of itself (device, method, launch floor). done: called after each point, from the
    worker's thread, under a lock. timeout_s: of a build, and of a check with timing.
    """

    def __init__(
        self, records: Records, searches: Sequence[Search], workers: Sequence[WorkerSpec], timeout_s: float, done: Done
    ) -> None:
        self.records, self.searches, self.workers = records, list(searches), list(workers)
        self.timeout_s, self.done = timeout_s, done
        self.lock = threading.RLock()
        self.stop = threading.Event()
        self.error: BaseException | None = None
        self.children: dict[str, Child] = {}
        self.lost: list[str] = []
        self.devices = {w.device: threading.Lock() for w in self.workers}
        # kept as points come in: workers ask for them at every point, under the lock
        self.results: dict[str, dict[GemvConfig, float | None]] = {s.workload.name: {} for s in self.searches}
        for point in records:
            if point.workload in self.results:
                self._keep(point)
        self.finished: set[int] = set()  # searches that ask for nothing more

    def run(self) -> None:
        """Until nothing is left to try. KeyboardInterrupt stops the workers and goes on; so does a full disk."""
        threads = [threading.Thread(target=self._guarded, args=(w,), name=w.name, daemon=True) for w in self.workers]
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                while thread.is_alive():
                    thread.join(0.2)
        finally:
            self.stop.set()
            with self.lock:
                for child in self.children.values():
                    child.kill()
            for thread in threads:
                thread.join(10)
        if self.error is not None:
            raise self.error
        if len(self.lost) == len(self.workers):
            raise UserError(
                f"every worker was lost ({self.lost[-1]}); what was measured is in {self.records.path}; "
                "run the same command again to go on"
            )

    # -- one worker --------------------------------------------------------------------------------------------

    def _guarded(self, spec: WorkerSpec) -> None:
        try:
            self._work(spec)
        except BaseException as error:
            with self.lock:
                if not self.stop.is_set() and self.error is None:
                    self.error = error
            self.stop.set()

    def _work(self, spec: WorkerSpec) -> None:
        child: Child | None = None
        failures = 0
        while not self.stop.is_set():
            taken = self._take()
            if taken is None:
                if not self._anything_running():
                    break
                time.sleep(0.05)  # a strategy that learns may go on once the others are done
                continue
            search, config = taken
            if child is None or not child.alive:
                child, outcome = self._start(spec)
                if not outcome.ok:
                    self._give_back(search, config)
                    child = None
                    failures += 1
                    if LOST in outcome.detail or failures >= RESTARTS:
                        self._lose(spec, outcome)
                        return
                    continue
            outcome = self._measure(spec, child, search, config)
            if self.stop.is_set():
                return
            if LOST in outcome.detail:
                self._give_back(search, config)
                self._lose(spec, outcome)
                child.kill()
                return
            failures = 0
            self._record(spec, search, config, outcome)
        if child is not None:
            child.close()

    def _start(self, spec: WorkerSpec) -> tuple[Child, Outcome]:
        child = Child(spec.name, spec.make, *spec.arguments)
        with self.lock:
            self.children[spec.name] = child
        return child, child.ready(START_S)

    def _measure(self, spec: WorkerSpec, child: Child, search: Search, config: GemvConfig) -> Outcome:
        name = search.workload.name
        outcome = child.ask("build", name, config, timeout_s=self.timeout_s)
        if not outcome.ok:
            return outcome
        built = outcome.value or {}
        with self.devices[spec.device]:
            if self.stop.is_set():
                return outcome
            outcome = child.ask("run", name, config, self._best(name), timeout_s=self.timeout_s)
        if outcome.ok:
            return Outcome("ok", {**built, **outcome.value}, seconds=outcome.seconds)
        return outcome

    # -- the shared state --------------------------------------------------------------------------------------

    def _take(self) -> tuple[Search, GemvConfig] | None:
        with self.lock:
            for number, search in enumerate(self.searches):
                if number in self.finished:
                    continue
                results = self.results[search.workload.name]
                if search.stock not in results and search.stock not in search.running:
                    search.running.add(search.stock)
                    return search, search.stock
                config = search.strategy.ask(results, search.running)
                if config is not None:
                    search.running.add(config)
                    return search, config
                if not search.running:
                    self.finished.add(number)
        return None

    def _anything_running(self) -> bool:
        with self.lock:
            return any(search.running for search in self.searches)

    def _give_back(self, search: Search, config: GemvConfig) -> None:
        with self.lock:
            search.running.discard(config)

    def _lose(self, spec: WorkerSpec, outcome: Outcome) -> None:
        with self.lock:
            self.lost.append(f"{spec.name}: {outcome.detail}")

    def _keep(self, point: Point) -> None:
        self.results[point.workload][point.config] = point.time_us if point.ok else None

    def _best(self, workload: str) -> float | None:
        with self.lock:
            return min((t for t in self.results[workload].values() if t is not None), default=None)

    def _record(self, spec: WorkerSpec, search: Search, config: GemvConfig, outcome: Outcome) -> None:
        value = dict(outcome.value or {})
        time_us = value.pop("time_us", None)
        extra = {k: v for k, v in value.items() if k not in ("time_us_sd", "samples")}
        if len(self.workers) > 1:
            extra["worker"] = spec.name
        point = Point(
            workload=search.workload.name,
            space=STOCK if config == search.stock else search.space,
            config=config,
            status=STATUS.get(outcome.status, "crash"),
            time_us=time_us,
            time_us_sd=value.get("time_us_sd"),
            gb_s=search.workload.bytes / time_us / 1e3 if time_us else None,
            samples=value.get("samples", 0),
            detail=outcome.detail,
            extra=extra,
        )
        with self.lock:
            search.running.discard(config)
            if self.stop.is_set():
                return
            self.records.add(point)
            self._keep(point)
            self.done(search, point)
