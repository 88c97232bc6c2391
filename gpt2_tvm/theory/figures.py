"""The report drawn: a roofline for each size with every function of the module on it, measured points, and the gain of
speculation.

Colours are Okabe and Ito's, which colour-blind readers can tell apart; shapes tell the same again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gpt2_tvm.errors import UserError
from gpt2_tvm.theory.tables import milliseconds

Json = dict[str, Any]
BLUE, ORANGE, GREEN, PURPLE, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#777777"
PHASES = {"decode": (BLUE, "o"), "prefill": (ORANGE, "s")}
MEASURED = {"decode": (BLUE, "o"), "prefill": (ORANGE, "s"), "function": (GREEN, "^")}
PANEL = (6.6, 4.6)  # inches
LETTER = (5.2, 10.5)  # points: width and height of a letter in a label
PER_LINE = 4  # numbers in a line of a label
NEAR = 9.0  # points: marks that are closer share a label
MOST_NAMED = 12  # measured functions; more of them stand without their names
LOWEST = 1 / 4096  # FLOP a byte: what only moves data stands at the left edge


def check_figure(path: Path) -> None:
    """Refuse a suffix that cannot be drawn before anything is computed."""
    kinds = ("png", "svg", "pdf")
    if path.suffix[1:].lower() not in kinds:
        raise UserError(f"--figure {path}: unknown format {path.suffix!r}; choose one of {', '.join(kinds)}")


def draw(report: Json, path: Path) -> None:
    """Write the figure to `path`; its suffix says the format."""
    from matplotlib import pyplot

    from gpt2_tvm.files import replacing_file

    figure = make_figure(report)
    try:
        with replacing_file(path) as file:
            figure.savefig(file, dpi=130, format=path.suffix[1:].lower())
    finally:
        pyplot.close(figure)


def make_figure(report: Json) -> Any:
    """The matplotlib figure of a report: a panel for each batch and length, then measured points and speculation."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    sizes = list(dict.fromkeys((c["batch"], c["seq"]) for c in report["cases"]))
    panels: list[tuple[str, Any]] = [("roof", size) for size in sizes]
    panels += [("measured", None)] if report["measured"] else []
    panels += [("speculation", None)] if report["speculation"] else []
    columns = min(2, len(panels))
    lines = -(-len(panels) // columns)
    legend = 1.5  # inches on the right, for the functions' numbers
    figure, axes = pyplot.subplots(
        lines,
        columns,
        figsize=(PANEL[0] * columns + legend, PANEL[1] * lines + 0.8),
        squeeze=False,
    )
    width, height = figure.get_size_inches()
    figure.subplots_adjust(
        left=0.8 / width,
        right=1 - (legend + 0.35) / width,
        bottom=0.65 / height,
        top=1 - 1.05 / height,
        wspace=0.2,
        hspace=0.34,
    )
    labels = _labels(report)
    for axis, (kind, size) in zip(axes.flat, panels, strict=False):
        if kind == "roof":
            _roofline(axis, report, size, labels)
        elif kind == "measured":
            _measured(axis, report)
        else:
            _speculation(axis, report)
    for axis in list(axes.flat)[len(panels) :]:
        axis.remove()
    _headings(figure, report, labels, legend)
    return figure


def _headings(figure: Any, report: Json, labels: dict[str, int], legend: float) -> None:
    """The title, and what the numbers and shapes mean."""
    from matplotlib.lines import Line2D

    width, height = figure.get_size_inches()
    device, dtypes = report["device"], report["dtypes"]
    figure.text(
        0.8 / width,
        1 - 0.3 / height,
        f"{report['model']} on {device['description']}: "
        f"{device['bandwidth_gb_s']:.4g} GB/s, {device['tflops']:.3g} TFLOP/s",
        fontsize=13,
    )
    figure.text(
        0.8 / width,
        1 - 0.55 / height,
        f"weights {', '.join([dtypes['weights'], *(f'float {table}' for table in report['float_tables'])])}, "
        f"activations {dtypes['activations']}, cache {dtypes['cache']}; "
        f"{report['attention']} attention; each function stands at its bound, on the roof",
        fontsize=9.5,
        color="#444444",
    )
    if not labels:
        return
    shapes = [
        Line2D(
            [],
            [],
            color=colour,
            marker=marker,
            linestyle="",
            markersize=8 if phase == "decode" else 5,
            markerfacecolor="none" if phase == "decode" else colour,
            markeredgewidth=1.5 if phase == "decode" else 0,
            label=phase,
        )
        for phase, (colour, marker) in PHASES.items()
    ]
    numbers = [Line2D([], [], linestyle="", label=f"{i:>2}  {label}") for label, i in labels.items()]
    figure.legend(
        handles=[*shapes, *numbers],
        loc="upper left",
        bbox_to_anchor=(1 - (legend + 0.3) / width, 1 - 0.95 / height),
        frameon=False,
        fontsize=9,
        handlelength=0.8,
        labelspacing=0.5,
    )


def _labels(report: Json) -> dict[str, int]:
    """A number for each function of the module, the same in all panels."""
    found: dict[str, int] = {}
    for case in report["cases"]:
        if case["phase"] in PHASES:
            for function in case.get("module", {}).get("functions", []):
                found.setdefault(function["label"], len(found) + 1)
    return found


def _roof(axis: Any, device: Json, lowest: float, highest: float) -> None:
    """The roof, its ridge and the scale."""
    rate, bandwidth, ridge = device["tflops"], device["bandwidth_gb_s"] / 1e3, device["ridge_flop_per_byte"]
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlim(lowest, highest)
    axis.plot([lowest, ridge, highest], [lowest * bandwidth, rate, rate], color="black", linewidth=1.4, zorder=2)
    axis.axvline(ridge, color=GREY, linewidth=0.8, linestyle=":", zorder=1)
    axis.annotate(
        f"{ridge:.3g} FLOP/byte",
        (ridge, 0),
        xycoords=("data", "axes fraction"),
        xytext=(4, 5),
        textcoords="offset points",
        fontsize=8,
        color="#444444",
    )
    if device["fp32_tflops"]:
        axis.plot(
            [device["fp32_tflops"] / bandwidth, highest],
            [device["fp32_tflops"]] * 2,
            color=GREY,
            linewidth=1,
            linestyle="--",
            zorder=1,
        )
        axis.annotate(
            "float32, without matrix units",
            (highest, device["fp32_tflops"]),
            xytext=(-4, -3),
            textcoords="offset points",
            ha="right",
            va="top",
            fontsize=8,
            color="#444444",
        )
    axis.set_xlabel("FLOP a byte", fontsize=9)
    axis.set_ylabel("TFLOP/s", fontsize=9)
    axis.tick_params(labelsize=8.5)
    axis.spines[["top", "right"]].set_visible(False)


def _roofline(axis: Any, report: Json, size: tuple[int, int], labels: dict[str, int]) -> None:
    """One batch and length: the functions of decode and prefill; without a count, the closed form's parts."""
    device = report["device"]
    cases = [c for c in report["cases"] if (c["batch"], c["seq"]) == size and c["phase"] in PHASES]
    cases = [c for c in cases if c["attention"] == report["attention"]]
    marks: list[tuple[float, str, str]] = []  # (intensity, phase, tag)
    for case in cases:
        functions = case.get("module", {}).get("functions")
        if functions:
            marks += list(dict.fromkeys((f["intensity"], case["phase"], str(labels[f["label"]])) for f in functions))
        else:
            marks += [(row["intensity"], case["phase"], part) for part, row in case["parts"].items()]
    still = sorted({tag for x, _, tag in marks if x < LOWEST}, key=lambda tag: (len(tag), tag))
    marks = [mark for mark in marks if mark[0] >= LOWEST]
    lowest = min([0.2, *(x / 2 for x, _, _ in marks)])
    highest = max([4 * device["ridge_flop_per_byte"], *(2 * x for x, _, _ in marks)])
    _roof(axis, device, lowest, highest)
    bandwidth = device["bandwidth_gb_s"] / 1e3
    axis.set_ylim(lowest * bandwidth / 6, device["tflops"] * 5)
    for phase, (colour, marker) in PHASES.items():
        xs = [x for x, p, _ in marks if p == phase]
        ys = [min(device["tflops"], x * bandwidth) for x in xs]
        if phase == "decode":  # a ring, which a square on the same place leaves visible
            axis.scatter(xs, ys, facecolors="none", edgecolors=colour, marker=marker, s=64, linewidths=1.5, zorder=4)
        else:
            axis.scatter(xs, ys, color=colour, marker=marker, s=22, zorder=5)
    _tags(axis, marks, device)
    times = "; ".join(f"{c['phase']} {milliseconds(c['parts']['whole']['time_ms'])} ms" for c in cases)
    axis.set_title(f"batch {size[0]}, {size[1]} tokens: {times}", fontsize=10, loc="left")
    if still:
        axis.annotate(
            f"no arithmetic: {', '.join(still)}",
            (0, 0),
            xycoords="axes fraction",
            xytext=(5, 5),
            textcoords="offset points",
            fontsize=8,
            color="#444444",
        )


def _tags(axis: Any, marks: Sequence[tuple[float, str, str]], device: Json) -> None:
    """The numbers of the marks: decode's beneath the roof, prefill's above it. Marks that touch share a label, and a
    label moves away from the roof until it covers no other.
    """
    axis.figure.canvas.draw()
    scale = 72 / axis.figure.dpi
    bandwidth = device["bandwidth_gb_s"] / 1e3
    taken: list[tuple[float, float, float, float]] = []  # centre, width and height of each label, in points
    for phase, (colour, _) in PHASES.items():
        up = phase == "prefill"
        for cluster in _clusters(axis, [(x, tag) for x, p, tag in marks if p == phase], scale):
            x = cluster[len(cluster) // 2][0]
            y = min(device["tflops"], x * bandwidth)
            px, py = (float(v) * scale for v in axis.transData.transform((x, y)))
            tags = [tag for _, tag in cluster]
            lines = [" ".join(tags[i : i + PER_LINE]) for i in range(0, len(tags), PER_LINE)]
            width, height = LETTER[0] * max(map(len, lines)) + 4, LETTER[1] * len(lines)
            aside = -width / 2 if up and x < device["ridge_flop_per_byte"] else 0.0  # left of the slope, over the flat
            away = 8 + height / 2
            while any(
                abs(px + aside - ox) < (width + w) / 2 and abs(py + (away if up else -away) - oy) < (height + h) / 2
                for ox, oy, w, h in taken
            ):
                away += 3.0
            shift = away if up else -away
            taken.append((px + aside, py + shift, width, height))
            axis.annotate(
                "\n".join(lines),
                (x, y),
                xytext=(aside, shift),
                textcoords="offset points",
                ha="center",
                va="center",
                fontsize=8.5,
                color=colour,
                linespacing=1.1,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.4},
                arrowprops={"arrowstyle": "-", "color": "#bbbbbb", "linewidth": 0.6}
                if away > 14 + height / 2
                else None,
                zorder=3,
            )


def _clusters(axis: Any, marks: list[tuple[float, str]], scale: float) -> list[list[tuple[float, str]]]:
    """Marks (intensity, tag) in groups of those that stand closer than `NEAR` points."""
    groups: list[list[tuple[float, str]]] = []
    for x, tag in sorted(marks):
        if groups:
            ends = axis.transData.transform([(groups[-1][-1][0], 1), (x, 1)])[:, 0] * scale
            if ends[1] - ends[0] < NEAR:
                groups[-1].append((x, tag))
                continue
        groups.append([(x, tag)])
    return [sorted(group, key=lambda mark: (len(mark[1]), mark[1])) for group in groups]


def _measured(axis: Any, report: Json) -> None:
    """What was measured, under the roof."""
    device, points = report["device"], report["measured"]
    bandwidth = device["bandwidth_gb_s"] / 1e3
    at = [(p["flops"] / p["bytes"], p["flops"] / p["time_ms"] / 1e9) for p in points]
    drawn = [(p, x, y) for p, (x, y) in zip(points, at, strict=True) if x >= LOWEST]
    lowest = min([0.2, *(x / 2 for _, x, _ in drawn)])
    highest = max([4 * device["ridge_flop_per_byte"], *(2 * x for _, x, _ in drawn)])
    _roof(axis, device, lowest, highest)
    axis.set_ylim(
        min([lowest * bandwidth / 4, *(y / 4 for _, _, y in drawn)]),
        2.2 * max([device["tflops"], *(y for *_, y in drawn)]),
    )
    for kind, (colour, marker) in MEASURED.items():
        mine = [(x, y) for p, x, y in drawn if p["kind"] == kind]
        if mine:
            axis.scatter(*zip(*mine, strict=True), color=colour, marker=marker, s=34, label=kind, zorder=4)
    axis.figure.canvas.draw()
    scale = 72 / axis.figure.dpi
    taken: list[tuple[float, float, float, float]] = []
    for p, x, y in sorted(drawn, key=lambda point: -point[2]):
        if p["kind"] == "function" and len(drawn) > MOST_NAMED:
            continue
        right = math.log(x / lowest) > 0.6 * math.log(highest / lowest)
        who = p["who"].partition(" on ")[0]
        text = f"{p['label']}{', ' if who else ''}{who}: {p['share']:.0%}"
        px, py = (float(v) * scale for v in axis.transData.transform((x, y)))
        width, aside, down = LETTER[0] * len(text), -7 if right else 7, 0.0
        middle = px + aside + (-width if right else width) / 2
        while any(
            abs(middle - ox) < (width + w) / 2 and abs(py - down - oy) < (LETTER[1] + 1 + h) / 2
            for ox, oy, w, h in taken
        ):
            down += 2.0
        taken.append((middle, py - down, width, LETTER[1] + 1))
        axis.annotate(
            text,
            (x, y),
            xytext=(aside, -down),
            textcoords="offset points",
            ha="right" if right else "left",
            va="center",
            fontsize=8,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6},
            zorder=3,
        )
    axis.legend(frameon=False, fontsize=8.5, loc="upper left")
    axis.set_title("measured, and its share of the roof", fontsize=10, loc="left")


def _speculation(axis: Any, report: Json) -> None:
    """Speed-up by draft length: by Theorem 3.8, and with the roofline's times."""
    found = report["speculation"]
    colours = dict(zip(dict.fromkeys(b["decoding"] for b in found["best"]), (BLUE, ORANGE), strict=False))
    for row in found["best"]:
        theorem = row["by"].startswith("theorem")
        colour = colours[row["decoding"]]
        axis.plot(
            range(len(row["curve"])),
            row["curve"],
            color=colour,
            linestyle="-" if theorem else "--",
            marker="o" if theorem else None,
            markersize=4,
            label=f"{row['decoding']}, {row['agreement']:.0%}, {row['by']}: {row['speedup']:.2f} x with {row['k']}",
        )
        if theorem and row["k"] < len(row["curve"]):
            axis.scatter(row["k"], row["speedup"], s=90, facecolors="none", edgecolors=colour, linewidths=1.5, zorder=4)
    axis.axhline(1, color=GREY, linewidth=0.8, linestyle=":")
    highest = max(max(row["curve"]) for row in found["best"])
    axis.set_ylim(0, 1.18 * highest)
    axis.set_xlabel("draft tokens", fontsize=9)
    axis.set_ylabel("times as fast", fontsize=9)
    axis.tick_params(labelsize=8.5)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8.5, loc="lower left")
    axis.set_title(
        f"speculation, drafted by {found['draft']}, cost ratio {found['cost_ratio']:.3f}", fontsize=10, loc="left"
    )
