"""Rounds of speculation that stay on a GPU. Of CUDA what a machine without one can tell: the module that would run
there, and graphs played by a stand-in; on WebGPU through wgpu."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from device_pairs import (
    CONFIG,
    counting,
    decoding,
    externs,
    greedy,
    make_models,
    opened,
    pair,
    prompts,
    read_backs,
)
from wgsl_harness import device

from gpt2_tvm import Engine
from gpt2_tvm.build import lower_plan, make_plan
from gpt2_tvm.decoding.registry import make_strategy
from gpt2_tvm.decoding.strategy import Decoding
from gpt2_tvm.passes import cuda_graph
from gpt2_tvm.runners.cuda_graph import StepGraphs
from targets import load_target


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_models(tmp_path_factory.mktemp("models"))


# ---- CUDA, without one


@pytest.mark.heavy
def test_on_cuda_the_end_of_a_round_is_one_graph() -> None:
    plan = make_plan(CONFIG, load_target("h200"), "q0f16", batch_sizes=(1, 4), verify_widths=(4, 8))
    lowered, _ = lower_plan(plan)
    steps = [name for name in cuda_graph.graph_steps(lowered.lowered) if name.startswith("speculate")]
    assert steps == [f"speculate_b{b}_m{m}" for b in (1, 4) for m in (4, 8)]
    for step in steps:
        outside, graphs = cuda_graph.launches(lowered.final, cuda_graph.PREFIX + step)
        assert not outside and len(graphs) == 1
        assert {"accept_draft", "drafted_rows"} <= {name.rstrip("0123456789") for name in graphs[0]}
        # nothing that waits for the device or copies from it, inside the graph or around it
        assert externs(lowered.final, cuda_graph.PREFIX + step) <= {
            cuda_graph.RUN_OR_CAPTURE,
            cuda_graph.CACHED_ALLOC,
            "vm.builtin.reshape",
            "vm.builtin.match_shape",
            "vm.builtin.check_tensor_info",
            "vm.builtin.match_prim_value",
            "vm.builtin.check_tuple_info",
            "vm.builtin.tuple_getitem",
            "vm.builtin.make_tuple",
            "vm.builtin.make_shape",
            "vm.builtin.null_value",
            "vm.builtin.copy",  # of a reference
        }


class Replays:
    """A driver whose graph calls the captured function again: on a CPU that is what a replay does."""

    def __init__(self, refuse: bool = False) -> None:
        self.made, self.launched, self.refuse, self.depth = 0, 0, refuse, 0

    def capture(self, work: Callable[[], Any]) -> Callable[[], Any]:
        if self.refuse:
            raise RuntimeError("cudaStreamEndCapture: cudaErrorStreamCaptureInvalidated")
        assert not self.depth, "a capture inside a capture"
        self.made += 1
        kept = [array.copy() for array in self.state()]
        self.depth += 1
        work()  # launches are recorded, not run: what they did is undone
        self.depth -= 1
        for array, before in zip(self.state(), kept, strict=True):
            array[...] = before
        return work

    state: Callable[[], list[np.ndarray]] = staticmethod(lambda: [])

    def launch(self, graph: Callable[[], Any]) -> None:
        self.launched += 1
        graph()

    def destroy(self, graph: Any) -> None:
        pass


@pytest.fixture(scope="module")
def graph_pair(models: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A pair for this CPU with the graph steps of a CUDA one."""
    from gpt2_tvm import pipeline

    work = pipeline._run

    def with_graphs(mod: Any, passes: Any) -> Any:
        return work(cuda_graph.add_graph_steps(mod) if passes is pipeline.FINALISE else mod, passes)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "_run", with_graphs)
        made = pair(models, tmp_path_factory.mktemp("graphs"), widths=(2, 4), batch_sizes=(1,))
    return made


@pytest.fixture
def graphed(graph_pair: tuple[Path, Path]) -> Iterator[Callable[[bool], tuple[tuple[Engine, Engine], Replays]]]:
    def make(refuse: bool) -> tuple[tuple[Engine, Engine], Replays]:
        driver, found = Replays(refuse), []
        for path in graph_pair:
            graphs = StepGraphs(driver)
            with graphs.builtins():
                engine = Engine(path)
            runner: Any = engine.runner
            runner.graphs = graphs
            runner._graphed = frozenset({"greedy_b1", "speculate_b1_m2", "speculate_b1_m4"})
            found.append(engine)

        def state() -> list[np.ndarray]:
            tensors = [t for e in found for t in (*e._caches, *e._tensors.values())]
            return [np.from_dlpack(tensor) for tensor in tensors]

        driver.state = state  # type: ignore[method-assign]
        return (found[0], found[1]), driver

    yield make


@pytest.mark.heavy
def test_a_round_becomes_one_graph_of_both_models(graphed: Any) -> None:
    engines, driver = graphed(False)
    given = prompts(1, 5, longest=8)
    expected = greedy(engines, given, 40)
    made = decoding(engines, given, 40, 3)
    rounds = iter(made)
    next(rounds)
    for _ in range(2):  # the first loads what the kernels need, the second is captured
        next(rounds)
    before = driver.launched, driver.made
    assert engines[0].runner.graphs.captures and not engines[0].runner.graphs.refused  # type: ignore[attr-defined]
    patch, counted = read_backs(engines)
    after = sum(1 for _ in rounds)
    patch.undo()
    assert [row.tokens for row in made.rows] == expected
    # rounds of three tokens are one launch; the last one may be shorter, and so another graph
    assert after - 1 <= driver.launched - before[0] <= after + 8 and driver.made - before[1] <= 3
    assert counted["draft"] == 0 and counted["target"] == after


def test_where_cuda_refuses_the_calls_run_one_by_one(graphed: Any) -> None:
    engines, driver = graphed(True)
    given = prompts(1, 6, longest=8)
    assert decoding(engines, given, 40, 3).run() == greedy(engines, given, 40)
    assert not driver.launched and "Invalidated" in engines[0].runner.graphs.refused  # type: ignore[attr-defined]


# ---- WebGPU


@pytest.fixture(scope="module")
def on_webgpu(
    models: tuple[Path, Path], no_page: None, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Engine, Engine]:
    device()
    folder = tmp_path_factory.mktemp("webgpu")
    return opened(pair(models, folder, "webgpu", (4,), rules="full", batch_sizes=(1, 2)))


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.heavy
def test_webgpu_writes_greedys_text_with_one_submission_and_one_read_back_a_round(
    on_webgpu: tuple[Engine, Engine], batch: int
) -> None:
    for m in (1, 3):
        given = prompts(batch, 40 + m, longest=8)
        expected = greedy(on_webgpu, given, 30)
        made = decoding(on_webgpu, given, 30, m)
        rounds = iter(made)
        next(rounds)
        counted = Counter[str]()
        gpu = on_webgpu[0].runner.device  # type: ignore[attr-defined]
        assert gpu is on_webgpu[1].runner.device  # type: ignore[attr-defined]
        with pytest.MonkeyPatch.context() as patch:
            for name in ("submit", "read", "wait"):
                patch.setattr(gpu, name, counting(getattr(gpu, name), name, counted))
            steps = sum(1 for _ in rounds)
        assert [row.tokens for row in made.rows] == expected
        assert sum(row.accepted for row in made.rows) > 0
        decided = max(row.steps for row in made.rows) - len(made.steps)  # near ties, if there were any
        assert counted["submit"] == counted["read"] == steps + max(0, decided) and not counted["wait"]
        assert made.strategy.rounds.read_backs > 0


@pytest.mark.heavy
def test_webgpu_checks_lookups_with_one_submission_and_one_read_back_a_step(on_webgpu: tuple[Engine, Engine]) -> None:
    given = [[1, 2, 3, 4, 1, 2, 3]]
    expected = greedy(on_webgpu, given, 40)
    made = Decoding(make_strategy("lookup", on_webgpu[0], length="3"), given, 40)
    steps, counted = iter(made), Counter[str]()
    next(steps)
    gpu = on_webgpu[0].runner.device  # type: ignore[attr-defined]
    with pytest.MonkeyPatch.context() as patch:
        for name in ("submit", "read", "wait"):
            patch.setattr(gpu, name, counting(getattr(gpu, name), name, counted))
        taken = sum(1 for _ in steps)
    assert [row.tokens for row in made.rows] == expected and made.rows[0].accepted > 0
    decided = max(0, made.rows[0].steps - taken)  # near ties, if there were any
    assert counted["submit"] == counted["read"] == taken + decided and not counted["wait"]


def test_webgpus_kernels_take_no_more_buffers_than_a_browser_grants(on_webgpu: tuple[Engine, Engine]) -> None:
    shaders = on_webgpu[0].runner._shaders  # type: ignore[attr-defined]
    own = ("accept_draft", "near_ties", "draft_scores", "accept_drawn", "own_scores", "finish_drawn")
    ours = {name: len(s.bindings) for name, s in shaders.items() if any(part in name for part in own)}
    assert len(ours) >= len(own) and max(ours.values()) <= 8
