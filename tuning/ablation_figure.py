"""The figure of an ablation: the speedup of every set, prefill beside decode, on a logarithmic axis."""

from __future__ import annotations

from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

from gpt2_tvm.errors import UserError
from gpt2_tvm.files import replacing_file
from tuning.ablation_results import PHASES, UNMEASURED

# Okabe and Ito's palette, told apart with every common colour blindness, and in grey by its lightness
COLOURS = {"prefill": "#0072B2", "decode": "#E69F00"}
FAILED = "#D9D9D9"
SUFFIXES = (".png", ".svg")


def files_of(path: Path) -> tuple[Path, Path]:
    """FILE.png and FILE.svg for FILE, FILE.png or FILE.svg. UserError for another ending."""
    if path.suffix and path.suffix not in SUFFIXES:
        raise UserError(f"--figure {path}: a PNG and an SVG are written; end the name in .png or .svg")
    return path.with_suffix(".png"), path.with_suffix(".svg")


def draw(result: Mapping[str, Any], path: Path) -> tuple[Path, Path]:
    """Draw `result` into two files, PNG and SVG; returns their names. Error bars are standard deviations.

    Where baseline has no rate the bars are tokens a second. Sets without a rate are hatched and say why. UserError
    where nothing has a rate.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    png, svg = files_of(path)
    rows = [row for row in result["rows"] if row["status"] != UNMEASURED]
    key = "speedup" if result["baseline"] else "tok_s"
    if all(row[f"{phase}_{key}"] is None for row in rows for phase in PHASES):
        raise UserError(f"--figure {path}: no set has a rate to draw")
    identity = result["identity"]
    figure = Figure(figsize=(11, 1.6 + 0.27 * len(rows)), layout="constrained")
    for index, phase in enumerate(PHASES):
        axes = figure.add_subplot(1, 2, 1 + index)
        values = [row[f"{phase}_{key}"] for row in rows]
        known = [
            (value, row[f"{phase}_{key}_sd"]) for value, row in zip(values, rows, strict=True) if value is not None
        ]
        low, high = min(value - min(sd, 0.9 * value) for value, sd in known), max(value + sd for value, sd in known)
        high = max(high, 1.6 * low)
        left = 10 ** (-0.05) * min(low, 1.0 if key == "speedup" else low)
        if key == "speedup" and min(value for value, _ in known) < 1:
            left *= (high / left) ** -0.15  # for the figures of bars that go to the left
        right = high * max(1.15, (high / left) ** 0.22)  # room for the figures at the bars' ends
        for y, row in enumerate(rows):
            value, sd = row[f"{phase}_{key}"], row[f"{phase}_{key}_sd"]
            if value is None:
                axes.barh(y, right - left, left=left, height=0.7, color="white", edgecolor=FAILED, hatch="////")
                axes.text(left * (right / left) ** 0.02, y, row["status"], va="center", fontsize=8, backgroundcolor="w")
                continue
            start = 1.0 if key == "speedup" else left  # on a logarithmic axis a bar means something from 1 on
            axes.barh(y, value - start, left=start, height=0.7, color=COLOURS[phase])
            axes.errorbar(value, y, xerr=min(sd, 0.9 * value), color="black", capsize=2, linewidth=1)
            text = f"{value:.3g}" if key == "speedup" else f"{value:.0f}"
            gap = (right / left) ** 0.015
            if value < start:  # its bar goes to the left
                axes.text(max(value - sd, 0.1 * value) / gap, y, text, va="center", ha="right", fontsize=8)
            else:
                axes.text((value + sd) * gap, y, text, va="center", fontsize=8)
        axes.set_xscale("log")
        axes.set_xlim(left, max(right, left * 1.5))
        axes.xaxis.set_major_locator(
            LogLocator(subs=(1,) if high / left >= 50 else (1, 2, 5) if high / left > 10 else (1, 1.5, 2, 3, 5, 7))
        )
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        if key == "speedup":
            axes.axvline(1, color="black", linewidth=0.8)
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.set_yticks(range(len(rows)), [row["set"] if index == 0 else "" for row in rows], fontsize=8)
        what = "times baseline" if key == "speedup" else "tokens a second"
        axes.set_xlabel(f"{phase}, {what}")
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(
        f"{identity['model']} {identity['quantization']}, {identity['target']}, {identity['attention']} attention, "
        f"{identity['prompt_tokens']} + {identity['generate_tokens']} tokens, {identity['device']}",
        fontsize=10,
    )
    with matplotlib.rc_context({"svg.hashsalt": "gpt2-tvm", "svg.fonttype": "none"}):
        for file in (png, svg):
            held = BytesIO()
            metadata = {"Date": None} if file.suffix == ".svg" else {"Software": None}
            figure.savefig(held, format=file.suffix[1:], dpi=150, metadata=metadata)
            with replacing_file(file) as out:
                out.write(held.getvalue())
    return png, svg
