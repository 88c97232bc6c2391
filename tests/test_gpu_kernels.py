"""The GPU kernels compute the right numbers: run as WGSL through wgpu, against numpy in float64.

The device is whatever WebGPU finds: a GPU, or Mesa's lavapipe. What a kernel must not look at is NaN here: slots of the
cache that nothing was written to, padded rows, and what outputs and workspaces held before. What it must not touch
is compared as a whole.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from wgsl_harness import lower_to_wgsl, run

from gpt2_tvm.errors import UserError
from gpt2_tvm.kernels.accept_draft import gpu_near_ties
from gpt2_tvm.kernels.attention_forms import direct
from gpt2_tvm.kernels.gpu_decode_attention import decode_attention
from gpt2_tvm.kernels.gpu_decode_blocks import choose_splits
from gpt2_tvm.kernels.gpu_keep import keep_branch
from gpt2_tvm.kernels.gpu_kv_append import kv_append
from gpt2_tvm.kernels.gpu_prefill_attention import WEBGPU_TILES, choose_tile, prefill_attention
from gpt2_tvm.kernels.gpu_sampling import argmax, greedy_advance, log_prob
from gpt2_tvm.kernels.row_forms import THREADS, few_threads
from gpt2_tvm.kernels.spec import AttentionSpec, GpuLimits
from gpt2_tvm.toolchains.web_needs import shared_bytes

WEBGPU = GpuLimits("webgpu", threads_per_block=256, shared_memory_bytes=32768, warp_size=1)
CUDA = GpuLimits("cuda", threads_per_block=1024, shared_memory_bytes=49152, warp_size=32)
TOLERANCE = {"float32": 2e-5, "float16": 3e-3}  # of numbers of size 1 to 3; float16 has 11 bits


def make_spec(head_dim: int = 64, capacity: int = 100, dtype: str = "float32", n_head: int = 2) -> AttentionSpec:
    return AttentionSpec(n_head, head_dim, capacity, dtype, scale=1.5 / max(head_dim, 1) ** 0.5)


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


class Case:
    """A call: the cache holds `positions` tokens a sequence and NaN behind them; `lengths` rows of `rows` are valid."""

    def __init__(self, spec: AttentionSpec, rows: int, positions: list[int], lengths: list[int]) -> None:
        random = np.random.default_rng(rows * 1000 + spec.head_dim)
        batch = len(positions)
        self.spec, self.rows = spec, rows
        self.positions, self.lengths = ints(*positions), ints(*lengths)
        self.qkv = random.standard_normal((batch, rows, 3 * spec.width)).astype(spec.dtype)
        shape = (2, batch, spec.n_head, spec.capacity, spec.head_dim)
        self.cache = random.standard_normal(shape).astype(spec.dtype)
        for sequence, (position, length) in enumerate(zip(positions, lengths, strict=True)):
            self.cache[:, sequence, :, position:] = np.nan
            self.qkv[sequence, length:] = np.nan
        self.out = np.full((batch, rows, spec.width), np.nan, spec.dtype)

    def appended(self) -> np.ndarray:
        """The cache with this call's keys and values in it, where there is room."""
        spec, cache = self.spec, self.cache.copy()
        for sequence, row in itertools.product(range(len(self.positions)), range(self.rows)):
            slot = self.positions[sequence] + row
            if row < self.lengths[sequence] and self.positions[sequence] >= 0 and slot < spec.capacity:
                new = self.qkv[sequence, row, spec.width :].reshape(2, spec.n_head, spec.head_dim)
                cache[:, sequence, :, slot] = new
        return cache

    def attention(self, tree: np.ndarray | None = None) -> np.ndarray:
        """[b, n, H*D] in float64, one row at a time, straight from the definition."""
        spec, cache = self.spec, self.appended().astype(np.float64)
        out = np.zeros(self.out.shape)
        for sequence, row in itertools.product(range(len(self.positions)), range(self.rows)):
            first, length = int(self.positions[sequence]), int(self.lengths[sequence])
            if row >= length:
                continue
            sees = [j <= row if tree is None else tree[sequence, row] >> j & 1 for j in range(length)]
            slots = [*range(first), *(first + j for j in range(length) if sees[j])]
            slots = [slot for slot in slots if slot < spec.capacity]
            if not slots:
                continue
            q = self.qkv[sequence, row, : spec.width].reshape(spec.n_head, -1).astype(np.float64)
            score = np.einsum("hd,hsd->hs", q, cache[0, sequence][:, slots]) * spec.scale
            weight = np.exp(score - score.max(-1, keepdims=True))
            weight /= weight.sum(-1, keepdims=True)
            out[sequence, row] = np.einsum("hs,hsd->hd", weight, cache[1, sequence][:, slots]).reshape(-1)
        return out

    def assert_close(self, result: np.ndarray, wanted: np.ndarray, atol: float | None = None) -> None:
        atol = atol or TOLERANCE[self.spec.dtype]
        np.testing.assert_allclose(result.astype(np.float64), wanted, rtol=0, atol=atol)
        for sequence, length in enumerate(self.lengths):
            assert not result[sequence, max(length, 0) :].any(), "padded rows are zeros"


def forms(kernel: Any) -> list[Any]:
    """An attention kernel, and the one for software devices in its place, where there is one."""
    other = direct(kernel, WEBGPU)
    assert (other is None) == (int(kernel.params[3].shape[-1]) % 4 > 0)
    return [kernel] if other is None else [kernel, other]


# -- kv_append ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("head_dim", "dtype", "static"), [(64, "float32", False), (80, "float16", True), (19, "float16", False)]
)
def test_append_writes_the_valid_rows_and_nothing_else(head_dim: int, dtype: str, static: bool) -> None:
    spec = make_spec(head_dim, 37, dtype, n_head=3)
    case = Case(spec, 5, [0, 34, 17], [5, 5, 2])  # the second sequence has room for three
    kernel = kv_append(spec, WEBGPU, *((3, 5) if static else ()))
    result = run(kernel, [case.qkv, case.positions, case.lengths, case.cache])[3]
    np.testing.assert_array_equal(result, case.appended())


def test_append_stays_inside_the_cache_whatever_it_is_told() -> None:
    spec = make_spec(20, 37)
    case = Case(spec, 2, [0, 0, 0, 0], [2, 2, 2, 2])
    positions, lengths = ints(-1, 37, 2**31 - 1, -(2**31)), ints(2, 2**31 - 1, 2, 2)
    result = run(kv_append(spec, WEBGPU), [case.qkv, positions, lengths, case.cache])[3]
    np.testing.assert_array_equal(result, case.cache)


# -- prefill ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("head_dim", "dtype", "rows", "positions", "lengths"),
    [
        (64, "float32", 1, [0], [1]),
        (64, "float32", 2, [99, 0, 50], [1, 2, 0]),  # the last slot; a sequence that takes no part
        (64, "float32", 70, [0, 30, 17], [70, 70, 33]),
        (64, "float16", 70, [30], [70]),
        pytest.param(64, "float16", 17, [0, 50, 83], [17, 3, 17], marks=pytest.mark.heavy),
        pytest.param(80, "float32", 17, [40], [17], marks=pytest.mark.heavy),
        (80, "float16", 33, [0, 67], [32, 33]),
        (20, "float16", 17, [0, 3], [17, 1]),
        pytest.param(1, "float32", 3, [5], [3], marks=pytest.mark.heavy),
        (256, "float32", 18, [7], [18]),
        pytest.param(99, "float16", 18, [7], [18], marks=pytest.mark.heavy),
    ],
)
def test_prefill(head_dim: int, dtype: str, rows: int, positions: list[int], lengths: list[int]) -> None:
    case = Case(make_spec(head_dim, 100, dtype), rows, positions, lengths)
    for kernel in forms(prefill_attention(case.spec, WEBGPU)):
        result = run(kernel, [case.qkv, case.positions, case.lengths, case.appended(), case.out])[-1]
        case.assert_close(result, case.attention())


def test_prefill_of_a_full_cache_of_odd_size() -> None:
    case = Case(make_spec(64, 37), 37, [0, 36], [37, 1])
    for kernel in forms(prefill_attention(case.spec, WEBGPU)):
        result = run(kernel, [case.qkv, case.positions, case.lengths, case.appended(), case.out])[-1]
        case.assert_close(result, case.attention())


def test_prefill_of_scores_far_apart() -> None:
    """Maxima that grow from tile to tile: what was summed before must be scaled down, not lost or overflown."""
    case = Case(make_spec(64, 100), 70, [0], [70])
    case.qkv[0, :, :64] = 1.0
    case.qkv[0, :, 128:192] = np.linspace(-6, 6, 70)[:, None]  # scores of one head from about -70 to 70
    for kernel in forms(prefill_attention(case.spec, WEBGPU)):
        result = run(kernel, [case.qkv, case.positions, case.lengths, case.appended(), case.out])
        case.assert_close(result[-1], case.attention(), atol=1e-4)  # a score of 100 in float32 is right to 1e-5


@pytest.mark.parametrize("limits", [WEBGPU, CUDA, GpuLimits("metal", 64, 16384, 32)])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_prefill_tiles_fit_the_device(limits: GpuLimits, dtype: str) -> None:
    for head_dim in range(1, 129):
        tile = choose_tile(make_spec(head_dim, dtype=dtype), limits)
        assert tile.threads <= limits.threads_per_block
        assert tile.shared_bytes(head_dim, dtype) <= limits.shared_memory_bytes
    assert choose_tile(make_spec(64), WEBGPU) == WEBGPU_TILES[0]


# -- decode and verify --------------------------------------------------------------------------------------


def split(case: Case, append: bool, tree: np.ndarray | None = None, splits: int | None = None) -> np.ndarray:
    """Both launches; with append, the cache afterwards is checked too, and so is what the direct form makes of it."""
    batch = len(case.positions)
    kernels = decode_attention(case.spec, WEBGPU, batch, case.rows, tree is not None, append, splits)
    cache = case.cache if append else case.appended()
    last = case.out if kernels.workspace is None else np.full(kernels.workspace, np.nan, np.float32)
    trees = [] if tree is None else [tree]
    held, *others = (
        run(kernel, [case.qkv, case.positions, case.lengths, cache, *trees, last]) for kernel in forms(kernels.partial)
    )
    np.testing.assert_array_equal(held[3], case.appended())
    for other in others:
        np.testing.assert_array_equal(other[3], case.appended())
        np.testing.assert_allclose(other[-1].astype(np.float64), held[-1].astype(np.float64), atol=2e-5, rtol=2e-3)
    if kernels.combine is None:
        return held[-1]
    return run(kernels.combine, [held[-1], case.positions, case.lengths, case.out])[-1]


@pytest.mark.parametrize("append", [False, True])
@pytest.mark.parametrize(
    ("head_dim", "dtype", "capacity", "positions", "splits"),
    [
        (64, "float32", 300, [0, 150, 299], None),
        (64, "float16", 300, [63, 64, 128], 2),  # around a tile's end
        pytest.param(80, "float16", 37, [36], None, marks=pytest.mark.heavy),
        pytest.param(20, "float32", 200, [0], 3, marks=pytest.mark.heavy),  # more splits than work
        (256, "float32", 100, [99, 1], 7),
        (19, "float16", 100, [70], 1),
    ],
)
def test_decode(
    append: bool, head_dim: int, dtype: str, capacity: int, positions: list[int], splits: int | None
) -> None:
    case = Case(make_spec(head_dim, capacity, dtype), 1, positions, [1] * len(positions))
    case.assert_close(split(case, append, splits=splits), case.attention())


@pytest.mark.parametrize("append", [False, True])
@pytest.mark.parametrize(
    ("head_dim", "dtype", "rows", "positions", "lengths"),
    [
        (64, "float32", 5, [0, 60, 95], [5, 3, 5]),
        (64, "float16", 17, [0, 83, 20], [17, 17, 0]),
        pytest.param(80, "float16", 32, [30], [32], marks=pytest.mark.heavy),
    ],
)
def test_verify_of_a_chain(
    append: bool, head_dim: int, dtype: str, rows: int, positions: list[int], lengths: list[int]
) -> None:
    case = Case(make_spec(head_dim, 100, dtype), rows, positions, lengths)
    case.assert_close(split(case, append), case.attention())


@pytest.mark.parametrize("append", [False, True])
@pytest.mark.parametrize(
    ("head_dim", "dtype", "rows", "positions", "lengths", "splits"),
    [
        (64, "float32", 8, [0, 40, 92], [8, 8, 5], 2),
        (20, "float16", 32, [60], [32], None),
        (80, "float32", 3, [0], [3], 1),
    ],
)
def test_verify_of_a_tree(
    append: bool,
    head_dim: int,
    dtype: str,
    rows: int,
    positions: list[int],
    lengths: list[int],
    splits: int | None,
) -> None:
    case = Case(make_spec(head_dim, 100, dtype), rows, positions, lengths)
    random = np.random.default_rng(rows)
    tree = np.zeros((len(positions), rows), np.int64)
    for sequence, row in itertools.product(range(len(positions)), range(rows)):
        parent = random.integers(-1, row)  # -1: a root
        tree[sequence, row] = 1 << row | (tree[sequence, parent] if parent >= 0 else 0)
    bits = tree.astype(np.uint32).view(np.int32)  # row 31 has the sign bit
    case.assert_close(split(case, append, bits, splits), case.attention(tree))


@pytest.mark.parametrize("append", [False, True])
def test_verify_past_the_capacity_neither_reads_nor_writes_there(append: bool) -> None:
    case = Case(make_spec(64, 37), 6, [34, 37], [6, 6])  # room for three rows, and for none
    result, wanted = split(case, append), case.attention()
    np.testing.assert_allclose(result[:, :3], wanted[:, :3], atol=TOLERANCE["float32"])
    assert np.isfinite(result).all()


def test_a_row_that_sees_nothing_is_zeros() -> None:
    case = Case(make_spec(64, 37), 2, [0], [2])
    result = split(case, False, ints(1, 0).reshape(1, 2))
    assert result[0, 0].any() and not result[0, 1].any()


def test_splits_follow_capacity_and_device() -> None:
    small, large = make_spec(64, 37), make_spec(64, 1024, n_head=12)
    assert choose_splits(small, CUDA, 12, tile=64) == 1
    assert choose_splits(large, CUDA, 12, tile=64) == 16
    assert choose_splits(large, CUDA, 12 * 64, tile=64) == 1
    assert choose_splits(large, WEBGPU, 12, tile=64) < choose_splits(large, CUDA, 12, tile=64)
    assert decode_attention(large, CUDA, 1, 1).workspace == (1, 1, 12, 16, 66)


# -- after the logits ---------------------------------------------------------------------------------------


def logits(batch: int, vocab: int) -> np.ndarray:
    return np.random.default_rng(vocab).standard_normal((batch, vocab)).astype(np.float32)


def row_forms(kernel: Any) -> list[Any]:
    """A kernel of one block a row, and the one for software devices in its place."""
    other = few_threads(kernel, WEBGPU)
    assert other is not None and shared_bytes(lower_to_wgsl(other).shader) <= 4 * (2 * THREADS + 2 * 16)
    return [kernel, other]


@pytest.mark.parametrize("vocab", [1, 7, 300, 50257])
def test_argmax(vocab: int) -> None:
    x = logits(3, vocab)
    x[1, vocab // 2] = 9.0
    for kernel in row_forms(argmax(3, vocab, WEBGPU)):
        np.testing.assert_array_equal(run(kernel, [x, ints(-1, -1, -1)])[1], x.argmax(-1))


def test_near_ties_with_few_threads_are_the_same() -> None:
    x = logits(5, 300)
    x[1, [7, 200]] = 9.0, 9.0 - 1e-6
    x[4, [0, 299]] = 7.0
    best = x.argmax(-1).astype(np.int32)
    marked = [run(kernel, [x, best])[1].tolist() for kernel in row_forms(gpu_near_ties(5, 300, 1e-5, WEBGPU))]
    assert marked[0] == marked[1] and [m < 0 for m in marked[0]] == [False, True, False, False, True]


def test_other_kernels_have_no_form_of_few_threads() -> None:
    assert few_threads(prefill_attention(make_spec(), WEBGPU), WEBGPU) is None


def test_argmax_of_ties_nan_and_infinity() -> None:
    x = logits(8, 1000)
    x[0, [700, 20, 999]] = 8.0  # a tie: the lowest index
    x[1, 500:] = x[1, 3] = np.nan
    x[2] = -np.inf
    x[2, 600] = -3e38
    x[3] = -np.inf  # all equal: the first
    x[4] = np.nan
    x[5] = np.nan
    x[5, 999] = -np.inf  # anything is more than NaN
    x[6] = -1.0
    x[6, [400, 401]] = -0.0, 0.0  # equal
    x[7, 999] = np.inf
    wanted = [20, int(np.nanargmax(x[1])), 600, 0, 0, 999, 400, 999]
    assert run(argmax(8, 1000, WEBGPU), [x, np.zeros(8, np.int32)])[1].tolist() == wanted


def test_greedy_advance_hands_over_to_the_next_step() -> None:
    x, capacity = logits(4, 300), 9
    token, positions = np.full((4, 1), -1, np.int32), ints(0, 3, 7, 8)
    history = np.full((4, capacity), -7, np.int32)
    best = x.argmax(-1)
    wanted = history.copy()
    wanted[0, 1], wanted[1, 4], wanted[2, 8] = best[:3]  # the fourth is full: nothing to remember it in
    for kernel in row_forms(greedy_advance(4, 300, capacity, WEBGPU)):
        _, token_after, positions_after, after = run(kernel, [x, token, positions, history])
        np.testing.assert_array_equal(token_after[:, 0], best)
        assert positions_after.tolist() == [1, 4, 8, 9]
        np.testing.assert_array_equal(after, wanted)


@pytest.mark.parametrize("vocab", [1, 300, 50257])
def test_log_prob(vocab: int) -> None:
    x = logits(6, vocab).reshape(2, 3, vocab) * 20
    x[1, 1] += 1e4  # exp of it overflows
    x[0, 2, 1:] = -np.inf
    targets = np.random.default_rng(0).integers(0, vocab, (2, 3)).astype(np.int32)
    targets[0, 0], targets[0, 2], targets[1, 0], targets[1, 2] = -1, 0, vocab, vocab - 1
    results = [
        run(kernel, [x, targets, np.full((2, 3), np.nan, np.float32)])[2]
        for kernel in row_forms(log_prob(vocab, WEBGPU))
    ]
    wide = x.astype(np.float64)
    top = wide.max(-1)
    inside = (targets >= 0) & (targets < vocab)
    at = np.take_along_axis(wide, np.where(inside, targets, 0)[..., None], -1)[..., 0]
    wanted = at - top - np.log(np.exp(wide - top[..., None]).sum(-1))
    for result in results:
        np.testing.assert_allclose(result, np.where(inside, wanted, 0), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_keep_branch(dtype: str) -> None:
    spec = make_spec(20, 37, dtype, n_head=3)
    cache = np.random.default_rng(0).standard_normal((2, 4, 3, 37, 20)).astype(dtype)
    positions, lengths = ints(0, 20, 10, 34), ints(3, 5, 0, 9)
    path = np.array([[0, 4, 7, 1, 1], [1, 2, 6, 7, 15], [1, 2, 3, 4, 5], [1, 5, 2**31 - 1, -1, 8]], np.int32)
    wanted = cache.copy()
    for sequence, (position, length) in enumerate(zip(positions, lengths, strict=True)):
        for j in range(min(length, 5)):
            if 0 <= path[sequence, j] < 37 - position:  # what lies past the capacity stays where it is
                wanted[:, sequence, :, position + j] = cache[:, sequence, :, position + path[sequence, j]]
    result = run(keep_branch(spec, WEBGPU, 4, 5), [cache, positions, path, lengths])[0]
    np.testing.assert_array_equal(result, wanted)


# -- what it refuses -----------------------------------------------------------------


def test_what_cannot_be_is_refused_in_one_line() -> None:
    tiny = GpuLimits("webgpu", threads_per_block=32, shared_memory_bytes=1024, warp_size=1)
    for bad in (
        lambda: make_spec(257),
        lambda: make_spec(0),
        lambda: make_spec(capacity=0),
        lambda: make_spec(dtype="float64"),
        lambda: AttentionSpec(1, 64, 8, "float32", float("nan")),
        lambda: prefill_attention(make_spec(), tiny),
        lambda: decode_attention(make_spec(256), tiny, 1, 1),
        lambda: decode_attention(make_spec(), WEBGPU, 1, 33),
    ):
        with pytest.raises(UserError) as error:
            bad()
        assert "\n" not in str(error.value)
