"""Points of a sweep as tables: two parameters span the cells, the others are fixed or searched for the best."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tuning.records import Point

AXES = {  # how a cell's parameters are called, and what they are
    "TS": "threads along the outputs",
    "TR": "threads along the reduction",
    "TILE_S": "outputs a thread",
    "TILE_R": "weights of a row a thread and step",
}


@dataclass(frozen=True)
class Cell:
    """What is known of one cell: its fastest point that ran, else how its points failed.

    point: the fastest · failures: status of each point that failed, and how many.
    """

    point: Point | None = None
    failures: Mapping[str, int] = field(default_factory=dict)

    @property
    def time_us(self) -> float | None:
        return self.point.time_us if self.point else None

    @property
    def failure(self) -> str | None:
        """The commonest failure of a cell in which nothing ran."""
        if self.point is not None or not self.failures:
            return None
        return max(self.failures, key=lambda status: self.failures[status])


@dataclass(frozen=True)
class Table:
    """Cells by (y, x): rows[y][x] for `ys` and `xs`, the values of parameters `y` and `x`. fixed: of the others."""

    y: str
    x: str
    ys: tuple[int, ...]
    xs: tuple[int, ...]
    rows: tuple[tuple[Cell, ...], ...]
    fixed: Mapping[str, Any] = field(default_factory=dict)

    def cells(self) -> Iterable[tuple[int, int, Cell]]:
        """(row, column, cell) of each."""
        for i, row in enumerate(self.rows):
            for j, cell in enumerate(row):
                yield i, j, cell


def value(point: Point, parameter: str) -> Any:
    """A parameter of a point, by the study's name."""
    return getattr(point.config, parameter.lower())


def table(points: Iterable[Point], y: str, x: str, fixed: Mapping[str, Any] | None = None) -> Table:
    """A table of the points that have the `fixed` values: the best over all other parameters in each cell.

    The axes have all values that any of `points` has, so that tables of one product can be laid side by side.
    """
    everything = list(points)
    chosen = [p for p in everything if all(value(p, name) == wanted for name, wanted in (fixed or {}).items())]
    ys = tuple(sorted({value(p, y) for p in everything}))
    xs = tuple(sorted({value(p, x) for p in everything}))
    groups: dict[tuple[Any, Any], list[Point]] = {}
    for p in chosen:
        groups.setdefault((value(p, y), value(p, x)), []).append(p)
    rows = tuple(tuple(_cell(groups.get((a, b), [])) for b in xs) for a in ys)
    return Table(y, x, ys, xs, rows, dict(fixed or {}))


def _cell(points: list[Point]) -> Cell:
    ran = [p for p in points if p.ok and p.time_us is not None]
    if ran:
        return Cell(min(ran, key=lambda p: p.time_us or 0.0))
    failures: dict[str, int] = {}
    for p in points:
        failures[p.status] = failures.get(p.status, 0) + 1
    return Cell(None, failures)


def within_noise(point: Point, best: Point) -> bool:
    """Whether a point cannot be told from the best: two standard errors of the difference of their medians."""
    if point.time_us is None or best.time_us is None:
        return False
    errors = [1.25 * (p.time_us_sd or 0.0) / max(p.samples, 1) ** 0.5 for p in (point, best)]
    return point.time_us - best.time_us <= 2 * (errors[0] ** 2 + errors[1] ** 2) ** 0.5
