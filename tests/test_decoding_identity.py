"""benchmarks/decoding_identity.py: counts of a short run, a text that differs, and going on where it was stopped."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from gpt2_tvm.decoding.lookup import Lookup
from gpt2_tvm.decoding.strategy import TextRow

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
import decoding_identity

TEXT = "Anne walked to the village.\nShe was not long there, and came home to tell.\nThe Admiral was out.\n" * 8


@pytest.fixture
def arguments(bundled_artifact: Path, tmp_path: Path) -> list[str]:
    text, spider = tmp_path / "text", tmp_path / "spider"
    text.write_text(TEXT)
    spider.write_text(json.dumps([{"db_id": "cats", "question": f"How many cats of age {i}?"} for i in range(4)]))
    made = ["--model", str(bundled_artifact), "--dataset", f"text:{text},spider:{spider}", "--strategy", "naive,lookup"]
    return [*made, "--prompts", "3", "--prompt-tokens", "20", "--max-tokens", "8", "--draft-length", "1,4"]


def command(*arguments: str) -> Any:
    return CliRunner().invoke(decoding_identity.app, arguments)


def test_counts_by_strategy_and_length(arguments: list[str], tmp_path: Path) -> None:
    records, file = tmp_path / "lines.jsonl", tmp_path / "identity.json"
    done = command(*arguments, "--records", str(records), "--json", str(file))
    assert done.exit_code == 0, done.output
    result = json.loads(file.read_text())
    assert [(row["strategy"], row["draft_length"]) for row in result["rows"]] == [
        *(("naive", None), ("lookup", "1"), ("lookup", "4")),
    ]
    assert all((row["prompts"], row["same"], row["differ"]) == (6, 6, {}) for row in result["rows"])
    assert result["prompts"] == {"text": 3, "spider": 3} and result["rows"][0]["tokens"] > 6
    before = records.read_text()
    assert before.count("\n") == 1 + 2 * 4
    records.write_text("\n".join(before.splitlines()[:4]) + "\n")  # stopped after a third
    again = command(*arguments, "--records", str(records))
    assert again.stdout == done.stdout and records.read_text() == before


def test_a_text_that_differs_is_told(arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = Lookup.step

    def wrong(self: Lookup, rows: list[TextRow]) -> list[list[int]]:
        made = step(self, rows)
        return [[(tokens[0] + 1) % 2048, *tokens[1:]] if len(rows[0].ids) % 7 == 0 else tokens for tokens in made]

    monkeypatch.setattr(Lookup, "step", wrong)
    file = tmp_path / "identity.json"
    done = command(*arguments, "--json", str(file))
    assert done.exit_code == 1
    naive, *lookups = json.loads(file.read_text())["rows"]
    assert naive["same"] == 6 and all(row["same"] < 6 and row["differ"] for row in lookups)
