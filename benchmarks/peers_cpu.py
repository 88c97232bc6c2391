"""The same GPT-2 weights through this CPU's best engines and through ours, taking turns, beside the machine's bounds.

    python benchmarks/peers_cpu.py --model bundled --repeats 1      a small model, in a minute or two
    python benchmarks/peers_cpu.py --json peers.json                GPT-2 124M, all engines: about 15 minutes

Peers need their packages: pip install 'gpt2-tvm[peers]'. An engine that is missing or fails is a line with its reason.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gpt2_tvm import cli
from gpt2_tvm.errors import UserError

if TYPE_CHECKING:
    from peers.run import Run

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)

ENGINES = "ours,transformers,torch-compile,llama-f32,llama-f16,llama-q8_0,ct2-float32,ct2-int8"


@app.command()
def main(
    model: Annotated[
        str,
        typer.Option(help="A folder in Hugging Face layout, 'bundled', or a preset (gpt2 ...), as compile takes it."),
    ] = "gpt2",
    schemes: Annotated[str, typer.Option(help="Ours: --quantization of compile, a comma list.")] = "q0f32,q16f32,q8f32",
    batch: Annotated[str, typer.Option(help="Sequences at a time, a comma list.")] = "1,4,12",
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens of the prompt.")] = 322,
    generate: Annotated[int, typer.Option(min=1, help="Tokens to decode after it.")] = 64,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds that count.")] = 5,
    warmup: Annotated[int, typer.Option(min=1, help="Rounds before them that do not.")] = 1,
    engines: Annotated[str, typer.Option(help="What to measure, a comma list; also: llama-f32-kv16.")] = ENGINES,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of each engine [physical cores].")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the result here.")] = None,
    scratch: Annotated[
        Path | None, typer.Option(help="Where to put the engines' files, removed at the end [the system's own].")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the random weights.")] = 0,
) -> None:
    """Time prefill and greedy decoding of one model in several engines of this CPU.

    Every engine reads the same float32 checkpoint and runs in a process of its own, all with as many threads. In each
    round all of them have one turn, with a pause before it in which the thread pools of the others fall asleep. Tables
    go to standard output in Markdown. An interrupted run writes what it has.
    """
    from peers.engines import choose
    from peers.report import render
    from peers.run import Run

    from gpt2_tvm.checkpoint import resolve_model
    from gpt2_tvm.measure.cases import cross, parse_sizes
    from gpt2_tvm.runners.threads import physical_cores

    chosen = choose(_names(engines), _names(schemes))
    cases = cross(sorted(parse_sizes("--batch", batch)), (prompt_tokens,), (generate,))
    if json_file is not None:
        cli.check_writable("--json", json_file)
    source = resolve_model(model, seed)
    if source.config.pruned:
        raise UserError(f"{source.name} is pruned, which no other engine runs; compare a whole model")
    if prompt_tokens + generate > source.config.n_positions:
        raise UserError(
            f"--prompt-tokens {prompt_tokens} and --generate {generate} make {prompt_tokens + generate} tokens, "
            f"{source.name} has positions for {source.config.n_positions}; choose smaller ones"
        )
    with tempfile.TemporaryDirectory(prefix="gpt2-tvm-peers-", dir=scratch) as folder:
        run = Run(source, chosen, cases, repeats, warmup, threads or physical_cores(), Path(folder))
        try:
            with cli.progress(run.turns) as say:
                run.run(say, lambda: _save(run, json_file))
        finally:  # after an interrupt too
            sys.stdout.write(render(run.result()))  # first: a disk that is full now must not cost the figures
            sys.stdout.flush()
            _save(run, json_file)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _save(run: Run, json_file: Path | None) -> None:
    if json_file is not None:
        cli.write_json(json_file, run.result())


if __name__ == "__main__":
    cli.run(app)
