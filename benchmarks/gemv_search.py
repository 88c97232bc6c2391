"""How good searches are, replayed over recorded grids: nothing is measured, times come from a sweep's records.

    python benchmarks/gemv_search.py RECORDS... [--share 0.1] [--seeds 5] [--json FILE]

Compared: `model` and `random` of tuning.search, and the TPE sampler of Optuna (Akiba et al. 2019, KDD), an optimiser
that knows nothing of GPUs. Each may try a tenth of the grid; the figure is the best time it found over the grid's best.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from gpt2_tvm.cli import run, write_json
from gpt2_tvm.errors import UserError

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


@app.command()
def main(
    records: Annotated[list[Path], typer.Argument(metavar="RECORDS...", help="Files made by tuning.sweep.")],
    share: Annotated[float, typer.Option(help="Trials, as a share of the grid.")] = 0.1,
    seeds: Annotated[int, typer.Option(help="How often each search is repeated.")] = 5,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Also write the result here.")
    ] = None,
) -> None:
    """Replay searches over recorded grids."""
    from gpt2_tvm.measure.tables import markdown_table
    from targets import load_target
    from tuning.records import read_records

    searches = {"model": ours("model"), "random": ours("random"), "optuna TPE": tpe}
    rows, told = [], []
    for file in records:
        found = read_records(file)
        target = load_target(found.header["target_argument"])
        for name, workload in found.workloads.items():
            times: Times = {p.config: p.time_us if p.ok else None for p in found.of(name)}
            good = [t for t in times.values() if t is not None]
            trials = max(8, round(share * len(times)))
            if len(good) < 4 * trials:
                continue
            best = min(good)
            row = [name, str(len(times)), str(trials)]
            for search, go in searches.items():
                over = [go(times, workload, target, trials, seed) / best for seed in range(seeds)]
                row.append(f"{statistics.median(over):.3f} ({max(over):.3f})")
                told.append(
                    {
                        "workload": name,
                        "device": found.header["device"],
                        "points": len(times),
                        "trials": trials,
                        "search": search,
                        "over_best": statistics.median(over),
                        "over_best_worst": max(over),
                    }
                )
            rows.append(row)
    if not rows:
        raise UserError("no product in these records has enough points that ran; sweep with --strategy grid")
    print(
        markdown_table(["product", "points", "trials", *(f"{s}: best found" for s in searches)], rows, left=1), end=""
    )
    print(f"\nTimes over the grid's best: median (worst) of {seeds} repeats.")
    if json_file is not None:
        write_json(json_file, {"rows": told})


if __name__ == "__main__":
    run(app)
