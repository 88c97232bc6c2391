"""`make demo`: the main job on real input, with the commands that a user would type."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import typer

from gpt2_tvm import cli
from gpt2_tvm.errors import UserError

PROMPT = "Anne had always thought that"

app = typer.Typer(add_completion=False, rich_markup_mode=None)


def step(title: str, *command: str) -> None:
    """Say what comes, show the command, run it; UserError if it fails (it has said why)."""
    print(f"\n==> {title}\n    python -m {' '.join(f'{c!r}' if ' ' in c else c for c in command)}", flush=True)
    status = subprocess.run([sys.executable, "-m", *command], check=False).returncode
    if status:
        raise UserError(f"python -m {command[0]} ended with status {status}; its message stands above")


@app.command()
def main(
    output: Path = typer.Option(Path("artifacts"), help="Where the two artifacts go."),
    target: str = typer.Option("cpu", help="What to compile for; the demo runs the result here."),
    tokens: int = typer.Option(96, help="Tokens of the paragraph."),
    repeats: int = typer.Option(3, help="Rounds of the benchmark."),
) -> None:
    """Compile the bundled model and write a paragraph with it; then GPT-2 124M and its speed beside the machine's
    bound."""
    start = time.perf_counter()
    small, large = str(output / f"austen-target-q0f32-{target}"), str(output / f"gpt2-q0f32-{target}")
    compiler = ["gpt2_tvm.compile", "--target", target]
    step("the bundled model, trained on Jane Austen, compiled", *compiler, "--model", "bundled", "--output", small)
    choice = ["--temperature", "0.7", "--top-p", "0.9", "--seed", "1"]
    step("it writes a paragraph", "gpt2_tvm.generate", small, PROMPT, "--max-tokens", str(tokens), *choice)
    step("GPT-2 124M, compiled", *compiler, "--model", "gpt2", "--output", large)
    timing = ["--prompt-tokens", "322", "--generate", "64", "--repeats", str(repeats)]
    step("how fast both are, and how near the bound", "gpt2_tvm.benchmark", small, large, *timing)
    print(f"\ndone in {time.perf_counter() - start:.0f} s; the artifacts are in {output}/")


if __name__ == "__main__":
    cli.run(app)
