"""The ablation, and the times of functions, in node: a page's runtime, driven the same way."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import web_tools
from typer.testing import CliRunner
from web_models import compile_for_the_web

from gpt2_tvm.errors import UserError
from tuning import ablation
from tuning.measure.functions import time_functions


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--target", "cpu", "--runner", "chromium"], "cannot run code for cpu; that takes vm"),
        (["--target", "webgpu", "--runner", "vm"], "that takes wgpu or node or chromium"),
        (
            ["--target", "webgpu", "--runner", "node", "--device", "webgpu:1"],
            "give one of them; node chooses its device",
        ),
    ],
)
def test_a_runner_fits_its_target(tiny_model: Path, arguments: list[str], told: str) -> None:
    done = CliRunner().invoke(ablation.app, ["--model", str(tiny_model), *arguments])
    assert isinstance(done.exception, UserError) and told in str(done.exception)


@pytest.mark.heavy
def test_rule_sets_are_compared_in_node(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    web_tools.emcc()
    web_tools.dawn_device()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    sizes = ["--prompt-tokens", "10", "--generate", "6", "--repeats", "2", "--budget", "0"]
    what = [
        "--target",
        "webgpu",
        "--runner",
        "node",
        "--attention",
        "materialized",
        "--sets",
        "baseline,only-reduction",
    ]
    done = CliRunner().invoke(
        ablation.app, ["--model", str(tiny_model), *what, *sizes, "--reference", "cpu", "--no-functions"]
    )
    assert done.exception is None, done.output
    (file,) = (tmp_path / "artifacts/ablation").glob("*-webgpu-materialized-node.json")
    result = json.loads(file.read_text())
    rows = result["rows"]
    assert [row["status"] for row in rows] == ["ok", "ok"] and "Dawn" in json.dumps(result["identity"])
    assert all(row["decode_tok_s"] > 0 for row in rows)


@pytest.mark.heavy
def test_functions_are_timed_by_the_page(tiny_model: Path, tmp_path: Path) -> None:
    choices = {"rules": "baseline", "attention": "materialized"}
    made = compile_for_the_web(str(tiny_model), tmp_path / "tiny", **choices)
    web_tools.dawn_device()
    times = time_functions(made, ["decode_b1"], prompt_tokens=10, repeats=2, device="node")
    listed = json.loads((made / "kernels.json").read_text())["functions"]["decode_b1"]["launches"]
    assert 0 < sum(one.calls for one in times.values()) <= len(listed)
    assert all(one.time_us > 0 for one in times.values()) and times.calls["decode_b1"].coverage > 0
    assert "timestamps" in times.calls["decode_b1"].method
