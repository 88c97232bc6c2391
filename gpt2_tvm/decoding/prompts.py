"""The prompts of a run: texts of the data sets as ids of each model, chosen so that all models take the same ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gpt2_tvm.errors import UserError

if TYPE_CHECKING:
    from gpt2_tvm.artifact import Artifact
    from gpt2_tvm.datasets import Dataset


@dataclass(frozen=True)
class Unit:
    """Prompts that run as one batch. ids: by model, one list a prompt."""

    dataset: str
    index: int
    ids: Mapping[Path, list[list[int]]]

    @property
    def key(self) -> str:
        return f"{self.dataset}/{self.index}"


def spread(items: Sequence[str], count: int) -> list[str]:
    """`count` of the items (all, for 0 or where there are fewer), evenly over the whole."""
    if count == 0 or count >= len(items):
        return list(items)
    return [items[i * len(items) // count] for i in range(count)]


def make_units(
    datasets: Sequence[Dataset],
    models: Mapping[Path, Artifact],
    count: int,
    tokens: int,
    max_tokens: int,
    batch: int,
) -> tuple[list[Unit], list[str]]:
    """Encode and group.

    Args:
        count: prompts of each data set.
        tokens: how many ids a prompt of plain text has; other prompts have their own length.
        max_tokens: that are to follow; a prompt that leaves no room for them in some model's context is left out.

    Returns the units, and a note for people about what was left out. UserError where nothing is left of a data set, and
    for texts with a model that has no tokenizer.
    """
    from gpt2_tvm.data import prompt_for
    from gpt2_tvm.datasets import BUNDLED
    from gpt2_tvm.tokenizer import load_tokenizer

    tokenizers = {path: load_tokenizer(a.tokenizer) if a.tokenizer else None for path, a in models.items()}
    units: list[Unit] = []
    notes: list[str] = []
    for dataset in datasets:
        if dataset.empty:
            notes.append(f"{dataset.name}: {dataset.empty} rows without a prompt were left out")
        kept: list[dict[Path, list[int]]] = []
        long = short = 0
        for text in spread(dataset.prompts, count):
            ids: dict[Path, list[int]] = {}
            for path, artifact in models.items():
                tokenizer = tokenizers[path]
                if dataset.name == BUNDLED:
                    whole = prompt_for(tokenizer, artifact.config.vocab_size, tokens or 322)
                elif tokenizer is None:
                    raise UserError(
                        f"{path} has no tokenizer (its weights are random); give it --dataset {BUNDLED}, which is ids"
                    )
                else:
                    whole = tokenizer.encode(text)
                ids[path] = whole[:tokens] if dataset.name == "text" and tokens else whole
            if any(len(i) + max_tokens > models[p].max_seq_len for p, i in ids.items()):
                long += 1
            elif dataset.name == "text" and any(len(i) < tokens for i in ids.values()):
                short += 1
            else:
                kept.append(ids)
        if long:
            notes.append(f"{dataset.name}: {long} prompts leave no room for {max_tokens} tokens and were left out")
        if short:
            notes.append(f"{dataset.name}: {short} prompts at the end of the file are too short and were left out")
        if not kept:
            raise UserError(
                f"no prompt of {dataset.name} leaves room for {max_tokens} tokens in the context; "
                "lower --max-tokens or --prompt-tokens, or compile with a larger --max-seq-len"
            )
        for index, first in enumerate(range(0, len(kept), batch)):
            group = kept[first : first + batch]
            units.append(Unit(dataset.name, index, {path: [ids[path] for ids in group] for path in models}))
    return units, notes
