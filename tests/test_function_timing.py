"""Which function takes how long: that every function is there, as often as the model calls it, and that a slow one is
seen to be slow. Nothing here asserts a time."""

from __future__ import annotations

import json
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from wgsl_harness import device

from gpt2_tvm import Engine, compile_model
from gpt2_tvm.artifact import read_manifest
from gpt2_tvm.errors import UserError
from tuning.measure import replay
from tuning.measure.calls import Call, watched
from tuning.measure.functions import FunctionTimes, _record, make_timer, time_functions
from tuning.measure.replay import ReplayTimer, Step, _CudaEvents
from tuning.measure.session import turn
from tuning.measure.shaders import ShaderTimer, _merged


@pytest.fixture(scope="module")
def webgpu_artifact(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    device()
    folder = tmp_path_factory.mktemp("webgpu") / "tiny"
    return compile_model(str(tiny_model), "webgpu", output=folder, verify_widths=(), page=False)


def expected(artifact: Path, call: str) -> dict[str, int]:
    """Function -> calls, by the manifest."""
    rows = read_manifest(artifact)["functions"]
    return {row["name"]: row["calls"][call] for row in rows if call in row["calls"]}


def check(times: FunctionTimes, artifact: Path, *calls: str) -> None:
    for call in calls:
        own = {one.function: one.calls for one in times.values() if one.call == call}
        assert own == expected(artifact, call)
        whole = times.calls[call]
        assert whole.time_us > 0 and whole.time_us_sd >= 0 and whole.coverage > 0 and whole.method
    for one in times.values():
        assert one.time_us >= 0 and one.time_us_sd >= 0 and one.total_us == one.time_us * one.calls


def test_every_function_of_a_cpu_artifact(tiny_artifact: Path) -> None:
    times = time_functions(tiny_artifact, ("prefill", "decode_b1", "decode_b2"), prompt_tokens=500, repeats=2)
    check(times, tiny_artifact, "prefill", "decode_b1", "decode_b2")
    assert all(key == f"{one.call}:{one.function}" for key, one in times.items())
    alone = time_functions(tiny_artifact, ("decode_b1",), prompt_tokens=5, repeats=1)
    check(alone, tiny_artifact, "decode_b1")
    assert all(key == one.function for key, one in alone.items())


def test_every_function_of_a_webgpu_artifact(webgpu_artifact: Path) -> None:
    times = time_functions(webgpu_artifact, repeats=2)
    check(times, webgpu_artifact, "prefill", "decode_b1")


@pytest.mark.parametrize("fixture", ["tiny_artifact", "webgpu_artifact"])
def test_a_prefill_made_again_leaves_the_cache_as_it_was(fixture: str, request: pytest.FixtureRequest) -> None:
    """What lets a decode step be recorded after the prefill's rounds without another prefill."""
    engine, prompt = Engine(request.getfixturevalue(fixture)), np.asarray([[5, 17, 3, 9]], np.int32)
    engine.prefill(prompt)
    expected = engine.decode(5)
    timer = make_timer(engine, _record(engine, "prefill", prompt))
    timer.round()
    timer.round(whole=False)
    assert _record(engine, "decode_b1", prompt, filled=True).function == "decode_b1"
    engine.rewind(prompt.shape[1])
    assert np.array_equal(engine.decode(5), expected)


def test_without_timestamps_each_kernel_is_submitted_by_itself(
    webgpu_artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gpt2_tvm.runners.wgpu_device import Device

    monkeypatch.setattr(Device, "has_timestamps", False)
    times = time_functions(webgpu_artifact, ("decode_b1",), repeats=2)
    check(times, webgpu_artifact, "decode_b1")
    assert times.calls["decode_b1"].overhead_us > 0 and "submission" in times.calls["decode_b1"].method


def test_replaying_computes_what_the_call_computed(tiny_artifact: Path) -> None:
    """The caches after a replay of a decode step are those after the step, and the next step goes on from them."""
    engine, other = Engine(tiny_artifact), Engine(tiny_artifact)
    prompt = np.asarray([[5, 17, 3, 96]], np.int32)
    names = set(expected(tiny_artifact, "decode_b1"))
    timer = ReplayTimer(engine, _record(engine, "decode_b1", prompt), names)
    before = [engine.runner.download(cache).copy() for cache in engine._caches]
    for _ in range(3):
        timer.round()
    for cache, held in zip(engine._caches, before, strict=True):
        np.testing.assert_array_equal(engine.runner.download(cache), held)
    other.prefill(prompt)
    other.decode(int(prompt[0, -1]))
    np.testing.assert_array_equal(engine.decode(7), other.decode(7))


def test_a_slow_function_is_seen(tiny_artifact: Path) -> None:
    engine = Engine(tiny_artifact)
    call = _record(engine, "decode_b1", np.asarray([[5, 17, 3]], np.int32))
    timer = ReplayTimer(engine, call, set(expected(tiny_artifact, "decode_b1")))
    slow = timer.steps[3]

    def held_up(*arguments: Any) -> None:
        time.sleep(0.02)
        slow.run(*arguments)

    timer.steps[3] = Step("planted", held_up, slow.arguments)
    totals: Counter[str] = Counter()
    for function, time_us in timer.round().parts:
        totals[function] += time_us  # type: ignore[assignment]
    assert totals["planted"] >= 20e3 and totals.most_common(1)[0][0] == "planted"


def test_the_floor_is_subtracted(tiny_artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock on which every call takes 7 us, empty or not, nothing is left."""

    class Constant:
        method = "a constant"

        def __init__(self, runner: Any) -> None:
            pass

        def time(self, steps: list[Step]) -> list[float]:
            return [7.0] * len(steps)

    monkeypatch.setattr(replay, "_Clock", Constant)
    engine = Engine(tiny_artifact)
    call = _record(engine, "prefill", np.asarray([[5, 17, 3]], np.int32))
    timer = ReplayTimer(engine, call, set(expected(tiny_artifact, "prefill")))
    assert timer.overhead_us == 7.0 and {time_us for _, time_us in timer.round().parts} == {0.0}


def test_cuda_events_stand_between_the_steps() -> None:
    """Without a GPU: a recorder in place of CUDA's bindings, whose clock moves when a step runs."""
    log: list[str] = []
    clock = [0.0]

    class Cudart:
        def cudaEventCreate(self) -> tuple[int, list[float]]:
            return 0, [0.0]

        def cudaEventRecord(self, event: list[float], stream: int) -> tuple[int]:
            log.append("event")
            event[0] = clock[0]
            return (0,)

        def cudaEventElapsedTime(self, a: list[float], b: list[float]) -> tuple[int, float]:
            return 0, b[0] - a[0]

    def run(ms: float) -> None:
        log.append("step")
        clock[0] += ms

    def whole() -> None:
        clock[0] += 1000

    events = _CudaEvents(Cudart(), SimpleNamespace(sync=lambda: log.append("sync")), whole)
    steps = [Step("f", run, (1.5,)), Step("g", run, (0.25,)), Step("f", run, (3.0,))]
    for _ in range(2):
        log.clear()
        assert events.time(steps) == [1500.0, 250.0, 3000.0]
        assert log == ["sync", "event", "step", "event", "step", "event", "step", "event", "sync"]
    with pytest.raises(RuntimeError, match="CUDA answers 700"):
        _CudaEvents._checked((700,))


def test_kernels_of_one_function_are_one_part() -> None:
    assert _merged(["a", "a", "b", "a"], [1.0, 2.0, 4.0, 8.0]) == [("a", 3.0), ("b", 4.0), ("a", 8.0)]


def test_watching_an_engine_ends_with_the_block(tiny_artifact: Path) -> None:
    engine = Engine(tiny_artifact)
    seen: list[Call] = []
    with watched(engine, seen.append):
        engine.prefill([1, 2, 3])
        engine.decode(4)
    engine.decode(5)
    assert [call.function for call in seen] == ["prefill", "decode_b1"]
    assert engine.runner.call.__func__ is type(engine.runner).call


def test_shader_timer_rounds(webgpu_artifact: Path) -> None:
    engine = Engine(webgpu_artifact)
    timer = ShaderTimer(engine.runner, _record(engine, "prefill", np.asarray([[5, 17, 3]], np.int32)))
    timed = timer.round()
    assert timed.whole_us > 0
    assert Counter(name for name, _ in timed.parts) == expected(webgpu_artifact, "prefill")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"calls": ("decode_b3",)}, "decode_b3"),
        ({"calls": ("greedy_b1",)}, "decode_b1"),
        ({"repeats": 0}, "at least 1"),
        ({"prompt_tokens": 0}, "at least 1"),
        ({"device": "rpc://host:9190/key"}, "where|machine that runs"),
    ],
)
def test_what_cannot_be_timed(tiny_artifact: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        time_functions(tiny_artifact, **options)
    assert "\n" not in str(error.value)


def test_a_turn_here(tiny_artifact: Path) -> None:
    engine = Engine(tiny_artifact)
    prompt = np.asarray([[5, 17, 3], [1, 2, 3]], np.int32)
    found = turn(engine, prompt, 4)
    assert found.clock == "here" and found.tokens.shape == (2, 4) and found.prefill_s > 0 and found.decode_s > 0
    again = turn(engine, prompt, 4)
    np.testing.assert_array_equal(again.tokens, found.tokens)


def test_command_line(tiny_artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tuning.measure.__main__ import app

    file = tmp_path / "times.json"
    app([str(tiny_artifact), "--repeats", "1", "--json", str(file)], standalone_mode=False)
    told = json.loads(file.read_text())
    assert [call["call"] for call in told["calls"]] == ["prefill", "decode_b1"]
    assert {"time_us", "time_us_sd", "calls", "total_us"} <= set(told["functions"][0])
    printed = capsys.readouterr().out
    assert printed.count("| function") == 2
    for name in {**expected(tiny_artifact, "prefill"), **expected(tiny_artifact, "decode_b1")}:
        assert f"| {name} " in printed
