"""What the KV cache gains by the roofline, for rows of `naive` and `greedy` on the same prompts.

Twice: at the machine's own rates (a target's stated peaks, or what a CPU was measured to read and to multiply), and at
the rates that this run reached, multiply-adds in its prefill and reads in its decode steps. The first says what could
be, the second whether time grows with the text as the closed forms have it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from gpt2_tvm.theory.closed import Model, total
from gpt2_tvm.theory.dtypes import stored_as
from gpt2_tvm.theory.machine import Machine
from gpt2_tvm.theory.predict import Case, forms_of, step_seconds

if TYPE_CHECKING:
    from gpt2_tvm.artifact import Artifact
    from gpt2_tvm.measure.bounds import Bounds

Json = dict[str, Any]


def closed_form(artifact: Artifact) -> Model:
    """The closed forms of an artifact's model."""
    from gpt2_tvm.quantization import get_scheme

    manifest = artifact.manifest
    dtypes, tables = stored_as(get_scheme(manifest["quantization"]))
    fast_math = artifact.kind == "cpu"
    return Model(
        artifact.config, dtypes, manifest["attention"], last_row=True, fast_math=fast_math, float_tables=tables
    )


def cache_gain(model: Model, machine: Machine, batch: int, prompt: int, tokens: int) -> float:
    """Seconds of `tokens` - 1 naive steps after a prompt and its first token, over those with the cache."""
    lengths = range(prompt + 1, prompt + tokens)
    naive = sum(step_seconds(model, machine, Case("prefill", batch, n)) for n in lengths)
    return naive / sum(step_seconds(model, machine, Case("decode", batch, n)) for n in lengths)


def peaks(artifact: Artifact, measured: Bounds | None) -> Machine | None:
    """The machine's rates: the target's, else as measured; None where nobody knows."""
    from gpt2_tvm.measure.bounds import target_bounds

    stated = target_bounds(artifact)
    if measured is not None and artifact.kind == "cpu":
        stated = measured
    if stated.bandwidth is None or stated.arithmetic is None:
        return None
    return Machine("", "", stated.bandwidth.gb_s, stated.arithmetic.gflop_s / 1e3, None, "")


def reached(model: Model, greedy: Json) -> Machine:
    """The rates of a greedy row: its prefill's operations and its decode steps' bytes a second."""
    batch, prompt = greedy["batch"], round(greedy["prompt_tokens"])
    tokens = greedy["generated_tokens"] // greedy["prompts"]
    first = total(forms_of(model, Case("prefill", batch, prompt))).flops.at(batch, prompt, 0, s=prompt)
    seq = prompt + max(1, tokens // 2)
    step = total(forms_of(model, Case("decode", batch, seq))).bytes.at(batch, 1, seq - 1, s=seq)
    seconds = batch / greedy["tok_s"]
    return Machine("", "", float(step) / seconds / 1e9, float(first) / greedy["first_token_time_us"] / 1e6, None, "")


def add_cache_gain(rows: Sequence[Json], artifacts: Mapping[str, Artifact], measured: Bounds | None) -> list[str]:
    """Write what the roofline predicts into rows of naive: `predicted_speedup` over greedy at the machine's rates,
    `predicted_speedup_reached` at those reached, and what was measured over each -> lines for people.

    artifacts: the rows' own, by what they call them. measured: the CPU that they ran on, if it was one, in the same
    minutes. Rows without a greedy one beside them are left as they are, and so are models without closed forms
    (pruned ones).
    """
    notes: list[str] = []
    known: dict[str, Machine | None] = {}
    for row in rows:
        plain = next((r for r in rows if _same(r, row) and r["strategy"] == "greedy"), None)
        artifact = artifacts[row["artifact"]]
        if row["strategy"] != "naive" or plain is None or not row["speedup"] or artifact.config.pruned:
            continue
        tokens = row["generated_tokens"] // row["prompts"]
        if tokens < 2:
            continue
        model, kind = closed_form(artifact), row["target"]
        if kind not in known:
            known[kind] = peaks(artifact, measured)
        sizes = (row["batch"], round(row["prompt_tokens"]), tokens)
        here = cache_gain(model, reached(model, plain), *sizes)
        machine = known[kind]
        peak = cache_gain(model, machine, *sizes) if machine is not None else None
        gain = 1 / row["speedup"]
        row["predicted_speedup"] = round(1 / peak, 4) if peak else None
        row["measured_over_predicted"] = round(peak / gain, 4) if peak else None
        row["predicted_speedup_reached"] = round(1 / here, 4)
        row["measured_over_reached"] = round(here / gain, 4)
        text = f"the KV cache makes {row['model']} {gain:.1f} times as fast on {row['dataset']}; the roofline says "
        if peak:
            text += f"{peak:.1f} at this machine's rates ({gain / peak - 1:+.0%}), "
        notes.append(text + f"{here:.1f} at those reached here ({gain / here - 1:+.0%})")
    return notes


def _same(a: Json, b: Json) -> bool:
    return all(a[key] == b[key] for key in ("artifact", "dataset", "batch"))
