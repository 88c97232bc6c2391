"""Whether every strategy writes exactly what greedy decoding writes, on prompts of published data sets, at every draft
length. Nothing is timed: a table of counts, and exit code 1 where a text differs.

    python benchmarks/decoding_identity.py --model artifacts/austen-all --draft artifacts/austen-draft \\
        --dataset spider:FILE,e2e:FILE,dialogsum:FILE,text:FILE [--prompts 50] [--records FILE] [--json FILE]

Prompts keep their last tokens, where the question stands; plain text keeps its first. The same command goes on where
it was stopped if --records is given.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import typer

from gpt2_tvm.cli import progress, run, write_json
from gpt2_tvm.errors import UserError
from tuning.journal import JournalFile, Line

if TYPE_CHECKING:
    from gpt2_tvm.artifact import Artifact
    from gpt2_tvm.decoding.subjects import Subject
    from gpt2_tvm.engine import Engine

app = typer.Typer(add_completion=False, rich_markup_mode=None)

Prompts = dict[str, list[list[int]]]  # ids by data set
HEADINGS = ("strategy", "draft", "k", "prompts", "same", "tokens", "drafted", "accepted")
COUNTED = ("prompts", "same", "tokens", "drafted", "examined", "accepted")


class Records(JournalFile):
    """A line for each subject and data set. Attributes: lines, by (subject's key, data set)."""

    format_name: ClassVar[str] = "gpt2-tvm-decoding-identity-1"
    identity: ClassVar[Mapping[str, str]] = {
        "artifacts": "artifact (compiled again since?)",
        "datasets": "choice of data sets",
        "options": "choice of options",
    }
    maker: ClassVar[str] = "python benchmarks/decoding_identity.py"

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.lines: dict[tuple[str, str], Line] = {}

    def note(self, line: Line) -> None:
        """See `JournalFile.note`."""
        self.lines[line["subject"], line["dataset"]] = line


def take_prompts(specs: Sequence[str], artifact: Artifact, count: int, longest: int) -> Prompts:
    """`count` prompts of each data set, evenly over the file, as ids, `longest` of them at most. UserError for a model
    without a tokenizer."""
    from gpt2_tvm.datasets import load
    from gpt2_tvm.decoding.prompts import spread
    from gpt2_tvm.tokenizer import load_tokenizer

    if artifact.tokenizer is None:
        raise UserError(f"{artifact.path} has no tokenizer (its weights are random); texts need one")
    tokenizer, taken = load_tokenizer(artifact.tokenizer), Prompts()
    for spec in specs:
        dataset = load(spec)
        front = dataset.name == "text"
        # a text's prompt is all that follows a paragraph: of that a little is enough
        texts = [text[: 20 * longest] if front else text for text in spread(dataset.prompts, count)]
        ids = [tokenizer.encode(text) for text in texts]
        taken[dataset.name] = [row[:longest] if front else row[-longest:] for row in ids if row]
    return taken


def compare(
    subject: Subject,
    engines: Mapping[Path, Engine],
    drafts: Mapping[Path, Engine],
    prompts: Sequence[Sequence[int]],
    expected: Sequence[Sequence[int]],
    options: Mapping[str, Any],
) -> Line:
    """One strategy on the prompts of one data set -> counts, and which prompts' texts differ."""
    from gpt2_tvm.decoding.registry import make_strategy
    from gpt2_tvm.decoding.strategy import Decoding

    draft = drafts[subject.draft] if subject.draft else None
    strategy = make_strategy(subject.strategy, engines[subject.model], draft, subject.length or "0")
    rows, made, batch = [], [], int(options["batch"])
    for first in range(0, len(prompts), batch):
        decoding = Decoding(strategy, prompts[first : first + batch], options["max_tokens"], options["eos"])
        made += decoding.run()
        rows += decoding.rows
    differ = [i for i, (a, b) in enumerate(zip(made, expected, strict=True)) if a != b]
    return {
        "prompts": len(made),
        "same": len(made) - len(differ),
        "tokens": sum(map(len, made)),
        **{key: sum(getattr(row, key) for row in rows) for key in ("drafted", "examined", "accepted")},
        "differ": differ,
        "ids_sha256": hashlib.sha256(json.dumps(made).encode()).hexdigest(),
    }


def summed(lines: Mapping[tuple[str, str], Line], subjects: Sequence[Subject]) -> list[Line]:
    """A row for each subject: counts over all data sets."""
    rows = []
    for subject in subjects:
        own = {dataset: line for (key, dataset), line in lines.items() if key == subject.key}
        rows.append(
            {
                "strategy": subject.strategy,
                "draft": str(subject.draft) if subject.draft else None,
                "draft_length": subject.length or None,
                **{key: sum(line[key] for line in own.values()) for key in COUNTED},
                "differ": {dataset: line["differ"] for dataset, line in own.items() if line["differ"]},
            }
        )
    return rows


def render(result: Mapping[str, Any]) -> str:
    """The table."""
    from gpt2_tvm.measure.tables import markdown_table

    rows = [
        [
            row["strategy"],
            Path(row["draft"]).name if row["draft"] else "",
            row["draft_length"] or "",
            *(str(row[key]) for key in ("prompts", "same", "tokens", "drafted", "accepted")),
        ]
        for row in result["rows"]
    ]
    counts = ", ".join(f"{count} of {name}" for name, count in result["prompts"].items())
    return markdown_table(HEADINGS, rows, 2) + (
        f"\nPrompts: {counts}; {result['options']['max_tokens']} tokens after each at most, batch "
        f"{result['options']['batch']}, beside {result['model']}'s greedy text.\n"
    )


@contextmanager
def _kept(path: Path | None, header: Mapping[str, Any], fresh: bool) -> Iterator[Records]:
    import tempfile

    with tempfile.TemporaryDirectory() as scratch, Records(path or Path(scratch) / "lines.jsonl") as records:
        records.open(header, fresh)
        yield records


@app.command()
def main(
    model: Annotated[Path, typer.Option(help="Artifact of the target; with streams for strategy streaming.")],
    dataset: Annotated[str, typer.Option(help="spider:FILE, e2e:FILE, dialogsum:FILE, text:FILE, with commas.")],
    strategy: Annotated[
        str, typer.Option(help="With commas; naive, speculative, lookup, mixed, early, streaming.")
    ] = "naive,lookup,speculative,mixed,streaming",
    draft: Annotated[str, typer.Option(help="Artifacts that draft, as for bench_decoding.")] = "",
    draft_length: Annotated[str, typer.Option(help="A comma list.")] = "1,2,3,4,5,6,7,8,adaptive",
    prompts: Annotated[int, typer.Option(help="Of each data set, evenly over the file.")] = 50,
    prompt_tokens: Annotated[int, typer.Option(help="Of each prompt, at most.")] = 96,
    max_tokens: Annotated[int, typer.Option(help="After each prompt, at most.")] = 24,
    batch: Annotated[int, typer.Option(help="Prompts at a time.")] = 1,
    threads: Annotated[int | None, typer.Option(help="Of the CPU.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Also write JSON here.")] = None,
    records: Annotated[Path | None, typer.Option(metavar="FILE", help="Keep what is done here.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Begin --records anew.")] = False,
) -> None:
    """Compare every strategy's text with greedy's, token by token."""
    from gpt2_tvm.build import versions
    from gpt2_tvm.decoding.subjects import Subject, expand, told
    from gpt2_tvm.engine import Engine
    from gpt2_tvm.tokenizer import load_tokenizer

    def listed(text: str) -> list[str]:
        return [part.strip() for part in text.split(",") if part.strip()]

    for name, value in (("prompts", prompts), ("prompt-tokens", prompt_tokens), ("max-tokens", max_tokens)):
        if value < 1:
            raise UserError(f"--{name} {value}: give at least 1")
    others = [name for name in listed(strategy) if name not in ("greedy", "sample")]
    greedy = Subject(model, "greedy")
    subjects = expand([model], others, [Path(part) for part in listed(draft)], listed(draft_length))
    engines = {model: Engine(model, threads=threads)}
    drafts = {path: Engine(path, threads=threads) for path in dict.fromkeys(s.draft for s in subjects if s.draft)}
    target = engines[model].artifact
    if not 1 <= batch <= target.batch_sizes[-1]:
        raise UserError(f"--batch {batch}: {model} was compiled for 1 to {target.batch_sizes[-1]}")
    longest = min(prompt_tokens, target.max_seq_len - 1)
    taken = take_prompts(listed(dataset), target, prompts, longest)
    eos = load_tokenizer(target.tokenizer).eos_id if target.tokenizer else None
    options = {"prompts": prompts, "prompt_tokens": prompt_tokens, "max_tokens": max_tokens, "batch": batch}
    header = {
        "artifacts": {str(path): e.artifact.manifest["digest"] for path, e in (engines | drafts).items()},
        "datasets": listed(dataset),
        "options": options,
    }
    with (
        _kept(records, header, fresh) as kept,
        progress((len(subjects) + 1) * len(taken)) as say,
    ):
        lines = _run([greedy, *subjects], taken, kept, say, engines, drafts, {**options, "eos": eos})
    result = {
        **told(target),
        "artifact": str(model),
        "prompts": {name: len(rows) for name, rows in taken.items()},
        "options": options,
        "greedy_ids_sha256": {name: lines[greedy.key, name]["ids_sha256"] for name in taken},
        "versions": versions(),
        "rows": summed(lines, subjects),
    }
    sys.stdout.write(render(result))
    if json_file is not None:
        write_json(json_file, result)
    if any(row["same"] != row["prompts"] for row in result["rows"]):
        raise typer.Exit(1)


def _run(
    subjects: Sequence[Subject],
    taken: Prompts,
    kept: Records,
    say: Callable[[str, int], Any],
    engines: Mapping[Path, Engine],
    drafts: Mapping[Path, Engine],
    options: Mapping[str, Any],
) -> dict[tuple[str, str], Line]:
    """What the records lack; the first subject is greedy, whose texts are kept beside its counts."""
    from gpt2_tvm.decoding.registry import make_strategy
    from gpt2_tvm.decoding.strategy import Decoding

    greedy, done, batch = subjects[0], 0, int(options["batch"])
    for name, prompts in taken.items():
        if (greedy.key, name) not in kept.lines:
            texts: list[list[int]] = []
            strategy = make_strategy("greedy", engines[greedy.model])
            for first in range(0, len(prompts), batch):
                part = prompts[first : first + batch]
                texts += Decoding(strategy, part, options["max_tokens"], options["eos"]).run()
            digest = hashlib.sha256(json.dumps(texts).encode()).hexdigest()
            kept.append({"subject": greedy.key, "dataset": name, "texts": texts, "ids_sha256": digest})
        expected = kept.lines[greedy.key, name]["texts"]
        for subject in subjects[1:]:
            say(f"{name}: {subject.label}", done)
            done += 1
            if (subject.key, name) not in kept.lines:
                counts = compare(subject, engines, drafts, prompts, expected, options)
                kept.append({"subject": subject.key, "dataset": name, **counts})
    return kept.lines


if __name__ == "__main__":
    run(app)
