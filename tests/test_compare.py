"""Artifacts beside each other: what is compiled, what each figure is, and the command's faults."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from gpt2_tvm import Engine, compile_model
from gpt2_tvm.artifact import open_artifact
from gpt2_tvm.comparing import facts, figures, making, tables
from gpt2_tvm.comparing.comparison import Comparison
from gpt2_tvm.comparing.facts import Facts, Text
from gpt2_tvm.data import prompt_text
from gpt2_tvm.errors import UserError
from gpt2_tvm.evaluation.scoring import Scorer
from gpt2_tvm.measure import bounds
from gpt2_tvm.measure.cases import Case
from gpt2_tvm.quantization import SCHEMES
from gpt2_tvm.tokenizer import load_tokenizer
from targets import load_target, specialise

COMMAND = [sys.executable, "-m", "gpt2_tvm.compare"]
CASES = [Case(1, 6, 3), Case(2, 6, 3)]


def compare(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *map(str, arguments)], capture_output=True, text=True, timeout=900)


@contextmanager
def silent(count: int) -> Iterator[Any]:
    yield lambda what, done: None


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The bundled model in two schemes, for batches 1 and 2."""
    folder = tmp_path_factory.mktemp("pair")
    return [
        compile_model(
            "bundled",
            "cpu",
            scheme,
            folder / scheme,
            batch_sizes=(1, 2),
            max_seq_len=64,
            verify_widths=(),
            rules="full",
        )
        for scheme in ("q0f32", "q8f32")
    ]


@pytest.fixture(scope="module")
def result(pair: list[Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    text = Text("the address", prompt_text(), 32, 32, 200)
    comparison = Comparison(pair, CASES, text, repeats=2, warmups=0)
    with Facts(tmp_path_factory.mktemp("facts") / "facts.jsonl") as journal:
        journal.open({})
        comparison.run(journal, silent, silent)
    made = comparison.result()
    for i, row in enumerate(made["rows"]):  # medians and ratios against what was kept of each round
        ours, first = (comparison.session.samples(k, CASES[i % 2]) for k in (i // 2, 0))
        rates = [row["batch"] * 3 / s.decode_s for s in ours]
        assert row["decode_tok_s"] == pytest.approx(median(rates))
        assert row["decode_ratio"] == pytest.approx(
            median(b.decode_s / a.decode_s for a, b in zip(ours, first, strict=True))
        )
        assert row["prefill_ratio"] == pytest.approx(
            median(b.prefill_s / a.prefill_s for a, b in zip(ours, first, strict=True))
        )
    return made


@pytest.mark.heavy
def test_every_artifact_has_a_row_for_every_batch(result: dict[str, Any], pair: list[Path]) -> None:
    rows = result["rows"]
    assert result["complete"] and result["failures"] == []
    assert [(row["quantization"], row["batch"]) for row in rows] == [
        ("q0f32", 1),
        ("q0f32", 2),
        ("q8f32", 1),
        ("q8f32", 2),
    ]
    for row in rows:
        on_disk = sum(
            f.stat().st_size for f in Path(row["artifact"]).rglob("*") if f.name != "manifest.json" and f.is_file()
        )
        assert row["size_mb"] == pytest.approx(on_disk / 1e6)
        assert row["repeats"] == 2 and row["peak_rss_mb"] > 10
    assert rows[2]["size_mb"] < 0.5 * rows[0]["size_mb"]
    assert rows[0]["decode_ratio"] == 1 and rows[0]["step_ratio"] == 1


@pytest.mark.heavy
def test_perplexity_is_the_scorers(result: dict[str, Any], pair: list[Path]) -> None:
    found = {}
    for path in pair:
        tokenizer = load_tokenizer(path / "tokenizer")
        ids = tokenizer.encode(prompt_text())[:200]
        found[path.name] = Scorer(Engine(path), ids, tokenizer, 32, 32).run()
    base = found["q0f32"].perplexity
    for row in result["rows"]:
        score = found[row["quantization"]]
        assert row["perplexity"] == pytest.approx(score.perplexity, rel=1e-6)
        assert row["bits_per_byte"] == pytest.approx(score.bits_per_byte, rel=1e-6)
        assert row["scored_tokens"] == score.scored_tokens
        assert row["perplexity_change"] == pytest.approx(score.perplexity / base - 1, abs=1e-6)
    assert abs(result["rows"][2]["perplexity_change"]) < 0.01


@pytest.mark.heavy
def test_bytes_predict_the_ratio(result: dict[str, Any], pair: list[Path]) -> None:
    """Weights once, without the table of positions, and the cached keys and values of each sequence."""
    sizes = []
    for path in pair:
        artifact = open_artifact(path, verify=False)
        stored = bounds.artifact_param_bytes(artifact)
        weights = sum(n for name, n in stored.items() if "wpe" not in name)
        sizes += [weights + batch * (6 + 2) * 2 * 6 * 256 * 4 for batch in (1, 2)]
    for row, size, first in zip(result["rows"], sizes, [*sizes[:2]] * 2, strict=True):
        assert row["step_mb"] == pytest.approx(size / 1e6)
        assert row["step_ratio"] == pytest.approx(first / size)


@pytest.mark.heavy
def test_what_is_known_is_not_measured_again(
    result: dict[str, Any], pair: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Quality and memory come from the journal; another text, or another case, is another fact."""
    calls: list[str] = []
    monkeypatch.setattr(facts, "quality", lambda *a, **k: calls.append("quality") or {"perplexity": 7.0})
    monkeypatch.setattr(facts, "peak_memory", lambda *a, **k: calls.append("memory") or {"peak_rss_mb": 5.0})

    def run(text: str, cases: list[Case]) -> dict[str, Any]:
        calls.clear()
        comparison = Comparison(pair[:1], cases, Text("t", text), repeats=1)
        monkeypatch.setattr(comparison.session, "run", lambda say: None)
        with Facts(tmp_path / "facts.jsonl") as journal:
            journal.open({})
            comparison.run(journal, silent, silent)
        return comparison.result()

    assert run("a text", CASES)["rows"][0]["perplexity"] == 7.0 and calls == ["quality", "memory", "memory"]
    row = run("a text", CASES)["rows"][1]
    assert calls == [] and (row["perplexity"], row["peak_rss_mb"], row["decode_tok_s"]) == (7.0, 5.0, None)
    run("another text", CASES[:1])
    assert calls == ["quality"]
    run("a text", [Case(2, 5, 3)])
    assert calls == ["memory"]


@pytest.mark.heavy
def test_what_fails_is_told_and_the_rest_goes_on(
    pair: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def memory(artifact: Any, *rest: Any) -> dict[str, float]:
        if artifact.path == pair[0]:
            raise UserError("q0f32: its process ended by SIGKILL")
        return {"peak_rss_mb": 5.0}

    monkeypatch.setattr(facts, "peak_memory", memory)
    comparison = Comparison(pair, CASES[:1], repeats=1)
    monkeypatch.setattr(comparison.session, "run", lambda say: None)
    with facts.open_facts(tmp_path) as journal:
        comparison.run(journal, silent, silent)
        with pytest.raises(UserError, match=r"another run .* --cache"):
            facts.open_facts(tmp_path)
    result = comparison.result()
    assert result["failures"] == ["q0f32: its process ended by SIGKILL"] and not result["complete"]
    assert [row["peak_rss_mb"] for row in result["rows"]] == [None, 5.0]


@pytest.mark.heavy
def test_tables(result: dict[str, Any]) -> None:
    text = tables.render(result, "md")
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + 4 and "q8f32" in lines[4] and "perplexity" in lines[0]
    assert "perplexity" not in tables.render({**result, "text": None}, "md").splitlines()[0]
    rows = list(csv.DictReader(io.StringIO(tables.render(result, "csv"))))
    assert [row["quantization"] for row in rows] == ["q0f32", "q0f32", "q8f32", "q8f32"]
    assert float(rows[3]["decode_tok_s"]) == result["rows"][3]["decode_tok_s"]
    assert json.loads(tables.render(result, "json")) == result
    unfinished = [{**row, "decode_tok_s": None, "decode_ratio": None, "peak_rss_mb": None} for row in result["rows"]]
    assert "None" not in tables.render({**result, "rows": unfinished}, "md")


@pytest.mark.heavy
def test_labels_are_what_differs(result: dict[str, Any]) -> None:
    rows = result["rows"]
    assert tables.labels(rows) == ["q0f32", "q0f32", "q8f32", "q8f32"]
    pruned = [{**rows[0], "model": "half", "artifact": "b"}, rows[0]]
    assert tables.labels(pruned) == ["half", "austen-target"]
    assert tables.labels([rows[0], {**rows[0], "artifact": "b"}]) == [rows[0]["artifact"], "b"]


def test_the_front_is_what_nothing_beats() -> None:
    points = [(1.0, 9.0), (2.0, 5.0), (3.0, 6.0), (4.0, 5.0), (5.0, 1.0), (1.0, 10.0)]
    assert figures.front(points) == [0, 1, 4]
    assert figures.front([]) == []


@pytest.mark.heavy
def test_the_figure_has_the_points(result: dict[str, Any], tmp_path: Path) -> None:
    figure = figures.make_figure(result)
    memory, size, speed = figure.axes
    assert sorted(bar.get_height() for bar in memory.patches) == sorted(r["peak_rss_mb"] for r in result["rows"])
    for axis, key in ((size, "size_mb"), (speed, "decode_tok_s")):
        drawn = {(line.get_xdata()[0], line.get_ydata()[0]) for line in axis.lines if line.get_marker() == "o"}
        assert drawn == {(r[key], r["perplexity"]) for r in result["rows"] if r["batch"] == 1}
    png, svg = figures.draw(result, tmp_path / "here" / "f.png")
    assert png.read_bytes().startswith(b"\x89PNG") and "<svg" in svg.read_text()
    again = figures.draw(result, tmp_path / "again.png")[1]
    assert again.read_text() == svg.read_text()  # the same figures make the same file
    plain = figures.make_figure({**result, "rows": [{**r, "perplexity": None} for r in result["rows"]]})
    assert len(plain.axes) == 2
    with pytest.raises(UserError, match="PNG and an SVG"):
        figures.files_of(Path("a.pdf"))


# ---- compiling what is missing


def test_schemes_are_the_registrys() -> None:
    from gpt2_tvm.config import GPT2Config

    cpu, gpu = (specialise(load_target(name)) for name in ("cpu", "rtx-4090"))
    on_cpu, on_gpu = (making.schemes_for(GPT2Config(), target) for target in (cpu, gpu))
    assert {"q0f32", "q0f16", "q8f32"} <= set(on_cpu) <= set(SCHEMES) and "q16f32" not in on_gpu
    with pytest.raises(UserError, match="--schemes q16f32: rtx-4090 has q0f32, q0f16") as found:
        making.check_schemes(GPT2Config(), gpu, ["q0f32", "q16f32"])
    assert "\n" not in str(found.value)


@pytest.mark.heavy
def test_the_cache_holds_what_was_compiled(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import gpt2_tvm.build as build

    made: list[str] = []
    real = build.compile_model

    def counted(model: str, target: str, scheme: str, *rest: Any, **options: Any) -> Path:
        made.append(scheme)
        return real(model, target, scheme, *rest, rules="baseline", verify_widths=(), **options)

    monkeypatch.setattr(build, "compile_model", counted)
    monkeypatch.setattr("tuning.ablation_cache.sources", lambda **options: "these")

    def make(schemes: list[str], sizes: tuple[int, ...] = (1,), seed: int = 0) -> list[Path]:
        made.clear()
        return making.make_artifacts(str(tiny_model), "cpu", schemes, sizes, tmp_path, seed=seed)

    first = make(["q0f32", "q0f16"])
    assert made == ["q0f32", "q0f16"] and [open_artifact(p).manifest["quantization"] for p in first] == made
    assert make(["q0f16", "q0f32"]) == first[::-1] and made == []
    shutil.rmtree(first[0])
    assert make(["q0f32", "q0f16"]) == first and made == ["q0f32"]  # goes on where it was
    (first[1] / "manifest.json").write_text("{}")
    assert make(["q0f16"]) == first[1:] and made == ["q0f16"]
    assert make(["q0f32"], (1, 2)) != first[:1] and made == ["q0f32"]
    with pytest.raises(UserError, match="q9: cpu has"):
        make(["q0f32", "q9"])
    assert made == []


# ---- the command


@pytest.mark.heavy
def test_the_command_compares_what_it_is_given(pair: list[Path], tmp_path: Path) -> None:
    (tmp_path / "text").write_text(prompt_text())
    sizes = ("--batch", "1", "--prompt-tokens", 4, "--generate", 2, "--repeats", 1, "--warmup", 0)
    options = ("--text", tmp_path / "text", "--context", 32, "--stride", 32, "--limit-tokens", 64, "--threads", 1)
    done = compare(
        *pair,
        "--schemes",
        "q8f32,q0f32",
        *sizes,
        *options,
        "--cache",
        tmp_path / "cache",
        "--json",
        tmp_path / "r.json",
    )
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "r.json").read_text())
    assert [row["quantization"] for row in result["rows"]] == ["q8f32", "q0f32"]  # in the order asked for
    assert result["rows"][0]["threads"] == 1 and result["rows"][1]["perplexity_change"] != 0
    assert done.stdout.startswith("| artifact")


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "name artifacts to compare"),
        (("{0}", "{0}"), "given twice"),
        (("{0}", "--schemes", "q0f16"), "these artifacts are q0f32"),
        (("{0}", "--schemes", ","), "name at least one"),
        (("{0}", "--model", "bundled"), "not both"),
        (("--model", "bundled", "--schemes", "q9"), "--schemes q9: cpu has q0f32"),
        (("{0}", "--batch", "4", "--prompt-tokens", "4", "--generate", "2"), "was compiled for up to 2"),
        (("{0}", "--prompt-tokens", "99", "--batch", "1"), "make 163 tokens"),
        (("{0}", "--text", "/nowhere/text"), "there is no file /nowhere/text"),
        (("{0}", "--format", "html"), "unknown --format"),
        (("{0}", "--figure", "a.gif"), "a PNG and an SVG"),
        (("{0}", "--repeats", "0"), "--repeats 0"),
        (("{0}", "--limit-tokens", "1"), "--limit-tokens 1"),
        (("/nowhere/artifact",), "no artifact at /nowhere/artifact"),
    ],
)
def test_faults_are_one_line(pair: list[Path], arguments: tuple[str, ...], says: str) -> None:
    from typer.testing import CliRunner

    from gpt2_tvm.compare import app

    done = CliRunner().invoke(app, [part.format(pair[0]) for part in arguments])
    assert isinstance(done.exception, UserError), done.output
    assert says in str(done.exception) and "\n" not in str(done.exception)


@pytest.mark.heavy
def test_other_tokenizers_are_refused(pair: list[Path], tiny_artifact: Path) -> None:
    text = Text("t", "some text")
    with pytest.raises(UserError, match="has no tokenizer"):
        Comparison([pair[0], tiny_artifact], [Case(1, 4, 2)], text)
    other = open_artifact(pair[1], verify=False)
    other.manifest["files"]["tokenizer/vocab.json"]["sha256"] = "0" * 64
    with pytest.raises(UserError, match="another tokenizer"):
        facts.check_tokenizers([open_artifact(pair[0], verify=False), other])


@pytest.mark.parametrize("name", ["compare", "prune", "finetune"])
def test_help_is_quick_to_load(name: str) -> None:
    code = (
        f"import sys; import gpt2_tvm.{name}; "
        "print(*{'tvm', 'torch', 'numpy', 'matplotlib', 'huggingface_hub', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONWARNINGS": ""},
    )
    assert (done.stdout.strip(), done.stderr) == ("", "")
