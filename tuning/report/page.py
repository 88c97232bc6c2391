"""A report as one HTML page that needs nothing else: no network, no other file. Templates are in `templates/`."""

from __future__ import annotations

import re
from functools import lru_cache
from html import escape
from typing import TYPE_CHECKING, Any

from tuning.report import difference
from tuning.report.drawing import TEMPLATES, draw_nest, draw_tile, scope_class
from tuning.report.glosses import used
from tuning.report.numbers import amount, launch, ratio, resource_table

if TYPE_CHECKING:
    from tuning.report.facts import FunctionReport, Report

SOURCE_LINES = 240  # of one function's generated code in a page of the whole model
MAX_DEPTH = 24  # indentation that page.css has classes for
LEXERS = {"cuda": "cuda", "metal": "cpp", "webgpu": "wgsl", "rocm": "gas", "cpu": "gas"}

# Words of TVMScript that decide where and how a loop runs, in the drawings' colours.
_TIR = re.compile(
    r"(?P<comment>#.*$)"
    r"|(?P<kind>T\.(?:thread_binding|vectorized|unroll|parallel|sblock_alloc_buffer|alloc_\w+)\b)"
    r"|(?P<scope>\"(?:shared|local|wmma|metal\.simdgroup)[\w.]*\")"
    r"|(?P<word>\b(?:for|in|with|if|else|while|def|range)\b)"
)


def render(report: Report) -> str:
    """The page, UTF-8 text."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(amount=amount, ratio=ratio, launch=launch, scope_class=scope_class)
    environment.globals.update(used=used, max_depth=MAX_DEPTH)
    views = [_view(report, function) for function in report.functions]
    return environment.get_template("page.html").render(report=report, views=views)


def _view(report: Report, function: FunctionReport) -> dict[str, Any]:
    """What the template needs beside the facts: pictures and marked-up code."""
    from markupsafe import Markup

    limit = SOURCE_LINES if report.whole else None
    after, before, baseline = function.after, function.before, function.baseline
    versions = [("as the model has it", before), (f"under {function.rule}", after)]
    if baseline is not None:
        versions.append((f"under baseline ({baseline.rule})", baseline))
    return {
        "f": function,
        "nests": [
            (title, Markup(draw_nest(version.nest, f"{function.name} {title}")))
            for title, version in versions
            if version is not None
        ],
        "tile": Markup(draw_tile(after.tile)) if after.tile else None,
        "tir": Markup(_code(after.tir, "tir")) if before is None else None,
        "diff": _diff(before.tir, after.tir) if before is not None else None,
        "baseline_diff": _diff(after.tir, baseline.tir) if baseline is not None else None,
        "source": _sources(after.kernels, report.kind, limit),
        "baseline_source": _sources(baseline.kernels, report.kind, limit) if baseline is not None else None,
        "resources": resource_table(function, report.kind),
    }


def _diff(before: str, after: str) -> dict[str, Any]:
    """The rows of a comparison as HTML, and how many lines of each kind."""
    from markupsafe import Markup

    rows = difference.side_by_side(before, after)
    cells = []
    for row in rows:
        left, right = _cell(row.left_line, row.left), _cell(row.right_line, row.right)
        cells.append(f"<tr class={row.tag}>{left}{right}")
    return {"rows": Markup("\n".join(cells)), "counts": difference.counts(rows)}


def _cell(number: int | None, line: str | None) -> str:
    """A line's number and text; its indentation is a class, so that what wraps stays indented."""
    if line is None:
        return "<td><td>"
    depth = min((len(line) - len(line.lstrip())) // 4, MAX_DEPTH)
    return f"<td>{number}<td class=i{depth}>{_tir(line.lstrip())}"


def _sources(kernels: Any, kind: str, limit: int | None) -> list[dict[str, Any]]:
    from markupsafe import Markup

    found = []
    for kernel in kernels:
        lines = kernel.text.splitlines()
        cut = limit is not None and len(lines) > limit
        text = "\n".join(lines[:limit] if cut else lines)
        shown = limit if cut else len(lines)
        found.append({"name": kernel.name, "lines": len(lines), "shown": shown, "html": Markup(_code(text, kind))})
    return found


def _code(text: str, kind: str) -> str:
    if kind == "tir":
        return "\n".join(_tir(line) for line in text.splitlines())
    return _highlighted(text, LEXERS[kind])


def _tir(line: str) -> str:
    """A line of TVMScript with the words that matter to a schedule marked. Indentation is kept, halved."""
    body = line.lstrip()
    indent = " " * ((len(line) - len(body)) // 2)
    out, at = [], 0
    for match in _TIR.finditer(body):
        out.append(escape(body[at : match.start()], quote=False))
        word = escape(match.group(), quote=False)
        if match["comment"]:
            out.append(f"<i>{word}</i>")
        elif match["word"]:
            out.append(f"<b>{word}</b>")
        else:
            out.append(f"<mark class={_mark(match, body)}>{word}</mark>")
        at = match.end()
    return indent + "".join(out) + escape(body[at:], quote=False)


def _mark(match: re.Match[str], line: str) -> str:
    if match["scope"]:
        return scope_class(match["scope"].strip('"'))
    word = match["kind"].removeprefix("T.")
    if word == "thread_binding":
        return "grid" if "blockIdx" in line else "vthread" if "vthread" in line else "thread"
    return {"vectorized": "vector", "unroll": "unroll", "parallel": "parallel"}.get(word, "plain")


@lru_cache(maxsize=8)
def _lexer(name: str) -> Any:
    from pygments.lexers import get_lexer_by_name

    return get_lexer_by_name(name, stripnl=False, ensurenl=False)


def _highlighted(text: str, lexer: str) -> str:
    """Generated code with keywords and comments marked, and nothing else: a page holds a megabyte of it."""
    from pygments.token import Comment, Keyword, Name

    out = []
    for kind, value in _lexer(lexer).get_tokens(text):
        shown = escape(value, quote=False)
        if kind in Comment:
            shown = f"<i>{shown}</i>" if shown.strip() else shown
        elif kind in Keyword or kind in Name.Builtin or (lexer == "gas" and kind in Name.Function):
            shown = f"<b>{shown}</b>"
        out.append(shown)
    return "".join(out)
