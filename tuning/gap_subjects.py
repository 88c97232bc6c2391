"""What a decode step is made of, on each of the ways to run a model that `tuning.gap` sets side by side."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from gpt2_tvm.measure.cases import Case
from gpt2_tvm.measure.subjects import EngineSubject
from gpt2_tvm.measure.web_subject import WebSubject
from tuning.measure.calls import Call, watched

STEPS = 32  # in a row, for the time of one


@dataclass(frozen=True)
class Anatomy:
    """One round.

    prefill_s: a prompt into an empty cache, its logits on the host. decode_s: all greedy steps, one read-back at their
    end. stream_s: the same tokens, each read back before it is shown. step_s: the kernels of one decode step launched
    one after the other, nothing read back. prefill_kernels_s, step_kernels_s: what these kernels take by
    themselves; None on a device without timestamps. kernels: how many a step launches. tokens: the greedy choice.
    """

    prefill_s: float
    decode_s: float
    stream_s: float
    step_s: float
    prefill_kernels_s: float | None
    step_kernels_s: float | None
    kernels: int
    tokens: tuple[int, ...]
    peak_rss_mb: float = 0.0


class EngineAnatomy:
    """An artifact in our engine: on TVM's virtual machine, or for webgpu through wgpu (`measure.subjects.Subject`)."""

    def __init__(self, path: str, device: str | None) -> None:
        self._subject = EngineSubject(path, device)
        self._engine = self._subject.engine
        self._launches: dict[Case, int] = {}
        self._timers: dict[tuple[Case, str], tuple[Call, Any]] = {}
        self.facts = self._subject.facts

    def turn(self, case: Case) -> Anatomy:
        """See `Anatomy`."""
        engine = self._engine
        sample = self._subject.turn(case)
        ids = self._subject.prompt(case)
        engine.reset()
        engine.prefill(ids)
        start = time.perf_counter()
        for _ in range(case.generate_tokens):
            engine.decode_greedy(1)
        stream_s = time.perf_counter() - start
        step_s, kernels_s, kernels = self._step(case)
        return Anatomy(
            sample.prefill_s,
            sample.decode_s,
            stream_s,
            step_s,
            self._parts_s(case, "prefill")[0],
            kernels_s,
            kernels,
            sample.tokens[0],
        )

    def _step(self, case: Case) -> tuple[float, float | None, int]:
        runner: Any = self._engine.runner
        kernels_s, kernels = self._parts_s(case, "decode_b1")
        call, _ = self._timers[case, "decode_b1"]
        if self._engine.artifact.kind == "webgpu":  # a function may be several kernels there
            if case not in self._launches:
                self._launches[case] = len(runner.launches(call.function, call.inputs)[0])
            kernels = self._launches[case]
        runner.sync()
        start = time.perf_counter()
        for _ in range(STEPS):
            runner.call(call.function, call.inputs)
        runner.sync()
        return (time.perf_counter() - start) / STEPS, kernels_s, kernels

    def _parts_s(self, case: Case, name: str) -> tuple[float | None, int]:
        """Seconds of a call's kernels by themselves, and how many there are."""
        if (case, name) not in self._timers:
            self._timers[case, name] = self._timer(case, name)
        timed = self._timers[case, name][1].round()
        return sum(time_us for _, time_us in timed.parts) / 1e6, len(timed.parts)

    def _timer(self, case: Case, name: str) -> tuple[Call, Any]:
        from tuning.measure.functions import make_timer

        engine, seen = self._engine, list[Call]()
        ids = self._subject.prompt(case)
        engine.reset()
        with watched(engine, seen.append):
            engine.prefill(ids)
            engine.decode(int(ids[0, -1]))
        call = next(one for one in reversed(seen) if one.function == name)
        return call, make_timer(engine, call)


class WebAnatomy:
    """An artifact in a page or in node, by that one's clock. device: as `runners.web` has it."""

    def __init__(self, path: str, device: str) -> None:
        self._subject = WebSubject(path, device)
        self._ask: Callable[[dict[str, Any]], Any] = lambda order: self._subject.agent.ask(order)[0]
        self.facts = self._subject.facts

    def turn(self, case: Case) -> Anatomy:
        """See `Anatomy`."""
        sample = self._subject.turn(case)
        ids = self._subject.ids(case)
        streamed = self._ask({"do": "stream", "ids": ids, "count": case.generate_tokens})
        if tuple(streamed["tokens"]) != sample.tokens[0]:
            raise RuntimeError(f"streamed, the tokens are others: {streamed['tokens']} and {sample.tokens[0]}")
        parts = self._ask({"do": "profile", "ids": ids, "count": STEPS})
        return Anatomy(
            sample.prefill_s,
            sample.decode_s,
            streamed["stream_ms"] / 1e3,
            parts["step_ms"] / 1e3,
            None if parts["prefill"] is None else sum(parts["prefill"]) / 1e6,
            None if parts["step"] is None else sum(parts["step"]) / 1e6,
            round(parts["kernels"]),
            sample.tokens[0],
            sample.peak_rss_mb,
        )
