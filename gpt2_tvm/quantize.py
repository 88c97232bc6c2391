"""`python -m gpt2_tvm.quantize`: what a quantisation scheme does to each matrix of a model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gpt2_tvm import cli
from gpt2_tvm.errors import UserError

if TYPE_CHECKING:
    import numpy as np

    from gpt2_tvm.checkpoint import ModelSource
    from gpt2_tvm.quantization import Scheme
    from gpt2_tvm.quantization.errors import MatrixError

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)

FORMATS = ("md", "csv", "json")
HEADINGS = ("matrix", "shape", "stored", "MB", "bits", "relative RMS", "RMS", "max error", "max weight", "worst row")


@app.command()
def main(
    model: Annotated[str, typer.Option(help="As for compile: a folder, a hub id, a preset or 'bundled'.")] = "bundled",
    quantization: Annotated[
        str, typer.Option(help="Schemes with commas between, each a table of its own: q8f32,q4f16_1.")
    ] = "q8f16",
    format_: Annotated[str, typer.Option("--format", help="md, csv or json.")] = "md",
    output: Annotated[
        Path | None,
        typer.Option(
            help="Also write a checkpoint of the rounded weights here, as float32 in Hugging Face layout (one scheme "
            "only): what any other program makes of them."
        ),
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Also write all figures here, as JSON.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the random weights, where a preset has to do without a network.")] = 0,
) -> None:
    """Error statistics of quantisation, a line a matrix.

    Relative RMS is the root mean square of the error over that of the weights; the worst row is the one whose own
    relative error is largest. To convert a checkpoint for a device: python -m gpt2_tvm.compile --quantization SCHEME.

    \b
    python -m gpt2_tvm.quantize --model bundled --quantization q8f32,q4f16_1
    python -m gpt2_tvm.quantize --model ./my-gpt2 --quantization q4f16_1 --output ./my-gpt2-rounded
    """
    from gpt2_tvm.checkpoint import resolve_model
    from gpt2_tvm.quantization import get_scheme

    if format_ not in FORMATS:
        raise UserError(f"unknown --format {format_!r}; choose {', '.join(FORMATS)}")
    schemes = [get_scheme(name.strip()) for name in quantization.split(",") if name.strip()]
    if not schemes or (output is not None and len(schemes) > 1):
        raise UserError(
            f"--quantization {quantization!r}: give {'one scheme with --output' if schemes else 'a scheme'}"
        )
    source = resolve_model(model, seed=seed)
    if source.note:
        typer.echo(f"note: {source.note}", err=True)
    results = [_measure(source, scheme) for scheme in schemes]
    typer.echo(render(results, format_), nl=False)
    if json_file:
        cli.write_json(json_file, results)
    if output is not None:
        write_rounded(source, schemes[0], output)
        typer.echo(f"wrote {output}", err=True)


def _measure(source: ModelSource, scheme: Scheme) -> dict[str, Any]:
    from rich.console import Console
    from rich.progress import Progress

    from gpt2_tvm.quantization.errors import matrix_errors, whole_model

    parts = []
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(f"{source.name} {scheme.name}", total=4 * source.config.n_layer + 1)
        for part in matrix_errors(source, scheme):
            parts.append(part)
            bar.advance(task)
    return {
        "model": source.name,
        "random_weights": source.random,
        "quantization": scheme.name,
        "matrices": [matrix.to_json() for matrix, _, _ in parts],
        "total": whole_model(parts).to_json(),
    }


def render(results: list[dict[str, Any]], format_: str) -> str:
    """Measured schemes as text that ends in a newline."""
    import csv
    import io

    from gpt2_tvm.measure.tables import markdown_table
    from gpt2_tvm.quantization.errors import MatrixError

    if format_ == "json":
        return json.dumps(results, indent=1) + "\n"
    if format_ == "csv":
        out = io.StringIO()
        rows = [{"quantization": r["quantization"], **m} for r in results for m in (*r["matrices"], r["total"])]
        writer = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        return out.getvalue()
    parts = []
    for r in results:
        weights = "random weights" if r["random_weights"] else "trained"
        lines = [_line(MatrixError(**values)) for values in (*r["matrices"], r["total"])]
        parts.append(f"{r['model']} ({weights}), {r['quantization']}\n\n{markdown_table(HEADINGS, lines, left=3)}")
    return "\n".join(parts)


def _line(m: MatrixError) -> list[str]:
    shape = f"{m.rows} x {m.columns}" if m.columns else ""
    return [
        m.name.removeprefix("transformer."),
        shape,
        m.stored_as,
        f"{m.stored_mb:.2f}",
        f"{m.bits:.2f}",
        f"{m.relative_rms:.4%}",
        f"{m.rms:.2e}",
        f"{m.max:.2e}",
        f"{m.max_weight:.3g}",
        f"{m.worst_row} ({m.worst_row_relative_rms:.3%})",
    ]


def write_rounded(source: ModelSource, scheme: Scheme, folder: Path) -> Path:
    """A checkpoint of the values that `scheme`'s kernels compute with, float32, in Hugging Face layout."""
    from gpt2_tvm.quantization.errors import ROWS
    from gpt2_tvm.quantization.forms import form_of
    from gpt2_tvm.quantization.storage import is_matrix, scheme_of
    from gpt2_tvm.weights import convert, iter_weights, write_hf_checkpoint

    def rounded() -> Iterator[tuple[str, np.ndarray]]:
        for name, array in iter_weights(source, "float32"):
            if not is_matrix(name, array.shape):
                yield name, convert(name, convert(name, array, scheme.compute_dtype), "float32")
                continue
            form = form_of(scheme_of(name, scheme, source.config.tie_word_embeddings), ROWS)
            n, k = array.shape
            yield name, form.values([stored for _, stored in form.store(name, array)], n, k)

    return write_hf_checkpoint(folder, source.config, rounded())


if __name__ == "__main__":
    cli.run(app)
