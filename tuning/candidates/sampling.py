"""How often to time a point: until the median is known well enough, or its budget is spent."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

MIN_SAMPLES = 5


@dataclass(frozen=True)
class Budget:
    """seconds: of timing a point, at most · spread: stop when the standard error of the mean is below this share of
    the median · hopeless: stop after the first samples where even the fastest is so many times the best known."""

    seconds: float = 1.0
    spread: float = 0.01
    hopeless: float = 4.0


def collect(take: Callable[[], list[float]], budget: Budget, best_us: float | None = None) -> dict[str, Any]:
    """Call `take` (microseconds of some calls) until the budget says stop. Returns time_us, time_us_sd, samples."""
    take()  # warm: caches, clocks, lazily made state
    samples: list[float] = []
    start = time.perf_counter()
    while True:
        samples += take()
        if len(samples) >= MIN_SAMPLES:
            if best_us is not None and min(samples) > budget.hopeless * best_us:
                break
            error = statistics.stdev(samples) / len(samples) ** 0.5
            if error <= budget.spread * statistics.median(samples):
                break
        if time.perf_counter() - start >= budget.seconds and len(samples) >= 2:
            break
    return {
        "time_us": statistics.median(samples),
        "time_us_sd": statistics.stdev(samples),
        "samples": len(samples),
    }
