"""Numbers for people, the same in the page and in the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gpt2_tvm.expressions import Text

if TYPE_CHECKING:
    from tuning.report.facts import FunctionReport

UNKNOWN = "–"
# What `tuning.static` may know of a kernel, in the order of the page: (key, heading)
RESOURCES = (
    ("registers", "registers a thread"),
    ("shared_bytes", "shared memory as compiled, bytes a block"),
    ("spill_bytes", "spilled, bytes"),
    ("widest_load_bytes", "widest load, bytes"),
    ("vector_bits", "widest vector, bits"),
    ("threads", "threads a block"),
    ("occupancy", "occupancy"),
    ("instructions", "instructions"),
    ("notes", "notes"),
)
TOP_INSTRUCTIONS = 6
OTHER_SHARED = (
    "Shared memory as compiled is not what the TIR asks for: the compiler adds room for sums across threads, and gives "
    "buffers that are never needed at once the same room."
)


def amount(value: float | None, unit: str = "") -> str:
    """With a prefix: 3.55 M, 817 k; bytes and FLOP alike count in powers of ten."""
    if value is None:
        return UNKNOWN
    for size, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}".rstrip()


def ratio(value: float | None) -> str:
    """Three digits at least, without an exponent; a dash for None."""
    return UNKNOWN if value is None else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def launch(extents: list[Text] | None) -> str:
    """A grid or block without its trailing ones: "144", "32 × 16"; "" where there is none."""
    if extents is None:
        return ""
    shown = list(extents)
    while len(shown) > 1 and shown[-1] == 1:
        shown.pop()
    return " × ".join(str(extent) if isinstance(extent, int) else f"({extent})" for extent in shown)


def resource_table(function: FunctionReport, kind: str) -> dict[str, Any]:
    """{columns: a heading a kernel, of the function's own rule and then of baseline; rows: (what, a cell a kernel);
    title: for which architecture that was compiled; note: where it matters, why shared memory is not what TIR asks}.

    Rows of which nothing is known are left out; so are columns of kernels that nothing is known about.
    """
    columns: list[str] = []
    kernels: list[dict[str, Any]] = []
    for version in (function.after, function.baseline):
        if version is None:
            continue
        for i, row in enumerate(version.resources):
            count = len(version.resources)
            columns.append(f"{version.rule}, kernel {i + 1} of {count}" if count > 1 else version.rule)
            kernels.append(row)
    rows = [
        (heading, [_cell(key, kernel.get(key)) for kernel in kernels])
        for key, heading in RESOURCES
        if any(kernel.get(key) not in (None, (), {}, "") for kernel in kernels)
    ]
    own = [row.get("shared_bytes") or 0 for row in function.after.resources]
    asked = function.shared_memory_bytes
    differs = bool(own) and isinstance(asked, int) and max(own) != asked
    return {
        "columns": columns,
        "rows": rows,
        "title": _title(kernels, kind),
        "note": OTHER_SHARED if differs and kind != "cpu" else "",
    }


def _title(kernels: list[dict[str, Any]], kind: str) -> str:
    if kind in ("webgpu", "metal"):  # compiled where they run
        return "by the shader's source"
    archs = dict.fromkeys(str(kernel["arch"]) for kernel in kernels if kernel.get("arch"))
    return f"as compiled for {', '.join(archs)}" if archs else ""


def _cell(key: str, value: Any) -> str:
    if value is None:
        return UNKNOWN
    if key == "occupancy":
        return f"{value:.0%}" if isinstance(value, float) else str(value)
    if key == "instructions" and isinstance(value, dict):
        named = {name: count for name, count in value.items() if name != "total" and not name.startswith("loop.")}
        top = sorted(named.items(), key=lambda item: -item[1])[:TOP_INSTRUCTIONS]
        parts = [f"{name} {count}" for name, count in top]
        return f"{value['total']} in all: {', '.join(parts)}" if "total" in value else ", ".join(parts)
    if isinstance(value, (list, tuple)):
        return "; ".join(map(str, value))
    return f"{value:,}" if isinstance(value, int) else str(value)
