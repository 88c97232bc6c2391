"""`python -m gpt2_tvm.demo`, which `make demo` runs: the tour, as commands that anybody can run again one by one."""

from __future__ import annotations

import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from gpt2_tvm.cli import run

app = typer.Typer(add_completion=False, rich_markup_mode=None)

PROMPT = "It is a truth universally acknowledged, that"
GPT2_PROMPT = "The history of compilers began"


@app.command()
def main(
    artifacts: Annotated[Path, typer.Option(help="Where the artifacts go; they stay there.")] = Path("artifacts"),
    gpt2: Annotated[
        bool, typer.Option("--gpt2/--no-gpt2", help="Also GPT-2 124M: its weights from the hub, else random ones.")
    ] = True,
    repeats: Annotated[int, typer.Option(help="Rounds of the benchmark that count.")] = 3,
) -> None:
    """Compile the bundled model for this CPU, write a paragraph with it, compile GPT-2 124M, and time both.

    Every step is a command of its own, shown before it runs. About two minutes on two cores, downloads aside.
    """
    start = time.perf_counter()
    small, large = artifacts / "austen-target-q0f32-cpu", artifacts / "gpt2-q0f32-cpu"
    _say("A small GPT-2 that has read Jane Austen, compiled for this CPU by TVM")
    _command("compile", "--model", "bundled", "--output", str(small))
    _say("It writes a paragraph")
    sampling = ("--temperature", "0.7", "--top-p", "0.9", "--seed", "3")
    _command("generate", str(small), PROMPT, "--max-tokens", "150", *sampling)
    measured = [small]
    if gpt2:
        _say("GPT-2 124M: weights from the Hugging Face hub if it can be reached, else random ones of the true shape")
        _command("compile", "--model", "gpt2", "--output", str(large))
        if _trained(large):
            _command("generate", str(large), GPT2_PROMPT, "--max-tokens", "60")
        measured.append(large)
    _say("How fast, and beside which bound")
    _command("benchmark", *map(str, measured), "--repeats", str(repeats))
    print(f"\n{time.perf_counter() - start:.0f} s in all. More: python -m gpt2_tvm.compile --help, and README.md")


def _say(text: str) -> None:
    print(f"\n==> {text}", flush=True)


def _command(name: str, *arguments: str) -> None:
    """Show and run `python -m gpt2_tvm.<name>`; its failure, explained by itself, ends the demo with its status."""
    shown = shlex.join(["python", "-m", f"gpt2_tvm.{name}", *arguments])
    print(f"$ {shown}", flush=True)
    status = subprocess.run([sys.executable, "-m", f"gpt2_tvm.{name}", *arguments]).returncode
    if status:
        # a child ended by a signal has a negative status; shells report 128 + the signal
        raise typer.Exit(status if status > 0 else 128 - status)


def _trained(artifact: Path) -> bool:
    from gpt2_tvm.artifact import read_manifest

    return not read_manifest(artifact)["random_weights"]


if __name__ == "__main__":
    run(app)
