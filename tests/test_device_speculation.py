"""Rounds of speculation that stay on the device: what the kernels decide, that the text is greedy's, and that the host
is asked once a round. On this CPU through the same TIR, on WebGPU through wgpu; of CUDA what a machine without one can
tell: the module that would run there, and graphs played by a stand-in."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tvm
from reference import checkpoint
from tvm import relax
from wgsl_harness import device, run

from gpt2_tvm import Engine, UserError, attention, compile_model
from gpt2_tvm.build import lower_plan, make_plan
from gpt2_tvm.checkpoint import ModelSource
from gpt2_tvm.config import GPT2Config
from gpt2_tvm.decoding import rejection
from gpt2_tvm.decoding.device_rounds import usable
from gpt2_tvm.decoding.device_speculative import DeviceSpeculative
from gpt2_tvm.decoding.draft import ModelDraft
from gpt2_tvm.decoding.early import truncate
from gpt2_tvm.decoding.registry import make_strategy
from gpt2_tvm.decoding.rejection import accept_greedy, near_tie
from gpt2_tvm.decoding.sampling import Sampling
from gpt2_tvm.decoding.speculative import Speculative
from gpt2_tvm.decoding.strategy import Decoding
from gpt2_tvm.kernels.accept_draft import TOLD, accept_draft, cpu_near_ties, gpu_near_ties
from gpt2_tvm.kernels.spec import GpuLimits
from gpt2_tvm.passes import cuda_graph
from gpt2_tvm.runners.cuda_graph import StepGraphs
from targets import load_target

CONFIG = GPT2Config(vocab_size=11, n_positions=64, n_embd=32, n_layer=3, n_head=2, bos_token_id=None, eos_token_id=None)
SPREAD = 6.0  # of the weights: text that varies, and drafts that agree now and then
WEBGPU = GpuLimits("webgpu", threads_per_block=256, shared_memory_bytes=32768, warp_size=1)


# ---- kernels


def on_cpu(func: Any, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
    built = tvm.compile(tvm.IRModule({"main": func.with_attr("global_symbol", "main")}), "llvm")
    tensors = [tvm.runtime.tensor(array) for array in arrays]
    built["main"](*tensors)
    return [tensor.numpy() for tensor in tensors]


def accepted(best: np.ndarray, lengths: np.ndarray, positions: np.ndarray, history: np.ndarray) -> list[np.ndarray]:
    """`accept_draft` by the host's own rule: told, token, positions, history."""
    batch, rows = best.shape
    told, token = np.zeros((batch, rows + TOLD), np.int32), np.zeros((batch, 1), np.int32)
    positions, history = positions.copy(), history.copy()
    for b in range(batch):
        if lengths[b]:
            at = positions[b]
            drafted = history[b, at + 1 : at + lengths[b]].tolist()
            stand = accept_greedy(best[b].tolist(), drafted)
            said = int(best[b, stand])
            token[b, 0] = said if said >= 0 else -1 - said
            told[b, :TOLD] = stand + 1, said < 0
            told[b, TOLD : TOLD + stand + 1] = [*drafted[:stand], token[b, 0]]
            positions[b] = at + stand + 1
            if positions[b] < history.shape[1]:
                history[b, positions[b]] = token[b, 0]
    return [told, token, positions, history]


@pytest.mark.parametrize("where", ["cpu", "webgpu"])
def test_what_stands_is_what_the_host_would_take(where: str) -> None:
    rng, batch, rows, capacity = np.random.default_rng(1), 512, 5, 12
    history = rng.integers(0, 2, (batch, capacity)).astype(np.int32)  # two tokens only: drafts agree often
    best = rng.integers(0, 2, (batch, rows)).astype(np.int32)
    best = np.where(rng.random(best.shape) < 0.2, -1 - best, best).astype(np.int32)
    lengths = rng.integers(0, rows + 1, batch).astype(np.int32)
    positions = np.minimum(rng.integers(0, capacity, batch), capacity - np.maximum(lengths, 1)).astype(np.int32)
    token, drafting = np.zeros((batch, 1), np.int32), np.full(batch, 99, np.int32)
    arrays = [best, lengths, token, positions, drafting, history, np.full((batch, rows + TOLD), 77, np.int32)]
    func = accept_draft(batch, rows, capacity, where != "cpu")
    _, _, new_token, new_positions, new_drafting, new_history, told = (run if where != "cpu" else on_cpu)(func, arrays)
    wanted = accepted(best, lengths, positions, history)
    for ours, theirs in zip((told, new_token, new_positions, new_history), wanted, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(new_drafting, new_positions)
    assert {*range(6)} == set(told[:, 0].tolist()) and told[:, 1].any()


@pytest.mark.parametrize("where", ["cpu", "webgpu"])
@pytest.mark.parametrize("vocab", [11, 300, 2048])
def test_near_ties_are_the_hosts(where: str, vocab: int) -> None:
    rng = np.random.default_rng(vocab)
    logits = rng.normal(0, 3, (6, vocab)).astype(np.float32)
    logits[1, [2, 9]] = logits[1].max() + 1
    logits[2, vocab - 1] = logits[2].max() * (1 - 1e-5)
    logits[3, 0] = -1e6  # a large magnitude widens what is near
    logits[4] -= 50  # all negative
    logits[5, 5] = logits[5].max() * (1 - 1e-4)
    best = logits.argmax(-1).astype(np.int32)
    ties = np.array([near_tie(row[None], rejection.TIE) is not None for row in logits])
    assert ties.tolist()[:4] == [False, True, True, True] and not ties[5]
    if where == "cpu":
        func, shape = cpu_near_ties(2, 3, vocab, rejection.TIE), (2, 3)
        marked = on_cpu(func, [logits.reshape(*shape, vocab), best.reshape(shape)])[1].reshape(-1)
    else:
        marked = run(gpu_near_ties(6, vocab, rejection.TIE, WEBGPU), [logits, best])[1]
    np.testing.assert_array_equal(marked, np.where(ties, -1 - best, best))


# ---- a pair on this CPU, compiled as for a GPU


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint, and its first two layers."""
    folder = tmp_path_factory.mktemp("models")
    model = checkpoint(folder / "model", CONFIG, spread=SPREAD)
    return model, truncate(ModelSource("model", CONFIG, folder=model), 2, folder / "first")


def pair(
    models: tuple[Path, Path], folder: Path, target: str = "cpu", widths: tuple[int, ...] = (4, 8), **options: Any
) -> tuple[Path, Path]:
    """The artifacts of a target and its draft."""
    options = {"rules": "baseline", "batch_sizes": (1, 4), **options}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention.CpuKernels, "speculates", True)
        first, second = (
            compile_model(str(m), target, output=folder / m.name, verify_widths=w, **options)
            for m, w in zip(models, (widths, (2,) if target == "cpu" else ()), strict=True)
        )
    return first, second


def opened(paths: tuple[Path, Path]) -> tuple[Engine, Engine]:
    return Engine(paths[0]), Engine(paths[1])


@pytest.fixture(scope="module")
def engines(models: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Engine, Engine]:
    return opened(pair(models, tmp_path_factory.mktemp("cpu")))


def prompts(count: int, seed: int, longest: int = 30) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, CONFIG.vocab_size, int(rng.integers(1, longest))).tolist() for _ in range(count)]


def decoding(engines: tuple[Engine, Engine], given: list[list[int]], n: int, m: object, eos: int | None = None) -> Any:
    strategy = make_strategy("speculative", engines[0], draft=engines[1], length=str(m))
    assert isinstance(strategy, DeviceSpeculative)
    return Decoding(strategy, given, n, eos)


def greedy(engines: tuple[Engine, Engine], given: list[list[int]], n: int, eos: int | None = None) -> list[list[int]]:
    return Decoding(make_strategy("greedy", engines[0]), given, n, eos).run()


@pytest.mark.parametrize("m", [*range(1, 9), "adaptive"])
@pytest.mark.parametrize("batch", [1, 3])
def test_the_text_is_greedys(engines: tuple[Engine, Engine], m: object, batch: int) -> None:
    for seed in range(4):
        given = prompts(batch, 10 * seed + batch)
        made = decoding(engines, given, 30, m)
        assert made.run() == greedy(engines, given, 30)
        assert m == "adaptive" or all(0 < row.accepted <= row.examined <= row.drafted for row in made.rows)


def test_each_sequence_has_its_own_acceptance(engines: tuple[Engine, Engine]) -> None:
    given = prompts(3, 13)
    made = decoding(engines, given, 30, 4)
    made.run()
    alone = [decoding(engines, [prompt], 30, 4) for prompt in given]
    for one in alone:
        one.run()
    counted = [(row.steps, row.drafted, row.examined, row.accepted) for row in made.rows]
    assert counted == [(r.steps, r.drafted, r.examined, r.accepted) for one in alone for r in one.rows]
    assert len({row.accepted / row.examined for row in made.rows}) > 1


def test_a_full_context_and_an_end_of_text_end_it_alike(engines: tuple[Engine, Engine]) -> None:
    given = [[1] * 60, prompts(1, 8)[0], [2] * 63]
    expected = greedy(engines, given, 100)
    for m in (1, 3, 7):
        made = decoding(engines, given, 100, m)
        assert made.run() == expected
        assert [row.finish for row in made.rows] == ["context"] * 3
        eos = expected[1][4]
        cut = [tokens[: tokens.index(eos)] if eos in tokens else tokens for tokens in expected]
        ended = decoding(engines, given, 100, m, eos)
        assert ended.run() == cut and ended.rows[1].finish == "eos"


def test_a_draft_that_fell_behind_catches_up(engines: tuple[Engine, Engine]) -> None:
    """Rounds without drafts in between, of all sequences or of some: nothing stands less often for it."""
    given = prompts(3, 21, longest=8)
    expected = greedy(engines, given, 40)
    made = decoding(engines, given, 40, 3)
    rng = np.random.default_rng(4)
    made.strategy.length.choose = lambda b, costs, behind=0: int(rng.integers(0, 4)) * int(rng.integers(0, 2))
    assert made.run() == expected
    steady = decoding(engines, given, 40, 3)
    steady.run()
    rates = [sum(r.accepted for r in d.rows) / sum(r.examined for r in d.rows) for d in (made, steady)]
    assert rates[0] == pytest.approx(rates[1], abs=0.12)


def test_a_near_tie_is_left_to_decode(models: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rejection, "TIE", 0.1)  # so wide that ties come often
        wide = opened(pair(models, tmp_path, widths=(4,)))
    for batch in (1, 3):
        given, calls = prompts(batch, 12), 0
        expected = greedy(wide, given, 30)
        decode = wide[0].decode

        def counted(ids: Any, decode: Callable[[Any], Any] = decode) -> Any:
            nonlocal calls
            calls += 1
            return decode(ids)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(wide[0], "decode", counted)
            made = decoding(wide, given, 30, 3)
            assert made.run() == expected
        assert calls > 2 and sum(row.accepted for row in made.rows) > 0


def counting(original: Callable[..., Any], name: str, counted: Counter[str]) -> Callable[..., Any]:
    def call(*arguments: Any) -> Any:
        counted[name] += 1
        return original(*arguments)

    return call


def read_backs(engines: tuple[Engine, Engine]) -> tuple[pytest.MonkeyPatch, Counter[str]]:
    patch, counted = pytest.MonkeyPatch(), Counter[str]()
    for name, engine in zip(("target", "draft"), engines, strict=True):
        patch.setattr(engine.runner, "download", counting(engine.runner.download, name, counted))
    return patch, counted


@pytest.mark.parametrize("m", [1, 3, 7, 9, "adaptive"])
@pytest.mark.parametrize("batch", [1, 3])
def test_what_the_host_drafts_is_checked_on_the_device(engines: tuple[Engine, Engine], m: object, batch: int) -> None:
    """Lookup: as many read-backs as steps, each of a few integers, unless a draft is wider than any check."""
    given, accepted = [*prompts(batch - 1, 17), [1, 2, 3, 4] * 5], 0
    expected = greedy(engines, given, 60)
    made = Decoding(make_strategy("lookup", engines[0], length=str(m)), given, 60)
    patch, counted = read_backs(engines)
    steps = iter(made)
    next(steps)
    patch.setattr(engines[0], "decode", counting(engines[0].decode, "decode", counted))
    patch.setattr(engines[0], "verify", counting(engines[0].verify, "verify", counted))
    before, taken = counted["target"], sum(1 for _ in steps)
    patch.undo()
    accepted = sum(row.accepted for row in made.rows)
    assert [row.tokens for row in made.rows] == expected and (accepted > 0 or m == "adaptive")
    assert counted["verify"] == 0 or m == 9
    ties = max(row.steps for row in made.rows) - taken
    assert taken <= counted["target"] - before <= taken + max(0, ties) + 2


@pytest.mark.parametrize("m", [1, 5])
@pytest.mark.parametrize("batch", [1, 3])
def test_one_read_back_a_round(engines: tuple[Engine, Engine], m: int, batch: int) -> None:
    made = decoding(engines, prompts(batch, 31, longest=8), 30, m)
    steps = iter(made)
    next(steps)
    before = made.strategy.rounds.read_backs
    patch, counted = read_backs(engines)
    patch.setattr(engines[0], "decode", counting(engines[0].decode, "decode", counted))
    taken = sum(1 for _ in steps)
    patch.undo()
    rounds = made.strategy.rounds.read_backs - before
    assert counted["draft"] == 0
    # decode steps are for a last token, and for near ties
    assert counted["target"] == rounds + counted["decode"]
    assert taken - 1 <= rounds <= taken and counted["decode"] <= taken - rounds + 2


def test_which_pairs_can(engines: tuple[Engine, Engine], models: tuple[Path, Path], tmp_path: Path) -> None:
    target, draft = engines
    assert usable(target, draft)
    options: dict[str, Any] = {"rules": "baseline", "batch_sizes": (1, 4)}
    plain = Engine(compile_model(str(models[0]), "cpu", output=tmp_path / "a", verify_widths=(2,), **options))
    assert not usable(plain, draft)
    assert type(make_strategy("speculative", plain, draft=draft, length="3")) is Speculative
    short = Engine(
        compile_model(str(models[1]), "cpu", output=tmp_path / "b", verify_widths=(), max_seq_len=32, **options)
    )
    assert not usable(target, short)
    cut = make_strategy("speculative", target, draft=draft, length="3", sampling=Sampling(1.0, top_k=4))
    assert type(cut) is Speculative and isinstance(cut.draft, ModelDraft)
    with pytest.raises(UserError, match="whole vocabulary"):
        DeviceSpeculative(target, draft, cut.length, Sampling(1.0, top_k=4))


# ---- CUDA, without one


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


def externs(mod: Any, name: str) -> set[str]:
    """Names of the runtime's functions that a function calls, itself or in its graph."""
    found: set[str] = set()
    for var, func in mod.functions_items():
        if isinstance(func, relax.Function) and (var.name_hint == name):

            def visit(node: Any) -> None:
                if isinstance(node, relax.ExternFunc):
                    found.add(str(node.global_symbol))

            relax.analysis.post_order_visit(func, visit)
    return found


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
def on_webgpu(models: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Engine, Engine]:
    device()
    folder = tmp_path_factory.mktemp("webgpu")
    return opened(pair(models, folder, "webgpu", (4,), rules="full", batch_sizes=(1, 2)))


@pytest.mark.parametrize("batch", [1, 2])
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
    ours = {name: len(s.bindings) for name, s in shaders.items() if "accept" in name or "near_ties" in name}
    assert ours and max(ours.values()) <= 8
