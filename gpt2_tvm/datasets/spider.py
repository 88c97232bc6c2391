"""Spider (Yu et al. 2018): questions about databases, to be answered in SQL. One JSON list of objects."""

from __future__ import annotations

import json
from pathlib import Path

from gpt2_tvm.errors import UserError


def prompts(path: Path) -> list[str]:
    """A prompt a row, "" for one without a question."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path} is not JSON (line {error.lineno}); give Spider's train_spider.json or dev.json"
        ) from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) and "question" in row for row in rows):
        raise UserError(f"{path} is no list of objects with a question; give Spider's train_spider.json or dev.json")
    return [prompt(str(row.get("db_id", "")), str(row["question"] or "")) for row in rows]


def prompt(database: str, question: str) -> str:
    """Text to SQL without examples."""
    question = " ".join(question.split())
    return f"Database: {database}\nQuestion: {question}\nSQL: SELECT" if question else ""
