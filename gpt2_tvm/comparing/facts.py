"""What is measured once and not in rounds: an artifact's quality, and the peak of its memory. Kept in a journal."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from gpt2_tvm.artifact import Artifact
from gpt2_tvm.errors import UserError
from gpt2_tvm.measure.cases import Case
from tuning.journal import JournalFile, Line

if TYPE_CHECKING:
    from gpt2_tvm.evaluation.scoring import Progress

Json = dict[str, Any]
Bar = Callable[[int], "AbstractContextManager[Progress]"]  # windows -> a progress of scoring


@dataclass(frozen=True)
class Text:
    """A text to be scored and how: see `evaluation.scoring.Scorer` for context, stride and limit (tokens)."""

    name: str
    content: str
    context: int | None = None
    stride: int | None = None
    limit: int | None = None

    @property
    def key(self) -> list[Any]:
        """What tells this evaluation from others."""
        return [hashlib.sha256(self.content.encode()).hexdigest()[:16], self.context, self.stride, self.limit]


class Facts(JournalFile):
    """Measured facts by (kind, artifact's digest, how)."""

    format_name: ClassVar[str] = "gpt2-tvm-facts-1"
    identity: ClassVar[Mapping[str, str]] = {}
    maker: ClassVar[str] = "python -m gpt2_tvm.compare"

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.known: dict[str, Json] = {}

    def note(self, line: Line) -> None:
        """See `JournalFile.note`."""
        self.known[line["key"]] = line["value"]

    def keep(self, key: str, value: Json) -> Json:
        """Write a fact down; returns it."""
        self.append({"key": key, "value": value})
        return value


def open_facts(cache: Path) -> Facts:
    """The facts in a cache folder, opened for more; use it as a context. UserError where another run writes there."""
    journal = Facts(cache / "facts.jsonl")
    try:
        journal.open({})
    except UserError as error:
        raise UserError(str(error).replace("--records", "--cache")) from None
    return journal


def quality_key(artifact: Artifact, text: Text) -> str:
    """The name of a quality in `Facts`."""
    return f"quality {artifact.manifest['digest']} {text.key}"


def memory_key(artifact: Artifact, case: Case, device: str | None, threads: int | None) -> str:
    """The name of a peak of memory in `Facts`."""
    return f"memory {artifact.manifest['digest']} {case} {device} {threads}"


def quality(
    artifact: Artifact, text: Text, device: str | None = None, threads: int | None = None, bar: Bar | None = None
) -> Json:
    """Perplexity of `text`: {"perplexity", "bits_per_byte", "nll" (nats a token), "scored_tokens"}.

    bar: makes the progress for a number of windows.
    """
    from gpt2_tvm.engine import Engine
    from gpt2_tvm.evaluation.scoring import Scorer
    from gpt2_tvm.tokenizer import load_tokenizer

    assert artifact.tokenizer is not None  # `check_tokenizers` came first
    tokenizer = load_tokenizer(artifact.tokenizer)
    engine = Engine(artifact.path, device, verify=False, threads=threads)
    ids = tokenizer.encode(text.content)[: text.limit]
    scorer = Scorer(engine, ids, tokenizer, text.context, text.stride)
    with bar(len(scorer.windows)) if bar is not None else nullcontext() as say:
        score = scorer.run(say)
    return {
        "perplexity": score.perplexity,
        "bits_per_byte": score.bits_per_byte if score.scored_bytes else None,
        "nll": score.mean_nll,
        "scored_tokens": score.scored_tokens,
    }


def peak_memory(artifact: Artifact, case: Case, device: str | None = None, threads: int | None = None) -> Json:
    """{"peak_rss_mb"}: of a process that does one turn of `case` and nothing else, in 10^6 bytes, mapped weights
    included. On another device than a CPU this is the host's side alone."""
    from gpt2_tvm.measure.subjects import EngineSubject
    from gpt2_tvm.measure.workers import Worker

    worker = Worker(str(artifact.path), EngineSubject, str(artifact.path), device, threads)
    try:
        worker.ready()
        sample = worker.turn(case)
    except BaseException:
        worker.kill()
        raise
    worker.close()
    return {"peak_rss_mb": sample.peak_rss_mb}


def check_tokenizers(artifacts: list[Artifact]) -> None:
    """Refuse artifacts whose perplexities could not be compared: without a tokenizer, or with different ones."""
    first = artifacts[0]
    for artifact in artifacts:
        if artifact.tokenizer is None:
            raise UserError(
                f"{artifact.path} has no tokenizer, so its ids mean no text; leave --text out, or compile it from a "
                "checkpoint that has vocab.json and merges.txt"
            )
        if _tokenizer_files(artifact) != _tokenizer_files(first):
            raise UserError(
                f"{artifact.path} has another tokenizer than {first.path}, so their perplexities cannot be compared; "
                "give artifacts of one model, or leave --text out"
            )


def _tokenizer_files(artifact: Artifact) -> dict[str, str]:
    files = artifact.manifest["files"]
    wanted = ("tokenizer/tokenizer.json", "tokenizer/vocab.json", "tokenizer/merges.txt")
    return {name: files[name]["sha256"] for name in wanted if name in files}
