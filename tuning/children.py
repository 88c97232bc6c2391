"""Child processes with a time limit, and what became of them as a typed outcome.

A schedule that is wrong can raise, hang, kill its process or compute nonsense. Whatever is not proved yet runs in a
child; the parent gets an `Outcome` and goes on. For one call there is `run_once`, for many that may run side by side
`run_each`; a `Child` holds an object (an engine
with its weights, say) and answers many calls.

    outcome = run_once("candidate 17", build_and_time, config, timeout_s=30)   # build_and_time(announce, config)
    if outcome.ok: ...

The child says what it is at with `announce("shader NT_matmul")`: that stage decides what a failure is called, and a
second argument hands over something that the parent is to have even if the rest fails.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import re
import signal
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable
from contextlib import closing, suppress
from dataclasses import dataclass, field
from itertools import islice
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

Status = Literal[
    "ok",
    "invalid",  # what was asked for cannot be scheduled at all
    "compile-error",  # a rule, a pass, the code generator or the device's compiler refused it
    "unbound-thread",  # TVM: "did you forget to bind?", a loop over the device's memory outside any thread
    "wrong-result",  # it ran and computed something else
    "timeout",
    "shader-timeout",  # the time went by while the device's driver compiled a shader
    "crash",  # the process ended by itself; the detail names the signal
    "out-of-memory",
    "run-error",  # it compiled, and then raised
]
STATUSES: tuple[str, ...] = Status.__args__  # type: ignore[attr-defined]

Announce = Callable[..., None]  # (stage, notes=None): notes is a dict that `Outcome.notes` will hold

STOP_S = 5.0  # how long an idle child may take to end before it is ended
MOST_JOBS = 8  # children that compile at a time
TICK_S = 0.5  # how often the parent looks at the clock
JUMP_S = 2.0  # a longer gap between two looks means that the machine or this program was suspended
COMPILING = ("lower", "rule", "schedule", "build", "shader")  # first words of stages in which code is made
PATH = re.compile(r"(?<![\w.])(?:/[\w.+@~-]+){2,}/")  # folders of this machine are nobody else's business
TELLING = re.compile(r"error|abort|fatal|check failed|assert|terminate|killed", re.I)


class Failure(Exception):
    """Raised in a child by what knows its own verdict, such as a comparison: `Failure("wrong-result", "...")`."""

    def __init__(self, status: Status, detail: str) -> None:
        super().__init__(status, detail)
        self.status, self.detail = status, detail


@dataclass(frozen=True)
class Outcome:
    """What became of one call.

    Attributes:
        status: one of `STATUSES`.
        value: what the call returned (status ok), else None.
        detail: one line for people, empty for ok.
        stage: what the child was at, in its own words.
        seconds: how long it took; time in which the machine was suspended is not counted.
        notes: what the child handed over on its way, also when it failed later.
    """

    status: Status
    value: Any = None
    detail: str = ""
    stage: str = ""
    seconds: float = 0.0
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        return self.status == "ok"


class Child:
    """An object in a process of its own.

    Args:
        label: for messages and the process's name.
        make: module-level; `make(announce, *arguments)` returns the object in the child.
        arguments: pickled.

    Starting does not wait. `ready` waits for `make`, `ask` calls a method of what it returned. After an outcome that
    is not ok the process is gone and `alive` False. The process group of the child dies with it, and on Linux the
    child dies with the thread that started it, even if that is killed.
    """

    def __init__(self, label: str, make: Callable[..., Any], *arguments: Any) -> None:
        self.label = label
        self.alive = True
        descriptor, name = tempfile.mkstemp(prefix="gpt2-tvm-child-", suffix=".err")
        os.close(descriptor)
        self._stderr = Path(name)
        # spawn, not fork: neither TVM's thread pool nor a GPU context survives a fork
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        arguments = (theirs, name, os.getpid(), make, arguments)
        self._process = context.Process(target=_serve, args=arguments, name=label, daemon=True)
        try:
            self._process.start()
        except BaseException:
            self._stderr.unlink(missing_ok=True)
            raise
        theirs.close()

    @property
    def pid(self) -> int:
        """The process's id."""
        assert self._process.pid is not None  # it was started in __init__
        return self._process.pid

    def ready(self, timeout_s: float) -> Outcome:
        """Wait until the object is made; the value is its `facts`, if it has such an attribute."""
        return self._receive("start", timeout_s)

    def ask(self, method: str, *arguments: Any, timeout_s: float) -> Outcome:
        """Call a method there and wait for what it returns."""
        with suppress(OSError):  # it ended since its last answer; _receive says how
            self._connection.send((method, arguments))
        return self._receive(method, timeout_s)

    def close(self) -> None:
        """End the process: by asking where it is idle, by force where it is not."""
        if self.alive:
            with suppress(OSError):
                self._connection.send(None)
            self._process.join(STOP_S)
        self.kill()

    def kill(self) -> None:
        """End the process and what it started, now."""
        self.alive = False
        pid = self._process.pid
        if pid is not None and hasattr(os, "killpg"):
            with suppress(OSError):  # gone, or not yet the leader of a group of its own
                if self._process.is_alive() or self._process.exitcode != 0:
                    os.killpg(pid, signal.SIGKILL)
        with suppress(OSError, ValueError):
            self._process.kill()
        self._process.join()
        self._connection.close()
        self._stderr.unlink(missing_ok=True)

    def __enter__(self) -> Child:
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if kind is None:
            self.close()
        else:
            self.kill()

    def _receive(self, stage: str, timeout_s: float) -> Outcome:
        notes: dict[str, Any] = {}
        elapsed, last = 0.0, time.monotonic()

        def over(status: Status, detail: str) -> Outcome:
            outcome = Outcome(status, None, one_line(detail), stage, elapsed, notes)
            self.kill()
            return outcome

        try:
            while True:
                there = self._connection.poll(min(TICK_S, max(0.0, timeout_s - elapsed)))
                now = time.monotonic()
                elapsed += min(now - last, JUMP_S)
                last = now
                if not there:
                    if elapsed < timeout_s:
                        continue
                    status: Status = "shader-timeout" if stage.startswith("shader") else "timeout"
                    return over(status, f"not done after {timeout_s:g} s, at: {stage}{self._where()}")
                kind, *content = self._connection.recv()
                if kind == "at":
                    stage, more = content
                    notes.update(more or {})
                elif kind == "done":
                    return Outcome("ok", content[0], "", stage, elapsed, notes)
                else:
                    status, detail = content
                    return over(status, detail)
        except (EOFError, OSError):
            self._process.join(STOP_S)
            code = self._process.exitcode
            how = f"by {signal.Signals(-code).name}" if code and code < 0 else f"with status {code}"
            hint = ", perhaps by the system for its memory" if code == -signal.SIGKILL else ""
            said = self._last_words()
            return over("crash", f"ended {how}{hint} at: {stage}" + (f" ({said})" if said else ""))

    def _last_words(self) -> str:
        """What the child's stderr says of its end: the last line that sounds like an error, and where Python was."""
        lines = self._said()
        telling = [line for line in lines if TELLING.search(line) and not line.startswith(("File ", "Fatal Python"))]
        said = telling[-1][:160] if telling else ""
        return " ".join(part for part in (said, _innermost(lines)) if part)

    def _where(self) -> str:
        """What a child that hangs is doing: it is asked for its stack, which it prints even inside C code."""
        if not hasattr(signal, "SIGUSR1"):
            return ""
        with suppress(OSError):
            os.kill(self.pid, signal.SIGUSR1)
        time.sleep(0.2)
        where = _innermost(self._said())
        return f", {where}" if where else ""

    def _said(self) -> list[str]:
        try:
            lines = self._stderr.read_text(errors="replace").splitlines()[-200:]
        except OSError:
            return []
        return [line.strip() for line in lines if line.strip()]


@dataclass(frozen=True)
class Call:
    """`function(announce, *arguments)` for a child: module-level, its result pickled. `label` as for `Child`."""

    label: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]


def run_each(calls: Iterable[Call], timeout_s: float, jobs: int = 1) -> Generator[Outcome, None, None]:
    """The outcome of each call in a child of its own, in the order of the calls, up to `jobs` of them at a time.

    For what is not timed. A call's limit counts from when its outcome is waited for. Closing the generator ends what is
    under way.
    """
    todo, running = iter(calls), deque[Child]()
    try:
        while True:
            for call in islice(todo, jobs - len(running)):
                running.append(Child(call.label, _Once, call.function, call.arguments))
            if not running:
                return
            outcome = running[0].ready(timeout_s)
            running.popleft().close()
            yield outcome
    finally:
        for child in running:
            child.kill()


def run_once(label: str, function: Callable[..., Any], *arguments: Any, timeout_s: float) -> Outcome:
    """`function(announce, *arguments)` in a child of its own; a module-level function, its result pickled."""
    with closing(run_each([Call(label, function, arguments)], timeout_s)) as outcomes:
        return next(outcomes)


def jobs_at_once(each_bytes: int) -> int:
    """How many children that compile may run at a time: one a core that this process may use, in half of the free
    memory. each_bytes: what one takes."""
    import psutil

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, MOST_JOBS, psutil.virtual_memory().available // 2 // each_bytes))


def _innermost(lines: list[str]) -> str:
    """The first frame of the last stack that faulthandler printed, as "in apply (my_rules.py:12)"."""
    starts = [i for i, line in enumerate(lines) if line.endswith("(most recent call first):")]
    if not starts or starts[-1] + 1 >= len(lines):
        return ""
    found = re.match(r'File "(.+)", line (\d+) in (.+)', lines[starts[-1] + 1])
    return f"in {found[3]} ({Path(found[1]).name}:{found[2]})" if found else ""


class _Once:
    """What `run_once` makes in the child: its result is the answer to `ready`."""

    def __init__(self, announce: Announce, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        self.facts = function(announce, *arguments)


def one_line(text: str, limit: int = 300) -> str:
    """`text` on one line, without folders of this machine, cut at `limit` characters."""
    text = PATH.sub("", " ".join(text.split()))
    return text if len(text) <= limit else text[: limit - 1] + "…"


def classify(error: BaseException, stage: str) -> tuple[Status, str]:
    """(status, detail) of an exception that ended a call while it was at `stage`."""
    if isinstance(error, Failure):
        return error.status, error.detail
    text = str(error)
    if "forget to bind" in text.lower():
        found = re.search(r"variable `?([^`]+?)`? is directly accessed", text, re.I)
        what = f"{found[1]} is accessed outside any thread; " if found else ""
        return "unbound-thread", f"{what}TVM asks: did you forget to bind?"
    if isinstance(error, MemoryError) or re.search(r"out of memory|cannot allocate", text, re.I):
        return "out-of-memory", _first_line(error)
    return "compile-error" if stage.startswith(COMPILING) else "run-error", _first_line(error)


def _first_line(error: BaseException) -> str:
    """The line that says what is wrong. TVM puts a C++ trace before or after it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    skip = ("Traceback", "File ", "Stack trace", "[bt]", "at ", "---")
    lines = [line for line in lines if not line.startswith(skip) and not re.match(r"^\d+: ", line)]
    name = "" if type(error).__name__ in ("RuntimeError", "UserError") else f"{type(error).__name__}: "
    return name + (lines[0] if lines else "no message")


def _serve(
    connection: Connection, stderr: str, parent: int, make: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    """The child's life: make the object, answer calls until told to stop or the parent is gone."""
    _on_its_own(parent)
    if not os.environ.get("GPT2_TVM_DEBUG"):
        with Path(stderr).open("ab") as file:
            os.dup2(file.fileno(), 2)
    os.dup2(2, 1)  # standard output carries the parent's tables alone
    faulthandler.enable(all_threads=False)
    if hasattr(faulthandler, "register"):
        faulthandler.register(signal.SIGUSR1, all_threads=False)
    stage = "start"

    def announce(what: str, notes: dict[str, Any] | None = None) -> None:
        nonlocal stage
        stage = what
        connection.send(("at", what, notes))

    try:
        made = make(announce, *arguments)
        connection.send(("done", getattr(made, "facts", None)))
        while (call := connection.recv()) is not None:
            method, its = call
            stage = method
            connection.send(("done", getattr(made, method)(*its)))
    except (EOFError, BrokenPipeError):
        pass
    except Exception as error:
        if os.environ.get("GPT2_TVM_DEBUG"):
            import traceback

            traceback.print_exc()
        with suppress(OSError):
            connection.send(("failed", *classify(error, stage)))
    sys.stdout.flush()
    sys.stderr.flush()
    # Not through the interpreter's own end: a driver or a thread pool that a bad kernel left behind can hang there.
    os._exit(0)


def _on_its_own(parent: int) -> None:
    """A process group of its own, so that all it starts can be ended at once and Ctrl-C is the parent's alone; and an
    end together with the parent's, however that comes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)
    if sys.platform == "linux":
        import ctypes

        PR_SET_PDEATHSIG = 1  # <sys/prctl.h>
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before we asked
            os._exit(1)
