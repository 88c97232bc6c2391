"""Two runs of the same ablation side by side: how far apart their medians are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gpt2_tvm.errors import UserError
from gpt2_tvm.measure.tables import markdown_table
from tuning.ablation_results import EXPERIMENT

RATES = ("prefill_tok_s", "decode_tok_s")


def against(result: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """Markdown: the other run's medians over this one's, for every code that both timed. A code that several sets share
    has one row, under the first of them. Raises UserError for another experiment, or where no set is in both."""
    differs = [key for key in EXPERIMENT if result["identity"].get(key) != other["identity"].get(key)]
    if differs:
        said = ", ".join(f"{key} {other['identity'].get(key)}" for key in differs)
        raise UserError(f"--against: that is another experiment ({said})")
    theirs = {row["set"]: row for row in other["rows"] if row["status"] == "ok"}
    rows, ratios = [], []
    for row in result["rows"]:
        second = theirs.get(row["set"])
        if row["status"] != "ok" or row.get("same_code_as") or second is None:
            continue
        pair = [second[rate] / row[rate] for rate in RATES]
        ratios.append(pair)
        rows.append([row["set"], *(f"{ratio:.2f}" for ratio in pair)])
    if not rows:
        raise UserError("--against: no set was timed in both runs")
    text = markdown_table(["set", "prefill, second run / first", "decode, second run / first"], rows, 1)
    for name, column in zip(("prefill", "decode"), zip(*ratios, strict=True), strict=True):
        off = [max(ratio, 1 / ratio) - 1 for ratio in column]
        within = sum(one <= 0.1 for one in off)
        text += f"\nMedians of {name}: {within} of {len(off)} sets within 10 %, the furthest {max(off):.0%} apart."
    return text + "\n"
