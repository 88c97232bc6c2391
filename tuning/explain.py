"""`python -m tuning.explain`: what each rule did to each function of a model. The work is `tuning.report`'s."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from gpt2_tvm.cli import check_writable, run
from gpt2_tvm.errors import UserError

app = typer.Typer(add_completion=False, rich_markup_mode=None)

FORMATS = ("html", "md")
ARTIFACTS = Path("artifacts")


@app.command()
def main(
    model: Annotated[
        str, typer.Option(help="As for gpt2_tvm.compile: a folder, a hub id, 'bundled', or a preset such as gpt2.")
    ] = "gpt2",
    target: Annotated[str, typer.Option(help="A name from gpt2_tvm.compile --list-targets, or a TOML file.")] = "cpu",
    function: Annotated[
        str | None,
        typer.Option(
            help="Only one PrimFunc, with all of its generated code: its name, or words of name and role that fit no "
            "other. Default: all of them."
        ),
    ] = None,
    quantization: Annotated[str, typer.Option(help="How weights are stored and computed with.")] = "q0f32",
    rules: Annotated[
        str, typer.Option(help="full, stock, baseline, only-RULE, without-RULE, or a comma list in order.")
    ] = "full",
    attention: Annotated[str, typer.Option(help="flash (our kernels) or materialized (matmul and softmax).")] = "flash",
    output: Annotated[
        Path | None,
        typer.Option(
            help="The file to write, .html or .md. Default: artifacts/explain-MODEL-QUANTIZATION-TARGET.html; Markdown "
            "goes to the terminal."
        ),
    ] = None,
    format: Annotated[
        str | None, typer.Option(help="html or md. Default: what --output ends in, else html.", show_default=False)
    ] = None,
) -> None:
    """Explain a compiled model: for every function its rule, the TIR before and after, loops, code and resources.

    \b
    python -m tuning.explain --model gpt2 --target rtx-4090 --quantization q0f16
    python -m tuning.explain --model bundled --target cpu --function "decode c_fc" --format md

    The HTML page is one file that needs no network. No device is needed; what only the device's compiler knows is left
    out and said so. About half a minute for GPT-2 124M.
    """
    form = _format(format, output)
    if output is not None and output.is_dir():
        raise UserError(f"--output {output} is a folder; give a file that ends in .{form}")
    if output is not None or form == "html":
        check_writable("--output", output or ARTIFACTS / "explain.html")
    from gpt2_tvm.compile import progress_on_stderr
    from gpt2_tvm.files import write_atomically

    with progress_on_stderr() as progress:
        from gpt2_tvm.build import make_plan
        from gpt2_tvm.checkpoint import resolve_model
        from targets import load_target, specialise

        device = specialise(load_target(target))
        source = resolve_model(model)
        plan = make_plan(source.config, device, quantization, rules, attention)
        progress("importing TVM", 0.01)
        from tuning.report import collect, markdown, render  # TVM, after what a user may have mistyped

        report = collect(plan, source.name, function, progress)
        report.command = shlex.join(["python", "-m", "tuning.explain", *sys.argv[1:]])
        progress("writing", 0.97)
        text = render(report) if form == "html" else markdown(report)
    if form == "md" and output is None:
        sys.stdout.write(text)
        return
    only = f"-{report.functions[0].name}" if function else ""
    path = output or ARTIFACTS / f"explain-{source.name}-{quantization}-{device.name}{only}.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, text)
    count = len(report.functions)
    print(f"{path}: {count} function{'s' if count != 1 else ''}, {len(text.encode()) / 1e6:.2f} MB")
    for note in report.notes:
        print(f"  note: {note}")


def _format(given: str | None, output: Path | None) -> str:
    if given is not None:
        if given not in FORMATS:
            raise UserError(f"--format {given}: choose {' or '.join(FORMATS)}")
        return given
    return "md" if output is not None and output.suffix in (".md", ".markdown") else "html"


if __name__ == "__main__":
    run(app)
