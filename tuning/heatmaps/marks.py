"""A point that somebody names, to be found on a map: another device's best, or a paper's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from gpt2_tvm.errors import UserError
from tuning.heatmaps.cells import AXES, value
from tuning.records import Point

Mark = Mapping[str, int]


def parse_mark(text: str) -> Mark:
    """``TS=8,TR=16`` as {"TS": 8, "TR": 16}; UserError for what no map has on an axis."""
    found: dict[str, int] = {}
    for part in text.split(","):
        name, _, number = (piece.strip() for piece in part.partition("="))
        if name not in AXES or not number.isdecimal():
            raise UserError(f"--mark {part.strip() or text!r}: say {'=1,'.join(AXES)}=1, or some of these")
        found[name] = int(number)
    return found


def is_marked(point: Point, mark: Mark) -> bool:
    return bool(mark) and all(value(point, name) == wanted for name, wanted in mark.items())


def about_mark(points: Sequence[Point], mark: Mark, best: Point) -> str:
    """One sentence: how far the marked point (the best of them, where several are) is from the best."""
    said = " ".join(f"{name}={number}" for name, number in mark.items())
    found = [p for p in points if is_marked(p, mark)]
    ran = [p for p in found if p.ok and p.time_us]
    if not ran or not best.time_us:
        return f"M, {said}: {found[0].status if found else 'not tried'}."
    point = min(ran, key=lambda p: p.time_us or 0.0)
    return f"M, {said}: {point.time_us:.1f} us, {(point.time_us or 0) / best.time_us:.2f} times the best's."
