"""One decode step as one CUDA graph: what falls into it, and who captures and replays it.

Without a GPU: the module that would run there is walked; the same rewrite is built for this CPU, where a stand-in for
CUDA's graphs calls the captured functions again; and libcudart is played by a recorder. With a GPU: the real thing.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gpt2_tvm import Engine, UserError, compile_model
from gpt2_tvm.build import Plan, lower_plan, make_plan
from gpt2_tvm.checkpoint import random_model
from gpt2_tvm.config import GPT2Config
from gpt2_tvm.passes import cuda_graph
from gpt2_tvm.runners.cuda_graph import CudaDriver, StepGraphs
from gpt2_tvm.weights import write_hf_checkpoint
from targets import load_target

CONFIG = GPT2Config(vocab_size=211, n_positions=64, n_embd=64, n_layer=3, n_head=2)
STEPS = ("decode_b1", "greedy_b1", "keep_b1_m4", "verify_b1_m4")


def plan_for(target: str, quantization: str = "q0f32", **changes: Any) -> Plan:
    return make_plan(CONFIG, load_target(target), quantization, verify_widths=(4,), **changes)


# ---- what falls into a graph


@pytest.mark.parametrize("quantization", [pytest.param("q0f32", marks=pytest.mark.heavy), "q0f16"])
def test_a_step_is_one_graph_launch_and_nothing_else(quantization: str) -> None:
    """In the final module, for CUDA: all kernels of a step inside one graph, as many as the manifest says."""
    from gpt2_tvm.inventory import function_table

    plan = plan_for("h200", quantization, batch_sizes=(1, 4))
    lowered, _ = lower_plan(plan)
    counted = function_table(lowered, plan)
    bodies = {f["name"]: f["kernels"] for f in counted["functions"]}
    steps = cuda_graph.graph_steps(lowered.lowered)
    assert set(STEPS) < set(steps) and {"decode_b4", "greedy_b4", "verify_b4_m4"} < set(steps)
    for step in steps:
        outside, graphs = cuda_graph.launches(lowered.final, cuda_graph.PREFIX + step)
        assert not outside and len(graphs) == 1, step
        assert sum(bodies[name] * times for name, times in graphs[0].items()) == counted["launches"][step]
    # a draw instead of the most likely token costs no launch
    assert counted["launches"]["sample_b1"] == counted["launches"]["greedy_b1"] and "sample_b4" in steps
    # the plain form stays, with every kernel launched by the host
    outside, graphs = cuda_graph.launches(lowered.final, "greedy_b1")
    assert not graphs and outside == cuda_graph.launches(lowered.final, "graph_greedy_b1")[1][0]
    assert not any(name.startswith("graph_prefill") for name in names(lowered.final))


def names(mod: Any) -> list[str]:
    return [var.name_hint for var in mod.get_global_vars()]


def test_the_option() -> None:
    assert plan_for("h200").cuda_graph and not plan_for("cpu").cuda_graph
    plan = plan_for("h200", cuda_graph=False)
    assert not any(name.startswith(cuda_graph.PREFIX) for name in names(lower_plan(plan)[0].final))
    with pytest.raises(UserError, match="--cuda-graph"):
        plan_for("cpu", cuda_graph=True)


def test_a_step_that_would_take_two_graphs_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The result's memory is what splits a step: without that rewrite the last kernel stays outside."""
    lowered = lower_plan(plan_for("h200", cuda_graph=False))[0].lowered
    monkeypatch.setattr(cuda_graph, "_planned", lambda binding, builder: (binding,))
    with pytest.raises(RuntimeError, match="decide_b1_m4 does not fall into one CUDA graph"):
        cuda_graph.add_graph_steps(lowered)


# ---- capture and replay, on this CPU


class Replays:
    """A driver whose graph calls the captured function again: on a CPU that is what a replay does."""

    def __init__(self, refuse: bool = False) -> None:
        self.alive: dict[int, Callable[[], Any]] = {}
        self.launched: list[int] = []
        self.made, self.refuse = 0, refuse

    def capture(self, run: Callable[[], Any]) -> int:
        if self.refuse:
            raise RuntimeError("cudaStreamEndCapture: cudaErrorStreamCaptureInvalidated\nmore")
        self.made += 1
        self.alive[self.made] = run
        return self.made

    def launch(self, graph: int) -> None:
        self.launched.append(graph)
        self.alive[graph]()

    def destroy(self, graph: int) -> None:
        del self.alive[graph]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact for this CPU with the graph steps of a CUDA one."""
    from gpt2_tvm import pipeline
    from gpt2_tvm.passes import cuda_graph as rewrite

    folder = tmp_path_factory.mktemp("graphs")
    model = write_hf_checkpoint(folder / "model", CONFIG, random_model(CONFIG, seed=5))
    with pytest.MonkeyPatch.context() as patch:
        run = pipeline._run

        def with_graphs(mod: Any, passes: Any) -> Any:
            return run(rewrite.add_graph_steps(mod) if passes is pipeline.FINALISE else mod, passes)

        patch.setattr(pipeline, "_run", with_graphs)
        return compile_model(
            str(model), "cpu", output=folder / "artifact", rules="baseline", batch_sizes=(1, 2), verify_widths=(4,)
        )


@pytest.fixture
def graphed(folder: Path) -> Iterator[tuple[Engine, StepGraphs, Replays]]:
    yield engine_with(folder, Replays())


def engine_with(folder: Path, driver: Replays) -> tuple[Engine, StepGraphs, Replays]:
    """An engine whose virtual machine captures through `driver`, as `VmRunner` sets it up for a CUDA artifact."""
    graphs = StepGraphs(driver)
    with graphs.builtins():
        engine = Engine(folder)
    runner: Any = engine.runner
    runner.graphs = graphs
    runner._graphed = frozenset(f"{step}_b{b}" for step in ("decode", "greedy") for b in (1, 2)) | {
        f"{step}_b{b}_m4" for step in ("verify", "keep") for b in (1, 2)
    }
    return engine, graphs, driver


def plain(folder: Path) -> Engine:
    """The same artifact, its steps called without graphs."""
    with StepGraphs(Replays()).builtins():
        return Engine(folder)


def conversation(engine: Engine) -> list[np.ndarray]:
    """Every kind of step, several times, in two batch sizes."""
    seen = []
    for batch in (1, 2, 1):
        engine.reset()
        prompt = np.arange(batch * 5).reshape(batch, 5) * 7 % CONFIG.vocab_size
        seen.append(engine.prefill(prompt))
        for token in (3, 9):
            seen.append(engine.decode([token] * batch))
        seen.append(engine.decode_greedy(6))
        seen.append(engine.verify([[4, 5, 6]] * batch, parents=[-1, 0, 0]))
        engine.keep([0, 2])
        seen.append(engine.verify([[8, 7]] * batch))
        engine.rewind(6)
        seen.append(engine.decode([11] * batch))
        seen.append(engine.decode_greedy(3))
    return seen


def test_replays_give_what_plain_calls_give(graphed: tuple[Engine, StepGraphs, Replays], folder: Path) -> None:
    engine, graphs, driver = graphed
    wanted = conversation(plain(folder))
    for a, b in zip(conversation(engine), wanted, strict=True):
        np.testing.assert_array_equal(a, b)
    # in each batch: decode, greedy, keep and a verify of a tree and one of a chain are captured once, the rest replayed
    assert (graphs.captures, graphs.replays) == (3 * 5, 3 * (2 + 8)) and not graphs.refused
    assert graphs.replays == len(driver.launched)
    # the steps of the batch that is running now, and no others
    assert set(graphs._steps) <= {f"graph_{name}" for name in STEPS} and len(driver.alive) == len(graphs._steps)


def test_n_greedy_tokens_are_n_launches_and_one_read_back(
    graphed: tuple[Engine, StepGraphs, Replays], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, graphs, driver = graphed
    engine.prefill([1, 2, 3])
    engine.decode_greedy(2)  # the first call runs and is captured, the second is a launch
    before, called = len(driver.launched), []
    original = graphs.call
    graphs.call = lambda name, inputs, invoke: original(name, inputs, lambda: called.append(name))  # type: ignore
    read, download = [], engine.runner.download
    monkeypatch.setattr(engine.runner, "download", lambda tensor: (read.append(tensor), download(tensor))[1])  # type: ignore
    engine.decode_greedy(20)
    assert len(read) == 1
    assert len(driver.launched) - before == 20 and graphs.captures == 1
    assert not called  # the virtual machine took no part


def test_new_buffers_make_a_new_graph(graphed: tuple[Engine, StepGraphs, Replays]) -> None:
    """Nothing may be written where an old batch's caches were; and what they took is given back."""
    engine, graphs, driver = graphed
    engine.prefill([1, 2, 3])
    engine.decode_greedy(3)
    first = dict(driver.alive)
    engine.reset()
    engine.prefill([[1, 2], [3, 4]])
    engine.decode_greedy(3)
    assert len(driver.alive) == 1 and not set(driver.alive) & set(first)
    graphs.clear()
    assert not driver.alive


def test_where_cuda_refuses_the_steps_run_plain(folder: Path) -> None:
    engine, graphs, driver = engine_with(folder, Replays(refuse=True))
    for a, b in zip(conversation(engine), conversation(plain(folder)), strict=True):
        np.testing.assert_array_equal(a, b)
    assert graphs.refused == "cudaStreamEndCapture: cudaErrorStreamCaptureInvalidated"
    assert not driver.launched and not graphs.replays


def test_switched_off_the_plain_functions_run(graphed: tuple[Engine, StepGraphs, Replays]) -> None:
    engine, graphs, driver = graphed
    graphs.enabled = False
    engine.prefill([1, 2, 3])
    engine.decode_greedy(5)
    assert not driver.made and not driver.launched


# ---- the calls of CUDA


class Recorder:
    """libcudart's functions by name: records each call, fills in handles, and fails where told to."""

    def __init__(self, failing: dict[str, int] | None = None) -> None:
        self.calls: list[str] = []
        self.failing = failing or {}

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            self.calls.append(name)
            if name == "cudaGetErrorName":
                return b"cudaErrorPlanted"
            out = {"cudaStreamCreateWithFlags": 0, "cudaStreamEndCapture": 1, "cudaGraphInstantiate": 0}.get(name)
            if out is not None and name not in self.failing:
                ctypes.cast(arguments[out], ctypes.POINTER(ctypes.c_void_p))[0] = 64 + len(self.calls)
            return self.failing.get(name, 0)

        return call


def recorded(failing: dict[str, int] | None = None) -> tuple[CudaDriver, Recorder]:
    import tvm

    library = Recorder(failing)
    return CudaDriver(tvm.runtime.device("cuda"), library), library


def current_stream() -> int:
    import tvm
    import tvm_ffi

    device = tvm.runtime.device("cuda")
    return int(tvm_ffi.core._env_get_current_stream(device.dlpack_device_type(), device.index))


def test_the_calls_of_a_capture() -> None:
    driver, library = recorded()
    streams: list[int] = []
    graph = driver.capture(lambda: streams.append(current_stream()))
    assert library.calls == [
        "cudaStreamCreateWithFlags",
        "cudaStreamBeginCapture",
        "cudaStreamEndCapture",
        "cudaGraphInstantiate",
        "cudaGraphDestroy",
    ]
    assert streams == [driver._stream.value] and streams[0] and current_stream() == 0  # TVM's kernels went there
    driver.launch(graph)
    driver.capture(lambda: None)
    assert library.calls[5:] == ["cudaGraphLaunch", *library.calls[1:5]]  # the stream is kept


@pytest.mark.parametrize("name", ["cudaStreamBeginCapture", "cudaStreamEndCapture", "cudaGraphInstantiate"])
def test_a_capture_that_fails_says_where_and_leaves_nothing(name: str) -> None:
    driver, library = recorded({name: 900})
    with pytest.raises(RuntimeError, match=f"{name}: cudaErrorPlanted"):
        driver.capture(lambda: None)
    assert "cudaGetLastError" in library.calls and current_stream() == 0
    if name == "cudaGraphInstantiate":
        assert library.calls.count("cudaGraphDestroy") == 1


def test_an_error_inside_a_capture_ends_it() -> None:
    driver, library = recorded()

    def run() -> None:
        raise ValueError("planted")

    with pytest.raises(ValueError, match="planted"):
        driver.capture(run)
    assert library.calls[-3:] == ["cudaStreamEndCapture", "cudaGetLastError", "cudaGraphDestroy"]
    assert current_stream() == 0


def test_a_launch_that_fails_is_an_error() -> None:
    driver, _ = recorded({"cudaGraphLaunch": 1})
    with pytest.raises(RuntimeError, match="cudaGraphLaunch: cudaErrorPlanted"):
        driver.launch(ctypes.c_void_p(1))


# ---- with a GPU


def gpu_engine(tmp_path: Path, quantization: str) -> Engine:
    import tvm

    from gpt2_tvm.toolchains import cuda_runtime

    if cuda_runtime.driver() is None or not cuda_runtime.load() or not tvm.cuda(0).exist:
        pytest.skip("needs an NVIDIA GPU")
    model = write_hf_checkpoint(tmp_path / "model", CONFIG, random_model(CONFIG, seed=5))
    return Engine(
        compile_model(str(model), "cuda", quantization, tmp_path / "a", batch_sizes=(1, 2), verify_widths=(4,))
    )


@pytest.mark.parametrize("quantization", ["q0f32", "q0f16"])
def test_gpu_ids_equal_the_ungraphed_run(quantization: str, tmp_path: Path) -> None:
    engine = gpu_engine(tmp_path, quantization)
    graphs: StepGraphs = engine.runner.graphs  # type: ignore[attr-defined]
    graphs.enabled = False
    wanted = conversation(engine)
    graphs.enabled = True
    engine.reset()
    for a, b in zip(conversation(engine), wanted, strict=True):
        np.testing.assert_array_equal(a, b)
    assert not graphs.refused and graphs.captures >= 4 and graphs.replays > 20


def test_gpu_50000_replays_without_growth(tmp_path: Path) -> None:
    import resource

    engine = gpu_engine(tmp_path, "q0f16")
    cudart = CudaDriver(engine.runner.device)._cudart  # type: ignore[attr-defined]

    def free() -> int:
        left, total = ctypes.c_size_t(), ctypes.c_size_t()
        assert cudart.cudaMemGetInfo(ctypes.byref(left), ctypes.byref(total)) == 0
        return left.value

    engine.prefill([1, 2, 3])
    first = engine.decode_greedy(50)
    before = free(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(1000):
        engine.rewind(3)
        engine.prefill([4])
        engine.rewind(3)
        engine.decode_greedy(50, first=int(first[0, 0]))
    assert engine.runner.graphs.replays >= 50_000  # type: ignore[attr-defined]
    assert free() >= before[0] - (2 << 20)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss <= before[1] + (32 << 10)  # KiB
    engine.rewind(3)
    np.testing.assert_array_equal(engine.decode_greedy(50, first=int(first[0, 0])), first)
