"""The GEMV spaces, the order in which they are searched, and the model that ranks them."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from planted_candidates import time_of

from gpt2_tvm.errors import UserError
from gpt2_tvm.schedules.gemv_config import GemvConfig
from targets import load_target
from tuning.guided import ModelGuided, nonnegative
from tuning.predict import WORK, Compiled, predict_us, work
from tuning.search import Grid, Random, Strategy, get_strategy
from tuning.space import SPACES, Context, describe, get_spaces, points, stock_point, why_not
from tuning.workloads import Workload


def workload(n: int = 768, k: int = 768, dtype: str = "float16", rows: int = 1) -> Workload:
    name = f"w {n}x{k} {dtype}"
    x = dtype if dtype.startswith("float") else "float16"
    return Workload(name, n, k, rows, dtype, x, x, ("w",), 12, 2 * n * k, 2 * n * k, ("bias",), "0" * 16)


@pytest.mark.parametrize("target", ["h200", "rtx-4090", "m2-ultra", "gfx942", "webgpu"])
@pytest.mark.parametrize("space", SPACES)
def test_every_point_is_kept_or_counted_with_its_reason(space: str, target: str) -> None:
    device, w = load_target(target), workload(50257, 768)
    if space == "full":  # millions: the table is thinned, what is counted is not
        thin = {k: v[:: max(1, len(v) // 3)] for k, v in SPACES[space].values.items()}
        chosen = type(SPACES[space])("full", "thinned", thin)
    else:
        chosen = SPACES[space]
    found = points(chosen, w, device)
    assert found.total == math.prod(len(v) for v in chosen.values.values())
    assert found.configs and len(set(found.configs)) == len(found.configs)
    limits = device.limits
    for config in found.configs:
        assert 16 <= config.threads <= limits.threads_per_block
        assert w.reduced % (config.tr * config.tile_r * config.split_k) == 0
        assert config.tile_r * 2 % config.vec_load == 0
        assert Context(w, device).shared_bytes(config) <= limits.shared_memory_bytes
        if target == "webgpu":
            assert config.vec_load <= 8, "WGSL's vectors have 4 lanes: 8 bytes of float16"
            assert -(-w.outputs // (config.ts * config.tile_s)) <= 65535
        assert why_not(config, w, device) is None


@pytest.mark.parametrize(
    ("target", "dtype", "widths"),
    [
        ("h200", "int8", {8, 16}),  # of tiles of 8, 16, 24, ... weights of a byte
        ("webgpu", "int8", {8, 16}),  # four words of 32 bits
        ("webgpu", "int4", {4, 8, 16}),
        ("webgpu", "float16", {8}),
        ("m2-ultra", "float16", {8}),
        ("h200", "float16", {16}),
        ("h200", "int4", {4, 8, 16}),
    ],
)
def test_loads_are_as_wide_as_tile_and_device_allow(target: str, dtype: str, widths: set[int]) -> None:
    found = points(SPACES["schedule2"], workload(4096, 3072, dtype), load_target(target)).configs
    assert {c.vec_load for c in found} == widths


def test_the_studys_spaces() -> None:
    device, w = load_target("rtx-4090"), workload()
    first, second = points(SPACES["schedule1"], w, device), points(SPACES["schedule2"], w, device)
    assert {c.tile_r for c in first.configs} == {8} and {c.tile_s for c in first.configs} == {1, 2, 4, 8}
    assert {c.tile_s for c in second.configs} == {1} and all(c.tile_r % 8 == 0 for c in second.configs)
    # the 2023 study's best point on this GPU, with loads as wide as they can be
    assert any((c.ts, c.tr, c.tile_s, c.tile_r, c.vec_load) == (8, 16, 1, 8, 16) for c in first.configs)
    assert {"more threads than a block may have", "TR x TILE_R does not divide K"} <= set(first.dropped)


def test_registers_bound_the_tile() -> None:
    device, w = load_target("h200"), workload(dtype="float32", rows=8)
    huge = GemvConfig(8, 8, tile_s=8, tile_r=32, vec_load=16, vec_c=4)
    assert why_not(huge, w, device) == "more registers than a thread may have"
    assert why_not(huge, w, load_target("m2-ultra")) is None  # Apple names no figure


def test_spaces_by_name() -> None:
    assert [s.name for s in get_spaces("schedule2, schedule1,schedule2")] == ["schedule2", "schedule1"]
    for text in ("schedule3", "", "schedule1,x"):
        with pytest.raises(UserError, match="schedule1, schedule2, full"):
            get_spaces(text)


def test_describe_names_what_differs() -> None:
    stock = stock_point(workload(), load_target("h200"))
    assert describe(stock, stock) == "TS=16 TR=32 TILE_S=1 TILE_R=8"
    assert describe(GemvConfig(8, 16, 1, 8, 16, 4, "y", True, 8, 256), stock).endswith("TILE_R=8 VEC_LOAD=16")


# -- strategies ----------------------------------------------------------------------------------------------


def run_search(strategy: Strategy, time: object = time_of) -> dict[GemvConfig, float | None]:
    results: dict[GemvConfig, float | None] = {}
    while (config := strategy.ask(results, set())) is not None:
        assert config not in results
        results[config] = time(config)  # type: ignore[operator]
    return results


def table() -> list[GemvConfig]:
    powers = (1, 2, 4, 8, 16, 32, 64)
    return [GemvConfig(ts, tr, s, r) for ts, tr, s, r in itertools.product(powers, powers, (1, 2, 4, 8), (8, 16))]


def test_grid_tries_every_point_once_whatever_was_done_before() -> None:
    configs, device, w = table(), load_target("h200"), workload()
    grid = Grid(configs, w, device, None, seed=3)
    assert set(run_search(grid)) == set(configs) and grid.trials == len(configs)
    half: dict[GemvConfig, float | None] = {}
    for _ in range(50):
        half[grid.ask(half, set())] = 1.0
    again = Grid(configs, w, device, None, seed=3)
    assert again.ask(half, set()) not in half
    assert grid.ask({}, {grid.order[0]}) == grid.order[1]  # what another worker runs is not tried twice


def test_random_is_a_sample() -> None:
    configs, device, w = table(), load_target("h200"), workload()
    assert len(run_search(Random(configs, w, device, None, 0))) == len(configs) // 10
    assert len(run_search(Random(configs, w, device, 7, 0))) == 7


@pytest.mark.parametrize("seed", range(4))
def test_the_model_finds_the_best_of_a_grid_in_a_tenth_of_the_trials(seed: int) -> None:
    """A landscape that the model of the device knows nothing of, with noise and failures."""
    configs, device, w = table(), load_target("h200"), workload()
    random = np.random.default_rng(seed)
    noise = {c: float(random.normal(1, 0.004)) for c in configs}

    def time(c: GemvConfig) -> float | None:
        if c.threads > 1024:
            return None
        far = [math.log2(c.ts / 8), math.log2(c.tr / 16), math.log2(c.tile_s / 2)]
        return 50 * (1 + 0.08 * sum(f * f for f in far) + 0.05 * far[0] * far[1]) * noise[c]

    search = ModelGuided(configs, w, device, None, seed)
    found = run_search(search, time)
    best = min(t for c in configs if (t := time(c)) is not None)
    assert len(found) <= -(-len(configs) // 10)
    assert min(t for t in found.values() if t is not None) <= 1.02 * best


@pytest.mark.parametrize("seed", range(4))
def test_the_model_learns_what_a_device_charges_for(seed: int) -> None:
    """A software device: no bandwidth to share, but a price for every thread, step and sum; noise of 2 %."""
    device, w = load_target("webgpu"), workload(768, 768, "float32")
    configs = [c for space in ("schedule1", "schedule2") for c in points(SPACES[space], w, device).configs]
    configs = list(dict.fromkeys(configs))
    random = np.random.default_rng(seed)
    price = random.uniform(0.2, 2.0, len(WORK))
    noise = {c: float(random.normal(1, 0.005)) for c in configs}

    def time(c: GemvConfig) -> float:
        return float(np.dot(price, work(c, w, device))) / 1e4 * noise[c]

    found = run_search(ModelGuided(configs, w, device, None, seed), time)
    assert len(found) <= -(-len(configs) // 10)
    assert min(t for t in found.values() if t is not None) <= 1.02 * min(map(time, configs))


def test_weights_that_are_not_negative() -> None:
    random = np.random.default_rng(0)
    a, x = random.uniform(0, 1, (40, 5)), np.array([0.0, 2.0, 0.0, 0.5, 1.0])
    assert np.allclose(nonnegative(a, a @ x), x, atol=1e-4)
    towards = a @ np.array([-1.0, 2.0, 0.3, 0.5, 1.0])
    found = nonnegative(a, towards)
    assert (found >= 0).all() and found[0] == 0
    rest, _, _, _ = np.linalg.lstsq(a[:, 1:], towards, rcond=None)  # the others are as if the first were not there
    assert (rest > 0).all() and np.allclose(found[1:], rest, atol=1e-4)


def test_work_counts_padding_and_threads() -> None:
    w, device = workload(100, 768, "float32"), load_target("webgpu")
    counts = dict(zip(WORK, work(GemvConfig(8, 4, 2, 8, vec_load=16, vec_c=4), w, device), strict=True))
    blocks, threads = 7, 7 * 32  # 7 x 16 outputs cover 100
    steps = threads * 24  # of 4 x 8 elements, 768 of them
    assert counts == {
        "multiply-adds": steps * 16,
        "steps": steps,
        "threads": threads,
        "weight loads": steps * 16 * 4 / 16,
        "x loads": steps * 2,
        "sums across threads": threads * 2 * 2,
        "barriers": threads * 2,
        "blocks": blocks,
    }


def test_unknown_strategy() -> None:
    with pytest.raises(UserError, match="grid, random, model"):
        get_strategy("evolution")


def test_the_model_knows_bandwidth_occupancy_and_spills() -> None:
    device, head = load_target("h200"), workload(50257, 768)
    good = GemvConfig(8, 32, 1, 8, 16, 4, "y", True, 8, 256)
    floor = head.weight_bytes / 4800e3
    assert floor < predict_us(good, head, device) < 2 * floor
    assert predict_us(good, head, device, Compiled(spill_bytes=256)) > predict_us(good, head, device)
    assert predict_us(GemvConfig(1, 16, 1, 1, 2, 1), head, device) > 2 * predict_us(good, head, device)
    small = workload(768, 768)
    assert predict_us(good, small, device) < predict_us(good, head, device) / 4
