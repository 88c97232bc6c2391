"""The profile's record as tables, for the terminal and for the page."""

from __future__ import annotations

from typing import Any

from ladder.report import loop_text, number, table

UNITS = ("memory", "multiply-adds", "loads", "conversions", "chain")


def title(record: dict[str, Any], what: str) -> str:
    """What was timed, and how long it took."""
    part = record[what]
    work = "A decode step" if what == "decode" else f"A prefill of {record['prompt_tokens']} tokens"
    text = f"{work} took {number(part['time_us'])} µs, and {number(part['instrumented_us'])} µs with every call timed"
    return f"{text} ({record['model']}, {record['quantization']}, target {record['target']})."


def time_table(part: dict[str, Any]) -> str:
    """Which functions take the time."""
    rows = []
    for row in part["functions"]:
        share = f"{row['time_us'] / part['instrumented_us']:.0%}"
        rates = [number(row["gb_s"]), number(row["gflop_s"])]
        rows.append([row["role"], row["rule"], f"{row['calls']:g}", number(row["time_us"]), share, *rates])
    return table(["function", "rule", "calls", "µs", "share", "GB/s", "GFLOP/s"], rows, text_columns=2)


def bound_table(part: dict[str, Any]) -> str:
    """What each unit would need alone, in µs, and the largest of these as a share of the time."""
    rows = []
    for row in part["functions"]:
        alone = [number(row["alone_us"][unit]) if row["alone_us"].get(unit) else "–" for unit in UNITS]
        bound = f"{row['bound']}, {row['bound_share']:.0%}"
        rows.append([row["role"], number(row["time_us"]), *alone, bound, loop_text(row["loop"])])
    head = ["function", "µs", "memory", "FMA", "loads", "converts", "chain", "bound", "hottest loop, one iteration"]
    return table(head, rows)


def executed_table(executed: dict[str, Any]) -> str:
    """Instructions that valgrind counted, and the share of them that is in the hottest loop."""
    rows = [
        [what, row["role"], number(row["instructions"] / 1e6), f"{row['loop_share']:.0%}"]
        for what, part in executed.items()
        for row in part
    ]
    return table(["", "function", "million instructions", "in the hottest loop"], rows, text_columns=2)


def ports_text(record: dict[str, Any]) -> str:
    """What the units can do, as measured."""
    p = record["ports"]
    converts = ", ".join(f"{number(rate / 1e9)} from {dtype}" for dtype, rate in p["converts"].items())
    return (
        f"Measured on {record['processor']}, {record['threads']} threads: memory {number(p['read_gb_s'])} GB/s; "
        f"multiply-adds {number(p['fma_gflop_s'])} GFLOP/s; 10⁹ a second of vectors loaded from L1 "
        f"{number(p['loads'] / 1e9)}, of conversions {converts}; a multiply-add answers after "
        f"{number(p['latency_ns'])} ns."
    )


def profile_text(record: dict[str, Any]) -> str:
    """Everything in the record."""
    parts = [ports_text(record)]
    for what in ("decode", "prefill"):
        parts += [title(record, what), time_table(record[what]), bound_table(record[what])]
    if "executed" in record:
        parts.append(executed_table(record["executed"]))
    return "\n\n".join(parts)
