"""Results of several devices in one table and one chart: the study's cross-platform table."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gpt2_tvm.errors import UserError
from gpt2_tvm.measure.results import LATER_KEYS, ROW_KEYS, Row
from gpt2_tvm.measure.tables import engine_name, markdown_table, number, share, with_spread

_WORKLOAD = ("model", "quantization", "batch", "prompt_tokens", "generate_tokens")


def read_results(paths: Sequence[Path]) -> tuple[list[Row], list[str]]:
    """The rows of result files, and a line for each file whose run was not complete.

    Where two rows are of the same workload, device, target and engine, the newer one stays. Ordered by
    workload as first met, then by decode rate, fastest first. Raises UserError, naming the file, for one that
    is not a result.
    """
    newest: dict[tuple[Any, ...], Row] = {}
    notes = []
    for path in paths:
        result = _read(path)
        if not result.get("complete", True):
            notes.append(f"{path}: this run was not complete")
        for row in result["rows"]:
            key = (*workload(row), row["device"], row["target"], row["attention"], engine_name(row))
            if key not in newest or newest[key]["date"] <= row["date"]:
                newest[key] = {**dict.fromkeys(LATER_KEYS), **row}
    if not newest:
        raise UserError("no rows in these files; run the benchmark with --json FILE on each device first")
    order = {found: i for i, found in enumerate(dict.fromkeys(workload(row) for row in newest.values()))}
    rows = sorted(newest.values(), key=lambda row: (order[workload(row)], -row["decode_tok_s"]))
    return rows, notes


def workload(row: Row) -> tuple[Any, ...]:
    """What must be equal for two rows to be compared: model, weights, and sizes."""
    return tuple(row[key] for key in _WORKLOAD)


def _read(path: Path) -> dict[str, Any]:
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        rows = result["rows"]
        missing = [key for row in rows for key in ROW_KEYS if key not in row]
        if missing:
            raise KeyError(missing[0])
        for row in rows:
            for key in ("prefill_tok_s", "decode_tok_s", "prefill_tok_s_sd", "decode_tok_s_sd", "decode_gb_s"):
                float(row[key])
    except FileNotFoundError:
        raise UserError(f"there is no {path}; write it with --json {path} on the device") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(
            f"{path} is not a result of this benchmark; write it with --json FILE, and keep it as it is"
        ) from None
    return dict(result)


def cross_platform_table(rows: Sequence[Row]) -> str:
    """A Markdown table: for each workload one line a device and engine."""
    headings = ["model", "weights", "device", "target", "engine (rules)", "batch", "prompt", "generate"]
    headings += ["prefill tok/s", "decode tok/s", "GB/s", "of bound"]
    cells = [
        [
            *(str(row[key]) for key in ("model", "quantization", "device", "target")),
            engine_name(row),
            *(str(row[key]) for key in ("batch", "prompt_tokens", "generate_tokens")),
            *(with_spread(row, "prefill_tok_s"), with_spread(row, "decode_tok_s")),
            *(number(row["decode_gb_s"]), share(row)),
        ]
        for row in rows
    ]
    return markdown_table(headings, cells, left=5)


def draw(rows: Sequence[Row], path: Path) -> None:
    """A chart, written to `path` (its suffix says the format; PNG if none): two panels a workload, prefill
    and decode, a bar a device and engine with its standard deviation."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(workload(row), []).append(row)
    heights = [0.8 + 0.45 * len(group) for group in groups.values()]
    figure, axes = pyplot.subplots(
        len(groups),
        2,
        figsize=(11, sum(heights) + 0.4),
        squeeze=False,
        layout="constrained",
        gridspec_kw={"height_ratios": heights},
    )
    for line, (found, group) in zip(axes, groups.items(), strict=True):
        labels = [f"{row['device']}\n{engine_name(row)}" for row in group]
        for axis, key, what in zip(line, ("prefill_tok_s", "decode_tok_s"), ("prefill", "decode"), strict=True):
            values = [row[key] for row in group]
            colours = ["tab:gray" if row.get("peer") else "tab:blue" for row in group]
            bars = axis.barh(range(len(group)), values, xerr=[row[key + "_sd"] for row in group], color=colours)
            axis.bar_label(bars, [number(value) for value in values], padding=4, fontsize=8)
            axis.set_yticks(range(len(group)), labels if what == "prefill" else [""] * len(group), fontsize=8)
            axis.invert_yaxis()
            axis.margins(x=0.15)
            axis.set_xlim(left=0)
            axis.spines[["top", "right"]].set_visible(False)
            axis.set_xlabel(f"{what}, tokens/s", fontsize=9)
        model, weights, batch, prompt, generate = found
        line[0].set_title(f"{model} {weights}, batch {batch}, {prompt} + {generate} tokens", loc="left", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        figure.savefig(path, dpi=150, format=path.suffix[1:] or "png")
    except ValueError:
        kinds = ", ".join(sorted(figure.canvas.get_supported_filetypes()))
        raise UserError(f"--figure {path}: unknown format {path.suffix!r}; choose one of {kinds}") from None
    finally:
        pyplot.close(figure)
