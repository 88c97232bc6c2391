"""The record as tables, and the page and figure that are made of it.

docs/cpu-ladder.md marks each place with `<!-- ladder NAME -->` and `<!-- end -->`; `blocks` gives what stands there.
"""

from __future__ import annotations

import re
from typing import Any

from ladder.steps import KERNEL_STEPS

Record = dict[str, Any]
BLOCK = re.compile(r"<!-- ladder (?P<name>[\w.-]+) -->\n.*?<!-- end -->", re.DOTALL)
FIGURE = "../artifacts/figures/cpu-ladder.svg"  # from the page
NOT_THERE = "_Not in the record yet._"


def number(value: float, digits: int = 3) -> str:
    """`value` with so many significant digits, without exponents: 0.0123, 1.23, 12.3, 123, 12,300."""
    if value == 0:
        return "0"
    rounded = float(f"{value:.{digits}g}")
    places = max(0, digits - len(str(int(abs(rounded)))) if abs(rounded) >= 1 else digits + 1)
    return f"{rounded:,.{places}f}".rstrip("0").rstrip(".") if places > digits else f"{rounded:,.{places}f}"


def with_spread(row: Record, key: str) -> str:
    """ "12.3 ± 0.4"; no spread where it, or the step it is compared with, had a single round."""
    if not row[f"{key}_sd"]:
        return number(row[key])
    return f"{number(row[key])} ± {number(row[f'{key}_sd'], 2)}"


def table(head: list[str], rows: list[list[str]], text_columns: int = 1) -> str:
    """A Markdown table, its columns aligned in the text too; the first `text_columns` to the left."""
    widths = [max(len(line[i]) for line in [head, *rows]) for i in range(len(head))]

    def line(cells: list[str]) -> str:
        padded = [
            c.ljust(w) if i < text_columns else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))
        ]
        return f"| {' | '.join(padded)} |"

    rule = [("-" * w) if i < text_columns else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    return "\n".join([line(head), line(rule), *map(line, rows)])


def loop_text(loop: Record) -> str:
    """The hottest loop in words: "16 FMA x 512 bits, 24 loads, chain 8"."""
    if not loop["fma"]:
        return f"{loop['instructions']} instructions, no FMA"
    parts = [f"{loop['fma']} FMA x {loop['vector_bits']} bits", f"{loop['loads']} loads"]
    parts += [f"{loop[key]} {key}" for key in ("converts", "stack") if loop[key] > (key == "stack")]
    return ", ".join([*parts, f"chain {loop['chain']}"])


def machine(record: Record) -> str:
    """What was measured, where and when, and the bounds."""
    tvm = record["versions"]["apache-tvm"]
    lines = [f"{record['processor']}, {record['threads']} threads, {record['model']}; apache-tvm {tvm}."]
    for key, name in (("kernels", "Kernels"), ("model_ladder", "Model")):
        part = record.get(key)
        if not part:
            continue
        source = part["cases"][0] if key == "kernels" else part
        busy = part["other_cores"]
        quiet = "" if busy is None else f" Other programs kept {number(busy, 2)} cores busy meanwhile."
        lines.append(
            f"{name}, {part['date'][:10]}: the bounds were {with_spread(source, 'read_gb_s')} GB/s read and "
            f"{with_spread(source, 'fma_gflop_s')} GFLOP/s of multiply-adds.{quiet}"
        )
    return "\n".join(lines)


def rate(case: Record) -> tuple[str, str]:
    """(key, unit) of the rate that a case's bound limits."""
    return ("gb_s", "GB/s") if case["bound"] == "read" else ("gflop_s", "GFLOP/s")


def kernel_table(case: Record) -> str:
    """All steps of one case."""
    key, unit = rate(case)
    rows = []
    for row in case["steps"]:
        title = f"{row['step']} {KERNEL_STEPS[row['step']].title}"
        figures = [with_spread(row, "time_us"), number(row[key]), f"{row['bound_share']:.0%}"]
        gain = "" if row["step"] == 0 else with_spread(row, "gain")
        rows.append([title, *figures, gain, number(row["total_gain"]), loop_text(row["loop"])])
    head = ["step", "µs", unit, "of bound", "gain", "in all", "hottest loop, one iteration"]
    return table(head, rows)


def step_table(record: Record, step: int) -> str:
    """One step in every case: before, after, and what the loop became."""
    rows = []
    for case in record["kernels"]["cases"]:
        key, unit = rate(case)
        at = {row["step"]: row for row in case["steps"]}
        row, past = at[step], at.get(step - 1)
        before = f"{number(past['time_us'])} µs" if past else ""
        after = f"{number(row['time_us'])} µs, {number(row[key])} {unit}"
        rows.append([case["name"], before, after, with_spread(row, "gain") if past else "", loop_text(row["loop"])])
    return table(["", "before", "after", "gain", "hottest loop, one iteration"], rows)


def model_table(part: Record) -> str:
    """All ways to compile the whole model."""
    rows = []
    for row in part["steps"]:
        cells = [row["title"]]
        for what in ("prefill", "decode"):
            cells += [with_spread(row, f"{what}_tok_s"), f"{row[f'{what}_share']:.0%}"]
            cells += [with_spread(row, f"{what}_gain") if row["step"] else "", number(row[f"{what}_total_gain"])]
        rows.append([*cells, f"{row['error']:.0e}" if row["error"] else ""])
    head = [
        "",
        "prefill tok/s",
        "of bound",
        "gain",
        "in all",
        "decode tok/s",
        "of bound",
        "gain",
        "in all",
        "logits off",
    ]
    return table(head, rows)


def blocks(record: Record) -> dict[str, str]:
    """What stands at each mark of the page, by its name.

    record: the ladder's, with the profile's under "profile" and what callgrind counted under "counted", if there are.
    """
    from ladder import profile_report

    made: dict[str, str] = {}
    if record.get("versions"):
        made["machine"] = machine(record)
        made["figure"] = f"![The ladder as bars]({FIGURE})"
    for case in record.get("kernels", {}).get("cases", []):
        made[f"kernel-{case['name'].replace(' ', '-')}"] = kernel_table(case)
    if record.get("kernels"):
        made |= {f"step-{step.number}": step_table(record, step.number) for step in KERNEL_STEPS}
    if record.get("model_ladder"):
        made["model"] = model_table(record["model_ladder"])
    if profile := record.get("profile"):
        made["ports"] = profile_report.ports_text(profile)
        for what in ("decode", "prefill"):
            tables = (profile_report.time_table(profile[what]), profile_report.bound_table(profile[what]))
            made[f"profile-{what}"] = "\n\n".join((profile_report.title(profile, what), *tables))
    if counted := record.get("counted"):
        made["executed"] = profile_report.executed_table(counted["executed"])
    return made


def render(text: str, record: Record) -> str:
    """The page with every marked block as the record has it."""
    made = blocks(record)

    def block(match: re.Match[str]) -> str:
        name = match["name"]
        return f"<!-- ladder {name} -->\n{made.get(name, NOT_THERE)}\n<!-- end -->"

    return BLOCK.sub(block, text)
