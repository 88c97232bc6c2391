"""Streams: what their folder holds, what the compiled pass computes, that the text is greedy's, and what is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tvm
from reference import checkpoint
from wgsl_harness import run

from gpt2_tvm import Engine, UserError, compile_model
from gpt2_tvm.checkpoint import ModelSource
from gpt2_tvm.config import GPT2Config
from gpt2_tvm.decoding.registry import make_strategy
from gpt2_tvm.decoding.sampling import Sampling
from gpt2_tvm.decoding.strategy import Decoding
from gpt2_tvm.decoding.streaming import Streaming, likeliest_paths
from gpt2_tvm.decoding.subjects import expand
from gpt2_tvm.kernels.spec import GpuLimits
from gpt2_tvm.kernels.stream_told import cpu_choices, gpu_choices, tell_host
from gpt2_tvm.streams import (
    StreamConfig,
    base_digests,
    check_shape,
    count_parameters,
    read_plan,
    read_tensors,
    tensor_shapes,
    write_streams,
)
from gpt2_tvm.streams.running import Choices

CONFIG = GPT2Config(vocab_size=11, n_positions=64, n_embd=32, n_layer=3, n_head=2, bos_token_id=None, eos_token_id=None)
SPREAD = 6.0  # of the weights: text that varies
G, LAYERS, RANK = 3, 2, 4
WEBGPU = GpuLimits("webgpu", threads_per_block=256, shared_memory_bytes=32768, warp_size=1)


def on_cpu(func: Any, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
    built = tvm.compile(tvm.IRModule({"main": func.with_attr("global_symbol", "main")}), "llvm")
    tensors = [tvm.runtime.tensor(array) for array in arrays]
    built["main"](*tensors)
    return [tensor.numpy() for tensor in tensors]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and streams for it with weights that change what comes out."""
    folder = tmp_path_factory.mktemp("streams")
    source = ModelSource("model", CONFIG, folder=checkpoint(folder / "model", CONFIG, spread=SPREAD))
    config, rng = StreamConfig(G, LAYERS, RANK, base_digests(source)), np.random.default_rng(0)
    shapes = tensor_shapes(config, CONFIG)
    write_streams(folder / "streams", config, {name: rng.normal(0, 0.5, shape) for name, shape in shapes.items()})
    return folder


def made(folder: Path, rows: str, name: str = "artifact") -> Engine:
    artifact = compile_model(
        str(folder / "model"),
        "cpu",
        output=folder / f"{name}-{rows}",
        batch_sizes=(1, 3),
        verify_widths=(4,),
        streams=folder / "streams",
        stream_rows=rows,
    )
    return Engine(artifact)


@pytest.fixture(scope="module")
def whole(folder: Path) -> Engine:
    return made(folder, "5")


@pytest.fixture(scope="module")
def pruned(folder: Path) -> Engine:
    return made(folder, "8,4")


def prompts(count: int, seed: int, longest: int = 30) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, CONFIG.vocab_size, int(rng.integers(1, longest))).tolist() for _ in range(count)]


@pytest.mark.parametrize("depth", [1, 2, 3, 8, "adaptive"])
@pytest.mark.parametrize("batch", [1, 2, 3])
def test_the_text_is_greedys(whole: Engine, pruned: Engine, depth: int | str, batch: int) -> None:
    accepted = 0
    for engine in (whole, pruned):
        for seed in range(3):
            given = prompts(batch, 10 * seed + batch)
            expected = Decoding(make_strategy("greedy", engine), given, 24).run()
            decoding = Decoding(make_strategy("streaming", engine, length=str(depth)), given, 24)
            assert decoding.run() == expected
            accepted += sum(row.accepted for row in decoding.rows)
    assert accepted > 0 or depth == "adaptive"


def test_a_full_context_and_an_end_of_text_end_it_alike(whole: Engine, pruned: Engine) -> None:
    given = [[1] * 60, prompts(1, 8)[0], [2] * 63]
    for engine in (whole, pruned):
        expected = Decoding(make_strategy("greedy", engine), given, 100).run()
        decoding = Decoding(make_strategy("streaming", engine, length="3"), given, 100)
        assert decoding.run() == expected
        assert [row.finish for row in decoding.rows] == ["context"] * 3
        eos = expected[1][4]
        cut = [tokens[: tokens.index(eos)] if eos in tokens else tokens for tokens in expected]
        assert Decoding(make_strategy("streaming", engine, length="3"), given, 100, eos).run() == cut


class Oracle(Streaming):
    """Streams that say what greedy decoding will write, and one wrong token beside each that they like better."""

    texts: list[list[int]]

    def _tree(self, b: int, row: object) -> object:
        if self._said[b] is not None:
            at = len(row.ids) - row.prompt_tokens  # type: ignore[attr-defined]
            coming = [*self.texts[b][at : at + G], 0, 0, 0][:G]
            self._said[b] = Choices([[(t + 1) % CONFIG.vocab_size, t] for t in coming], [[-0.5, -1.0]] * G)
        return super()._tree(b, row)  # type: ignore[arg-type]


def test_a_branch_that_is_not_the_first_is_found_and_kept(pruned: Engine) -> None:
    """Of 8 rows the early exit keeps 4; where it keeps the right ones several tokens come at once."""
    given = prompts(3, 21)
    expected = Decoding(make_strategy("greedy", pruned), given, 40).run()
    strategy = Oracle(pruned, make_strategy("streaming", pruned, length="3").length)  # type: ignore[attr-defined]
    strategy.texts = expected
    decoding = Decoding(strategy, given, 40)
    assert decoding.run() == expected
    assert all(row.accepted > 5 for row in decoding.rows)


def test_the_compiled_pass_is_the_trained_one(folder: Path, whole: Engine, pruned: Engine) -> None:
    """Logits of rows and of streams, after a chain and after the right branch of a tree, beside torch's."""
    torch = pytest.importorskip("torch")
    from gpt2_tvm.training.stream_student import StreamModel
    from gpt2_tvm.weights import iter_weights

    source = ModelSource("model", CONFIG, folder=folder / "model")
    plan = read_plan(folder / "streams", source, "5")
    model = StreamModel(CONFIG, dict(iter_weights(source, "float32")), plan.config, dict(read_tensors(plan, CONFIG)))

    def reference(ids: list[int]) -> tuple[np.ndarray, np.ndarray]:
        with torch.no_grad():
            start, held, x = model.run_base(torch.tensor([ids]))
            streams = model.run_streams(start, held, torch.tensor([len(ids) - 1]))
            return model.head(x)[0].numpy(), streams[0, 0].numpy()

    ids = [1, 5, 3, 8, 2, 2, 7]
    a = int(reference(ids)[0][-1].argmax())
    b = int(reference([*ids, a])[0][-1].argmax())
    wrong = (a + 1) % CONFIG.vocab_size
    for engine in (whole, pruned):
        engine.reset()
        engine.prefill(ids[:-1])
        logits, rows, streams = engine.stream([[ids[-1], wrong, a, b]], [[-1, 0, 0, 2]])
        after, said = reference([*ids, a, b])
        assert rows[0][:4].tolist() == [0, 1, 2, 3]
        np.testing.assert_allclose(logits[0][[0, 2, 3]], after[-3:], atol=2e-4)
        np.testing.assert_allclose(logits[0][1], reference([*ids, wrong])[0][-1], atol=2e-4)
        np.testing.assert_allclose(streams[0], said, atol=2e-4)
        assert engine.positions.tolist() == [len(ids) + 2]
        np.testing.assert_allclose(engine.decode(4)[0], reference([*ids, a, b, 4])[0][-1], atol=2e-4)


def test_an_early_exit_keeps_the_likeliest_branches(folder: Path, pruned: Engine) -> None:
    """Eight candidates in a row and beside each other: those kept have the largest sums of log-probabilities."""
    torch = pytest.importorskip("torch")
    from gpt2_tvm.training.stream_student import StreamModel
    from gpt2_tvm.weights import iter_weights

    source = ModelSource("model", CONFIG, folder=folder / "model")
    plan = read_plan(folder / "streams", source, "8,4")
    model = StreamModel(CONFIG, dict(iter_weights(source, "float32")), plan.config)
    ids, tokens, parents = [3, 1, 4, 1], [5, 0, 1, 2, 3, 4, 5], [0, 0, 1, 1, 2, 3, 4]
    branches: list[list[int]] = [[]]
    for token, parent in zip(tokens, parents, strict=True):
        branches.append([*branches[parent], token])

    def score(branch: list[int]) -> float:
        with torch.no_grad():
            start, _, _ = model.run_base(torch.tensor([[*ids, *branch]]))
            logs = torch.log_softmax(model.head(start)[0], -1)
        return sum(float(logs[len(ids) - 1 + i, token]) for i, token in enumerate(branch))

    pruned.reset()
    pruned.prefill(ids[:-1])
    _, rows, _ = pruned.stream([[ids[-1], *tokens]], [[-1, *parents]])
    best = sorted(range(8), key=lambda j: -score(branches[j]))[:4]
    assert rows[0].tolist() == sorted(best)


def test_paths_come_likeliest_first() -> None:
    shares = [[0.6, 0.3, 0.1], [0.7, 0.1, 0.1], [0.25, 0.25, 0.25]]
    said = Choices([[0, 1, 2], [2, 0, 1], [0, 1, 2]], [[math.log(share) for share in row] for row in shares])
    tree = likeliest_paths(said, 2, 4)
    # 0 (0.6), then 0 2 (0.42), then 1 (0.3), then 1 2 (0.21)
    assert (tree.ids, tree.parents) == ([0, 2, 1, 2], [-1, 0, -1, 2])
    assert likeliest_paths(said, 1, 2).ids == [0, 1]
    assert likeliest_paths(said, 0, 2).ids == [] == likeliest_paths(said, 3, 0).ids
    chain = likeliest_paths(Choices([[0, 9], [1, 9], [2, 9]], [[-0.01, -9.0]] * 3), 3, 3)
    assert (chain.ids, chain.parents) == ([0, 1, 2], [-1, 0, 1])


@pytest.mark.parametrize("where", ["cpu", "webgpu"])
@pytest.mark.parametrize("vocab", [5, 300, 2048])
def test_the_likeliest_tokens_of_a_stream_are_the_hosts(where: str, vocab: int) -> None:
    rng = np.random.default_rng(vocab)
    logits = rng.normal(0, 3, (2, 3, vocab)).astype(np.float32)
    logits[0, 1, [1, vocab - 1]] = logits[0, 1].max() + 1  # equal ones: the lowest first
    logits[1, 0] = -70.0
    logits[1, 2, 3] = 80.0
    func = cpu_choices(2, 3, vocab, 4) if where == "cpu" else gpu_choices(6, vocab, 4, WEBGPU)
    given = logits if where == "cpu" else logits.reshape(6, vocab)
    shape = (*given.shape[:-1], 4)
    arrays = [given, np.full(shape, -7, np.int32), np.zeros(shape, np.float32)]
    if where == "cpu":
        arrays.insert(1, np.array([1, 2], np.int32))
    *_, ids, logs = on_cpu(func, arrays) if where == "cpu" else run(func, arrays)
    order = np.argsort(-given, axis=-1, kind="stable")[..., :4]
    np.testing.assert_array_equal(ids, order)
    wide = given.astype(np.float64) - given.max(-1, keepdims=True)
    wide -= np.log(np.exp(wide).sum(-1, keepdims=True))
    np.testing.assert_allclose(logs, np.take_along_axis(wide, order, -1), atol=2e-5, rtol=1e-6)


@pytest.mark.parametrize("where", ["cpu", "webgpu"])
def test_what_the_host_is_told(where: str) -> None:
    best = np.array([[5, 6, -8, 9], [3, 1, 1, 1], [4, 4, 4, 4]], np.int32)
    path, counts = np.array([[0, 1, 2, 0], [0, 3, 0, 0], [0, 0, 0, 0]], np.int32), np.array([3, 2, 0], np.int32)
    ids = np.arange(12, dtype=np.int32).reshape(3, 2, 2)
    logs = -np.arange(12, dtype=np.float32).reshape(3, 2, 2) / 8
    func = tell_host(3, 4, 2, 2, where != "cpu")
    arrays = [best, path, counts, ids, logs, np.full((3, 14), 77, np.int32)]
    told = (on_cpu if where == "cpu" else run)(func, arrays)[-1]
    assert told[:, :6].tolist() == [[3, 1, 5, 6, 7, 0], [2, 0, 3, 1, 0, 0], [0, 0, 0, 0, 0, 0]]
    np.testing.assert_array_equal(told[:, 6:10], ids.reshape(3, 4))
    np.testing.assert_array_equal(np.ascontiguousarray(told[:, 10:]).view(np.float32), logs.reshape(3, 4))


def test_a_step_reads_back_once_and_few_integers(whole: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    strategy = make_strategy("streaming", whole, length="3")
    decoding = iter(Decoding(strategy, prompts(2, 5), 24))
    next(decoding)
    sizes: list[int] = []
    download, decode, decodes = whole.runner.download, whole.decode, 0

    def counted(tensor: object) -> np.ndarray:
        array = download(tensor)
        sizes.append(array.size)
        return array

    def other(ids: object) -> np.ndarray:
        nonlocal decodes
        decodes += 1
        return decode(ids)  # type: ignore[arg-type]

    monkeypatch.setattr(whole.runner, "download", counted)
    monkeypatch.setattr(whole, "decode", other)
    steps = sum(1 for _ in decoding)
    told = 3 * (2 + 5 + 2 * G * 4)  # of three slots: the count, the doubt, a token a row, four choices a stream
    # decode steps are for a last token, and for near ties
    assert steps - 2 <= sizes.count(told) <= steps
    assert len(sizes) == sizes.count(told) + decodes and decodes <= 3


@pytest.mark.heavy
def test_a_near_tie_is_left_to_decode(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpt2_tvm.streams.module.TIE", 0.1)  # so wide that ties come often
    wide = made(folder, "5", "wide")
    given = prompts(3, 12)
    expected = Decoding(make_strategy("greedy", wide), given, 30).run()
    decode, calls = wide.decode, 0

    def counted(ids: object) -> np.ndarray:
        nonlocal calls
        calls += 1
        return decode(ids)  # type: ignore[arg-type]

    monkeypatch.setattr(wide, "decode", counted)
    assert Decoding(make_strategy("streaming", wide, length="3"), given, 30).run() == expected
    assert calls > 5


def test_streams_of_the_bundled_model_are_few() -> None:
    from gpt2_tvm.checkpoint import resolve_model

    base = resolve_model("bundled").config
    assert count_parameters(StreamConfig(3, 2, 24, ()), base) < 0.05 * base.num_parameters()


def test_what_cannot_be_is_refused_in_one_line(
    folder: Path, whole: Engine, tiny_artifact: Path, tmp_path: Path
) -> None:
    def refused(match: str, call: object) -> None:
        with pytest.raises(UserError, match=match) as error:
            call()  # type: ignore[operator]
        assert "\n" not in str(error.value)

    source = ModelSource("model", CONFIG, folder=folder / "model")
    refused("no .*streams.json", lambda: read_plan(tmp_path, source, "4"))
    refused("--stream-rows 4,8", lambda: read_plan(folder / "streams", source, "4,8"))
    refused("--stream-rows one", lambda: read_plan(folder / "streams", source, "one"))
    other = ModelSource("other", CONFIG, folder=checkpoint(tmp_path / "other", CONFIG, spread=SPREAD + 1))
    refused("another model", lambda: read_plan(folder / "streams", other, "4"))
    refused("--layers 4", lambda: check_shape(StreamConfig(3, 4, 2, ()), CONFIG))
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "streams.json").write_text("{")
    refused("damaged", lambda: read_plan(damaged, source, "4"))
    values = json.loads((folder / "streams" / "streams.json").read_text())
    (damaged / "streams.json").write_text(json.dumps(values))
    refused("missing or damaged", lambda: list(read_tensors(read_plan(damaged, source, "4"), CONFIG)))
    refused("without streams", lambda: make_strategy("streaming", Engine(tiny_artifact)))
    refused("without streams", lambda: Engine(tiny_artifact).stream([[1]], [[-1]]))
    refused("greedy text", lambda: make_strategy("streaming", whole, sampling=Sampling(1.0)))
    whole.reset()
    refused("streams take 5", lambda: whole.stream([[1] * 6], [[-1, 0, 1, 2, 3, 4]]))
    refused("train_streams makes", lambda: expand([tiny_artifact], ["streaming"], [], ["3"]))
    both = expand([tiny_artifact, whole.artifact.path], ["greedy", "streaming"], [], ["3"])
    assert [(s.model, s.strategy) for s in both if s.strategy == "streaming"] == [(whole.artifact.path, "streaming")]
