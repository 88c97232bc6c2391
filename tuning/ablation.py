"""`python -m tuning.ablation`: sets of rules or passes compiled, checked and timed beside each other, on any device."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gpt2_tvm import cli
from gpt2_tvm.errors import UserError
from tuning.ablation_choices import Choices, journal_of, names_in, pair_of, where_of

if TYPE_CHECKING:
    from tuning.ablation_run import Ablation
    from tuning.ablation_work import Job

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)

FOLDER = Path("artifacts/ablation")


@app.command()
def main(
    model: Annotated[str, typer.Option(help="As for compile: a folder, a hub id, 'bundled', or a preset.")] = "gpt2",
    target: Annotated[str, typer.Option(help="A name from compile --list-targets, or a TOML file.")] = "cpu",
    quantization: Annotated[str, typer.Option(help="How weights are stored and computed with.")] = "q0f32",
    attention: Annotated[
        str, typer.Option(help="flash: our kernels. materialized: matmul and softmax for the rules, as in the study.")
    ] = "flash",
    sets: Annotated[
        str | None,
        typer.Option(
            help="These rule sets, with commas between: baseline, stock, full, only-RULE, without-RULE, with-RULE "
            "(several rules: a+b). Default: each rule alone and each left out."
        ),
    ] = None,
    full_factorial: Annotated[
        bool,
        typer.Option(
            "--full-factorial",
            help="Every subset of the rules (of DLight's where there are more than six; --factors chooses others): "
            "main effects and interactions.",
        ),
    ] = False,
    factors: Annotated[
        str | None,
        typer.Option(help="With --full-factorial: cross these alone, with commas between; others are off there."),
    ] = None,
    passes: Annotated[
        bool,
        typer.Option(
            "--passes",
            help="Toggle the graph's fusions instead of the rules, which are the target's own: baseline (none), "
            "only-PASS, without-PASS, all.",
        ),
    ] = False,
    rule: Annotated[
        list[str] | None, typer.Option(metavar="MODULE:CLASS", help="A rule of yours as one more; may be repeated.")
    ] = None,
    repeats: Annotated[int, typer.Option(help="Rounds; in each every set has one turn.")] = 5,
    budget: Annotated[
        float, typer.Option(help="Seconds of timing after which a slow set leaves the rounds (3 at least).")
    ] = 8.0,
    prompt_tokens: Annotated[
        int | None, typer.Option(help="Tokens of the prompt. Default: 322, on a software device 64.")
    ] = None,
    generate: Annotated[
        int | None, typer.Option(help="Tokens to decode after it. Default: 64, on a software device 32.")
    ] = None,
    records: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="The result as JSON, a row a set; beside it the journal from which a run is taken up. "
            "Default: artifacts/ablation/MODEL-QUANTIZATION-TARGET-ATTENTION.json, or ...-passes.json.",
        ),
    ] = None,
    figure: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw the speedups here, as PNG and as SVG.")
    ] = None,
    format_: Annotated[str, typer.Option("--format", help="What to print: md, csv or json.")] = "md",
    compare: Annotated[
        str | None, typer.Option(metavar="A,B", help="Also list the functions that moved between two sets.")
    ] = None,
    other: Annotated[
        Path | None,
        typer.Option("--against", metavar="FILE", help="Also set another run's medians beside these (its --records)."),
    ] = None,
    timeout: Annotated[
        float, typer.Option(help="Seconds for compiling a set, loading it, checking it, and for each turn.")
    ] = 300.0,
    fresh: Annotated[bool, typer.Option("--fresh", help="Begin anew; else a run goes on where it stopped.")] = False,
    report: Annotated[bool, typer.Option("--report", help="Measure nothing: print what the records hold.")] = False,
    static: Annotated[
        bool, typer.Option("--static", help="Without a device: the compile-time half, by tuning.static.")
    ] = False,
    reference: Annotated[
        str,
        typer.Option(
            help="What logits are compared with: transformers, cpu (our engine), or auto, the first there is."
        ),
    ] = "auto",
    device: Annotated[str | None, typer.Option(help='"cuda:1", say; default: the first of the target\'s kind.')] = None,
    runner: Annotated[
        str,
        typer.Option(
            help="vm: TVM's virtual machine. wgpu, node, chromium: WebGPU. auto: vm or wgpu, as the target needs."
        ),
    ] = "auto",
    tracker: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Measure on a machine behind this TVM RPC tracker.")
    ] = None,
    key: Annotated[str | None, typer.Option(help="That machine's key at the tracker.")] = None,
    alive: Annotated[
        int | None, typer.Option(help="Engines in memory at once. Default: what half of the free memory holds.")
    ] = None,
    peer: Annotated[
        str | None, typer.Option(help="One more row: the same weights compiled by another project, mlc_llm.")
    ] = None,
    functions: Annotated[
        bool,
        typer.Option(
            "--functions/--no-functions", help="Time each function of the plain sets too: shares of the time."
        ),
    ] = True,
    seed: Annotated[int, typer.Option(help="Of the random weights.")] = 0,
) -> None:
    """Measure what each schedule rule does, or each pass of the graph: alone, left out, and in every combination.

    Each set is compiled and timed in processes of its own with a time limit. One that raises, hangs, crashes or
    computes something else is a row that says so. Every sample is on the disk before the next is taken: a run that
    was killed goes on where it stopped when the same command is given again.

    \b
    Examples:
      python -m tuning.ablation --model bundled
      python -m tuning.ablation --model bundled --target webgpu --full-factorial --figure ablation.png
      python -m tuning.ablation --model bundled --passes
      python -m tuning.ablation --target rtx-4090 --attention materialized --compare baseline,only-gemv
      python -m tuning.ablation --model bundled --report --records FIRST.json --against SECOND.json
    """
    from tuning.ablation_figure import files_of
    from tuning.ablation_results import read_result
    from tuning.ablation_tables import check_format
    from tuning.ablation_work import LIGHTER, Job

    check_format(format_)
    if repeats < 1 or timeout <= 0 or budget < 0 or (alive is not None and alive < 1):
        raise UserError(f"--repeats {repeats} --timeout {timeout:g} --budget {budget:g}: repeats and timeout above 0")
    pair = pair_of(compare)
    if other is not None and (static or format_ != "md"):
        raise UserError("--against sets measured medians side by side, in Markdown; leave out --static and --format")
    second = read_result(other, "--against") if other is not None else None
    if figure is not None:
        cli.check_writable("--figure", files_of(figure)[0])
    crossed = names_in("--factors", factors)
    if crossed is not None and not full_factorial:
        raise UserError("--factors names what --full-factorial crosses; give both, or --sets alone")
    given = (names_in("--sets", sets), full_factorial, tuple(rule or ()), crossed, passes)
    plan = Choices(model, target, quantization, attention, seed, *given, runner)
    if peer is not None:
        plan.add_peer(peer, Job(model, target, quantization, device=tracker and f"rpc://{tracker}/{key}"), static)
    for name in pair or ():
        if name not in [variant.name for variant in plan.variants]:
            raise UserError(f"--compare {compare}: {name} is not among the sets; name it with --sets too")
    if static:
        _static(plan, Job(model, target, quantization, attention, seed, toggles=plan.toggles), timeout, format_)
        return
    page = runner if runner in ("node", "chromium") else None
    if page is not None and device is not None:
        raise UserError(f"--runner {runner} --device {device}: give one of them; {runner} chooses its device")
    parts = (
        plan.source.name,
        quantization,
        plan.target.name,
        attention,
        *([page] if page else []),
        *(["passes"] if passes else []),
    )
    file = records or FOLDER / f"{'-'.join(parts)}.json"
    cli.check_writable("--records", file)
    if report:
        _show(plan.recorded(file, attention, quantization), format_, pair, None, figure, second)
        return
    from tuning.ablation_run import Ablation

    where = where_of(plan.target, page or device, tracker, key)
    cache = str(FOLDER / "cache")
    asked: dict[str, Any] = {"prompt_tokens": prompt_tokens, "generate_tokens": generate}
    sizes = {name: count for name, count in asked.items() if count is not None}
    job = Job(model, target, quantization, attention, seed, device=where, cache=cache, toggles=plan.toggles, **sizes)
    run = Ablation(
        job,
        plan.source,
        plan.target,
        plan.variants,
        journal_of(file),
        repeats,
        budget,
        timeout,
        reference,
        alive,
        [variant.name for variant in plan.plain] if functions else (),
        fresh,
        {name: count for name, count in LIGHTER.items() if name not in sizes},
    )
    if plan.source.note:
        print(f"note: {plan.source.note}", file=sys.stderr)
    _run(run, plan, file, format_, pair, figure, second)


def _run(
    run: Ablation,
    plan: Choices,
    file: Path,
    format_: str,
    pair: tuple[str, str] | None,
    figure: Path | None,
    second: dict[str, Any] | None,
) -> None:
    """Measure, print, write. What an interrupted run has measured stays in the journal."""
    from gpt2_tvm.compile import progress_on_stderr
    from tuning.ablation_records import Journal

    journal = run.records
    if file.is_file() and not journal.exists() and not run.fresh:
        raise UserError(
            f"{file} is there without its journal ({journal.name}), from which a run is taken up; give another "
            "--records, look at it with --report, or replace it with --fresh"
        )
    try:
        with progress_on_stderr() as say:
            measured = run.run(say)
    except KeyboardInterrupt:
        if journal.exists():
            print(f"what was measured is in {journal}; the same command again goes on from there", file=sys.stderr)
        raise
    _show(plan.result(Journal.read(measured.path)), format_, pair, file, figure, second)


def _show(
    result: dict[str, Any],
    format_: str,
    pair: tuple[str, str] | None,
    file: Path | None,
    figure: Path | None,
    second: dict[str, Any] | None,
) -> None:
    from tuning.ablation_against import against
    from tuning.ablation_figure import draw
    from tuning.ablation_tables import render

    drawing = partial(draw, result, figure) if figure is not None else None
    cli.conclude(render(result, format_, pair), result, file, drawing)
    if second is not None:  # last: what was measured is on the disk, whatever that other run was
        sys.stdout.write("\n" + against(result, second))
        sys.stdout.flush()


def _static(plan: Choices, job: Job, timeout: float, format_: str) -> None:
    from gpt2_tvm import toolchains
    from gpt2_tvm.compile import progress_on_stderr
    from tuning.ablation_static import render, static_table

    toolchains.prepare(plan.target)  # a compiler that is missing is no result of every set
    with progress_on_stderr() as say:
        rows = static_table(job, plan.variants, timeout, say)
    kind = "Graph passes" if job.toggles == "passes" else "Schedule rules"
    of = f"{kind} of {plan.source.name} {job.quantization} for {plan.target.name}, {job.attention} attention"
    sys.stdout.write(render(rows, format_, of))
    sys.stdout.flush()


if __name__ == "__main__":
    cli.run(app)
