"""The ladder as bars on a logarithmic scale: one panel a kernel, and two for the whole model."""

from __future__ import annotations

import io
from typing import Any

from ladder.report import Record, number
from ladder.steps import KERNEL_STEPS

# Okabe and Ito's palette, which colour-blind readers can tell apart; the shades differ in lightness too.
STEPS, SHIPPED, SMALLER, BOUND = "#56B4E9", "#0072B2", "#E69F00", "#000000"


def draw(record: Record) -> dict[str, bytes]:
    """The figure's files: {"png": …, "svg": …}; the same record gives the same bytes of SVG."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    panels = [_kernel_panel(case) for case in record["kernels"]["cases"]] if record.get("kernels") else []
    if record.get("model_ladder"):
        panels += [_model_panel(record["model_ladder"], what) for what in ("prefill", "decode")]
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    style: dict[Any, Any] = {"svg.hashsalt": "cpu-ladder", "font.size": 9, "axes.titlesize": 10, "svg.fonttype": "none"}
    with mpl.rc_context(style):
        figure, axes = plt.subplots(rows, columns, figsize=(5.4 * columns, 3.6 * rows), squeeze=False)
        flat = list(axes.flat)
        for axis, panel in zip(flat, panels, strict=False):
            _bars(axis, **panel)
        for axis in flat[len(panels) :]:
            axis.axis("off")
        files = {}
        meanings = {"a step": STEPS, "what ships": SHIPPED, "smaller weights": SMALLER}
        keys = [plt.Rectangle((0, 0), 1, 1, facecolor=colour, edgecolor="black") for colour in meanings.values()]
        figure.legend(keys, meanings, loc="lower right", frameon=False, ncols=len(keys))
        figure.suptitle(f"{record['model']} on {record['processor']}, {record['threads']} threads")
        figure.tight_layout()
        for kind, options in (("png", {"dpi": 150}), ("svg", {"metadata": {"Date": None}})):
            buffer = io.BytesIO()
            figure.savefig(buffer, format=kind, **options)
            files[kind] = buffer.getvalue()
        plt.close(figure)
    return files


def _kernel_panel(case: Record) -> dict[str, Any]:
    rows = case["steps"]
    # a float32 weight of four bytes serves one multiply-add, two operations, for each row of x
    read = case["read_gb_s"] * case["rows"] * 2 / 4
    return {
        "title": f"{case['name']}: {case['rows']} x {case['k']} x {case['n']}",
        "unit": f"GFLOP/s; line: {'reading float32 weights' if case['bound'] == 'read' else 'multiply-adds'}, measured",
        "labels": [KERNEL_STEPS[r["step"]].title for r in rows],
        "values": [r["gflop_s"] for r in rows],
        "spreads": [r["gflop_s_sd"] for r in rows],
        "colours": [STEPS if r["step"] < 6 else SHIPPED if r["step"] == 6 else SMALLER for r in rows],
        "bound": read if case["bound"] == "read" else case["fma_gflop_s"],
    }


def _model_panel(part: Record, what: str) -> dict[str, Any]:
    rows = part["steps"]
    size = part["prompt_tokens"] if what == "prefill" else part["generate_tokens"]
    plain = [r["quantization"] == "q0f32" and r["rules"] == "full" and r["attention"] == "flash" for r in rows]
    return {
        "title": f"whole model: {what} {size}",
        "unit": "tokens/s",
        "labels": [r["title"] for r in rows],
        "values": [r[f"{what}_tok_s"] for r in rows],
        "spreads": [r[f"{what}_tok_s_sd"] for r in rows],
        "colours": [
            SHIPPED if p else STEPS if r["quantization"] == "q0f32" else SMALLER
            for p, r in zip(plain, rows, strict=True)
        ],
        "bound": None,
    }


def _bars(
    axis: Any,
    title: str,
    unit: str,
    labels: list[str],
    values: list[float],
    spreads: list[float],
    colours: list[str],
    bound: float | None,
) -> None:
    places = range(len(values))
    left = min(values) / 2
    axis.barh(places, [v - left for v in values], left=left, color=colours, edgecolor="black", linewidth=0.5)
    axis.errorbar(values, places, xerr=spreads, fmt="none", ecolor="black", capsize=2, linewidth=0.8)
    axis.set_xscale("log")
    axis.set_xlim(left, max([*values, bound or 0]) * 3)
    for place, value, spread in zip(places, values, spreads, strict=True):
        white = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
        axis.text((value + spread) * 1.08, place, number(value), va="center", bbox=white)
    if bound is not None:
        axis.axvline(bound, color=BOUND, linestyle="--", linewidth=1)
    axis.set_yticks(list(places), labels)
    axis.invert_yaxis()
    axis.set_xlabel(unit)
    axis.set_title(title)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
