"""Child processes with a time limit: every way to fail is told from the others, and nothing is left running."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import psutil
import pytest

from gpt2_tvm.errors import UserError
from tuning.children import (
    MOST_JOBS,
    STATUSES,
    Call,
    Child,
    Failure,
    Outcome,
    classify,
    jobs_at_once,
    one_line,
    run_each,
    run_once,
)

UNBOUND = (
    "Memory verification failed with the following errors:\n  Variable `A` is directly accessed by host memory "
    "(it is not contained in a thread environment or in the function arguments.\n  Did you forget to bind?"
)
LIMIT_S = 60.0  # for what is expected to come back: the machine may be busy


def adds(announce: Any, a: int, b: int) -> int:
    announce("adding", {"operands": 2})
    print("this goes nowhere")  # standard output is the parent's
    return a + b


def raises(announce: Any, stage: str, message: str) -> None:
    announce(stage, {"seen": True})
    raise RuntimeError(message)


def raises_memory(announce: Any) -> None:
    raise MemoryError


def refuses(announce: Any) -> None:
    raise Failure("wrong-result", "decode: logits differ")


def hangs(announce: Any, stage: str) -> None:
    announce(stage)
    time.sleep(1e6)


def aborts(announce: Any) -> None:
    announce("build")
    sys.stderr.write("LLVM ERROR: planted\n")
    sys.stderr.flush()
    os.abort()


def ends(announce: Any, status: int) -> None:
    os._exit(status)


def starts_another(announce: Any) -> None:
    other = subprocess.Popen(["sleep", "1000"])
    announce("waiting", {"other": other.pid})
    time.sleep(1e6)


class Counter:
    """Something that lives in a child."""

    def __init__(self, announce: Any, start: int) -> None:
        self.announce, self.count = announce, start
        self.facts = {"start": start}

    def add(self, n: int) -> int:
        self.announce("adding")
        self.count += n
        return self.count

    def fail(self) -> None:
        raise ValueError("planted")

    def hang(self) -> None:
        time.sleep(1e6)


def test_a_result_comes_back() -> None:
    outcome = run_once("adds", adds, 2, 3, timeout_s=LIMIT_S)
    assert outcome.ok and outcome.value == 5
    assert (outcome.status, outcome.stage, outcome.notes, outcome.detail) == ("ok", "adding", {"operands": 2}, "")
    assert 0 < outcome.seconds < LIMIT_S


@pytest.mark.parametrize(
    ("stage", "message", "status"),
    [
        ("lowering and scheduling", "rule x failed on function f: planted", "compile-error"),
        ("building 40 functions", "planted", "compile-error"),
        ("shader NT_matmul", "planted", "compile-error"),
        ("check: decode", "planted", "run-error"),
        ("building", UNBOUND, "unbound-thread"),
        ("load", "Vulkan: out of memory", "out-of-memory"),
    ],
)
def test_an_exception_is_named_by_its_message_and_stage(stage: str, message: str, status: str) -> None:
    found, detail = classify(RuntimeError(message), stage)
    assert found == status and found in STATUSES
    assert detail and "\n" not in detail
    assert status != "unbound-thread" or ("`A`" in detail or "A is accessed" in detail)


def test_the_message_is_found_in_a_trace() -> None:
    trace = 'Traceback (most recent call last):\n  File "x.py", line 1\n  0: tvm::f()\nthe loop is gone\n[bt] (1) x'
    assert classify(RuntimeError(trace), "rule") == ("compile-error", "the loop is gone")
    assert classify(KeyError("x"), "load") == ("run-error", "KeyError: 'x'")
    assert classify(UserError("no such target"), "load") == ("run-error", "no such target")
    assert classify(MemoryError(), "load")[0] == "out-of-memory"


def test_an_exception_is_an_outcome() -> None:
    outcome = run_once("raises", raises, "build", "planted mistake", timeout_s=LIMIT_S)
    assert (outcome.status, outcome.detail, outcome.stage) == ("compile-error", "planted mistake", "build")
    assert outcome.value is None and outcome.notes == {"seen": True}  # what came before the failure is kept
    assert run_once("memory", raises_memory, timeout_s=LIMIT_S).status == "out-of-memory"


def test_a_verdict_of_its_own() -> None:
    outcome = run_once("refuses", refuses, timeout_s=LIMIT_S)
    assert (outcome.status, outcome.detail) == ("wrong-result", "decode: logits differ")


@pytest.mark.parametrize(("stage", "status"), [("lowering", "timeout"), ("shader f_kernel", "shader-timeout")])
def test_a_hang_is_ended_and_says_where(stage: str, status: str) -> None:
    outcome = run_once("hangs", hangs, stage, timeout_s=3.0)
    if outcome.stage == "start":
        pytest.skip("the machine is too busy to start a process in 3 seconds")
    assert outcome.status == status
    assert stage in outcome.detail and "in hangs (test_ablation_children.py:" in outcome.detail


def test_a_crash_names_its_signal_and_last_words() -> None:
    outcome = run_once("aborts", aborts, timeout_s=LIMIT_S)
    assert outcome.status == "crash"
    assert "SIGABRT" in outcome.detail and "LLVM ERROR: planted" in outcome.detail and "build" in outcome.detail
    assert run_once("ends", ends, 3, timeout_s=LIMIT_S).detail.startswith("ended with status 3")


def test_what_a_child_started_ends_with_it() -> None:
    outcome = run_once("starts", starts_another, timeout_s=3.0)
    if "other" not in outcome.notes:
        pytest.skip("the machine is too busy to start two processes in 3 seconds")
    assert outcome.status == "timeout"
    assert _gone(outcome.notes["other"])


def meets(announce: Any, mine: str, other: str) -> str:
    """Goes on once the other is there too."""
    Path(mine).touch()
    while not Path(other).exists():
        time.sleep(0.02)
    return Path(mine).name


def test_several_at_a_time_in_the_order_of_the_calls(tmp_path: Path) -> None:
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    calls = [
        Call("a", meets, (a, b)),
        Call("b", meets, (b, a)),  # alone, each would wait for ever
        Call("raises", raises, ("build", "planted")),
        Call("adds", adds, (2, 3)),
    ]
    outcomes = list(run_each(calls, LIMIT_S, 2))
    assert [(o.status, o.value) for o in outcomes] == [
        ("ok", "a"),
        ("ok", "b"),
        ("compile-error", None),
        ("ok", 5),
    ]


def test_closing_ends_what_is_under_way(tmp_path: Path) -> None:
    calls = [Call("adds", adds, (2, 3)), Call("starts", notes_its_pid, (str(tmp_path / "pid"),))]
    with closing(run_each(calls, LIMIT_S, 2)) as outcomes:
        assert next(outcomes).value == 5
        while not (tmp_path / "pid").exists():
            time.sleep(0.02)
    assert _gone(int((tmp_path / "pid").read_text()))


def test_as_many_jobs_as_cores_and_memory_allow() -> None:
    assert jobs_at_once(1) in range(1, MOST_JOBS + 1)
    assert jobs_at_once(1 << 60) == 1


def notes_its_pid(announce: Any, file: str) -> None:
    beside = Path(file + ".new")
    beside.write_text(str(os.getpid()))
    beside.replace(file)
    time.sleep(1e6)


def test_an_object_lives_from_call_to_call() -> None:
    with Child("counter", Counter, 10) as child:
        assert child.ready(LIMIT_S).value == {"start": 10}
        assert child.ask("add", 5, timeout_s=LIMIT_S).value == 15
        assert child.ask("add", 1, timeout_s=LIMIT_S).value == 16
        pid = child.pid
        assert child.alive and not _gone(pid, wait_s=0)
    assert not child.alive and _gone(pid)


def test_after_a_failure_the_child_is_gone() -> None:
    child = Child("counter", Counter, 0)
    assert child.ready(LIMIT_S).ok
    pid = child.pid
    outcome = child.ask("fail", timeout_s=LIMIT_S)
    assert (outcome.status, outcome.detail, outcome.stage) == ("run-error", "ValueError: planted", "fail")
    assert not child.alive and _gone(pid)

    child = Child("counter", Counter, 0)
    assert child.ready(LIMIT_S).ok
    assert child.ask("hang", timeout_s=0.5).status == "timeout"
    assert not child.alive


def test_no_file_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    run_once("adds", adds, 1, 1, timeout_s=LIMIT_S)
    run_once("aborts", aborts, timeout_s=LIMIT_S)
    assert list(tmp_path.glob("gpt2-tvm-child-*")) == []


@pytest.mark.skipif(sys.platform != "linux", reason="Linux ends a child with its parent")
def test_a_killed_parent_takes_a_hanging_child_along(tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(
        "import sys\n"
        f"sys.path[:0] = [{str(Path(__file__).parent)!r}, {str(Path(__file__).parent.parent)!r}]\n"
        "if __name__ == '__main__':\n"
        "    from test_ablation_children import hangs\n"
        "    from tuning.children import Child\n"
        "    child = Child('hangs', hangs, 'lowering')\n"
        "    print(child.pid, flush=True)\n"
        "    child.ready(1e6)\n"
    )
    parent = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    assert _gone(pid)


def test_details_are_one_line_without_folders() -> None:
    assert one_line("error in /opt/some/where/kernel.py:\n  line 3") == "error in kernel.py: line 3"
    assert one_line("tokens/s 3 / 4") == "tokens/s 3 / 4"
    assert len(one_line("x" * 1000)) == 300
    assert Outcome("ok").ok and not Outcome("crash").ok


def _gone(pid: int, wait_s: float = 10.0) -> bool:
    end = time.monotonic() + wait_s
    while True:
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        if time.monotonic() >= end:
            return False
        time.sleep(0.05)
