"""Child processes that end in time, whatever they do: a kernel that hangs, a compiler that does not come back."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from gpt2_tvm.errors import UserError
from gpt2_tvm.measure.workers import Worker

SPARE_S = 60.0  # with less than this left nothing long is begun
POLL_S = 0.1


class OutOfTimeError(Exception):
    """The part's seconds are over; what was measured is written."""


class Clock:
    """A part's seconds. limit_s: from now on."""

    def __init__(self, limit_s: float) -> None:
        self.limit_s = limit_s
        self.end = time.monotonic() + limit_s

    @property
    def left(self) -> float:
        """Seconds that are left, below 0 when they are over."""
        return self.end - time.monotonic()

    def begin(self, what: str, spare_s: float = SPARE_S) -> None:
        """Say what is begun. OutOfTimeError where too little time is left for anything (a fifth of a short part)."""
        if self.left < min(spare_s, self.limit_s / 5):
            raise OutOfTimeError
        say(what)


class Crew:
    """Workers, each with a time at which it is killed: a thread looks at them until the block ends, and the parent's
    wait for an answer then ends too. On leaving the block all are closed."""

    def __init__(self) -> None:
        self._ends: dict[Worker, float] = {}
        self._late: set[Worker] = set()
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Crew:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        while True:
            with self._lock:
                if not self._ends:
                    break
                worker, _end = self._ends.popitem()
            worker.close()
        self._closed.set()
        self._thread.join()

    def add(self, worker: Worker, end: float) -> Worker:
        """Watch a worker; `end` is a `time.monotonic`."""
        with self._lock:
            self._ends[worker] = end
        return worker

    def give(self, worker: Worker, end: float) -> None:
        """Another end for a worker that is there."""
        with self._lock:
            if worker in self._ends:
                self._ends[worker] = end

    def dismiss(self, worker: Worker) -> None:
        """Close one now: its memory is wanted."""
        with self._lock:
            self._ends.pop(worker, None)
        worker.close()

    def late(self, worker: Worker) -> bool:
        """Whether it was killed because its time was over."""
        return worker in self._late

    def why(self, worker: Worker, error: UserError) -> dict[str, str]:
        """A failure as a row has it: of which kind (timeout, crash, error), and in words."""
        if self.late(worker):
            return {"failure": "timeout", "message": f"{worker.label}: not done within its time"}
        kind = "crash" if "its process ended" in str(error) else "error"
        return {"failure": kind, "message": str(error).strip().splitlines()[0]}

    def _watch(self) -> None:
        while not self._closed.wait(POLL_S):
            with self._lock:
                now = time.monotonic()
                for worker, end in self._ends.items():
                    if now > end:
                        self._late.add(worker)
                        worker.interrupt()


class Job:
    """A function's result as a worker's facts (`Worker`): it runs as the subject is made."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.facts: dict[str, Any] = {"result": function(*arguments)}


def alone(label: str, limit_s: float, function: Callable[..., Any], *arguments: Any) -> tuple[Any, dict[str, str]]:
    """Call a module-level function in a process of its own -> (its result, {}), or (None, why there is none)."""
    with Crew() as crew:
        worker = crew.add(Worker(label, Job, function, *arguments), time.monotonic() + limit_s)
        try:
            worker.ready()
        except UserError as error:
            return None, crew.why(worker, error)
        return worker.facts["result"], {}


def say(what: str) -> None:
    """One line of progress."""
    print(what, file=sys.stderr, flush=True)
