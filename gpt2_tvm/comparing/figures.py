"""Memory by batch, and the Pareto fronts of size and of speed against perplexity; each as PNG and SVG.

Colours are Okabe and Ito's, as in `theory.figures`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gpt2_tvm.comparing.tables import labels
from gpt2_tvm.errors import UserError

Json = dict[str, Any]
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#777777")
SUFFIXES = (".png", ".svg")


def files_of(path: Path) -> tuple[Path, Path]:
    """FILE.png and FILE.svg for FILE, FILE.png or FILE.svg. UserError for another ending."""
    if path.suffix and path.suffix not in SUFFIXES:
        raise UserError(f"--figure {path}: a PNG and an SVG are written; end the name in .png or .svg")
    return path.with_suffix(".png"), path.with_suffix(".svg")


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """The indices of the points that no other beats in both coordinates (smaller is better), by the first."""
    order = sorted(range(len(points)), key=lambda i: points[i])
    best, kept = float("inf"), []
    for i in order:
        if points[i][1] < best:
            best = points[i][1]
            kept.append(i)
    return kept


def draw(result: Json, path: Path) -> tuple[Path, Path]:
    """Draw a result into two files; returns their names."""
    figure = make_figure(result)
    return save(figure, path)


def save(figure: Any, path: Path) -> tuple[Path, Path]:
    """Write a figure as PNG and as SVG, each whole or not at all."""
    from matplotlib import rc_context

    from gpt2_tvm.files import replacing_file

    files = files_of(path)
    with rc_context({"svg.hashsalt": "gpt2-tvm"}):
        for file in files:
            metadata = {"Date": None} if file.suffix == ".svg" else {"Software": None}
            with replacing_file(file) as out:
                figure.savefig(out, format=file.suffix[1:], dpi=150, metadata=metadata)
    return files


def make_figure(result: Json) -> Any:
    """The matplotlib figure: memory, and where there are perplexities, both fronts."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    rows = [{**row, "label": name} for row, name in zip(result["rows"], labels(result["rows"]), strict=True)]
    scored = any(row["perplexity"] is not None for row in rows)
    figure = Figure(figsize=(5.4 * (3 if scored else 2), 4.4), layout="constrained")
    axes = figure.subplots(1, 3 if scored else 2)
    _bars(axes[0], rows, "peak_rss_mb", "peak memory, MB")
    batch = min(row["batch"] for row in rows)
    one = [row for row in rows if row["batch"] == batch]
    if scored:
        pareto(axes[1], one, "size_mb", "size on disk, MB", smaller=True)
        pareto(axes[2], one, "decode_tok_s", f"decode tok/s, batch {batch}", smaller=False)
    else:
        _bars(axes[1], rows, "decode_tok_s", "decode tok/s")
    return figure


def _bars(axis: Any, rows: Sequence[Json], key: str, what: str) -> None:
    """Bars grouped by artifact, one for each batch; with the standard deviation where there is one."""
    names = list(dict.fromkeys(row["label"] for row in rows))
    batches = sorted({row["batch"] for row in rows})
    width = 0.8 / len(batches)
    for n, batch in enumerate(batches):
        found = {row["label"]: row for row in rows if row["batch"] == batch}
        values = [found[name][key] or 0 for name in names]
        errors = [found[name].get(f"{key}_sd") or 0 for name in names]
        places = [i + (n - (len(batches) - 1) / 2) * width for i in range(len(names))]
        bars = axis.bar(places, values, width, color=COLOURS[n % len(COLOURS)], label=f"batch {batch}")
        if any(errors):
            axis.errorbar(places, values, errors, fmt="none", ecolor="black", capsize=2, linewidth=0.8)
        axis.bar_label(bars, [f"{value:.0f}" if value else "" for value in values], fontsize=7, padding=2)
    axis.set_xticks(range(len(names)), names, fontsize=8, rotation=20 if len(names) > 4 else 0)
    axis.set_ylabel(what)
    axis.legend(fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=len(batches), frameon=False)
    axis.spines[["top", "right"]].set_visible(False)


NEAR = 0.12  # of the range of both axes: labels that would cover each other


def together(points: Sequence[tuple[float, float, str]]) -> list[tuple[float, float, list[str]]]:
    """Labels of points that lie close to each other, one under the other at the first of them."""
    if not points:
        return []
    wide = max(p[0] for p in points) - min(p[0] for p in points) or 1.0
    high = max(p[1] for p in points) - min(p[1] for p in points) or 1.0
    found: list[tuple[float, float, list[str]]] = []
    for x, y, name in points:
        for u, v, names in found:
            if abs(x - u) < NEAR * wide and abs(y - v) < NEAR * high:
                names.append(name)
                break
        else:
            found.append((x, y, [name]))
    return found


def pareto(axis: Any, rows: Sequence[Json], key: str, what: str, smaller: bool) -> None:
    """Points of `key` against perplexity, those on the front joined; smaller: whether less of `key` is better."""
    shown = [row for row in rows if row[key] is not None and row["perplexity"] is not None]
    points = [(row[key] if smaller else -row[key], row["perplexity"]) for row in shown]
    best = front(points)
    axis.plot([shown[i][key] for i in best], [shown[i]["perplexity"] for i in best], "-", color=COLOURS[0], zorder=1)
    for i, row in enumerate(shown):
        on = i in best
        axis.plot(row[key], row["perplexity"], "o", color=COLOURS[0] if on else COLOURS[6], zorder=2)
    for x, y, names in together([(row[key], row["perplexity"], row["label"]) for row in shown]):
        axis.annotate("\n".join(names), (x, y), (4, 4), textcoords="offset points", fontsize=8)
    axis.set_xlabel(what + (" (less is better)" if smaller else " (more is better)"))
    axis.set_ylabel("perplexity (less is better)")
    axis.margins(x=0.15, y=0.15)
    axis.spines[["top", "right"]].set_visible(False)
