"""Loaders of published formats, the choice of prompts, the rows and the command, on a tiny model."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from gpt2_tvm import UserError
from gpt2_tvm.artifact import open_artifact
from gpt2_tvm.bench_decoding import app
from gpt2_tvm.datasets import load
from gpt2_tvm.decoding.cached import add_cache_gain, cache_gain, closed_form
from gpt2_tvm.decoding.figures import make_figure
from gpt2_tvm.decoding.prompts import make_units, spread
from gpt2_tvm.decoding.report import make_rows, render
from gpt2_tvm.decoding.subjects import Subject, expand
from gpt2_tvm.theory.machine import Machine
from gpt2_tvm.theory.predict import Case, step_seconds
from gpt2_tvm.theory.speculation import expected_tokens

SPIDER = [
    {"db_id": "cats", "question": "How many  cats?", "query": "SELECT count(*) FROM cat"},
    {"db_id": "cats", "question": "", "query": "SELECT 1"},
]
EAGLE = '"name[The Eagle], area[city centre], kids friendly[no]"'
E2E = f'mr,ref\n{EAGLE},"A place."\n{EAGLE},"Other words."\n,"empty"\n'
DIALOGSUM = [
    {"fname": "a", "dialogue": "#Person1#: Hi.\n#Person2#: Hello.", "summary": "They greet."},
    {"dialogue": ""},
]


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    found = {name: tmp_path / name for name in ("spider", "e2e", "dialogsum", "text")}
    found["spider"].write_text(json.dumps(SPIDER))
    found["e2e"].write_text(E2E)
    found["dialogsum"].write_text("\n".join(json.dumps(row) for row in DIALOGSUM) + "\n\n")
    found["text"].write_text("One.\n\nTwo.\nThree.\n")
    return found


def test_published_formats_become_prompts(files: dict[str, Path]) -> None:
    spider, e2e, dialogsum, text = (load(f"{name}:{path}") for name, path in files.items())
    assert (spider.prompts, spider.empty) == (["Database: cats\nQuestion: How many cats?\nSQL: SELECT"], 1)
    assert (e2e.prompts, e2e.empty) == (["name : The Eagle | area : city centre | kids friendly : no\n"], 1)
    assert dialogsum.prompts[0].startswith("Summarize") and dialogsum.prompts[0].endswith("Hello.\n\nSummary:")
    assert dialogsum.empty == 1
    assert (text.prompts, text.empty) == (["One.\nTwo.\nThree.", "Two.\nThree.", "Three."], 1)
    assert load("gettysburg").prompts[0].startswith("<|endoftext|>Four score")


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("spider", "[{", "not JSON"),
        ("spider", '{"question": "x"}', "list of objects"),
        ("e2e", "a,b\n1,2\n", "no column mr"),
        ("dialogsum", '{"dialogue": "x"}\n{', "line 2"),
        ("text", "\n\n", "no row"),
        ("text", b"\xff\xfe", "UTF-8"),
        ("novel", "x", "give spider:FILE"),
    ],
)
def test_another_format_is_refused_in_one_line(tmp_path: Path, name: str, content: str | bytes, match: str) -> None:
    file = tmp_path / "file"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=match) as error:
        load(f"{name}:{file}")
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="no file"):
        load("text:nowhere")


def test_prompts_are_spread_over_the_file_and_fit_every_model(tiny_artifact: Path, bundled_artifact: Path) -> None:
    assert spread(list("abcdefghij"), 4) == ["a", "c", "f", "h"]
    assert spread(list("ab"), 0) == spread(list("ab"), 9) == ["a", "b"]
    models = {p: open_artifact(p) for p in (tiny_artifact, bundled_artifact)}
    units, _ = make_units([load("gettysburg")], models, 0, 40, 8, 2)
    assert [len(ids[0]) for ids in units[0].ids.values()] == [40, 40]
    with pytest.raises(UserError, match="no prompt of gettysburg leaves room"):
        make_units([load("gettysburg")], models, 0, 41, 8, 1)


def test_empty_rows_are_left_out_and_told(bundled_artifact: Path, files: dict[str, Path], tmp_path: Path) -> None:
    models = {bundled_artifact: open_artifact(bundled_artifact)}
    for name, path in files.items():
        units, notes = make_units([load(f"{name}:{path}")], models, 0, 1, 8, 1)
        assert units and all(unit.ids[bundled_artifact][0] for unit in units)
        assert any(f"{name}: 1 rows without a prompt were left out" in note for note in notes), name
    nothing = tmp_path / "nothing"
    for name, content in (
        ("spider", '[{"question": ""}]'),
        ("dialogsum", '{"dialogue": ""}\n'),
        ("e2e", "mr,ref\n,x\n"),
    ):
        nothing.write_text(content)
        with pytest.raises(UserError, match="no row") as error:
            load(f"{name}:{nothing}")
        assert "\n" not in str(error.value)


def test_text_is_cut_to_tokens_and_what_does_not_fit_is_told(bundled_artifact: Path, tmp_path: Path) -> None:
    models = {bundled_artifact: open_artifact(bundled_artifact)}
    file = tmp_path / "text"
    file.write_text("It was a fine day in the country, and Anne walked to the village.\n" * 40)
    units, notes = make_units([load(f"text:{file}")], models, 0, 100, 64, 8)
    lengths = {len(ids) for unit in units for ids in unit.ids[bundled_artifact]}
    assert lengths == {100} and any("too short" in note for note in notes)
    long = tmp_path / "long"
    long.write_text(json.dumps([{"question": "why " * 2000}, {"question": "why"}]))
    units, notes = make_units([load(f"spider:{long}")], models, 0, 100, 64, 8)
    assert len(units) == 1 and any("leave no room" in note for note in notes)


# ---- rows


def turn(
    subject: Subject, index: int, step_s: float, each: int, **more: Any
) -> tuple[tuple[str, str, int], dict[str, Any]]:
    line = {
        **{"subject": subject.key, "unit": f"text/{index}", "repeat": 0, "tokens": [[index, *range(12)]]},
        **{"prompt_tokens": [10], "prefill_s": 0.5, "decode_s": 12 / each * step_s},
        "steps": [[step_s, each]] * (12 // each),
        "parts": {"draft": 0.0, "verify": 12 / each * step_s, "sample": 0.0, "rollback": 0.0, "host": 0.0},
        **{"passes": 12 // each, "drafted": 0, "examined": 0, "accepted": 0, **more},
    }
    return (subject.key, f"text/{index}", 0), line


def test_rows_hold_rates_acceptance_and_theory(tiny_artifact: Path) -> None:
    from gpt2_tvm.decoding.prompts import Unit

    plain, fast = Subject(tiny_artifact, "greedy"), Subject(tiny_artifact, "speculative", tiny_artifact, "3")
    seen = {"drafted": 12, "examined": 8, "accepted": 6, "draft_s": 0.1, "target_s": {"1": 1.0, "4": 1.2}}
    turns = dict(
        [turn(plain, i, 1.0 + i, 1) for i in range(2)] + [turn(fast, i, (1.0 + i) * 1.5, 3, **seen) for i in range(2)]
    )
    units = [Unit("text", i, {tiny_artifact: [[1]]}) for i in range(2)]
    first, second = make_rows(turns, [plain, fast], units, {tiny_artifact: open_artifact(tiny_artifact)}, "greedy")
    assert (first["tok_s"], first["tok_s_sd"]) == (0.75, pytest.approx(0.354, abs=1e-3))
    assert (first["speedup"], first["same_text"], first["acceptance"]) == (1.0, 2, None)
    assert second["speedup"] == pytest.approx(2.0) and second["tokens_per_step"] == 3.0
    assert (second["acceptance"], second["accepted_of_drafted"]) == (0.75, 0.5)
    assert second["token_time_us"] == pytest.approx(0.75e6) or second["token_time_us_p95"] == pytest.approx(1e6)
    assert second["ids_sha256"] == first["ids_sha256"]
    assert second["cost_ratio"] == pytest.approx(0.1 / 1.5, abs=1e-4)
    assert second["predicted_speedup"] == pytest.approx(expected_tokens(0.75, 3) * 1.5 / (0.3 + 1.2), abs=1e-3)
    assert second["optimum_length"] >= 1
    result = {"rows": [first, second], "notes": ["a note"], "device": "d", "threads": 1, "baseline": "greedy"}
    assert "2 of 2" in render(result, "md") and "Note: a note." in render(result, "md")
    table = list(csv.DictReader(io.StringIO(render(result, "csv"))))
    assert float(table[1]["acceptance"]) == 0.75 and json.loads(table[1]["split_us"])["verify"] > 0
    assert json.loads(render(result, "json"))["rows"][0]["strategy"] == "greedy"
    bars, points = make_figure([first, second]).axes
    assert len(bars.patches) == 10 and len(points.lines) == 3  # the point, its curve, and the line at 1
    (star,) = points.collections
    assert star.get_offsets().tolist() == [[0.75, second["optimum_speedup"]]]
    curve = points.lines[1]
    at = round(0.75 * (len(curve.get_xdata()) - 1))
    assert curve.get_ydata()[at] == pytest.approx(second["predicted_speedup"], abs=1e-3)


def test_naive_stands_beside_the_roofline(tiny_artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that is exactly as fast as its rates say is predicted exactly, at those rates and at those reached."""
    artifact = open_artifact(tiny_artifact)
    model, machine = closed_form(artifact), Machine("", "", 3.0, 0.01, None, "")
    prompt, tokens = 20, 11
    lengths = range(prompt + 1, prompt + tokens)
    greedy_s = sum(step_seconds(model, machine, Case("decode", 1, n)) for n in lengths)
    row = {"artifact": str(tiny_artifact), "dataset": "text", "batch": 1, "prompts": 2, "prompt_tokens": 20.0}
    row |= {"generated_tokens": 22, "model": "tiny", "target": "cpu", "speedup": 1.0, "strategy": "greedy"}
    row["first_token_time_us"] = 1e6 * step_seconds(model, machine, Case("prefill", 1, prompt))
    gain = cache_gain(model, machine, 1, prompt, tokens)
    rows = [{**row, "tok_s": (tokens - 1) / greedy_s}, {**row, "strategy": "naive", "speedup": 1 / (1.2 * gain)}]
    monkeypatch.setattr("gpt2_tvm.decoding.cached.peaks", lambda artifact, measured: machine)
    (note,) = add_cache_gain(rows, {str(tiny_artifact): artifact}, None)
    assert "(+20%)" in note and gain > 2
    assert rows[1]["predicted_speedup"] == pytest.approx(1 / gain, abs=1e-4)
    assert rows[1]["measured_over_predicted"] == pytest.approx(1 / 1.2, abs=1e-3)
    # the middle decode step stands for all of them, and the prompt's prefill for all naive ones
    assert rows[1]["measured_over_reached"] == pytest.approx(1 / 1.2, rel=0.05)
    assert "predicted_speedup_reached" not in rows[0]


def test_closed_forms_know_the_tables_that_stay_floats(tiny_artifact: Path) -> None:
    from types import SimpleNamespace

    whole = open_artifact(tiny_artifact)

    def bytes_of(quantization: str) -> float:
        manifest = {"quantization": quantization, "attention": "flash"}
        artifact = SimpleNamespace(config=whole.config, kind="cpu", manifest=manifest)
        return step_seconds(closed_form(artifact), Machine("", "", 1.0, 1e6, None, ""), Case("decode", 1, 2))  # type: ignore[arg-type]

    assert bytes_of("q8f32") < bytes_of("q8f32-float-head") < bytes_of("q0f32")


def test_adaptive_lengths_curve_is_the_best_of_all(tiny_artifact: Path) -> None:
    from gpt2_tvm.decoding.prompts import Unit

    plain, fast = Subject(tiny_artifact, "greedy"), Subject(tiny_artifact, "speculative", tiny_artifact, "adaptive")
    seen = {"drafted": 12, "examined": 8, "accepted": 6, "draft_s": 0.1, "target_s": {"1": 1.0, "4": 1.2, "8": 1.4}}
    turns = dict([turn(plain, 0, 1.0, 1), turn(fast, 0, 1.5, 3, **seen)])
    units = [Unit("text", 0, {tiny_artifact: [[1]]})]
    rows = make_rows(turns, [plain, fast], units, {tiny_artifact: open_artifact(tiny_artifact)}, "greedy")
    assert rows[1]["predicted_speedup"] is None and rows[1]["optimum_speedup"] > 1.5
    curve = make_figure(rows).axes[1].lines[1]
    at = round(0.75 * (len(curve.get_xdata()) - 1))
    assert curve.get_ydata()[at] == pytest.approx(rows[1]["optimum_speedup"], abs=1e-3)
    assert curve.get_ydata()[0] == 1.0 and list(curve.get_ydata()) == sorted(curve.get_ydata())


def test_streaming_has_a_curve_beside_speculatives(tiny_artifact: Path) -> None:
    """Its drafts cost nothing of their own, and each pass computes the whole tree whatever the draft length."""
    from dataclasses import replace

    from gpt2_tvm.decoding.prompts import Unit

    plain = Subject(tiny_artifact, "greedy")
    streaming, fast = Subject(tiny_artifact, "streaming", None, "3"), Subject(tiny_artifact, "speculative", None, "3")
    seen = {"drafted": 12, "examined": 8, "accepted": 6}
    free = {"draft_s": 0.0, "target_s": {"1": 1.0, "4": 1.6}}
    paid = {"draft_s": 0.1, "target_s": {"1": 1.0, "4": 1.2}}
    turns = dict(
        [turn(plain, 0, 1.0, 1), turn(streaming, 0, 1.6, 3, **seen, **free), turn(fast, 0, 1.5, 3, **seen, **paid)]
    )
    artifact = open_artifact(tiny_artifact)
    artifact = replace(artifact, manifest={**artifact.manifest, "streams": {"rows": 4, "kept": 4, "streams": 3}})
    units = [Unit("text", 0, {tiny_artifact: [[1]]})]
    rows = make_rows(turns, [plain, streaming, fast], units, {tiny_artifact: artifact}, "greedy")
    assert rows[1]["cost_ratio"] == 0.0
    assert rows[1]["predicted_speedup"] == pytest.approx(expected_tokens(0.75, 3) / 1.6, abs=1e-3)
    assert rows[1]["optimum_length"] == 3  # a shorter tree would cost as much
    _, points = make_figure(rows).axes
    assert len(points.lines) == 5  # a point and a curve each, and the line at 1


def test_subjects_are_what_makes_sense(tiny_artifact: Path) -> None:
    made = expand([tiny_artifact], ["greedy", "lookup", "speculative"], [tiny_artifact], ["2", "adaptive"])
    assert [(s.strategy, s.length) for s in made] == [
        *(("greedy", ""), ("lookup", "2"), ("lookup", "adaptive")),
        *(("speculative", "2"), ("speculative", "adaptive")),
    ]
    planted = expand([tiny_artifact], ["speculative"], [], ["3"], [0.5, 0.9])
    assert [(s.draft, s.planted) for s in planted] == [(None, 0.5), (None, 0.9)]
    with pytest.raises(UserError, match=r"decoding\.early makes one"):
        expand([tiny_artifact], ["early"], [tiny_artifact], ["3"])
    with pytest.raises(UserError, match="name one with --draft"):
        expand([tiny_artifact], ["speculative"], [], ["3"])


# ---- the command


def command(*arguments: str) -> Any:
    return CliRunner().invoke(app, arguments)


def test_the_command_measures_resumes_and_draws(tiny_artifact: Path, tmp_path: Path) -> None:
    records, figure = tmp_path / "turns.jsonl", tmp_path / "figure.png"
    base = ["--dataset", "gettysburg", "--model", str(tiny_artifact), "--prompt-tokens", "20", "--max-tokens", "16"]
    base += [
        "--records",
        str(records),
        "--format",
        "json",
        "--draft-length",
        "2,adaptive",
        "--draft",
        str(tiny_artifact),
    ]
    done = command(*base, "--strategy", "naive,greedy,lookup,speculative", "--figure", str(figure))
    assert done.exit_code == 0, done.output
    rows = json.loads(done.stdout)["rows"]
    assert [row["strategy"] for row in rows] == ["naive", "greedy", *["lookup"] * 2, *["speculative"] * 2]
    assert len({row["ids_sha256"] for row in rows}) == 1 and all(row["same_text"] == 1 for row in rows)
    assert rows[4]["acceptance"] == 1.0 and rows[4]["tokens_per_step"] > 2  # its own draft
    assert figure.stat().st_size > 10_000
    before = records.read_text()
    again = command(*base, "--strategy", "greedy,lookup")
    assert again.exit_code == 0 and records.read_text() == before  # nothing was measured again
    assert json.loads(again.stdout)["rows"][0]["tok_s"] == rows[1]["tok_s"]
    other = command(*base, "--strategy", "greedy", "--seed", "5")
    assert isinstance(other.exception, UserError) and "another choice of options" in str(other.exception)


def test_the_command_plants_acceptance(tiny_artifact: Path) -> None:
    done = command(
        *("--dataset", "gettysburg", "--model", str(tiny_artifact), "--prompt-tokens", "16", "--max-tokens", "30"),
        *("--strategy", "greedy,speculative", "--planted-acceptance", "0,1", "--draft-length", "3", "--format", "json"),
    )
    assert done.exit_code == 0, done.output
    rows = json.loads(done.stdout)["rows"]
    assert [row["acceptance"] for row in rows[1:]] == [0.0, 1.0]
    assert all(row["same_text"] == 1 for row in rows)
    assert rows[2]["tokens_per_step"] > 3


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (("--format", "xml"), "unknown --format"),
        (("--strategy", "warp"), "unknown --strategy"),
        (("--planted-acceptance", "2"), "probabilities"),
        (("--max-tokens", "1"), "at least 2"),
        (("--temperature", "0.5"), "go together"),
        (("--figure", "x.gif"), "unknown format"),
        (("--dataset", "text:nowhere"), "no file"),
        (("--draft-length", "x", "--strategy", "lookup"), "--draft-length x"),
    ],
)
def test_what_the_command_refuses(tiny_artifact: Path, arguments: tuple[str, ...], match: str) -> None:
    given = ["--dataset", "gettysburg", "--model", str(tiny_artifact), "--strategy", "greedy", "--prompt-tokens", "20"]
    given += ["--max-tokens", "8"]
    for name, value in zip(arguments[::2], arguments[1::2], strict=True):
        given += [name, value]
    done = command(*given)
    assert isinstance(done.exception, UserError), done.output
    assert match in str(done.exception)


def test_sampling_goes_with_its_own_baseline(tiny_artifact: Path) -> None:
    done = command(
        *("--dataset", "gettysburg", "--model", str(tiny_artifact), "--prompt-tokens", "16", "--max-tokens", "12"),
        *("--strategy", "sample,lookup", "--temperature", "1", "--draft-length", "2", "--format", "json"),
    )
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["baseline"] == "sample"
