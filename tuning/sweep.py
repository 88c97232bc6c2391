"""`python -m tuning.sweep`: time every point of a space for each matrix-vector product of a model's decode step."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gpt2_tvm import cli
from gpt2_tvm.errors import UserError

if TYPE_CHECKING:
    from tuning.records import Point, Records
    from tuning.sweeping import Done, Search

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)

FOLDER = Path("artifacts/tuning")
OBJECTIVES = ("kernel", "decode")


@app.command()
def main(
    model: Annotated[str, typer.Option(help="As for compile: a folder, a hub id, 'bundled', or a preset.")] = "gpt2",
    target: Annotated[str, typer.Option(help="A GPU target: a name from compile --list-targets, or a TOML.")] = "cuda",
    space: Annotated[
        str, typer.Option(help="schedule1, schedule2 (the study's) or full; a comma list.")
    ] = "schedule1,schedule2",
    quantization: Annotated[str, typer.Option(help="How weights are stored and computed with.")] = "q0f32",
    batch: Annotated[int, typer.Option(help="Sequences at a time: rows of the activation, 1 to 8.")] = 1,
    workload: Annotated[
        str | None, typer.Option(help="Only products whose name contains one of these, with commas between.")
    ] = None,
    strategy: Annotated[
        str, typer.Option(help="grid: every point. random: a sample. model: a model of the device ranks them.")
    ] = "grid",
    trials: Annotated[int | None, typer.Option(help="Points of each product and space at most.")] = None,
    objective: Annotated[
        str,
        typer.Option(
            help="kernel: time the product alone. decode: then also the whole model with the points that lead."
        ),
    ] = "kernel",
    leaders: Annotated[int, typer.Option(help="With --objective decode: how many points of each product.")] = 3,
    prompt_tokens: Annotated[int, typer.Option(help="With --objective decode: tokens of the prompt.")] = 322,
    generate: Annotated[int, typer.Option(help="With --objective decode: tokens to decode after it.")] = 64,
    repeats: Annotated[int, typer.Option(help="With --objective decode: rounds.")] = 5,
    records: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Default: artifacts/tuning/MODEL-QUANTIZATION-TARGET-gemv.jsonl."),
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Begin anew; else a sweep goes on where it stopped.")] = False,
    static: Annotated[
        bool, typer.Option("--static", help="Without a device: compile each point and rank by what it takes.")
    ] = False,
    budget: Annotated[float, typer.Option(help="Seconds of timing a point at most.")] = 0.5,
    spread: Annotated[float, typer.Option(help="Stop timing a point at this standard error, as a share.")] = 0.01,
    timeout: Annotated[float, typer.Option(help="Seconds for building a point, and for running it.")] = 60.0,
    workers: Annotated[
        int | None, typer.Option(help="Processes that build and measure; default 2 on a GPU, 1 on a software device.")
    ] = None,
    tracker: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Measure on machines behind this TVM RPC tracker.")
    ] = None,
    key: Annotated[str | None, typer.Option(help="The machines' key at the tracker.")] = None,
    runner: Annotated[
        str | None, typer.Option(help="browser: time webgpu points in a headless Chromium, through TVM's RPC proxy.")
    ] = None,
    page_port: Annotated[
        int | None,
        typer.Option(help="With --runner browser: start none, wait for a browser of yours at this port of localhost."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the order in which points are tried.")] = 0,
    list_: Annotated[
        bool, typer.Option("--list", help="Measure nothing: products, points, and why points fall.")
    ] = False,
) -> None:
    """Time the points of a space for every matrix-vector product that one decoded token calls.

    A point is checked against numpy before it is timed; weights are read from more memory than the caches hold. Each
    point builds and runs in a process of its own with a time limit, and is on the disk before the next is taken: a
    sweep that was killed goes on where it stopped when the same command is given again. DLight's own point is always
    measured. See the result with tuning.heatmap, use it with tuning.apply.

    \b
    Examples:
      python -m tuning.sweep --model bundled --target webgpu
      python -m tuning.sweep --model gpt2 --target rtx-4090 --quantization q0f16 --strategy model
      python -m tuning.sweep --model gpt2 --target h200 --static
    """
    from gpt2_tvm.tvm_alone import import_tvm

    import_tvm()
    from tuning import sweep_setup as setup

    if objective not in OBJECTIVES:
        raise UserError(f"unknown objective {objective!r}; choose {' or '.join(OBJECTIVES)}")
    if (
        min(budget, spread, timeout) <= 0
        or (trials is not None and trials < 1)
        or (workers is not None and workers < 1)
    ):
        raise UserError("--budget, --spread, --timeout, --trials and --workers must be above 0")
    if runner not in (None, "browser"):
        raise UserError(f"unknown runner {runner!r}; the only one to name is browser")
    if runner and (tracker or static):
        raise UserError("--runner browser measures here: leave out --tracker and --static (or use tuning.worker)")
    plan = setup.Setup.make(model, target, quantization, batch, workload, space, strategy, trials, seed)
    if plan.note:
        print(f"note: {plan.note}", file=sys.stderr)
    if list_:
        print(plan.listing())
        return
    specs = plan.workers(
        static, workers, tracker, key, budget, spread, runner, page_port, lambda what: print(what, file=sys.stderr)
    )
    facts = plan.probe(specs)
    file = records or FOLDER / f"{plan.name}-gemv.jsonl"
    with setup.open_records(file, plan, facts, fresh) as store:
        todo = plan.remaining(store)
        print(plan.introduction(facts, store, todo), file=sys.stderr)
        try:
            with _progress(todo, store) as done:
                if static:
                    plan.run_static(store, specs, trials, timeout, done)
                else:
                    plan.run(store, specs, timeout, done)
            if objective == "decode" and not static:
                sizes = (prompt_tokens, generate, repeats)
                plan.measure_decode(store, leaders, sizes, lambda what: print(what, file=sys.stderr))
        except KeyboardInterrupt:
            print(f"stopped; what was measured is in {file}: the same command goes on from there", file=sys.stderr)
            raise
        sys.stdout.write(setup.summary(store, plan.workload_names))
    print(f"wrote {file}", file=sys.stderr)


@contextmanager
def _progress(todo: int, records: Records) -> Iterator[Done]:
    """A bar with the best so far and the time left; on what is no terminal, a line a new best."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    from tuning.space import describe

    best: dict[str, float] = {}

    def better(search: Search, point: Point) -> bool:
        name = search.workload.name
        if not point.ok or point.time_us is None or point.time_us >= best.get(name, float("inf")):
            return False
        best[name] = point.time_us
        return True

    def line(search: Search, point: Point) -> str:
        return f"{search.workload.name}: {point.time_us:.1f} us at {describe(point.config, search.stock)}"

    console = Console(stderr=True)
    if not console.is_terminal:

        def plain(search: Search, point: Point) -> None:
            if better(search, point):
                print(line(search, point), file=sys.stderr, flush=True)

        yield plain
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("starting", total=todo)

        def advance(search: Search, point: Point) -> None:
            if better(search, point):
                bar.update(task, description=f"best {line(search, point)}")
            bar.advance(task)

        yield advance


if __name__ == "__main__":
    cli.run(app)
