"""`tuning.sweep --static`, for machines without the device: a model ranks all points, the best of them are compiled,
and what the compiler made of them corrects the ranking.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from gpt2_tvm.schedules.gemv_config import GemvConfig
from targets import DeviceTarget
from tuning.children import Child
from tuning.predict import Compiled, predict_us
from tuning.records import STOCK, Point, Records
from tuning.space import Points
from tuning.sweeping import START_S, STATUS, Search
from tuning.workloads import Workload

CHUNK = 12  # points in one compilation: the headers cost more than a kernel
TRIALS = 36  # points of each product and space that are compiled

Done = Callable[[Search, Point], None]


@dataclass(frozen=True)
class Job:
    """Points that are compiled together."""

    search: Search
    configs: tuple[GemvConfig, ...]


def shortlist(points: Points, target: DeviceTarget, workload: Workload, trials: int | None) -> list[GemvConfig]:
    """The points that the model likes best, the best first."""
    return sorted(points.configs, key=lambda c: predict_us(c, workload, target))[: trials or TRIALS]


@dataclass
class StaticSweep:
    """Compiles shortlists in child processes and records what each point takes.

    The records' time_us is the model's, with the compiler's registers and spills in it: a ranking, no measurement.
    start: makes the child of a worker · done: called after each point, under a lock.
    """

    records: Records
    target: DeviceTarget
    start: Callable[[int], Child]
    workers: int
    timeout_s: float
    done: Done
    children: list[Child] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def jobs(self, searches: list[Search], found: list[tuple[Workload, Points]], trials: int | None) -> list[Job]:
        """What is left to compile."""
        jobs = []
        for search, (workload, points) in zip(searches, found, strict=True):
            todo = dict.fromkeys([search.stock, *shortlist(points, self.target, workload, trials)])
            left = [c for c in todo if (workload.name, c) not in self.records.points]
            jobs += [Job(search, tuple(left[i : i + CHUNK])) for i in range(0, len(left), CHUNK)]
        return jobs

    def run(self, jobs: list[Job]) -> None:
        try:
            with ThreadPoolExecutor(self.workers) as pool:
                for future in [pool.submit(self._work, i, jobs[i :: self.workers]) for i in range(self.workers)]:
                    future.result()
        except BaseException:
            for child in self.children:
                child.kill()
            raise

    def _work(self, worker: int, jobs: list[Job]) -> None:
        child: Child | None = None
        for job in jobs:
            child, rows = self._compile(child, worker, job.search, job.configs)
            if rows is None:  # the chunk failed as a whole: one at a time, to find whose fault it is
                rows = []
                for config in job.configs:
                    child, one = self._compile(child, worker, job.search, (config,))
                    rows += one or [{"status": "compile-error", "detail": "the compiler failed, hung or crashed"}]
            for config, row in zip(job.configs, rows, strict=True):
                self._record(job.search, config, row)
        if child is not None:
            child.close()

    def _compile(
        self, child: Child | None, worker: int, search: Search, configs: tuple[GemvConfig, ...]
    ) -> tuple[Child | None, list[dict[str, Any]] | None]:
        """(the child to go on with, a row a point, or None where the compilation failed)."""
        if child is None or not child.alive:
            child = self.start(worker)
            self.children.append(child)
            if not child.ready(START_S).ok:
                return None, None
        outcome = child.ask("compile", search.workload.name, list(configs), timeout_s=self.timeout_s * len(configs))
        return child, list(outcome.value) if outcome.ok else None

    def _record(self, search: Search, config: GemvConfig, row: dict[str, Any]) -> None:
        workload = search.workload
        status = STATUS.get(row["status"], "compile-error")
        compiled = Compiled(row.get("registers"), row.get("spill_bytes"), row.get("shared_bytes"))
        time_us = predict_us(config, workload, self.target, compiled) if status == "ok" else None
        point = Point(
            workload=workload.name,
            space=STOCK if config == search.stock else search.space,
            config=config,
            status=status,
            time_us=time_us,
            gb_s=workload.bytes / time_us / 1e3 if time_us else None,
            detail=row.get("detail", ""),
            extra={key: value for key, value in row.items() if key not in ("status", "detail")} | {"predicted": True},
        )
        with self.lock:
            if (workload.name, config) not in self.records.points:
                self.records.add(point)
                self.done(search, point)
