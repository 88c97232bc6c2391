"""A full disk, a folder that cannot be written, an interrupted compile: one line, and earlier artifacts stay whole."""

from __future__ import annotations

import ctypes
import errno
import os
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from faults import assert_one_line, contents, refusal

from gpt2_tvm import cli, files
from gpt2_tvm.build import compile_model
from gpt2_tvm.engine import Engine

OPTIONS = ("--rules", "baseline", "--verify-widths", "4")


# ---- output


def compile_command(model: Path, output: Path) -> list[str]:
    return [sys.executable, "-m", "gpt2_tvm.compile", "--model", str(model), "--output", str(output), *OPTIONS]


def test_an_output_under_a_file(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    done = subprocess.run(compile_command(tiny_model, tmp_path / "file" / "out"), capture_output=True, text=True)
    assert_one_line(done, "cannot write to", "--output")


def without_privileges() -> None:
    """For a child: permissions bind it as they bind an ordinary user, root or not."""
    if os.getuid() == 0:
        libc = ctypes.CDLL(None)
        for capability in (1, 2):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
            libc.prctl(24, capability, 0, 0, 0)  # PR_CAPBSET_DROP


def test_a_read_only_output_folder(tiny_model: Path, tiny_artifact: Path, tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    earlier = shutil.copytree(tiny_artifact, closed / "out")
    before = contents(earlier)
    closed.chmod(0o555)
    command = compile_command(tiny_model, earlier)
    done = subprocess.run(command, preexec_fn=without_privileges, capture_output=True, text=True, timeout=120)
    closed.chmod(0o755)
    assert_one_line(done, "cannot write to", "Permission denied")
    assert contents(earlier) == before


def test_an_output_that_is_not_ours(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "one.jpg").write_text("x")
    for output in (tmp_path / "photos", tmp_path / "photos" / "one.jpg"):
        assert "not an artifact of ours" in refusal(lambda output=output: compile_model(str(tiny_model), output=output))
    assert (tmp_path / "photos" / "one.jpg").read_text() == "x"
    assert [path.name for path in tmp_path.rglob("*")] == ["photos", "one.jpg"]


def test_a_full_disk(
    tiny_model: Path,
    tiny_artifact: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The system says so at the latest when a file is synced."""
    earlier = shutil.copytree(tiny_artifact, tmp_path / "out")
    before = contents(earlier)

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SystemExit) as caught:
        cli.run(lambda: compile_model(str(tiny_model), output=earlier, rules="baseline", verify_widths=()))
    assert caught.value.code == 1
    assert capsys.readouterr().err.startswith("error: the disk is full")
    assert contents(earlier) == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("limit", [100_000, 20 << 20])
def test_a_file_that_may_not_grow(tiny_artifact: Path, tmp_path: Path, limit: int) -> None:
    """Writing really fails: of the objects, in LLVM, which ends the process when it cannot write; of the weights."""
    earlier = shutil.copytree(tiny_artifact, tmp_path / "out")
    before = contents(earlier)
    done = subprocess.run(
        compile_command(Path("bundled"), earlier),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert_one_line(done, "ulimit -f")
    assert ("converting weights" in done.stderr) == (limit > 1 << 20)
    assert contents(earlier) == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("size", ["8m", "20m"])
def test_a_disk_that_is_really_full(tmp_path: Path, size: str) -> None:
    """A small tmpfs in a mount namespace of its own, where the system lets us make one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = f"mount -t tmpfs -o size={size} none {shlex.quote(str(disk))}"
    inside = ["unshare", "--map-root-user", "--mount", "sh", "-c"]
    if shutil.which("unshare") is None or subprocess.run([*inside, mount], capture_output=True).returncode:
        pytest.skip("no mount namespaces here")
    command = shlex.join(compile_command(Path("bundled"), disk / "out"))
    script = f"{mount} && {command}; status=$?; ls -A {shlex.quote(str(disk))}; exit $status"
    done = subprocess.run([*inside, script], capture_output=True, text=True, timeout=120)
    assert_one_line(done, "the disk is full")
    assert done.stdout == ""  # nothing was left


# ---- interruption


def interrupt(model: Path, output: Path, stage: str, number: signal.Signals) -> subprocess.CompletedProcess[str]:
    """Compile, and send a signal once the command says that `stage` begins."""
    process = subprocess.Popen(
        compile_command(model, output), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=1
    )
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith(stage):
            break
    time.sleep(0.1)  # into the stage
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    return subprocess.CompletedProcess([], process.returncode, out, err)


@pytest.mark.parametrize(
    ("stage", "number"),
    [
        ("importing", signal.SIGINT),
        ("lowering", signal.SIGINT),
        ("building", signal.SIGINT),
        ("building", signal.SIGTERM),
    ],
)
def test_an_interrupted_compile(
    tiny_model: Path, tiny_artifact: Path, tmp_path: Path, stage: str, number: signal.Signals
) -> None:
    earlier = shutil.copytree(tiny_artifact, tmp_path / "out")
    before = contents(earlier)
    done = interrupt(tiny_model, earlier, stage, number)
    assert done.returncode == 128 + number
    assert "nothing half-written was left behind" in done.stderr and "Traceback" not in done.stderr
    assert done.stdout == ""
    assert contents(earlier) == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_killed_compile_is_cleaned_up_by_the_next(tiny_model: Path, tiny_artifact: Path, tmp_path: Path) -> None:
    earlier = shutil.copytree(tiny_artifact, tmp_path / "out")
    before = contents(earlier)
    done = interrupt(tiny_model, earlier, "building", signal.SIGKILL)
    assert done.returncode == -signal.SIGKILL
    assert contents(earlier) == before
    assert len(list(tmp_path.glob(".out.*.partial"))) == 1
    again = subprocess.run(compile_command(tiny_model, earlier), capture_output=True, text=True, timeout=120)
    assert again.returncode == 0, again.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert contents(earlier) != before
    Engine(earlier).prefill([1, 2])


def fill(folder: Path, text: str) -> None:
    (folder / files.MARKER).write_text(text)


def test_two_writers_do_not_touch_each_other(tmp_path: Path) -> None:
    final = tmp_path / "out"
    with files.replacing_folder(final) as first:
        fill(first, "first")
        with files.replacing_folder(final) as second:
            assert first.exists() and first != second
            fill(second, "second")
        assert (final / files.MARKER).read_text() == "second"
    assert (final / files.MARKER).read_text() == "first"
    assert list(tmp_path.iterdir()) == [final]


@pytest.mark.parametrize("exchanges", [True, False])
def test_replacing_with_and_without_an_exchange_of_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchanges: bool
) -> None:
    if not exchanges:
        monkeypatch.setattr(files, "_exchange", lambda a, b: False)
    final = tmp_path / "out"
    for text in ("one", "two", "three"):
        with files.replacing_folder(final) as work:
            fill(work, text)
        assert (final / files.MARKER).read_text() == text
        assert list(tmp_path.iterdir()) == [final]


def test_names_are_exchanged_in_one_step(tmp_path: Path) -> None:
    """Else a kill between two renames would leave no artifact. Linux and macOS have the call."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        fill(tmp_path / name, name)
    assert files._exchange(tmp_path / "a", tmp_path / "b")
    assert [(tmp_path / name / files.MARKER).read_text() for name in "ab"] == ["b", "a"]


@pytest.mark.parametrize("error", [OSError(errno.EIO, "I/O error"), KeyboardInterrupt()])
def test_an_error_between_two_renames_puts_the_old_one_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    monkeypatch.setattr(files, "_exchange", lambda a, b: False)
    final = tmp_path / "out"
    with files.replacing_folder(final) as work:
        fill(work, "old")
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if self.suffix == ".partial":
            raise error
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(type(error)), files.replacing_folder(final) as work:
        fill(work, "new")
    assert (final / files.MARKER).read_text() == "old"
    assert list(tmp_path.iterdir()) == [final]


def test_an_artifact_moved_aside_by_a_killed_writer_comes_back(tmp_path: Path) -> None:
    aside = tmp_path / ".out.abc.old"
    aside.mkdir()
    fill(aside, "old")
    with pytest.raises(RuntimeError), files.replacing_folder(tmp_path / "out"):
        assert (tmp_path / "out" / files.MARKER).read_text() == "old"
        raise RuntimeError
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
