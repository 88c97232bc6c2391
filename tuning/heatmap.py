"""`python -m tuning.heatmap`: the pictures of a sweep."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from gpt2_tvm import cli
from gpt2_tvm.errors import UserError

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)

MEASURES = ("time", "gb_s", "peak", "gain")


@app.command()
def main(
    records: Annotated[Path, typer.Argument(metavar="RECORDS", help="A file made by tuning.sweep.")],
    output: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Default: a folder beside the records, named after them.")
    ] = None,
    workload: Annotated[
        str | None, typer.Option(help="Only products whose name contains one of these, with commas between.")
    ] = None,
    measure: Annotated[
        str,
        typer.Option(help="Colour: time, gb_s, peak (share of the device's bandwidth), gain (over DLight's point)."),
    ] = "time",
    mark: Annotated[
        str | None,
        typer.Option(metavar="TS=8,TR=16,...", help="Also mark this point (M), another device's best, say."),
    ] = None,
    follow: Annotated[
        bool, typer.Option("--follow", help="Write the page again and again while a sweep runs; stop with Ctrl-C.")
    ] = False,
) -> None:
    """Draw a sweep: for each product TS x TR at the best tile, TILE_S x TILE_R at the best threads, and all of them.

    Writes a PNG and an SVG a product, and one interactive page. Prints what they say: the best point, the gain over
    DLight's own with its interval, and which parameter matters how much.

    \b
    Example:
      python -m tuning.heatmap artifacts/tuning/gpt2-q0f32-webgpu-gemv.jsonl --measure gain
      python -m tuning.heatmap artifacts/records/static/rtx-4090-gemv.jsonl --mark TS=8,TR=16,TILE_S=1,TILE_R=8
    """
    from tuning.heatmaps.figure import draw
    from tuning.heatmaps.marks import about_mark, parse_mark
    from tuning.heatmaps.page import write_page
    from tuning.heatmaps.words import paragraph
    from tuning.records import read_records

    if measure not in MEASURES:
        raise UserError(f"unknown measure {measure!r}; choose {', '.join(MEASURES)}")
    marked = parse_mark(mark) if mark else {}
    folder = output or records.with_suffix("")
    while follow:
        try:
            write_page(read_records(records), folder / "index.html", None, follow=True)
            time.sleep(2)
        except KeyboardInterrupt:
            break
    found = read_records(records)
    peak = _peak(found.header["target_argument"])
    if measure == "peak" and peak is None:
        raise UserError(f"{found.header['target']} states no bandwidth; choose another --measure")
    wanted = [part.strip() for part in (workload or "").split(",") if part.strip()]
    names = [n for n in found.workloads if not wanted or any(part in n for part in wanted)]
    if not names:
        raise UserError(f"--workload {workload} names none of: {'; '.join(found.workloads)}")
    for name in names:
        if not found.ok(name):
            print(f"{name}: no point ran", file=sys.stderr)
            continue
        file = folder / f"{file_name(name)}.png"
        told = draw(found, name, file, measure, peak, marked)
        said = [paragraph(told, found.header["method"] != "static")]
        if marked:
            said.append(about_mark(found.of(name), marked, told.best))
        print(f"- {name}: {' '.join(said)}")
        print(f"wrote {file} and .svg", file=sys.stderr)
    write_page(found, folder / "index.html", peak)
    print(f"wrote {folder / 'index.html'}", file=sys.stderr)


def file_name(workload: str) -> str:
    """A product's name as a file's: "mlp.c_fc 3072x768 float16" -> "mlp.c_fc-3072x768-float16"."""
    return "-".join("".join(c if c.isalnum() or c in "._-" else " " for c in workload).split())


def _peak(target: str) -> float | None:
    from targets import load_target

    try:
        device = load_target(target)
    except UserError:  # a TOML file that is not here any more
        return None
    return device.peak.bandwidth_gb_s if device.peak else None


if __name__ == "__main__":
    cli.run(app)
