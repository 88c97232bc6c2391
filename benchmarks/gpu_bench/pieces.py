"""Parts of a row for each artifact: every piece in time, what was right kept, what failed a row that says how."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu_bench.crew import Clock, OutOfTimeError, alone
from gpu_bench.runs import Entry, Row, code_of, machine_key, read, save
from gpu_bench.weights import fill, has_weights


@dataclass(frozen=True)
class Piece:
    """One row of a part.

    about: what the row says of where it comes from (`origin`); one that was right and says the same is kept.
    run: the seconds that are left -> the rest of the row, with "ok", and where it failed "failure" and "message".
    """

    about: Row
    run: Callable[[float], Row]

    @property
    def name(self) -> str:
        """What to call it."""
        return _name(self.about)


def origin(path: Path, device: str, programs: Sequence[str], **more: Any) -> Row:
    """Which artifact, in which build, on which machine. programs: the files of this package that its row comes from;
    more: "tool", or what else a row is an answer to."""
    return {
        "artifact": path.name,
        "code": code_of(Entry(path, "ours", "graph"), tuple(programs)),
        "machine": machine_key(device),
        **more,
    }


def work_through(file: Path, pieces: Sequence[Piece], clock: Clock) -> dict[str, Any]:
    """Run the pieces of which `file` has no row that was right, and write it after each -> {"rows", "complete", "left":
    names of those for which there was no time}.

    First what was not looked at yet, then what failed before. Rows of other artifacts stay; those of another build of
    these go.
    """
    rows: dict[str, Row] = {_name(row): row for row in (read(file) or {}).get("rows", ())}
    pieces = list({piece.name: piece for piece in pieces}.values())  # asked for twice is asked for once

    def current(piece: Piece) -> bool:
        row = rows.get(piece.name, {})
        return all(row.get(key) == value for key, value in piece.about.items())

    again = [piece for piece in pieces if current(piece) and not rows[piece.name]["ok"]]
    todo = [piece for piece in pieces if not current(piece)]
    for piece in todo:
        rows.pop(piece.name, None)
    left = [piece.name for piece in (*todo, *again)]

    def write() -> dict[str, Any]:
        complete = not left and all(row["ok"] for row in rows.values())
        found = {"rows": list(rows.values()), "complete": complete, "left": list(left)}
        save(file, found)
        return found

    found: dict[str, Any] = {}
    try:
        for piece in (*todo, *again):
            clock.begin(f"{file.stem}: {piece.name}")
            rows[piece.name] = {**piece.run(max(1.0, clock.left)), **piece.about}
            left.remove(piece.name)
            found = write()
    except OutOfTimeError:
        pass
    return found or write()


def in_its_process(
    path: Path, left_s: float, function: Callable[..., Row], *arguments: Any, each_s: float = math.inf
) -> Row:
    """`function(path, *arguments)`, which gives a row, in a process of its own, within `each_s`. Before, an artifact
    without weights gets them, within all of `left_s`: what was begun of a large model's is begun anew."""
    found: Any = None
    clock = Clock(left_s)
    if not (why := without_weights(path, left_s)):
        found, why = alone(path.name, max(1.0, min(each_s, clock.left)), function, path, *arguments)
    return {"ok": False, **why} if why else dict(found)


def without_weights(path: Path, left_s: float) -> dict[str, str]:
    """Why an artifact has no weights, after an attempt of `left_s` to make them; {} where it has."""
    return {} if has_weights(path) else alone(f"weights of {path.name}", left_s, fill, path)[1]


def complaints(found: dict[str, Any], pieces: Sequence[Piece]) -> list[str]:
    """What failed, and what was not begun, of the pieces that `work_through` was asked for: a line each."""
    lines = []
    asked = {piece.name for piece in pieces} - set(found["left"])
    for row in found["rows"]:
        if not row["ok"] and _name(row) in asked:
            words = row.get("message") or row.get("refused") or "see the table"
            lines.append(f"{_name(row)}: {row.get('failure') or 'wrong'}, {words}")
    if found["left"]:
        lines.append(f"no time for {', '.join(found['left'])}; the same command goes on from here")
    return lines


def _name(row: Row) -> str:
    return f"{row['tool']} of {row['artifact']}" if "tool" in row else str(row["artifact"])
