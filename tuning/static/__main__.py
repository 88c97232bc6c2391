"""`python -m tuning.static`: what each kernel of a compiled model is made of, with no device at hand."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from gpt2_tvm import cli

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command()
def main(
    model: Annotated[str, typer.Option(help="As for gpt2_tvm.compile; the weights are not needed.")] = "gpt2",
    target: Annotated[str, typer.Option(help="A name from compile's --list-targets, or a TOML file.")] = "cpu",
    rules: Annotated[
        str,
        typer.Option(help="full, stock, baseline, only-RULE, without-RULE, or a comma list in order (see compile)."),
    ] = "full",
    quantization: Annotated[str, typer.Option(help="How weights are stored and computed with.")] = "q0f32",
    attention: Annotated[str, typer.Option(help="flash or materialized.")] = "flash",
    batch_sizes: Annotated[str, typer.Option(help="Batch sizes to compile decode for, a comma list.")] = "1",
    verify_widths: Annotated[str, typer.Option(help="Widths of verify, a comma list; '' for none.")] = "4,8",
    max_seq_len: Annotated[int | None, typer.Option(help="Capacity of the KV cache in tokens.")] = None,
    format_: Annotated[str, typer.Option("--format", help="What to print: md, csv or json.")] = "md",
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Also write rows and summary here, as JSON.")
    ] = None,
    pipelines: Annotated[
        bool, typer.Option("--pipelines", help="webgpu: also have this machine's WebGPU compile every shader.")
    ] = False,
) -> None:
    """Print, for every kernel of a compiled model, which rule made it and what its code is made of.

    A row a kernel: rule, calls in a prefill and in a token, threads of a block, registers, shared memory, spills, the
    widest load, vectors, occupancy and the mix of instructions, read from the compiled code (NVIDIA's SASS, AMD's code
    objects, a CPU's assembly) or from the shader's source (WebGPU, Metal). What cannot be known without the device is
    left out, with the reason beneath. Instructions are counted where they stand: loops are not multiplied out.

    \b
    python -m tuning.static --model gpt2 --target rtx-4090 --quantization q0f16
    python -m tuning.static --model gpt2 --target h200 --rules baseline --format json
    """
    from gpt2_tvm.compile import progress_on_stderr
    from gpt2_tvm.errors import UserError
    from tuning.static.rows import FORMATS, render, static_rows

    if format_ not in FORMATS:
        raise UserError(f"unknown --format {format_!r}; choose {', '.join(FORMATS)}")
    widths = cli.integers(verify_widths, "--verify-widths")
    sizes = cli.integers(batch_sizes, "--batch-sizes")
    with progress_on_stderr() as progress:
        rows = static_rows(
            model,
            target,
            rules,
            quantization,
            attention,
            batch_sizes=sizes,
            verify_widths=widths,
            max_seq_len=max_seq_len,
            pipelines=pipelines,
            progress=progress,
        )
    sys.stdout.write(render(rows, format_))
    sys.stdout.flush()
    if json_file is not None:
        from gpt2_tvm.files import write_atomically

        write_atomically(json_file, render(rows, "json"))


if __name__ == "__main__":
    cli.run(app)
