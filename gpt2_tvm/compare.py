"""`python -m gpt2_tvm.compare`: schemes, or any artifacts of one model, in one table: size, memory, speed, quality."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gpt2_tvm import cli
from gpt2_tvm.errors import UserError

if TYPE_CHECKING:
    from gpt2_tvm.comparing.comparison import Comparison

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command()
def main(
    paths: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[ARTIFACT...]", help="Folders made by compile; the first is what others are put over."),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="As for compile: compile it in each of --schemes, where the cache lacks it.")
    ] = None,
    schemes: Annotated[
        str | None,
        typer.Option(
            help="With --model: the schemes, a comma list; default q0f32 and all others that the target has. Without: "
            "keep the artifacts of these schemes, in this order."
        ),
    ] = None,
    target: Annotated[str, typer.Option(help="As for compile.")] = "cpu",
    cache: Annotated[
        Path | None, typer.Option(help="Where compiled artifacts and what was measured once stay [artifacts/compare].")
    ] = None,
    batch: Annotated[str, typer.Option(help="Sequences at a time, a comma list.")] = "1,4,12",
    prompt_tokens: Annotated[int, typer.Option(help="Tokens of the prompt.")] = 322,
    generate: Annotated[int, typer.Option(help="Tokens to decode after it.")] = 64,
    repeats: Annotated[int, typer.Option(help="Rounds that count.")] = 5,
    warmup: Annotated[int, typer.Option(help="Rounds before them that do not.")] = 1,
    text: Annotated[str | None, typer.Option(metavar="FILE", help="Also score this text: perplexity.")] = None,
    text_format: Annotated[str, typer.Option(help="What it is: plain, wikitext-raw or wikitext-tokens.")] = "plain",
    context: Annotated[int | None, typer.Option(help="As for perplexity.")] = None,
    stride: Annotated[int | None, typer.Option(help="As for perplexity.")] = None,
    limit_tokens: Annotated[int | None, typer.Option(help="Score only this many tokens, from the start.")] = None,
    device: Annotated[str | None, typer.Option(help="Default: the first of the artifacts' kind.")] = None,
    threads: Annotated[int | None, typer.Option(help="Threads of the CPU. Default: one a physical core.")] = None,
    max_seq_len: Annotated[int | None, typer.Option(help="With --model: as for compile.")] = None,
    seed: Annotated[int, typer.Option(help="With --model: of random weights.")] = 0,
    format_: Annotated[str, typer.Option("--format", help="What to print: md, csv or json.")] = "md",
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Also write JSON here.")] = None,
    figure: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Draw memory by batch and the Pareto fronts, as FILE.png and FILE.svg."),
    ] = None,
) -> None:
    """Compare schemes of one model, or any artifacts of it (a pruned one, say), each figure beside the first's.

    Timing is interleaved: in each round every artifact has one turn for every batch. Peak memory is that of a process
    which runs one batch alone. Perplexity and memory are kept in the cache, and so are compiled artifacts: the same
    command goes on where it was stopped.

    How much faster an artifact decodes stands beside what its bytes predict: what a step of the first one has to read
    over what a step of this one has to (weights, and the KV cache).

    \b
    Examples:
      python -m gpt2_tvm.compare --model bundled --text persuasion.txt --figure schemes.png
      python -m gpt2_tvm.compare --model gpt2 --schemes q0f32,q0f16,q8f32 --batch 1,4,12 --json schemes.json
      python -m gpt2_tvm.compare artifacts/gpt2-q0f32-cpu artifacts/gpt2-half-mlp-q0f32-cpu --batch 1
    """
    from gpt2_tvm.comparing import figures, tables
    from gpt2_tvm.comparing.comparison import Comparison
    from gpt2_tvm.comparing.facts import Text
    from gpt2_tvm.comparing.making import CACHE
    from gpt2_tvm.evaluation.text import load_text
    from gpt2_tvm.measure.cases import cross, parse_sizes

    tables.check_format(format_)
    if repeats < 1 or warmup < 0 or (threads is not None and threads < 1):
        raise UserError(f"--repeats {repeats} --warmup {warmup}: at least 1 round counts, and at least 1 thread runs")
    if limit_tokens is not None and limit_tokens < 2:
        raise UserError(f"--limit-tokens {limit_tokens}: at least 2 are needed to predict one")
    batches = sorted(parse_sizes("--batch", batch))
    cases = cross(batches, parse_sizes("--prompt-tokens", str(prompt_tokens)), parse_sizes("--generate", str(generate)))
    if json_file is not None:
        cli.check_writable("--json", json_file)
    if figure is not None:
        cli.check_writable("--figure", figures.files_of(figure)[0])
    # read before anything is compiled: a text that is not there is told now
    scored = (
        Text(Path(text).name, load_text(text, text_format), context, stride, limit_tokens) if text is not None else None
    )
    store = cache or CACHE
    if model is not None:
        if paths:
            raise UserError("give artifacts, or --model to have them compiled; not both")
        made = _compile(model, target, _list(schemes), batches, store, max_seq_len, seed)
    else:
        made = _choose(list(paths or ()), _list(schemes))
    comparison = Comparison(made, cases, scored, repeats, warmup, device, threads)
    _measure(comparison, store, format_, json_file, figure)


def _list(text: str | None) -> list[str] | None:
    """A comma list without repeats; None for None."""
    if text is None:
        return None
    parts = list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    if not parts:
        raise UserError(f"--schemes {text!r}: name at least one, such as q0f32,q0f16")
    return parts


def _compile(
    model: str,
    target: str,
    schemes: list[str] | None,
    batches: list[int],
    cache: Path,
    max_seq_len: int | None,
    seed: int,
) -> list[Path]:
    from gpt2_tvm.checkpoint import resolve_model
    from gpt2_tvm.comparing.making import make_artifacts, schemes_for
    from gpt2_tvm.compile import progress_on_stderr
    from targets import load_target, specialise

    if schemes is None:
        schemes = schemes_for(resolve_model(model, seed=seed).config, specialise(load_target(target)))
    with progress_on_stderr() as say:
        return make_artifacts(
            model, target, schemes, {1, *batches}, cache, max_seq_len=max_seq_len, seed=seed, progress=say
        )


def _choose(paths: list[Path], schemes: list[str] | None) -> list[Path]:
    """The artifacts of the schemes, in their order; all of them without a choice."""
    from gpt2_tvm.artifact import open_artifact

    if not paths:
        raise UserError("name artifacts to compare, or a --model to compile; see --help")
    if schemes is None:
        return paths
    by_scheme: dict[str, list[Path]] = {}
    for path in paths:
        by_scheme.setdefault(open_artifact(path, verify=False).manifest["quantization"], []).append(path)
    lacking = [name for name in schemes if name not in by_scheme]
    if lacking:
        raise UserError(
            f"--schemes {','.join(lacking)}: these artifacts are {', '.join(by_scheme)}; compile what is missing, or "
            "give --model"
        )
    return [path for name in schemes for path in by_scheme[name]]


def _measure(comparison: Comparison, cache: Path, format_: str, json_file: Path | None, figure: Path | None) -> None:
    """Run, print, write, draw. An interrupted run writes what it has, marked as not complete, and ends with 130."""
    from gpt2_tvm.comparing.facts import open_facts
    from gpt2_tvm.comparing.figures import draw
    from gpt2_tvm.comparing.tables import render
    from gpt2_tvm.perplexity import progress as scoring

    with cli.kept_if_interrupted(json_file, comparison.result), open_facts(cache) as journal:
        comparison.run(journal, scoring, cli.progress)
    result = comparison.result()
    drawing = partial(draw, result, figure) if figure is not None else None
    cli.conclude(render(result, format_), result, json_file, drawing, comparison.session.failures)


if __name__ == "__main__":
    cli.run(app)
