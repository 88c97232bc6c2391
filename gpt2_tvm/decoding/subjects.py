"""What a run of bench_decoding compares: every strategy on every model, with the drafts and lengths it can take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpt2_tvm.artifact import Artifact, open_artifact
from gpt2_tvm.decoding.registry import DRAFTED, check_name
from gpt2_tvm.errors import UserError

HOW = {  # to come by a draft
    "early": "python -m gpt2_tvm.decoding.early makes one",
    "streaming": "compile the model with --streams FOLDER, which python -m gpt2_tvm.train_streams makes",
}


@dataclass(frozen=True)
class Subject:
    """One row of the table.

    Attributes:
        model: the target's artifact.
        strategy: its name.
        draft: the draft's artifact, or None.
        length: tokens to draft, "adaptive", or "" where nothing is drafted.
        planted: the planted acceptance, or None.
    """

    model: Path
    strategy: str
    draft: Path | None = None
    length: str = ""
    planted: float | None = None

    @property
    def key(self) -> str:
        """What it is called in records."""
        parts = [str(self.model), self.strategy, str(self.draft or ""), self.length]
        return "|".join([*parts, "" if self.planted is None else f"{self.planted:g}"])

    @property
    def label(self) -> str:
        """What it is called in tables and figures."""
        draft = f" {self.draft.name}" if self.draft else ""
        length = f" {self.length}" if self.length else ""
        planted = "" if self.planted is None else f" planted {self.planted:g}"
        return f"{self.model.name}: {self.strategy}{draft}{length}{planted}"


def expand(
    models: Sequence[Path],
    strategies: Sequence[str],
    drafts: Sequence[Path],
    lengths: Sequence[str],
    planted: Sequence[float] = (),
) -> list[Subject]:
    """Every combination that makes sense, models first. A draft of a model's own first layers is for early, any other
    for speculative and mixed; with planted rates speculative runs with these, once without a draft's cost if there is
    no draft. UserError for a strategy that has no draft to go with.
    """
    from gpt2_tvm.decoding.early import is_early

    for name in strategies:
        check_name(name)
    opened = {path: open_artifact(path, verify=False) for path in (*models, *drafts)}
    found: list[Subject] = []
    for model in models:
        early = [d for d in drafts if is_early(opened[model], opened[d])]
        for name in strategies:
            if name not in DRAFTED:
                found.append(Subject(model, name))
                continue
            mates: list[Path | None] = [None]
            if name == "early":
                mates = list(early)
            elif name == "streaming":
                mates = [None] if opened[model].streams is not None else []
                if not mates and any(opened[other].streams is not None for other in models):
                    continue
            elif name in ("speculative", "mixed"):
                mates = [d for d in drafts if d not in early]
                if planted and name == "speculative":
                    mates = [*drafts] or [None]
            if not mates:
                how = HOW.get(name, "name one with --draft")
                raise UserError(f"--strategy {name} has no draft for {model}; {how}")
            rates: list[float | None] = list(planted) if name == "speculative" and planted else [None]
            found += [Subject(model, name, m, k, rate) for m in mates for rate in rates for k in lengths]
    return list(dict.fromkeys(found))


def told(artifact: Artifact) -> dict[str, Any]:
    """What a row says about its model."""
    m = artifact.manifest
    return {
        "model": m["model"],
        "quantization": m["quantization"],
        "attention": m["attention"],
        "target": m["target"]["name"],
        "random_weights": m["random_weights"],
    }
