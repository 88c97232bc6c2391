"""What a turn of the ablation times, and which turns share a process."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest

from tuning import ablation_run, ablation_work
from tuning.ablation_records import IDENTITY, Journal
from tuning.ablation_run import Ablation
from tuning.ablation_work import PARTS, PREFILLS_S, Job, Subject
from tuning.children import Outcome
from tuning.measure import session

STEP_S = 0.002


class Clock:
    """A clock that goes on as engines work: what is asserted does not depend on this machine."""

    now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


time = Clock()


@pytest.fixture(autouse=True)
def _clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "time", time)
    monkeypatch.setattr(ablation_work, "time", time)


class Engine:
    """Counts upwards; `late` calls of decode_greedy are disturbed."""

    def __init__(self, software: bool, late: Sequence[int] = (), prefill_s: float = 0.3) -> None:
        self.runner = SimpleNamespace(sync=lambda: None, device=SimpleNamespace(is_software=software))
        self.late, self.prefill_s = late, prefill_s
        self.calls: list[tuple[str, int]] = []
        self.token = 0

    def reset(self) -> None:
        self.token = 0

    def prefill(self, prompt: np.ndarray) -> None:
        time.sleep(self.prefill_s)
        self.calls.append(("prefill", prompt.shape[1]))

    def decode_greedy(self, n: int) -> np.ndarray:
        disturbed = len([name for name, _ in self.calls if name == "decode"]) in self.late
        time.sleep(STEP_S * n * (10 if disturbed else 1))
        self.calls.append(("decode", n))
        self.token += n
        return np.arange(self.token - n, self.token, dtype=np.int32)[None]


def subject(engine: Engine, generate: int = 16) -> Subject:
    made = Subject.__new__(Subject)
    made._engine, made._job, made._prompt = engine, Job("m", "t", generate_tokens=generate), np.zeros((1, 5), np.int32)  # type: ignore[assignment]
    return made


def test_parts_give_the_same_tokens_and_the_fastest_one_s_time() -> None:
    whole = session.turn(Engine(False), np.zeros((1, 5), np.int32), 13)
    engine = Engine(False, late=(0, 2, 3))
    parts = session.turn(engine, np.zeros((1, 5), np.int32), 13, 4)
    assert np.array_equal(whole.tokens, parts.tokens) and parts.tokens.shape == (1, 13)
    assert [n for name, n in engine.calls if name == "decode"] == [3, 3, 3, 4]  # all of them, no more
    assert parts.decode_s == pytest.approx(13 * STEP_S)  # of the second part, for all


def test_a_software_device_prefills_again_and_decodes_in_parts() -> None:
    engine = Engine(True, late=tuple(range(3)))
    found = subject(engine).turn()
    decodes = [n for name, n in engine.calls if name == "decode"]
    assert decodes == [16 // PARTS] * PARTS + [1] * (found["cycles"] - 1)
    prefills = [n for name, n in engine.calls if name == "prefill"]
    assert found["cycles"] == len(prefills) == math.ceil(PREFILLS_S / 0.3)
    assert found["prefill_s"] == pytest.approx(0.3) and found["decode_s"] == pytest.approx(16 * STEP_S)


def test_another_device_decodes_as_a_whole() -> None:
    engine = Engine(False, late=(0,), prefill_s=0.05)
    found = subject(engine).turn()
    assert {n for name, n in engine.calls if name == "decode"} == {16} and found["cycles"] >= 3
    assert found["decode_s"] == pytest.approx(16 * STEP_S)


def test_tokens_that_cannot_be_divided_are_decoded_as_a_whole() -> None:
    engine = Engine(True)
    subject(engine, 3).turn()
    assert {n for name, n in engine.calls if name == "decode"} == {3}


class FakeChild:
    started: ClassVar[list[str]] = []
    ended: ClassVar[list[str]] = []

    def __init__(self, label: str, *arguments: Any) -> None:
        self.label, self.pid = label, 0
        self.started.append(label)

    def ready(self, timeout_s: float) -> Outcome:
        return Outcome("ok", {})

    def ask(self, method: str, *arguments: Any, timeout_s: float) -> Outcome:
        slow = self.label == "slow"
        if method == "turn":
            return Outcome("ok", {"prefill_s": 3.0 if slow else 0.3, "decode_s": 1.0, "cycles": 1}, seconds=1.0)
        return Outcome("ok", 0.0 if method == "check" else {})

    def close(self) -> None:
        self.ended.append(self.label)


@pytest.mark.parametrize("software", [True, False])
def test_slow_turns_of_a_software_device_have_a_process_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, software: bool
) -> None:
    monkeypatch.setattr(ablation_run, "Child", FakeChild)
    monkeypatch.setattr(ablation_run, "SETTLE_S", 0.0)
    FakeChild.started, FakeChild.ended = [], []
    nothing: Any = None
    run = Ablation(Job("m", "t"), nothing, nothing, (), tmp_path / "j.jsonl", 3, 100.0, alive=4)
    run._device = {"device": "d", "memory_bytes": None, "software": software}
    with Journal.begin(run.records, dict.fromkeys(IDENTITY, "x")) as journal:
        codes = {name: {"set": name, "artifact": name} for name in ("slow", "fast")}
        run._measure(journal, codes, "reference", lambda what, share: None)
        assert {code: len(found) for code, found in journal.samples.items()} == {"slow": 3, "fast": 3}
    assert FakeChild.started.count("slow") == (3 if software else 1)
    assert FakeChild.started.count("fast") == 1
    assert FakeChild.ended == (["slow", "slow"] if software else [])  # the last one stays for its functions
