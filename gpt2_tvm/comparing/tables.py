"""A comparison as Markdown, CSV or JSON."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Sequence
from typing import Any

from gpt2_tvm.errors import UserError
from gpt2_tvm.measure.noise import BUSY_CORES
from gpt2_tvm.measure.tables import markdown_table, number

Json = dict[str, Any]
FORMATS = ("md", "csv", "json")


def check_format(name: str) -> str:
    """`name` if it is a format; UserError lists them otherwise."""
    if name not in FORMATS:
        raise UserError(f"unknown --format {name!r}; choose {', '.join(FORMATS)}")
    return name


def render(result: Json, format_: str) -> str:
    """A result (`comparison.Comparison.result`) as text that ends in a newline; csv carries the rows alone."""
    if format_ == "json":
        return json.dumps(result, indent=1) + "\n"
    if format_ == "csv":
        out = io.StringIO()
        writer = csv.DictWriter(out, list(result["rows"][0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(result["rows"])
        return out.getvalue()
    return _markdown(result)


def labels(rows: Sequence[Json]) -> list[str]:
    """A name for each row's artifact: of model, scheme and target what is not the same for all."""
    keys = [key for key in ("model", "quantization", "target") if len({row[key] for row in rows}) > 1]
    names = [" ".join(row[key] for key in keys or ["quantization"]) for row in rows]
    of = {row["artifact"]: name for row, name in zip(rows, names, strict=True)}
    return names if len(set(of.values())) == len(of) else [row["artifact"] for row in rows]


def with_spread(row: Json, key: str) -> str:
    """Median ± standard deviation; nothing where it was not measured."""
    return "" if row[key] is None else f"{number(row[key])} ± {number(row[key + '_sd'], 2)}"


def change(row: Json) -> str:
    """The change of perplexity in per cent."""
    return "" if row["perplexity_change"] is None else f"{100 * row['perplexity_change']:+.2f} %"


_COLUMNS: tuple[tuple[str, Callable[[Json], str]], ...] = (
    ("batch", lambda r: str(r["batch"])),
    ("size MB", lambda r: number(r["size_mb"])),
    ("of first", lambda r: f"{100 * r['size_share']:.1f} %"),
    ("perplexity", lambda r: "" if r["perplexity"] is None else f"{r['perplexity']:.4f}"),
    ("change", change),
    ("peak MB", lambda r: "" if r["peak_rss_mb"] is None else f"{r['peak_rss_mb']:.0f}"),
    ("prefill tok/s", lambda r: with_spread(r, "prefill_tok_s")),
    ("decode tok/s", lambda r: with_spread(r, "decode_tok_s")),
    ("MB a step", lambda r: number(r["step_mb"])),
    ("decode by bytes", lambda r: f"{r['step_ratio']:.2f} x"),
    ("decode measured", lambda r: "" if r["decode_ratio"] is None else with_spread(r, "decode_ratio") + " x"),
    (
        "of bytes",
        lambda r: (
            ""
            if r["decode_ratio"] is None or r["first"]
            else f"{100 * (r['decode_ratio'] / r['step_ratio'] - 1):+.0f} %"
        ),
    ),
)


def _markdown(result: Json) -> str:
    first = result["rows"][0]
    rows = [
        {**row, "size_share": row["size_mb"] / first["size_mb"], "first": row["artifact"] == first["artifact"]}
        for row in result["rows"]
    ]
    columns = [c for c in _COLUMNS if result["text"] is not None or c[0] not in ("perplexity", "change")]
    cells = [[name, *(cell(row) for _, cell in columns)] for name, row in zip(labels(rows), rows, strict=True)]
    text = markdown_table(["artifact", *(name for name, _ in columns)], cells, 1)
    device = next((row["device"] for row in rows if row["device"]), None)
    repeats = max((row["repeats"] or 0 for row in rows), default=0)
    text += (
        f"\n{first['model']} on {first['target']}"
        + (f" ({device})" if device else "")
        + f": {first['prompt_tokens']} tokens of prompt, {first['generate_tokens']} decoded; median ± standard "
        f"deviation of {repeats} rounds in which each had its turn.\n"
    )
    if result["text"] is not None:
        text += (
            f"Perplexity of {result['text']}, {first['scored_tokens']:,} tokens.\n" if first["scored_tokens"] else ""
        )
    text += (
        'Peak memory is of a process that runs that batch alone. "By bytes" is how much less a decode step has to read '
        'than the first artifact\'s, "measured" how much faster it was, "of bytes" how far that is from it.\n'
    )
    others = result["other_cores"]
    if others is not None and others > BUSY_CORES:
        text += f"Other programs kept {others:.1f} cores busy meanwhile: measure again on a quiet machine.\n"
    return text
