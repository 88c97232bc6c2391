"""`python -m gpt2_tvm.distill`: a small draft for speculation, taught by the model that it is to draft for."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Annotated

import typer

from gpt2_tvm.errors import UserError

app = typer.Typer(add_completion=False, rich_markup_mode=None)

HELD = 1  # batches of texts, of those asked for, that only judge
TEXTS_SHARE = 0.3  # of the progress bar


@app.command()
def main(
    output: Annotated[Path, typer.Option(help="The draft's folder, in Hugging Face layout (float16).")],
    model: Annotated[str, typer.Option(help="The target's checkpoint, as python -m gpt2_tvm.compile takes it.")],
    layers: Annotated[int, typer.Option(help="Of the draft.")] = 1,
    width: Annotated[int, typer.Option(help="Of the draft.")] = 128,
    heads: Annotated[int, typer.Option(help="Of the draft.")] = 2,
    texts: Annotated[
        Path | None, typer.Option(help="Where the target's own texts are kept; default OUTPUT.texts, removed later.")
    ] = None,
    batches: Annotated[int, typer.Option(help="Of 64 texts that fill the context; the last one only judges.")] = 56,
    text: Annotated[
        list[Path] | None, typer.Option(help="Real text that half of the texts begin with; may be given again.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Of training, with 8 texts each.")] = 5000,
    rate: Annotated[float, typer.Option(help="The highest learning rate.")] = 3e-3,
    threads: Annotated[int, typer.Option(help="Of the CPU, for training.")] = 1,
    seed: Annotated[int, typer.Option(help="Of all chance.")] = 0,
) -> None:
    """Teach a small model what a larger one writes.

    The target writes texts (which takes the engine and a few minutes), the draft learns its next tokens from them
    (which takes torch and half an hour or so). Interrupted, the same command goes on where it was.

    \b
    python -m gpt2_tvm.distill --model bundled --layers 1 --width 128 --output my-draft
    python -m gpt2_tvm.compile --model my-draft --verify-widths 2,4 --output artifacts/my-draft
    """
    from gpt2_tvm.artifact_writer import TOKENIZER_FILES
    from gpt2_tvm.checkpoint import resolve_model
    from gpt2_tvm.compile import progress_on_stderr
    from gpt2_tvm.config import GPT2Config
    from gpt2_tvm.files import write_atomically
    from gpt2_tvm.training.texts import load_or_write
    from gpt2_tvm.weights import write_hf_checkpoint

    for name, value, least in (("--layers", layers, 1), ("--steps", steps, 1), ("--batches", batches, HELD + 1)):
        if value < least:
            raise UserError(f"{name} {value}: give at least {least}")
    source = resolve_model(model)
    if output.exists() and any(output.iterdir()):
        raise UserError(f"{output} exists; choose another --output, or remove it")
    config = GPT2Config(
        vocab_size=source.config.vocab_size,
        n_positions=source.config.n_positions,
        n_embd=width,
        n_layer=layers,
        n_head=heads,
        bos_token_id=source.config.bos_token_id,
        eos_token_id=source.config.eos_token_id,
    )
    try:
        import torch

        from gpt2_tvm.training.student import Course, train, weights_of
    except ImportError:
        raise UserError("distillation needs torch; pip install 'gpt2-tvm[reference]'") from None
    torch.set_num_threads(threads)
    folder = texts or output.with_name(output.name + ".texts")
    state = output.with_name(output.name + ".state.pt")
    course = Course(steps, rate=rate, seed=seed)
    with progress_on_stderr() as say:
        found = load_or_write(
            folder, model, batches, text or [], seed, lambda w, done: say(w, 0.01 + TEXTS_SHARE * done)
        )
        learnt, held = found.split(HELD * len(found) // batches)
        student, share = train(
            config, learnt, held, course, state, lambda w, d: say(w, TEXTS_SHARE + (1 - TEXTS_SHARE) * d)
        )
    write_hf_checkpoint(output, config, weights_of(student, config), "float16")
    for name in TOKENIZER_FILES if source.folder is not None else ():
        if source.folder is not None and (source.folder / name).is_file():
            shutil.copyfile(source.folder / name, output / name)
    told = {
        "target": source.name,
        "parameters": config.num_parameters(),
        "steps": steps,
        "tokens_seen": steps * course.rows * (config.n_positions - 1),
        "texts": len(learnt),
        "agreement": round(share, 4),
    }
    write_atomically(output / "training.json", json.dumps(told, indent=1) + "\n")
    state.unlink(missing_ok=True)
    if texts is None:
        shutil.rmtree(folder)
    print(f"{output}: {config.num_parameters():,} parameters, finds {share:.1%} of {source.name}'s greedy tokens")


if __name__ == "__main__":
    from gpt2_tvm.cli import run

    run(app)
