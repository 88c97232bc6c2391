"""From samples to the rows and comparisons of a result file.

A result is {"complete", "date", "bounds", "other_cores", "rows", "comparisons", "failures"}; a row's keys are
`ROW_KEYS` and `LATER_KEYS`, to which the row of a peer adds "peer". Rates count the tokens of all sequences of a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timezone
from statistics import fmean, median, stdev
from typing import Any

from gpt2_tvm.artifact import Artifact
from gpt2_tvm.measure import bounds
from gpt2_tvm.measure.cases import Case, Sample
from gpt2_tvm.quantization import get_scheme

ROW_KEYS = (
    *("model", "target", "quantization", "rules", "attention", "batch", "prompt_tokens", "generate_tokens"),
    *("repeats", "prefill_tok_s", "decode_tok_s", "prefill_tok_s_sd", "decode_tok_s_sd"),
    *("prefill_tok_s_mean", "decode_tok_s_mean", "ttft_ms", "decode_gb_s", "bound_gb_s", "bound_share"),
    *("peak_rss_mb", "device", "date", "versions"),
)
# Added since: results written before have no such keys, and are read as if they said None.
LATER_KEYS = ("threads", "load_seconds", "prefill_gflop_s", "bound_gflop_s", "bound_gflop_share", "runner")

Row = dict[str, Any]


def now() -> str:
    """The time as ISO 8601 in UTC, to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def spread(values: Sequence[float]) -> float:
    """The sample standard deviation; 0 for a single value."""
    return stdev(values) if len(values) > 1 else 0.0


def rates(case: Case, samples: Sequence[Sample]) -> tuple[list[float], list[float]]:
    """Tokens a second of each sample: (prefill, decode)."""
    prefill = [case.batch * case.prompt_tokens / s.prefill_s for s in samples]
    return prefill, [case.batch * case.generate_tokens / s.decode_s for s in samples]


def make_row(
    artifact: Artifact,
    case: Case,
    samples: Sequence[Sample],
    facts: dict[str, Any],
    limits: bounds.Bounds,
    date: str,
    peer: str | None = None,
) -> Row:
    """One row: a case of an artifact, or of a peer with its weights.

    Medians under the plain key, the sample standard deviation under `_sd`, the mean under `_mean`. `ttft_ms`,
    time to first token, is the median time of the prefill: its logits are on the host then. `decode_gb_s` stands beside
    `bound_gb_s`, and `prefill_gflop_s` beside `bound_gflop_s`; the shares are of these.
    """
    manifest = artifact.manifest
    prefill, decode = rates(case, samples)
    if peer is None:
        scheme, sizes, cache = (
            manifest["quantization"],
            bounds.artifact_param_bytes(artifact),
            manifest["compute_dtype"],
        )
    else:
        scheme = facts.get("quantization", "q0f32")
        cache = get_scheme(scheme).compute_dtype
        sizes = bounds.plain_param_bytes(artifact.config, cache)
    step = bounds.decode_step_bytes(artifact.config, sizes, cache, case)
    gb_s = step * median(decode) / case.batch / 1e9
    gflop_s = bounds.prefill_flops(artifact.config, case) / median(s.prefill_s for s in samples) / 1e9
    read, fma = limits.bandwidth, limits.arithmetic
    row = {
        "model": manifest["model"],
        "target": manifest["target"]["name"],
        "quantization": scheme,
        "rules": ",".join(manifest["rules"]) or "none" if peer is None else None,
        "attention": facts.get("attention", manifest["attention"]),
        "batch": case.batch,
        "prompt_tokens": case.prompt_tokens,
        "generate_tokens": case.generate_tokens,
        "repeats": len(samples),
        "prefill_tok_s": median(prefill),
        "decode_tok_s": median(decode),
        "prefill_tok_s_sd": spread(prefill),
        "decode_tok_s_sd": spread(decode),
        "prefill_tok_s_mean": fmean(prefill),
        "decode_tok_s_mean": fmean(decode),
        "ttft_ms": 1e3 * median(s.prefill_s for s in samples),
        "decode_gb_s": gb_s,
        "bound_gb_s": read.gb_s if read else None,
        "bound_share": gb_s / read.gb_s if read else None,
        "peak_rss_mb": samples[-1].peak_rss_mb,
        "device": facts["device"],
        "date": date,
        "versions": facts["versions"],
        "threads": facts.get("threads"),
        "load_seconds": facts.get("load_seconds"),
        "prefill_gflop_s": gflop_s,
        "bound_gflop_s": fma.gflop_s if fma else None,
        "bound_gflop_share": gflop_s / fma.gflop_s if fma else None,
        "runner": facts.get("runner"),
    }
    return row if peer is None else {**row, "peer": peer}


def make_comparison(
    row: Row, peer: str, case: Case, ours: Sequence[Sample], theirs: Sequence[Sample]
) -> dict[str, Any]:
    """Our rate over the peer's, round by round (median and spread), and how far the greedy texts agree.

    `same_tokens` of `of_tokens`: ids before the first that differs, summed over the sequences. After it the
    two continue different texts, and what happens to be equal says nothing.
    """
    ours, theirs = ours[: len(theirs)], theirs[: len(ours)]
    ratios = [
        [a / b for a, b in zip(mine, other, strict=True)]
        for mine, other in zip(rates(case, ours), rates(case, theirs), strict=True)
    ]
    same = sum(agreeing(a, b) for a, b in zip(ours[-1].tokens, theirs[-1].tokens, strict=True))
    keys = ("model", "target", "quantization", "rules", "batch", "prompt_tokens", "generate_tokens")
    return {
        **{key: row[key] for key in keys},
        "peer": peer,
        "prefill_ratio": median(ratios[0]),
        "prefill_ratio_sd": spread(ratios[0]),
        "decode_ratio": median(ratios[1]),
        "decode_ratio_sd": spread(ratios[1]),
        "same_tokens": same,
        "of_tokens": case.batch * case.generate_tokens,
    }


def agreeing(a: Sequence[int], b: Sequence[int]) -> int:
    """How many ids two sequences have in common from their start."""
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return min(len(a), len(b))
