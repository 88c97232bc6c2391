"""An ablation's journal, and what comes out of planted records: rows, effects, tables, the figure."""

from __future__ import annotations

import errno
import json
import os
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from faults import refusal

from gpt2_tvm.cli import describe
from targets import load_target
from tuning import ablation_against, ablation_cache, ablation_figure, ablation_tables
from tuning.ablation_records import IDENTITY, Journal
from tuning.ablation_results import ROW_KEYS, moved, read_result, result
from tuning.variants import cells, variants

HEADER: dict[str, Any] = {
    **dict.fromkeys(IDENTITY, "x"),
    "prompt_tokens": 100,
    "generate_tokens": 10,
    "reference": "a reference",
}

# Records ------------------------------------------------------------------------------------------------------------


def sample(code: str, round_: int, prefill_s: float, decode_s: float) -> dict[str, Any]:
    timed = {"prefill_s": prefill_s, "decode_s": decode_s, "cycles": 3}
    return {"kind": "sample", "code": code, "round": round_, "seconds": prefill_s + decode_s, **timed}


def test_a_journal_comes_back(tmp_path: Path) -> None:
    file = tmp_path / "new" / "a.jsonl"
    with Journal.begin(file, HEADER) as journal:
        journal.append(sample("c", 0, 1.0, 2.0))
        journal.append({"kind": "failure", "code": "d", "status": "crash", "detail": "x"})
    again = Journal.read(file)
    assert again.samples == {"c": {0: sample("c", 0, 1.0, 2.0)}} and again.failures["d"]["status"] == "crash"
    before = file.read_bytes()
    with Journal.begin(file, HEADER) as journal:
        journal.append(sample("c", 1, 1.0, 2.0))
        assert set(journal.samples["c"]) == {0, 1}
    assert file.read_bytes().startswith(before)
    with Journal.begin(file, HEADER, fresh=True) as journal:
        assert journal.samples == {}
    assert len(file.read_bytes().splitlines()) == 1


def test_a_torn_tail_is_cut_off(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    with Journal.begin(file, HEADER) as journal:
        journal.append(sample("c", 0, 1.0, 2.0))
    whole = file.read_bytes()
    torn = json.dumps(sample("c", 1, 1.0, 2.0)).encode()
    for cut in (1, 20, len(torn)):  # the last lacks its newline alone
        file.write_bytes(whole + torn[:cut])
        assert set(Journal.read(file).samples["c"]) == {0}
        with Journal.begin(file, HEADER):
            pass
        assert file.read_bytes() == whole
    file.write_bytes(whole[:10])  # killed in its first line
    with Journal.begin(file, HEADER) as journal:
        assert journal.samples == {}


def test_foreign_and_damaged_journals_are_refused_and_kept(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    with Journal.begin(file, HEADER) as journal:
        journal.append(sample("c", 0, 1.0, 2.0))
    whole = file.read_bytes()
    for key, name in IDENTITY.items():
        message = refusal(lambda key=key: Journal.begin(file, {**HEADER, key: "another"}))
        assert f"another {name}" in message and "--fresh" in message
    assert file.read_bytes() == whole
    lines = whole.splitlines(keepends=True)
    other = (b"garbage", b"[1]", b'{"kind":"other"}', b'{"round":0}', b'{"kind":"check"}', b'{"kind":1}')
    zero = json.dumps({**sample("c", 1, 1.0, 2.0), "prefill_s": 0}).encode()
    for line in (*other, zero):
        damaged = lines[0] + line + b"\n" + lines[1]
        file.write_bytes(damaged)
        assert f"damaged at byte {len(lines[0])}" in refusal(lambda: Journal.begin(file, HEADER))
        assert "damaged" in refusal(lambda: Journal.read(file))
        assert file.read_bytes() == damaged
    file.write_text("my thesis\n")
    for fresh in (False, True):
        assert "no file of" in refusal(lambda fresh=fresh: Journal.begin(file, HEADER, fresh))
    assert file.read_text() == "my thesis\n"
    assert "no records" in refusal(lambda: Journal.read(tmp_path / "nothing"))


def test_two_runs_do_not_share_a_journal(tmp_path: Path) -> None:
    with Journal.begin(tmp_path / "a.jsonl", HEADER):
        assert "another run" in refusal(lambda: Journal.begin(tmp_path / "a.jsonl", HEADER))


def test_a_full_disk_costs_one_line_and_no_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.jsonl"
    journal = Journal.begin(file, HEADER)
    whole, write = file.read_bytes(), os.write

    def full(descriptor: int, data: bytes) -> int:
        if len(data) > 20:
            return write(descriptor, data[:20])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError) as caught:
        journal.append(sample("c" * 50, 0, 1.0, 2.0))
    monkeypatch.undo()
    assert "the disk is full" in describe(caught.value) and "a.jsonl" in describe(caught.value)
    assert file.read_bytes() == whole and journal.samples == {}
    journal.append(sample("c", 0, 1.0, 2.0))  # once there is room again
    assert set(Journal.read(file).samples["c"]) == {0}


def test_sources_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ablation_cache.sources() == ablation_cache.sources(["cpu-gemv"])
    module = tmp_path / "a_rule_of_mine.py"
    module.write_text("class R: pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    first = ablation_cache.sources(["a_rule_of_mine:R"])
    assert first != ablation_cache.sources()
    module.write_text("class R: pass  # changed\n")
    assert ablation_cache.sources(["a_rule_of_mine:R"]) != first


# Results ------------------------------------------------------------------------------------------------------------

TARGET = "webgpu"


def function(name: str, rule: str, **calls: int) -> dict[str, Any]:
    return {"name": name, "role": f"role of {name}", "rule": rule, "kernels": 1, "calls": calls}


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    """Planted records: baseline, one set twice as fast, one with the same code, one that crashed, one unmeasured."""
    journal = Journal.begin(tmp_path / "planted.jsonl", HEADER)
    mm = {"prefill": 2, "decode_b1": 0}
    functions = {
        "base": [function("mm", "fallback", **mm), function("attn", "ours", prefill=1, decode_b1=1)],
        "fast": [function("mm", "matmul", **mm), function("attn", "ours", prefill=1, decode_b1=1)],
    }
    made = {"baseline": "base", "only-matmul": "fast", "without-gemv": "fast", "only-gemv": "bad"}
    by_name = {v.name: v for v in variants(load_target(TARGET))}
    for name, code in made.items():
        line = {"kind": "set", "set": name, "rules": list(by_name[name].rules), "sources": "s", "status": "ok"}
        journal.append({**line, "compile_s": 2.0, "code": code, "functions": functions.get(code, functions["base"])})
    crash = {"status": "compile-error", "detail": "rule reduction failed", "stage": "lowering", "timeout_s": 9.0}
    journal.append(
        {"kind": "set", "set": "only-reduction", "rules": ["reduction", "fallback"], "sources": "s", **crash}
    )
    for round_, noise in enumerate((0.9, 1.0, 1.1)):
        journal.append(sample("base", round_, 2.0 * noise, 1.0))
        journal.append(sample("fast", round_, 1.0 * noise, 0.5))
    journal.append({"kind": "check", "code": "base", "difference": 1e-6})
    journal.append({"kind": "failure", "code": "bad", "status": "wrong-result", "detail": "decode: 0.3", "stage": "c"})
    times = {"mm": {"time_us": 300.0, "time_us_sd": 1.0}, "attn": {"time_us": 200.0, "time_us_sd": 1.0}}
    decode = {"attn": {"time_us": 50.0, "time_us_sd": 1.0}}
    journal.append({"kind": "functions", "code": "base", "times": {"prefill": times, "decode": decode}})
    times = {**times, "mm": {"time_us": 100.0, "time_us_sd": 1.0}}
    journal.append({"kind": "functions", "code": "fast", "times": {"prefill": times, "decode": decode}})
    return journal


NAMES = ("baseline", "only-matmul", "only-gemv", "only-reduction", "without-gemv", "full")


@pytest.fixture
def planted(journal: Journal) -> dict[str, Any]:
    target = load_target(TARGET)
    return result(journal, variants(target, NAMES), target, ())


def test_rows_of_planted_records(planted: dict[str, Any]) -> None:
    rows = {row["set"]: row for row in planted["rows"]}
    assert list(rows) == list(NAMES) and all(tuple(row) == ROW_KEYS for row in rows.values())
    base, fast = rows["baseline"], rows["only-matmul"]
    assert base["prefill_tok_s"] == pytest.approx(50.0) and fast["prefill_tok_s"] == pytest.approx(100.0)
    assert base["prefill_tok_s_sd"] == pytest.approx(np.std([50 / 0.9, 50, 50 / 1.1], ddof=1))
    assert fast["prefill_speedup"] == pytest.approx(2.0) and fast["decode_speedup"] == pytest.approx(2.0)
    relative = base["prefill_tok_s_sd"] / 50
    assert fast["prefill_speedup_sd"] == pytest.approx(2 * np.hypot(relative, relative))
    assert (base["prefill_speedup"], base["prefill_speedup_sd"], base["decode_tok_s_sd"]) == (1.0, 0.0, 0.0)
    assert base["repeats"] == 3 and base["difference"] == 1e-6 and base["same_code_as"] is None
    assert rows["without-gemv"]["same_code_as"] == "only-matmul" and rows["without-gemv"]["decode_tok_s"] == 20.0
    assert (rows["only-gemv"]["status"], rows["only-gemv"]["detail"]) == ("wrong-result", "decode: 0.3")
    assert rows["only-gemv"]["prefill_tok_s"] is None
    assert rows["only-reduction"]["status"] == "compile-error" and rows["full"]["status"] == "not-measured"
    assert not planted["complete"] and planted["effects"] is None
    assert fast["hits"] == {"matmul": 1, "ours": 1}
    # prefill: two calls of 300 us beside one of 200; decode: attention alone
    assert base["shares"] == {"fallback": {"prefill": 0.75}, "ours": {"prefill": 0.25, "decode": 1.0}} or base[
        "shares"
    ] == {"fallback": {"prefill": 0.75, "decode": 0.0}, "ours": {"prefill": 0.25, "decode": 1.0}}
    assert fast["shares"]["matmul"]["prefill"] == pytest.approx(0.5)


def test_functions_that_moved(planted: dict[str, Any]) -> None:
    (row,) = moved(planted, "baseline", "only-matmul")
    assert (row["name"], row["rule_a"], row["rule_b"]) == ("mm", "fallback", "matmul")
    assert (row["prefill_time_us_a"], row["prefill_time_us_b"]) == (300.0, 100.0)
    assert moved(planted, "only-matmul", "without-gemv") == []


def test_a_function_that_a_fusion_named_anew_stands_beside_what_it_was() -> None:
    def of(name: str, role: str, rule: str, time_us: float | None, calls: int = 1) -> dict[str, Any]:
        row = {"name": name, "role": role, "rule": rule, "prefill_calls": 0, "decode_calls": calls}
        none = {"prefill_time_us": None, "prefill_time_us_sd": None}
        return {**row, **none, "decode_time_us": time_us, "decode_time_us_sd": time_us and 1.0}

    a = [  # the head in two, of which one function of the other set can be beside one alone
        of("NT_matmul9", "decode, greedy: logits (wte)", "fallback", 1330.0),
        of("NT_matmul9_rest", "decode, greedy: logits (wte)", "fallback", 70.0),
        of("layer_norm2", "decode, greedy: layer_norm (ln_1)", "fallback", 250.0),
        of("NT_matmul3", "verify: mlp.c_fc + bias", "fallback", None, 0),
        of("attention", "decode, greedy: attention", "ours", 40.0),
    ]
    b = [
        of("fused_norm_NT_matmul9", "decode, greedy: ln_f, logits (wte)", "webgpu-gemv", 428.0),
        of("NT_matmul3", "verify: mlp.c_fc + bias", "webgpu-gemv", None, 0),
        of("attention", "decode, greedy: attention", "ours", 9.0),
    ]
    found = {"rows": [{"set": "a", "code": "A"}, {"set": "b", "code": "B"}], "functions": {"A": a, "B": b}}
    logits, rest, norm = moved(found, "a", "b")
    assert (logits["name"], logits["name_b"], logits["rule_b"]) == (
        "NT_matmul9",
        "fused_norm_NT_matmul9",
        "webgpu-gemv",
    )
    assert (logits["decode_time_us_a"], logits["decode_time_us_b"]) == (1330.0, 428.0)
    assert (rest["name"], rest["rule_b"], rest["decode_time_us_b"]) == ("NT_matmul9_rest", None, None)
    assert (norm["name"], norm["rule_a"], norm["rule_b"]) == ("layer_norm2", "fallback", None)


def test_a_code_is_called_by_the_set_that_people_look_for(journal: Journal) -> None:
    by_name = {v.name: v for v in variants(load_target(TARGET))}
    line = {"kind": "set", "set": "full", "rules": list(by_name["full"].rules), "sources": "s", "status": "ok"}
    journal.append({**line, "compile_s": None, "code": "fast", "functions": journal.sets["only-matmul"]["functions"]})
    journal.append({"kind": "run", "seconds": 62.5, "compiled": 3})
    target = load_target(TARGET)
    found = result(journal, variants(target, NAMES), target, ())
    rows = {row["set"]: row for row in found["rows"]}
    assert rows["full"]["same_code_as"] is None and rows["only-matmul"]["same_code_as"] == "full"
    assert [row[0] for row in _cells(ablation_against.against(found, found))] == ["baseline", "full"]
    assert "62 s (3 sets compiled)" in ablation_tables.render(found, "md")


def _cells(text: str) -> list[list[str]]:
    """The rows of a Markdown table, without its head."""
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    return rows[2:]


def test_another_runs_medians_beside_these(planted: dict[str, Any], tmp_path: Path) -> None:
    second = json.loads(json.dumps(planted))
    for row in second["rows"]:
        if row["set"] == "only-matmul":
            row["prefill_tok_s"] *= 1.08
            row["decode_tok_s"] *= 0.8
    file = tmp_path / "second.json"
    file.write_text(json.dumps(second))
    text = ablation_against.against(planted, read_result(file, "--against"))
    assert _cells(text) == [["baseline", "1.00", "1.00"], ["only-matmul", "1.08", "0.80"]]  # one row for each code
    assert "prefill: 2 of 2 sets within 10 %, the furthest 8% apart" in text
    assert "decode: 1 of 2 sets within 10 %, the furthest 25% apart" in text
    second["identity"]["target"] = "cuda"
    assert "another experiment (target cuda)" in refusal(lambda: ablation_against.against(planted, second))
    second["identity"]["target"], second["rows"] = "x", []
    assert "no set was timed" in refusal(lambda: ablation_against.against(planted, second))
    (tmp_path / "thin.json").write_text(json.dumps({**planted, "identity": {}}))
    for wrong in (tmp_path / "none.json", Path(__file__), tmp_path / "thin.json"):
        assert "give another --against" in refusal(lambda wrong=wrong: read_result(wrong, "--against"))


def test_tables_say_it_all(planted: dict[str, Any]) -> None:
    text = ablation_tables.render(planted, "md", ("baseline", "only-matmul"))
    for part in ("2.00 ± ", "same code as only-matmul", "wrong-result: decode: 0.3", "1 (75 % / 0 %)", "| mm "):
        assert part in text, part
    assert "a reference" in text
    table = ablation_tables.render(planted, "csv").splitlines()
    assert table[0] == ",".join(ROW_KEYS) and len(table) == 1 + len(NAMES)
    assert json.loads(ablation_tables.render(planted, "json")) == json.loads(json.dumps(planted))
    assert "no set 'x'" in refusal(lambda: ablation_tables.render(planted, "md", ("baseline", "x")))
    refusal(lambda: ablation_tables.check_format("html"))
    assert [ablation_tables.plus_minus(*v) for v in ((None, None), (17.25, 0.31), (1636.0, 50.2))] == [
        "",
        "17.2 ± 0.3",
        "1636 ± 50",
    ]


def test_effects_of_a_planted_factorial_design(tmp_path: Path) -> None:
    """Matmul triples a prefill; either reduction doubles decode, both together do no more."""
    target = load_target(TARGET)
    journal = Journal.begin(tmp_path / "j", HEADER)
    every = variants(target, full_factorial=True)
    for variant in every:
        code = "+".join(sorted(variant.on)) or "none"
        line = {"kind": "set", "set": variant.name, "rules": list(variant.rules), "sources": "s", "status": "ok"}
        journal.append({**line, "compile_s": 1.0, "code": code, "functions": []})
        prefill = 3.0 if "matmul" in variant.on else 1.0
        decode = 2.0 if variant.on & {"reduction", "general-reduction"} else 1.0
        if code not in journal.samples:
            for round_ in range(3):
                journal.append(sample(code, round_, 1 / prefill, 1 / decode))
    found = result(journal, every, target, ())
    terms = {tuple(t["factors"]): t["ratio"] for t in found["effects"]["prefill"]["terms"]}
    assert terms["matmul",] == pytest.approx(3.0) and terms["gemv",] == pytest.approx(1.0)
    assert all(ratio == pytest.approx(1.0) for names, ratio in terms.items() if len(names) == 2)
    terms = {tuple(t["factors"]): t["ratio"] for t in found["effects"]["decode"]["terms"]}
    assert terms["reduction",] == pytest.approx(2**0.5)
    assert terms["reduction", "general-reduction"] == pytest.approx(2**-0.5)
    assert found["effects"]["decode"]["cells"] == found["effects"]["decode"]["of_cells"] == len(cells(target))
    text = ablation_tables.render(found, "md")
    assert "reduction x general-reduction" in text and "0.71 ± 0.00" in text


def test_the_figure_shows_speedups_and_names_what_failed(planted: dict[str, Any], tmp_path: Path) -> None:
    png, svg = ablation_figure.draw(planted, tmp_path / "deep" / "figure.png")
    assert png.read_bytes().startswith(b"\x89PNG\r\n") and sorted(p.name for p in png.parent.iterdir()) == [
        "figure.png",
        "figure.svg",
    ]
    text = svg.read_text()
    ElementTree.fromstring(text)
    for part in ("only-matmul", "wrong-result", "compile-error", "times baseline", *ablation_figure.COLOURS.values()):
        assert part.lower() in text.lower(), part
    assert "not-measured" not in text
    again = ablation_figure.draw(planted, tmp_path / "again.svg")[1]
    assert again.read_bytes() == svg.read_bytes()  # a figure changes only with what it shows
    refusal(lambda: ablation_figure.files_of(tmp_path / "a.pdf"))
    nothing = {**planted, "rows": [{**row, **dict.fromkeys(("prefill_speedup", "decode_speedup"))} for row in
                                   planted["rows"]]}  # fmt: skip
    refusal(lambda: ablation_figure.draw(nothing, tmp_path / "b.png"))


def test_the_figure_without_a_baseline_shows_rates(planted: dict[str, Any], tmp_path: Path) -> None:
    rows = [row for row in planted["rows"] if row["set"] != "baseline"]
    _, svg = ablation_figure.draw({**planted, "baseline": False, "rows": rows}, tmp_path / "a")
    assert "tokens a second" in svg.read_text()
