"""From turns to rows: rates, latency, acceptance, where the time went, and what the theory says to it."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, median, stdev
from typing import TYPE_CHECKING, Any

import numpy as np

from gpt2_tvm.decoding.clock import PARTS
from gpt2_tvm.decoding.costs import at_rows
from gpt2_tvm.decoding.subjects import Subject, told
from gpt2_tvm.measure.tables import markdown_table, number, share
from gpt2_tvm.theory import speculation

if TYPE_CHECKING:
    from gpt2_tvm.artifact import Artifact
    from gpt2_tvm.decoding.prompts import Unit

Json = dict[str, Any]
FORMATS = ("md", "csv", "json")


def make_rows(
    turns: Mapping[tuple[str, str, int], Json],
    subjects: Sequence[Subject],
    units: Sequence[Unit],
    artifacts: Mapping[Path, Artifact],
    baseline: str,
) -> list[Json]:
    """A row for each subject and data set that has turns.

    Args:
        turns: a journal's.
        baseline: "greedy" or "sample": what speed-ups are over, of the same model and prompts.

    Rates are of decoding: tokens after the first of each sequence over the time after it. `tok_s` and `tok_s_sd` are
    mean and standard deviation over prompts (batches of prompts, for a batch), everything else a median.
    """
    rows = []
    for dataset in dict.fromkeys(unit.dataset for unit in units):
        keys = [unit.key for unit in units if unit.dataset == dataset]
        for subject in subjects:
            own = _of(turns, subject, keys)
            if own:
                plain = _of(turns, Subject(subject.model, baseline), keys)
                row = {**told(artifacts[subject.model]), **_row(subject, dataset, own)}
                rows.append({**row, **_compared(own, plain), **_theory(row, subject, artifacts, own, plain)})
    return rows


def _of(
    turns: Mapping[tuple[str, str, int], Json], subject: Subject, keys: Sequence[str]
) -> dict[tuple[str, int], Json]:
    wanted = set(keys)
    return {(unit, n): line for (key, unit, n), line in turns.items() if key == subject.key and unit in wanted}


def _row(subject: Subject, dataset: str, own: Mapping[tuple[str, int], Json]) -> Json:
    lines = [own[key] for key in sorted(own, key=_order)]
    rates = [rate for line in lines if (rate := _rate(line)) is not None]
    each = np.concatenate([np.repeat(s / n, n) for line in lines for s, n in line["steps"] if n] or [np.zeros(0)])
    made = sum(n for line in lines for _, n in line["steps"])
    passes, drafted, examined, accepted = (
        sum(line[key] for line in lines) for key in ("passes", "drafted", "examined", "accepted")
    )
    first = [line for (_, repeat), line in sorted(own.items(), key=lambda item: _order(item[0])) if repeat == 0]
    ids = [tokens for line in first for tokens in line["tokens"]]
    return {
        "artifact": str(subject.model),
        "strategy": subject.strategy,
        "draft": str(subject.draft) if subject.draft else None,
        "draft_length": subject.length or None,
        "planted_acceptance": subject.planted,
        "dataset": dataset,
        "prompts": len(ids),
        "prompt_tokens": round(mean(n for line in first for n in line["prompt_tokens"]), 1),
        "generated_tokens": sum(map(len, ids)),
        "batch": max(len(line["tokens"]) for line in lines),
        "repeats": len(lines) // max(1, len(first)),
        "tok_s": round(mean(rates), 3) if rates else None,
        "tok_s_sd": round(stdev(rates), 3) if len(rates) > 1 else 0.0 if rates else None,
        "token_time_us": _micro(float(np.percentile(each, 50))) if each.size else None,
        "token_time_us_p95": _micro(float(np.percentile(each, 95))) if each.size else None,
        "first_token_time_us": _micro(median(line["prefill_s"] for line in lines)),
        "acceptance": round(accepted / examined, 4) if examined else None,
        "accepted_of_drafted": round(accepted / drafted, 4) if drafted else None,
        "tokens_per_step": round(made / passes, 4) if passes else None,
        "target_passes": passes,
        "drafted_tokens": drafted,
        "split_us": {p: _micro(sum(line["parts"][p] for line in lines) / made) if made else 0.0 for p in PARTS},
        "ids_sha256": hashlib.sha256(json.dumps(ids).encode()).hexdigest(),
    }


def _order(key: tuple[str, int]) -> tuple[str, int, int]:
    dataset, _, index = key[0].rpartition("/")
    return dataset, int(index), key[1]


def _rate(line: Json) -> float | None:
    made = sum(n for _, n in line["steps"])
    return made / line["decode_s"] if made and line["decode_s"] else None


def _micro(seconds: float) -> float:
    return round(seconds * 1e6, 2)


def _compared(own: Mapping[tuple[str, int], Json], plain: Mapping[tuple[str, int], Json]) -> Json:
    """Beside the baseline on the same prompts: the ratio of rates, and whether the text is the same."""
    both = sorted(own.keys() & plain.keys(), key=_order)
    ratios = [a / b for k in both if (a := _rate(own[k])) is not None and (b := _rate(plain[k])) is not None]
    return {
        "speedup": round(median(ratios), 4) if ratios else None,
        "speedup_sd": round(stdev(ratios), 4) if len(ratios) > 1 else None,
        "same_text": sum(own[k]["tokens"] == plain[k]["tokens"] for k in both) if both else None,
        "compared": len(both),
    }


def _theory(
    row: Json,
    subject: Subject,
    artifacts: Mapping[Path, Artifact],
    own: Mapping[tuple[str, int], Json],
    plain: Mapping[tuple[str, int], Json],
) -> Json:
    """What `theory.speculation` makes of the acceptance and the costs that were measured.

    drafted_share: of the rounds that had a draft of full length. cost_ratio: a draft step over a plain step.
    verify_cost: a pass over so many rows, over a plain step. predicted_speedup: at this draft length, if it is fixed.
    optimum_*: the length that would gain most, and what.
    """
    nothing = dict.fromkeys(
        (
            "drafted_share",
            "cost_ratio",
            "verify_cost",
            "predicted_speedup",
            "measured_over_predicted",
            "optimum_length",
            "optimum_speedup",
        )
    )
    steps = [s for line in plain.values() for s, _ in line["steps"]]
    last = [line for line in own.values() if line.get("draft_s") is not None]
    if row["acceptance"] is None or not steps or not last:
        return nothing
    plain_s, draft_s = median(steps), median(line["draft_s"] for line in last)
    target: dict[int, float] = {}
    for rows in {r for line in last for r in line["target_s"]}:
        target[int(rows)] = median(line["target_s"][rows] for line in last if rows in line["target_s"])
    target[1] = plain_s
    artifact = artifacts[subject.model]
    streams = artifact.streams if subject.strategy == "streaming" else None
    widths = (int(streams["rows"]),) if streams else artifact.verify_widths

    def target_s(m: int) -> float:
        padded = 1 if m <= 1 else next((w for w in widths if w >= m), -(-m // widths[-1]) * widths[-1])
        return at_rows(target, padded)

    rate = row["acceptance"]
    fixed = int(subject.length) if subject.length.isdecimal() else None
    # lookup often finds nothing to propose: then a round is a plain step
    found = min(1.0, row["drafted_tokens"] / (row["target_passes"] * fixed)) if fixed else 1.0

    def gain(k: int) -> float:
        tokens = 1 + found * (speculation.expected_tokens(rate, k) - 1)
        return tokens * plain_s / ((1 - found) * plain_s + found * (k * draft_s + target_s(k + 1)))

    best = speculation.best(rate, gain, int(streams["streams"]) if streams else max(1, widths[-1] - 1))
    predicted = gain(fixed) if fixed is not None else None
    ratios = [a / b for k in own.keys() & plain.keys() if (a := _rate(own[k])) and (b := _rate(plain[k]))]
    return {
        "drafted_share": round(found, 4),
        "cost_ratio": round(draft_s / plain_s, 4),
        "verify_cost": {str(m): round(seconds / plain_s, 4) for m, seconds in sorted(target.items())},
        "predicted_speedup": round(predicted, 4) if predicted is not None else None,
        "measured_over_predicted": round(median(ratios) / predicted, 4) if predicted and ratios else None,
        "optimum_length": best.k,
        "optimum_speedup": round(best.speedup, 4),
    }


# Text ----------------------------------------------------------------------------------------------------------------


def render(result: Json, format_: str) -> str:
    """The result as text that ends in a newline."""
    rows = result["rows"]
    if format_ == "json":
        return json.dumps(result, indent=1) + "\n"
    if format_ == "csv":
        out = io.StringIO()
        names = list(rows[0]) if rows else ["model"]
        writer = csv.DictWriter(out, names, lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({k: json.dumps(v) if isinstance(v, dict) else v for k, v in row.items()})
        return out.getvalue()
    return _markdown(result)


def _markdown(result: Json) -> str:
    rows = result["rows"]
    if not rows:
        return "Nothing was measured.\n"
    headings = (
        *("data", "model", "strategy", "draft", "k", "tok/s", "speed-up", "same text", "p50 us", "p95 us"),
        *("acceptance", "tokens a step", "cost ratio", "predicted", "off", "best k"),
    )
    table = markdown_table(headings, [_cells(row) for row in rows], 4)
    first = rows[0]
    threads = f", {result['threads']} threads" if result.get("threads") else ""
    text = table + (
        f"\nTokens/s of decoding, mean ± standard deviation over prompts; {first['generated_tokens']} tokens after "
        f"{first['prompts']} prompts in the first row, batch {first['batch']}, on {result['device']}{threads}.\n"
        f"Speed-ups over {result['baseline']}, medians over prompts; predicted: (1 - a^(k+1)) / (1 - a) tokens a step "
        "at the measured costs of drafting and checking; off: measured over predicted, less one.\n"
    )
    for note in result["notes"]:
        text += f"Note: {note}.\n"
    return text


def _cells(row: Json) -> list[str]:
    draft = Path(row["draft"]).name if row["draft"] else ""
    if row["planted_acceptance"] is not None:
        draft = f"{draft} planted {row['planted_acceptance']:g}".strip()
    spread = f" ± {number(row['speedup_sd'], 2)}" if row["speedup_sd"] is not None else ""
    rate = "" if row["tok_s"] is None else f"{number(row['tok_s'])} ± {number(row['tok_s_sd'], 2)}"
    return [
        row["dataset"],
        f"{row['model']} {row['quantization']}" + (" materialized" if row["attention"] != "flash" else ""),
        row["strategy"],
        draft,
        row["draft_length"] or "",
        rate,
        f"{number(row['speedup'])}{spread}" if row["speedup"] is not None else "",
        f"{row['same_text']} of {row['compared']}" if row["same_text"] is not None else "",
        number(row["token_time_us"]),
        number(row["token_time_us_p95"]),
        share(row, "acceptance"),
        number(row["tokens_per_step"]),
        number(row["cost_ratio"], 2),
        number(row["predicted_speedup"]),
        f"{row['measured_over_predicted'] - 1:+.0%}" if row["measured_over_predicted"] else "",
        "" if row["optimum_length"] is None else str(row["optimum_length"]),
    ]
