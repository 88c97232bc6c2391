"""Two panels: where the time of a token goes, by strategy; and speed-up against acceptance beside the theory's curve.

Colours are Okabe and Ito's, as in `theory.figures`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gpt2_tvm.decoding.clock import PARTS
from gpt2_tvm.decoding.costs import at_rows
from gpt2_tvm.theory import speculation

Json = dict[str, Any]
COLOURS = {"draft": "#E69F00", "verify": "#0072B2", "sample": "#009E73", "rollback": "#CC79A7", "host": "#777777"}
CURVES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#777777", "#000000")
MOST_CURVES = 8


def draw(rows: Sequence[Json], path: Path) -> None:
    """Write the figure; the suffix says the format (png, svg, pdf)."""
    from matplotlib import pyplot

    from gpt2_tvm.files import replacing_file

    figure = make_figure(rows)
    try:
        with replacing_file(path) as file:
            figure.savefig(file, dpi=130, format=path.suffix[1:].lower())
    finally:
        pyplot.close(figure)


def make_figure(rows: Sequence[Json]) -> Any:
    """The matplotlib figure of a report's rows."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    height = max(4.2, 0.34 * len(rows) + 1.6)  # inches
    figure, (split, gain) = pyplot.subplots(1, 2, figsize=(15, height), layout="constrained")
    _split(split, rows)
    _gain(gain, [row for row in rows if row["acceptance"] is not None and row["speedup"] is not None])
    return figure


def _split(axis: Any, rows: Sequence[Json]) -> None:
    places = np.arange(len(rows))
    left = np.zeros(len(rows))
    for part in PARTS:
        values = np.array([row["split_us"][part] for row in rows])
        axis.barh(places, values, left=left, color=COLOURS[part], label=part)
        left += values
    axis.set_yticks(places, [_name(row) for row in rows], fontsize=8)
    axis.invert_yaxis()
    others = [total for total, row in zip(left, rows, strict=True) if row["strategy"] != "naive"]
    if others and left.max() > 2 * max(others):  # naive would leave nothing to be seen of the rest
        edge = 1.3 * max(others)
        axis.set_xlim(0, edge)
        for place, total in zip(places, left, strict=True):
            if total > edge:
                axis.text(0.98 * edge, place, f"{total:.0f}", ha="right", va="center", color="white", fontsize=8)
    axis.set_xlabel("µs a token")
    axis.set_title("Where the time of a token goes", fontsize=10)
    axis.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=5, frameon=False)  # beside the bars


def _name(row: Json) -> str:
    parts = [row["dataset"], row["model"], row["quantization"], row["strategy"]]
    parts += [Path(row["draft"]).name] if row["draft"] else []
    parts += [f"k={row['draft_length']}"] if row["draft_length"] else []
    parts += [f"a={row['planted_acceptance']:g}"] if row["planted_acceptance"] is not None else []
    return " ".join(parts)


def _gain(axis: Any, rows: Sequence[Json]) -> None:
    """Points are measured; a curve is the theory's for the costs of the points in its colour, for adaptive length the
    best of all lengths' (dashed); stars are the optimum that it predicts at the measured acceptance, and its length."""
    groups: dict[tuple[Any, ...], list[Json]] = {}
    for row in rows:
        key = (row["artifact"], row["strategy"], row["draft"], row["draft_length"])
        groups.setdefault(key, []).append(row)
    rates = np.linspace(0, 1, 101)
    for colour, ((_, strategy, draft, length), group) in zip(CURVES * len(groups), groups.items(), strict=False):
        label = " ".join([strategy, *([Path(draft).name] if draft else []), f"k={length}"])
        points = [(row["acceptance"], row["speedup"]) for row in group]
        axis.plot(*zip(*points, strict=True), "o", color=colour, label=label)
        costs = next((row for row in group if row["cost_ratio"] is not None), None)
        if costs is None or len(axis.lines) > 2 * MOST_CURVES:
            continue
        for row in group:
            if row["optimum_speedup"] is not None:
                axis.scatter(
                    row["acceptance"], row["optimum_speedup"], marker="*", s=90, facecolors="none", color=colour
                )
                where = (row["acceptance"], row["optimum_speedup"])
                axis.annotate(f"k={row['optimum_length']}", where, (4, 4), textcoords="offset points", fontsize=7)
        if str(length).isdecimal():
            axis.plot(rates, [_predicted(costs, int(length), float(a)) for a in rates], "-", color=colour)
        else:
            longest = max(map(int, costs["verify_cost"])) - 1
            best = [max(_predicted(costs, k, float(a)) for k in range(longest + 1)) for a in rates]
            axis.plot(rates, best, "--", color=colour)
    axis.axhline(1, color="#777777", linewidth=0.8)
    axis.set_xlim(0, 1)
    axis.set_ylim(bottom=0)
    axis.set_xlabel("acceptance (share of examined drafted tokens that stood)")
    axis.set_ylabel("times as fast as without drafts")
    title = "Points: measured; lines: the theory at these costs (dashed: best length); stars: its optimum"
    axis.set_title(title, fontsize=9)
    if groups:
        axis.legend(fontsize=8)


def _predicted(costs: Json, k: int, rate: float) -> float:
    """Times as fast as without drafts, at a row's costs, with k drafted tokens of which `rate` stand."""
    if k == 0:
        return 1.0
    verify = {int(m): c for m, c in costs["verify_cost"].items()}
    wide = at_rows(verify, next((m for m in sorted(verify) if m > k), max(verify)))
    share = costs["drafted_share"]
    cost = 1 - share + share * (k * costs["cost_ratio"] + wide)
    return float((1 + share * (speculation.expected_tokens(rate, k) - 1)) / cost)
