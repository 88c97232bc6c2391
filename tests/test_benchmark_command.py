"""The benchmark's command: a real run on a tiny model, its outputs and faults, the peer, and `--collect`.

No test asserts a timing.
"""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from commands import run_here

from gpt2_tvm.errors import UserError
from gpt2_tvm.measure import collect, tables
from gpt2_tvm.measure.results import LATER_KEYS, ROW_KEYS

KEYS = {*ROW_KEYS, *LATER_KEYS}
COMMAND = [sys.executable, "-m", "gpt2_tvm.benchmark"]


def benchmark(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *map(str, arguments)], capture_output=True, text=True, timeout=300)


# The command -----------------------------------------------------------------------------------------------------


def test_help_is_told_without_the_heavy_imports() -> None:
    code = "import sys, gpt2_tvm.benchmark; print({'tvm', 'torch', 'matplotlib', 'transformers'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"
    told = benchmark("--help")
    assert told.returncode == 0 and "--prompt-tokens" in told.stdout and "--peer" in told.stdout


@pytest.fixture(scope="module")
def measured(tiny_artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:
    """What a run over two artifacts and four cases printed as JSON lines, and what it wrote."""
    folder = tmp_path_factory.mktemp("results")
    other = shutil.copytree(tiny_artifact, folder / "other")
    sizes = ("--prompt-tokens", "4,20", "--generate", 6, "--batch", "1,2", "--repeats", 2)
    done = benchmark(tiny_artifact, other, *sizes, "--format", "jsonl", "--json", folder / "r.json")
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads((folder / "r.json").read_text())


@pytest.mark.heavy
def test_the_command_measures_the_cross_product(measured: tuple[str, dict[str, Any]]) -> None:
    printed, result = measured
    assert result["complete"] and result["failures"] == [] and result["comparisons"] == []
    assert [json.loads(line) for line in printed.splitlines()] == result["rows"]
    sizes = [(row["batch"], row["prompt_tokens"], row["generate_tokens"]) for row in result["rows"]]
    assert sizes == [(b, n, 6) for b in (1, 2) for n in (4, 20) for _ in range(2)]
    for row in result["rows"]:
        assert set(row) == KEYS and row["repeats"] == 2
        assert row["decode_tok_s"] > 0 and row["bound_share"] == pytest.approx(row["decode_gb_s"] / row["bound_gb_s"])
        assert row["versions"]["apache-tvm"] and row["device"] and row["peak_rss_mb"] > 20
    read, fma = result["bounds"]  # the same for all
    assert read["gb_s"] == result["rows"][0]["bound_gb_s"] and fma["gflop_s"] == result["rows"][-1]["bound_gflop_s"]


def test_csv_and_markdown_hold_the_same_rows(measured: tuple[str, dict[str, Any]]) -> None:
    rows = measured[1]["rows"]
    read = list(csv.DictReader(io.StringIO(tables.render(measured[1], "csv"))))
    assert [float(line["decode_tok_s"]) for line in read] == [row["decode_tok_s"] for row in rows]
    assert [json.loads(line["versions"]) for line in read] == [row["versions"] for row in rows]
    assert set(read[0]) == {*KEYS, "peer"} and read[0]["peer"] == ""
    assert json.loads(tables.render(measured[1], "json")) == measured[1]
    lines = tables.render(measured[1], "md").splitlines()
    assert len({line.count("|") for line in lines[: len(rows) + 2]}) == 1
    assert f" {tables.number(rows[0]['decode_tok_s'])} ± " in lines[2] and "GB/s (measured" in "\n".join(lines)


@pytest.mark.parametrize(
    ("value", "text"),
    [(4419.2, "4419"), (102.94, "103"), (10.0, "10.0"), (9.5, "9.50"), (0.013, "0.01"), (None, ""), (0.0, "0.00")],
)
def test_numbers_are_short(value: float | None, text: str) -> None:
    assert tables.number(value) == text


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--prompt-tokens", "40", "--generate", "4,9"), "make 49 tokens"),
        (("--batch", "1,3", "--prompt-tokens", "4", "--generate", "4"), "--batch 3"),
        (("--prompt-tokens", "4,x"), "--prompt-tokens '4,x'"),
        (("--format", "xml"), "unknown --format 'xml'"),
        (("--repeats", "0"), "--repeats 0"),
        (("--json", "."), "--json . cannot be written"),
        (("--json", f"{__file__}/r.json"), "cannot be written"),
        (("--figure", "f.png"), "--figure needs --collect"),
        (("--peer", "vllm", "--prompt-tokens", "4", "--generate", "4"), "unknown --peer 'vllm'"),
        (("--device", "cuda", "--prompt-tokens", "4", "--generate", "4"), "compiled for cpu, not for cuda"),
        (("nowhere",), "no artifact at nowhere"),
    ],
)
def test_what_cannot_be_measured_is_one_line(tiny_artifact: Path, arguments: tuple[str, ...], said: str) -> None:
    done = run_here("gpt2_tvm.benchmark", tiny_artifact, *arguments)
    *before, last = done.stderr.splitlines()
    assert done.returncode == 1 and done.stdout == "" and last.startswith("error: ") and said in last
    assert all(line.startswith("loading") for line in before)  # nothing was timed


def test_a_damaged_artifact_is_refused_before_anything_is_timed(tiny_artifact: Path, tmp_path: Path) -> None:
    damaged = shutil.copytree(tiny_artifact, tmp_path / "damaged")
    shard = next((damaged / "params").glob("*.bin"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    sizes = ("--prompt-tokens", 4, "--generate", 4)
    done = run_here("gpt2_tvm.benchmark", tiny_artifact, damaged, *sizes, "--json", tmp_path / "r.json")
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 1 and last.startswith(f"error: {shard} is damaged") and "warm-up" not in done.stderr
    assert not (tmp_path / "r.json").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGINT")
def test_an_interrupted_run_writes_what_it_has(tiny_artifact: Path, tmp_path: Path) -> None:
    file = tmp_path / "r.json"
    sizes = ["--prompt-tokens", "4", "--generate", "4", "--repeats", "1000000", "--json", str(file)]
    process = subprocess.Popen(
        [*COMMAND, str(tiny_artifact), *sizes],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("round 3 "):
                break
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: the workers get it too
        stdout, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    last = [line for line in stderr.splitlines() if not line.startswith("round ")]
    assert process.returncode == 130 and stdout == "" and len(last) == 2, stderr
    assert last[0] == f"what was measured so far is in {file}" and last[1].startswith("interrupted")
    result = json.loads(file.read_text())
    assert result["complete"] is False and result["rows"][0]["repeats"] >= 2 and set(result["rows"][0]) == KEYS


@pytest.mark.heavy
def test_transformers_with_the_same_weights_gives_the_same_tokens(tiny_artifact: Path, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    file = tmp_path / "r.json"
    sizes = ("--prompt-tokens", 12, "--generate", 16, "--batch", "1,2", "--repeats", 2, "--json", file)
    done = benchmark(tiny_artifact, *sizes, "--peer", "transformers")
    assert done.returncode == 0, done.stderr
    result = json.loads(file.read_text())
    assert [row.get("peer") for row in result["rows"]] == [None, "transformers"] * 2
    assert set(result["rows"][1]) == {*KEYS, "peer"} and result["rows"][1]["versions"].keys() == {
        "torch",
        "transformers",
    }
    found = result["comparisons"]
    assert [(c["batch"], c["same_tokens"], c["of_tokens"]) for c in found] == [(1, 16, 16), (2, 32, 32)]
    assert all(c["prefill_ratio"] > 0 and c["decode_ratio"] > 0 and c["decode_ratio_sd"] >= 0 for c in found)
    assert done.stdout.count("greedy tokens agree") == 2 and "Bandwidth bound" in done.stdout


# Collecting ------------------------------------------------------------------------------------------------------


def result_file(path: Path, device: str, decode: float, complete: bool = True, **changes: Any) -> Path:
    row = {
        **{key: 1 for key in KEYS},
        **{"model": "gpt2-medium", "target": "cuda", "quantization": "q0f16", "rules": "gemv", "attention": "flash"},
        **{
            "device": device,
            "decode_tok_s": decode,
            "bound_share": 0.5,
            "date": "2026-01-01",
            "versions": {},
            "runner": None,
        },
        **changes,
    }
    path.write_text(json.dumps({"complete": complete, "rows": [row]}))
    return path


def test_results_of_devices_become_one_table_and_a_chart(tmp_path: Path) -> None:
    files = [
        result_file(tmp_path / "a.json", "RTX 4090", 338.6),
        result_file(tmp_path / "b.json", "M2 Ultra", 117.2, target="metal"),
        result_file(tmp_path / "c.json", "RTX 4090", 343.4, date="2026-02-02"),  # measured again: replaces a
        result_file(tmp_path / "d.json", "RTX 4090", 20.0, peer="transformers", complete=False),
        result_file(tmp_path / "e.json", "RTX 4090", 90.0, prompt_tokens=322),
    ]
    outputs = ("--figure", tmp_path / "f.png", "--json", tmp_path / "all.json")
    done = run_here("gpt2_tvm.benchmark", "--collect", *files, *outputs)
    assert done.returncode == 0, done.stderr
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines()]
    where = {name: i for i, name in enumerate(lines[0])}
    table = [(line[where["device"]], line[where["engine (rules)"]], line[where["decode tok/s"]]) for line in lines[2:]]
    assert table == [
        ("RTX 4090", "gpt2-tvm (gemv)", "343 ± 1.0"),
        ("M2 Ultra", "gpt2-tvm (gemv)", "117 ± 1.0"),
        ("RTX 4090", "transformers", "20.0 ± 1.0"),
        ("RTX 4090", "gpt2-tvm (gemv)", "90.0 ± 1.0"),
    ]
    assert f"{tmp_path / 'd.json'}: this run was not complete" in done.stderr
    assert (tmp_path / "f.png").read_bytes().startswith(b"\x89PNG")
    merged = json.loads((tmp_path / "all.json").read_text())
    assert [row["decode_tok_s"] for row in merged["rows"]] == [343.4, 117.2, 20.0, 90.0]
    as_csv = run_here("gpt2_tvm.benchmark", "--collect", tmp_path / "all.json", "--format", "csv")
    assert [line["device"] for line in csv.DictReader(io.StringIO(as_csv.stdout))] == [t[0] for t in table]


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"rows": [{"model": "x"}]}', '{"rows": 1}', '{"rows": []}'])
def test_what_is_no_result_is_refused_by_name(tmp_path: Path, text: str) -> None:
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(UserError, match=r"r\.json is not a result|no rows"):
        collect.read_results([tmp_path / "r.json"])


def test_a_missing_result_and_an_unknown_figure_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no .*r\.json"):
        collect.read_results([tmp_path / "r.json"])
    rows, _ = collect.read_results([result_file(tmp_path / "a.json", "x", 1.0)])
    with pytest.raises(UserError, match=r"--figure .*unknown format '\.xyz'"):
        collect.draw(rows, tmp_path / "f.xyz")
    assert not (tmp_path / "f.xyz").exists()
