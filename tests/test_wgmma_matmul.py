"""`wgmma-matmul`: its kernels' CUDA source, run on the CPU with PTX's instructions, descriptors and swizzle as PTX
defines them, against numpy and the same function before any schedule; and what sm_90a's machine code is made of."""

from __future__ import annotations

import functools

import pytest
from cuda_on_cpu import kernel_source
from test_tensor_matmul import CONFIG, check, check_product, product, symbolic
from tvm.ir import GlobalVar

from gpt2_tvm.build import lower_plan, make_plan
from gpt2_tvm.config import PRESETS
from gpt2_tvm.errors import UserError
from gpt2_tvm.host_code import host_launches
from gpt2_tvm.pipeline import Lowered
from gpt2_tvm.schedules.registry import make_rules
from gpt2_tvm.schedules.wgmma_matmul import ARCH, MOST_SHARED_BYTES, RULE, WgmmaMatmul, wgmma_tile
from gpt2_tvm.toolchains import cuda, cuda_toolkit
from targets import load_target
from tuning.static import occupancy, sass

PLAN = make_plan(CONFIG, load_target("h200"), "q0f16", f"with-{RULE}", batch_sizes=(1,), verify_widths=())
TARGET = PLAN.target.tvm_target()


@functools.cache
def lowered() -> Lowered:
    return lower_plan(PLAN)[0]


def products() -> list[str]:
    taken = [hit.function for hit in lowered().hits if hit.rule == RULE]
    return [name for name in taken if symbolic(lowered().fused[name]) == {"b", "n"}]


@pytest.mark.parametrize("index", range(5))
def test_computes_what_the_function_says(index: int) -> None:
    func = lowered().fused[products()[index]]
    schedule = WgmmaMatmul(multiprocessors=1).apply(func, TARGET, False)
    assert schedule is not None
    check(func, schedule.mod["main"], 3, 101)


# of every width that an instruction has here; 200 ends within a block
@pytest.mark.parametrize("columns", [160, 192, 200, 256])
def test_stages_are_filled_again_and_again(columns: int) -> None:
    """Nine steps of k: each stage is used at least twice; 131 rows end within the second block."""
    schedule = WgmmaMatmul(multiprocessors=1).apply(product(columns, 9 * 64), TARGET, False)
    assert schedule is not None
    check_product(schedule.mod["main"], 131, columns, 9 * 64, ARCH)


def test_more_rows_of_blocks_than_are_done_together() -> None:
    schedule = WgmmaMatmul(multiprocessors=1).apply(product(320, 64), TARGET, False)
    assert schedule is not None
    check_product(schedule.mod["main"], 1100, 320, 64, ARCH)


@pytest.mark.parametrize("model", ["gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"])
def test_has_a_tile_for_the_family(model: str) -> None:
    E = PRESETS[model].n_embd
    for columns, k in ((3 * E, E), (E, E), (4 * E, E), (E, 4 * E)):
        tile = wgmma_tile(columns, k)
        assert tile is not None and columns % tile.columns == 0 and tile.columns >= 160
        assert tile.shared_bytes <= MOST_SHARED_BYTES and tile.stages >= 3
        assert tile.stage * 2 % 1024 == 0 == tile.rows * tile.stride * 2 % 1024  # where the swizzle begins anew


def test_a_depth_that_it_has_no_steps_for_is_another_rules() -> None:
    assert WgmmaMatmul().apply(product(768, 96), TARGET, False) is None


def test_is_the_last_of_four_kernels() -> None:
    """XL's c_fc has 50 columns of blocks of 128 and 25 of 256: 132 multiprocessors have one each from the third
    and from the sixth row of blocks on."""
    rule = dict(make_rules([RULE], PLAN.target))[RULE]
    for (columns, k), first in {(6400, 1600): (257, 641), (768, 3072): (2689, 5505), (50257, 768): (None, 65)}.items():
        schedule = rule.apply(product(columns, k), TARGET, False)
        assert schedule is not None
        func = schedule.mod["main"].with_attr("global_symbol", "product")
        launches = host_launches({GlobalVar("product"): func}, TARGET)["product"]
        starts = [1, 33, *(start for start in first if start is not None)]
        assert len(launches) == len(starts)
        for i, start in enumerate(starts):
            for rows in (start, [*starts, 1 << 20][i + 1] - 1):
                made = [launch.is_made(lambda extent, rows=rows: (1, rows)[extent.axis]) for launch in launches]
                assert made == [j == i for j in range(len(starts))], (columns, rows)


def test_is_for_one_architecture_alone() -> None:
    assert PLAN.target.archs == (ARCH,) and PLAN.target.arch() == ARCH
    for name in ("a100", "cuda", "t4", "rocm", "webgpu"):
        with pytest.raises(UserError, match="wgmma-matmul"):
            make_plan(CONFIG, load_target(name), "q0f16", f"with-{RULE}")
    assert load_target("h200").arch() == "sm_90"
    assert WgmmaMatmul().apply(product(256, 64), load_target("h200").tvm_target(), False) is None


def test_takes_what_has_rows_for_the_caller_to_choose_and_leaves_the_rest() -> None:
    """It stands before all others: a decode step's products have to be theirs."""
    full = lower_plan(make_plan(CONFIG, load_target("h200"), "q0f16", batch_sizes=(1,), verify_widths=()))[0]
    others = {hit.function: hit.rule for hit in full.hits}
    for hit in lowered().hits:
        many = others[hit.function] == "tensor-matmul" and symbolic(full.fused[hit.function]) == {"b", "n"}
        assert hit.rule == (RULE if many else others[hit.function]), hit
    assert len(products()) == 5


@pytest.mark.parametrize(("columns", "k"), [(768, 3072), (1600, 1600), (4800, 1600), (6400, 1600)])
def test_machine_code(columns: int, k: int) -> None:
    """Instructions of all of a step in a row, their sums in registers; nothing waits for each of them, as it does where
    the compiler cannot tell what happens to the sums (its warning C7510)."""
    toolkit = cuda_toolkit.find()
    if toolkit is None or not cuda_toolkit.nvrtc_installed() or sass.tool() is None:
        pytest.skip("needs CUDA's headers, NVRTC and cuobjdump")
    schedule = WgmmaMatmul().apply(product(columns, k), TARGET, False)
    tile = wgmma_tile(columns, k)
    assert schedule is not None and tile is not None
    source = kernel_source(schedule.mod["main"], ARCH)
    with cuda._cuda_path(toolkit.root):
        found = {k.name: k for k in sass.kernels(cuda._nvrtc(source, ARCH, "cubin", toolkit))}
    large = found.pop("kernel_kernel_3")
    assert len(found) == 3
    for small in found.values():
        assert small.counts["HMMA"] and not any("HGMMA" in name for name in small.opcodes)
    products = sum(count for name, count in large.opcodes.items() if name.startswith("HGMMA"))
    waits = sum(count for name, count in large.opcodes.items() if name.startswith("WARPGROUP.DEPBAR"))
    assert products and products % 4 == 0 and waits == products // 4 + 1
    assert large.stack == 0 and not any(name.startswith(("LDL", "STL")) for name in large.opcodes)
    resident = occupancy.cuda_occupancy(ARCH, tile.threads, large.registers, tile.shared_bytes)
    assert resident is not None and resident[0] * 2048 == tile.threads * (2 if tile.columns <= 160 else 1)
