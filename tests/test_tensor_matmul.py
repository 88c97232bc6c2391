"""`tensor-matmul`: the CUDA source of every product of a small model, run on the CPU with PTX's instructions as PTX
defines them, against the same function before any schedule, compiled for the CPU."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import tvm
from cuda_on_cpu import run
from tvm import te, tirx

from gpt2_tvm.build import lower_plan, make_plan
from gpt2_tvm.config import PRESETS, GPT2Config
from gpt2_tvm.errors import UserError
from gpt2_tvm.inventory import launch_shapes
from gpt2_tvm.kernels.spec import GpuLimits
from gpt2_tvm.pipeline import Lowered
from gpt2_tvm.schedules.tensor_matmul import RULE, TensorMatmul, TensorTile, choose_tile
from targets import load_target

# 1001 columns: odd, and no multiple of any tile. 64 and 192 more than one tile; 192 is no multiple of 128.
CONFIG = GPT2Config(vocab_size=1001, n_positions=128, n_embd=64, n_layer=1, n_head=2, n_inner=192)
TARGET = load_target("h200")
LIMITS = GpuLimits.of_target(TARGET.tvm_target())
PROMPT, STEP, WIDE_STEP = (2, 37), (5, 1), (12, 1)


@functools.cache
def lowered() -> Lowered:
    return lower_plan(make_plan(CONFIG, TARGET, "q0f16", batch_sizes=(1, 12), verify_widths=()))[0]


def products() -> list[str]:
    return [hit.function for hit in lowered().hits if hit.rule == RULE]


def arrays(func: tirx.PrimFunc, batch: int, rows: int) -> list[np.ndarray]:
    """Random inputs, and a result of NaN."""
    random = np.random.default_rng(len(func.params))
    sizes = {"b": batch, "n": rows}
    found = []
    for parameter in func.params:
        shape = [sizes[e.name] if isinstance(e, tirx.Var) else int(e) for e in parameter.shape]
        found.append((random.standard_normal(shape) / 2).astype(parameter.dtype))
    found[-1][...] = np.nan
    return found


def unscheduled(func: tirx.PrimFunc, given: list[np.ndarray]) -> np.ndarray:
    target = tvm.target.Target("llvm")
    module = tvm.IRModule({"main": func.with_attr("global_symbol", "main")})
    tensors = [tvm.runtime.tensor(array) for array in given]
    tvm.compile(module, target)["main"](*tensors)
    return tensors[-1].numpy().astype(np.float64)


def symbolic(func: tirx.PrimFunc) -> set[str]:
    return {e.name for p in func.params for e in p.shape if isinstance(e, tirx.Var)}


def check(func: tirx.PrimFunc, scheduled: tirx.PrimFunc, batch: int, rows: int) -> None:
    given = arrays(func, batch, rows)
    result, wanted = run(scheduled, given)[-1].astype(np.float64), unscheduled(func, given)
    # the sums are float32 on both sides; a half that lies between two float16 may go either way
    np.testing.assert_allclose(result, wanted, rtol=2e-3, atol=1e-4)


def test_takes_every_product_with_many_rows() -> None:
    taken = products()
    calls = {name: symbolic(lowered().fused[name]) for name in taken}
    # prefill and score: 4 a layer for any length, the head for one row and for all · a step of 12: 4 and the head,
    # with a temperature and without
    assert sum(found == {"b", "n"} for found in calls.values()) == 5
    assert sum(found == {"b"} for found in calls.values()) == 1
    assert sum(not found for found in calls.values()) == 6
    assert not [hit for hit in lowered().hits if hit.rule == "matmul"]


@pytest.mark.parametrize("index", range(11))
def test_computes_what_the_function_says(index: int) -> None:
    name = products()[index]
    func, scheduled = lowered().fused[name], lowered().scheduled[name]
    free = symbolic(func)
    check(func, scheduled, *(PROMPT if "n" in free else STEP if free else WIDE_STEP))


@pytest.mark.parametrize("rows", [1, 63, 64, 65])
def test_any_number_of_rows(rows: int) -> None:
    name = next(n for n in products() if symbolic(lowered().fused[n]) == {"b", "n"} and "gelu" in n)
    check(lowered().fused[name], lowered().scheduled[name], 1, rows)


@pytest.mark.parametrize(
    "tile",
    [
        TensorTile(128, 64, 2, 2, 32, 3),
        TensorTile(64, 32, 4, 1, 64, 2),
        TensorTile(16, 16, 1, 1, 16, 4),
        pytest.param(TensorTile(32, 64, 2, 1, 32, 4), marks=pytest.mark.heavy),
    ],
)
def test_other_tiles(tile: TensorTile) -> None:
    name = next(n for n in products() if symbolic(lowered().fused[n]) == {"b", "n"} and "gelu" in n)
    func = lowered().fused[name]
    schedule = TensorMatmul(tile).apply(func, TARGET.tvm_target(), False)
    assert schedule is not None
    check(func, schedule.mod["main"], *PROMPT)


def test_a_step_longer_than_k_has_one_stage_to_fill() -> None:
    """k = 64 in steps of 64: the pipeline's other stages stay empty."""
    name = next(n for n in products() if symbolic(lowered().fused[n]) == {"b", "n"} and "gelu" in n)
    schedule = TensorMatmul(TensorTile(32, 32, 1, 1, 64, 3)).apply(lowered().fused[name], TARGET.tvm_target(), False)
    assert schedule is not None
    check(lowered().fused[name], schedule.mod["main"], *PROMPT)


# ---- where it is used


@pytest.mark.parametrize("model", ["gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"])
def test_has_a_tile_for_the_family(model: str) -> None:
    config = PRESETS[model]
    E = config.n_embd
    for columns, k in ((3 * E, E), (E, E), (4 * E, E), (E, 4 * E), (config.vocab_size, E)):
        for rows in (None, 12, 32, 64, 322):
            tile = choose_tile(rows, columns, k, LIMITS)
            assert tile is not None and k % tile.depth == 0
            assert tile.shared_bytes <= LIMITS.shared_memory_bytes and tile.threads <= 128
            assert rows is None or rows > 64 or tile.rows - rows < 16
        # a prompt of 322 tokens reaches half of an H200's multiprocessors at least
        prompt = choose_tile(None, columns, k, LIMITS)
        assert prompt is not None and -(-322 // prompt.rows) * -(-columns // prompt.columns) >= 66


def test_leaves_the_rest_to_the_next_rule() -> None:
    rule, func = TensorMatmul(), lowered().fused[products()[0]]
    for name in ("t4", "gfx90a", "webgpu"):  # sm_75 lacks the instructions
        assert rule.apply(func, load_target(name).tvm_target(), False) is None
    assert rule.apply(func, TARGET.tvm_target(), False) is not None
    assert choose_tile(None, 768, 770, LIMITS) is None  # k in no steps of 32
    other = lower_plan(make_plan(CONFIG, TARGET, "q0f32", verify_widths=()))[0]
    assert not [hit for hit in other.hits if hit.rule == RULE]  # float32 keeps its precision
    with pytest.raises(UserError, match="multiple of 16 rows"):
        TensorTile(24, 32, 1, 1, 32, 2)


@pytest.mark.parametrize(("between", "takes"), [(1, True), (3, False)])
def test_lines_that_do_not_lie_one_after_the_other_are_not_taken(between: int, takes: bool) -> None:
    x = te.placeholder((40, between, 64), "float16", name="x")
    w = te.placeholder((32, 64), "float16", name="w")
    k = te.reduce_axis((0, 64), name="k")
    y = te.compute((40, 32), lambda i, j: te.sum(x[i, 0, k].astype("float32") * w[j, k].astype("float32"), axis=k))
    func = te.create_prim_func([x, w, y])
    assert (TensorMatmul().apply(func, TARGET.tvm_target(), False) is not None) == takes


def test_a_block_a_tile() -> None:
    name = next(n for n in products() if symbolic(lowered().fused[n]) == {"b", "n"} and "gelu" in n)
    ((grid, block),) = launch_shapes(lowered().scheduled[name])
    assert grid[1] == CONFIG.n_inner // 64 and block[0] == 128
