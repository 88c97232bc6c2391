"""`python -m gpt2_tvm.roofline`: what it prints, writes and draws, and what it refuses."""

from __future__ import annotations

import copy
import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from commands import run_here

from gpt2_tvm.errors import UserError
from gpt2_tvm.measure.results import ROW_KEYS
from gpt2_tvm.theory import measured, tables
from gpt2_tvm.theory.figures import check_figure, draw, make_figure

COMMAND = [sys.executable, "-m", "gpt2_tvm.roofline"]


def roofline(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *map(str, arguments)], capture_output=True, text=True, timeout=300)


def test_help_is_told_without_the_heavy_imports() -> None:
    code = "import sys, gpt2_tvm.roofline; print({'tvm', 'torch', 'matplotlib', 'numpy'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"
    told = roofline("--help")
    assert told.returncode == 0 and "--bandwidth-gb-s" in told.stdout and "--agreement" in told.stdout


def benchmark_row(**changes: Any) -> dict[str, Any]:
    return {
        **{key: 1 for key in ROW_KEYS},
        **{"model": "austen-target", "quantization": "q0f16", "attention": "flash", "device": "Tesla T4"},
        **{"batch": 4, "prompt_tokens": 100, "generate_tokens": 21},
        **{"prefill_tok_s": 2e6, "decode_tok_s": 50_000.0, "bound_gb_s": 280.0, "bound_gflop_s": 50_000.0},
        **changes,
    }


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any], Path]:
    """What the command printed for the bundled model on a T4, the report that it wrote, and the folder."""
    folder = tmp_path_factory.mktemp("roofline")
    functions = [
        {"name": "logits", "flops": 4e6, "bytes": 1.2e6, "time_us": 9.0, "phase": "decode", "batch": 4},
        {"name": "copy", "flops": 0, "bytes": 3e6, "time_us": 20.0},
    ]
    (folder / "f.json").write_text(json.dumps({"functions": functions}))
    rows = [benchmark_row(), benchmark_row(peer="transformers", decode_tok_s=4e3), benchmark_row(model="gpt2")]
    (folder / "b.json").write_text(json.dumps({"rows": rows}))
    sizes = ("--batch", "1,4", "--seq", "32,256", "--bandwidth-gb-s", 300, "--cost-ratio", 0.1)
    files = ("--measured", folder / "b.json", "--measured", folder / "f.json")
    outputs = ("--json", folder / "r.json", "--figure", folder / "r.png", "--sampled-agreement", 0.6)
    done = roofline("--model", "bundled", "--device", "t4", *sizes, *files, *outputs)
    assert done.returncode == 0, done.stderr
    assert "b.json: gpt2 q0f16 left out, this is austen-target q0f16" in done.stderr
    return done.stdout, json.loads((folder / "r.json").read_text()), folder


def test_the_report_has_every_case_and_the_module_agrees(made: tuple[str, dict[str, Any], Path]) -> None:
    _, report, _ = made
    found = [(c["phase"], c["attention"], c["batch"], c["seq"]) for c in report["cases"]]
    passes = [
        ("naive", "textbook"),
        ("naive", "flash"),
        ("prefill", "flash"),
        ("decode", "textbook"),
        ("decode", "flash"),
    ]
    assert found == [(*p, b, n) for b, n in itertools.product((1, 4), (32, 256)) for p in passes]
    module = report["module"]
    assert module["counted"] and module["cases"] == 12 and module["unexplained"] == 0
    assert module["equal"] + module["explained"] == 12
    for case in report["cases"]:
        whole, parts = case["parts"]["whole"], [case["parts"][p] for p in ("embedding", "MHA", "MLP", "head")]
        assert whole["flops"] == sum(p["flops"] for p in parts) and whole["bytes"] == sum(p["bytes"] for p in parts)
        assert whole["bound"] == (
            "compute" if whole["intensity"] > report["device"]["ridge_flop_per_byte"] else "memory"
        )
        if "module" in case:
            counted = case["module"]
            assert sum(f["flops"] * f["times"] for f in counted["functions"]) == sum(
                p["flops"] for p in counted["parts"].values()
            )
            assert counted["by_function_ms"] >= whole["time_ms"] * (1 - 1e-9) or counted["differs"]
    assert report["device"]["bandwidth_gb_s"] == 300 and report["dtypes"]["weights"] == "float16"
    assert report["cache"]["bytes_a_token"] == 2 * 6 * 256 * 2
    best = {(b["decoding"], b["by"]): b["k"] for b in report["speculation"]["best"]}
    assert best["greedy", "theorem 3.8"] == 5 and best["with temperature", "theorem 3.8"] == 3


def test_measured_points_stand_beside_the_roof(made: tuple[str, dict[str, Any], Path]) -> None:
    _, report, _ = made
    points = {(p["label"], p["who"]): p for p in report["measured"]}
    ours, peer = (points["decode 4 x 100 + 21", f"{who} on Tesla T4"] for who in ("gpt2-tvm", "transformers"))
    assert ours["time_ms"] == pytest.approx(1e3 * 4 / 50_000) and peer["time_ms"] == pytest.approx(1.0)
    assert ours["bytes"] == peer["bytes"] and ours["share"] == pytest.approx(ours["predicted_ms"] / ours["time_ms"])
    prefill = points["prefill 4 x 100", "gpt2-tvm on Tesla T4"]
    assert prefill["time_ms"] == pytest.approx(1e3 * 400 / 2e6) and prefill["flops"] > 80 * ours["flops"]
    logits = points["logits (decode 4)", ""]
    assert logits["kind"] == "function" and logits["share"] == pytest.approx(1.2e6 / 300e9 / 9e-6)


def test_the_printed_report(made: tuple[str, dict[str, Any], Path]) -> None:
    printed, report, _ = made
    assert printed == tables.render(report)
    for heading in (
        "Closed forms",
        "Predicted latency",
        "The compiled module",
        "KV cache gains",
        "Speculative",
        "Measured",
    ):
        assert heading in printed
    assert "FLOPs = C1 BN + C2 BN², bytes = C3 + C4 BN + C5 BN² + C6 N²" in printed
    assert "DIFFER WITHOUT" not in printed and "These add up to the difference exactly." in printed
    whole = next(
        c for c in report["coefficients"] if (c["attention"], c["part"], c["pass"]) == ("flash", "whole", "naive")
    )
    assert f"{whole['C1']:,}" in printed and f"{whole['C3']:,}" in printed
    for block in printed.split("\n\n"):
        lines = [line for line in block.splitlines() if line.startswith("|")]
        assert len({line.count("|") for line in lines}) <= 1
    broken = copy.deepcopy(report)
    broken["module"]["unexplained"] = 1
    assert "1 DIFFER WITHOUT EXPLANATION" in tables.render(broken)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0.00"), (0.0004, "<0.001"), (0.0123, "0.012"), (0.5, "0.50"), (51.60, "51.6"), (3302.6, "3303")],
)
def test_times_are_short(value: float, text: str) -> None:
    assert tables.milliseconds(value) == (text if value else "0")


def test_the_figure_is_written_and_nothing_overlaps(made: tuple[str, dict[str, Any], Path]) -> None:
    from matplotlib import pyplot

    _, report, folder = made
    assert (folder / "r.png").read_bytes().startswith(b"\x89PNG")
    draw(report, folder / "r.svg")
    assert b"<svg" in (folder / "r.svg").read_bytes()
    figure = make_figure(report)
    try:
        figure.canvas.draw()
        renderer, (width, height) = figure.canvas.get_renderer(), figure.canvas.get_width_height()
        panels = [axis for axis in figure.axes if axis.get_xlabel() == "FLOP a byte"]
        assert len(figure.axes) == 6 and len(panels) == 5  # four sizes, measured points, and speculation
        for axis in figure.axes:
            boxes = [
                (text.get_text(), text.get_window_extent(renderer))
                for text in [*axis.texts, axis.title, axis._left_title, axis.xaxis.label, axis.yaxis.label]
                if text.get_text()
            ]
            for (one, a), (two, b) in itertools.combinations(boxes, 2):
                assert not a.shrunk(0.98, 0.9).overlaps(b.shrunk(0.98, 0.9)), f"{one!r} covers {two!r}"
            for name, box in boxes:
                assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height, f"{name!r} is cut off"
        labels = {f["label"] for c in report["cases"] for f in c.get("module", {}).get("functions", [])}
        legend = " ".join(text.get_text() for text in figure.legends[0].get_texts())
        assert labels and all(label in legend for label in labels)
    finally:
        pyplot.close(figure)


def test_without_a_count_the_parts_are_drawn(tmp_path: Path) -> None:
    sizes = ("--batch", "2,100", "--seq", "64", "--no-count", "--format", "json", "--figure", tmp_path / "r.svg")
    done = run_here(COMMAND[-1], "--model", "gpt2", "--device", "h200", "--weights", "int8", *sizes)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert not report["module"]["counted"] and report["module"]["why_not"] == "--no-count"
    assert report["dtypes"] == {
        **{"weights": "int8", "activations": "float16", "cache": "float16", "accumulation": "float32"}
    }
    assert report["speculation"]["draft"] == "distilgpt2" and "MLP" in (tmp_path / "r.svg").read_text()


def test_dtypes_that_no_scheme_has_are_told(tiny_model: Path) -> None:
    done = run_here(COMMAND[-1], "--model", tiny_model, "--device", "t4", "--seq", 16, "--cache", "int8")
    assert done.returncode == 0, done.stderr
    assert (
        "Not counted: no scheme of this version computes with weights float16, activations float16, cache int8"
        in done.stdout
    )


def test_materialized_attention_and_a_large_batch(tiny_model: Path) -> None:
    sizes = ("--attention", "materialized", "--batch", "3,65", "--seq", "16", "--format", "json")
    device = ("--device", "webgpu", "--bandwidth-gb-s", 10, "--tflops", 1)
    done = run_here(COMMAND[-1], "--model", tiny_model, *device, *sizes)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["module"]["unexplained"] == 0 and report["module"]["cases"] == 5
    assert "batches above 64" in report["module"]["why_not"]
    assert report["speculation"] is None and report["textbook_differs"] == []


def test_a_scheme_by_name_with_a_table_of_floats(tiny_model: Path, tmp_path: Path) -> None:
    """Its dtypes, its bytes, and the measured rows that are of it."""
    rows = [benchmark_row(model="tiny", quantization=name) for name in ("q8f16-float-head", "q8f16")]
    (tmp_path / "b.json").write_text(json.dumps({"rows": rows}))
    common = ("--model", tiny_model, "--device", "t4", "--seq", 16, "--no-count", "--measured", tmp_path / "b.json")
    told = run_here(COMMAND[-1], *common, "--quantization", "q8f16-float-head")
    assert told.returncode == 0, told.stderr
    assert "b.json: tiny q8f16 left out, this is tiny q8f16-float-head" in told.stderr
    assert "weights int8, activations float16, cache float16, accumulation float32, head float16" in told.stdout
    figure = ("--format", "json", "--figure", tmp_path / "f.svg")
    whole, floats = (
        json.loads(run_here(COMMAND[-1], *common, "--quantization", name, *figure).stdout)
        for name in ("q8f16", "q8f16-float-head")
    )
    assert whole["float_tables"] == [] and floats["float_tables"] == ["head"]
    assert len(floats["measured"]) == len(whole["measured"]) == 2
    more = floats["weights"]["bytes_a_step"] - whole["weights"]["bytes_a_step"]
    assert more == 97 * 32 * 2 - (97 * 32 + 4 * 97)  # float16 in place of int8 with a scale a row
    assert "float head" in (tmp_path / "f.svg").read_text()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--quantization", "q8f32", "--dtype", "float16"), "--quantization names every dtype; leave out --dtype"),
        (("--quantization", "q9", "--device", "t4"), "unknown quantization 'q9'"),
        (("--quantization", "q16f32", "--device", "t4"), "--quantization q16f32 is for CPU and webgpu targets"),
        (("--model", "gpt2", "--seq", "2000", "--device", "t4"), "--seq 2000: gpt2 has positions for 1024 tokens"),
        (("--batch", "0", "--device", "t4"), "--batch '0'"),
        (("--device", "t5"), "no target is called 't5'"),
        (("--device", "cuda"), "target cuda names no peak in float32; give --bandwidth-gb-s and --tflops"),
        (("--device", "t4", "--attention", "linear"), "unknown --attention 'linear'"),
        (("--device", "t4", "--dtype", "float12"), "unknown dtype 'float12'"),
        (("--device", "t4", "--format", "xml"), "unknown --format 'xml'"),
        (("--device", "t4", "--figure", "x.bmp"), "unknown format '.bmp'"),
        (("--device", "t4", "--agreement", "1.5"), "--agreement 1.5"),
        (("--device", "t4", "--cost-ratio", "-1"), "--cost-ratio -1.0"),
        (("--device", "t4", "--measured", "nowhere.json", "--no-count"), "there is no nowhere.json"),
        (("--device", "t4", "--measured", __file__, "--no-count"), "is not JSON"),
    ],
)
def test_what_cannot_be_asked_is_refused(arguments: tuple[str, ...], said: str) -> None:
    from gpt2_tvm.roofline import app

    with pytest.raises(UserError) as found:
        app(list(arguments), standalone_mode=False)
    assert said in str(found.value) and "\n" not in str(found.value)


def test_a_refusal_is_one_line_and_status_1() -> None:
    done = roofline("--device", "t4", "--agreement", "1.5")
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr == "error: --agreement 1.5: a share goes from 0 to 1\n"


@pytest.mark.parametrize(
    "content",
    ["[]", '{"bounds": []}', '{"rows": 3}', '{"rows": [{"model": "x"}]}', '{"functions": [{"name": "f", "flops": 1}]}'],
)
def test_files_that_hold_no_measurement_are_refused_by_name(tmp_path: Path, content: str) -> None:
    (tmp_path / "x.json").write_text(content)
    from gpt2_tvm.config import GPT2Config
    from gpt2_tvm.theory.closed import Model
    from gpt2_tvm.theory.dtypes import Dtypes
    from gpt2_tvm.theory.machine import Machine

    model, machine = Model(GPT2Config(), Dtypes()), Machine("m", "", 1.0, 1.0, None, "")
    with pytest.raises(UserError, match=r"x\.json"):
        measured.read_points([tmp_path / "x.json"], "gpt2", model, "q0f32", machine)


def test_a_benchmark_s_own_bounds_stand_for_a_machine_without_a_peak(tmp_path: Path) -> None:
    rows = [
        {"bound_gb_s": None},
        {"bound_gb_s": 46.8, "bound_gflop_s": None},
        {"bound_gb_s": 9, "bound_gflop_s": 300.0},
    ]
    (tmp_path / "b.json").write_text(json.dumps({"rows": rows}))
    assert measured.machine_rates([tmp_path / "b.json"]) == (46.8, pytest.approx(0.3))
    (tmp_path / "f.json").write_text(json.dumps({"functions": []}))
    assert measured.machine_rates([tmp_path / "f.json"]) == (None, None)


def test_a_figure_s_suffix_is_checked_first() -> None:
    for name in ("a.png", "a.SVG", "b.pdf"):
        check_figure(Path(name))
    with pytest.raises(UserError, match="choose one of png, svg, pdf"):
        check_figure(Path("figure"))
