"""`python -m tuning.apply`: the best points of a sweep as a schedule file, once the whole model was timed."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gpt2_tvm import cli
from gpt2_tvm.errors import UserError

if TYPE_CHECKING:
    from gpt2_tvm.schedules.tuned import Tuned, TunedPoint
    from tuning.decode import Gain, Rates, Setting
    from tuning.records import Point, Records

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)

FOLDER = Path("artifacts/records")


@app.command()
def main(
    records: Annotated[Path, typer.Argument(metavar="RECORDS", help="A file made by tuning.sweep.")],
    output: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Default: artifacts/records/TARGET-gemv.toml.")
    ] = None,
    prompt_tokens: Annotated[int, typer.Option(help="Tokens of the prompt.")] = 322,
    generate: Annotated[int, typer.Option(help="Tokens to decode after it.")] = 64,
    repeats: Annotated[int, typer.Option(help="Rounds; in each every variant has one turn.")] = 7,
    device: Annotated[str | None, typer.Option(help='"cuda:1", say; default: the first of the kind.')] = None,
    unchecked: Annotated[
        bool, typer.Option("--unchecked", help="Without a device: take the best points without timing the model.")
    ] = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Also write the result here.")
    ] = None,
) -> None:
    """Choose points for `compile --tuned`.

    The model is compiled untuned, with each product's best point alone, with all of them, and with DLight's rules, and
    decode is timed in turns. A point that wins alone but loses in the whole model is left out. If all together are not
    faster, those that were faster one by one are tried together; if they are not either, nothing is written.

    \b
    Example:
      python -m tuning.apply artifacts/tuning/gpt2-q0f16-rtx-4090-gemv.jsonl
      python -m gpt2_tvm.compile --model gpt2 --target rtx-4090 --tuned artifacts/records/rtx-4090-gemv.toml
    """
    from tuning.decode import Setting, origin
    from tuning.records import read_records

    found = read_records(records)
    header = found.header
    candidates = {name: point for name in found.workloads if (point := candidate(found, name)) is not None}
    for name in found.workloads:
        if name not in candidates:
            print(f"{name}: no point is faster than DLight's", file=sys.stderr)
    if not candidates:
        raise UserError(f"no point in {records} is faster than DLight's own; there is nothing to apply")
    setting = Setting(
        header["model"],
        header["target_argument"],
        header["quantization"],
        header["batch"],
        prompt_tokens,
        generate,
        repeats,
        device,
    )
    final = output or FOLDER / f"{header['target']}-gemv.toml"
    result: Tuned | None
    if unchecked:
        result = _tuned(origin(found), list(candidates.values()))
        table = _points_table(candidates)
    else:
        result, table = _checked(found, candidates, setting, json_file)
    sys.stdout.write(table)
    if result is None:
        raise UserError("the points win alone and not in the whole model; nothing was written")
    result.write(final)
    print(f"wrote {final}; use it with compile --tuned {final}", file=sys.stderr)


def candidate(records: Records, name: str) -> TunedPoint | None:
    """The fastest point of a product, if it beats DLight's by more than their spread."""
    from tuning.decode import tuned_point

    stock, fastest = records.stock(name), records.ok(name)
    if not fastest:
        return None
    best = fastest[0]
    if stock is not None and stock.ok and not clearly_faster(best, stock):
        return None
    return tuned_point(records.workloads[name], best, stock)


def clearly_faster(best: Point, stock: Point) -> bool:
    """By more than two standard errors of the difference of their medians."""
    if best.config == stock.config or best.time_us is None or stock.time_us is None:
        return False
    errors = [1.25 * (p.time_us_sd or 0.0) / max(p.samples, 1) ** 0.5 for p in (best, stock)]
    return stock.time_us - best.time_us > 2 * (errors[0] ** 2 + errors[1] ** 2) ** 0.5


def _tuned(origin: dict, points: list[TunedPoint]) -> Tuned:
    from gpt2_tvm.schedules.tuned import Tuned

    return Tuned(origin, tuple(points))


def _checked(
    records: Records, candidates: dict[str, TunedPoint], setting: Setting, json_file: Path | None
) -> tuple[Tuned | None, str]:
    """Time the model: untuned, each point alone, all that did not lose. Returns what to apply, and the table."""
    from tuning.decode import STOCK, UNTUNED, Gain, measure, origin

    start = origin(records)

    def say(what: str) -> None:
        if what.startswith(("compiling", "note")):
            print(what, file=sys.stderr, flush=True)

    everything = "all points"
    variants = {UNTUNED: None, **{name: _tuned(start, [p]) for name, p in candidates.items()}}
    if len(candidates) > 1:
        variants[everything] = _tuned(start, list(candidates.values()))
    rates = measure({**variants, STOCK: None}, setting, say)
    gains = {name: Gain.of(rate, rates[UNTUNED]) for name, rate in rates.items() if name != UNTUNED}
    losers = [name for name in candidates if gains[name].loses()]
    chosen, last = list(candidates), everything if len(candidates) > 1 else next(iter(candidates))
    smaller = (
        ("the points that did not lose", [name for name in candidates if name not in losers]),
        ("the points that were faster", [name for name in candidates if gains[name].ratio > 1]),
    )
    for label, names in smaller:
        if gains[last].ratio >= 1 and not set(chosen) & set(losers):
            break
        if names and names != chosen:
            again = measure({UNTUNED: None, label: _tuned(start, [candidates[name] for name in names])}, setting, say)
            rates[label], gains[label] = again[label], Gain.of(again[label], again[UNTUNED])
            chosen, last = names, label
    table = _gain_table(rates, gains, losers)
    if gains[last].ratio < 1 or set(chosen) & set(losers):
        chosen = []
    if json_file is not None:
        cli.write_json(json_file, _json(records, rates, gains, chosen))
    return (_tuned(start, [candidates[name] for name in chosen]) if chosen else None), table


def _gain_table(rates: dict[str, Rates], gains: dict[str, Gain], losers: list[str]) -> str:
    from gpt2_tvm.measure.tables import markdown_table

    rows = []
    for name, rate in rates.items():
        gain = gains.get(name)
        verdict = "" if gain is None else "wins" if gain.wins() else "loses" if gain.loses() else "even"
        verdict = "left out: it loses" if name in losers else verdict
        rows.append([name, f"{rate.tok_s:.1f} ± {rate.sd:.1f}", str(gain) if gain else "", verdict])
    return markdown_table(["tuned", "decode tok/s", "gain, same rounds", "verdict"], rows, left=1)


def _points_table(points: dict[str, TunedPoint]) -> str:
    from gpt2_tvm.measure.tables import markdown_table
    from tuning.space import describe

    rows = [
        [name, describe(p.config), str(p.told.get("time_us", "-")), str(p.told.get("stock_us", "-"))]
        for name, p in points.items()
    ]
    return markdown_table(["product", "point", "us", "DLight's us"], rows, left=2)


def _json(records: Records, rates: dict[str, Rates], gains: dict[str, Gain], applied: list[str]) -> dict:
    """applied: the products whose points are written."""
    rows = []
    for name, rate in rates.items():
        row = {"tuned": name, "decode_tok_s": rate.tok_s, "decode_tok_s_sd": rate.sd, "rounds": len(rate.decode)}
        if name in gains:
            row |= {"gain": gains[name].ratio, "gain_sd": gains[name].sd, "applied": name in applied}
        rows.append(row)
    return {**{k: v for k, v in records.header.items() if k != "format"}, "rows": rows}


if __name__ == "__main__":
    cli.run(app)
