"""The rows of `tuning.gap` and its tables."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Sequence
from statistics import median, pstdev
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gpt2_tvm.artifact import Artifact
    from gpt2_tvm.measure.cases import Case
    from tuning.gap_subjects import Anatomy

FORMATS = ("md", "csv", "json")
NATIVE = "native"
# Each with its spread under `_sd`; None where the device has no timestamps.
FIGURES = (
    *("prefill_tok_s", "decode_tok_s", "stream_tok_s", "prefill_kernels_ms", "step_kernels_ms", "dispatch_ms"),
    *("dispatch_us", "sync_ms", "prefill_ratio", "decode_ratio", "stream_ratio"),
)
ROW_KEYS = (
    *("model", "quantization", "target", "runner", "device", "prompt_tokens", "generate_tokens", "repeats"),
    *("kernels", "same_tokens"),
    *(key for figure in FIGURES for key in (figure, f"{figure}_sd")),
)

Row = dict[str, Any]


def make_row(
    artifact: Artifact,
    runner: str,
    device: str,
    case: Case,
    samples: Sequence[Anatomy],
    native: Sequence[Anatomy],
) -> Row:
    """Medians over the rounds. Ratios are to the native code, round by round; `same_tokens`: how many of the greedy
    tokens agree with its, from the first on."""
    from gpt2_tvm.measure.results import agreeing

    n, m = case.prompt_tokens, case.generate_tokens

    def overhead(s: Anatomy) -> float | None:
        return None if s.step_kernels_s is None else max(0.0, s.step_s - s.step_kernels_s)

    def ratio(key: str) -> list[float | None]:
        return [getattr(b, key) / getattr(a, key) for a, b in zip(samples, native, strict=False)]

    found: dict[str, list[float | None]] = {
        "prefill_tok_s": [n / s.prefill_s for s in samples],
        "decode_tok_s": [m / s.decode_s for s in samples],
        "stream_tok_s": [m / s.stream_s for s in samples],
        "prefill_kernels_ms": [_scaled(s.prefill_kernels_s, 1e3) for s in samples],
        "step_kernels_ms": [_scaled(s.step_kernels_s, 1e3) for s in samples],
        "dispatch_ms": [_scaled(overhead(s), 1e3) for s in samples],
        "dispatch_us": [_scaled(overhead(s), 1e6 / s.kernels) for s in samples],
        "sync_ms": [1e3 * (s.stream_s - s.decode_s) / m for s in samples],
        "prefill_ratio": ratio("prefill_s"),
        "decode_ratio": ratio("decode_s"),
        "stream_ratio": ratio("stream_s"),
    }
    manifest = artifact.manifest
    row: Row = {
        "model": manifest["model"],
        "quantization": manifest["quantization"],
        "target": manifest["target"]["name"],
        "runner": runner,
        "device": device,
        "prompt_tokens": n,
        "generate_tokens": m,
        "repeats": len(samples),
        "kernels": samples[-1].kernels,
        "same_tokens": agreeing(samples[-1].tokens, native[-1].tokens) if native else None,
    }
    for key in FIGURES:
        values = [value for value in found[key] if value is not None]
        row[key] = median(values) if values else None
        row[f"{key}_sd"] = pstdev(values) if values else None
    return row


def _scaled(value: float | None, by: float) -> float | None:
    return None if value is None else value * by


def render(result: dict[str, Any], format_: str) -> str:
    """A result as text that ends in a newline; csv carries the rows alone."""
    if format_ == "json":
        return json.dumps(result, indent=1, ensure_ascii=False) + "\n"
    if format_ == "csv":
        out = io.StringIO()
        writer = csv.DictWriter(out, ROW_KEYS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(result["rows"])
        return out.getvalue()
    return _markdown(result["rows"])


def _markdown(rows: Sequence[Row]) -> str:
    from gpt2_tvm.measure.tables import markdown_table, number
    from tuning.ablation_tables import plus_minus

    if not rows:
        return "Nothing was measured.\n"

    def cell(row: Row, key: str) -> str:
        return plus_minus(row[key], row[f"{key}_sd"])

    columns: tuple[tuple[str, Callable[[Row], str]], ...] = (
        ("code", lambda r: f"{r['target']}{'' if r['runner'] == NATIVE else ' in ' + r['runner']}"),
        ("prefill tok/s", lambda r: cell(r, "prefill_tok_s")),
        ("of native", lambda r: number(r["prefill_ratio"])),
        ("decode tok/s", lambda r: cell(r, "decode_tok_s")),
        ("of native", lambda r: number(r["decode_ratio"])),
        ("shown tok/s", lambda r: cell(r, "stream_tok_s")),
        ("kernels a token", lambda r: str(r["kernels"])),
        ("in kernels ms", lambda r: cell(r, "step_kernels_ms")),
        ("dispatch ms", lambda r: cell(r, "dispatch_ms")),
        ("us a kernel", lambda r: number(r["dispatch_us"])),
        ("read-back ms", lambda r: cell(r, "sync_ms")),
        ("same tokens", lambda r: f"{r['same_tokens']} of {r['generate_tokens']}"),
    )
    first = rows[0]
    text = markdown_table([name for name, _ in columns], [[make(row) for _, make in columns] for row in rows], 1)
    text += (
        f"\n{first['model']} {first['quantization']}, {first['prompt_tokens']} + {first['generate_tokens']} tokens; "
        f"median ± standard deviation of {first['repeats']} rounds in which all take turns.\n"
    )
    for row in rows:
        text += f"- {columns[0][1](row)}: {row['device']}\n"
    return text + (
        "\nIn kernels: a decode step's kernels by themselves. Dispatch: what the step takes beyond them. Read-back: "
        "what a token costs more when each is read back before the next is shown.\n"
    )
