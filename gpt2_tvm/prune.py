"""`python -m gpt2_tvm.prune once | gradual | sweep`: weights and dimensions left out, and what that costs and gains."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from gpt2_tvm import cli
from gpt2_tvm.errors import UserError

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    no_args_is_help=True,
    help="Prune a checkpoint: once; gradually, with fine-tuning; or several ways beside each other (sweep).\n\n"
    "Methods: magnitude (single weights become zeros), inputs (input columns of every linear layer), mlp (units of the "
    "MLP), heads (whole heads); the last three make the compiled model smaller.\n\n"
    "python -m gpt2_tvm.prune once --model gpt2 --method mlp --share 0.5 --output half --json half.json",
)
DTYPES = ("float32", "float16", "bfloat16")

Model = Annotated[str, typer.Option(help="As for python -m gpt2_tvm.compile.")]
Method = Annotated[str, typer.Option(help="magnitude, inputs, mlp, heads; several with commas.")]
Scope = Annotated[str, typer.Option(help="layer: each layer alike. global: all layers' weights ranked together.")]
Multiple = Annotated[int, typer.Option(help="Numbers of units and inputs that stay are rounded up to this.")]
Dtype = Annotated[str, typer.Option(help="What the checkpoint stores: float32, float16 or bfloat16.")]
JsonFile = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Also write what is told here.")]
Output = Annotated[Path, typer.Option(help="The new checkpoint's folder, in Hugging Face layout.")]


def _methods(text: str) -> list[str]:
    return list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))


def _check(dtype: str, json_file: Path | None) -> None:
    if dtype not in DTYPES:
        raise UserError(f"--dtype {dtype!r}: choose {', '.join(DTYPES)}")
    if json_file is not None:
        cli.check_writable("--json", json_file)


@app.command()
def once(
    model: Model,
    output: Output,
    method: Method = "mlp",
    share: Annotated[float, typer.Option(help="Of the weights, or of the dimensions, that goes; 0 to 1.")] = 0.5,
    scope: Scope = "layer",
    multiple: Multiple = 32,
    dtype: Dtype = "float32",
    seed: Annotated[int, typer.Option(help="Of random weights.")] = 0,
    json_file: JsonFile = None,
) -> None:
    """Prune a share at once. The new checkpoint is one that compile takes.

    \b
    python -m gpt2_tvm.prune once --model bundled --method mlp --share 0.5 --output half
    python -m gpt2_tvm.compile --model half
    """
    from gpt2_tvm.checkpoint import resolve_model
    from gpt2_tvm.pruning.cut import check_choice, prune

    _check(dtype, json_file)
    check_choice(_methods(method), share, scope, multiple)
    source = resolve_model(model, seed=seed)
    if source.note:
        print(f"note: {source.note}", file=sys.stderr)
    told = prune(source, output, _methods(method), share, scope, multiple, dtype)
    print(summary(output, told))
    if json_file is not None:
        cli.write_json(json_file, {"model": source.name, "output": str(output), **told})


def summary(output: Path, told: dict[str, Any]) -> str:
    """What `once` made, in a line or two."""
    zeros = told["zeros"] / told["matrix_weights"]
    text = (
        f"{output}: {told['parameters']:,} of {told['parameters_before']:,} parameters "
        f"({100 * told['parameters'] / told['parameters_before']:.1f} %)"
    )
    text += f", {100 * zeros:.1f} % of the blocks' weights are zero" if "magnitude" in told["methods"] else ""
    return text + (
        f"\n  heads {_range(told['heads'])}, MLP {_range(told['inner'])}, inputs of c_attn, attn.c_proj, c_fc "
        f"{', '.join(_range([layer[i] for layer in told['inputs']]) for i in range(3))} a layer"
    )


def _range(numbers: list[int]) -> str:
    low, high = min(numbers), max(numbers)
    return str(low) if low == high else f"{low} to {high}"


@app.command()
def gradual(
    model: Model,
    output: Output,
    text: Annotated[Path, typer.Option(metavar="FILE", help="To learn from.")],
    method: Method = "mlp",
    step: Annotated[float, typer.Option(help="What each round cuts, a share of the whole model.")] = 0.1,
    until_loss: Annotated[
        float, typer.Option(help="Stop when the validation loss passes this, in nats a token.")
    ] = 3.2,
    least: Annotated[float, typer.Option(help="Stop when this share is left.")] = 0.1,
    scope: Scope = "layer",
    multiple: Multiple = 32,
    validation: Annotated[Path | None, typer.Option(metavar="FILE", help="As for finetune.")] = None,
    text_format: Annotated[str, typer.Option(help="As for finetune.")] = "plain",
    steps: Annotated[int, typer.Option(help="Of training, each round.")] = 200,
    batch: Annotated[int, typer.Option(help="As for finetune.")] = 4,
    accumulate: Annotated[int, typer.Option(help="As for finetune.")] = 1,
    context: Annotated[int, typer.Option(help="As for finetune.")] = 256,
    rate: Annotated[float, typer.Option(help="As for finetune.")] = 5e-5,
    windows: Annotated[int, typer.Option(help="As for finetune.")] = 40,
    dtype: Dtype = "float32",
    device: Annotated[str | None, typer.Option(help="As for finetune.")] = None,
    threads: Annotated[int | None, typer.Option(help="As for finetune.")] = None,
    save_seconds: Annotated[float, typer.Option(help="As for finetune.")] = 60.0,
    seed: Annotated[int, typer.Option(help="Of all chance.")] = 0,
    json_file: JsonFile = None,
) -> None:
    """Prune a little, fine-tune, and again, until the loss passes a limit or little is left (extra `reference`).

    The last round below the limit becomes the checkpoint; all rounds stay in OUTPUT/rounds. Interrupted, the same
    command goes on.

    \b
    python -m gpt2_tvm.prune gradual --model gpt2 --text wiki.train.raw --text-format wikitext-raw --output smaller
    """
    from gpt2_tvm.checkpoint import resolve_model
    from gpt2_tvm.finetuning.corpus import load_corpus
    from gpt2_tvm.finetuning.run import choose_device, require_torch
    from gpt2_tvm.finetuning.trainer import Settings
    from gpt2_tvm.pruning.gradual import Course
    from gpt2_tvm.pruning.gradual import gradual as run

    require_torch("prune gradual")
    _check(dtype, json_file)
    course = Course(_methods(method), scope, multiple, step, until_loss, least)
    course.check()
    source = resolve_model(model)
    settings = Settings(steps, batch, accumulate, context, rate, windows=windows, seed=seed)
    settings.check(source)
    corpus = load_corpus(source, text, validation, text_format, context)
    where = choose_device(device, threads)
    with cli.progress(len(course.shares()) * steps) as say:
        told = run(source, output, course, corpus, settings, where, dtype, save_seconds, say)
    from gpt2_tvm.measure.tables import markdown_table

    cells = [
        [str(r["round"]), f"{r['share']:.0%}", f"{r['kept']:.1%}", f"{r['loss_pruned']:.4f}", f"{r['loss']:.4f}"]
        for r in told["rounds"]
    ]
    headings = ["round", "cut", "parameters left", "loss when cut", "loss when trained"]
    print(
        markdown_table(headings, cells) + f"\nloss {told['loss_before']:.4f} before; {output} is round {told['best']}"
    )
    if json_file is not None:
        cli.write_json(json_file, {"model": source.name, "output": str(output), **told})


@app.command()
def sweep(
    model: Model,
    method: Annotated[
        str, typer.Option(help="Methods, a comma list; several at once with +, such as mlp+heads.")
    ] = "magnitude,inputs,mlp,heads",
    shares: Annotated[str, typer.Option(help="Shares that are cut, a comma list.")] = "0.25,0.5,0.75",
    scope: Scope = "layer",
    multiple: Multiple = 32,
    target: Annotated[str, typer.Option(help="As for compile.")] = "cpu",
    quantization: Annotated[str, typer.Option(help="As for compile.")] = "q0f32",
    text: Annotated[str | None, typer.Option(metavar="FILE", help="Also score this text: perplexity.")] = None,
    text_format: Annotated[str, typer.Option(help="As for perplexity's --format.")] = "plain",
    limit_tokens: Annotated[int | None, typer.Option(help="Score only this many tokens, from the start.")] = None,
    batch: Annotated[str, typer.Option(help="Sequences at a time, a comma list.")] = "1",
    prompt_tokens: Annotated[int, typer.Option(help="Tokens of the prompt.")] = 64,
    generate: Annotated[int, typer.Option(help="Tokens to decode after it.")] = 64,
    repeats: Annotated[int, typer.Option(help="Rounds that count.")] = 5,
    warmup: Annotated[int, typer.Option(help="Rounds before them that do not.")] = 1,
    device: Annotated[str | None, typer.Option(help="Default: the first of the target's kind.")] = None,
    threads: Annotated[int | None, typer.Option(help="Threads of the CPU.")] = None,
    cache: Annotated[Path | None, typer.Option(help="As for compare [artifacts/compare].")] = None,
    seed: Annotated[int, typer.Option(help="Of random weights.")] = 0,
    format_: Annotated[str, typer.Option("--format", help="What to print: md, csv or json.")] = "md",
    json_file: JsonFile = None,
    figure: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw size, speed and quality, as FILE.png and FILE.svg.")
    ] = None,
) -> None:
    """Prune by several methods and shares, compile each, and measure all of them beside the whole model.

    How much faster each decodes stands beside what its bytes predict. Timing is interleaved, checkpoints and artifacts
    are kept in the cache: the same command goes on where it was stopped.

    \b
    python -m gpt2_tvm.prune sweep --model bundled --text persuasion.txt --figure pruning.png
    python -m gpt2_tvm.prune sweep --model gpt2 --method mlp --shares 0.5
    """
    from gpt2_tvm.comparing.facts import Text
    from gpt2_tvm.comparing.figures import files_of
    from gpt2_tvm.comparing.making import CACHE
    from gpt2_tvm.comparing.tables import check_format
    from gpt2_tvm.compile import progress_on_stderr
    from gpt2_tvm.evaluation.text import load_text
    from gpt2_tvm.measure.cases import cross, parse_sizes
    from gpt2_tvm.pruning.sweep import make_points, parse_shares

    check_format(format_)
    _check("float32", json_file)
    if repeats < 1 or warmup < 0 or (threads is not None and threads < 1):
        raise UserError(f"--repeats {repeats} --warmup {warmup}: at least 1 round counts, and at least 1 thread runs")
    if figure is not None:
        cli.check_writable("--figure", files_of(figure)[0])
    batches = sorted(parse_sizes("--batch", batch))
    cases = cross(batches, parse_sizes("--prompt-tokens", str(prompt_tokens)), parse_sizes("--generate", str(generate)))
    scored = Text(Path(text).name, load_text(text, text_format), limit=limit_tokens) if text is not None else None
    store = cache or CACHE
    with progress_on_stderr() as say:
        points = make_points(
            model,
            _methods(method),
            parse_shares(shares),
            scope,
            target,
            quantization,
            {1, *batches},
            store,
            multiple=multiple,
            seed=seed,
            progress=say,
        )
    from gpt2_tvm.comparing.comparison import Comparison

    comparison = Comparison([point.path for point in points], cases, scored, repeats, warmup, device, threads)
    _measure(comparison, points, store, quantization, format_, json_file, figure)


def _measure(
    comparison: Any,
    points: Any,
    store: Path,
    quantization: str,
    format_: str,
    json_file: Path | None,
    figure: Path | None,
) -> None:
    from gpt2_tvm.comparing.facts import open_facts
    from gpt2_tvm.comparing.tables import render
    from gpt2_tvm.perplexity import progress as scoring
    from gpt2_tvm.pruning.figures import draw
    from gpt2_tvm.pruning.sweep import annotated
    from gpt2_tvm.quantization import get_scheme

    dtype = get_scheme(quantization).weight_dtype

    def result() -> dict[str, Any]:
        return annotated(comparison.result(), points, dtype)

    with cli.kept_if_interrupted(json_file, result), open_facts(store) as journal:
        comparison.run(journal, scoring, cli.progress)
    made = result()
    drawing = partial(draw, made, figure) if figure is not None else None
    cli.conclude(render(made, format_), made, json_file, drawing, comparison.session.failures)


if __name__ == "__main__":
    cli.run(app)
