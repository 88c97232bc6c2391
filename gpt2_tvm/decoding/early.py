"""The target's own first layers as its draft, and the command that makes such a draft.

    python -m gpt2_tvm.decoding.early --model bundled --layers 2 --output artifacts/austen-first2

The draft is an artifact of its own, of the checkpoint without its last blocks: the first blocks, the last LayerNorm and
the head are the target's, loaded a second time (nothing is shared in memory) and with a KV cache of their own.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

import typer

from gpt2_tvm.decoding.speculative import Speculative
from gpt2_tvm.errors import UserError

if TYPE_CHECKING:
    import numpy as np

    from gpt2_tvm.artifact import Artifact
    from gpt2_tvm.checkpoint import ModelSource

app = typer.Typer(add_completion=False, rich_markup_mode=None)


class Early(Speculative):
    """`Speculative` with a draft made by `truncate`."""

    name: ClassVar[str] = "early"


def is_early(target: Artifact, draft: Artifact) -> bool:
    """Whether `draft` is the first layers of `target`: its shape but for the number of layers, and its positions'
    embedding (not compared where the two are stored in different precisions)."""
    import numpy as np

    from gpt2_tvm.tensor_cache import load_tensors

    ours, theirs = target.config, draft.config
    if theirs.n_layer >= ours.n_layer or ours.first_layers(theirs.n_layer) != theirs:
        return False
    name = "transformer.wpe.weight"
    a, b = (np.asarray(load_tensors(folder, None)[name].numpy()) for folder in (target.params, draft.params))
    return a.dtype != b.dtype or np.array_equal(a, b)


def truncate(source: ModelSource, layers: int, folder: Path) -> Path:
    """Write the checkpoint of the first `layers` blocks of `source`, its last LayerNorm and its head, with the
    tokenizer, in Hugging Face layout. UserError for a number that is not below the model's own."""
    import shutil

    from gpt2_tvm.artifact_writer import TOKENIZER_FILES
    from gpt2_tvm.weights import expected_tensors, iter_weights, write_hf_checkpoint

    if not 1 <= layers < source.config.n_layer:
        raise UserError(f"--layers {layers}: {source.name} has {source.config.n_layer}; give 1 or more, but fewer")
    config = source.config.first_layers(layers)
    wanted = expected_tensors(config)

    def kept() -> Iterator[tuple[str, np.ndarray]]:
        for name, array in iter_weights(source, "float32"):
            if name in wanted:
                yield name, array

    write_hf_checkpoint(folder, config, kept())
    for name in TOKENIZER_FILES if source.folder is not None else ():
        if source.folder is not None and (source.folder / name).is_file():
            shutil.copyfile(source.folder / name, folder / name)
    return folder


@app.command()
def main(
    model: Annotated[str, typer.Option(help="The target's checkpoint, as python -m gpt2_tvm.compile takes it.")],
    layers: Annotated[int, typer.Option(help="How many of its first layers draft.")],
    output: Annotated[
        Path | None, typer.Option(help="Default: artifacts/MODEL-firstLAYERS-QUANTIZATION-TARGET.")
    ] = None,
    target: Annotated[str, typer.Option(help="As for compile.")] = "cpu",
    quantization: Annotated[str, typer.Option(help="As for compile.")] = "q0f32",
    rules: Annotated[str, typer.Option(help="As for compile.")] = "full",
    batch_sizes: Annotated[str, typer.Option(help="As for compile; the target's.")] = "1",
    verify_widths: Annotated[
        str, typer.Option(help="As for compile; the narrowest serves when two tokens must be caught up with.")
    ] = "2,4,8",
    max_seq_len: Annotated[int | None, typer.Option(help="As for compile.")] = None,
    seed: Annotated[int, typer.Option(help="Of random weights; the target's.")] = 0,
) -> None:
    """Compile the first layers of a model as its draft, for --strategy early."""
    from gpt2_tvm.build import compile_model
    from gpt2_tvm.checkpoint import resolve_model
    from gpt2_tvm.cli import integers
    from gpt2_tvm.compile import progress_on_stderr

    source = resolve_model(model, seed=seed)
    name = f"{source.name}-first{layers}"
    with tempfile.TemporaryDirectory() as scratch, progress_on_stderr() as progress:
        made = compile_model(
            str(truncate(source, layers, Path(scratch) / name)),
            target,
            quantization,
            output,
            rules,
            batch_sizes=integers(batch_sizes, "--batch-sizes"),
            max_seq_len=max_seq_len,
            verify_widths=integers(verify_widths, "--verify-widths"),
            progress=progress,
        )
    print(f"{made}: the first {layers} of {source.config.n_layer} layers of {source.name}")


if __name__ == "__main__":
    from gpt2_tvm.cli import run

    run(app)
