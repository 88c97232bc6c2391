"""Plain text, a paragraph a line: a prompt begins with each paragraph and runs on over those after it."""

from __future__ import annotations

from pathlib import Path

CHARACTERS = 8192  # of one prompt at most; it is cut to a number of tokens by whoever knows the tokenizer


def prompts(path: Path) -> list[str]:
    """A prompt a paragraph, "" for a blank line."""
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    made = []
    for first in range(len(lines)):
        text, at = lines[first], first + 1
        while text and at < len(lines) and len(text) < CHARACTERS:
            text, at = f"{text}\n{lines[at]}" if lines[at] else text, at + 1
        made.append(text[:CHARACTERS])
    return made
