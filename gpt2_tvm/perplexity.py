"""`python -m gpt2_tvm.perplexity ARTIFACT TEXT`: how well an artifact predicts a text."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gpt2_tvm import cli
from gpt2_tvm.errors import UserError

if TYPE_CHECKING:
    from gpt2_tvm.evaluation.scoring import Progress, Scorer

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command()
def main(
    artifact: Annotated[Path, typer.Argument(metavar="ARTIFACT", help="A folder made by compile.")],
    text: Annotated[str, typer.Argument(metavar="TEXT", help="A text file, or - for standard input.")],
    stride: Annotated[
        int | None,
        typer.Option(
            help="Tokens from window to window, up to the context. Default: 512, or the context if shorter. Less gives "
            "each token more to look back on, and takes longer."
        ),
    ] = None,
    context: Annotated[int | None, typer.Option(help="Tokens in a window. Default: the artifact's capacity.")] = None,
    batch: Annotated[
        int | None, typer.Option(help="Windows at a time. Default: 4, or what the artifact was compiled for if less.")
    ] = None,
    format_: Annotated[
        str, typer.Option("--format", help="What the file is: plain, wikitext-raw or wikitext-tokens.")
    ] = "plain",
    detokenize: Annotated[
        bool,
        typer.Option(
            help="Turn WikiText's spacing (words and punctuation apart, @-@, = = headings = =) back into written text."
        ),
    ] = True,
    unk: Annotated[str, typer.Option(metavar="TEXT", help="What each <unk> of wikitext-tokens becomes.")] = "<unk>",
    limit_tokens: Annotated[int | None, typer.Option(help="Score only this many tokens, from the start.")] = None,
    device: Annotated[
        str | None, typer.Option(help='"cuda:1", say; default: the first of the artifact\'s kind.')
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Also write the result here, as JSON.")
    ] = None,
) -> None:
    """Perplexity of a text: exp of the mean negative log-likelihood of its tokens, and the same in bits a byte, which
    can be compared between models with different tokenizers.

    The text is cut into windows as transformers' guide does: each token is scored once, in the first window that holds
    it. The first token of the text has no prediction; with a stride equal to the context (disjoint windows) no window's
    first token has. Log-probabilities are computed in float32 on the device and added in float64.

    Ctrl-C prints what there is by then.

    \b
    Examples:
      python -m gpt2_tvm.perplexity artifacts/austen persuasion.txt
      python -m gpt2_tvm.perplexity artifacts/gpt2-q0f32-cpu wiki.test.raw --format wikitext-raw --stride 512
    """
    from gpt2_tvm.engine import Engine
    from gpt2_tvm.evaluation.scoring import Scorer
    from gpt2_tvm.evaluation.text import load_text
    from gpt2_tvm.tokenizer import load_tokenizer

    if limit_tokens is not None and limit_tokens < 2:
        raise UserError(f"--limit-tokens {limit_tokens}: at least 2 are needed to predict one")
    content = load_text(text, format_, detokenize, unk)
    engine = Engine(artifact, device)
    folder = engine.artifact.tokenizer
    if folder is None:
        raise UserError(
            f"{artifact} has no tokenizer, so its ids mean no text; compile it from a checkpoint that has vocab.json "
            "and merges.txt"
        )
    tokenizer = load_tokenizer(folder)
    scorer = Scorer(engine, tokenizer.encode(content)[:limit_tokens], tokenizer, context, stride, batch)
    start = time.perf_counter()

    def report() -> dict[str, Any]:
        where = {"text": text, "format": format_, "detokenized": detokenize and format_ != "plain"}
        made = {**describe(scorer), **where, "seconds": round(time.perf_counter() - start, 2)}
        sys.stdout.write(summary(made))
        sys.stdout.flush()
        if json_file is not None:
            cli.write_json(json_file, made)
        return made

    try:
        with progress(len(scorer.windows)) as say:
            scorer.run(say)
    except KeyboardInterrupt:
        if scorer.result().scored_tokens:
            report()
        raise
    report()


def describe(scorer: Scorer) -> dict[str, Any]:
    """The result as --json writes it: nll in nats a token, bits_per_byte None where no byte was scored."""
    score, manifest = scorer.result(), scorer.engine.artifact.manifest
    return {
        "artifact": str(scorer.engine.artifact.path),
        **{key: manifest[key] for key in ("model", "quantization", "random_weights")},
        "target": manifest["target"]["name"],
        "complete": score.complete,
        "perplexity": score.perplexity,
        "bits_per_byte": score.bits_per_byte if score.scored_bytes else None,
        "bits_per_token": score.bits_per_token,
        "nll": score.mean_nll,
        "tokens": score.tokens,
        "scored_tokens": score.scored_tokens,
        "scored_bytes": score.scored_bytes,
        "windows": score.windows,
        "of_windows": len(scorer.windows),
        "context": scorer.context,
        "stride": scorer.stride,
        "batch": scorer.batch,
    }


def summary(made: dict[str, Any]) -> str:
    """The same for people, a few lines."""
    note = "" if made["complete"] else f" (interrupted after {made['windows']} of {made['of_windows']} windows)"
    weights = ", random weights" if made["random_weights"] else ""
    per_byte = "" if made["bits_per_byte"] is None else f"{made['bits_per_byte']:.4f} bits a byte, "
    return (
        f"{made['model']} {made['quantization']}, {made['target']}{weights}, on {made['text']}{note}\n"
        f"  perplexity {made['perplexity']:.4f} a token, {per_byte}{made['bits_per_token']:.4f} bits a token\n"
        f"  {made['scored_tokens']:,} of {made['tokens']:,} tokens scored ({made['scored_bytes']:,} bytes), "
        f"{made['windows']} windows of up to {made['context']}, stride {made['stride']}, {made['seconds']:.1f} s\n"
    )


@contextmanager
def progress(windows: int) -> Iterator[Progress]:
    """A bar on stderr where that is a terminal, with the perplexity so far; else a line every tenth of the way."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        yield _lines(windows)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("scoring", total=windows)
        yield lambda done, value: bar.update(task, completed=done, description=f"perplexity {value:.3f}")


def _lines(windows: int) -> Progress:
    tenths = 0

    def say(done: int, value: float) -> None:
        nonlocal tenths
        if 10 * done // windows > tenths:
            tenths = 10 * done // windows
            print(f"window {done} of {windows}: perplexity {value:.3f}", file=sys.stderr, flush=True)

    return say


if __name__ == "__main__":
    cli.run(app)
