"""The half of an ablation that needs no device: what each rule set compiles to, set beside set (`tuning.static`)."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Sequence
from contextlib import closing
from typing import Any

from gpt2_tvm.measure.tables import markdown_table
from tuning.ablation_work import Job, schedule
from tuning.children import Announce, Call, jobs_at_once, run_each
from tuning.variants import Variant

Row = dict[str, Any]
# Of `tuning.static.summary`, with the heading of the Markdown table; hits and instructions have tables of their own.
COLUMNS = (
    ("launches_prefill", "launches a prefill"),
    ("launches_token", "launches a token"),
    ("bytes_token", "bytes a token"),
    ("registers_max", "most registers"),
    ("shared_max_bytes", "most shared B"),
    ("occupancy_min", "least occupancy"),
    ("spilling", "kernels that spill"),
    ("spill_max_bytes", "spill B"),
    ("token_loads", "launches a token by widest load"),
)
MOST_INSTRUCTIONS = 12
EACH_BYTES = 2 << 30  # of memory, that compiling a set takes


def compile_one(announce: Announce, job: Job, rules: str) -> Row:
    """`tuning.static.summary` of a set, and the bytes that a token moves; runs in a child."""
    lowered = schedule(announce, job, rules)
    announce("building")
    from tuning.static.rows import static_rows, summary

    names = job.choices(rules)
    found = static_rows(
        job.model,
        job.target,
        names[0],
        job.quantization,
        job.attention,
        progress=_progress(announce),
        passes=names[1],
    )
    return {**summary(found), "bytes_token": lowered["bytes_token"]}


def _progress(announce: Announce) -> Callable[[str, float], None]:
    return lambda what, share: announce(what)


def static_table(
    job: Job, variants: Sequence[Variant], timeout_s: float, say: Callable[[str, float], Any]
) -> list[Row]:
    """A row a set: set, rules, status, detail, and what `tuning.static.summary` says of it (not where it failed)."""
    distinct = list({tuple(variant.rules): variant for variant in reversed(variants)}.values())[::-1]
    jobs = jobs_at_once(EACH_BYTES)
    calls = [Call(variant.name, compile_one, (job, ",".join(variant.rules) or "baseline")) for variant in distinct]
    compiled: dict[tuple[str, ...], Row] = {}
    say(f"compiling {len(calls)} sets, {jobs} at a time", 0.01)
    with closing(run_each(calls, timeout_s, jobs)) as outcomes:
        for index, (variant, outcome) in enumerate(zip(distinct, outcomes, strict=True)):
            said = outcome.value if outcome.ok else {"status": outcome.status, "detail": outcome.detail}
            compiled[tuple(variant.rules)] = {"status": "ok", "detail": "", **said}
            say(f"compiled {variant.name}", 0.02 + 0.96 * (index + 1) / len(distinct))
    rows: list[Row] = [
        {"set": variant.name, "rules": list(variant.rules), **compiled[tuple(variant.rules)]} for variant in variants
    ]
    return rows


def render(rows: Sequence[Row], format_: str, title: str) -> str:
    """The rows as Markdown under a title, as CSV or JSON; text that ends in a newline."""
    if format_ == "json":
        return json.dumps({"rows": list(rows)}, indent=1) + "\n"
    if format_ == "csv":
        return _csv(rows)
    known = [(key, heading) for key, heading in COLUMNS if any(_cell(row.get(key)) for row in rows)]
    cells = [[row["set"], *(_cell(row.get(key)) for key, _ in known), row["status"]] for row in rows]
    text = f"{title}, compiled and not run.\n\n"
    text += markdown_table(["set", *(heading for _, heading in known), "result"], cells, 1)
    text += "".join(f"- {row['set']}: {row['status']}: {row['detail']}\n" for row in rows if row["detail"])
    compiled = [row for row in rows if row["status"] == "ok"]
    hits = list(dict.fromkeys(rule for row in compiled for rule in row["hits"]))
    text += "\nFunctions that each rule took.\n\n"
    text += markdown_table(
        ["set", *hits], [[r["set"], *(_cell(r["hits"].get(rule)) for rule in hits)] for r in compiled], 1
    )
    totals: dict[str, int] = {}
    for row in compiled:
        for name, count in row["instructions"].items():
            totals[name] = totals.get(name, 0) + count
    names = sorted(totals, key=lambda name: -totals[name])[:MOST_INSTRUCTIONS]
    text += "\nInstructions of all kernels, counted where they stand (loops are not multiplied out).\n\n"
    mix = [[r["set"], *(_cell(r["instructions"].get(name)) for name in names)] for r in compiled]
    return text + markdown_table(["set", *names], mix, 1)


def _cell(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{width} B: {launches}" for width, launches in value.items())
    if isinstance(value, list):
        return str(len(value))
    return "" if value is None else f"{value:.2g}" if isinstance(value, float) else str(value)


def _csv(rows: Sequence[Row]) -> str:
    out = io.StringIO()
    fields = list(dict.fromkeys(key for row in rows for key in row))
    writer = csv.DictWriter(out, fields, restval="", lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({k: json.dumps(v) if isinstance(v, dict | list) else v for k, v in row.items()})
    return out.getvalue()
