"""`python -m gpt2_tvm.finetune`: train a checkpoint further on text, a pruned one too."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gpt2_tvm import cli
from gpt2_tvm.errors import UserError

if TYPE_CHECKING:
    from gpt2_tvm.finetuning.trainer import Trainer
    from gpt2_tvm.measure.timing import Say

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
REPEATS = 3  # steps that count of each batch of --speed
DTYPES = ("float32", "float16", "bfloat16")


@app.command()
def main(
    model: Annotated[str, typer.Option(help="A trained checkpoint, as python -m gpt2_tvm.compile takes it.")],
    text: Annotated[Path, typer.Option(metavar="FILE", help="To learn from.")],
    output: Annotated[Path, typer.Option(help="The new checkpoint's folder, in Hugging Face layout.")],
    validation: Annotated[
        Path | None, typer.Option(metavar="FILE", help="To be judged by; default the last tenth of --text.")
    ] = None,
    text_format: Annotated[str, typer.Option(help="Of both: plain, wikitext-raw or wikitext-tokens.")] = "plain",
    steps: Annotated[int, typer.Option(help="Of the optimizer.")] = 200,
    batch: Annotated[int, typer.Option(help="Sequences at a time.")] = 4,
    accumulate: Annotated[int, typer.Option(help="Batches whose gradients are added up for one step.")] = 1,
    context: Annotated[int, typer.Option(help="Tokens in a sequence, and in a window of validation.")] = 256,
    rate: Annotated[float, typer.Option(help="The highest learning rate.")] = 5e-5,
    warmup: Annotated[int, typer.Option(help="Steps until it is reached.")] = 10,
    decay: Annotated[float, typer.Option(help="Of the weights of matrices (AdamW).")] = 0.01,
    dropout: Annotated[float, typer.Option(help="While training.")] = 0.1,
    keep_zeros: Annotated[
        bool, typer.Option(help="Weights of the blocks' matrices that are zero stay zero, as a pruned model's must.")
    ] = True,
    windows: Annotated[int, typer.Option(help="Of the validation text, evenly spread.")] = 40,
    speed: Annotated[
        str | None, typer.Option(help="At the end time training steps at these batches, such as 4,12: tokens/s.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="What the checkpoint stores: float32, float16 or bfloat16.")] = "float32",
    device: Annotated[str | None, typer.Option(help="torch's name of it; default a GPU where there is one.")] = None,
    threads: Annotated[int | None, typer.Option(help="Of the CPU. Default: one a physical core.")] = None,
    save_seconds: Annotated[float, typer.Option(help="How often the state of training goes to the disk.")] = 60.0,
    seed: Annotated[int, typer.Option(help="Of all chance.")] = 0,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Also write the result here.")
    ] = None,
) -> None:
    """Train a checkpoint further, and tell the validation loss before and after.

    Killed or interrupted, the same command goes on from the last saved state and ends with the same weights; the
    checkpoint is written when training is done. Needs pip install 'gpt2-tvm[reference]'.

    \b
    Examples:
      python -m gpt2_tvm.finetune --model gpt2 --text wiki.train.raw --text-format wikitext-raw --output my-gpt2
      python -m gpt2_tvm.finetune --model bundled --text persuasion.txt --steps 0 --speed 4,12 --output same
    """
    from gpt2_tvm.checkpoint import resolve_model
    from gpt2_tvm.finetuning.corpus import load_corpus
    from gpt2_tvm.finetuning.run import choose_device, finetune, require_torch, training_speed
    from gpt2_tvm.finetuning.trainer import Settings
    from gpt2_tvm.measure.cases import parse_sizes

    require_torch("finetune")
    if dtype not in DTYPES:
        raise UserError(f"--dtype {dtype!r}: choose {', '.join(DTYPES)}")
    if not save_seconds >= 0:
        raise UserError(f"--save-seconds {save_seconds:g}: give 0 or more")
    batches = parse_sizes("--speed", speed) if speed is not None else ()
    if json_file is not None:
        cli.check_writable("--json", json_file)
    source = resolve_model(model)
    settings = Settings(steps, batch, accumulate, context, rate, warmup, decay, dropout, keep_zeros, windows, seed)
    settings.check(source)
    corpus = load_corpus(source, text, validation, text_format, context)
    where = choose_device(device, threads)

    def measured(trainer: Trainer, say: Say) -> dict[str, Any]:
        return training_speed(trainer, batches, REPEATS, lambda what, done: say(what, steps + done))

    with cli.progress(steps + (REPEATS + 1) * len(batches)) as say:
        result = finetune(
            source, output, corpus, settings, where, dtype, save_seconds, say, measured if batches else None
        )
    sys.stdout.write(summary(output, result))
    sys.stdout.flush()
    if json_file is not None:
        cli.write_json(json_file, {"model": source.name, "output": str(output), "device": where, **result})


def summary(output: Path, result: dict[str, Any]) -> str:
    """The result for people, a few lines."""
    text = (
        f"{output}: validation loss {result['loss_before']:.4f} before, {result['loss']:.4f} after "
        f"(perplexity {result['perplexity_before']:.2f}, {result['perplexity']:.2f}); "
        f"{result['steps']} steps, {result['tokens']:,} tokens, {result['seconds']:.0f} s\n"
    )
    for row in result.get("speed", []):
        text += (
            f"  training at batch {row['batch']}: {row['train_tok_s']:.0f} ± {row['train_tok_s_sd']:.0f} tokens/s "
            f"({row['context']} tokens a sequence, {row['repeats']} steps)\n"
        )
    return text


if __name__ == "__main__":
    cli.run(app)
