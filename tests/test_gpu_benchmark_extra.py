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

    row = kernels_of(path, "cpu", 20, 2, 100.0)
    assert row["ok"] and row["head"]["us"] > 0 and row["head"]["share"] == pytest.approx(row["head"]["gb_s"] / 100)
    shapes = {p["product"]: (p["m"], p["n"], p["k"]) for p in row["products"]}
    assert shapes == {
        "attn.c_attn": (20, 96, 32),
        "attn.c_proj": (20, 32, 32),
        "mlp.c_fc": (20, 128, 32),
        "mlp.c_proj": (20, 32, 128),
    }
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
