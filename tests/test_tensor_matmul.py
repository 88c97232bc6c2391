"""`tensor-matmul`: the CUDA source of every product of a small model, run on the CPU with PTX's instructions as PTX
defines them, against the same function before any schedule, compiled for the CPU."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import tvm
from cuda_on_cpu import run
from tvm import te, tirx
from tvm.ir import GlobalVar

from gpt2_tvm.build import lower_plan, make_plan
from gpt2_tvm.config import PRESETS, GPT2Config
from gpt2_tvm.errors import UserError
from gpt2_tvm.host_code import host_launches
from gpt2_tvm.inventory import launch_shapes
from gpt2_tvm.kernels.spec import GpuLimits
from gpt2_tvm.pipeline import Lowered
from gpt2_tvm.schedules.registry import make_rules
from gpt2_tvm.schedules.tensor_matmul import RULE, TensorMatmul
from gpt2_tvm.schedules.tensor_tiles import TensorTile, choose_tile, large_tile, rows_to_fill
from gpt2_tvm.schedules.webgpu_product import match_product
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


@pytest.mark.parametrize("rows", [1, 32, 33, 64, 65])
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
    found = [(grid[1], block[0]) for grid, block in launch_shapes(lowered().scheduled[name])]
    assert found == [(CONFIG.n_inner // 32, 128), (CONFIG.n_inner // 64, 128), (1, 256)]  # few rows, more, many


# ---- many rows


@pytest.mark.parametrize("index", range(5))
def test_large_blocks_compute_it_too(index: int) -> None:
    name = [n for n in products() if symbolic(lowered().fused[n]) == {"b", "n"}][index]
    schedule = TensorMatmul(multiprocessors=1).apply(lowered().fused[name], TARGET.tvm_target(), False)
    assert schedule is not None
    check(lowered().fused[name], schedule.mod["main"], 3, 101)


@pytest.mark.parametrize("rows", [65, 1100])
def test_any_number_of_many_rows(rows: int) -> None:
    """1100 rows are 9 of blocks: 8 and one in the order of blocks."""
    func = product(columns=200, k=64)
    schedule = TensorMatmul(multiprocessors=1).apply(func, TARGET.tvm_target(), False)
    assert schedule is not None
    check_product(schedule.mod["main"], rows, 200, 64)


def product(columns: int, k: int, batch: int | None = None, length: int | None = None) -> tirx.PrimFunc:
    """x [b, n, k] times w [columns, k], transposed, in float16; b and n are the caller's where they are None."""
    b = tirx.Var("b", "int64") if batch is None else batch
    n = tirx.Var("n", "int64") if length is None else length
    x, w = te.placeholder((b, n, k), "float16", name="x"), te.placeholder((columns, k), "float16", name="w")
    at = te.reduce_axis((0, k), name="at")

    def total(i: tirx.Var, j: tirx.Var, column: tirx.Var) -> tirx.Expr:
        return te.sum(x[i, j, at].astype("float32") * w[column, at].astype("float32"), axis=at)

    y = te.compute((b, n, columns), total, name="y")
    return te.create_prim_func([x, w, te.compute(y.shape, lambda *i: y[i].astype("float16"), name="half")])


@pytest.mark.parametrize(
    ("batch", "length", "wanted"),
    [(None, None, None), (1, None, None), (3, None, None), (None, 1, 4), (None, 4, 16), (2, 5, 10)],
)
def test_which_numbers_of_rows_are_few(batch: int | None, length: int | None, wanted: int | None) -> None:
    """A length that is not known is a prompt's, also of the one sequence that MLC's prefill has; a batch is small."""
    func = product(64, 64, batch, length)
    found = match_product(func)
    assert found is not None and found.few_rows() == wanted
    schedule = TensorMatmul().apply(func, TARGET.tvm_target(), False)
    assert schedule is not None
    assert len(launch_shapes(schedule.mod["main"])) == (3 if wanted is None else 1)


def check_product(scheduled: tirx.PrimFunc, rows: int, columns: int, k: int, arch: str = "sm_80") -> None:
    random = np.random.default_rng(rows + columns + k)
    x, w = (random.standard_normal((n, k)).astype(np.float16) for n in (rows, columns))
    result = run(scheduled, [x[None], w, np.full((1, rows, columns), np.nan, np.float16)], arch)[-1][0]
    wanted = x.astype(np.float64) @ w.astype(np.float64).T
    np.testing.assert_allclose(result.astype(np.float64), wanted, rtol=2e-3, atol=2e-3 * np.sqrt(k))


@pytest.mark.parametrize("target", ["h200", "a100", "rtx-4090", "cuda"])
def test_the_host_takes_one_kernel_for_any_number_of_rows(target: str) -> None:
    device = load_target(target)
    rule = dict(make_rules(["tensor-matmul"], device))["tensor-matmul"]
    for columns, k in ((768, 3072), (2304, 768), (6400, 1600), (50257, 768)):
        schedule = rule.apply(product(columns, k), device.tvm_target(), False)
        assert schedule is not None
        name = GlobalVar("product")
        func = schedule.mod["main"].with_attr("global_symbol", "product")
        launches = host_launches({name: func}, device.tvm_target())["product"]
        large = large_tile(k, GpuLimits.of_target(device.tvm_target()))
        assert len(launches) == 3 and large is not None
        first = rows_to_fill(large, columns, device.cores.count if device.cores else 108)
        for rows in (1, 32, 33, 64, 65, 322, first - 1, first, 20608):
            made = [launch.is_made(lambda extent, rows=rows: (1, rows)[extent.axis]) for launch in launches]
            assert made == [rows <= 32, 32 < rows < first, rows >= first], (columns, rows)
        # what more rows get is a block for every multiprocessor, or all that there are columns for
        blocks = -(-first // 128) * -(-columns // 128)
        assert blocks >= (device.cores.count if device.cores else 108)
