"""The gap between native code and WebGPU: its arithmetic, and one run over both on a small model.

No test asserts a timing.
"""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import web_tools
from typer.testing import CliRunner
from web_models import compile_for_the_web

from gpt2_tvm.artifact import open_artifact
from gpt2_tvm.errors import UserError
from gpt2_tvm.measure.cases import Case
from tuning import gap
from tuning.gap_subjects import Anatomy
from tuning.gap_table import ROW_KEYS, make_row, render

CASE = Case(1, 10, 4)
MANIFEST = {"model": "m", "quantization": "q0f32", "target": {"name": "webgpu"}}
ARTIFACT: Any = SimpleNamespace(manifest=MANIFEST)


def anatomy(scale: float, kernels_s: float | None = 0.25, tokens: tuple[int, ...] = (1, 2, 3, 4)) -> Anatomy:
    return Anatomy(2.0 * scale, 4.0 * scale, 6.0 * scale, 0.75, 0.5, kernels_s, 50, tokens)


def test_a_row_takes_a_step_apart() -> None:
    native = [anatomy(1.0), anatomy(1.0), anatomy(2.0)]
    samples = [anatomy(2.0, tokens=(1, 2, 7, 4)), anatomy(4.0, tokens=(1, 2, 7, 4)), anatomy(8.0, tokens=(1, 2, 7, 4))]
    row = make_row(ARTIFACT, "node", "a device", CASE, samples, native)
    assert set(row) == set(ROW_KEYS)
    assert row["prefill_tok_s"] == 10 / 8 and row["decode_tok_s"] == 4 / 16 and row["stream_tok_s"] == 4 / 24
    assert row["step_kernels_ms"] == 250 and row["dispatch_ms"] == 500 and row["dispatch_us"] == 10_000
    assert row["sync_ms"] == 1e3 * (24 - 16) / 4
    assert row["prefill_ratio"] == row["decode_ratio"] == 1 / 4  # of 1/2, 1/4, 1/4: round by round
    assert row["decode_ratio_sd"] > 0 and row["same_tokens"] == 2 and row["kernels"] == 50


def test_a_device_without_timestamps_leaves_its_columns_empty() -> None:
    samples = [anatomy(1.0, None), anatomy(1.0, None)]
    row = make_row(ARTIFACT, "browser:1", "a device", CASE, samples, samples)
    assert row["step_kernels_ms"] is row["dispatch_ms"] is row["dispatch_us_sd"] is None
    assert row["sync_ms"] == 500 and row["decode_ratio"] == 1
    result = {"complete": True, "rows": [row], "failures": []}
    (line,) = csv.DictReader(io.StringIO(render(result, "csv")))
    assert list(line) == list(ROW_KEYS) and line["dispatch_ms"] == "" and float(line["sync_ms"]) == 500
    assert json.loads(render(result, "json")) == result
    table = render(result, "md").splitlines()
    assert table[0].count("|") == table[2].count("|") and "webgpu in browser:1" in table[2]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--format", "xml"], "choose md, csv, json"),
        (["--repeats", "0"], "at least 1 round counts"),
        (["--runner", "firefox"], "choose wgpu, node, chromium or browser:PORT"),
        (["--runner", "node:1"], "choose wgpu, node, chromium or browser:PORT"),
        (["--web", "NATIVE"], "the second WebGPU"),
    ],
)
def test_wrong_words_are_one_line(tiny_artifact: Path, arguments: list[str], told: str) -> None:
    web = SimpleNamespace(**{**vars(open_artifact(tiny_artifact)), "kind": "webgpu"})
    known = {"NATIVE": open_artifact(tiny_artifact), "WEB": web}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gap, "_artifact", lambda name, *_: known[name])
        done = CliRunner().invoke(gap.app, ["--native", "NATIVE", "--web", "WEB", *arguments])
    assert isinstance(done.exception, UserError) and told in str(done.exception) and "\n" not in str(done.exception)


@pytest.fixture(scope="module")
def small(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("web") / "tiny"
    return compile_for_the_web(str(tiny_model), folder, rules="baseline", attention="materialized")


@pytest.mark.heavy
def test_native_wgpu_and_node_side_by_side(tiny_artifact: Path, small: Path, tmp_path: Path) -> None:
    pytest.importorskip("wgpu", reason="PyPI's wgpu is missing")
    web_tools.dawn_device()
    file = tmp_path / "gap.json"
    arguments = ["--native", tiny_artifact, "--web", small, "--runner", "wgpu,node", "--json", file]
    sizes = ["--prompt-tokens", 10, "--generate", 6, "--repeats", 2, "--warmup", 0, "--format", "csv"]
    done = CliRunner().invoke(gap.app, [str(a) for a in (*arguments, *sizes)])
    assert done.exception is None, done.output
    rows = json.loads(file.read_text())["rows"]
    assert [row["runner"] for row in rows] == ["native", "wgpu", "node"]
    launches = len(json.loads((small / "kernels.json").read_text())["functions"]["decode_b1"]["launches"])
    assert rows[1]["kernels"] == rows[2]["kernels"] == launches and rows[0]["kernels"] > 5
    for row in rows:
        assert row["same_tokens"] == 6 and row["repeats"] == 2 and row["step_kernels_ms"] > 0
    assert rows[0]["decode_ratio"] == 1 and "Dawn" in rows[2]["device"]
    assert len(list(csv.DictReader(io.StringIO(done.stdout)))) == 3


@pytest.mark.heavy
def test_the_benchmark_runs_what_runner_names(tiny_artifact: Path, small: Path, tmp_path: Path) -> None:
    from gpt2_tvm import benchmark

    web_tools.dawn_device()
    file = tmp_path / "r.json"
    sizes = ["--prompt-tokens", 10, "--generate", 6, "--repeats", 2, "--warmup", 0, "--format", "jsonl", "--json", file]
    done = CliRunner().invoke(benchmark.app, [str(a) for a in (tiny_artifact, small, "--runner", "node", *sizes)])
    assert done.exception is None, done.output
    rows = json.loads(file.read_text())["rows"]
    assert [row["runner"] for row in rows] == [None, "node"] and rows[1]["peak_rss_mb"] > 50
    assert all(row["decode_tok_s"] > 0 for row in rows) and "Dawn" in rows[1]["device"]
    with pytest.raises(UserError, match="--runner node decodes one sequence at a time"):
        benchmark.main([small], runner="node", batch="2", prompt_tokens="4", generate="4")
    with pytest.raises(UserError, match="runs webgpu artifacts, and there is none here"):
        benchmark.main([tiny_artifact], runner="node", prompt_tokens="4", generate="4")
