"""The parts of benchmarks/gpu.py beside the timed ones, on the CPU: kernels alone, many replays, and a
compute-sanitizer that is a script."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gpt2_tvm import Engine, compile_model
from gpt2_tvm.checkpoint import random_model
from gpt2_tvm.config import GPT2Config
from gpt2_tvm.weights import write_hf_checkpoint

torch = pytest.importorskip("torch", reason="pip install 'gpt2-tvm[reference]'")

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
CONFIG = GPT2Config(vocab_size=97, n_positions=48, n_embd=32, n_layer=2, n_head=2)


@pytest.fixture(autouse=True, scope="module")
def _importable() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpu-extra")
    write_hf_checkpoint(folder / "tiny", CONFIG, random_model(CONFIG, seed=1))
    return compile_model(str(folder / "tiny"), "cpu", output=folder / "tiny-q0f32-full", rules="baseline")


def test_kernels_alone(path: Path, tmp_path: Path) -> None:
    from gpu_bench.extra import kernels_of
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
    from gpu_bench import extra

    row = extra.replays_of(path, "cpu", 200)
    assert row["ok"] and row["tokens"] >= 200 and row["stretches_with_other_ids"] == 0

    grown = iter([(0.0, 100.0), (0.0, 200.0)])
    monkeypatch.setattr(extra, "memory_mb", lambda device: next(grown))
    assert not extra.replays_of(path, "cpu", 200)["ok"]
    monkeypatch.undo()

    decode, calls = Engine.decode_greedy, []

    def other(self: Any, n: int, first: Any = None) -> Any:
        calls.append(n)
        found = decode(self, n, first)
        return found + 1 if len(calls) == 3 else found

    monkeypatch.setattr(Engine, "decode_greedy", other)
    row = extra.replays_of(path, "cpu", 200)
    assert not row["ok"] and row["stretches_with_other_ids"] == 1


def test_a_part_keeps_what_is_right_and_tries_the_rest_again(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gpu_bench import extra

    answers = [(None, {"failure": "timeout", "message": "planted"}), ({"ok": True}, {}), ({"ok": True}, {})]
    monkeypatch.setattr(extra, "alone", lambda *arguments: answers.pop(0))

    def part(count: int) -> list[str]:
        return extra.replays_part([path], count, "cpu", 60, tmp_path)

    assert part(9) == ["tiny-q0f32-full: planted"]
    assert part(9) == [] and part(9) == [] and len(answers) == 1
    assert part(10) == [] and not answers  # another question
    assert extra.replays_part([path], 11, "cpu", -1.0, tmp_path) == [
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
    from gpu_bench import extra
    from gpu_bench.report import render

    monkeypatch.setattr(extra, "find_sanitizer", lambda: None)
    assert extra.sanitizer_part([path], ["memcheck"], 60, tmp_path) == []
    assert "compute-sanitizer is not on PATH" in render(tmp_path)
    fake = tmp_path / "compute-sanitizer"
    fake.write_text(FAKE.format(python=sys.executable))
    fake.chmod(0o755)
    monkeypatch.setattr(extra, "find_sanitizer", lambda: str(fake))
    monkeypatch.setattr(extra, "SANITIZER_S", 120.0)
    lines = extra.sanitizer_part([path], ["memcheck", "racecheck"], 300, tmp_path)
    assert lines == ["racecheck of tiny-q0f32-full: error, RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)"]
    text = render(tmp_path)
    assert "ERROR SUMMARY: 0 errors" in text and text.count("FAILED") == 1
    assert extra.sanitized(str(fake), "hang", path, 2.0)["failure"] == "timeout"


def test_bytes_of_arguments() -> None:
    from gpu_bench.extra import nbytes

    assert nbytes(SimpleNamespace(shape=(3, 4), dtype="float16")) == 24 and nbytes(7) == 0
