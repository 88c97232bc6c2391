"""The ablation of the graph's passes: its sets, what their rows say, and one run on this CPU, taken up again."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from faults import refusal

from gpt2_tvm.expressions import evaluate
from targets import load_target
from tuning.ablation_tables import render
from tuning.ablation_work import Job, bytes_of, schedule
from tuning.variants import Variant, crossed_factors, factors, pass_cells, pass_factors, pass_variants, variants


def test_sets_of_passes() -> None:
    cpu, gpu = load_target("cpu"), load_target("webgpu")
    every = pass_factors(cpu)
    assert every == ("linear-gelu", "linear-residual", "norm-residual")
    assert pass_factors(cpu, quantised=True) == ("dequantize-gemv", *every)
    found = {v.name: v.rules for v in pass_variants(gpu)}
    names = pass_factors(gpu)
    assert next(iter(found)) == "baseline" and list(found)[-1] == "all"
    assert found["baseline"] == () and found["all"] == names
    assert set(found) == {"baseline", "all", *(f"only-{n}" for n in names), *(f"without-{n}" for n in names)}
    assert found["only-qkv-append"] == ("qkv-append",)
    assert found["without-qkv-append"] == tuple(n for n in names if n != "qkv-append")
    assert pass_variants(cpu, ["only-linear-gelu"]) == [Variant("only-linear-gelu", ("linear-gelu",))]
    assert "nonsense" in refusal(lambda: pass_variants(cpu, ["only-nonsense"]))


@pytest.mark.parametrize("target", ["cpu", "webgpu"])
def test_the_factorial_design_has_every_subset_once(target: str) -> None:
    device = load_target(target)
    design = pass_cells(device)
    assert len(design) == 2 ** len(pass_factors(device)) <= 64
    assert all(set(passes) == on for passes, on in design.items())
    found = pass_variants(device, full_factorial=True)
    assert {v.rules for v in found} == set(design)  # the plain sets are among them
    assert len(found) == len({v.name for v in found})


def test_some_factors_of_many() -> None:
    gpu = load_target("webgpu")
    some = ["gemv", "matmul"]
    found = variants(gpu, ["baseline"], True, chosen=some)
    assert {v.on for v in found} == {frozenset(), frozenset({"gemv"}), frozenset({"matmul"}), frozenset(some)}
    assert len(pass_variants(gpu, ["baseline"], True, chosen=["norm-gemv"])) == 2
    assert "--factors" in refusal(lambda: variants(gpu, ["baseline"], True, chosen=["nonsense"]))
    # more rules than can be crossed: DLight's own are, as in the study
    assert set(crossed_factors(gpu)) == {"matmul", "gemv", "reduction", "general-reduction"}
    assert "--factors" in refusal(lambda: variants(gpu, full_factorial=True, chosen=factors(gpu)))


def test_a_set_says_launches_and_bytes(tiny_model: Path) -> None:
    job = Job(str(tiny_model), "cuda", prompt_tokens=10, toggles="passes")
    none, every = (schedule(lambda *_: None, job, names) for names in ("baseline", ",".join(all_passes("cuda"))))
    assert none["code"] != every["code"]
    assert every["launches_token"] == 5 * 2 + 3 < none["launches_token"]
    assert every["bytes_token"] < none["bytes_token"]  # intermediate results stay where they are
    weights = 4 * (2 * 12 * 32 * 32 + 97 * 32)
    assert weights < every["bytes_token"] < 1.5 * weights


def all_passes(target: str) -> tuple[str, ...]:
    return pass_factors(load_target(target))


def test_bytes_of_a_call() -> None:
    rows: list[dict[str, Any]] = [
        {"bytes": "8 * b * (p + 1)", "calls": {"greedy_b1": 3}},
        {"bytes": 100, "calls": {"prefill": 1}},
        {"bytes": 7, "calls": {"greedy_b1": 1, "prefill": 1}},
    ]
    assert bytes_of(rows, "greedy_b1", 9) == 3 * evaluate("8 * b * (p + 1)", {"b": 1, "p": 9}) + 7 == 247
    assert bytes_of([*rows, {"bytes": None, "calls": {"greedy_b1": 1}}], "greedy_b1", 9) is None


def test_command_lines_that_mean_nothing(tmp_path: Path) -> None:
    from tuning.ablation import main

    wrong: list[dict[str, Any]] = [
        {"passes": True, "rule": ["a.b:C"]},
        {"factors": "linear-gelu"},
        {"passes": True, "sets": "stock"},
        {"passes": True, "sets": ","},
        {"passes": True, "full_factorial": True, "factors": "cpu-gemv"},
    ]
    for options in wrong:
        refusal(partial(call, main, model="bundled", records=tmp_path / "r.json", **options))


def call(main: Any, **options: Any) -> None:
    """A typer command as a function: what is not given has its default."""
    import inspect

    defaults = {name: p.default for name, p in inspect.signature(main).parameters.items()}
    main(**{**defaults, **options})


@pytest.mark.heavy
def test_a_run_and_its_resumption(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tuning.ablation import main

    records = tmp_path / "passes.json"
    options: dict[str, Any] = {"model": str(tiny_model), "passes": True, "records": records, "repeats": 1}
    options |= {"prompt_tokens": 8, "generate": 4, "functions": False, "reference": "cpu"}
    call(main, **options, sets="baseline,all")
    first = json.loads(records.read_text())
    call(main, **options, sets="baseline,only-linear-gelu,all")
    second = json.loads(records.read_text())
    assert first["identity"]["toggles"] == "passes"
    rows = {row["set"]: row for row in second["rows"]}
    assert [row["status"] for row in rows.values()] == ["ok"] * 3
    for row in first["rows"]:  # measured once
        assert row["decode_tok_s"] == rows[row["set"]]["decode_tok_s"]
    launches = {name: row["launches_token"] for name, row in rows.items()}
    assert launches["all"] < launches["only-linear-gelu"] < launches["baseline"]
    assert all(row["bytes_token"] > 0 for row in rows.values())
    text = render(second, "md")
    assert "launches a token" in text and "MB a token" in text and "Graph passes" in text
    assert "launches_token" in render(second, "csv").splitlines()[0]
    assert "another kind of set" in refusal(lambda: call(main, **{**options, "passes": False, "sets": "baseline"}))
    capsys.readouterr()
