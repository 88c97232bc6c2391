"""What each schedule rule did to each function of a model, as a page or as Markdown.

    from tuning.report import collect, markdown, render

    report = collect(plan, "gpt2")            # facts.py: lower, ask the rules, compile, read the TIR
    Path("gpt2.html").write_text(render(report))

asking.py asks the rules and finds the line where one said no, reasons.py says why in words; loops.py and tile.py read
TIR, drawing.py draws it; difference.py compares TIR; glosses.py explains primitives, story.py quotes rules that use
none; building.py and sources.py get generated code; page.py and terminal.py write it all down.
"""

from tuning.report.facts import FunctionReport, Report, collect
from tuning.report.page import render
from tuning.report.terminal import markdown

__all__ = ["FunctionReport", "Report", "collect", "markdown", "render"]
