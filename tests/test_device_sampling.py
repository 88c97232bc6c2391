"""Sampled speculation that stays on the device: its kernels draw from the target's distribution (a planted bias shows),
the rounds do too, and the host is asked once a round. On this CPU through the same TIR as a GPU's, on WebGPU through
wgpu; of CUDA the module that would run there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tvm
from device_pairs import CONFIG, SPREAD, WEBGPU, counting, externs, opened, pair, prompts
from reference import checkpoint
from test_decoding_rejection import CHI2_99_124, DRAWS, VOCAB, K, chains
from wgsl_harness import device, run

from gpt2_tvm import Engine
from gpt2_tvm.build import lower_plan, make_plan
from gpt2_tvm.checkpoint import ModelSource
from gpt2_tvm.decoding.device_rounds import usable
from gpt2_tvm.decoding.device_speculative import DeviceSpeculative
from gpt2_tvm.decoding.early import truncate
from gpt2_tvm.decoding.registry import make_strategy
from gpt2_tvm.decoding.sampling import Sampling
from gpt2_tvm.decoding.strategy import Decoding
from gpt2_tvm.kernels.accept_drawn import STORED, accept_drawn, draft_scores, finish_drawn, own_scores
from gpt2_tvm.passes import cuda_graph
from targets import load_target

BATCH, CAPACITY = 2000, 16
CHI2_99_120 = 158.95  # the 0.99 quantile of chi-square with 11^2 - 1 degrees of freedom
Kernels = dict[str, Callable[..., list[np.ndarray]]]


def kernels(batch: int, rows: int, vocab: int, capacity: int, gpu: bool) -> Kernels:
    """The four by name, arrays in and arrays out."""
    limits = WEBGPU if gpu else None
    funcs = {
        "draft": draft_scores(batch, vocab, limits),
        "accept": accept_drawn(batch, rows, vocab, capacity, gpu),
        "own": own_scores(batch, rows, vocab, limits),
        "finish": finish_drawn(batch, rows, capacity, gpu),
    }
    if gpu:
        return {name: lambda *arrays, func=func: run(func, list(arrays)) for name, func in funcs.items()}
    module = tvm.IRModule({name: func.with_attr("global_symbol", name) for name, func in funcs.items()})
    built = tvm.compile(module, "llvm")

    def call(name: str) -> Callable[..., list[np.ndarray]]:
        def called(*arrays: np.ndarray) -> list[np.ndarray]:
            tensors = [tvm.runtime.tensor(array) for array in arrays]
            built[name](*tensors)
            return [tensor.numpy() for tensor in tensors]

        return called

    return {name: call(name) for name in funcs}


@pytest.fixture(scope="module")
def on_cpu() -> Kernels:
    return kernels(BATCH, K + 1, VOCAB, CAPACITY, False)


def texts(do: Kernels, p: np.ndarray, q: np.ndarray, seeds: np.ndarray, bias: str = "") -> np.ndarray:
    """The first three tokens after token 0 of each sequence, by rounds of K drafted tokens."""
    history, positions = np.zeros((BATCH, CAPACITY), np.int32), np.zeros(BATCH, np.int32)
    drawn, every = np.zeros((BATCH, STORED, VOCAB), np.float32), np.arange(BATCH)
    token, drafting = np.zeros((BATCH, 1), np.int32), np.zeros(BATCH, np.int32)
    lengths = np.full(BATCH, K + 1, np.int32)
    while positions.min() < 3:
        for step in range(K + 1):
            at = positions + step
            shares = q[history[every, at]].astype(np.float32)
            _, _, _, drawn, scores = do["draft"](shares, at, seeds, drawn, np.zeros((BATCH, VOCAB), np.float32))
            history[every, at + 1] = scores.argmax(-1)
        before = history[every[:, None], positions[:, None] + np.arange(K + 1)]
        shares = p[before].astype(np.float32)
        seen = 0.93 * shares + 0.07 * q[before].astype(np.float32) if bias == "accept" else shares
        stood = do["accept"](seen, drawn, history, positions, lengths, seeds, np.zeros((BATCH, 2), np.int32))[-1]
        told_refused = stood.copy()
        if bias == "residual":
            told_refused[:, 1] = 0
        scores = do["own"](shares, drawn, told_refused, positions, seeds, np.zeros((BATCH, VOCAB), np.float32))[-1]
        best, told = scores.argmax(-1).astype(np.int32)[:, None], np.zeros((BATCH, K + 3), np.int32)
        done = do["finish"](best, stood, lengths, token, positions, drafting, history, told)
        token, positions, drafting, history, told = (np.array(a) for a in done[3:])
        np.testing.assert_array_equal(told[:, 0], stood[:, 0] + 1)
        np.testing.assert_array_equal(history[every, positions], told[every, 1 + told[:, 0]])
    return history[:, 1:4]


def statistic(do: Kernels, p: np.ndarray, q: np.ndarray, bias: str = "") -> float:
    """Chi-square of 20,000 texts of three tokens against the target's joint distribution."""
    seen = np.zeros((VOCAB,) * 3)
    for first in range(0, DRAWS, BATCH):
        made = texts(do, p, q, np.arange(first, first + BATCH, dtype=np.int32), bias)
        np.add.at(seen, tuple(made.T), 1)
    expected = DRAWS * p[0][:, None, None] * p[:, :, None] * p[None]
    assert expected.min() > 1 and seen.sum() == DRAWS
    return float(((seen - expected) ** 2 / expected).sum())


def test_the_kernels_draw_from_the_targets_distribution(on_cpu: Kernels) -> None:
    p, q = chains()
    assert statistic(on_cpu, p, q) < CHI2_99_124


@pytest.mark.parametrize("bias", ["residual", "accept"])
def test_a_bias_is_found(on_cpu: Kernels, bias: str) -> None:
    assert statistic(on_cpu, *chains(), bias) > CHI2_99_124


def test_a_draft_that_is_the_target_is_never_refused(on_cpu: Kernels) -> None:
    p, _ = chains()
    shares = np.broadcast_to(p[0], (BATCH, VOCAB)).astype(np.float32)
    seeds, history = np.arange(BATCH, dtype=np.int32), np.zeros((BATCH, CAPACITY), np.int32)
    drawn = np.zeros((BATCH, STORED, VOCAB), np.float32)
    for at in range(K):
        where = np.full(BATCH, at, np.int32)
        _, _, _, drawn, scores = on_cpu["draft"](shares, where, seeds, drawn, np.zeros((BATCH, VOCAB), np.float32))
        history[:, at + 1] = scores.argmax(-1)
    rows, lengths = np.repeat(shares[:, None], K + 1, 1), np.full(BATCH, K + 1, np.int32)
    nowhere = np.zeros((BATCH, 2), np.int32)
    stood = on_cpu["accept"](rows, drawn, history, np.zeros(BATCH, np.int32), lengths, seeds, nowhere)[-1]
    assert (stood == [K, 0]).all()


def test_webgpu_decides_what_the_cpu_does() -> None:
    device()
    batch, rows, vocab, capacity, rng = 6, 4, 300, 12, np.random.default_rng(5)
    gpu, cpu = (kernels(batch, rows, vocab, capacity, on_gpu) for on_gpu in (True, False))
    shares = rng.dirichlet(np.full(vocab, 0.3), (batch, rows)).astype(np.float32)
    drawn = rng.dirichlet(np.full(vocab, 0.3), (batch, STORED)).astype(np.float32)
    drawn[:, 1:5] = 0.5 * drawn[:, 1:5] + 0.5 * shares  # some stand, some do not
    history = rng.integers(0, vocab, (batch, capacity)).astype(np.int32)
    history[:, 1:4] = shares[:, :3].argmax(-1)
    positions, lengths = np.zeros(batch, np.int32), np.array([4, 4, 3, 1, 0, 4], np.int32)
    seeds = rng.integers(0, 2**31, batch).astype(np.int32)
    given = {
        "draft": [shares[:, 0], positions, seeds, drawn, np.zeros((batch, vocab), np.float32)],
        "accept": [shares, drawn, history, positions, lengths, seeds, np.full((batch, 2), 7, np.int32)],
    }
    stood = cpu["accept"](*given["accept"])[-1]
    given["own"] = [shares, drawn, stood, positions, seeds, np.zeros((batch, vocab), np.float32)]
    best = cpu["own"](*given["own"])[-1].argmax(-1).astype(np.int32)[:, None]
    state = [np.zeros((batch, 1), np.int32), positions, positions + 9, history, np.full((batch, rows + 2), 7, np.int32)]
    given["finish"] = [best, stood, lengths, *state]
    for name, arrays in given.items():
        for ours, theirs in zip(gpu[name](*arrays), cpu[name](*arrays), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=2e-4, err_msg=name)
    assert len(set(stood[:, 0].tolist())) > 1


# ---- rounds


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("models")
    model = checkpoint(folder / "model", CONFIG, spread=SPREAD)
    return model, truncate(ModelSource("model", CONFIG, folder=model), 2, folder / "first")


@pytest.fixture(scope="module")
def engines(paths: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Engine, Engine]:
    return opened(pair(paths, tmp_path_factory.mktemp("cpu"), widths=(4,), batch_sizes=(4, 64)))


def sampled(engines: tuple[Engine, Engine], given: list[list[int]], n: int, seed: int, **sampling: Any) -> Decoding:
    strategy = make_strategy("speculative", engines[0], engines[1], "3", Sampling(**sampling))
    assert isinstance(strategy, DeviceSpeculative)
    return Decoding(strategy, given, n, seed=seed)


def exact_pairs(engine: Engine, sampling: Sampling) -> np.ndarray:
    """Probabilities of the second and third token after one prompt, from the target's logits."""
    vocab = CONFIG.vocab_size

    def after(rows: list[list[int]]) -> np.ndarray:
        engine.reset()
        return np.array([sampling.probabilities(row) for row in engine.prefill([[1, 2, 3, *ids] for ids in rows])])

    first = after([[]])[0]
    second = after([[a] for a in range(vocab)])
    joint = np.zeros((vocab, vocab))
    for a in range(vocab):
        joint += first[a] * second[a][:, None] * after([[a, b] for b in range(vocab)])
    return joint


def test_rounds_draw_from_the_targets_distribution(engines: tuple[Engine, Engine]) -> None:
    seen = np.zeros((CONFIG.vocab_size,) * 2)
    accepted = 0
    for seed in range(100):
        decoding = sampled(engines, [[1, 2, 3]] * 64, 3, seed, temperature=1.5)
        for tokens in decoding.run():
            seen[tokens[1], tokens[2]] += 1
        accepted += sum(row.accepted for row in decoding.rows)
    expected = exact_pairs(engines[0], Sampling(1.5))
    likely = expected * seen.sum() >= 5  # the rest together are one cell

    def chi2(p: np.ndarray) -> float:
        a, b = np.append(seen[likely], seen[~likely].sum()), np.append(p[likely], p[~likely].sum()) * seen.sum()
        return float(((a - b) ** 2 / np.maximum(b, 1e-9)).sum())

    assert likely.sum() > 20 and accepted > 1000
    assert chi2(expected) < CHI2_99_120
    assert chi2(exact_pairs(engines[0], Sampling(1.3))) > CHI2_99_120


@pytest.mark.parametrize("batch", [1, 3])
def test_a_seed_decides_the_text_and_the_host_is_asked_once_a_round(engines: tuple[Engine, Engine], batch: int) -> None:
    given = prompts(batch, 3, longest=8)
    made = [sampled(engines, given, 30, seed, temperature=1.0).run() for seed in (1, 1, 2)]
    assert made[0] == made[1] != made[2] and all(len(row) == 30 for row in made[0])
    decoding = sampled(engines, given, 30, 1, temperature=1.0)
    steps, counted = iter(decoding), Counter[str]()
    next(steps)
    with pytest.MonkeyPatch.context() as patch:
        for name, engine in zip(("target", "draft"), engines, strict=True):
            patch.setattr(engine.runner, "download", counting(engine.runner.download, name, counted))
        patch.setattr(engines[0], "decode", counting(engines[0].decode, "decode", counted))
        taken = sum(1 for _ in steps)
    assert counted["draft"] == 0 and counted["target"] == taken and counted["decode"] <= 2
    assert [row.tokens for row in decoding.rows] == made[0] and sum(row.accepted for row in decoding.rows) > 0


def test_a_full_context_ends_a_text(engines: tuple[Engine, Engine]) -> None:
    decoding = sampled(engines, [[1] * 60, [2] * 63, [3] * 40], 100, 5, temperature=0.8)
    assert [len(tokens) for tokens in decoding.run()] == [4, 1, 24]
    assert [row.finish for row in decoding.rows] == ["context"] * 3


def test_cuts_stay_on_the_host(engines: tuple[Engine, Engine]) -> None:
    assert usable(*engines, Sampling(1.0)) and not usable(*engines, Sampling(1.0, top_k=3))
    assert not usable(*engines, Sampling(1.0, top_p=0.5))
    with_cut = make_strategy("speculative", *engines, "3", Sampling(1.0, top_k=3))
    assert not isinstance(with_cut, DeviceSpeculative)


def test_on_cuda_each_is_one_graph() -> None:
    plan = make_plan(CONFIG, load_target("h200"), "q0f16", batch_sizes=(1,), verify_widths=(4,))
    lowered, _ = lower_plan(plan)
    assert {"propose_b1", "decide_b1_m4"} <= set(cuda_graph.graph_steps(lowered.lowered))
    for step, wanted in (("propose_b1", {"draft_scores"}), ("decide_b1_m4", {"accept_drawn", "own_scores"})):
        outside, graphs = cuda_graph.launches(lowered.final, cuda_graph.PREFIX + step)
        assert not outside and len(graphs) == 1
        assert wanted <= {name.rstrip("0123456789") for name in graphs[0]}
        assert not {name for name in externs(lowered.final, cuda_graph.PREFIX + step) if "to_device" in name}


@pytest.mark.heavy
def test_webgpu_draws_with_one_submission_and_one_read_back_a_round(paths: tuple[Path, Path], tmp_path: Path) -> None:
    device()
    made = opened(pair(paths, tmp_path, "webgpu", (4,), rules="full", batch_sizes=(1,), page=False))
    decoding = sampled(made, prompts(1, 9, longest=8), 20, 1, temperature=1.0)
    steps, counted = iter(decoding), Counter[str]()
    next(steps)
    gpu = made[0].runner.device  # type: ignore[attr-defined]
    with pytest.MonkeyPatch.context() as patch:
        for name in ("submit", "read", "wait"):
            patch.setattr(gpu, name, counting(getattr(gpu, name), name, counted))
        taken = sum(1 for _ in steps)
    assert counted["submit"] == counted["read"] == taken and not counted["wait"]
    assert len(decoding.rows[0].tokens) == 20 and decoding.rows[0].accepted > 0


def test_shares_are_kept_where_the_slot_says() -> None:
    do, last = kernels(1, 2, 4, 64, False), STORED - 1
    for position, row in ((6, 7), (last - 1, last), (last, 0), (STORED + 2, 3)):
        shares, drawn = np.full((1, 4), 0.25, np.float32), np.zeros((1, STORED, 4), np.float32)
        at, seeds = np.array([position], np.int32), np.array([1], np.int32)
        kept = do["draft"](shares, at, seeds, drawn, np.zeros((1, 4), np.float32))[3]
        assert np.flatnonzero(kept[0].sum(-1)).tolist() == [row]
