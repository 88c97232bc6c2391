"""E2E NLG (Novikova et al. 2017): restaurants as attributes, to be described in words. CSV with columns mr and ref."""

from __future__ import annotations

import csv
import re
from pathlib import Path

from gpt2_tvm.errors import UserError

_ATTRIBUTE = re.compile(r"([^,\[\]]+)\[([^\]]*)\]")


def prompts(path: Path) -> list[str]:
    """A prompt a row, "" for one without attributes. Rows with another reference for the same attributes repeat it."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        column = next((name for name in ("mr", "MR") if name in (reader.fieldnames or ())), None)
        if column is None:
            raise UserError(f"{path} has no column mr; give E2E's trainset.csv, devset.csv or testset.csv")
        return [prompt(row[column] or "") for row in reader]


def prompt(meaning: str) -> str:
    """The attributes in a line, as Li and Liang 2021 ("Prefix-Tuning") give them to GPT-2."""
    pairs = [f"{name.strip()} : {value.strip()}" for name, value in _ATTRIBUTE.findall(meaning)]
    return " | ".join(pairs) + "\n" if pairs else ""
