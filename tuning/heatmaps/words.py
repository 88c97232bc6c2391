"""What a sweep of one product says, in words and numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from tuning.heatmaps.cells import value, within_noise
from tuning.records import Point
from tuning.space import describe

PARAMETERS = (
    "TS",
    "TR",
    "TILE_S",
    "TILE_R",
    "VEC_LOAD",
    "VEC_C",
    "S_AXIS",
    "SHARED_VECTOR",
    "UNROLL",
    "REDUCTION",
    "SPLIT_K",
)


@dataclass(frozen=True)
class Findings:
    """Of one product.

    best, stock: points · gain, gain_low, gain_high: how many times as fast the best is as DLight's point, with two
    standard errors · shares: parameter to the share of the variance of log time that it explains (`variance_shares`),
    and what is left, `rest` · equal: points that cannot be told from the best ·
    ran, failed: how many.
    """

    best: Point
    stock: Point | None
    gain: float | None
    gain_low: float | None
    gain_high: float | None
    shares: dict[str, float]
    rest: float
    equal: int
    ran: int
    failed: dict[str, int]


def findings(points: list[Point], stock: Point | None) -> Findings | None:
    """What the points of one product say; None where none ran."""
    ran = sorted((p for p in points if p.ok and p.time_us), key=lambda p: p.time_us or 0.0)
    if not ran:
        return None
    best = ran[0]
    failed: dict[str, int] = {}
    for p in points:
        if not p.ok:
            failed[p.status] = failed.get(p.status, 0) + 1
    shares, rest = variance_shares(ran)
    gain = low = high = None
    if stock is not None and stock.ok and stock.time_us and best.time_us:
        gain = stock.time_us / best.time_us
        errors = [1.25 * (p.time_us_sd or 0) / max(p.samples, 1) ** 0.5 / (p.time_us or 1) for p in (best, stock)]
        width = 2 * gain * math.hypot(*errors)
        low, high = gain - width, gain + width
    equal = sum(within_noise(p, best) for p in ran)
    return Findings(best, stock, gain, low, high, shares, rest, equal, len(ran), failed)


def variance_shares(points: list[Point]) -> tuple[dict[str, float], float]:
    """(parameter to its share of the variance of log time, what is left to interactions and noise).

    What all parameters explain together, each value an effect of its own that adds to the others', is the adjusted R²
    of a least-squares fit. It is divided among them as their own one-way shares (eta squared), which overlap where the
    table has holes.
    """
    logs = np.log([p.time_us for p in points if p.time_us])
    spread = logs - logs.mean()
    total = float(spread @ spread)
    if total <= 0 or len(logs) < 3:
        return {}, 1.0
    own, effects = {}, [np.ones(len(logs))]
    for name in PARAMETERS:
        values = [value(point, name) for point in points]
        kinds = list(dict.fromkeys(values))
        if len(kinds) < 2:
            continue
        columns = [np.array([float(v == kind) for v in values]) for kind in kinds]
        own[name] = float(sum((spread @ c) ** 2 / c.sum() for c in columns)) / total
        effects += columns[1:]
    basis = np.column_stack(effects)
    fitted, _, rank, _ = np.linalg.lstsq(basis, logs, rcond=None)
    residual = logs - basis @ fitted
    freedom = len(logs) - rank
    rest = float(residual @ residual) / total * (len(logs) - 1) / freedom if freedom > 0 else 1.0
    rest = min(1.0, max(0.0, rest))
    whole = sum(own.values()) or 1.0
    shares = {name: share / whole * (1 - rest) for name, share in own.items()}
    return dict(sorted(shares.items(), key=lambda item: -item[1])), rest


def paragraph(f: Findings, measured: bool = True) -> str:
    """Two or three sentences."""
    stock = f.stock.config if f.stock else None
    parts = [f"Best: {describe(f.best.config, stock)}, {_time(f.best)}."]
    if f.gain is not None and f.stock is not None:
        if f.best.config == f.stock.config:
            parts.append("That is DLight's own point.")
        elif measured and f.gain_low is not None and f.gain_low <= 1:
            parts.append(f"It cannot be told from DLight's point ({_time(f.stock)}).")
        else:
            interval = f" (two standard errors: {f.gain_low:.2f} to {f.gain_high:.2f})" if measured else ""
            parts.append(f"{f.gain:.2f} times as fast as DLight's point ({_time(f.stock)}){interval}.")
    if measured and f.equal > 1:
        parts.append(f"{f.equal} of {f.ran} points cannot be told from the best.")
    told = [f"{name} {share:.0%}" for name, share in f.shares.items() if share >= 0.02]
    if told:
        parts.append(
            f"Of the variance of log time {', '.join(told)}; {f.rest:.0%} is left to interactions"
            + (" and noise." if measured else ".")
        )
    if f.failed:
        parts.append("Failed: " + ", ".join(f"{count} {status}" for status, count in f.failed.items()) + ".")
    return " ".join(parts)


def _time(point: Point) -> str:
    spread = f" ± {point.time_us_sd:.1f}" if point.time_us_sd else ""
    speed = f", {point.gb_s:.4g} GB/s" if point.gb_s else ""
    return f"{point.time_us:.1f}{spread} us{speed}"
