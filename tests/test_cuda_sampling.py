"""Sampling on the device: the kernel as WGSL against the host's definition of temperature, top-k and top-p."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from wgsl_harness import run

from gpt2_tvm import Engine, UserError, compile_model
from gpt2_tvm.decoding.on_device import decode_sampled
from gpt2_tvm.decoding.sampling import Sampling, distribution
from gpt2_tvm.gpu_attention import GpuKernels
from gpt2_tvm.kernels.gpu_sample import sample_advance
from gpt2_tvm.kernels.spec import GpuLimits

WEBGPU = GpuLimits("webgpu", threads_per_block=256, shared_memory_bytes=32768, warp_size=1)
VOCAB, ROWS, CAPACITY = 300, 512, 8


def draw(
    logits: np.ndarray, temperature: float, top_k: int = 0, top_p: float = 1.0, seeds: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One step of ROWS sequences with the same logits and a seed each -> tokens, positions, history."""
    rows = np.tile(logits.astype(np.float32), (ROWS, 1))
    settings = np.tile(np.array([temperature, top_p], np.float32), (ROWS, 1))
    seeds = np.arange(ROWS) if seeds is None else seeds
    choice = np.stack([np.full(ROWS, top_k), seeds], 1).astype(np.int32)
    state = [np.full((ROWS, 1), 9, np.int32), np.full(ROWS, 2, np.int32), np.zeros((ROWS, CAPACITY), np.int32)]
    kernel = sample_advance(ROWS, VOCAB, CAPACITY, WEBGPU)
    *_, token, positions, history = run(kernel, [rows, settings, choice, *state])
    return token[:, 0], positions, history


@pytest.fixture(scope="module")
def logits() -> np.ndarray:
    return np.random.default_rng(3).normal(0, 2.5, VOCAB)


def test_temperature_0_is_the_most_likely_token(logits: np.ndarray) -> None:
    logits = logits.copy()
    logits[[40, 250]] = logits.max() + 1  # of equal ones the first
    logits[7] = np.nan
    tokens, positions, history = draw(logits, 0.0)
    assert set(tokens.tolist()) == {40}
    assert (positions == 3).all() and (history[:, 3] == 40).all() and not history[:, [0, 1, 2, 4, 5, 6, 7]].any()


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(1.0, 0, 1.0), (0.7, 0, 1.0), (1.3, 5, 1.0), (1.0, 0, 0.5), (0.9, 20, 0.8)]
)
def test_draws_follow_the_hosts_distribution(logits: np.ndarray, temperature: float, top_k: int, top_p: float) -> None:
    ids, shares = distribution(logits, temperature, top_k, top_p)
    tokens = np.concatenate([draw(logits, temperature, top_k, top_p, np.arange(ROWS) + ROWS * i)[0] for i in range(4)])
    assert set(tokens.tolist()) <= set(ids.tolist())
    expected = np.zeros(VOCAB)
    expected[ids] = shares * len(tokens)
    seen = np.bincount(tokens, minlength=VOCAB)
    # Pearson's statistic over the tokens expected five times or more, the rest as one
    likely = expected >= 5
    cells = [(seen[likely], expected[likely]), (seen[~likely].sum()[None], expected[~likely].sum()[None])]
    statistic = sum((((s - e) ** 2)[e > 0] / e[e > 0]).sum() for s, e in cells)
    freedom = likely.sum() + (expected[~likely].sum() > 0) - 1
    # the 99.99 % point of chi-squared (Wilson and Hilferty 1931); the seeds are fixed, so this cannot flicker
    assert statistic < freedom * (1 - 2 / (9 * freedom) + 3.719 * (2 / (9 * freedom)) ** 0.5) ** 3


def test_top_k_1_and_top_p_0_leave_one_token(logits: np.ndarray) -> None:
    best = int(logits.astype(np.float32).argmax())
    assert set(draw(logits, 1.0, top_k=1)[0].tolist()) == {best}
    assert set(draw(logits, 5.0, top_p=0.0)[0].tolist()) == {best}


def test_the_seed_and_the_position_decide(logits: np.ndarray) -> None:
    same = draw(logits, 1.0, seeds=np.full(ROWS, 17))[0]
    assert len(set(same.tolist())) == 1  # whatever the row
    assert len(set(draw(logits, 1.0)[0].tolist())) > 20
    assert (draw(logits, 1.0)[0] == draw(logits, 1.0)[0]).all()


@pytest.fixture(scope="module")
def drawing(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """An engine whose steps draw on the device, as a CUDA one's do; here in WGSL."""
    pytest.importorskip("wgpu", reason="pip install 'gpt2-tvm[webgpu]'")
    plain = GpuKernels.for_target

    def sampling(target: object) -> GpuKernels:
        kernels = plain(target)  # type: ignore[arg-type]
        kernels.samples = True
        return kernels

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GpuKernels, "for_target", sampling)
        folder = tmp_path_factory.mktemp("drawing") / "artifact"
        compile_model(str(tiny_model), "webgpu", output=folder, batch_sizes=(1, 2), verify_widths=(), page=False)
    try:
        return Engine(folder)
    except UserError as error:
        pytest.skip(str(error))


def sampled(engine: Engine, batch: int, temperature: float, seed: int = 0, top_k: int = 0) -> np.ndarray:
    engine.reset()
    engine.prefill([[1, 2, 3]] * batch)
    return decode_sampled(engine, 12, [5] * batch, Sampling(temperature, top_k), seed)


def test_a_loop_of_draws_on_the_device(drawing: Engine) -> None:
    greedy = sampled(drawing, 1, 0.0)
    assert greedy[0, 0] == 5 and drawing.positions.tolist() == [15]
    drawing.reset()
    drawing.prefill([1, 2, 3])
    assert (drawing.decode_greedy(12, first=5) == greedy).all()
    assert (sampled(drawing, 1, 3.0, top_k=1) == greedy).all()
    first = sampled(drawing, 1, 3.0, seed=4)
    assert (sampled(drawing, 1, 3.0, seed=4) == first).all() and (sampled(drawing, 1, 3.0, seed=5) != first).any()
    both = sampled(drawing, 2, 3.0, seed=4)  # sequence b has seed + b, and nothing else to tell them apart
    assert (both[0] == first[0]).all() and (both[1] == sampled(drawing, 1, 3.0, seed=5)[0]).all()


def test_an_artifact_that_draws_on_the_host_says_so(tiny_artifact: Path) -> None:
    engine = Engine(tiny_artifact)
    engine.prefill([1, 2, 3])
    with pytest.raises(UserError, match="draws on the host"):
        decode_sampled(engine, 3, 5, Sampling(1.0))
