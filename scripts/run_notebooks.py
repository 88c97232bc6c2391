"""Execute the notebooks in `notebooks/`: `python scripts/run_notebooks.py [NAME...]`; with `--write` outputs are kept.

How a name begins is enough: 02 is 02_rules.ipynb. What is kept says nothing about the machine beyond what a cell prints
on purpose: timings of cells and the interpreter's version are left out, and a path of this machine in an output is an
error, so that it is mended in the cell.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "notebooks"
TIMEOUT_S = 600  # of one cell
# Absolute paths of people's and build machines' folders, but not the rest of a longer path or of an address.
MACHINE_PATH = re.compile(
    r"(?<![\w/.:])(?:/(?:home|root|Users|tmp|var|work|opt|mnt|private|data)/[\w.][^\s'\"]*|[A-Z]:\\\w+)"
)


def notebooks() -> list[Path]:
    """All of them, in order of their numbers."""
    return sorted(FOLDER.glob("*.ipynb"))


def named(names: list[str]) -> list[Path]:
    """The notebooks whose names begin so; ends the program with a line where a name is no notebook's."""
    found: list[Path] = []
    for name in names:
        begin = Path(name).name
        matching = [path for path in notebooks() if begin and path.name.startswith(begin)]
        if not matching:
            sys.exit(f"error: no notebook begins with {begin!r}; there are {', '.join(p.name for p in notebooks())}")
        found += [path for path in matching if path not in found]
    return found


def execute(path: Path) -> Any:
    """Run every cell in a kernel of this interpreter, and return the notebook with its outputs (nbformat 4).

    Raises nbclient.exceptions.CellExecutionError with the cell and its traceback where one fails.
    """
    import nbformat
    from nbclient import NotebookClient

    book = nbformat.read(path, as_version=4)
    NotebookClient(
        book,
        timeout=TIMEOUT_S,
        kernel_name="python3",
        record_timing=False,
        coalesce_streams=True,
        resources={"metadata": {"path": str(FOLDER)}},
    ).execute()
    book.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    return book


def outputs(book: Any) -> list[str]:
    """The text of every output, in order."""
    texts = []
    for cell in book.cells:
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            texts.append("".join(output.get("text", "")) + "".join(data.get("text/plain", "")))
            texts.append("".join(data.get("text/html", "")))
    return [text for text in texts if text]


def machine_paths(book: Any) -> list[str]:
    """Paths of a machine in the outputs, and in what is said between them."""
    sources = ["".join(cell.source) for cell in book.cells]
    return [found for text in [*outputs(book), *sources] for found in MACHINE_PATH.findall(text)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="notebooks, or how their names begin (default: all)")
    parser.add_argument("--write", action="store_true", help="keep the outputs in the notebooks")
    arguments = parser.parse_args()
    for path in named(arguments.names) or notebooks():
        print(f"executing {path.relative_to(ROOT)}", flush=True)
        book = execute(path)
        if found := machine_paths(book):
            sys.exit(f"error: {path.name} names paths of this machine: {', '.join(found)}; mend the cells")
        if arguments.write:
            import nbformat

            nbformat.write(book, path)
            print(f"wrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
