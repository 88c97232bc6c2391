"""What a tuning backend puts on its device: one workload, and copies of its weight that no cache holds together."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from test_tuning_space import workload

from tuning.candidates.loading import Workloads

FLOAT = np.dtype(np.float32)


def task(n: int, k: int) -> Any:
    """A product with a bias: x [1, k], weight [n, k], bias [n] -> [1, n]."""
    shapes = ((1, k), (n, k), (n,), (1, n))
    params = [SimpleNamespace(shape=shape, dtype="float32") for shape in shapes]
    func = SimpleNamespace(params=params)
    return SimpleNamespace(workload=workload(n, k, "float32"), load=lambda: func)


@pytest.fixture
def uploaded() -> list[np.ndarray]:
    return []


def make(uploaded: list[np.ndarray], cold_bytes: int, most: int, said: list[str] | None = None) -> Workloads:
    def upload(array: np.ndarray) -> int:
        uploaded.append(array)
        return len(uploaded) - 1

    announce = said.append if said is not None else lambda what: None
    return Workloads({"a": task(8, 16), "b": task(4, 32)}, upload, announce, cold_bytes, most)


@pytest.mark.parametrize(("cold_bytes", "most", "copies"), [(1, 9, 1), (1100, 9, 3), (1 << 20, 9, 9), (0, 9, 1)])
def test_copies_fill_more_than_a_cache_up_to_a_number(
    uploaded: list[np.ndarray], cold_bytes: int, most: int, copies: int
) -> None:
    loaded = make(uploaded, cold_bytes, most)["a"]
    assert len(loaded.weights) == copies  # of 512 bytes
    weights = [uploaded[i] for i in loaded.weights]
    assert all(w.shape == (8, 16) and np.array_equal(w, weights[0]) for w in weights)
    assert len(set(loaded.weights)) == copies


def test_a_call_has_the_functions_parameters_in_order(uploaded: list[np.ndarray]) -> None:
    loaded = make(uploaded, 2048, 2)["a"]
    shapes = [[uploaded[i].shape for i in call] for call in loaded.calls()]
    assert shapes == [[(1, 16), (8, 16), (8,), (1, 8)]] * 2
    assert [call[1] for call in loaded.calls()] == loaded.weights
    x, w, bias, out = (uploaded[i] for i in loaded.calls()[0])
    np.testing.assert_allclose(loaded.example.expected, x.astype(float) @ w.T + bias, rtol=1e-5)
    assert out.dtype == loaded.unwritten().dtype == FLOAT and np.isnan(loaded.unwritten()).all()


def test_one_workload_is_held_at_a_time(uploaded: list[np.ndarray]) -> None:
    said: list[str] = []
    held = make(uploaded, 1, 1, said)
    first = held["a"]
    assert held["a"] is first and said == ["load inputs"]
    assert held["b"].example.expected.shape == (1, 4)
    assert held["a"] is not first and said == ["load inputs"] * 3
