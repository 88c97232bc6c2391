"""The static table: a row a kernel, with the rule that made it, what it is for, how often the model calls it, and what
its code is made of. Nothing here needs the device.
"""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from gpt2_tvm.errors import UserError

if TYPE_CHECKING:
    from gpt2_tvm.build import Plan, Progress
    from gpt2_tvm.pipeline import Lowered

Row = dict[str, Any]

FORMATS = ("md", "csv", "json")
DECODE, PREFILL = "greedy_b", "prefill"
COLUMNS = (  # key, heading of the Markdown table
    ("function", "function"),
    ("rule", "rule"),
    ("calls", "calls: prefill / token"),
    ("threads", "threads"),
    ("registers", "registers"),
    ("shared_bytes", "shared B"),
    ("spill_bytes", "spill B"),
    ("widest_load_bytes", "load B"),
    ("vector_bits", "vector bits"),
    ("occupancy", "occupancy"),
    ("instructions", "instructions"),
)
# What the Markdown table shows of the instructions, and in which order; JSON and CSV have all of them.
SHOWN = {
    "cuda": (
        *("HMMA", "HGMMA", "IMMA", "FFMA", "HFMA2", "MUFU", "LDG.128", "LDG.64", "LDG.32", "LDG.16", "LDG.8"),
        *("LDGSTS.128", "LDSM", "LDS.128", "BAR", "SHFL"),
    ),
    "rocm": (
        *("mfma", "wmma", "dot", "fma", "fma_mix", "transcendental", "convert"),
        *("global_load.128", "global_load.64", "global_load.32", "global_load.16", "barrier", "shuffle"),
    ),
    "webgpu": ("fma", "global_load", "shared_load", "barrier", "transcendental", "loop", "bindings"),
    "metal": ("simdgroup_multiply", "global_load", "shared_load", "barrier", "shuffle", "transcendental", "loop"),
    "cpu": ("loop.fma", "loop.mul", "loop.add", "loop.convert", "loop.load", "loop.store", "loop.stack", "loop.total"),
}


def static_rows(
    model: str = "gpt2",
    target: str = "cpu",
    rules: str = "full",
    quantization: str = "q0f32",
    attention: str = "flash",
    *,
    batch_sizes: Sequence[int] = (1,),
    verify_widths: Sequence[int] | None = None,
    max_seq_len: int | None = None,
    pipelines: bool = False,
    progress: Progress | None = None,
    passes: str = "all",
) -> list[Row]:
    """Compile `model` for `target` without its weights, and say what each kernel is made of.

    The arguments are those of `build.compile_model`; pipelines: for webgpu, also have the WebGPU of this machine
    compile every shader, and note those that it refuses or does not finish. Returns a row a kernel (with several
    architectures in one library, a row for each) in the order of the manifest's functions:
    function, role, rule, calls {exported function: times it is called}, kernels (of the function), launched (by one
    call of it, fewer where the host takes one of several), grid (of this kernel), kind (of the target), and the
    fields of `KernelResources`.

    Raises UserError for a choice that is wrong and for a compiler or tool that is missing; what TVM raises where a
    rule set does not compile passes through.
    """
    from gpt2_tvm import build, toolchains
    from gpt2_tvm.checkpoint import resolve_model
    from targets import load_target, specialise

    say = progress or (lambda what, share: None)
    device = specialise(load_target(target))
    widths = build.VERIFY_WIDTHS if verify_widths is None else verify_widths
    config = resolve_model(str(model)).config
    sizes = (batch_sizes, max_seq_len, widths)
    plan = build.make_plan(config, device, quantization, rules, attention, *sizes, passes=passes)
    toolchains.prepare(plan.target)
    say("importing TVM", 0.02)

    with toolchains.compiling(plan.target) as tvm_target:
        say("lowering and scheduling", 0.1)
        lowered, _ = build.lower_plan(plan)
        say(f"building {len(lowered.hits)} functions for {plan.target.name}", 0.3)
        executable = toolchains.build(lowered.final, tvm_target)
        say("reading the code", 0.8)
        rows = rows_of(plan, lowered, executable)
        return _with_pipelines(rows, executable) if pipelines and plan.target.kind == "webgpu" else rows


def _with_pipelines(rows: list[Row], executable: Any) -> list[Row]:
    """The rows, with a note on each kernel that no pipeline can be made of here."""
    from gpt2_tvm.toolchains import modules
    from tuning.static.pipelines import refused

    faults = refused(modules.sources(executable, "webgpu"))
    for row in rows:
        if row["kernel"] in faults:
            row["notes"].append(f"no pipeline: {faults[row['kernel']]}")
    return rows


def rows_of(plan: Plan, lowered: Lowered, executable: Any, library: bytes | None = None) -> list[Row]:
    """`static_rows` of a module that is compiled already; `library` as for `kernel_resources`."""
    from gpt2_tvm.inventory import function_table, launch_shapes
    from tuning.static.resources import kernel_resources, place_of

    by_function: dict[str, list[Row]] = {}
    for record in kernel_resources(plan, lowered, executable, library).values():
        by_function.setdefault(record.function, []).append(asdict(record))
    bodies = {var.name_hint: func for var, func in lowered.scheduled.functions_items()}
    rows = []
    for function in function_table(lowered, plan)["functions"]:
        told = {key: function[key] for key in ("role", "rule", "calls", "kernels", "launched", "grid")}
        grids = [grid for grid, _ in launch_shapes(bodies[function["name"]])] if told["grid"] else []
        own = by_function.get(function["name"], [])
        archs = list(dict.fromkeys(row["arch"] for row in own))
        # as the function launches them, one architecture after another
        for row in sorted(own, key=lambda row: (archs.index(row["arch"]), place_of(row["kernel"]))):
            place = place_of(row["kernel"])
            grid = grids[place] if place < len(grids) else told["grid"]
            rows.append({**row, **told, "grid": grid, "kind": plan.target.kind, "notes": list(row["notes"])})
    return rows


def summary(rows: Sequence[Row]) -> Row:
    """A rule set in one line: of `static_rows`, or of those of one architecture where there are several.

    Keys: functions; kernels; hits {rule: functions it took}; launches_prefill and launches_token (kernels that one
    prefill and one greedy step at the smallest batch launch; on a CPU calls); registers_max, shared_max_bytes,
    occupancy_min; spilling (names of kernels with local memory or stack in the hottest loop) and spill_max_bytes;
    token_loads {widest load in bytes: launches a token whose kernel has it}; instructions (of all kernels together).
    None where no row knows it.
    """
    arch = rows[0]["arch"] if rows else ""
    own = [row for row in rows if row["arch"] == arch]
    functions = {row["function"]: row for row in own}
    decode = _decode_function(own)
    instructions: Counter[str] = Counter()
    loads: Counter[int] = Counter()
    for row in own:
        instructions.update(row["instructions"])
        if row["widest_load_bytes"] and row["calls"].get(decode):
            loads[row["widest_load_bytes"]] += row["calls"][decode]
    return {
        "arch": arch,
        "functions": len(functions),
        "kernels": len(own),
        "hits": dict(Counter(row["rule"] for row in functions.values()).most_common()),
        "launches_prefill": sum(row["calls"].get(PREFILL, 0) * row["launched"] for row in functions.values()),
        "launches_token": sum(row["calls"].get(decode, 0) * row["launched"] for row in functions.values()),
        "registers_max": _most(row["registers"] for row in own),
        "shared_max_bytes": _most(row["shared_bytes"] for row in own),
        "occupancy_min": min((row["occupancy"] for row in own if row["occupancy"] is not None), default=None),
        "spilling": [row["kernel"] for row in own if row["spill_bytes"]],
        "spill_max_bytes": _most(row["spill_bytes"] for row in own),
        "token_loads": dict(sorted(loads.items(), reverse=True)),
        "instructions": dict(instructions),
    }


def _decode_function(rows: Sequence[Row]) -> str:
    """The greedy step of the smallest batch among the functions that call these kernels."""
    names = {name for row in rows for name in row["calls"] if name.startswith(DECODE)}
    return min(names, key=lambda name: int(name.removeprefix(DECODE)), default="")


def _most(values: Iterable[int | None]) -> int | None:
    return max((value for value in values if value is not None), default=None)


def render(rows: Sequence[Row], format_: str = "md") -> str:
    """The table as Markdown (`COLUMNS`, and a summary beneath), CSV (every field, instructions as "FFMA 24; ..."), or
    JSON ({"rows", "summary", "unknown"}). Raises UserError for another format."""
    if format_ == "json":
        return json.dumps({"rows": list(rows), "summary": summary(rows), "unknown": _unknown(rows)}, indent=1) + "\n"
    if format_ == "csv":
        return _csv(rows)
    if format_ == "md":
        return _markdown(rows)
    raise UserError(f"unknown format {format_!r}; choose {', '.join(FORMATS)}")


def _unknown(rows: Sequence[Row]) -> dict[str, str]:
    from tuning.static.resources import UNKNOWN

    return UNKNOWN[rows[0]["kind"]] if rows else {}


def _csv(rows: Sequence[Row]) -> str:
    text = io.StringIO()
    fields = list(rows[0]) if rows else []
    writer = csv.DictWriter(text, fields, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        flat = dict(row)
        for key in ("instructions", "calls"):
            flat[key] = "; ".join(f"{name} {count}" for name, count in row[key].items())
        flat["notes"] = "; ".join(row["notes"])
        flat["grid"] = "x".join(map(str, row["grid"] or ()))
        writer.writerow(flat)
    return text.getvalue()


def _markdown(rows: Sequence[Row]) -> str:
    from gpt2_tvm.measure.tables import markdown_table

    if not rows:
        return "no kernels\n"
    archs = list(dict.fromkeys(row["arch"] for row in rows))
    parts = []
    for arch in archs:
        own = [row for row in rows if row["arch"] == arch]
        unknown = _unknown(own)
        columns = [(key, heading) for key, heading in COLUMNS if key not in unknown and _known(key, own)]
        decode = _decode_function(own)
        cells = [[_cell(row, key, decode) for key, _ in columns] for row in own]
        title = f"{arch}\n\n" if len(archs) > 1 else ""
        parts.append(title + markdown_table([heading for _, heading in columns], cells, left=2))
        notes = [f"- {row['kernel']}: {note}" for row in own for note in row["notes"]]
        parts.append(_told(summary(own)) + "".join(f"\n{line}" for line in notes))
        parts += [f"{key}: {why}." for key, why in unknown.items()] if arch == archs[-1] else []
    return "\n".join(parts) + "\n"


def _known(key: str, rows: Sequence[Row]) -> bool:
    return key in ("function", "rule", "calls", "instructions") or any(row[key] is not None for row in rows)


def _cell(row: Row, key: str, decode: str) -> str:
    if key == "function":
        return str(row["function"] if row["kernels"] == 1 or row["kind"] == "cpu" else row["kernel"])
    if key == "calls":
        return f"{row['calls'].get(PREFILL, 0)} / {row['calls'].get(decode, 0)}"
    if key == "instructions":
        shown = [(name, row["instructions"].get(name)) for name in SHOWN[row["kind"]]]
        return ", ".join(f"{name} {count}" for name, count in shown if count)
    if key == "occupancy":
        return "" if row[key] is None else f"{row[key]:.0%}"
    return "" if row[key] is None else str(row[key])


def _told(found: Row) -> str:
    """A summary in words, a line each."""
    hits = ", ".join(f"{rule} {count}" for rule, count in found["hits"].items())
    lines = [
        f"rules: {hits}",
        f"launches: {found['launches_prefill']} a prefill, {found['launches_token']} a token",
    ]
    if found["token_loads"]:
        loads = ", ".join(f"{size} B {count}" for size, count in found["token_loads"].items())
        lines.append(f"widest load of the kernels that a token launches: {loads}")
    if found["registers_max"] is not None:
        lines.append(f"registers: at most {found['registers_max']}")
    if found["spill_max_bytes"] is not None:
        spilling = found["spilling"]
        lines.append(
            f"spills: {len(spilling)} kernels, at most {found['spill_max_bytes']} bytes" if spilling else "spills: none"
        )
    return "\n".join(lines)
