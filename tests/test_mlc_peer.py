"""compile --pipeline mlc_llm: what is asked of an mlc_llm that is installed, here a stand-in that writes down its
commands, and what is said where there is none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from gpt2_tvm import compile as compile_command
from gpt2_tvm.checkpoint import random_model
from gpt2_tvm.config import GPT2Config
from gpt2_tvm.errors import UserError
from gpt2_tvm.mlc.peer import compile_with_mlc_llm
from gpt2_tvm.weights import write_hf_checkpoint

STAND_IN = """
import json, os, pathlib, sys
log = pathlib.Path(os.environ["STAND_IN_LOG"])
log.write_text((log.read_text() if log.exists() else "") + json.dumps(sys.argv[1:]) + "\\n")
command, output = sys.argv[1], pathlib.Path(sys.argv[sys.argv.index("--output") + 1])
if os.environ.get("STAND_IN_FAILS") == command:
    sys.exit("a Target is missing")
if command == "gen_config":
    (output / "mlc-chat-config.json").write_text("{}")
if command == "compile":
    output.write_bytes(b"library")
"""


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    package = tmp_path / "packages" / "mlc_llm"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "__main__.py").write_text(STAND_IN)
    monkeypatch.syspath_prepend(str(package.parent))
    monkeypatch.setenv("PYTHONPATH", str(package.parent))
    monkeypatch.setenv("STAND_IN_LOG", str(tmp_path / "log"))
    return tmp_path / "log"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    config = GPT2Config(vocab_size=300, n_positions=48, n_embd=32, n_layer=1, n_head=2)
    return write_hf_checkpoint(tmp_path / "small", config, random_model(config, seed=1))


def test_without_it_one_line_says_where_it_is(tmp_path: Path) -> None:
    options = ["--model", "bundled", "--pipeline", "mlc_llm", "--output", str(tmp_path / "out")]
    result = CliRunner().invoke(compile_command.app, options)
    assert isinstance(result.exception, UserError)
    assert "not installed" in str(result.exception) and "https://" in str(result.exception)
    assert "\n" not in str(result.exception) and not (tmp_path / "out").exists()
    wrong = CliRunner().invoke(compile_command.app, ["--pipeline", "mlc"])
    assert "gpt2_tvm or mlc_llm" in str(wrong.exception)


@pytest.mark.parametrize(
    ("target", "library"), [("cpu", "small-q4f16_1-cpu.so"), ("webgpu", "small-q4f16_1-webgpu.wasm")]
)
def test_three_commands_make_the_folder(log: Path, checkpoint: Path, tmp_path: Path, target: str, library: str) -> None:
    out = tmp_path / "out"
    said = compile_with_mlc_llm(str(checkpoint), target, "q4f16_1", out, 40)
    assert library in said and (out / library).read_bytes() == b"library"
    convert, configure, build = (json.loads(line) for line in log.read_text().splitlines())
    assert convert[:2] == ["convert_weight", str(checkpoint)] and "q4f16_1" in convert
    assert configure[0] == "gen_config" and configure[configure.index("--context-window-size") + 1] == "40"
    assert configure[configure.index("--conv-template") + 1] == "gpt2"
    assert build[0] == "compile" and build[build.index("--device") + 1] == target


def test_what_it_cannot_take(log: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="not mlc_llm's"):
        compile_with_mlc_llm(str(checkpoint), "cpu", "q8f32", tmp_path / "out", None)
    monkeypatch.setenv("STAND_IN_FAILS", "compile")
    with pytest.raises(UserError, match=r"mlc_llm compile failed \(a Target is missing\)"):
        compile_with_mlc_llm(str(checkpoint), "cpu", "q0f16", tmp_path / "out", None)
    assert not (tmp_path / "out").exists()
