"""How good searches are, replayed over recorded grids: nothing is measured, times come from a sweep's records.

    python benchmarks/gemv_search.py RECORDS... [--share 0.1] [--seeds 10] [--json FILE]

Where several files have the same product of the same device, a point's time is the fastest of them: what disturbs a
measurement only adds to it. Each repeat leaves out another twentieth of the grid, so that a search is judged by more
than one landscape. Compared: `model` and `random` of tuning.search, and the TPE sampler of Optuna (Akiba et al. 2019,
KDD), an optimiser that knows nothing of GPUs. Each may try a tenth of the grid; the figure is the best time it found
over the grid's best.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from gpt2_tvm.cli import run, write_json
from gpt2_tvm.errors import UserError

LEFT_OUT = 0.05  # of the grid, in each repeat
CLOSE = 1.02  # times the best: found

app = typer.Typer(add_completion=False, rich_markup_mode=None)
Times = dict[Any, float | None]


def ours(name: str) -> Callable[[Times, Any, Any, int, int], float]:
    """A strategy of tuning.search, by its best time."""

    def search(times: Times, workload: Any, target: Any, trials: int, seed: int) -> float:
        from tuning.search import get_strategy

        strategy = get_strategy(name)(list(times), workload, target, trials, seed)
        results: Times = {}
        while (config := strategy.ask(results, set())) is not None:
            results[config] = times[config]
        return min((t for t in results.values() if t is not None), default=float("inf"))

    return search


def tpe(times: Times, workload: Any, target: Any, trials: int, seed: int) -> float:
    """Optuna's TPE over the parameters that vary; what is no point of the grid costs no trial and counts as failed."""
    try:
        import optuna
    except ImportError:
        raise UserError("the comparison needs optuna: pip install optuna") from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    names = [n for n in next(iter(times)).to_json() if len({c.to_json()[n] for c in times}) > 1]
    values = {n: sorted({c.to_json()[n] for c in times}) for n in names}
    points = {tuple(c.to_json()[n] for n in names): c for c in times}
    worst = 10 * max(t for t in times.values() if t is not None)
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed, n_startup_trials=max(4, trials // 4)))
    seen: dict[Any, float] = {}
    for _ in range(50 * trials):  # proposals outside the grid, or seen before, are answered from the table
        trial = study.ask()
        config = points.get(tuple(trial.suggest_categorical(n, values[n]) for n in names))
        if config is not None and config not in seen:
            seen[config] = times[config] or worst
        study.tell(trial, seen[config] if config is not None else worst)
        if len(seen) >= trials:
            break
    return min(seen.values(), default=float("inf"))


def grids(files: list[Path]) -> dict[tuple[str, str], tuple[Any, Any, Times]]:
    """(device, product) to its target, workload, and the fastest time of each point; None for one that never ran."""
    from targets import load_target
    from tuning.records import read_records

    found: dict[tuple[str, str], tuple[Any, Any, Times]] = {}
    for file in files:
        records = read_records(file)
        target = load_target(records.header["target_argument"])
        for name, workload in records.workloads.items():
            key = (str(records.header["device"]), name)
            times = found.setdefault(key, (target, workload, {}))[2]
            for point in records.of(name):
                known, new = times.get(point.config), point.time_us if point.ok else None
                times[point.config] = min(known, new) if known is not None and new is not None else known or new
    return found


def thinned(times: Times, seed: int) -> Times:
    """Without a random part of the points."""
    order = list(times)
    random.Random(seed).shuffle(order)
    left_out = set(order[: round(LEFT_OUT * len(order))])
    return {config: time for config, time in times.items() if config not in left_out}


@app.command()
def main(
    records: Annotated[list[Path], typer.Argument(metavar="RECORDS...", help="Files made by tuning.sweep.")],
    share: Annotated[float, typer.Option(help="Trials, as a share of the grid.")] = 0.1,
    seeds: Annotated[int, typer.Option(help="How often each search is repeated.")] = 10,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Also write the result here.")
    ] = None,
) -> None:
    """Replay searches over recorded grids."""
    from gpt2_tvm.measure.tables import markdown_table

    searches = {"model": ours("model"), "random": ours("random"), "optuna TPE": tpe}
    rows, told = [], []
    for (device, name), (target, workload, times) in grids(records).items():
        trials = max(8, round(share * len(times)))
        if sum(t is not None for t in times.values()) < 4 * trials:
            continue
        row = [name, str(len(times)), str(trials)]
        for search, go in searches.items():
            over = []
            for seed in range(seeds):
                kept = thinned(times, seed)
                best = min(t for t in kept.values() if t is not None)
                over.append(go(kept, workload, target, trials, seed) / best)
            close = sum(one <= CLOSE for one in over)
            row.append(f"{statistics.median(over):.3f} ({max(over):.3f}), {close} of {seeds}")
            told.append(
                {
                    "workload": name,
                    "device": device,
                    "points": len(times),
                    "trials": trials,
                    "search": search,
                    "over_best": statistics.median(over),
                    "over_best_worst": max(over),
                    "close": close,
                    "repeats": seeds,
                }
            )
        rows.append(row)
    if not rows:
        raise UserError("no product in these records has enough points that ran; sweep with --strategy grid")
    print(
        markdown_table(["product", "points", "trials", *(f"{s}: best found" for s in searches)], rows, left=1), end=""
    )
    print(f"\nTimes over the grid's best: median (worst) of {seeds} repeats, and how many were within 2 %.")
    if json_file is not None:
        write_json(json_file, {"rows": told})


if __name__ == "__main__":
    run(app)
