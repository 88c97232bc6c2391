"""The parts of benchmarks/gpu.py beside the timed ones, on the CPU: kernels alone, many replays, and a
compute-sanitizer that is a script."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gpt2_tvm import Engine

torch = pytest.importorskip("torch", reason="pip install 'gpt2-tvm[reference]'")

pytestmark = pytest.mark.usefixtures("gpu_bench")


@pytest.fixture(scope="module")
def path(gpu_kit: Path) -> Path:
    return gpu_kit / "artifacts" / "tiny-q0f32-full"


def test_kernels_alone(path: Path, tmp_path: Path) -> None:
    from gpu_bench.kernels import kernels_of
    from gpu_bench.report import render

    row = kernels_of(path, "cpu", (1, 2, 64), 20, 2, 100.0)  # not made for 64
    assert row["ok"] and row["head"]["us"] > 0 and row["head"]["share"] == pytest.approx(row["head"]["gb_s"] / 100)
    shapes = [(p["product"], p["m"], p["n"], p["k"]) for p in row["products"]]
    sizes = {"attn.c_attn": (96, 32), "attn.c_proj": (32, 32), "mlp.c_fc": (128, 32), "mlp.c_proj": (32, 128)}
    assert sorted(shapes) == sorted((name, rows, *size) for name, size in sizes.items() for rows in (20, 40))
    assert all(p["ratio"] == pytest.approx(p["torch_us"] / p["us"]) for p in row["products"])
    (tmp_path / "kernels.json").write_text(json.dumps({"rows": [{"artifact": "tiny", **row}]}))
    assert "| mlp.c_fc" in render(tmp_path)


def test_replays_count_other_ids_and_growth(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gpu_bench import replays

    row = replays.replays_of(path, "cpu", 200)
    assert row["ok"] and row["tokens"] >= 200 and row["stretches_with_other_ids"] == 0

    grown = iter([(0.0, 100.0), (0.0, 200.0)])
    monkeypatch.setattr(replays, "memory_mb", lambda device: next(grown))
    assert not replays.replays_of(path, "cpu", 200)["ok"]
    monkeypatch.undo()

    decode, calls = Engine.decode_greedy, []

    def other(self: Any, n: int, first: Any = None) -> Any:
        calls.append(n)
        found = decode(self, n, first)
        return found + 1 if len(calls) == 3 else found

    monkeypatch.setattr(Engine, "decode_greedy", other)
    row = replays.replays_of(path, "cpu", 200)
    assert not row["ok"] and row["stretches_with_other_ids"] == 1


def test_a_part_keeps_what_is_right_and_tries_the_rest_again(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gpu_bench import pieces
    from gpu_bench.replays import replays_part

    answers = [(None, {"failure": "timeout", "message": "planted"}), ({"ok": True}, {}), ({"ok": True}, {})]
    monkeypatch.setattr(pieces, "alone", lambda *arguments: answers.pop(0))

    def part(count: int) -> list[str]:
        return replays_part([path], count, "cpu", 60, tmp_path)

    assert part(9) == ["tiny-q0f32-full: timeout, planted"]
    assert part(9) == [] and part(9) == [] and len(answers) == 1
    assert part(10) == [] and not answers  # another question
    assert replays_part([path], 11, "cpu", -1.0, tmp_path) == [
        "no time for tiny-q0f32-full; the same command goes on from here"
    ]


def test_a_part_answers_for_what_it_was_asked(path: Path, tmp_path: Path) -> None:
    """Another artifact's failure stays in the table; a programme's own change alone makes its rows old."""
    from gpu_bench.crew import Clock
    from gpu_bench.pieces import Piece, complaints, origin, work_through
    from gpu_bench.runs import sources

    other = {"artifact": "other", "ok": False, "failure": "timeout", "message": "planted"}
    file = tmp_path / "part.json"
    file.write_text(json.dumps({"rows": [other]}))
    wrong = {"ok": False, "failure": "", "message": ""}
    pieces = [Piece(origin(path, "cpu", ("kernels",)), lambda left: wrong)] * 2
    found = work_through(file, pieces, Clock(60))
    assert complaints(found, pieces) == ["tiny-q0f32-full: wrong, see the table"] and not found["complete"]
    assert [row["artifact"] for row in found["rows"]] == ["other", "tiny-q0f32-full"]
    found = work_through(file, pieces, Clock(-1.0))  # what failed before is only named as left
    assert complaints(found, pieces) == ["no time for tiny-q0f32-full; the same command goes on from here"]
    assert sources(("kernels",)) != sources(("replays",)) and pieces[0].about == origin(path, "cpu", ("kernels",))


def test_weights_are_made_within_all_of_the_time(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what they are for within its own."""
    from gpu_bench import pieces

    limits: list[float] = []

    def alone(label: str, limit_s: float, *rest: Any) -> tuple[Any, dict[str, str]]:
        limits.append(limit_s)
        return {"ok": True}, {}

    monkeypatch.setattr(pieces, "alone", alone)
    monkeypatch.setattr(pieces, "has_weights", lambda given: False)
    assert pieces.in_its_process(path, 400.0, dict, each_s=20.0)["ok"] and limits == [400.0, 20.0]


FAKE = """#!{python}
import subprocess, sys, time
tool, command = sys.argv[2], sys.argv[sys.argv.index("86") + 1 :]
if tool == "hang":
    subprocess.run(["sleep", "600"])
if tool == "racecheck":
    print("========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)")
    sys.exit(86)
print("========= ERROR SUMMARY: 0 errors")
sys.exit(subprocess.run(command).returncode)
"""


def test_a_sanitizer_that_is_there_and_one_that_is_not(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gpu_bench import sanitizer
    from gpu_bench.report import render

    monkeypatch.setattr(sanitizer, "find_sanitizer", lambda: None)
    assert sanitizer.sanitizer_part([path], ["memcheck"], 60, tmp_path) == []
    assert "compute-sanitizer is not on PATH" in render(tmp_path)
    fake = tmp_path / "compute-sanitizer"
    fake.write_text(FAKE.format(python=sys.executable))
    fake.chmod(0o755)
    monkeypatch.setattr(sanitizer, "find_sanitizer", lambda: str(fake))
    monkeypatch.setattr(sanitizer, "SANITIZER_S", 120.0)
    lines = sanitizer.sanitizer_part([path], ["memcheck", "racecheck"], 300, tmp_path)
    assert lines == ["racecheck of tiny-q0f32-full: error, RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)"]
    text = render(tmp_path)
    assert "ERROR SUMMARY: 0 errors" in text and text.count("FAILED") == 1
    assert sanitizer.sanitized(str(fake), "hang", path, 2.0)["failure"] == "timeout"


def test_bytes_of_arguments() -> None:
    from gpu_bench.kernels import nbytes

    assert nbytes(SimpleNamespace(shape=(3, 4), dtype="float16")) == 24 and nbytes(7) == 0
