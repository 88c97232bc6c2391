"""`python -m gpt2_tvm.train_streams`: streams for a model, that it drafts for itself with (`gpt2_tvm.streams`)."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated

import typer

from gpt2_tvm.errors import UserError

app = typer.Typer(add_completion=False, rich_markup_mode=None)

MOST_SHARE = 0.05  # of the model's parameters
HELD = 1  # batches of texts, of those asked for, that only judge
TEXTS_SHARE = 0.3  # of the progress bar


@app.command()
def main(
    output: Annotated[Path, typer.Option(help="The streams' folder, which compile --streams takes.")],
    model: Annotated[str, typer.Option(help="The checkpoint, as python -m gpt2_tvm.compile takes it.")],
    streams: Annotated[int, typer.Option(help="How many tokens they draft.")] = 3,
    layers: Annotated[int, typer.Option(help="How many of the last layers they run through.")] = 2,
    rank: Annotated[int, typer.Option(help="Of their adapters.")] = 24,
    texts: Annotated[
        Path | None, typer.Option(help="Where the model's own texts are kept; default OUTPUT.texts, removed later.")
    ] = None,
    batches: Annotated[int, typer.Option(help="Of 64 texts that fill the context; the last one only judges.")] = 56,
    text: Annotated[
        list[Path] | None, typer.Option(help="Real text that half of the texts begin with; may be given again.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Of training, with 4 texts each.")] = 3000,
    rate: Annotated[float, typer.Option(help="The highest learning rate.")] = 2e-3,
    threads: Annotated[int, typer.Option(help="Of the CPU, for training.")] = 1,
    seed: Annotated[int, typer.Option(help="Of all chance.")] = 0,
) -> None:
    """Train streams inside a model, whose own weights stay as they are.

    The model writes texts (which takes the engine and a few minutes), the streams learn to see further ahead in them
    (which takes torch and an hour or so). Interrupted, the same command goes on where it was.

    \b
    python -m gpt2_tvm.train_streams --model bundled --output my-streams
    python -m gpt2_tvm.compile --model bundled --streams my-streams --output artifacts/austen-streams
    """
    from gpt2_tvm.checkpoint import resolve_model
    from gpt2_tvm.compile import progress_on_stderr
    from gpt2_tvm.streams import StreamConfig, base_digests, check_shape, count_parameters, write_streams
    from gpt2_tvm.training.texts import load_or_write
    from gpt2_tvm.weights import iter_weights

    for name, value, least in (("--steps", steps, 1), ("--batches", batches, HELD + 1)):
        if value < least:
            raise UserError(f"{name} {value}: give at least {least}")
    source = resolve_model(model)
    config = check_shape(StreamConfig(streams, layers, rank, base_digests(source)), source.config)
    share = count_parameters(config, source.config) / source.config.num_parameters()
    if share > MOST_SHARE:
        raise UserError(
            f"--rank {rank} with --layers {layers} adds {share:.1%} to the model, more than {MOST_SHARE:.0%}; "
            "lower one of them"
        )
    if output.exists() and any(output.iterdir()):
        raise UserError(f"{output} exists; choose another --output, or remove it")
    try:
        import torch

        from gpt2_tvm.training.stream_student import StreamModel, stream_agreement, train_streams
    except ImportError:
        raise UserError("training needs torch; pip install 'gpt2-tvm[reference]'") from None
    from gpt2_tvm.training.student import Course

    torch.set_num_threads(threads)
    folder = texts or output.with_name(output.name + ".texts")
    state = output.with_name(output.name + ".state.pt")
    student = StreamModel(source.config, dict(iter_weights(source, "float32")), config, seed=seed)
    with progress_on_stderr() as say:
        found = load_or_write(folder, model, batches, text or [], seed, lambda w, d: say(w, 0.01 + TEXTS_SHARE * d))
        learnt, held = found.split(HELD * len(found) // batches)
        course = Course(steps, rows=4, rate=rate, seed=seed)
        train_streams(student, learnt, course, state, lambda w, d: say(w, TEXTS_SHARE + (1 - TEXTS_SHARE) * d))
        right = stream_agreement(student, held)
    told = {"model": source.name, "steps": steps, "texts": len(learnt), "found": [round(r, 4) for r in right]}
    tensors = {name: tensor.detach().numpy() for name, tensor in student.tensors.items()}
    write_streams(output, config, tensors, {**told, "share_of_parameters": round(share, 4)})
    state.unlink(missing_ok=True)
    if texts is None:
        shutil.rmtree(folder)
    print(
        f"{output}: {streams} streams, {share:.1%} of {source.name}'s parameters; in its greedy text they find "
        + ", ".join(f"{r:.0%}" for r in right)
        + " of the next tokens but one, two, … (all before found as well)"
    )


if __name__ == "__main__":
    from gpt2_tvm.cli import run

    run(app)
