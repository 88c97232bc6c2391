"""The result of an ablation as Markdown, CSV or JSON."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

from gpt2_tvm.errors import UserError
from gpt2_tvm.measure.tables import markdown_table, number
from tuning.ablation_results import PHASES, ROW_KEYS, Row, moved

FORMATS = ("md", "csv", "json")


def check_format(name: str) -> str:
    """`name` if it is a format; UserError lists them otherwise."""
    if name not in FORMATS:
        raise UserError(f"unknown --format {name!r}; choose {', '.join(FORMATS)}")
    return name


def render(result: Mapping[str, Any], format_: str, compare: tuple[str, str] | None = None) -> str:
    """A result as text that ends in a newline; csv carries the rows alone. `compare`: two sets whose functions are set
    side by side (md)."""
    if format_ == "json":
        return json.dumps(result, indent=1, ensure_ascii=False) + "\n"
    if format_ == "csv":
        return _csv(result["rows"])
    parts = [_rates(result), _hits(result["rows"])]
    if result["effects"]:
        parts.append(_effects(result["effects"]))
    if compare:
        parts.append(_moved(result, *compare))
    return "\n".join(parts)


def _csv(rows: list[Row]) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, ROW_KEYS, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        flat = {**row, "rules": "+".join(row["rules"])}
        writer.writerow({k: json.dumps(v, sort_keys=True) if isinstance(v, dict) else v for k, v in flat.items()})
    return out.getvalue()


def plus_minus(value: float | None, sd: float | None, unit: str = "") -> str:
    """ "17.3 ± 0.2": the spread with as many decimals as the value; nothing for None."""
    if value is None:
        return ""
    text = number(value)
    decimals = len(text.partition(".")[2])
    return f"{text}{unit}" if sd is None else f"{text}{unit} ± {sd:.{decimals}f}"


def _rules(row: Row) -> str:
    return " ".join(rule for rule in row["rules"] if rule != "fallback") or "none"


def _rates(result: Mapping[str, Any]) -> str:
    """The study's table: one row a set."""
    identity, rows = result["identity"], result["rows"]
    what = "passes" if identity.get("toggles") == "passes" else "rules"
    headings = ["set", what, "prefill tok/s", "speedup", "decode tok/s", "speedup", "repeats", "result"]
    counted = any(row.get("launches_token") is not None for row in rows)
    kind = "Graph passes" if what == "passes" else "Schedule rules"
    headings[6:6] = ["launches a token", "MB a token"] if counted else []
    table = []
    for row in rows:
        cells = [row["set"], _rules(row)]
        for phase in PHASES:
            cells.append(plus_minus(row[f"{phase}_tok_s"], row[f"{phase}_tok_s_sd"]))
            cells.append(plus_minus(row[f"{phase}_speedup"], row[f"{phase}_speedup_sd"]))
        shared = row["status"] == "ok" and row["same_code_as"]
        verdict = f"same code as {row['same_code_as']}" if shared else row["status"]
        if counted:
            count, nbytes = row.get("launches_token"), row.get("bytes_token")
            cells += ["" if count is None else str(count), "" if nbytes is None else number(nbytes / 1e6)]
        table.append([*cells, str(row["repeats"] or ""), verdict])
    text = (
        f"{kind} of {identity['model']} {identity['quantization']} for {identity['target']}, "
        f"{identity['attention']} attention, {identity['prompt_tokens']} + {identity['generate_tokens']} tokens, "
        f"on {identity['device']}.\n\n"
    )
    text += markdown_table(headings, table, 2)
    text += "\nMedians of interleaved rounds ± standard deviation"
    text += "; speedups are over baseline.\n" if result["baseline"] else "; baseline has no rate, so no speedups.\n"
    text += f"Logits of every code were compared with {result['reference']} before it was timed.\n"
    text += _how_long(result.get("runs") or [])
    for row in rows:
        if row["detail"]:
            text += f"- {row['set']}: {row['status']}: {row['detail']}\n"
    return text


def _how_long(runs: Sequence[Mapping[str, Any]]) -> str:
    """How long the command took, as often as it came to an end or was interrupted."""
    if not runs:
        return ""
    each = ", ".join(f"{run['seconds']:.0f} s ({run['compiled']} sets compiled)" for run in runs)
    return f"Time from the command to its last figure: {each}.\n"


def _hits(rows: list[Row]) -> str:
    """Functions by rule, and where functions were timed the share of prefill and of a decode step."""
    hit = {rule for row in rows for rule in row["hits"]}
    order = list(dict.fromkeys(["ours", *(r for row in rows for r in (*row["rules"], *row["hits"])), "none"]))
    rules = [rule for rule in order if rule in hit]
    if not rules:
        return "No set was scheduled.\n"
    timed = any(row["shares"] for row in rows)

    def cell(row: Row, rule: str) -> str:
        count = row["hits"].get(rule)
        shares = row["shares"].get(rule, {})
        text = "" if count is None else str(count)
        if text and row["shares"]:
            text += " (" + " / ".join(f"{100 * shares.get(phase, 0.0):.0f} %" for phase in PHASES) + ")"
        return text

    text = "Functions that each rule took"
    text += " (share of the time of a prefill / of a decode step up to its logits)" if timed else ""
    text += "; ours: kernels that come scheduled; none: left as plain loops.\n\n"
    listed = [row for row in rows if row["hits"]]
    total = [str(sum(row["hits"].values())) for row in listed]
    cells = [[row["set"], *(cell(row, rule) for rule in rules), n] for row, n in zip(listed, total, strict=True)]
    return text + markdown_table(["set", *rules, "all"], cells, 1)


def _effects(found: Mapping[str, Any]) -> str:
    text = f"What each of {', '.join(found['factors'])} does over all sets with and without it (main effects; other "
    text += "rules are off in these sets), and pairs (above 1: they help each "
    text += "other; below 1: they do the same work). Factors on tokens a second, ± standard error.\n\n"
    rows = []
    for prefill, decode in zip(*(found[phase]["terms"] for phase in PHASES), strict=True):
        cells = [plus_minus(term["ratio"], term["ratio_sd"]) or "not told" for term in (prefill, decode)]
        rows.append([" x ".join(prefill["factors"]), *cells])
    text += markdown_table(["rule", *PHASES], rows, 1)
    for phase in PHASES:
        fit = found[phase]
        text += f"\n{phase}: {fit['cells']} of {fit['of_cells']} sets"
        if fit["cells"] < fit["of_cells"]:
            text += ", a least-squares fit without higher interactions"
        text += f"; what pairs leave unexplained has a spread of {100 * fit['residual_sd']:.1f} %."
    return text + "\n"


def _moved(result: Mapping[str, Any], a: str, b: str) -> str:
    known = [row["set"] for row in result["rows"]]
    for name in (a, b):
        if name not in known:
            raise UserError(f"--compare {a},{b}: there is no set {name!r}; choose two of {', '.join(known)}")
    rows = moved(result, a, b)
    if not rows:
        return f"No function moved between {a} and {b}.\n"
    timed = any(row[f"{phase}_time_us_a"] is not None for row in rows for phase in PHASES)
    headings = ["function", "role", f"rule in {a}", f"rule in {b}"]
    if timed:
        headings += [f"{phase} us, {name}" for phase in PHASES for name in (a, b)]
    table = []
    for row in rows:
        name = row["name"] if row["name"] == row["name_b"] else f"{row['name']}, then {row['name_b']}"
        cells = [name, row["role"], row["rule_a"] or "", row["rule_b"] or ""]
        if timed:
            cells += [number(row[f"{phase}_time_us_{side}"]) for phase in PHASES for side in "ab"]
        table.append(cells)
    text = f"Functions of a prefill and of a decode step that moved between {a} and {b}"
    return f"{text}; kernels that come scheduled are the same in both.\n\n" + markdown_table(headings, table, 4)
