"""Kernels of MLC's interface as WGSL on a WebGPU device, against numpy."""

from __future__ import annotations

import numpy as np
import pytest
import wgsl_harness as wgsl

from gpt2_tvm.kernels import logit_processors
from gpt2_tvm.kernels.gpu_merge_states import merge_states
from gpt2_tvm.kernels.gpu_sort import sort_falling
from gpt2_tvm.kernels.nucleus import nucleus


@pytest.mark.parametrize(("batch", "vocab"), [(1, 1), (1, 255), (3, 256), (2, 1000)])
def test_a_sorted_row(batch: int, vocab: int) -> None:
    values = np.random.default_rng(vocab).integers(0, max(vocab // 3, 1), (batch, vocab)).astype(np.float32)  # has ties
    shape = (batch, vocab)
    _, falling, order = wgsl.run(sort_falling(), [values, np.empty(shape, np.float32), np.empty(shape, np.int32)])
    wanted = np.argsort(-values, axis=1, kind="stable")
    assert np.array_equal(order, wanted)
    assert np.array_equal(falling, np.take_along_axis(values, wanted, 1))


def test_nan_comes_last() -> None:
    values = np.array([[1, np.nan, 3, -np.inf, np.inf, -0.0, 0.0]], np.float32)
    _, _, order = wgsl.run(sort_falling(), [values, np.empty((1, 7), np.float32), np.empty((1, 7), np.int32)])
    assert order.tolist() == [[4, 2, 0, 5, 6, 3, 1]]


@pytest.mark.parametrize("vocab", [1, 7, 256, 700])
@pytest.mark.parametrize("top_p", [1e-5, 0.5, 1.0])
def test_a_draw(vocab: int, top_p: float) -> None:
    rows, count, random = 2, 40, np.random.default_rng(vocab)
    probs = -np.sort(-random.random((rows, vocab)), axis=1)
    probs = (probs / probs.sum(1, keepdims=True)).astype(np.float32)
    order = np.stack([random.permutation(vocab) for _ in range(rows)]).astype(np.int32)
    draws, of = random.random(count).astype(np.float32), random.integers(0, rows, count).astype(np.int32)
    inputs = [probs, order, draws, of, np.full(rows, top_p, np.float32), np.empty(count, np.int32)]
    out = wgsl.run(nucleus(gpu=True), inputs)[-1]
    checked = 0
    for token, draw, row in zip(out, draws, of, strict=True):
        mass = np.cumsum(probs[row].astype(np.float64))
        kept = min(int(np.searchsorted(mass, top_p - 1e-7)), vocab - 1)
        wanted = float(draw) * mass[kept]
        if np.abs(mass - wanted).min() > 1e-5:  # else float32 sums may fall on the other side
            assert token == order[row, min(int(np.searchsorted(mass, wanted)), kept)]
            checked += 1
    assert checked > count // 2


def test_bias_penalty_and_mask() -> None:
    random = np.random.default_rng(0)
    logits = random.normal(size=(3, 300)).astype(np.float32)
    rows, tokens = np.repeat([0, 2], 150).astype(np.int32), np.tile(np.arange(150) * 2, 2).astype(np.int32)
    bias = random.normal(size=300).astype(np.float32)
    out = wgsl.run(logit_processors.logit_bias(True), [logits, rows, tokens, bias])[0]
    wanted = logits.copy()
    wanted[rows, tokens] += bias
    assert np.allclose(out, wanted, rtol=1e-6)

    sequences, counts = np.array([2, 1], np.int32), random.integers(1, 5, 300).astype(np.int32)
    of = np.repeat([0, 1], 150).astype(np.int32)
    penalties = np.array([[0.5, 0.25, 1.3], [-0.5, 0.1, 0.8]], np.float32)
    out = wgsl.run(logit_processors.penalty(True), [logits, sequences, of, tokens, counts, penalties])[0]
    wanted = logits.copy()
    value = logits[sequences[of], tokens] - (penalties[of, 0] + counts * penalties[of, 1])
    wanted[sequences[of], tokens] = np.where(value > 0, value / penalties[of, 2], value * penalties[of, 2])
    assert np.allclose(out, wanted, rtol=1e-4, atol=1e-6)

    mask = random.integers(-(2**31), 2**31, (3, 10)).astype(np.int32)
    out = wgsl.run(logit_processors.bitmask(True), [logits, np.array([0, 2], np.int32), mask])[0]
    wanted = logits.copy()
    allowed = np.unpackbits(mask.view(np.uint8).reshape(3, -1), axis=1, bitorder="little")[:, :300].astype(bool)
    for row in (0, 2):
        wanted[row, ~allowed[row]] = np.finfo(np.float32).min
    assert np.allclose(out.astype(np.float64), wanted, rtol=1e-6)  # TVM writes seven digits of a constant


@pytest.mark.parametrize(
    ("rows", "heads", "dim", "dtype"),
    [
        (37, 4, 64, "float32"),
        (1, 1, 1, "float32"),
        (5, 3, 100, "float32"),
        (2, 2, 256, "float32"),
        (3, 5, 64, "float16"),
    ],
)
def test_two_attentions_become_one(rows: int, heads: int, dim: int, dtype: str) -> None:
    random = np.random.default_rng(rows)
    values, others = (random.normal(size=(rows, heads, dim)).astype(dtype) for _ in range(2))
    sums, other_sums = (random.normal(0, 4, (rows, heads)).astype(np.float32) for _ in range(2))
    other_sums[0, 0] = -5e4  # of a row that may look at nothing, in TVM's kernels
    merged, merged_sums, *_ = wgsl.run(merge_states(heads, dim, dtype), [values, sums, others, other_sums])
    weights = np.exp2(np.stack([sums, other_sums]).astype(np.float64))
    share = (weights[0] / weights.sum(0))[..., None]
    wanted = share * values.astype(np.float64) + (1 - share) * others.astype(np.float64)
    assert np.allclose(merged, wanted, rtol=0, atol=1e-5 if dtype == "float32" else 4e-3)
    assert np.allclose(merged_sums, np.log2(weights.sum(0)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("target", ["webgpu", "metal", "cuda", "gfx1100"])
def test_the_cache_is_given_that_kernel(target: str) -> None:
    import tvm
    from tvm import relax

    from gpt2_tvm.config import GPT2Config
    from gpt2_tvm.mlc.paged import CREATE, MERGE, add_cache_creation
    from targets import load_target

    config = GPT2Config(vocab_size=97, n_positions=48, n_embd=160, n_layer=2, n_head=2)
    builder, device = relax.BlockBuilder(), load_target(target).tvm_target()
    with device:
        add_cache_creation(builder, config, "float16", device)
    module = builder.finalize()
    ours = merge_states(2, 80, "float16").with_attr("global_symbol", MERGE)
    tvm.ir.assert_structural_equal(module[MERGE], ours)
    assert f"{MERGE}," in module[CREATE].script()  # it goes into the call that makes the cache
