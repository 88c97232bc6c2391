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
TILE_WIDTH, AXIS, BETWEEN = 340, 20, 8  # of the picture of a tile; AXIS: what the mark of S takes
MIN_CELL = 3.0  # pixels between lines that still read as a grid


def draw_nest(nodes: tuple[Node, ...], title: str = "", standalone: bool = False) -> str:
    """The loop nest as an SVG element; `standalone` carries its own colours (for a notebook or a file)."""
    width = INNERMOST + 2 * INDENT * _depth(nodes)
    parts: list[str] = []
    height = _draw_all(parts, nodes, 1, 1, width - 2, 0) + 1
    return _svg(parts, width, height, title or "loop nest", "nest", standalone)


def draw_tile(tile: Tile, standalone: bool = False) -> str:
    """How a kernel cuts its matrix, in three pictures under their captions: a block's rows and one step of it, the
    threads of a step, the elements of a thread. In all three S runs down and R to the right."""
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
    parts: list[str] = [f'<g class="tile"{_data(facts)}>']
    inner = TILE_WIDTH - AXIS - 1
    y = _tile_matrix(parts, tile, inner)
    y = _tile_threads(parts, tile, inner, y + BETWEEN)
    y = _tile_elements(parts, tile, inner, y + BETWEEN)
    parts.append("</g>")
    return _svg(parts, TILE_WIDTH, y + 1, f"how {tile.buffer} is cut among threads", "tiles", standalone)


def _tile_matrix(parts: list[str], tile: Tile, inner: float) -> float:
    rows, columns, high = tile.ts * tile.tile_s, tile.tr * tile.tile_r, 80.0
    exact = high * min(1.0, rows / tile.rows)
    band, step = max(5.0, exact), max(4.0, inner * min(1.0, columns / tile.columns))
    mine = f"a block's {_times(rows, 'row')}; {_times(tile.blocks, 'block')} in all"
    glosses = [f"light blue: {mine}", f"green: one of its {tile.steps} steps, {columns} columns"]
    if step >= inner:  # the green covers all of the blue
        glosses = [f"green: {mine}", "a block takes its columns in one step"]
    if band > exact:
        glosses.append("(the band is drawn taller than it is)")
    y = _caption(parts, 0, f"the matrix: {tile.rows} × {tile.columns} (S × R), {tile.dtype}", *glosses)
    y = _axes(parts, y, high)
    parts.append(_rect("matrix", AXIS, y, inner, high) + _rect("band", AXIS, y, inner, band))
    parts.append(_rect("step", AXIS, y, step, band))
    return y + high


def _tile_threads(parts: list[str], tile: Tile, inner: float, y: float) -> float:
    cell_w = inner / tile.tr
    cell_h = max(min(14.0, 2 * cell_w, 160 / tile.ts), 1.5)
    tall = cell_h * tile.ts
    head = f"a block's threads: TS {tile.ts} × TR {tile.tr}"
    where = f"S on {tile.tag_s or 'no axis'}, R on {tile.tag_r or 'no axis'}"
    y = _axes(parts, _caption(parts, y, head, where, "orange: one thread"), tall)
    parts.append(_rect("threads", AXIS, y, inner, tall) + _grid(AXIS, y, inner, tall, tile.tr, tile.ts))
    parts.append(_rect("one", AXIS, y, max(cell_w, 2), cell_h))
    return y + max(tall, LINE)


def _tile_elements(parts: list[str], tile: Tile, inner: float, y: float) -> float:
    size = min(22.0, inner / max(tile.tile_r, 1))
    high = size * tile.tile_s
    vectors = f"in vectors of {tile.vec} (the heavy frames)" if tile.vec > 1 else "one element at a time"
    head = f"a thread's part of a step: TILE_S {tile.tile_s} × TILE_R {tile.tile_r}"
    y = _axes(parts, _caption(parts, y, head, vectors), high)
    parts.append(_rect("elements", AXIS, y, size * tile.tile_r, high))
    parts.append(_grid(AXIS, y, size * tile.tile_r, high, tile.tile_r, tile.tile_s))
    if tile.vec > 1:
        for i in range(max(1, tile.tile_r // tile.vec)):
            parts.append(_rect("vec", AXIS + i * tile.vec * size, y, tile.vec * size, high))
    return y + max(high, LINE)


def text_nest(nodes: tuple[Node, ...]) -> str:
    """The loop nest as lines of text, for a terminal."""
    lines: list[str] = []

    def add(nodes: tuple[Node, ...], depth: int) -> None:
        for node in nodes:
            if isinstance(node, Loop):
                lines.append("  " * depth + _loop_label(node) + f"  {node.variable}  {_note(node)}".rstrip())
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
        note = _note(node)
        rest = f"{note} · {node.variable}" if note else node.variable  # of the two a name may be cut
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
        reads = ", ".join(place.buffer for place in node.reads if place not in node.writes)
        cls, title = "stage", f"{node.name}: {', '.join(map(_place_label, node.writes))}{' ← ' if reads else ''}{reads}"
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
            return f"unrolled up to {note.rpartition(' ')[2]} steps"
        if note.startswith("software_pipeline_stage"):
            return "software pipeline"
    return ""


def _depth(nodes: tuple[Node, ...]) -> int:
    return max((1 + _depth(node.children) for node in nodes), default=0)


def _caption(parts: list[str], y: float, head: str, *glosses: str) -> float:
    """What stands above a picture of a tile; returns where the picture may begin."""
    parts.append(_text(0, y + 13, head, "head", TILE_WIDTH))
    for i, gloss in enumerate(glosses, 1):
        parts.append(_text(0, y + 13 + 14 * i, gloss, "dim", TILE_WIDTH))
    return y + 18 + 14 * len(glosses)


def _axes(parts: list[str], y: float, high: float) -> float:
    """Marks of the axes left of a picture and above it; returns the picture's top."""
    parts.append(_text(AXIS, y + 11, "R →", "dim", 40))
    parts.append(_text(0, y + 15 + min(high / 2 + 4, 48), "S↓", "dim", 40))
    return y + 15


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
