"""Which function of a model takes how long inside one prefill and inside one decode step.

On TVM's virtual machine the calls of one model call are recorded with their arguments and then made again in the same
order, each timed by itself: weights and caches are as cold as in the model call. On WebGPU the kernels' own timestamps
say it, or, on a device that has none, one submission a kernel. `FunctionTimes.calls` has the model call as a whole,
timed in the same rounds with nothing in between, and the share of it that the functions add up to.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from gpt2_tvm.errors import UserError
from tuning.measure.calls import Call, watched

REPEATS = 20
WARMUPS = 2


@dataclass(frozen=True)
class FunctionTime:
    """One function inside one model call.

    time_us: microseconds of one of its calls, the median over the rounds of the mean over its calls in a round;
    time_us_sd: the spread of that over the rounds. calls: how often a model call calls it.
    """

    function: str
    call: str
    time_us: float
    time_us_sd: float
    calls: int

    @property
    def total_us(self) -> float:
        """Microseconds that it takes of one model call."""
        return self.time_us * self.calls


@dataclass(frozen=True)
class CallTime:
    """A model call as a whole. coverage: the functions' times together over it, the median
    over the rounds. overhead_us: what timing adds to a
    function's call, measured and already subtracted. method: how the functions were timed, in words."""

    call: str
    time_us: float
    time_us_sd: float
    coverage: float
    overhead_us: float
    method: str


class FunctionTimes(dict[str, FunctionTime]):
    """By the function's name; if several calls were asked for, by "call:function". `calls`: by the call's name."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, CallTime] = {}


@dataclass(frozen=True)
class Timed:
    """What a timer gives for one round: (function, microseconds) in the order of the calls. whole_us: the sum of these
    where the call as a whole was not timed."""

    parts: list[tuple[str, float]]
    whole_us: float


class Timer(Protocol):
    """Times the functions of one model call."""

    method: str
    overhead_us: float

    def round(self, whole: bool = True) -> Timed:
        """Run the model call once as a whole, unless that is not wanted, and once function by function."""
        ...


def time_functions(
    artifact: str | Path,
    calls: Sequence[str] = ("prefill", "decode_b1"),
    prompt_tokens: int = 322,
    repeats: int | Mapping[str, int] = REPEATS,
    device: str | None = None,
    threads: int | None = None,
) -> FunctionTimes:
    """Time each function inside the model's calls.

    Args:
        artifact: its folder.
        calls: "prefill" (the prompt into an empty cache) and "decode_b<batch>" (one token after the prompt).
        prompt_tokens: of the benchmark's prompt, cut to what the context holds.
        repeats: rounds that count, for all calls or for each.
        device, threads: as for `Engine`, but not through RPC: the functions are timed where they run.

    Raises UserError for calls or sizes that the artifact does not have.
    """
    from gpt2_tvm.engine import Engine

    if device is not None and device.startswith("rpc://"):
        raise UserError(f"functions are timed on the machine that runs them, not through {device}; run this there")
    if min([repeats] if isinstance(repeats, int) else repeats.values()) < 1 or prompt_tokens < 1:
        raise UserError(f"--repeats {repeats} --prompt-tokens {prompt_tokens}: both must be at least 1")
    return time_engine(Engine(artifact, device, threads=threads), calls, prompt_tokens, repeats)


def time_engine(
    engine: Any,
    calls: Sequence[str] = ("prefill", "decode_b1"),
    prompt_tokens: int = 322,
    repeats: int | Mapping[str, int] = REPEATS,
    warmups: int = WARMUPS,
    whole: bool = True,
) -> FunctionTimes:
    """`time_functions` in an engine that is there, with its caches empty after it.

    warmups: rounds that do not count. whole: time the calls as a whole too; otherwise `coverage` says nothing.
    """
    from gpt2_tvm.measure.cases import Case
    from gpt2_tvm.measure.subjects import prompt_of

    wanted = dict.fromkeys(calls, repeats) if isinstance(repeats, int) else dict(repeats)
    batches = {call: _batch(call, engine.artifact.batch_sizes) for call in calls}
    length = min(prompt_tokens, engine.max_seq_len - 1)
    times = FunctionTimes()
    filled = 0  # sequences that hold the prompt
    for call in calls:
        prompt = prompt_of(engine.artifact, Case(batches[call], length, 1))
        recorded = _record(engine, call, prompt, call != "prefill" and filled == batches[call])
        filled = batches[call] if call == "prefill" else 0
        rounds = _rounds(make_timer(engine, recorded), wanted[call], warmups, whole, call, times)
        for function, (mean, sd, count) in rounds.items():
            key = function if len(calls) == 1 else f"{call}:{function}"
            times[key] = FunctionTime(function, call, mean, sd, count)
    engine.reset()
    return times


def _batch(call: str, sizes: Sequence[int]) -> int:
    """The batch that a call's name asks for."""
    if call == "prefill":
        return 1
    size = call.removeprefix("decode_b")
    if call.startswith("decode_b") and size.isdigit() and int(size) in sizes:
        return int(size)
    known = ", ".join(["prefill", *(f"decode_b{size}" for size in sizes)])
    raise UserError(f"no call {call!r} can be timed; this artifact has {known}")


def _record(engine: Any, call: str, prompt: np.ndarray, filled: bool = False) -> Call:
    """Bring the engine to where `call` would be made and make it; returns it with its inputs. filled: it is there, for
    a prefill that is made again writes what it wrote."""
    seen: list[Call] = []
    with watched(engine, seen.append):
        if not filled:
            engine.reset()
            engine.prefill(prompt)
        if call != "prefill":
            engine.decode(np.full(len(prompt), int(prompt[0, -1]), np.int32))
    return next(one for one in reversed(seen) if one.function == call)


def make_timer(engine: Any, call: Call) -> Timer:
    """What times the functions inside `call` of an engine on this machine."""
    names = {row["name"] for row in engine.artifact.manifest["functions"]}
    if engine.artifact.kind == "webgpu":
        from tuning.measure.shaders import PageTimer, ShaderTimer

        return (PageTimer if hasattr(engine.runner, "agent") else ShaderTimer)(engine.runner, call)
    from tuning.measure.replay import ReplayTimer

    return ReplayTimer(engine, call, names)


def _rounds(
    timer: Timer, repeats: int, warmups: int, whole: bool, call: str, times: FunctionTimes
) -> dict[str, tuple[float, float, int]]:
    """Function -> (median, spread, calls); adds the call as a whole to `times`."""
    for _ in range(warmups):
        timer.round(whole)
    samples: dict[str, list[float]] = {}
    counts: Counter[str] = Counter()
    wholes, shares = [], []
    for _ in range(repeats):
        timed = timer.round(whole)
        counts = Counter(function for function, _ in timed.parts)
        totals: Counter[str] = Counter()
        for function, time_us in timed.parts:
            totals[function] += time_us  # type: ignore[assignment]  # Counter adds floats as well
        for function, total in totals.items():
            samples.setdefault(function, []).append(total / counts[function])
        wholes.append(timed.whole_us)
        shares.append(sum(totals.values()) / timed.whole_us)
    times.calls[call] = CallTime(
        call,
        statistics.median(wholes),
        statistics.pstdev(wholes),
        statistics.median(shares),
        timer.overhead_us,
        timer.method,
    )
    return {
        function: (statistics.median(found), statistics.pstdev(found), counts[function])
        for function, found in samples.items()
    }
