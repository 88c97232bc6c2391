"""How much of the machine others used while we timed: rates from a busy machine mislead, and should say so."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import psutil

BUSY_CORES = 0.15  # from here on a result says that the machine was not quiet


class OtherLoad:
    """Counts from its construction on.

    Args:
        pids: our own processes besides this one; what they and their children (a browser's, say) use is not counted.
    """

    def __init__(self, pids: Sequence[int]) -> None:
        import psutil

        self._this, self._workers = psutil.Process(), [psutil.Process(pid) for pid in pids]
        self._start = time.perf_counter()
        self._all, self._ours = _busy_s(), self._own_s()

    def cores(self) -> float | None:
        """Cores that other processes kept busy, the mean since construction; None if one of ours has ended."""
        import psutil

        try:
            ours = self._own_s() - self._ours
        except psutil.Error:
            return None
        return max(0.0, (_busy_s() - self._all - ours) / (time.perf_counter() - self._start))

    def _own_s(self) -> float:
        return sum(self._this.cpu_times()[:2]) + sum(_tree_s(worker) for worker in self._workers)


def _tree_s(process: psutil.Process) -> float:
    """Seconds that a process has used, with its children, those that have ended included."""
    import psutil

    used = sum(process.cpu_times()[:4])  # user and system, of its own and of children that have ended
    for child in process.children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            used += sum(child.cpu_times()[:4])
    return used


def _busy_s() -> float:
    """Seconds that all cores together have been busy, or were taken from this virtual machine by its host."""
    import psutil

    times = psutil.cpu_times()
    return sum(getattr(times, name, 0.0) for name in ("user", "nice", "system", "irq", "softirq", "steal"))
