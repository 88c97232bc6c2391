"""A result as Markdown, CSV, JSON or JSON lines."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Sequence
from typing import Any

from gpt2_tvm.errors import UserError
from gpt2_tvm.measure.noise import BUSY_CORES
from gpt2_tvm.measure.results import LATER_KEYS, ROW_KEYS, Row

FORMATS = ("md", "csv", "json", "jsonl")


def check_format(name: str) -> str:
    """`name` if it is a format; UserError lists them otherwise."""
    if name not in FORMATS:
        raise UserError(f"unknown --format {name!r}; choose {', '.join(FORMATS)}")
    return name


def render(result: dict[str, Any], format_: str) -> str:
    """A result as text that ends in a newline. csv and jsonl carry the rows alone, md and json all of it."""
    if format_ == "json":
        return json.dumps(result, indent=1) + "\n"
    if format_ == "jsonl":
        return "".join(json.dumps(row) + "\n" for row in result["rows"])
    if format_ == "csv":
        return _csv(result["rows"])
    return _markdown(result)


def _csv(rows: Sequence[Row]) -> str:
    """One column a key, `peer` last and empty for our own rows; `versions` as JSON in its cell."""
    out = io.StringIO()
    writer = csv.DictWriter(
        out, [*ROW_KEYS, *LATER_KEYS, "peer"], restval="", extrasaction="ignore", lineterminator="\n"
    )
    writer.writeheader()
    for row in rows:
        writer.writerow({**row, "versions": json.dumps(row["versions"], sort_keys=True)})
    return out.getvalue()


def markdown_table(headings: Sequence[str], rows: Sequence[Sequence[str]], left: int = 0) -> str:
    """An aligned Markdown table; the first `left` columns are text, the others are set to the right."""
    cells = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    widths = [max(3, *(len(row[i]) for row in [list(headings), *cells])) for i in range(len(headings))]

    def line(row: Sequence[str]) -> str:
        padded = (c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        return f"| {' | '.join(padded)} |\n"

    rule = ["-" * w if i < left else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    return line(headings) + line(rule) + "".join(line(row) for row in cells)


def number(value: float | None, digits: int = 3) -> str:
    """At least `digits` significant digits, no exponent: 4419, 102.9 -> "4419", "103"; nothing for None."""
    if value is None:
        return ""
    decimals = digits - 1
    limit = 10.0
    while abs(value) >= limit and decimals > 0:
        decimals, limit = decimals - 1, limit * 10
    return f"{value:.{decimals}f}"


def with_spread(row: Row, key: str) -> str:
    """Median ± standard deviation."""
    return f"{number(row[key])} ± {number(row[key + '_sd'], 2)}"


def share(row: Row, key: str = "bound_share") -> str:
    """A share of a bound (of the bandwidth, by default) in per cent; nothing where there is none."""
    return "" if row.get(key) is None else f"{100 * row[key]:.0f} %"


def engine_name(row: Row) -> str:
    """Who ran: the peer, or our rules."""
    where = f" in {row['runner']}" if row.get("runner") else ""
    return str(row["peer"]) if row.get("peer") else f"gpt2-tvm{where} ({row['rules']})"


_COLUMNS: tuple[tuple[str, Callable[[Row], str]], ...] = (
    ("model", lambda r: r["model"]),
    ("target", lambda r: r["target"]),
    ("weights", lambda r: r["quantization"]),
    ("engine (rules)", engine_name),
    ("batch", lambda r: str(r["batch"])),
    ("prompt", lambda r: str(r["prompt_tokens"])),
    ("generate", lambda r: str(r["generate_tokens"])),
    ("prefill tok/s", lambda r: with_spread(r, "prefill_tok_s")),
    ("GFLOP/s", lambda r: number(r.get("prefill_gflop_s"))),
    ("of bound", lambda r: share(r, "bound_gflop_share")),
    ("first token ms", lambda r: number(r["ttft_ms"])),
    ("decode tok/s", lambda r: with_spread(r, "decode_tok_s")),
    ("GB/s", lambda r: number(r["decode_gb_s"])),
    ("of bound", share),
    ("peak MB", lambda r: f"{r['peak_rss_mb']:.0f}"),
)


def _markdown(result: dict[str, Any]) -> str:
    rows = result["rows"]
    if not rows:
        return "Nothing was measured.\n"
    text = markdown_table([name for name, _ in _COLUMNS], [[cell(r) for _, cell in _COLUMNS] for r in rows], 4)
    repeats = sorted({row["repeats"] for row in rows})
    threads = sorted({row["threads"] for row in rows if row.get("threads")})
    on = " and ".join(dict.fromkeys(str(row["device"]) for row in rows)) + (
        f", {' to '.join(map(str, threads))} threads" if threads else ""
    )
    text += f"\nMedian ± standard deviation of {' to '.join(map(str, repeats))} repeats on {on}.\n"
    for bound in result["bounds"]:
        what, unit, key = ("Bandwidth", "GB/s", "gb_s") if "gb_s" in bound else ("Arithmetic", "GFLOP/s", "gflop_s")
        spread = f" ± {number(bound[key + '_sd'], 2)}" if bound.get(key + "_sd") else ""
        text += f"{what} bound: {number(bound[key])}{spread} {unit} ({bound['source']}).\n"
    others = result["other_cores"]
    if others is not None and others > BUSY_CORES:
        text += f"Other programs kept {others:.1f} cores busy meanwhile: measure again on a quiet machine.\n"
    for found in result["comparisons"]:
        text += comparison_line(found) + "\n"
    return text


def comparison_line(found: dict[str, Any]) -> str:
    """A comparison in one line."""
    case = f"{found['batch']} x {found['prompt_tokens']} + {found['generate_tokens']} tokens"
    return (
        f"{found['model']} {found['quantization']} ({found['rules']}) over {found['peer']}, {case}: "
        f"prefill {found['prefill_ratio']:.2f} ± {found['prefill_ratio_sd']:.2f} times as fast, "
        f"decode {found['decode_ratio']:.2f} ± {found['decode_ratio_sd']:.2f}; "
        f"{found['same_tokens']} of {found['of_tokens']} greedy tokens agree"
    )
