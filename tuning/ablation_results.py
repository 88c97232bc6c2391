"""From a journal to the result of an ablation: a row a set, the functions of each code, the effects of each rule.

A result is {"identity", "runs", "reference", "complete", "baseline", "rows", "functions", "effects"}; `ROW_KEYS` are
the keys of each row. Of a rate `<key>` is the median over the rounds and `<key>_sd` their standard deviation (DESIGN,
decision 9); of a speedup `_sd` follows from those of both rates. A rate that was not measured is None.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from gpt2_tvm.errors import UserError
from gpt2_tvm.measure.results import spread
from targets import DeviceTarget
from tuning.ablation_records import IDENTITY, Journal, Line
from tuning.effects import Effects, effects
from tuning.variants import Variant, cells

PHASES = ("prefill", "decode")
ROW_KEYS = (
    *("set", "rules", "status", "detail", "repeats"),
    *(f"{phase}_{key}" for phase in PHASES for key in ("tok_s", "tok_s_sd", "speedup", "speedup_sd")),
    *("hits", "shares", "code", "same_code_as", "difference", "compile_s"),
    *("launches_prefill", "launches_token", "bytes_token"),
)
UNMEASURED = "not-measured"
OURS = "ours"  # the rule of a kernel that comes scheduled
NAMED_FIRST = ("baseline", "full", "stock")

# What an experiment is to its reader: every result says it, and only results that share it are comparable.
EXPERIMENT = ("model", "quantization", "target", "attention", "prompt_tokens", "generate_tokens", "device")

Row = dict[str, Any]


def read_result(file: Path, option: str) -> dict[str, Any]:
    """What a run wrote into `file`, which the user named by `option`; UserError where that is none."""
    try:
        kept = json.loads(file.read_text(encoding="utf-8"))
        if {"identity", "rows", "effects", "functions"} <= set(kept) and set(EXPERIMENT) <= set(kept["identity"]):
            return dict(kept)
    except FileNotFoundError:
        raise UserError(f"there is no {file}; give another {option}") from None
    except (ValueError, TypeError):
        pass
    raise UserError(f"{file} is no result of tuning.ablation; give another {option}")


def result(
    journal: Journal,
    variants: Sequence[Variant],
    target: DeviceTarget,
    extra: Sequence[str],
    design: Mapping[tuple[str, ...], frozenset[str]] | None = None,
) -> dict[str, Any]:
    """The result of the sets `variants`, as far as the journal knows them (an interrupted run lacks some). design: the
    factorial design, where it is not that of the target's rules with `extra`."""
    samples = {code: _rates(journal.header, list(of.values())) for code, of in journal.samples.items()}
    rows = [_row(journal, variant, samples) for variant in variants]
    seen: dict[str, str] = {}  # what a code is called where several sets have it
    for row in sorted(rows, key=lambda row: row["set"] not in NAMED_FIRST):
        if row["code"] is not None:
            first = seen.setdefault(row["code"], row["set"])
            row["same_code_as"] = first if first != row["set"] else None
    baseline = next((row for row in rows if row["set"] == "baseline" and row["status"] == "ok"), None)
    for row in rows:
        for phase in PHASES:
            _add_speedup(row, baseline, phase)
    made: dict[str, Any] = {
        "identity": {key: journal.header.get(key) for key in IDENTITY},
        "runs": journal.runs,
        "reference": journal.header["reference"],
        "complete": all(row["status"] != UNMEASURED for row in rows),
        "baseline": baseline is not None,
        "rows": rows,
        "functions": {code: _functions(journal, code, rows) for code in seen},
        "effects": None,
    }
    design = cells(target, extra) if design is None else design
    if set(design) <= {variant.rules for variant in variants}:
        made["effects"] = _effects(design, variants, rows, samples)
    return made


def _rates(header: Line, samples: Sequence[Line]) -> dict[str, list[float]]:
    """Tokens a second of each round."""
    return {
        "prefill": [header["prompt_tokens"] / sample["prefill_s"] for sample in samples],
        "decode": [header["generate_tokens"] / sample["decode_s"] for sample in samples],
    }


def _row(journal: Journal, variant: Variant, samples: Mapping[str, dict[str, list[float]]]) -> Row:
    row: Row = dict.fromkeys(ROW_KEYS)
    row.update(set=variant.name, rules=list(variant.rules), status=UNMEASURED, detail="", repeats=0, hits={}, shares={})
    line = journal.sets.get(variant.name)
    if line is None or line["rules"] != list(variant.rules):
        return row
    row["hits"] = dict(Counter(function["rule"] for function in line.get("functions", ())).most_common())
    row.update({key: line.get(key) for key in ("launches_prefill", "launches_token", "bytes_token")})
    if line["status"] != "ok":
        row.update(status=line["status"], detail=line["detail"])
        return row
    code = line["code"]
    row.update(code=code, compile_s=line["compile_s"], shares=_shares(line, journal.functions.get(code)))
    if code in journal.checks:
        row["difference"] = journal.checks[code]["difference"]
    failure = journal.failures.get(code)
    if failure is not None:
        row.update(status=failure["status"], detail=failure["detail"])
        return row
    rates = samples.get(code)
    if rates:
        row.update(status="ok", repeats=len(rates["prefill"]))
        for phase in PHASES:
            row[f"{phase}_tok_s"], row[f"{phase}_tok_s_sd"] = median(rates[phase]), spread(rates[phase])
    return row


def _add_speedup(row: Row, baseline: Row | None, phase: str) -> None:
    rate = row[f"{phase}_tok_s"]
    if baseline is None or rate is None:
        return
    base = baseline[f"{phase}_tok_s"]
    ratio = rate / base
    sd = ratio * math.hypot(row[f"{phase}_tok_s_sd"] / rate, baseline[f"{phase}_tok_s_sd"] / base)
    same = row["code"] == baseline["code"]
    row[f"{phase}_speedup"], row[f"{phase}_speedup_sd"] = ratio, 0.0 if same else sd


def call_of(phase: str) -> str:
    """The exported function of a phase at batch 1, as the manifest calls it."""
    return "prefill" if phase == "prefill" else "decode_b1"


def _shares(line: Line, timed: Line | None) -> dict[str, dict[str, float]]:
    """Of each rule the share of a prefill's and of a decode step's time that its functions take."""
    shares: dict[str, dict[str, float]] = {}
    for phase in PHASES:
        spent: Counter[str] = Counter()
        times = timed["times"].get(phase, {}) if timed else {}
        for function in line["functions"]:
            if function["name"] in times:
                calls = function["calls"].get(call_of(phase), 0)
                spent[function["rule"]] += times[function["name"]]["time_us"] * calls
        if spent.total() > 0:
            for rule, time_us in spent.items():
                shares.setdefault(rule, {})[phase] = time_us / spent.total()
    return shares


def _functions(journal: Journal, code: str, rows: Sequence[Row]) -> list[Row]:
    """The functions of a code: name, role, rule, kernels, and calls and time_us (with _sd) by phase."""
    name = next(row["set"] for row in rows if row["code"] == code)
    times = journal.functions.get(code, {}).get("times", {})
    made = []
    for function in journal.sets[name]["functions"]:
        row = {key: function[key] for key in ("name", "role", "rule", "kernels")}
        for phase in PHASES:
            timed = times.get(phase, {}).get(function["name"], {})
            row[f"{phase}_calls"] = function["calls"].get(call_of(phase), 0)
            row[f"{phase}_time_us"], row[f"{phase}_time_us_sd"] = timed.get("time_us"), timed.get("time_us_sd")
        made.append(row)
    return made


def _effects(
    design: Mapping[tuple[str, ...], frozenset[str]],
    variants: Sequence[Variant],
    rows: Sequence[Row],
    samples: Mapping[str, dict[str, list[float]]],
) -> dict[str, Any]:
    """Per phase the terms of the factorial design, and how many of its sets have a rate."""
    of_rules = {variant.rules: row for variant, row in zip(variants, rows, strict=True)}
    names = sorted(set().union(*design.values()), key=[rule for v in variants for rule in v.rules].index)
    made: dict[str, Any] = {"factors": names}
    for phase in PHASES:
        rates = {}
        for rules, on in design.items():
            row = of_rules[rules]
            if row["status"] == "ok":
                rates[on] = samples[row["code"]][phase]
        made[phase] = _as_json(effects(names, rates))
    return made


def _as_json(found: Effects) -> dict[str, Any]:
    terms = [
        {
            "factors": list(term.factors),
            "ratio": term.ratio,
            "ratio_sd": term.ratio_sd,
            "log_effect": term.log_effect,
            "log_effect_sd": term.log_effect_sd,
        }
        for term in found.terms
    ]
    return {"terms": terms, "cells": found.cells, "of_cells": found.of_cells, "residual_sd": found.residual_sd}


def moved(found: Mapping[str, Any], a: str, b: str) -> list[Row]:
    """The functions that another rule took in set `b` than in set `a`, or whose time changed by more than a tenth and
    twice its spread: name, name_b, role, rule_a, rule_b, and by phase calls, time_us_a, time_us_b.

    A function that a fusion named anew stands beside what it was: the product with the same weight in the same calls.
    Left out are functions that neither a prefill nor a decode step calls, and kernels that come scheduled: those are
    the same in both sets, and their times differ by what ran before them alone. KeyError for an unknown set.
    """
    rows = {row["set"]: row for row in found["rows"]}
    first, second = (found["functions"].get(rows[name]["code"], []) for name in (a, b))
    made = []
    for one, two in _pairs(first, second):
        known: Row = two or one or {}
        row = {
            "name": (one or known)["name"],
            "name_b": known["name"],
            "role": known["role"],
            "rule_a": one["rule"] if one else None,
            "rule_b": two["rule"] if two else None,
        }
        changed = row["rule_a"] != row["rule_b"]
        for phase in PHASES:
            row[f"{phase}_calls"] = known[f"{phase}_calls"]
            times: list[Any] = [function[f"{phase}_time_us"] if function else None for function in (one, two)]
            row[f"{phase}_time_us_a"], row[f"{phase}_time_us_b"] = times
            if one and two and None not in times:
                noise = math.hypot(*(function[f"{phase}_time_us_sd"] or 0.0 for function in (one, two)))
                changed |= abs(times[0] - times[1]) > max(2 * noise, 0.1 * min(times))
        called = any(function[f"{phase}_calls"] for function in (one, two) if function for phase in PHASES)
        if changed and called and row["rule_a"] != OURS != row["rule_b"]:
            made.append(row)
    return made


def _pairs(first: Sequence[Row], second: Sequence[Row]) -> list[tuple[Row | None, Row | None]]:
    """Functions of two codes that do the same work, in the first one's order; those without their like at the end."""
    of_work: dict[tuple[str, str], list[Row]] = {}
    for function in second:
        of_work.setdefault(_work(function), []).append(function)
    pairs: list[tuple[Row | None, Row | None]] = []
    taken = set()
    for function in first:
        alike = of_work.get(_work(function), [])
        same = next((other for other in alike if other["name"] == function["name"]), alike[0] if alike else None)
        if same is None or same["name"] in taken:
            pairs.append((function, None))
            continue
        taken.add(same["name"])
        pairs.append((function, same))
    return [*pairs, *((None, function) for function in second if function["name"] not in taken)]


def _work(function: Row) -> tuple[str, str]:
    """Who calls a function, and the weight that it multiplies with; its name where it multiplies with none."""
    callers, _, does = function["role"].partition(": ")
    for part in re.split(r", | \+ ", does):
        if part.startswith(("attn.", "mlp.", "logits")):
            return callers, part
    return callers, str(function["name"])
