"""`python -m gpt2_tvm.benchmark ARTIFACT…`: prefill and decode rates beside the bandwidth that bounds them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from gpt2_tvm import cli
from gpt2_tvm.errors import UserError

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command()
def main(
    paths: Annotated[
        list[Path],
        typer.Argument(metavar="ARTIFACT...", help="Folders made by compile (with --collect: result files)."),
    ],
    prompt_tokens: Annotated[
        str,
        typer.Option(help="Tokens of the prompt, a comma list; 322 is the whole Gettysburg Address in GPT-2's ids."),
    ] = "322",
    generate: Annotated[str, typer.Option(help="Tokens to decode after it, a comma list.")] = "64",
    batch: Annotated[
        str, typer.Option(help="Sequences at a time, a comma list; rates count the tokens of all of them.")
    ] = "1",
    repeats: Annotated[int, typer.Option(help="Rounds that count.")] = 5,
    warmup: Annotated[int, typer.Option(help="Rounds before them that do not.")] = 1,
    peer: Annotated[
        str | None,
        typer.Option(
            help="Also time the same weights in other programs, in the same rounds, a comma list: transformers, "
            "mlc_llm."
        ),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help='"cuda:1", say; default: the first of the artifact\'s kind.')
    ] = None,
    runner: Annotated[
        str,
        typer.Option(
            help="What runs webgpu artifacts, a comma list, each in the same rounds: wgpu, node (Dawn), chromium "
            "(without a window), browser:PORT (yours, at the address that is printed)."
        ),
    ] = "wgpu",
    threads: Annotated[
        int | None,
        typer.Option(help="Threads of the CPU, a peer's too. Default: one a physical core that this process may use."),
    ] = None,
    format_: Annotated[str, typer.Option("--format", help="What to print: md, csv, json or jsonl.")] = "md",
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Also write the result here, as JSON.")
    ] = None,
    collect: Annotated[
        bool, typer.Option("--collect", help="Merge result files of several devices into one table; nothing is timed.")
    ] = False,
    figure: Annotated[
        Path | None, typer.Option(metavar="FILE", help="With --collect: draw the chart here (PNG, SVG, PDF).")
    ] = None,
) -> None:
    """Time prefill and decode of artifacts.

    Every combination of artifact, batch, prompt and generated length has one turn a round: a prefill from an
    empty cache, then greedy decoding. Rates are medians over the rounds, with the standard deviation.
    Tokenisation and sampling are outside the timing; the greedy choice, which the engine makes on the device,
    and a peer's argmax are inside.

    GFLOP/s are the multiply-adds that a prefill cannot do without (two operations each) a second, GB/s the
    bytes that a decode step must read (weights and KV cache) times steps a second. Each stands beside its
    bound: the target's peak or, on a CPU without one, what loops that only multiply and add, or only read,
    reach in the same rounds. A model that fits into the caches can pass the bandwidth.

    Each artifact, and each peer, runs in a process of its own: its peak memory is its own, and if it crashes
    the others go on. All of them are in memory at once.

    \b
    Examples:
      python -m gpt2_tvm.benchmark artifacts/gpt2-q0f32-cpu --peer transformers
      python -m gpt2_tvm.benchmark A B --prompt-tokens 16,322 --batch 1,4 --json here.json
      python -m gpt2_tvm.benchmark CPU_ARTIFACT WEBGPU_ARTIFACT --runner node,chromium
      python -m gpt2_tvm.benchmark --collect laptop.json server.json --figure devices.png
    """
    from gpt2_tvm.measure.tables import check_format

    check_format(format_)
    if json_file is not None:
        cli.check_writable("--json", json_file)
    if collect:
        _collect(paths, format_, json_file, figure)
        return
    if figure is not None:
        raise UserError("--figure needs --collect and result files; write one with --json FILE first")
    if threads is not None and threads < 1:
        raise UserError(f"--threads {threads}: give at least 1, or leave it out for one a physical core")
    if repeats < 1 or warmup < 0:
        raise UserError(f"--repeats {repeats} --warmup {warmup}: at least 1 round counts, and 0 or more do not")
    runners = tuple(dict.fromkeys(part.strip() for part in runner.split(",")))
    rounds: dict[str, Any] = {"repeats": repeats, "warmups": warmup}
    session = {**rounds, "peer": peer, "device": device, "threads": threads, "runners": runners}
    _measure(paths, (batch, prompt_tokens, generate), session, format_, json_file)


def _measure(
    paths: list[Path],
    sizes: tuple[str, str, str],
    options: dict[str, Any],
    format_: str,
    json_file: Path | None,
) -> None:
    """Time, print, write. An interrupted run writes what it has, marked as not complete, and ends with 130."""
    from gpt2_tvm.measure.cases import cross, parse_sizes
    from gpt2_tvm.measure.session import Session
    from gpt2_tvm.measure.tables import render

    names = ("--batch", "--prompt-tokens", "--generate")
    cases = cross(*(parse_sizes(option, text) for option, text in zip(names, sizes, strict=True)))
    session = Session(paths, cases, **options)
    with cli.kept_if_interrupted(json_file, session.result), cli.progress(session.turns) as say:
        session.run(say)
    result = session.result()
    cli.conclude(render(result, format_), result, json_file, failures=session.failures)


def _collect(paths: list[Path], format_: str, json_file: Path | None, figure: Path | None) -> None:
    from gpt2_tvm.measure.collect import cross_platform_table, draw, read_results
    from gpt2_tvm.measure.tables import render

    rows, notes = read_results(paths)
    merged = {"complete": not notes, "rows": rows}
    if figure is not None:
        draw(rows, figure)
        print(f"wrote {figure}", file=sys.stderr)
    if json_file is not None:
        cli.write_json(json_file, merged)
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    sys.stdout.write(cross_platform_table(rows) if format_ == "md" else render(merged, format_))


if __name__ == "__main__":
    cli.run(app)
