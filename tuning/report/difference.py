"""Two texts side by side, with the lines that differ marked."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import dataclass

SAME, MOVED, CHANGED, REMOVED, ADDED = "same", "moved", "changed", "removed", "added"


@dataclass(frozen=True)
class Row:
    """A row of the two columns. tag: same; moved (the same but for its indentation, so inside other loops); changed;
    removed (right is None); added (left is None).
    """

    tag: str
    left_line: int | None
    left: str | None
    right_line: int | None
    right: str | None


def side_by_side(before: str, after: str) -> list[Row]:
    """The rows of a comparison. Lines match by what they say, not by how far they are indented: a statement that a
    schedule moved under other loops is the same statement."""
    left, right = before.splitlines(), after.splitlines()
    matcher = difflib.SequenceMatcher(None, [line.strip() for line in left], [line.strip() for line in right], False)
    rows: list[Row] = []
    for tag, i0, i1, j0, j1 in matcher.get_opcodes():
        for k in range(max(i1 - i0, j1 - j0)):
            i = i0 + k if i0 + k < i1 else None
            j = j0 + k if j0 + k < j1 else None
            a, b = (left[i] if i is not None else None), (right[j] if j is not None else None)
            kind = SAME if tag == "equal" and a == b else MOVED if tag == "equal" else CHANGED
            if i is None or j is None:
                kind = ADDED if i is None else REMOVED
            rows.append(Row(kind, None if i is None else i + 1, a, None if j is None else j + 1, b))
    return rows


def unified(before: str, after: str) -> Iterator[str]:
    """The same as one column, each line with a sign before it: "-" gone, "+" new, "~" moved under other loops, " " the
    same."""
    gone: list[str] = []
    new: list[str] = []
    for row in side_by_side(before, after):
        if row.tag in (SAME, MOVED):
            yield from [*gone, *new]
            gone, new = [], []
            yield f"{'~' if row.tag == MOVED else ' '} {row.right}"
            continue
        if row.left is not None:
            gone.append(f"- {row.left}")
        if row.right is not None:
            new.append(f"+ {row.right}")
    yield from [*gone, *new]


def counts(rows: list[Row]) -> dict[str, int]:
    """How many lines of each kind; a changed row counts as one removed and one added."""
    out = dict.fromkeys((SAME, MOVED, REMOVED, ADDED), 0)
    for row in rows:
        if row.tag == CHANGED:
            out[REMOVED] += 1
            out[ADDED] += 1
        else:
            out[row.tag] += 1
    return out
