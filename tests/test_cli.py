"""What all command lines promise, and the command that compiles."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import typer
from commands import run_here

from gpt2_tvm import cli
from gpt2_tvm.artifact import open_artifact
from gpt2_tvm.errors import UserError

COMMANDS = ("compile", "generate", "pack")
TINY = ("--rules", "baseline", "--verify-widths", "4")


def command(name: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", f"gpt2_tvm.{name}", *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL)


# ---- every command


@pytest.mark.parametrize("name", COMMANDS)
def test_help_is_fast_and_has_an_example(name: str) -> None:
    start = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = command(name, "--help")
    end = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0
    assert "python" in done.stdout and "--json" in done.stdout
    # seconds of the processor: what the clock says depends on who else is at work
    assert end.ru_utime + end.ru_stime - start.ru_utime - start.ru_stime < 1


@pytest.mark.parametrize("name", COMMANDS)
def test_help_imports_nothing_heavy(name: str) -> None:
    code = (
        f"import sys; import gpt2_tvm.{name}; "
        "print(*{'tvm', 'torch', 'numpy', 'matplotlib', 'huggingface_hub', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.stdout.strip(), done.stderr) == ("", "")


@pytest.mark.parametrize("name", COMMANDS)
def test_an_unknown_option_is_one_line_and_status_2(name: str) -> None:
    done = command(name, "--no-such-option")
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2
    assert line.startswith("error: ") and "--no-such-option" in line and line.endswith("see --help")


def outcome(capsys: pytest.CaptureFixture[str], main: Callable[[], object]) -> tuple[int, str]:
    """(exit status, stderr) of `cli.run`."""
    try:
        cli.run(main)
        status = 0
    except SystemExit as error:
        status = int(error.code or 0)
    return status, capsys.readouterr().err


def raising(error: BaseException) -> Callable[[], None]:
    def main() -> None:
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (UserError("what,\n  and how"), "what, and how"),
        (OSError(errno.ENOSPC, "No space left on device", "/a"), "disk is full: /a"),
        (OSError(errno.EDQUOT, "Quota exceeded"), "disk is full"),
        (OSError(errno.EFBIG, "File too large"), "ulimit -f"),
        (PermissionError(errno.EACCES, "Permission denied", "/b"), "no permission to write or read: /b"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "/c"), "No such file or directory: /c"),
        (MemoryError(), "out of memory"),
        (RuntimeError("first\nsecond"), "RuntimeError: first (unexpected"),
        (ValueError(), "ValueError: "),
    ],
)
def test_errors_are_one_line_and_status_1(
    capsys: pytest.CaptureFixture[str], error: Exception, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("GPT2_TVM_DEBUG", raising=False)
    status, said = outcome(capsys, raising(error))
    assert status == 1
    assert said.startswith("error: ") and message in said and said.count("\n") == 1


def test_a_traceback_for_those_who_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPT2_TVM_DEBUG", "1")
    with pytest.raises(RuntimeError, match="first"):
        cli.run(raising(RuntimeError("first")))


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_unwind_and_decide_the_status(
    capsys: pytest.CaptureFixture[str], number: signal.Signals, status: int
) -> None:
    unwound = []

    def main() -> None:
        try:
            os.kill(os.getpid(), number)
            time.sleep(5)
        except KeyboardInterrupt as interrupt:
            raise RuntimeError("what TVM makes of it") from interrupt
        finally:
            unwound.append(True)

    before = signal.getsignal(number)
    got, said = outcome(capsys, main)
    assert (got, unwound) == (status, [True])
    assert said.count("\n") == 1 and "nothing half-written" in said
    assert signal.getsignal(number) is before


def test_typer_statuses_come_through(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    app = typer.Typer()

    @app.command()
    def main(status: int) -> None:
        raise typer.Exit(status)

    for status in (0, 3):
        monkeypatch.setattr(sys, "argv", ["program", str(status)])
        assert outcome(capsys, app) == (status, "")


def test_comma_lists() -> None:
    assert cli.integers("1,4, 8", "--x") == (1, 4, 8)
    assert cli.integers("", "--x") == ()
    with pytest.raises(UserError, match="--x 1,b"):
        cli.integers("1,b", "--x")


# ---- the end of a command that measures


def test_what_was_measured_is_printed_and_written_before_anything_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[str] = []
    with pytest.raises(UserError, match=r"^a died; b died$"):
        cli.conclude("table\n", {"rows": [1]}, tmp_path / "r.json", lambda: seen.append("drawn"), ["a died", "b died"])
    assert capsys.readouterr().out == "table\n" and seen == ["drawn"]
    assert json.loads((tmp_path / "r.json").read_text()) == {"rows": [1]}
    with pytest.raises(OSError):  # cannot be written: what was printed stays
        cli.conclude("again\n", {}, tmp_path / "r.json" / "under-a-file")
    assert capsys.readouterr().out == "again\n"
    cli.conclude("", {}, None)


def test_an_interrupt_keeps_what_there_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows: list[int] = []

    def measure(file: Path | None) -> None:
        with cli.kept_if_interrupted(file, lambda: {"rows": rows}):
            rows.append(7)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure(None)
    assert capsys.readouterr().err == ""
    with pytest.raises(KeyboardInterrupt):
        measure(tmp_path / "r.json")
    assert capsys.readouterr().err == f"what was measured so far is in {tmp_path / 'r.json'}\n"
    assert json.loads((tmp_path / "r.json").read_text()) == {"rows": [7, 7]}


# ---- compile


def test_compile_makes_an_artifact_and_says_so(tiny_model: Path, tmp_path: Path) -> None:
    out, told, ir = tmp_path / "out", tmp_path / "told.json", tmp_path / "ir"
    options = ("--batch-sizes", "1,3", "--max-seq-len", "32", "--attention", "materialized", "--dump-ir", ir)
    done = command("compile", "--model", tiny_model, "--output", out, *TINY, *options, "--json", told)
    assert done.returncode == 0, done.stderr
    artifact = open_artifact(out)
    assert (artifact.batch_sizes, artifact.verify_widths, artifact.max_seq_len) == ((1, 3), (4,), 32)
    assert artifact.manifest["attention"] == "materialized"
    assert any(ir.iterdir())

    made = json.loads(told.read_text())
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file() and file.name != "manifest.json")
    assert made["size_mb"] == pytest.approx(size / 1e6, abs=0.01)
    assert sum(made["rule_hits"].values()) == len(artifact.manifest["functions"])
    assert made["runs_here"] is True
    for part in (str(out), "MB", "rules", f"python -m gpt2_tvm.generate {out}"):
        assert part in done.stdout
    assert "lowering" in done.stderr  # a line a stage where there is no terminal


def test_random_weights_are_said_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """distilgpt2 without a network; nothing is compiled, the note comes before."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    done = command(
        "compile", "--model", "distilgpt2", "--seed", "7", "--max-seq-len", "99999", "--output", tmp_path / "x"
    )
    note, error = done.stderr.splitlines()
    assert note.startswith("note: weights are random, of the true shape, seed 7")
    assert error.startswith("error: --max-seq-len 99999")


def test_list_targets() -> None:
    done = run_here("gpt2_tvm.compile", "--list-targets")
    assert done.returncode == 0
    names = {line.split()[0] for line in done.stdout.splitlines() if line.strip()}
    assert {"cpu", "cuda", "h200", "metal", "webgpu", "rocm", "gfx942"} <= names


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "/nonexistent/model"], "/nonexistent/model"),
        (["--target", "no-such-target"], "no target is called"),
        (["--quantization", "q3"], "unknown quantization"),
        (["--rules", "only-magic"], "unknown rule"),
        (["--attention", "sparse"], "unknown attention"),
        (["--batch-sizes", "0"], "--batch-sizes"),
        (["--batch-sizes", "one"], "--batch-sizes"),
        (["--verify-widths", "99"], "--verify-widths"),
        (["--max-seq-len", "0"], "--max-seq-len"),
        (["--tuned", "x.json"], "--tuned"),
    ],
)
def test_wrong_options_are_one_line(tiny_model: Path, tmp_path: Path, options: list[str], message: str) -> None:
    done = run_here("gpt2_tvm.compile", "--model", tiny_model, "--output", tmp_path / "out", *options)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 1 and line.startswith("error: ") and message in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["cuda", "metal", "rocm", "webgpu"])
def test_what_an_artifact_needs_is_said(tiny_artifact: Path, kind: str) -> None:
    from gpt2_tvm.artifact import read_manifest
    from gpt2_tvm.compile import needs
    from targets import load_target

    target = load_target(kind).to_json()
    text = needs({**read_manifest(tiny_artifact), "target": target, "library": "lib.tar"})
    assert {"cuda": "NVIDIA", "metal": "Apple", "rocm": "USE_ROCM", "webgpu": "wgpu"}[kind] in text
    assert "C++ compiler" in text
