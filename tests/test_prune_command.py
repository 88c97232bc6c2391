"""`python -m gpt2_tvm.prune`: once, gradual, sweep; and what a sweep's figures are."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gpt2_tvm.checkpoint import resolve_model
from gpt2_tvm.errors import UserError
from gpt2_tvm.pruning import figures, sweep

COMMAND = [sys.executable, "-m", "gpt2_tvm.prune"]
TEXT = "It is a truth universally acknowledged, that a single man in possession of a good fortune must be in want. "


def prune(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *map(str, arguments)], capture_output=True, text=True, timeout=900)


def fault(*arguments: object) -> str:
    """The one line of the error that the command ends with."""
    from typer.testing import CliRunner

    from gpt2_tvm.prune import app

    done = CliRunner().invoke(app, [str(part) for part in arguments])
    assert isinstance(done.exception, UserError), done.output
    assert "\n" not in str(done.exception)
    return str(done.exception)


def test_once_writes_a_checkpoint(tmp_path: Path) -> None:
    out = tmp_path / "half"
    done = prune("once", "--model", "bundled", "--method", "mlp", "--output", out, "--json", tmp_path / "r.json")
    assert done.returncode == 0, done.stderr
    made, told = resolve_model(str(out)), json.loads((tmp_path / "r.json").read_text())
    assert made.config.n_inner == 512 and set(told["inner"]) == {512}
    assert told["parameters"] == made.config.num_parameters() and f"{told['parameters']:,}" in done.stdout
    assert (out / "vocab.json").is_file() and (out / "merges.txt").is_file()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("once", "--model", "bundled", "--output", "{}/x", "--share", "1.5"), "--share 1.5"),
        (("once", "--model", "bundled", "--output", "{}/x", "--method", "width"), "choose of magnitude"),
        (("once", "--model", "{}/none", "--output", "{}/x"), "none"),
        (("once", "--model", "bundled", "--output", "{}/x", "--dtype", "int8"), "--dtype"),
        (("sweep", "--model", "bundled", "--shares", "0.5,2"), "--shares"),
        (("sweep", "--model", "bundled", "--shares", "half"), "--shares"),
        (("sweep", "--model", "bundled", "--method", "mlp+width"), "choose of"),
        (("sweep", "--model", "bundled", "--text", "{}/none"), "there is no file"),
        (("sweep", "--model", "bundled", "--figure", "a.gif"), "a PNG and an SVG"),
        (("gradual", "--model", "bundled", "--output", "{}/x", "--text", "{}/none"), "there is no file"),
        (("gradual", "--model", "bundled", "--output", "{}/x", "--text", "{}/t", "--step", "0"), "--share 0"),
        (("gradual", "--model", "bundled", "--output", "{}/x", "--text", "{}/t", "--least", "2"), "--least 2"),
    ],
)
def test_faults_are_one_line(arguments: tuple[str, ...], says: str, tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="needs pip install 'gpt2-tvm[reference]'")
    assert says in fault(
        *(part.format(tmp_path) for part in arguments), *(("--cache", tmp_path) if arguments[0] == "sweep" else ())
    )


@pytest.mark.heavy
def test_gradual_on_the_command_line(tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="needs pip install 'gpt2-tvm[reference]'")
    (tmp_path / "text").write_text(TEXT * 40)
    sizes = ("--context", 32, "--steps", 2, "--batch", 1, "--windows", 2)
    course = ("--method", "mlp,heads", "--step", 0.25, "--least", 0.4, "--until-loss", 50)
    done = prune(
        *("gradual", "--model", "bundled", "--text", tmp_path / "text", "--output", tmp_path / "out"),
        *(*sizes, *course, "--json", tmp_path / "r.json"),
    )
    assert done.returncode == 0, done.stderr
    told = json.loads((tmp_path / "r.json").read_text())
    assert [row["share"] for row in told["rounds"]] == [0.25, 0.5] and told["best"] == 2
    config = resolve_model(str(tmp_path / "out")).config
    assert [config.heads(i) for i in range(6)] == [2] * 6 and config.n_inner == 512
    assert "is round 2" in done.stdout


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("sweep")
    (folder / "text").write_text(TEXT * 10)
    sizes = ("--prompt-tokens", 4, "--generate", 4, "--repeats", 1, "--warmup", 0, "--threads", 1)
    line = ("sweep", "--model", "bundled", "--method", "mlp,magnitude", "--shares", "0.5", "--text", folder / "text")
    done = prune(*line, *sizes, "--cache", folder / "c", "--json", folder / "r.json", "--figure", folder / "f.png")
    assert done.returncode == 0, done.stderr
    assert (folder / "f.png").is_file() and (folder / "f.svg").is_file()
    return json.loads((folder / "r.json").read_text())


@pytest.mark.heavy
def test_a_sweep_measures_each_beside_the_whole(swept: dict[str, Any]) -> None:
    whole, mlp, magnitude = swept["rows"]
    assert [row["methods"] for row in swept["rows"]] == ["whole", "mlp", "magnitude"]
    config = resolve_model("bundled").config
    cut = 6 * (2 * 256 * 512 + 512)  # half of both matrices and of the bias
    assert mlp["kept"] == pytest.approx(1 - cut / config.num_parameters())
    assert whole["step_mb"] - mlp["step_mb"] == pytest.approx(4 * cut / 1e6, rel=0.01)
    assert mlp["size_mb"] < whole["size_mb"] and mlp["step_ratio"] > 1.2
    assert magnitude["step_mb"] == whole["step_mb"] and magnitude["size_mb"] == pytest.approx(
        whole["size_mb"], rel=0.01
    )
    zeros = 6 * 12 * 256 * 256 // 2
    assert magnitude["size_mb"] - magnitude["sparse_mb"] == pytest.approx((32 * zeros - 2 * zeros) / 8e6, rel=0.01)
    assert mlp["sparse_mb"] == mlp["size_mb"] and min(mlp["perplexity"], magnitude["perplexity"]) > whole["perplexity"]


@pytest.mark.heavy
def test_the_figure_has_a_line_a_method(swept: dict[str, Any]) -> None:
    figure = figures.make_figure(swept)
    size, _, _, gain = figure.axes
    lines = {line.get_label(): line for line in size.lines}
    assert set(lines) == {"mlp", "magnitude", "magnitude, zeros not stored"}
    whole, mlp, magnitude = swept["rows"]
    assert list(lines["mlp"].get_ydata()) == [whole["perplexity"], mlp["perplexity"]]
    assert list(lines["magnitude, zeros not stored"].get_xdata()) == [whole["sparse_mb"], magnitude["sparse_mb"]]
    assert [mlp["step_ratio"], mlp["decode_ratio"]] in [list(p) for line in gain.lines for p in line.get_xydata()]
    plain = figures.make_figure({**swept, "rows": [{**r, "perplexity": None} for r in swept["rows"]]})
    assert len(plain.axes) == 2


def test_shares_are_read() -> None:
    assert sweep.parse_shares("0.5, 0.25,0.5") == [0.25, 0.5]
    for text in ("", "0", "1", "nan", "a"):
        with pytest.raises(UserError, match="--shares"):
            sweep.parse_shares(text)
