"""A report as Markdown, for a terminal or a file."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from tuning.report.difference import unified
from tuning.report.drawing import text_nest
from tuning.report.glosses import used
from tuning.report.numbers import amount, launch, ratio, resource_table

if TYPE_CHECKING:
    from tuning.report.facts import FunctionReport, Report

SOURCE_LINES = 120  # of the generated code, for one function


def markdown(report: Report) -> str:
    """The report; a single function is shown whole, with TIR and generated code, all of them with rules and loops."""
    return "\n".join(_lines(report)) + "\n"


def _lines(report: Report) -> Iterator[str]:
    yield f"# {report.model} on {report.target}"
    yield ""
    rules = ", ".join(report.rules) or "none"
    yield f"{report.description}. Weights {report.quantization}. Rules, in order: {rules}."
    for note in report.notes:
        yield f"Note: {note}."
    if len(report.functions) > 1:
        yield ""
        yield "| function | what it is for | rule | calls a token | grid | block | bytes | FLOP | FLOP/byte |"
        yield "| --- | --- | --- | ---: | --- | --- | ---: | ---: | ---: |"
        for f in report.functions:
            cells = (f.name, f.role, f.rule, str(f.calls_per_token or ""), launch(f.grid), launch(f.block))
            yield f"| {' | '.join((*cells, amount(f.nbytes), amount(f.flops), ratio(f.intensity)))} |"
    for function in report.functions:
        yield ""
        yield from _function(report, function, whole=len(report.functions) == 1)


def _function(report: Report, f: FunctionReport, whole: bool) -> Iterator[str]:
    yield f"## {f.name}"
    yield ""
    yield f"{f.role}. Taken by **{f.rule}**."
    yield ""
    sizes = ", ".join(f"{name} = {value}" for name, value in f.sizes.items())
    symbolic = f" ({sizes})" if isinstance(f.bytes_text, str) else ""
    yield f"- {amount(f.nbytes, 'B')}, {amount(f.flops)} FLOP, {ratio(f.intensity)} FLOP a byte{symbolic}"
    if f.bound_us is not None:
        yield f"- at best {ratio(f.bound_us)} µs, set by {'memory' if f.memory_bound else 'arithmetic'}"
    if f.grid is not None:
        shared = f"the TIR asks for {f.shared_memory_bytes} B of shared memory a block"
        yield f"- grid {launch(f.grid)}, block {launch(f.block)}; {shared}"
    yield f"- {', '.join(f'{b.name} {b.shape} {b.dtype}' for b in f.buffers)}"
    yield ""
    yield from _rules(f)
    if f.after.tile is not None:
        t = f.after.tile
        yield (
            f"{t.rows} × {t.columns} in {t.blocks} blocks: TS {t.ts} × TR {t.tr} threads, TILE_S {t.tile_s} × "
            f"TILE_R {t.tile_r} elements a thread a step, {t.steps} steps, vectors of {t.vec}."
        )
        yield ""
    versions = [("as the model has it", f.before if whole else None), (f"under {f.rule}", f.after)]
    versions.append((f"under baseline ({f.baseline.rule})" if f.baseline else "", f.baseline if whole else None))
    for title, version in versions:
        if version is not None:
            yield from _fenced(f"Loops {title}:", text_nest(version.nest), "text")
    if whole:
        yield from _detail(report, f)


def _rules(f: FunctionReport) -> Iterator[str]:
    for a in f.answers:
        said = "accepted" if a.won else f"would accept (not asked: {f.rule} has it)" if a.outcome == "accepted" else ""
        said = said or (a.outcome if a.asked else f"would have {a.outcome}")
        why = a.reason or a.error or (str(a.places[-1]) if a.places else "")
        yield f"- {a.rule}: {said}{': ' + why if why else ''}"
    if not f.answers:
        yield "- no rule was asked: it is written by hand" if f.rule == "ours" else "- no rule was asked"
    yield ""


def _detail(report: Report, f: FunctionReport) -> Iterator[str]:
    if f.after.steps:
        yield "What the schedule did:"
        yield ""
        for primitive, count, gloss in used(f.after.steps):
            yield f"- `{primitive}` × {count}: {gloss}"
        yield ""
    elif f.story is not None:
        yield from _fenced(f"{f.story.file} says:", f.story.text, "text")
    if f.before is not None:
        changed = "\n".join(unified(f.before.tir, f.after.tir))
        yield from _fenced("TIR before and after (~: moved under other loops):", changed, "diff")
    else:
        yield from _fenced("TIR:", f.after.tir, "python")
    for kernel in f.after.kernels:
        lines = kernel.text.splitlines()
        cut = f", the first {SOURCE_LINES} of {len(lines)} lines" if len(lines) > SOURCE_LINES else ""
        yield from _fenced(f"{report.language}, {kernel.name}{cut}:", "\n".join(lines[:SOURCE_LINES]), "")
    table = resource_table(f, report.kind)
    if table["rows"]:
        yield f"| resources{', ' + table['title'] if table['title'] else ''} | {' | '.join(table['columns'])} |"
        yield f"| --- |{' --- |' * len(table['columns'])}"
        for heading, cells in table["rows"]:
            yield f"| {heading} | {' | '.join(cells)} |"
        yield ""
        if table["note"]:
            yield from (table["note"], "")
    if f.baseline is None:
        yield f"Under baseline: {f.baseline_note}."


def _fenced(title: str, text: str, language: str) -> Iterator[str]:
    yield from (title, "", f"```{language}", text, "```", "")
