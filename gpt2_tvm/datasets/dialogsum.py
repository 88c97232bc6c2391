"""DialogSum (Chen et al. 2021): dialogues, to be summarised. A JSON object a line."""

from __future__ import annotations

import json
from pathlib import Path

from gpt2_tvm.errors import UserError


def prompts(path: Path) -> list[str]:
    """A prompt a row, "" for an empty dialogue. Blank lines are nothing."""
    made = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            row = None
        if not isinstance(row, dict) or "dialogue" not in row:
            raise UserError(f"{path}, line {number}: no JSON object with a dialogue; give DialogSum's *.jsonl")
        made.append(prompt(str(row["dialogue"] or "")))
    return made


def prompt(dialogue: str) -> str:
    """Summarisation without examples."""
    dialogue = dialogue.strip()
    return f"Summarize the following conversation.\n\n{dialogue}\n\nSummary:" if dialogue else ""
