"""A sweep drawn: size and speed against quality, size against speed, and speed beside what bytes predict."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gpt2_tvm.comparing.figures import COLOURS, save

Json = dict[str, Any]
MARKS = "osD^vP*"


def draw(result: Json, path: Path) -> tuple[Path, Path]:
    """Draw an annotated result (`sweep.annotated`) as PNG and SVG; returns their names."""
    return save(make_figure(result), path)


def make_figure(result: Json) -> Any:
    """The matplotlib figure; panels with perplexity only where a text was scored."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    rows = result["rows"]
    batch = min(row["batch"] for row in rows)
    rows = [row for row in rows if row["batch"] == batch]
    scored = any(row["perplexity"] is not None for row in rows)
    panels: list[tuple[str, str, str, str]] = []
    if scored:
        panels += [("size_mb", "size, MB", "perplexity", "Size against quality")]
        panels += [("decode_tok_s", f"decode tok/s, batch {batch}", "perplexity", "Speed against quality")]
    panels += [("size_mb", "size, MB", "decode_tok_s", "Size against speed")]
    panels += [("step_ratio", "times as fast by bytes", "decode_ratio", "Speed-up, measured and by bytes")]
    figure = Figure(figsize=(5.2 * len(panels), 4.4), layout="constrained")
    axes = figure.subplots(1, len(panels))
    for axis, (x, label, y, title) in zip(axes, panels, strict=True):
        _lines(axis, rows, x, y)
        if (x, y) == ("size_mb", "perplexity"):
            zeroed = [row for row in rows if row["methods"] == "whole" or "magnitude" in row["methods"]]
            _lines(axis, zeroed, "sparse_mb", y, sparse=True)
        if y == "perplexity":
            axis.set_yscale("log")
            axis.yaxis.set_major_formatter("{x:g}")
            axis.yaxis.set_minor_formatter("{x:g}")
        if y == "decode_ratio":
            edge = max([1.05, *(row[key] or 0 for row in rows for key in (x, y))])
            axis.plot([1, edge], [1, edge], "-", color=COLOURS[-1], linewidth=0.8)
        axis.set_xlabel(label)
        axis.set_ylabel({"decode_tok_s": f"decode tok/s, batch {batch}", "decode_ratio": "measured"}.get(y, y))
        axis.set_title(title, fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(fontsize=8)
    return figure


def _lines(axis: Any, rows: Sequence[Json], x: str, y: str, sparse: bool = False) -> None:
    """A line a method, from the whole model on, by share."""
    names = [name for name in dict.fromkeys(row["methods"] for row in rows) if name != "whole"]
    for i, name in enumerate(names):
        own = [row for row in rows if row["methods"] in ("whole", name)]
        shown = sorted({(r["share"], r[x], r[y]) for r in own if r[x] is not None and r[y] is not None})
        label = f"{name}, zeros not stored" if sparse else name
        style = "--" if sparse else "-"
        axis.plot(
            [p[1] for p in shown],
            [p[2] for p in shown],
            style,
            marker=MARKS[i % len(MARKS)],
            color=COLOURS[i % len(COLOURS)] if not sparse else COLOURS[-1],
            label=label,
        )
