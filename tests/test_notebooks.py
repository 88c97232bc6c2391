"""Every notebook runs from its first cell to its last, and is committed with the outputs of such a run."""

from __future__ import annotations

from pathlib import Path

import pytest
import run_notebooks

nbformat = pytest.importorskip("nbformat", reason="needs pip install 'gpt2-tvm[test]'")
pytest.importorskip("nbclient", reason="needs pip install 'gpt2-tvm[test]'")
NOTEBOOKS = run_notebooks.notebooks()


def test_there_are_notebooks() -> None:
    assert [path.name[:2] for path in NOTEBOOKS] == [f"{i + 1:02d}" for i in range(len(NOTEBOOKS))] != []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_committed_as_it_ran(path: Path) -> None:
    book = nbformat.read(path, as_version=4)
    nbformat.validate(book)
    cells = [cell for cell in book.cells if cell.cell_type == "code"]
    # counts from 1 without a gap: run from top to bottom in a new kernel, and no cell again after that
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not [output for cell in cells for output in cell.outputs if output.output_type == "error"]
    assert run_notebooks.outputs(book)
    assert run_notebooks.machine_paths(book) == []


@pytest.mark.heavy
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path: Path) -> None:
    before = nbformat.read(path, as_version=4)
    book = run_notebooks.execute(path)  # an error in a cell is raised, with the cell
    assert run_notebooks.machine_paths(book) == []
    printed = [bool(cell.get("outputs")) for cell in before.cells]
    assert [bool(cell.get("outputs")) for cell in book.cells] == printed, (
        "cells print where they printed nothing before"
    )


@pytest.mark.parametrize(
    "text",
    ["/home/me/x.py", "in /tmp/abc/lib.so:", "'/root/.cache/y'", "C:\\Users\\me", "(/var/folders/q1/z)", "/opt/x"],
)
def test_a_machine_path_is_found(text: str) -> None:
    assert run_notebooks.MACHINE_PATH.search(text)


@pytest.mark.parametrize("text", ["tokens/s", "gpt2_tvm/data/austen", "https://example.org/home/x", "a/tmp/b", "1/2"])
def test_other_text_is_not_taken_for_one(text: str) -> None:
    assert not run_notebooks.MACHINE_PATH.search(text)


def test_a_notebook_is_found_by_how_its_name_begins() -> None:
    first, second = NOTEBOOKS[:2]
    assert run_notebooks.named(["02", f"notebooks/{first.name}", second.name]) == [second, first]
    for nothing in ("", "no-such"):
        with pytest.raises(SystemExit, match="no notebook begins with"):
            run_notebooks.named([nothing])
