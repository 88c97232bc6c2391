"""A product's heatmaps as PNG and SVG.

Top: TS x TR at the best (TILE_S, TILE_R), and TILE_S x TILE_R at the best (TS, TR), as the study drew them. Below:
TS x TR for every (TILE_S, TILE_R). Cividis reads the same with any colour vision and in grey.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuning.heatmaps.cells import Cell, Table, table, value, within_noise
from tuning.heatmaps.marks import Mark, about_mark, is_marked
from tuning.heatmaps.words import Findings, findings, paragraph
from tuning.records import Point, Records

if TYPE_CHECKING:
    from matplotlib.axes import Axes

HATCHES = {"invalid": "..", "compile-error": "xx", "wrong-result": "++", "timeout": "//", "crash": "\\\\"}
COLUMNS = 4  # of small multiples


def unit_of(measure: str) -> tuple[str, bool]:
    """(label of the colour bar, whether more is better)."""
    return {
        "time": ("microseconds", False),
        "gb_s": ("GB/s", True),
        "peak": ("share of the device's bandwidth", True),
        "gain": ("times as fast as DLight's point", True),
    }[measure]


MEASURES = ("time", "gb_s", "peak", "gain")


def scale(measure: str, stock: Point | None, bytes_: int, peak_gb_s: float | None) -> Callable[[Cell], float | None]:
    """What a cell's colour shows."""

    def of(cell: Cell) -> float | None:
        if cell.time_us is None:
            return None
        if measure == "gain":
            return stock.time_us / cell.time_us if stock and stock.time_us else None
        gb_s = bytes_ / cell.time_us / 1e3
        if measure == "peak":
            return gb_s / peak_gb_s if peak_gb_s else None
        return gb_s if measure == "gb_s" else cell.time_us

    return of


def draw(
    records: Records,
    name: str,
    path: Path,
    measure: str = "time",
    peak_gb_s: float | None = None,
    mark: Mark | None = None,
) -> Findings:
    """Write `path` (.png) and the same as .svg for one product that has points which ran. mark: a point shown as M."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.colors import LogNorm, Normalize

    points, stock = records.of(name), records.stock(name)
    found = findings(points, stock)
    assert found is not None
    best = found.best
    tiles = sorted({(value(p, "TILE_S"), value(p, "TILE_R")) for p in points if p.ok})
    maps = [table(points, "TS", "TR", {"TILE_S": s, "TILE_R": r}) for s, r in tiles]
    top = [
        table(points, "TS", "TR", {"TILE_S": best.config.tile_s, "TILE_R": best.config.tile_r}),
        table(points, "TILE_S", "TILE_R", {"TS": best.config.ts, "TR": best.config.tr}),
    ]
    of = scale(measure, stock, records.workloads[name].bytes, peak_gb_s)
    values = [v for t in [*top, *maps] for _, _, cell in t.cells() if (v := of(cell)) is not None]
    low, high = min(values), max(values)
    label, more = unit_of(measure)
    norm: Any = LogNorm(low, high) if low > 0 and high / low > 3 else Normalize(low, high if high > low else low + 1)
    cmap = matplotlib.colormaps["cividis" if more else "cividis_r"]

    many = maps if len(maps) > 1 else []
    rows = math.ceil(len(many) / COLUMNS)
    figure = plt.figure(figsize=(13, 4.9 + 2.6 * rows + 0.9), layout="constrained")
    parts = figure.subfigures(1 + (rows > 0), 1, height_ratios=[4.9] + ([2.6 * rows] if rows else []), squeeze=False)
    axes = parts[0][0].subplots(1, 2)
    titles = (
        f"TS x TR at TILE_S={best.config.tile_s}, TILE_R={best.config.tile_r}",
        f"TILE_S x TILE_R at TS={best.config.ts}, TR={best.config.tr}",
    )
    for ax, t, title in zip(axes, top, titles, strict=True):
        _map(ax, t, of, norm, cmap, best, stock, mark or {}, numbers=True, measure=measure)
        ax.set_title(title, fontsize=11)
    if rows:
        small = parts[1][0].subplots(rows, COLUMNS, squeeze=False)
        for ax, t in zip(small.flat, many, strict=False):
            _map(ax, t, of, norm, cmap, best, stock, mark or {}, numbers=False, measure=measure)
            ax.set_title(f"TILE_S={t.fixed['TILE_S']}, TILE_R={t.fixed['TILE_R']}", fontsize=9)
        for ax in list(small.flat)[len(many) :]:
            ax.set_visible(False)
    mappable = matplotlib.cm.ScalarMappable(norm, cmap)
    bar = parts[0][0].colorbar(mappable, ax=axes, shrink=0.9, pad=0.01)
    bar.set_label(label)
    if isinstance(norm, LogNorm):
        bar.ax.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
    bar.ax.yaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda v, _: f"{v:g}"))
    bar.ax.yaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
    _legend(parts[0][0], found, points, bool(mark))
    header = records.header
    where = f"predicted for {header['target']}" if header["method"] == "static" else f"on {header['device']}"
    figure.suptitle(f"{name}, {where}, {header['date']}", fontsize=13)
    said = paragraph(found, header["method"] != "static") + (f" {about_mark(points, mark, best)}" if mark else "")
    figure.supxlabel(textwrap.fill(said, 150), fontsize=9, x=0.01, ha="left")
    path.parent.mkdir(parents=True, exist_ok=True)
    for file in (path, path.with_suffix(".svg")):
        _save(figure, file)
    plt.close(figure)
    return found


def _map(
    ax: Axes,
    t: Table,
    of: Callable[[Cell], float | None],
    norm: Any,
    cmap: Any,
    best: Point,
    stock: Point | None,
    marked: Mark,
    numbers: bool,
    measure: str,
) -> None:
    from matplotlib.patches import Rectangle

    ax.set_xlim(-0.5, len(t.xs) - 0.5)
    ax.set_ylim(-0.5, len(t.ys) - 0.5)
    size = 9 if numbers else 6
    ax.set_xticks(range(len(t.xs)), [str(v) for v in t.xs], fontsize=size)
    ax.set_yticks(range(len(t.ys)), [str(v) for v in t.ys], fontsize=size)
    ax.set_xlabel(t.x, fontsize=size + 1)
    ax.set_ylabel(t.y, fontsize=size + 1)
    ax.tick_params(length=0)
    for spine in ax.spines.values():
        spine.set_visible(False)
    for i, j, cell in t.cells():
        shown = of(cell)
        if shown is None:
            failure = cell.failure
            hatch = HATCHES.get(failure) if failure else None
            face = "#f0f0f0" if hatch else "none"
            ax.add_patch(Rectangle((j - 0.5, i - 0.5), 1, 1, facecolor=face, edgecolor="#999999", hatch=hatch, lw=0))
            continue
        colour = cmap(norm(shown))
        ax.add_patch(Rectangle((j - 0.5, i - 0.5), 1, 1, facecolor=colour, edgecolor="white", lw=0.8))
        point = cell.point
        assert point is not None
        if within_noise(point, best):
            ax.add_patch(Rectangle((j - 0.44, i - 0.44), 0.88, 0.88, fill=False, edgecolor="#d62728", lw=1.4))
        dark = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2] < 0.5
        ink = "white" if dark else "black"
        if numbers:
            ax.text(j, i, _short(shown, measure), ha="center", va="center", fontsize=8, color=ink)
        mark = "★" if point.config == best.config else "D" if stock and point.config == stock.config else ""
        mark += "M" if is_marked(point, marked) else ""
        if mark:
            # in a corner where there is a number, else in the middle
            x, y = (j - 0.33, i + 0.3) if numbers else (j, i)
            ax.text(x, y, mark, ha="center", va="center", fontsize=10 if numbers else 7, color=ink, fontweight="bold")


def _legend(figure: Any, found: Findings, points: list[Point], marked: bool) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Any] = [Line2D([], [], marker="*", color="black", linestyle="", label="best")]
    handles.append(Line2D([], [], marker="$D$", color="black", linestyle="", label="DLight's own point"))
    if marked:
        handles.append(Line2D([], [], marker="$M$", color="black", linestyle="", label="marked"))
    handles.append(Patch(facecolor="none", edgecolor="#d62728", label="not to be told from the best"))
    for status in sorted({p.status for p in points if not p.ok} & set(HATCHES)):
        handles.append(Patch(facecolor="#f0f0f0", edgecolor="#999999", hatch=HATCHES[status], label=status))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=9, frameon=False)


def _short(shown: float, measure: str) -> str:
    if measure in ("gain", "peak"):
        return f"{shown:.2f}"
    return f"{shown:.3g}" if shown < 1000 else f"{shown:.0f}"


def _save(figure: Any, path: Path) -> None:
    """Beside and then renamed; the same picture gives the same bytes."""
    import matplotlib

    beside = path.with_name(f".{path.name}.new")
    form = path.suffix.removeprefix(".")
    metadata = {"Date": None} if form == "svg" else {}
    with matplotlib.rc_context({"svg.hashsalt": path.stem, "svg.fonttype": "none"}):
        figure.savefig(beside, format=form, dpi=130, metadata=metadata)
    beside.replace(path)
