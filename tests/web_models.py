"""Artifacts with a model.wasm, for tests of the web runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import web_tools

from gpt2_tvm.build import compile_model
from gpt2_tvm.toolchains import web


def compile_for_the_web(model: str, folder: Path, verify_widths: tuple[int, ...] = (), **choices: Any) -> Path:
    """`model` for webgpu, and model.wasm; a skip where emcc is missing. choices: of `compile_model`, another webgpu
    target among them."""
    web_tools.emcc()
    notes: list[str] = []

    def note(what: str, share: float) -> None:
        if share == 0.0:
            notes.append(what)

    choices = {"target": "webgpu", **choices}
    compile_model(model, output=folder, verify_widths=verify_widths, progress=note, **choices)
    assert not [n for n in notes if web.MODULE in n], notes
    return folder
