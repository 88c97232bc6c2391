"""Tables in Markdown and figures from what the parts wrote."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gpt2_tvm.errors import UserError
from gpt2_tvm.measure.tables import markdown_table, number, with_spread
from gpu_bench.runs import read

PARTS = ("ours", "peers", "sizes")
TITLES = {"ours": "What each step brings", "peers": "Beside torch", "sizes": "Every size"}
Row = dict[str, Any]


def render(results: Path) -> str:
    """All parts that `results` holds, as Markdown. UserError where it holds none."""
    sections = []
    if machine := read(results / "machine.json"):
        sections.append(_machine(machine))
    if correctness := read(results / "correctness.json"):
        sections.append(_correctness(correctness["rows"]))
    for part in PARTS:
        if (found := gather(results, part)) and found["rows"]:
            sections.append(f"#### {TITLES[part]}\n\n{table(found['rows'])}{_notes(found)}")
    sections += extras(results)
    if not sections:
        raise UserError(f"{results} holds no results; run a part first, such as python benchmarks/gpu.py machine")
    return "\n\n".join(sections) + "\n"


def gather(results: Path, part: str) -> dict[str, Any] | None:
    """A part's result; of `sizes`, which writes a file for each model and precision, all of them together."""
    found = [r for file in sorted(results.glob(f"{part}*.json")) if (r := read(file)) is not None]
    if not found:
        return None
    return {
        "rows": _latest([row for r in found for row in r["rows"]]),
        "failures": [line for r in found for line in r["failures"]],
        "complete": all(r["complete"] for r in found),
        "date": max(r["date"] for r in found),
    }


def _latest(rows: Sequence[Row]) -> list[Row]:
    """Of an engine that was measured twice at one size (beside other engines) the later row."""
    kept: dict[tuple[Any, ...], Row] = {}
    for row in sorted(rows, key=lambda r: r["date"]):
        key = (row["engine"], row.get("artifact"), row["prompt_tokens"], *_group(row))
        kept[key] = row
    return list(kept.values())


def best_torch(row: Row, rows: Sequence[Row]) -> tuple[float, float] | None:
    """(decode, prefill) of our row over the best of torch's at the same size, each the best at that; None where torch
    has no row."""
    theirs = [r for r in rows if r["kind"] == "torch" and _group(r) == _group(row)]
    if row["kind"] != "ours" or not theirs:
        return None
    decode, prefill = (row[key] / max(r[key] for r in theirs) for key in ("decode_tok_s", "prefill_tok_s"))
    return decode, prefill


def _ratio(row: Row, rows: Sequence[Row]) -> str:
    found = best_torch(row, rows)
    return "" if found is None else f"{found[0]:.2f} / {found[1]:.2f}"


def _machine(m: dict[str, Any]) -> str:
    def value(key: str, unit: str) -> list[str]:
        shown = "" if m.get(key) is None else f"{number(m[key])} ± {number(m[f'{key}_sd'])} {unit}"
        return [key.rpartition("_")[0].replace("_", " "), shown]

    units = {"copy_gb_s": "GB/s", "read_gb_s": "GB/s", "fp16_tflops": "TFLOP/s", "fp32_tflops": "TFLOP/s"}
    rows = [value(key, unit) for key, unit in units.items()]
    rows += [value("node_us", "us"), value("launch_us", "us")]
    software = ", ".join(f"{name} {version}" for name, version in m.get("versions", {"torch": m["torch"]}).items())
    head = f"#### {m['device']}\n\ndriver {m['driver']}, {software}, {m['date']}\n\n"
    return head + markdown_table(["measured", "median ± sd"], rows, left=1)


def _correctness(rows: Sequence[Row]) -> str:
    cells = [
        [
            row["artifact"],
            "" if row["error"] is None else f"{row['error']:.2e}",
            "" if row["largest"] is None else number(row["largest"]),
            "" if row["share"] is None else f"{row['share']:.1e}",
            "" if row["allowed"] is None else f"{row['allowed']:.0e}",
            " ".join(f"{s['batch']}x{s['prompt_tokens']}" for s in row["sizes"]),
            {True: "yes", False: "NO", None: ""}[row["same_ids"]],
            "ok" if row["ok"] else " ".join(filter(None, ("FAILED", row["failure"], row["message"], row["refused"]))),
        ]
        for row in rows
    ]
    headings = ["artifact", "largest error", "largest logit", "share", "allowed", "sizes", "graph = plain", ""]
    return "#### Logits beside torch's in float32\n\n" + markdown_table(headings, cells, left=1)


def table(rows: Sequence[Row]) -> str:
    """Engines by model and size, the fastest decode first."""
    order = sorted(
        rows,
        key=lambda r: (r["model"], r["quantization"], r["batch"], r["generate_tokens"], -r["decode_tok_s"]),
    )
    cells = [
        [
            f"{row['model']} {row['quantization']}",
            row["engine"],
            f"{row['batch']} x {row['prompt_tokens']} + {row['generate_tokens']}",
            with_spread(row, "prefill_tok_s"),
            with_spread(row, "decode_tok_s"),
            _ratio(row, rows),
            number(row["step_time_us"]),
            "" if row["floor_share"] is None else f"{row['floor_share']:.0%}",
            _count(row, "launches_a_token"),
            _count(row, "kernels_a_token"),
            "" if row["same_ids"] is None else f"{row['same_ids']} of {row['generate_tokens']}",
        ]
        for row in order
    ]
    headings = [
        *(
            "model",
            "engine",
            "size",
            "prefill tok/s",
            "decode tok/s",
            "x best torch",
            "us a step",
            "of floor",
            "launches",
            "kernels",
        ),
        "same ids",
    ]
    return markdown_table(headings, cells, left=3)


def _count(row: Row, key: str) -> str:
    return "" if row.get(key) is None else str(row[key])


def _notes(found: dict[str, Any]) -> str:
    rows = found["rows"]
    sources = sorted({row["floor_from"] for row in rows if row["floor_from"]})
    lines = [
        f"Median ± standard deviation of {min(row['repeats'] for row in rows)} or more rounds in which the engines "
        f"take turns, on {rows[0]['device']}, {found['date']}.",
        "Floor: a step's weights and cache read once, at the bandwidth of: " + ", ".join(sources) + ".",
        "Launches: by the host, a token; kernels: that the GPU runs for it.",
        "x best torch: decode / prefill of ours over the best of torch's modes at that size.",
        *(
            f"Failed ({row['failure']}): {row['engine']} of {row['artifact']}, "
            f"{row['batch']} x {row['prompt_tokens']} + {row['generate_tokens']}: {row['message']}"
            for row in found["failures"]
        ),
        *(() if found["complete"] else ("Not complete: the same command goes on.",)),
    ]
    return "\n\n" + "\n".join(lines)


def draw(results: Path, folder: Path) -> list[Path]:
    """Figures of the timed parts that `results` holds: a bar an engine with the floor as a line, and for `sizes` a line
    a model over the batch."""
    import matplotlib

    matplotlib.use("Agg")
    made = []
    folder.mkdir(parents=True, exist_ok=True)
    for part in PARTS:
        found = gather(results, part)
        if found and found["rows"]:
            path = folder / f"gpu-{part}.png"
            (_sizes if part == "sizes" else _bars)(found["rows"], path, TITLES[part])
            made.append(path)
    return made


def _bars(rows: Sequence[Row], path: Path, title: str) -> None:
    import matplotlib.pyplot as plt

    groups = sorted({(r["model"], r["quantization"], r["batch"], r["generate_tokens"]) for r in rows})
    heights = [sum(_group(r) == g for r in rows) for g in groups]
    figure, axes = plt.subplots(
        len(groups), 1, figsize=(9, 1.2 * len(groups) + 0.38 * sum(heights)), squeeze=False, height_ratios=heights
    )
    for axis, group in zip(axes[:, 0], groups, strict=True):
        mine = sorted((r for r in rows if _group(r) == group), key=lambda r: r["decode_tok_s"])
        names = [r["engine"] for r in mine]
        colours = ["#2a6f97" if r["kind"] == "ours" else "#b5838d" for r in mine]
        axis.barh(names, [r["decode_tok_s"] for r in mine], xerr=[r["decode_tok_s_sd"] for r in mine], color=colours)
        if floor := mine[0]["floor_tok_s"]:
            axis.axvline(floor, color="#333333", linestyle="--", linewidth=1)
        axis.set_title("{} {}, batch {}, {} tokens".format(*group), fontsize=9)
        axis.tick_params(labelsize=8)
    axes[-1, 0].set_xlabel("decoded tokens a second (dashed: every byte read once at the copy bandwidth)", fontsize=9)
    figure.suptitle(f"{title}, {rows[0]['device']}", fontsize=11)
    figure.tight_layout()
    figure.savefig(path, dpi=140)
    plt.close(figure)


def _sizes(rows: Sequence[Row], path: Path, title: str) -> None:
    import matplotlib.pyplot as plt

    generates = sorted({r["generate_tokens"] for r in rows})
    figure, axes = plt.subplots(1, len(generates), figsize=(5.5 * len(generates), 4.6), squeeze=False, sharey=True)
    for axis, generate in zip(axes[0], generates, strict=True):
        kinds = sorted({(r["model"], r["quantization"], r["kind"]) for r in rows if r["generate_tokens"] == generate})
        for model, quantization, kind in kinds:
            mine = sorted(
                (
                    r
                    for r in rows
                    if (r["model"], r["quantization"], r["kind"], r["generate_tokens"])
                    == (model, quantization, kind, generate)
                ),
                key=lambda r: r["batch"],
            )
            axis.errorbar(
                [r["batch"] for r in mine],
                [r["decode_tok_s"] for r in mine],
                yerr=[r["decode_tok_s_sd"] for r in mine],
                marker="o",
                linestyle="-" if kind == "ours" else ":",
                label=f"{model} {quantization} {kind}",
            )
        axis.set(xscale="log", yscale="log", xlabel="batch", title=f"{generate} tokens")
        axis.legend(fontsize=7)
    axes[0, 0].set_ylabel("decoded tokens a second, whole batch")
    figure.suptitle(f"{title}, {rows[0]['device']}", fontsize=11)
    figure.tight_layout()
    figure.savefig(path, dpi=140)
    plt.close(figure)


def _group(row: Row) -> tuple[Any, ...]:
    return row["model"], row["quantization"], row["batch"], row["generate_tokens"]


def extras(results: Path) -> list[str]:
    """Sections of the parts that are not timed engines: kernels, replays, sanitizer."""
    sections = []
    if found := read(results / "kernels.json"):
        sections.append(_kernels(found["rows"]))
    if found := read(results / "replays.json"):
        cells = [
            [row["artifact"], *(str(row.get(k, "")) for k in ("replays", "stretches_with_other_ids"))]
            + [number(row[k]) if k in row else "" for k in ("gpu_growth_mb", "host_growth_mb")]
            + ["ok" if row["ok"] else f"FAILED {row.get('message') or row.get('refused') or ''}".strip()]
            for row in found["rows"]
        ]
        headings = ["artifact", "replays", "stretches with other ids", "GPU grew MB", "host grew MB", ""]
        sections.append("#### Replays of the decode graph\n\n" + markdown_table(headings, cells, left=1))
    if found := read(results / "sanitizer.json"):
        cells = [
            [row["artifact"], row["tool"], row["summary"], "ok" if row["ok"] else f"FAILED {row['message']}"]
            for row in found["rows"]
        ]
        nothing = found.get("missing", "nothing was run") + "."
        text = markdown_table(["artifact", "tool", "summary", ""], cells, left=3) if cells else nothing
        sections.append("#### compute-sanitizer\n\n" + text)
    return sections


def _kernels(rows: Sequence[Row]) -> str:
    measured = [row for row in rows if row["ok"]]
    heads = [
        [
            row["artifact"],
            number(row["head"]["us"]),
            number(row["head"]["gb_s"]),
            "" if row["head"]["share"] is None else f"{row['head']['share']:.0%}",
            f"{row['head']['wanted']:.0%}",
        ]
        for row in measured
    ]
    products = [
        [
            row["artifact"],
            p["product"],
            f"{p['m']} x {p['n']} x {p['k']}",
            number(p["us"]),
            number(p["torch_us"]),
            f"{p['ratio']:.2f}",
        ]
        for row in measured
        for p in row["products"]
    ]
    parts = [
        "#### Kernels alone",
        markdown_table(["LM head of", "us", "GB/s", "of copy", "wanted"], heads, left=1),
        markdown_table(["products of", "layer", "m x n x k", "ours us", "torch us", "torch / ours"], products, left=3),
        "Ours has bias, activation and residual in it; torch's is the product alone, by cuBLAS on a GPU.",
        *(f"Failed: {row['artifact']}: {row['message']}" for row in rows if not row["ok"]),
    ]
    return "\n\n".join(parts)
