"""`python -m tuning.ablation` from end to end on a tiny model: planted faults, interruption, killing, going on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import pytest
from commands import run_here
from faults import assert_one_line
from rpc_workers import server, tracker
from wgsl_harness import device

from tuning import ablation_work
from tuning.ablation_records import Journal
from tuning.ablation_work import Job
from tuning.children import run_once

HERE = Path(__file__).parent
SMALL = ("--prompt-tokens", "12", "--generate", "8", "--reference", "cpu", "--no-functions")
RECORDS = "records.json"
JOURNAL = "records.journal.jsonl"


def command(model: Path, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "tuning.ablation", "--model", str(model), "--records", RECORDS, *SMALL, *arguments]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE)])}


def run(folder: Path, model: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(model, *arguments), cwd=folder, env=environment(), capture_output=True, text=True, timeout=900
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ablation")


@pytest.fixture(scope="module")
def faulty(folder: Path, tiny_model: Path) -> dict[str, dict[str, Any]]:
    """Rows by set of a run with planted faults, and of a run with one that hangs, whose time limit is short."""
    planted = [f"only-planted_rules:{fault}" for fault in ("Raises", "Aborts", "WrongNumbers")]
    sets = ",".join(["full", *planted, "with-planted_rules:TakesNothing"])
    first = run(folder, tiny_model, "--sets", sets, "--repeats", "3", "--format", "json")
    assert first.returncode == 0, first.stderr
    assert json.loads((folder / RECORDS).read_text()) == json.loads(first.stdout)
    hangs = ("--sets", "only-planted_rules:Hangs", "--timeout", "25", "--records", "hangs.json", "--format", "json")
    second = run(folder, tiny_model, *hangs)
    assert second.returncode == 0, second.stderr
    return {row["set"]: row for done in (first, second) for row in json.loads(done.stdout)["rows"]}


@pytest.mark.heavy
def test_planted_faults_are_reported_as_what_they_are(faulty: dict[str, dict[str, Any]]) -> None:
    def told(fault: str) -> tuple[str, str]:
        row = faulty[f"only-planted_rules:{fault}"]
        assert row["prefill_tok_s"] is None and row["repeats"] == 0
        return row["status"], row["detail"]

    status, detail = told("Raises")
    assert status == "compile-error" and "planted_rules:Raises" in detail and "cannot count" in detail
    status, detail = told("Aborts")
    assert status == "crash" and "SIGABRT" in detail and "in apply (planted_rules.py:" in detail
    status, detail = told("WrongNumbers")
    assert status == "wrong-result" and "prefill" in detail and "allowed 0.001" in detail
    status, detail = told("Hangs")
    assert status == "timeout" and "in apply (planted_rules.py:" in detail and "25 s" in detail
    full = faulty["full"]
    assert full["status"] == "ok" and full["repeats"] == 3 and full["prefill_tok_s"] > 0 and full["decode_tok_s"] > 0
    assert full["difference"] < 1e-4


@pytest.mark.heavy
def test_the_same_code_is_compiled_and_timed_once(faulty: dict[str, dict[str, Any]], folder: Path) -> None:
    row, full = faulty["with-planted_rules:TakesNothing"], faulty["full"]
    assert row["same_code_as"] == "full" and row["code"] == full["code"] and row["compile_s"] is None
    assert row["prefill_tok_s"] == full["prefill_tok_s"] and row["hits"] == full["hits"]
    assert row["rules"][0] == "planted_rules:TakesNothing"
    artifacts = list((folder / "artifacts/ablation/cache").glob("*/manifest.json"))
    assert len(artifacts) == 2  # full and WrongNumbers: the others never became code
    weights = [next((a.parent / "params").glob("*.bin")) for a in artifacts]
    assert weights[0].samefile(weights[1])  # one copy of the weights


@pytest.mark.heavy
def test_reports_need_no_device(faulty: dict[str, Any], folder: Path, tiny_model: Path) -> None:
    before = (folder / JOURNAL).read_bytes()
    sets = "full,only-planted_rules:Raises,with-planted_rules:TakesNothing"
    done = run(folder, tiny_model, "--sets", sets, "--report", "--figure", "f.png", "--compare", "full,full")
    assert done.returncode == 0, done.stderr
    assert "compile-error: rule planted_rules:Raises" in done.stdout and "No function moved" in done.stdout
    assert (folder / "f.png").is_file() and "compile-error" in (folder / "f.svg").read_text()
    other = run(folder, tiny_model, "--sets", "full", "--report", "--target", "webgpu")
    assert_one_line(other, "holds target cpu, not webgpu")
    assert (folder / JOURNAL).read_bytes() == before


@pytest.mark.heavy
def test_other_records_are_refused(faulty: dict[str, Any], folder: Path, tiny_model: Path) -> None:
    before = (folder / JOURNAL).read_bytes()
    done = run(folder, tiny_model, "--sets", "full", "--prompt-tokens", "13")
    assert_one_line(done, "another number of prompt tokens", "--fresh")
    lines = before.splitlines(keepends=True)
    header = {**json.loads(lines[0]), "device": "another machine's"}
    (folder / JOURNAL).write_bytes(json.dumps(header, separators=(",", ":")).encode() + b"\n" + b"".join(lines[1:]))
    try:
        assert_one_line(run(folder, tiny_model, "--sets", "full"), "another device (another machine's", "--fresh")
    finally:
        (folder / JOURNAL).write_bytes(before)


@pytest.mark.heavy
def test_a_loop_outside_any_thread_is_named(tiny_model: Path, tmp_path: Path) -> None:
    job = Job(str(tiny_model), "webgpu", cache=str(tmp_path))
    outcome = run_once("unbound", ablation_work.build, job, "planted_rules:Unbound", "x", timeout_s=600.0)
    assert outcome.status == "unbound-thread", outcome.detail
    assert "planted_rules:Unbound left" in outcome.detail and "forget to bind" in outcome.detail


def samples(journal: Path) -> list[tuple[str, int]]:
    """(code, round) of every whole sample line."""
    lines = journal.read_bytes().split(b"\n")[:-1] if journal.exists() else []
    rows = [json.loads(line) for line in lines]
    return [(row["code"], row["round"]) for row in rows if row.get("kind") == "sample"]


def wait_for(journal: Path, count: int, process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 600
    while len(samples(journal)) < count:
        assert process.poll() is None, "it ended too early"
        assert time.monotonic() < end
        time.sleep(0.1)


@pytest.mark.heavy
@pytest.mark.parametrize(("target", "repeats"), [("cpu", 12), ("webgpu", 6)])
def test_interrupted_and_killed_it_goes_on(target: str, repeats: int, tiny_model: Path, tmp_path: Path) -> None:
    """SIGINT, then SIGKILL, then to its end: every (code, round) is measured once, and what was written stays."""
    if target == "webgpu":
        device()
    arguments = ("--target", target, "--sets", "baseline,full", "--repeats", str(repeats), "--budget", "600")
    journal = tmp_path / JOURNAL
    left: list[tuple[str, int]] = []
    for number, upto in ((signal.SIGINT, 3), (signal.SIGKILL, 9)):
        process = subprocess.Popen(
            command(tiny_model, *arguments), cwd=tmp_path, env=environment(), stderr=subprocess.PIPE, text=True
        )
        wait_for(journal, upto, process)
        children = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(number)
        _, said = process.communicate(timeout=60)
        assert process.returncode == (130 if number == signal.SIGINT else -number)
        if number == signal.SIGINT:
            assert "goes on from there" in said and "Traceback" not in said
        assert children and not psutil.wait_procs(children, timeout=20)[1]
        found = samples(journal)
        assert upto <= len(found) < 2 * repeats and found[: len(left)] == left
        left = found
        assert not (tmp_path / RECORDS).exists()
    before = journal.read_bytes()
    done = run(tmp_path, tiny_model, *arguments)
    assert done.returncode == 0, done.stderr
    whole = before[: before.rfind(b"\n") + 1]
    assert journal.read_bytes().startswith(whole)
    counts = Counter(samples(journal))
    assert set(counts.values()) == {1} and len(counts) == 2 * repeats
    lines = [json.loads(line) for line in journal.read_text().splitlines()]
    kinds = Counter(line["kind"] for line in lines[1:])
    assert kinds == {"set": 2, "check": 2, "sample": 2 * repeats, "run": 2}  # the killed run had no time to say
    rows = json.loads((tmp_path / RECORDS).read_text())["rows"]
    assert [row["repeats"] for row in rows] == [repeats, repeats]
    if target == "cpu":  # and once more: nothing is left to do, whatever the device
        before = journal.read_bytes()
        assert run(tmp_path, tiny_model, *arguments).returncode == 0
        assert journal.read_bytes() == before
    assert Journal.read(journal).header["model"] == "tiny"


def rows_of(done: subprocess.CompletedProcess[str]) -> dict[str, dict[str, Any]]:
    assert done.returncode == 0, done.stderr
    return {row["set"]: row for row in json.loads(done.stdout)["rows"]}


@pytest.mark.heavy
def test_on_a_webgpu_device_with_times_of_functions(tiny_model: Path, tmp_path: Path) -> None:
    device()
    arguments = ("--target", "webgpu", "--sets", "baseline,only-matmul", "--repeats", "2", "--functions")
    rows = rows_of(run(tmp_path, tiny_model, *arguments, "--format", "json"))
    for row in rows.values():
        assert row["status"] == "ok" and row["prefill_tok_s"] > 0 and row["decode_tok_s"] > 0
        for phase in ("prefill", "decode"):
            shares = [share.get(phase, 0.0) for share in row["shares"].values()]
            assert sum(shares) == pytest.approx(1) and row["shares"]["ours"][phase] > 0
    assert "matmul" not in rows["baseline"]["hits"] and rows["only-matmul"]["shares"]["matmul"]["prefill"] > 0
    assert list(tmp_path.rglob("kernels.json")) and not list(tmp_path.rglob("model.wasm"))  # wgpu has no use for it
    assert list(tmp_path.rglob("kernels.software.wgsl")) and not list(tmp_path.rglob("kernels.swiftshader.wgsl"))
    done = run(tmp_path, tiny_model, *arguments, "--report", "--compare", "baseline,only-matmul")
    assert "prefill us, only-matmul" in done.stdout and " % / " in done.stdout


@pytest.mark.heavy
def test_through_rpc(tiny_model: Path, tmp_path: Path) -> None:
    with tracker() as port, server("bench", port):
        where = ("--tracker", f"127.0.0.1:{port}", "--key", "bench")
        rows = rows_of(
            run(tmp_path, tiny_model, "--sets", "baseline,full", "--repeats", "2", *where, "--format", "json")
        )
    assert [row["status"] for row in rows.values()] == ["ok", "ok"] and rows["full"]["repeats"] == 2
    assert f"127.0.0.1:{port}" in Journal.read(tmp_path / JOURNAL).header["device"]


@pytest.mark.heavy
def test_static_needs_no_device(tiny_model: Path, tmp_path: Path) -> None:
    sets = "baseline,full,only-planted_rules:Raises"
    done = run(tmp_path, tiny_model, "--target", "webgpu", "--sets", sets, "--static", "--format", "json")
    rows = rows_of(done)
    assert rows["only-planted_rules:Raises"]["status"] == "compile-error"
    for name in ("baseline", "full"):
        assert rows[name]["launches_token"] > 0 and sum(rows[name]["hits"].values()) == rows[name]["functions"]
    assert set(rows["baseline"]["hits"]) == {"ours", "fallback"}
    assert not (tmp_path / JOURNAL).exists()


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (("--sets", "only-nonsense"), "nonsense"),
        (("--sets", ","), "--sets ',' names nothing"),
        (("--rule", "cpu-gemv"), "MODULE:CLASS"),
        (("--target", "gpu"), "no target"),
        (("--quantization", "q9"), "q9"),
        (("--attention", "none"), "unknown attention"),
        (("--runner", "wgpu"), "--runner wgpu cannot run"),
        (("--prompt-tokens", "47"), "positions for 48"),
        (("--repeats", "0"), "--repeats 0"),
        (("--format", "html"), "html"),
        (("--figure", "a.pdf"), "a.pdf"),
        (("--compare", "full"), "--compare full"),
        (("--compare", "full,only-x"), "only-x is not among the sets"),
        (("--report",), "no records"),
        (("--full-factorial", "--factors", "nonsense"), "nonsense"),
        (("--reference", "onnx"), "onnx"),
        (("--device", "cuda"), "--device cuda"),
        (("--target", "rocm"), "--static"),
        (("--tracker", "127.0.0.1:9190"), "--key"),
    ],
)
def test_mistakes_cost_one_line(arguments: tuple[str, ...], part: str, tiny_model: Path, tmp_path: Path) -> None:
    assert_one_line(run_here(*command(tiny_model, *arguments)[2:], folder=tmp_path), part)
    assert not (tmp_path / RECORDS).exists() and not (tmp_path / JOURNAL).exists()


def test_a_result_without_its_journal_is_not_overwritten(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / RECORDS).write_text("{}")
    line = command(tiny_model, "--sets", "full")[2:]
    assert_one_line(run_here(*line, folder=tmp_path), "without its journal", "--fresh")
    assert_one_line(run_here(*line, "--report", folder=tmp_path), "no result")
    assert (tmp_path / RECORDS).read_text() == "{}"
