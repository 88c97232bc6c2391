"""Every function that MLC's engines look up is there, and computes what numpy does, on the CPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from gpt2_tvm.build import make_plan
from gpt2_tvm.checkpoint import resolve_model
from gpt2_tvm.mlc.functions import FUNCTIONS
from targets import load_target, specialise

V = 2048
ONE_PERCENT = {1: 6.635, 4: 13.277}  # quantiles of chi-square, by degrees of freedom


@pytest.fixture(scope="module")
def vm() -> Any:
    import tvm
    from tvm import relax

    from gpt2_tvm.mlc.lowering import lower_paged

    target = specialise(load_target("cpu"))
    lowered, _ = lower_paged(make_plan(resolve_model("bundled").config, target, batch_sizes=(4,), interface="mlc"))
    executable = tvm.compile(lowered.final, target=target.tvm_target(), relax_pipeline=None, tir_pipeline=None)
    machine = relax.VirtualMachine(executable, tvm.cpu())

    class Functions:
        def __getitem__(self, name: str) -> Any:  # as the engines look: kernels without a Relax function are imports
            return machine.module.get_function(name, query_imports=True)

    return Functions()


def tensor(array: Any, dtype: str = "float32") -> Any:
    import tvm

    return tvm.runtime.tensor(np.ascontiguousarray(np.asarray(array, dtype)))


def probabilities(rows: int, seed: int = 0) -> np.ndarray:
    logits = np.random.default_rng(seed).normal(0, 3, (rows, V))
    e = np.exp(logits - logits.max(1, keepdims=True))
    return (e / e.sum(1, keepdims=True)).astype(np.float32)


def test_every_function_is_there(vm: Any) -> None:
    for function in FUNCTIONS:
        assert callable(vm[function.name]), function.name


@pytest.mark.parametrize("batch", [1, 3])
def test_softmax_and_sorting(vm: Any, batch: int) -> None:
    logits = np.random.default_rng(1).normal(0, 5, (batch, 1, V)).astype(np.float32)
    warmth = np.linspace(0.3, 1.7, batch).astype(np.float32)
    ours = vm["softmax_with_temperature"](tensor(logits), tensor(warmth)).numpy()
    e = np.exp((logits.astype(np.float64) - logits.max(-1, keepdims=True)) / warmth[:, None, None])
    assert np.allclose(ours, e / e.sum(-1, keepdims=True), rtol=1e-4, atol=1e-9)
    values, order = vm["argsort_probs"](tensor(ours[:, 0]))
    assert np.array_equal(values.numpy(), -np.sort(-ours[:, 0], axis=1))
    assert np.array_equal(np.take_along_axis(ours[:, 0], order.numpy().astype(int), 1), values.numpy())


def nucleus(probs: np.ndarray, top_p: float, draw: float) -> tuple[int, float]:
    """The token, and how near the draw is to a border between two (float64)."""
    order = np.argsort(-probs, kind="stable")
    mass = np.cumsum(probs[order].astype(np.float64))
    kept = min(int(np.searchsorted(mass, top_p)), len(mass) - 1)
    wanted = draw * mass[kept]
    found = min(int(np.searchsorted(mass, wanted)), kept)
    return int(order[found]), float(np.abs(mass - wanted).min())


@pytest.mark.parametrize("top_p", [1e-5, 0.3, 0.9, 1.0])
def test_a_draw_from_the_nucleus(vm: Any, top_p: float) -> None:
    rows, random = 3, np.random.default_rng(5)
    probs = probabilities(rows)
    values, order = vm["argsort_probs"](tensor(probs))
    draws, of = random.random(200).astype(np.float32), random.integers(0, rows, 200)
    ours = vm["sample_with_top_p"](
        values, order, tensor(draws), tensor(of, "int32"), tensor(np.full(rows, top_p))
    ).numpy()
    checked = 0
    for token, draw, row in zip(ours, draws, of, strict=True):
        theirs, margin = nucleus(probs[row], top_p, float(draw))
        if margin > 1e-5:  # float32 sums may fall on the other side of a border
            assert token == theirs
            checked += 1
    assert checked > 100 or top_p == 1e-5
    if top_p == 1e-5:
        assert np.array_equal(ours, probs.argmax(1)[of])


def test_the_distribution_of_draws(vm: Any) -> None:
    probs = np.zeros((1, V), np.float32)
    probs[0, [7, 11, 13, 17, 19]] = [0.4, 0.3, 0.15, 0.1, 0.05]
    draws = np.random.default_rng(6).random(20000).astype(np.float32)
    values, order = vm["argsort_probs"](tensor(probs))
    zero = tensor(np.zeros(20000), "int32")
    for name, expected in (
        ("multinomial_from_uniform", {7: 0.4, 11: 0.3, 13: 0.15, 17: 0.1, 19: 0.05}),
        ("sample_with_top_p", {7: 0.4 / 0.7, 11: 0.3 / 0.7}),
    ):
        if name == "multinomial_from_uniform":
            ours = vm[name](tensor(probs), tensor(draws), zero).numpy()
        else:
            ours = vm[name](values, order, tensor(draws), zero, tensor([0.65])).numpy()
        assert set(ours.tolist()) == set(expected)
        counts = [int((ours == token).sum()) for token in expected]
        wanted = [share * len(draws) for share in expected.values()]
        chi_square = sum((count - w) ** 2 / w for count, w in zip(counts, wanted, strict=True))
        assert chi_square < ONE_PERCENT[len(expected) - 1]


def test_bias_and_penalties(vm: Any) -> None:
    random = np.random.default_rng(2)
    logits = random.normal(0, 3, (2, V)).astype(np.float32)
    tokens, rows = np.array([3, 5, 2047, 3]), np.array([0, 0, 1, 1])
    bias = random.normal(size=4).astype(np.float32)
    device = tensor(logits)
    vm["apply_logit_bias_inplace"](device, tensor(rows, "int32"), tensor(tokens, "int32"), tensor(bias))
    wanted = logits.copy()
    wanted[rows, tokens] += bias
    assert np.allclose(device.numpy(), wanted, rtol=1e-6)

    counts, sequences = np.array([1, 2, 3, 4]), np.array([1, 0])  # row 0 of `rows` is the batch's second
    penalties = np.array([[0.5, 0.25, 1.3], [-0.5, 0.1, 0.8]], np.float32)
    device = tensor(logits)
    vm["apply_penalty_inplace"](
        device, tensor(sequences, "int32"), tensor(rows, "int32"), tensor(tokens, "int32"), tensor(counts, "int32"),
        tensor(penalties),
    )  # fmt: skip
    wanted = logits.copy()
    for row, token, count in zip(rows, tokens, counts, strict=True):
        presence, frequency, repetition = penalties[row]
        value = wanted[sequences[row], token] - (presence + count * frequency)
        wanted[sequences[row], token] = value / repetition if value > 0 else value * repetition
    assert np.allclose(device.numpy(), wanted, rtol=1e-5)


def test_a_grammars_mask(vm: Any) -> None:
    logits = np.random.default_rng(3).normal(size=(3, V)).astype(np.float32)
    allowed = np.random.default_rng(4).random((3, V)) < 0.5
    words = np.packbits(allowed.reshape(3, -1, 32), axis=-1, bitorder="little").view(np.int32).reshape(3, -1)
    device = tensor(logits)
    vm["apply_bitmask_inplace"](device, tensor([2, 0], "int32"), tensor(words, "int32"))
    wanted = logits.copy()
    for row in (2, 0):
        wanted[row, ~allowed[row]] = np.finfo(np.float32).min
    assert np.array_equal(device.numpy(), wanted)
