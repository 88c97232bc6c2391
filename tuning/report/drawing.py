"""Pictures as SVG: the loop nest of a function, and how a matrix-vector kernel cuts its matrix.

A loop is a box around what it repeats, coloured by what runs its iterations: blocks of a grid, threads, vector lanes,
or one thread in turn. A statement names the buffers it fills, coloured by where they live. Every box carries its facts
as data attributes, so that a program can read the picture too. Colours are CSS classes: `templates/drawing.css`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from html import escape
from pathlib import Path

from gpt2_tvm.expressions import Text
from tuning.report.loops import Branch, Loop, Node, Place, Stage
from tuning.report.tile import Tile

DARK = re.compile(r"@media[^{]*\{.*?\}\}\n?", re.S)
TEMPLATES = Path(__file__).parent / "templates"
CHARACTER = 6.7  # width of a character in the drawings' font, pixels
LINE, UNIT_LINE, PAD, INDENT = 19, 15, 4, 9
INNERMOST = 270  # width that the deepest box keeps
MAX_PLACES = 3  # buffers named in one statement; the rest are counted
MIN_CELL = 3.0  # pixels between lines that still read as a grid


def draw_nest(nodes: tuple[Node, ...], title: str = "", standalone: bool = False) -> str:
    """The loop nest as an SVG element; `standalone` carries its own colours (for a notebook or a file)."""
    width = INNERMOST + 2 * INDENT * _depth(nodes)
    parts: list[str] = []
    height = _draw_all(parts, nodes, 1, 1, width - 2, 0) + 1
    return _svg(parts, width, height, title or "loop nest", "nest", standalone)


def draw_tile(tile: Tile, standalone: bool = False) -> str:
    """How a kernel cuts its matrix, in three steps: a block's part, a block's threads, a thread's elements."""
    width, margin = 340, 1
    inner = width - 2 * margin
    parts: list[str] = []
    facts = {
        "ts": tile.ts,
        "tr": tile.tr,
        "tile-s": tile.tile_s,
        "tile-r": tile.tile_r,
        "vec": tile.vec,
        "steps": tile.steps,
        "blocks": tile.blocks,
        "rows": tile.rows,
        "columns": tile.columns,
        "tag-s": tile.tag_s,
        "tag-r": tile.tag_r,
    }
    parts.append(f'<g class="tile"{_data(facts)}>')
    y = _caption(parts, margin, 0, f"matrix {tile.rows} × {tile.columns} (S × R), {tile.dtype}")
    share_s = min(1.0, tile.ts * tile.tile_s / tile.rows)
    share_r = min(1.0, tile.tr * tile.tile_r / tile.columns)
    band, step = max(5.0, 80 * share_s), max(4.0, inner * share_r)
    parts.append(_rect("matrix", margin, y, inner, 80) + _rect("band", margin, y, inner, band))
    parts.append(_rect("step", margin, y, step, band))
    y = _caption(
        parts,
        margin,
        y + 82,
        f"a block: {tile.ts * tile.tile_s} rows, {_times(tile.steps, 'step')} of {tile.tr * tile.tile_r} columns",
        f"{_times(tile.blocks, 'block')} in the grid",
    )
    cell_w = inner / tile.tr
    cell_h = max(min(14.0, 2 * cell_w, 160 / tile.ts), 1.5)
    tall = cell_h * tile.ts
    parts.append(_rect("threads", margin, y, inner, tall) + _grid(margin, y, inner, tall, tile.tr, tile.ts))
    parts.append(_rect("one", margin, y, max(cell_w, 2), cell_h))
    y = _caption(
        parts,
        margin,
        y + tall + 2,
        f"its threads: TS {tile.ts} × TR {tile.tr}",
        f"S on {tile.tag_s or 'no axis'}, R on {tile.tag_r or 'no axis'}",
    )
    size = min(22.0, inner / max(tile.tile_r, 1))
    high = min(size, 22.0) * tile.tile_s
    parts.append(_rect("elements", margin, y, size * tile.tile_r, high))
    parts.append(_grid(margin, y, size * tile.tile_r, high, tile.tile_r, tile.tile_s))
    if tile.vec > 1:
        for i in range(max(1, tile.tile_r // tile.vec)):
            parts.append(_rect("vec", margin + i * tile.vec * size, y, tile.vec * size, high))
    vectors = f"in vectors of {tile.vec} (the heavy frames)" if tile.vec > 1 else "one element at a time"
    y = _caption(parts, margin, y + high + 2, f"a thread's part: TILE_S {tile.tile_s} × TILE_R {tile.tile_r}", vectors)
    parts.append("</g>")
    return _svg(parts, width, y, f"how {tile.buffer} is cut among threads", "tiles", standalone)


def text_nest(nodes: tuple[Node, ...]) -> str:
    """The loop nest as lines of text, for a terminal."""
    lines: list[str] = []

    def add(nodes: tuple[Node, ...], depth: int) -> None:
        for node in nodes:
            if isinstance(node, Loop):
                lines.append("  " * depth + _loop_label(node) + f"  {node.variable}" + _note(node))
            elif isinstance(node, Branch):
                lines.append("  " * depth + f"if {node.condition}")
            else:
                targets = ", ".join(_place_label(place) for place in node.writes)
                sign = "+=" if node.reduces else "="
                reads = ", ".join(place.buffer for place in node.reads if place not in node.writes)
                what = f"{targets} {sign} {reads or '...'}" if targets else ", ".join(node.calls) or node.name
                lines.append("  " * depth + (f"[{node.name}] " if node.name else "") + what)
            add(node.children, depth + 1)

    add(nodes, 0)
    return "\n".join(lines)


def _draw_all(parts: list[str], nodes: Iterable[Node], x: float, y: float, width: float, depth: int) -> float:
    for i, node in enumerate(nodes):
        y = _draw(parts, node, x, y + (PAD if i else 0), width, depth)
    return y


def _draw(parts: list[str], node: Node, x: float, y: float, width: float, depth: int) -> float:
    """Draw a node with its top at y; returns its bottom."""
    at = len(parts)
    parts.append("")  # the box, whose height its children decide
    if isinstance(node, Loop):
        unit = node.extent == 1
        line = UNIT_LINE if unit else LINE
        label = _loop_label(node) + (f"  (×{node.repeats} such loops)" if node.repeats > 1 else "")
        parts.append(_text(x + 5, y + line - 5, label, "head", width - 10))
        room = width - 16 - CHARACTER * len(label)
        rest = node.variable + _note(node)
        if room > 30:
            parts.append(_text(x + 12 + CHARACTER * len(label), y + line - 5, rest, "dim", room))
        facts = {
            "kind": node.kind,
            "axis": node.axis,
            "extent": node.extent,
            "variable": node.variable,
            "depth": depth,
            "notes": "; ".join(node.notes),
        }
        cls, title, top = f"loop {node.kind}{' unit' if unit else ''}", f"{label} {rest}", y + line
    elif isinstance(node, Branch):
        parts.append(_text(x + 5, y + LINE - 5, f"if {node.condition}", "dim", width - 10))
        facts = {"depth": depth}
        cls, title, top = "branch", f"if {node.condition}", y + LINE
    else:
        top = _statement(parts, node, x, y, width)
        facts = {"name": node.name, "writes": " ".join(place.buffer for place in node.writes), "depth": depth}
        cls, title = "stage", f"{node.name}: {', '.join(map(_place_label, node.writes))}"
    bottom = _draw_all(parts, node.children, x + INDENT, top, width - 2 * INDENT, depth + 1) if node.children else top
    bottom += PAD
    parts[at] = (
        f'<g class="{cls}"{_data(facts)}><title>{escape(title)}</title>'
        f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{bottom - y:g}" rx="3"/>'
    )
    parts.append("</g>")
    return bottom


def _statement(parts: list[str], stage: Stage, x: float, y: float, width: float) -> float:
    times = f" ×{stage.repeats}" if stage.repeats > 1 else ""
    head = stage.name or ("" if stage.writes else ", ".join(stage.calls))
    if head or times:
        verb = f" ({', '.join(stage.calls)})" if stage.calls and stage.name else ""
        parts.append(_text(x + 5, y + LINE - 5, f"{head or 'statements'}{times}{verb}", "head", width - 10))
        y += LINE
    for place in stage.writes[:MAX_PLACES]:
        cls = f"chip {scope_class(place.scope)}"
        where = _place_where(place)
        room = width - 28 - CHARACTER * len(where)
        parts.append(_rect(cls, x + 5, y + 2, 7, 11))
        parts.append(_text(x + 17, y + LINE - 7, f"{'+=' if stage.reduces else '='} {place.buffer}", "", room))
        if where:
            parts.append(f'<text x="{x + width - 5:g}" y="{y + LINE - 7:g}" text-anchor="end">{escape(where)}</text>')
        y += LINE - 3
    more = len(stage.writes) - MAX_PLACES
    reads = [place for place in stage.reads if place not in stage.writes]
    if more > 0:
        parts.append(_text(x + 17, y + LINE - 7, f"and {more} more", "dim", width - 24))
        y += LINE - 3
    if reads:
        parts.append(_text(x + 17, y + LINE - 7, "← " + ", ".join(p.buffer for p in reads), "dim", width - 24))
        y += LINE - 3
    return y


def scope_class(scope: str) -> str:
    """The CSS class of a memory scope: global, shared, local, or matrix (fragments of a matrix unit)."""
    if scope.startswith("shared"):
        return "shared"
    if scope.startswith(("wmma", "metal.simdgroup", "m16n8k8")):
        return "matrix"
    return "local" if scope.startswith("local") else "global"


def place_bytes(nbytes: Text | None) -> str:
    """A buffer's bytes for people, "" where they are not known."""
    if nbytes is None:
        return ""
    if not isinstance(nbytes, int):
        return f"{nbytes} B"
    return f"{nbytes} B" if nbytes < 10240 else f"{nbytes / 1024:.4g} KiB"


def _place_where(place: Place) -> str:
    """Where a buffer lives, with its size: "shared, 512 B"; "" for the function's results."""
    if not place.staged and place.bytes is None:
        return ""
    size = place_bytes(place.bytes) if isinstance(place.bytes, int) else ""
    return f"{place.scope if place.staged else 'temporary'}{', ' + size if size else ''}"


def _place_label(place: Place) -> str:
    where = _place_where(place)
    return f"{place.buffer} ({where})" if where else place.buffer


def _loop_label(loop: Loop) -> str:
    return f"{loop.axis or loop.kind} × {loop.extent}"


def _note(loop: Loop) -> str:
    for note in loop.notes:
        if note.startswith("pragma_auto_unroll_max_step"):
            return f"  unrolled up to {note.rpartition(' ')[2]} steps"
        if note.startswith("software_pipeline_stage"):
            return "  software pipeline"
    return ""


def _depth(nodes: tuple[Node, ...]) -> int:
    return max((1 + _depth(node.children) for node in nodes), default=0)


def _caption(parts: list[str], x: float, y: float, first: str, second: str = "") -> float:
    parts.append(_text(x, y + 13, first, "head", 400))
    if second:
        parts.append(_text(x, y + 27, second, "dim", 400))
    return y + (34 if second else 19)


def _times(count: int, what: str) -> str:
    return f"{count} {what}{'s' if count != 1 else ''}"


def _grid(x: float, y: float, width: float, height: float, columns: int, rows: int) -> str:
    """The lines between the cells; along an axis where they would run together, none."""
    path = ""
    if columns > 1 and width / columns >= MIN_CELL:
        path += "".join(f"M{x + i * width / columns:.4g} {y:g}v{height:g}" for i in range(1, columns))
    if rows > 1 and height / rows >= MIN_CELL:
        path += "".join(f"M{x:g} {y + i * height / rows:.4g}h{width:g}" for i in range(1, rows))
    return f'<path class="lines" d="{path}"/>' if path else ""


def _rect(cls: str, x: float, y: float, width: float, height: float) -> str:
    return f'<rect class="{cls}" x="{x:g}" y="{y:g}" width="{width:.4g}" height="{height:.4g}"/>'


def _text(x: float, y: float, text: str, cls: str, width: float) -> str:
    room = max(4, int(width / CHARACTER))
    shown = text if len(text) <= room else text[: room - 1] + "…"
    css = f' class="{cls}"' if cls else ""
    return f'<text x="{x:g}" y="{y:g}"{css}>{escape(shown)}</text>'


def _data(facts: Mapping[str, object]) -> str:
    return "".join(f' data-{key}="{escape(str(value))}"' for key, value in facts.items() if value != "")


def _svg(parts: list[str], width: float, height: float, title: str, cls: str, standalone: bool) -> str:
    style = ""
    if standalone:  # on white paper, because what it will stand on is not known
        css = (TEMPLATES / "drawing.css").read_text(encoding="utf-8")
        style = f"<style>{DARK.sub('', css)}.drawing{{background:#fff}}</style>"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="drawing {cls}" role="img" aria-label="{escape(title)}" '
        f'width="{width:g}" height="{height:g}" viewBox="0 0 {width:g} {height:g}">{style}{"".join(parts)}</svg>'
    )
