"""Flash attention on tensor cores: its CUDA source run on the CPU, with PTX's instructions as PTX defines them, against
numpy in float64; and its machine code.

As in `test_gpu_kernels`, what the kernel must not look at is NaN.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tvm
from cuda_on_cpu import run, translated
from test_gpu_kernels import Case, make_spec

from gpt2_tvm import toolchains
from gpt2_tvm.gpu_attention import GpuKernels
from gpt2_tvm.kernels.cuda_prefill_attention import THREADS, fits, prefill_attention, shared_bytes
from gpt2_tvm.kernels.spec import GpuLimits
from targets import load_target
from tuning.static import occupancy, sass

AMPERE = GpuLimits("cuda", 1024, 49152, 32, arch=80)
CAPACITY = 300


def attended(case: Case) -> np.ndarray:
    """The kernel's result. The cache is as large in every case of a head size, so each is compiled once."""
    return run(prefill_attention(case.spec), [case.qkv, case.positions, case.lengths, case.appended(), case.out])[-1]


@pytest.mark.parametrize(
    ("head_dim", "rows", "positions", "lengths"),
    [
        (64, 1, [0], [1]),
        (64, 1, [299, 0, 64], [1, 0, 1]),  # the last slot; a sequence that takes no part
        (64, 7, [13], [7]),
        (64, 65, [0, 63, 170], [65, 64, 3]),
        (64, 257, [43], [257]),
        (32, 65, [64, 1], [65, 65]),
        pytest.param(32, 257, [0], [250], marks=pytest.mark.heavy),
        (128, 65, [25, 190], [65, 1]),
        pytest.param(128, 257, [0], [257], marks=pytest.mark.heavy),
        (40, 33, [50], [33]),  # half a slice of 16 elements is padding
        pytest.param(80, 70, [0, 100], [70, 12], marks=pytest.mark.heavy),
        pytest.param(8, 18, [4], [18], marks=pytest.mark.heavy),
    ],
)
def test_is_attention(head_dim: int, rows: int, positions: list[int], lengths: list[int]) -> None:
    case = Case(make_spec(head_dim, CAPACITY, "float16"), rows, positions, lengths)
    case.assert_close(attended(case), case.attention())


def test_rows_past_the_capacity_see_what_there_is() -> None:
    case = Case(make_spec(64, 70, "float16"), 40, [60], [40])
    case.assert_close(attended(case), case.attention())


def test_scores_far_apart() -> None:
    """Maxima that grow from tile to tile: what was summed before must be scaled down, not lost or overflown."""
    case = Case(make_spec(64, CAPACITY, "float16"), 130, [0], [130])
    case.qkv[0, :, :64] = 1.0
    case.qkv[0, :, 128:192] = np.linspace(-6, 6, 130)[:, None]  # scores of one head from about -70 to 70
    case.assert_close(attended(case), case.attention(), atol=4e-3)


def test_where_it_is_chosen() -> None:
    spec = make_spec(64, CAPACITY, "float16")
    assert fits(spec, AMPERE)
    assert GpuLimits.of_target(load_target("h200").tvm_target()).arch == 90
    assert GpuLimits.of_target(tvm.target.Target({"kind": "cuda", "arch": "sm_90a"})).arch == 90
    assert fits(spec, GpuKernels.for_target(load_target("cuda")).limits)
    for limits in (
        GpuKernels.for_target(load_target("t4")).limits,  # sm_75 has neither m16n8k16 nor cp.async
        GpuKernels.for_target(load_target("gfx90a")).limits,
        GpuLimits("cuda", 1024, 49152, 32),
        GpuLimits("cuda", THREADS // 2, 49152, 32, arch=80),
        GpuLimits("cuda", 1024, shared_bytes(64) - 1, 32, arch=80),
    ):
        assert not fits(spec, limits)
    for head_dim, dtype in ((64, "float32"), (64, "bfloat16"), (20, "float16"), (136, "float16")):
        assert not fits(make_spec(head_dim, dtype=dtype), AMPERE)
    assert all(shared_bytes(head_dim) <= 48 * 1024 for head_dim in range(8, 129, 8))


@pytest.mark.heavy
@pytest.mark.skipif(
    (what := toolchains.missing(load_target("cuda"))) is not None, reason=f"cannot compile for CUDA: needs {what}"
)
@pytest.mark.skipif(sass.tool() is None, reason=f"needs {sass.PACKAGES} from PyPI")
def test_machine_code(tmp_path: Path) -> None:
    """Tensor cores, copies past the registers, nothing in local memory, two blocks or more on a multiprocessor."""
    sizes = (32, 64, 128)
    target = load_target("cuda")
    module = tvm.IRModule(
        {
            f"head{size}": prefill_attention(make_spec(size, 1024, "float16", 12)).with_attr(
                "global_symbol", f"head{size}"
            )
            for size in sizes
        }
    )
    with toolchains.compiling(target) as tvm_target:
        (library,) = toolchains.export(tvm.compile(module, tvm_target), target, tmp_path)
    found = {(k.arch, k.name): k for k in sass.kernels((tmp_path / library).read_bytes())}
    assert {arch for arch, _ in found} == set(target.archs) and len(found) == 3 * len(sizes)
    for (arch, name), kernel in found.items():
        size = int(name.removeprefix("head").removesuffix("_kernel"))
        where = f"{arch} {name}"
        # 64 keys are 8 columns of results for 16 elements of the head, and as much again for the values
        assert kernel.counts["HMMA"] == 2 * 8 * size // 16, where
        assert kernel.counts["LDSM"] == (2 * 4 + 1) * size // 16, where
        assert kernel.mix["LDGSTS.128"] == 5 * 64 * size // 8 // THREADS, where
        assert not kernel.stack and not kernel.local and not kernel.counts["LDL"] and not kernel.counts["STL"], where
        assert kernel.shared == shared_bytes(size), where
        resident = occupancy.cuda_occupancy(arch, THREADS, kernel.registers, kernel.shared)
        assert resident is not None
        threads = {"sm_80": 2048, "sm_89": 1536, "sm_90": 2048}[arch]
        assert resident[0] * threads >= 2 * THREADS, f"{where}: {resident[1]}"


# ---- the emulator itself


def test_unknown_assembly_is_refused() -> None:
    with pytest.raises(AssertionError, match="does not know: wgmma"):
        translated('extern "C" __global__ void f() {\n  asm volatile("wgmma.mma_async;" ::: "memory");\n}')
