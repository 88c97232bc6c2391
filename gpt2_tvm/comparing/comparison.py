"""One comparison: quality, memory, then all timing in the interleaved rounds of `gpt2_tvm.measure`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from gpt2_tvm.artifact import Artifact, open_artifact
from gpt2_tvm.comparing import facts
from gpt2_tvm.comparing.facts import Bar, Facts, Json, Text
from gpt2_tvm.errors import UserError
from gpt2_tvm.measure import bounds
from gpt2_tvm.measure.cases import Case
from gpt2_tvm.measure.results import rates, spread
from gpt2_tvm.measure.session import Session

if TYPE_CHECKING:
    from gpt2_tvm.measure.timing import Say


@dataclass
class Comparison:
    """Artifacts of one model, or of its pruned and fine-tuned kin; the first is what the others are compared with.

    Args:
        paths: the artifacts' folders.
        cases: what is timed of each (`measure.cases`).
        text: what is scored, or None.
        repeats, warmups, device, threads: as for `measure.session.Session`.

    Construction makes every check that needs nothing loaded and raises UserError.
    """

    paths: Sequence[Path]
    cases: Sequence[Case]
    text: Text | None = None
    repeats: int = 5
    warmups: int = 1
    device: str | None = None
    threads: int | None = None
    _facts: dict[str, Json] = field(default_factory=dict)

    def __post_init__(self) -> None:
        doubled = [path for path in self.paths if list(self.paths).count(path) > 1]
        if doubled:
            raise UserError(f"{doubled[0]} is given twice; name each artifact once")
        self.artifacts = [open_artifact(path, verify=False) for path in self.paths]
        if self.text is not None:
            facts.check_tokenizers(self.artifacts)
        self.session = Session(
            self.paths, self.cases, self.repeats, self.warmups, device=self.device, threads=self.threads
        )

    def run(self, journal: Facts, scoring: Bar, timing: Callable[[int], AbstractContextManager[Say]]) -> None:
        """Everything that is not in `journal`, and the rounds. An interrupt leaves what there is to `result`."""
        self._facts = journal.known
        for artifact in self.artifacts if self.text is not None else []:
            assert self.text is not None
            measure = partial(facts.quality, artifact, self.text, self.device, self.threads, scoring)
            self._keep(journal, facts.quality_key(artifact, self.text), measure)
        memory = [(a, c) for a in self.artifacts for c in self.cases]
        turns = len(memory) + self.session.turns
        with timing(turns) as told:
            for done, (artifact, case) in enumerate(memory):
                told(f"memory: {artifact.path}, batch {case.batch}", done)
                measure = partial(facts.peak_memory, artifact, case, self.device, self.threads)
                self._keep(journal, facts.memory_key(artifact, case, self.device, self.threads), measure)
            self.session.run(lambda what, n: told(what, n + len(memory)))

    def _keep(self, journal: Facts, key: str, measure: Callable[[], Json]) -> None:
        """Measure what is not known yet. What fails is told at the end, and the rest goes on."""
        if key in self._facts:
            return
        try:
            journal.keep(key, measure())
        except UserError as error:
            self.session.failures.append(str(error))

    def result(self) -> Json:
        """{"complete", "date", "text", "other_cores", "bounds", "failures", "rows"}; rows by artifact, then by case."""
        measured = self.session.result()
        by_run = {(row["_path"], row["_case"]): row for row in self._located(measured["rows"])}
        rows = [self._row(i, case, by_run.get((i, case))) for i in range(len(self.artifacts)) for case in self.cases]
        return {
            "complete": measured["complete"],
            "date": measured["date"],
            "text": self.text.name if self.text else None,
            "other_cores": measured["other_cores"],
            "bounds": measured["bounds"],
            "failures": measured["failures"],
            "rows": rows,
        }

    def _located(self, rows: Sequence[Json]) -> list[Json]:
        """A session's rows with the index of their artifact and their case (they come case by case, artifacts in
        order, without those that have no sample)."""
        wanted = [(i, c) for c in self.cases for i in range(len(self.artifacts)) if self.session.samples(i, c)]
        return [{**row, "_path": i, "_case": c} for row, (i, c) in zip(rows, wanted, strict=True)]

    def _row(self, index: int, case: Case, measured: Json | None) -> Json:
        artifact, first = self.artifacts[index], self.artifacts[0]
        quality, base = self._quality(artifact), self._quality(first)
        step, first_step = _step_bytes(artifact, case), _step_bytes(first, case)
        memory = self._facts.get(facts.memory_key(artifact, case, self.device, self.threads), {})
        keys = ("prefill_tok_s", "prefill_tok_s_sd", "decode_tok_s", "decode_tok_s_sd", "repeats", "device", "threads")
        size = sum(file["bytes"] for file in artifact.manifest["files"].values())
        perplexity, of_first = quality.get("perplexity"), base.get("perplexity")
        return {
            "artifact": str(artifact.path),
            "model": artifact.manifest["model"],
            "quantization": artifact.manifest["quantization"],
            "target": artifact.manifest["target"]["name"],
            "size_mb": size / 1e6,
            "params_mb": sum(bounds.artifact_param_bytes(artifact).values()) / 1e6,
            "perplexity": perplexity,
            "perplexity_change": perplexity / of_first - 1 if perplexity and of_first else None,
            "bits_per_byte": quality.get("bits_per_byte"),
            "scored_tokens": quality.get("scored_tokens"),
            "batch": case.batch,
            "prompt_tokens": case.prompt_tokens,
            "generate_tokens": case.generate_tokens,
            "peak_rss_mb": memory.get("peak_rss_mb"),
            **{key: (measured or {}).get(key) for key in keys},
            **self._ratios(index, case),
            "step_mb": step / 1e6,
            "step_ratio": first_step / step,
        }

    def _quality(self, artifact: Artifact) -> Json:
        return self._facts.get(facts.quality_key(artifact, self.text), {}) if self.text is not None else {}

    def _ratios(self, index: int, case: Case) -> Json:
        """Times as fast as the first artifact, round by round: medians and spreads; None where either has no sample."""
        ours, first = self.session.samples(index, case), self.session.samples(0, case)
        rounds = min(len(ours), len(first))
        found: Json = {}
        pairs = zip(("prefill", "decode"), rates(case, ours[:rounds]), rates(case, first[:rounds]), strict=True)
        for name, mine, theirs in pairs:
            ratios = [a / b for a, b in zip(mine, theirs, strict=True)]
            found[f"{name}_ratio"] = median(ratios) if ratios else None
            found[f"{name}_ratio_sd"] = spread(ratios) if ratios else None
        return found


def _step_bytes(artifact: Artifact, case: Case) -> float:
    """Bytes that a decode step of this artifact reads at the least (`bounds.decode_step_bytes`)."""
    sizes, cache = bounds.artifact_param_bytes(artifact), artifact.manifest["compute_dtype"]
    return bounds.decode_step_bytes(artifact.config, sizes, cache, case)
