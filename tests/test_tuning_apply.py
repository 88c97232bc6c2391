"""What `tuning.apply` writes, decided by planted decode rates: no device, nothing compiled."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gpt2_tvm.schedules.gemv_config import GemvConfig
from gpt2_tvm.schedules.tuned import Tuned, TunedPoint
from tuning import apply, decode
from tuning.decode import STOCK, UNTUNED, Rates, Setting

SETTING = Setting("tiny", "webgpu", "q0f32", 1, 8, 8, 5)


def point(outputs: int) -> TunedPoint:
    return TunedPoint(outputs, 64, 1, "float32", GemvConfig(ts=4, tr=8, tile_s=1, tile_r=8), {})


CANDIDATES = {"a": point(64), "b": point(128), "c": point(192)}
NOISE = (-0.01, 0.02, 0.0, -0.02, 0.01)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def decided(monkeypatch: pytest.MonkeyPatch, together: dict[frozenset[int], float], alone: dict[str, float]) -> Any:
    """(outputs of the points that are applied, or None; the names of the variants that were timed)."""
    timed: list[str] = []

    def measure(variants: Mapping[str, Tuned | None], setting: Setting, say: Any = None) -> dict[str, Rates]:
        timed.extend(variants)
        rates = {}
        for i, (name, tuned) in enumerate(variants.items()):
            if tuned is None:
                rate = 100.0 if name == UNTUNED else 50.0
            elif len(tuned.points) == 1:
                rate = 100 * alone[next(n for n, p in CANDIDATES.items() if p.outputs == tuned.points[0].outputs)]
            else:
                rate = 100 * together[frozenset(p.outputs for p in tuned.points)]
            shift = i % len(NOISE)
            rates[name] = Rates(tuple(rate * (1 + n) for n in NOISE[shift:] + NOISE[:shift]), (1.0,) * len(NOISE))
        return rates

    monkeypatch.setattr(decode, "measure", measure)
    records = SimpleNamespace(header={})
    result, table = apply._checked(records, CANDIDATES, SETTING, Path("told.json"))  # type: ignore[arg-type]
    assert all(name in table for name in timed)
    told = {row["tuned"] for row in json.loads(Path("told.json").read_text())["rows"] if row.get("applied")}
    written = () if result is None else result.points
    assert {CANDIDATES[name].outputs for name in told} == {p.outputs for p in written}
    return (None if result is None else {p.outputs for p in result.points}), timed


def test_all_of_them_where_all_together_are_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    applied, timed = decided(monkeypatch, {frozenset({64, 128, 192}): 1.3}, {"a": 1.1, "b": 1.0, "c": 1.1})
    assert applied == {64, 128, 192}
    assert timed == [UNTUNED, "a", "b", "c", "all points", STOCK]


def test_a_point_that_loses_in_the_model_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    together = {frozenset({64, 128, 192}): 1.1, frozenset({64, 128}): 1.2}
    applied, timed = decided(monkeypatch, together, {"a": 1.1, "b": 1.05, "c": 0.8})
    assert applied == {64, 128} and timed[-1] == "the points that did not lose"


def test_then_those_that_were_faster_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    together = {frozenset({64, 128, 192}): 0.9, frozenset({64, 128}): 1.1}
    applied, timed = decided(monkeypatch, together, {"a": 1.1, "b": 1.05, "c": 0.99})
    assert applied == {64, 128} and timed[-1] == "the points that were faster"


def test_nothing_where_none_of_it_is_faster_together(monkeypatch: pytest.MonkeyPatch) -> None:
    together = {frozenset({64, 128, 192}): 0.9, frozenset({64, 128}): 0.95}
    assert decided(monkeypatch, together, {"a": 1.1, "b": 1.05, "c": 0.99})[0] is None
    assert decided(monkeypatch, {frozenset({64, 128, 192}): 0.5}, {"a": 0.7, "b": 0.7, "c": 0.7})[0] is None
