"""Rows from samples, and the tables.

A row is an engine at a case. Keys: `engine`, `scheme` (of ours; None for a peer), `precision`, `batch`,
`prompt_tokens`, `generate_tokens`, `repeats`; `prefill_tok_s`, `decode_tok_s`, `prefill_gflop_s`, `decode_gb_s`,
`fma_share` and `read_share` (of the machine's bounds), `peak_rss_mb`; `weights_mb` and `cache_mb`, what the engine must
hold; `load_s` (ours alone, as `EngineSubject` says it); `same_tokens` of `of_tokens` greedy ids that are those of
`tokens_of`; `prefill_ratio` and `decode_ratio`, the rate of our engine with weights of that precision (`ratio_of`) over
this one, round by round; `exact`, whether its ids must be ours; `failure`. Medians, with the sample standard deviation
under `<key>_sd`. Figures that there are not are None.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import TYPE_CHECKING, Any

from gpt2_tvm.config import GPT2Config
from gpt2_tvm.measure.bounds import decode_step_bytes, prefill_flops
from gpt2_tvm.measure.cases import Case, Sample
from gpt2_tvm.measure.noise import BUSY_CORES
from gpt2_tvm.measure.results import agreeing, rates, spread
from gpt2_tvm.measure.tables import markdown_table, number, with_spread

if TYPE_CHECKING:
    from .run import Entry

Row = dict[str, Any]
RATES = ("prefill_tok_s", "decode_tok_s", "prefill_gflop_s", "decode_gb_s")
RATIOS = ("prefill_ratio", "decode_ratio")


def make_rows(
    config: GPT2Config,
    entries: Sequence[Entry],
    cases: Sequence[Case],
    samples: Mapping[tuple[int, Case], Sequence[Sample]],
    bounds: Mapping[str, Any] | None,
) -> list[Row]:
    """One row an engine and case, by case; of a case that nobody has begun there are none."""
    rows = []
    for case in cases:
        found = {i: samples[i, case] for i in range(len(entries)) if samples.get((i, case))}
        if not found:
            continue
        ours = [i for i in found if entries[i].engine.scheme is not None]
        rows += [_row(config, entries, case, i, found, ours, bounds) for i in range(len(entries))]
    return rows


def _row(
    config: GPT2Config,
    entries: Sequence[Entry],
    case: Case,
    index: int,
    found: Mapping[int, Sequence[Sample]],
    ours: Sequence[int],
    bounds: Mapping[str, Any] | None,
) -> Row:
    entry = entries[index]
    row: Row = {
        "engine": entry.label,
        "scheme": entry.engine.scheme,
        "precision": entry.engine.precision,
        "batch": case.batch,
        "prompt_tokens": case.prompt_tokens,
        "generate_tokens": case.generate_tokens,
        "repeats": len(found.get(index, ())),
        **{key + end: None for key in (*RATES, *RATIOS) for end in ("", "_sd")},
        **dict.fromkeys(("fma_share", "read_share", "load_s", "peak_rss_mb", "weights_mb", "cache_mb")),
        **dict.fromkeys(("same_tokens", "of_tokens", "tokens_of", "ratio_of")),
        "exact": entry.engine.exact,
        "failure": entry.failure,
    }
    if index not in found:
        return row
    mine = found[index]
    prefill, decode = rates(case, mine)
    flops = prefill_flops(config, case) / (case.batch * case.prompt_tokens) / 1e9  # 10^9 a token
    step = decode_step_bytes(config, entry.param_bytes, entry.engine.cache, case) / case.batch / 1e9  # type: ignore[arg-type]
    figures = (prefill, decode, [rate * flops for rate in prefill], [rate * step for rate in decode])
    for key, values in zip(RATES, figures, strict=True):
        row[key], row[key + "_sd"] = median(values), spread(values)
    for share, key, bound in (("fma", "prefill_gflop_s", "fma_gflop_s"), ("read", "decode_gb_s", "read_gb_s")):
        if bounds is not None and bounds[bound] is not None:
            row[f"{share}_share"] = row[key] / bounds[bound]
    row["load_s"] = entry.facts.get("load_seconds")
    row["peak_rss_mb"] = max(sample.peak_rss_mb for sample in mine)
    row["weights_mb"] = sum(entry.param_bytes.values()) / 1e6
    item = {"float32": 4, "float16": 2, "bfloat16": 2}[entry.engine.cache]
    tokens = case.prompt_tokens + case.generate_tokens
    row["cache_mb"] = 2 * config.n_layer * config.n_embd * case.batch * tokens * item / 1e6
    if ours and index != ours[0]:
        theirs = found[ours[0]][-1].tokens
        row["tokens_of"] = entries[ours[0]].label
        row["same_tokens"] = sum(agreeing(a, b) for a, b in zip(mine[-1].tokens, theirs, strict=True))
        row["of_tokens"] = case.batch * case.generate_tokens
    rival = next((i for i in ours if entries[i].engine.precision == entry.engine.precision), None)
    if rival is not None and entry.engine.scheme is None:
        row["ratio_of"] = entries[rival].label
        for key, a, b in zip(RATIOS, rates(case, found[rival]), (prefill, decode), strict=True):
            ratios = [x / y for x, y in zip(a, b, strict=False)]  # an engine that failed has fewer rounds
            row[key], row[key + "_sd"] = median(ratios), spread(ratios)
    return row


# Markdown ------------------------------------------------------------------------------------------------------------


def render(result: Mapping[str, Any]) -> str:
    """A result in Markdown: a table for each case, the verdict, and how each engine was set."""
    rows = result["rows"]
    if not rows:
        text = "Nothing was measured.\n"
    else:
        text = ""
        for sizes in dict.fromkeys((r["batch"], r["prompt_tokens"], r["generate_tokens"]) for r in rows):
            batch, prompt, generate = sizes
            text += f"## {result['model']}, batch {batch}, {prompt} + {generate} tokens\n\n"
            text += _table([r for r in rows if (r["batch"], r["prompt_tokens"], r["generate_tokens"]) == sizes]) + "\n"
        text += _how_to_read(result)
        text += "\n## Verdict\n\n" + _verdict(result["verdict"])
    text += "\n## Engines\n\n"
    for engine in result["engines"]:
        versions = ", ".join(f"{name} {number}" for name, number in engine["versions"].items())
        what = "; ".join(part for part in (versions, engine["settings"]) if part)
        text += f"- {engine['engine']}: {engine['failure'] or what}\n"
    return text


def _table(rows: Sequence[Row]) -> str:
    headings = ["engine", "prefill tok/s", "ours / it", "GFLOP/s", "of FMA"]
    headings += ["decode tok/s", "ours / it", "GB/s", "of read", "peak MB", "same ids"]
    return markdown_table(headings, [_cells(row) for row in rows], left=1)


def _cells(row: Row) -> list[str]:
    if row["prefill_tok_s"] is None:
        return [row["engine"], *[""] * 9, "failed, see below" if row["failure"] else "not reached"]
    ratios = ["" if row[key] is None else with_spread(row, key) for key in RATIOS]
    ids = "" if row["same_tokens"] is None else f"{row['same_tokens']} of {row['of_tokens']}"
    if row["exact"] and row["same_tokens"] != row["of_tokens"]:
        ids += " (not all)"
    if row["failure"]:
        ids += f" (failed after {row['repeats']} rounds, see below)"
    return [
        row["engine"],
        *(with_spread(row, "prefill_tok_s"), ratios[0], number(row["prefill_gflop_s"]), _percent(row["fma_share"])),
        *(with_spread(row, "decode_tok_s"), ratios[1], number(row["decode_gb_s"]), _percent(row["read_share"])),
        *(f"{row['peak_rss_mb']:.0f}", ids),
    ]


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.0f} %"


def _how_to_read(result: Mapping[str, Any]) -> str:
    bounds = result["bounds"]
    text = f"Median ± standard deviation of {result['repeats']} rounds in which all engines take turns, "
    text += f"{result['threads']} threads each, on {result['device']}. "
    text += '"ours / it": our engine with weights of the same precision over this one.\n'
    for key, unit in (("read_gb_s", "GB/s"), ("fma_gflop_s", "GFLOP/s")):
        if bounds and bounds[key] is not None:
            source = bounds[key.partition("_")[0] + "_source"]
            text += f"Bound: {with_spread(bounds, key)} {unit} ({source}).\n"
    if bounds:
        text += f"Of our peak memory, {bounds['import_rss_mb']:.0f} MB are what a bare `import tvm` takes here.\n"
    first = next((row["tokens_of"] for row in result["rows"] if row["tokens_of"]), None)
    if first:
        text += f'"same ids": greedy ids that equal those of {first}, up to the first that differs.\n'
    if result["note"]:
        text += f"Note: {result['note']}.\n"
    if not result["complete"]:
        text += "This run was not complete.\n"
    others = result["other_cores"]
    if others is not None and others > BUSY_CORES:
        text += f"Other programs kept {others:.1f} cores busy meanwhile: measure again on a quiet machine.\n"
    return text


def _verdict(lines: Sequence[Mapping[str, Any]]) -> str:
    if not lines:
        return "Nothing to compare.\n"
    words = {True: "met", False: "not met", None: ""}
    cells = []
    for line in lines:
        reached = number(line["reached"])
        if line["reached_sd"] is not None:
            reached += f" ± {number(line['reached_sd'], 2)}"
        cells.append([line["line"], line["target"], reached, line["against"] or "", words[line["met"]]])
    return markdown_table(["line", "target", "reached", "against", ""], cells, left=5)
