"""The report as Markdown."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from gpt2_tvm.measure.tables import markdown_table, number
from gpt2_tvm.theory.closed import PARTS

Json = dict[str, Any]
_UNITS = (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3))


def short(value: float) -> str:
    """Three significant digits with a decimal prefix: 3210000 -> "3.21 M"."""
    for unit, size in _UNITS:
        if abs(value) >= 0.9995 * size:
            return f"{number(value / size)} {unit}"
    return f"{value:.0f}" if float(value).is_integer() else number(value)


def grouped(value: float) -> str:
    """Every digit: 160,822,400."""
    return f"{value:,}" if isinstance(value, int) or not float(value).is_integer() else f"{int(value):,}"


def milliseconds(value: float) -> str:
    """Three digits, more decimals where the time is short."""
    if 0 < value < 0.001:
        return "<0.001"
    return f"{value:.2g}" if value < 0.095 else number(value)


def render(report: Json) -> str:
    """All sections, ending in a newline."""
    sections: tuple[Callable[[Json], str], ...] = (
        _head,
        _coefficients,
        _cases,
        _module,
        _cache,
        _speculation,
        _measured,
    )
    return "\n".join(text for text in (section(report) for section in sections) if text)


def _head(r: Json) -> str:
    device, cache, weights = r["device"], r["cache"], r["weights"]
    dtypes = ", ".join(f"{kind} {name}" for kind, name in r["dtypes"].items())
    if r["float_tables"]:
        dtypes += f", {' and '.join(r['float_tables'])} {r['dtypes']['activations']}"
    return (
        f"# {r['model']} on {device['description']}\n\n"
        f"{number(device['bandwidth_gb_s'])} GB/s, {number(device['tflops'])} TFLOP/s ({device['source']}): below "
        f"{number(device['ridge_flop_per_byte'])} FLOP a byte memory bounds, above it arithmetic.\n"
        f"{dtypes}; {r['parameters']:,} parameters.\n"
        f"A decode step reads {number(weights['bytes_a_step'] / 1e6)} MB of weights: "
        f"{milliseconds(weights['step_ms'])} ms a token, whatever the batch and context "
        f"({milliseconds(weights['step_without_head_ms'])} ms without the head).\n"
        f"The KV cache takes {grouped(cache['bytes_a_token'])} bytes a token, "
        f"{number(cache['full_context_mb'])} MB for a full context.\n"
    )


def _coefficients(r: Json) -> str:
    naive = ("C1", "C2", "C3", "C4", "C5", "C6", "B")
    decode = ("D1", "D2", "D3", "D4", "D5", "D6")
    text = (
        "## Closed forms\n\n"
        "Forward pass of N tokens, B sequences: FLOPs = C1 BN + C2 BN², bytes = C3 + C4 BN + C5 BN² + C6 N² + B a "
        "sequence (MHA and MLP: all layers).\n\n"
    )
    text += _coefficient_table(r, "naive", naive)
    text += "\nOne token with N - 1 in the cache: FLOPs = D1 B + D2 BN, bytes = D3 + D4 B + D5 BN + D6 N.\n\n"
    return text + _coefficient_table(r, "decode", decode)


def _coefficient_table(r: Json, kind: str, keys: Sequence[str]) -> str:
    rows = [c for c in r["coefficients"] if c["pass"] == kind]
    cells = [[c["attention"], c["part"], *(grouped(c[key]) for key in keys)] for c in rows]
    return markdown_table(["attention", "part", *keys], cells, left=2)


def _cases(r: Json) -> str:
    text = "## Predicted latency\n\n"
    text += "The slower of bytes over bandwidth and FLOPs over rate; m: memory bounds, c: compute.\n\n"
    headings = ["pass", "attention", "B", "N", "GFLOP", "MB", "FLOP/byte", "bound", "ms", "ms a token"]
    headings += [f"{part} ms" for part in PARTS] + ["by function ms"]
    cells = []
    for case in r["cases"]:
        whole = case["parts"]["whole"]
        tokens = case["batch"] * (1 if case["phase"] == "decode" else case["seq"])
        module = case.get("module")
        cells.append(
            [
                *(case["phase"], case["attention"], str(case["batch"]), str(case["seq"])),
                *(number(whole["flops"] / 1e9), number(whole["bytes"] / 1e6), number(whole["intensity"])),
                *(whole["bound"], milliseconds(whole["time_ms"]), milliseconds(whole["time_ms"] / tokens)),
                *(f"{milliseconds(case['parts'][p]['time_ms'])} {case['parts'][p]['bound'][0]}" for p in PARTS),
                milliseconds(module["by_function_ms"]) if module else "",
            ]
        )
    text += markdown_table(headings, cells, left=2)
    return text + (
        "\nnaive: logits of every row, no use of a cache; prefill: the last row's; decode: token N with N - 1 in the "
        "cache.\nBy function: each of the module's kernels at its own bound, added.\n"
    )


def _module(r: Json) -> str:
    text = "## The compiled module beside the closed form\n\n"
    m = r["module"]
    if not m["counted"]:
        return text + f"Not counted: {m['why_not']}.\n"
    text += (
        f"Counted over the module's functions in {m['cases']} passes, part by part: {m['equal']} equal the closed form "
        f"exactly, {m['explained']} differ as explained"
    )
    text += f", {m['unexplained']} DIFFER WITHOUT EXPLANATION.\n" if m["unexplained"] else ", none otherwise.\n"
    lines = []
    for case in r["cases"]:
        for kind in ("differs", "unexplained"):
            lines += [
                [
                    *(case["phase"], str(case["batch"]), str(case["seq"]), found["part"], found["why"]),
                    *(_signed(found["flops"]), _signed(found["bytes"])),
                ]
                for found in case.get("module", {}).get(kind, [])
            ]
    if lines:
        cells = [[*line[3:5], *line[:3], *line[5:]] for line in lines]
        text += "\n" + markdown_table(["part", "the module has more for", "pass", "B", "N", "FLOPs", "bytes"], cells, 3)
    if m["why_not"]:
        text += f"\nNot counted: {m['why_not']}.\n"
    return text + _textbook(r)


def _textbook(r: Json) -> str:
    if not r["textbook_differs"]:
        return ""
    cells = [
        [str(row["batch"]), str(row["seq"]), reason["why"], _signed(reason["flops"]), _signed(reason["bytes"])]
        for row in r["textbook_differs"]
        for reason in row["reasons"]
    ]
    lost = [row for row in r["textbook_differs"] if row["unexplained"]["flops"] or row["unexplained"]["bytes"]]
    text = "\nOur naive pass less the textbook's (MHA; the other parts are equal):\n\n"
    text += markdown_table(["B", "N", "because", "FLOPs", "bytes"], [[*c] for c in cells], 3)
    return text + (
        f"\n{len(lost)} of these do not add up.\n" if lost else "\nThese add up to the difference exactly.\n"
    )


def _signed(value: float) -> str:
    return f"{value:+,}"


def _cache(r: Json) -> str:
    sizes = {(c["batch"], c["seq"]): c["mb"] for c in r["cache"]["cases"]}
    cells = [
        [
            *(g["attention"], str(g["batch"]), str(g["seq"]), number(sizes[(g["batch"], g["seq"])])),
            *(f"{number(g['step'])} x", f"{number(g['text'])} x"),
        ]
        for g in r["cache_gain"]
    ]
    text = "## What the KV cache gains\n\nNaive time over decode time: for token N, and for all tokens 1 to N.\n\n"
    return text + markdown_table(["attention", "B", "N", "cache MB", "token N", "text of N"], cells, 1)


def _speculation(r: Json) -> str:
    s = r["speculation"]
    if s is None:
        return ""
    text = "## Speculative decoding\n\n"
    if s["draft_ms"] is not None:
        text += (
            f"Draft {s['draft']}: {milliseconds(s['draft_ms'])} ms a token for its weights (with its head), target "
            f"{milliseconds(s['target_ms'])} ms; "
        )
    text += f"cost ratio {s['cost_ratio']:.4f}.\n\n"
    cells = [
        [
            b["decoding"],
            b["by"],
            f"{b['agreement']:.0%}",
            str(b["k"]),
            f"{b['expected_tokens']:.2f}",
            f"{b['speedup']:.2f} x",
            "" if b["operations"] is None else f"{b['operations']:.2f} x",
        ]
        for b in s["best"]
    ]
    text += markdown_table(
        ["decoding", "by", "agreement", "draft tokens", "tokens a pass", "speed-up", "operations"], cells, 2
    )
    curve = next(b["curve"] for b in s["best"] if b["by"].startswith("theorem"))
    text += "\nBy draft length (first line): " + ", ".join(f"{k}: {gain:.2f}" for k, gain in enumerate(curve)) + ".\n"
    return text + (
        "Theorem 3.8 of Leviathan et al. 2023 takes checking k + 1 tokens to cost one step; by roofline: the times of "
        f"both models' passes at batch {s['batch']}, {s['seq']} tokens.\n"
    )


def _measured(r: Json) -> str:
    if not r["measured"]:
        return ""
    cells = [
        [
            *(p["label"], p["who"], number(p["flops"] / 1e9), number(p["bytes"] / 1e6)),
            *(milliseconds(p["time_ms"]), milliseconds(p["predicted_ms"]), f"{p['share']:.0%}"),
        ]
        for p in r["measured"]
    ]
    headings = ["measured", "by", "GFLOP", "MB", "ms", "roofline ms", "of the roof"]
    return "## Measured\n\n" + markdown_table(headings, cells, 2)
