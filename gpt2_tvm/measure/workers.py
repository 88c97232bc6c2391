"""One child process for each thing that is timed, kept alive and asked in turn.

Why processes: each one's peak memory is its own, a crash of one does not end the run, and TVM's and torch's
thread pools do not share a process. While one has its turn the others wait in a blocking read.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from gpt2_tvm.errors import UserError
from gpt2_tvm.measure.cases import Case

STOP_S = 5.0  # how long a worker may take to end before it is ended


class Worker:
    """A subject in its own process.

    Args:
        label: what to call it in messages.
        factory: makes the subject there (`measure.subjects.Subject`); a module-level class or function.
        arguments: for the factory; they are pickled.

    Starting does not wait: `ready` does, so that several can load at once.
    """

    def __init__(self, label: str, factory: Callable[..., Any], *arguments: Any) -> None:
        self.label = label
        self.facts: dict[str, Any] = {}
        # spawn, not fork: neither TVM's thread pool nor a GPU context survives a fork
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, factory, arguments), daemon=True)
        with _children_ignore_interrupts():
            self._process.start()
        theirs.close()

    @property
    def pid(self) -> int:
        """The process's id."""
        assert self._process.pid is not None  # it was started in __init__
        return self._process.pid

    def ready(self) -> None:
        """Wait until the subject is loaded; its `facts` are here then. Raises UserError where it cannot be."""
        self.facts = self._receive()

    def turn(self, case: Case) -> Any:
        """Have the subject run one case -> its `Sample` (of the machine: a `Probe`).

        Raises UserError if it fails or its process ends.
        """
        with suppress(OSError):  # it ended since its last answer; _receive says how
            self._connection.send(case)
        return self._receive()

    def close(self) -> None:
        """End the process: by asking where it is idle, by force where it is not."""
        with suppress(OSError):
            self._connection.send(None)
        self._connection.close()
        self._process.join(STOP_S)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def interrupt(self) -> None:
        """End the process from another thread than the one that waits for its answer: that wait ends with UserError."""
        self._process.kill()  # nothing, where it was waited for already

    def kill(self) -> None:
        """End the process now, in the middle of a turn too."""
        self._process.kill()
        self._process.join()
        self._connection.close()

    def _receive(self) -> Any:
        try:
            outcome, value = self._connection.recv()
        except (EOFError, OSError):
            self._process.join(STOP_S)
            code = self._process.exitcode
            how = f"by {signal.Signals(-code).name}" if code and code < 0 else f"with status {code}"
            raise UserError(f"{self.label}: its process ended {how}; is there enough memory for it?") from None
        if outcome == "failed":
            raise UserError(value)
        return value


def _serve(connection: Connection, factory: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    """The child's life: make the subject, answer cases until told to stop or the parent is gone."""
    from gpt2_tvm.cli import describe

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole group; the parent decides
    os.dup2(sys.stderr.fileno(), 1)  # standard output carries the parent's table alone
    try:
        subject = factory(*arguments)
        connection.send(("ready", subject.facts))
        while (case := connection.recv()) is not None:
            sample = subject.turn(case)  # of a subject in another process, with that one's memory
            connection.send(("done", replace(sample, peak_rss_mb=sample.peak_rss_mb or peak_rss_mb())))
    except (EOFError, BrokenPipeError):
        pass
    except Exception as error:
        if os.environ.get("GPT2_TVM_DEBUG"):
            import traceback

            traceback.print_exc()
        connection.send(("failed", describe(error)))


@contextmanager
def _children_ignore_interrupts() -> Iterator[None]:
    """A process started in this block ignores Ctrl-C from its first instruction on (it inherits that)."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def peak_rss_mb() -> float:
    """Peak resident memory of this process in 10^6 bytes, mapped weights included.

    Linux: VmHWM, because ru_maxrss of a child starts at what its parent had when it was made.
    """
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024 / 1e6
    except OSError:
        pass
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_wset / 1e6
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e6
