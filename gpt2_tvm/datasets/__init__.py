"""Prompts from published data sets: loaders for their files as published, with the templates usual for each.

Nothing is downloaded and nothing of them ships with the package: a spec names a file, `spider:dev.json`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from gpt2_tvm.datasets import dialogsum, e2e, spider, text
from gpt2_tvm.errors import UserError

LOADERS: dict[str, Callable[[Path], list[str]]] = {
    "spider": spider.prompts,
    "e2e": e2e.prompts,
    "dialogsum": dialogsum.prompts,
    "text": text.prompts,
}
BUNDLED = "gettysburg"  # ships with the package, takes no file; in ids, so that a model without a tokenizer can use it


@dataclass(frozen=True)
class Dataset:
    """name: as in the spec; prompts: distinct texts, none empty; empty: how many rows had nothing to ask about."""

    name: str
    prompts: list[str]
    empty: int = 0


def load(spec: str) -> Dataset:
    """The prompts of "name:FILE", or of "gettysburg". UserError for another name, and for a file that is missing or of
    another format."""
    name, _, file = spec.partition(":")
    if name == BUNDLED and not file:
        from gpt2_tvm.data import prompt_text

        return Dataset(name, [prompt_text()])
    if name not in LOADERS or not file:
        raise UserError(f"--dataset {spec}: give {', '.join(f'{n}:FILE' for n in LOADERS)} or {BUNDLED}")
    path = Path(file)
    if not path.is_file():
        raise UserError(f"--dataset {spec}: there is no file {file}")
    try:
        found = LOADERS[name](path)
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 (byte {error.start}); convert it first, with iconv say") from None
    filled = [prompt for prompt in found if prompt]
    if not filled:
        raise UserError(f"{file} has no row with a prompt in it")
    return Dataset(name, list(dict.fromkeys(filled)), len(found) - len(filled))
