"""What ships with the package: a small trained GPT-2 with its tokenizer, and the benchmark's prompt."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gpt2_tvm.tokenizer import Tokenizer

_HERE = Path(__file__).parent


def bundled_model() -> Path:
    """The folder of the bundled model, in Hugging Face layout and float16, with a model card."""
    return _HERE / "austen"


def bundled_draft() -> Path:
    """The folder of a smaller model that drafts for the bundled one, as that one's: distilled from it."""
    return _HERE / "austen-draft"


def bundled_streams() -> Path:
    """The folder of streams with which the bundled model drafts for itself, see `gpt2_tvm.streams`."""
    return _HERE / "austen-streams"


@cache
def _gettysburg() -> dict[str, Any]:
    return json.loads((_HERE / "gettysburg.json").read_text(encoding="utf-8"))


def prompt_ids() -> list[int]:
    """The benchmark's prompt: the Gettysburg Address as 322 ids of GPT-2's own vocabulary (50257)."""
    return list(_gettysburg()["ids"])


def prompt_text() -> str:
    """The text of `prompt_ids`, with the leading <|endoftext|> and the closing newline."""
    return _gettysburg()["text"]


def prompt_for(tokenizer: Tokenizer | None, vocab_size: int, n: int) -> list[int]:
    """The benchmark's prompt for any model: exactly `n` ids, each below `vocab_size`.

    Args:
        tokenizer: the model's own; it encodes `prompt_text`. None: the ids of `prompt_ids` are taken.
        vocab_size: the model's. An id outside it is taken modulo `vocab_size`; that happens only where the
            tokenizer does not belong to the model, or where there is none, and then the prompt means nothing
            but costs the same.
        n: how many; the text starts again from its beginning where it is too short, and is cut where it is
        too long.
    """
    if n < 1 or vocab_size < 1:
        raise ValueError(f"a prompt of {n} ids from a vocabulary of {vocab_size}: both must be at least 1")
    ids = (tokenizer.encode(prompt_text()) if tokenizer is not None else None) or prompt_ids()
    return [ids[i % len(ids)] % vocab_size for i in range(n)]
