"""What is read from SASS, against kernels written by hand whose widths, spills and instructions are known."""

from __future__ import annotations

import functools

import pytest

from gpt2_tvm.toolchains import cuda, cuda_toolkit
from targets import load_target
from tuning.static import sass

pytestmark = [
    pytest.mark.skipif(
        cuda.missing(load_target("cuda")) is not None, reason="needs the CUDA compiler: pip install 'gpt2-tvm[cuda]'"
    ),
    pytest.mark.skipif(sass.tool() is None, reason=f"needs {sass.PACKAGES} from PyPI"),
]

# 64 results, each the end of a chain of its own, alive at once: with 40 registers a thread most of them cannot stay.
LIVE = 64
SOURCE = """
#include <cuda_fp16.h>
template <typename T> __device__ void move(const T* from, T* to) {
  to[blockIdx.x * 256 + threadIdx.x] = from[blockIdx.x * 256 + threadIdx.x];
}
extern "C" __global__ void move128(const float4* __restrict__ a, float4* b) { move(a, b); }
extern "C" __global__ void move64(const float2* __restrict__ a, float2* b) { move(a, b); }
extern "C" __global__ void move32(const float* __restrict__ a, float* b) { move(a, b); }
extern "C" __global__ void move16(const half* __restrict__ a, half* b) { move(a, b); }
extern "C" __global__ void move8(const char* __restrict__ a, char* b) { move(a, b); }

extern "C" __global__ void multiply(const float* a, float* b) {
  float x = a[threadIdx.x], y = a[threadIdx.x + 256], sum = b[threadIdx.x];
#pragma unroll
  for (int i = 0; i < 24; ++i) sum = x * sum + y;
  b[threadIdx.x] = sum;
}

extern "C" __global__ void reduce(const float* a, float* b) {
  __shared__ float warps[32];
  float sum = a[blockIdx.x * 1024 + threadIdx.x];
#pragma unroll
  for (int lane = 16; lane; lane /= 2) sum += __shfl_xor_sync(0xffffffff, sum, lane);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x == 0) b[blockIdx.x] = warps[0] + warps[blockIdx.x % 32];
}

extern "C" __global__ void LIMIT keep_many(const float* a, float* b, int n) {
  float held[LIVE];
#pragma unroll
  for (int i = 0; i < LIVE; ++i) held[i] = a[i * 256 + threadIdx.x];
  for (int k = 0; k < n; ++k) {
#pragma unroll
    for (int i = 0; i < LIVE; ++i) held[i] = held[i] * held[(i * 7 + 1) % LIVE] + a[k];
  }
#pragma unroll
  for (int i = 0; i < LIVE; ++i) b[i * 256 + threadIdx.x] = held[i];
}

extern "C" __global__ void index_at_run_time(const float* a, const int* at, float* b) {
  float held[LIVE];
  for (int i = 0; i < LIVE; ++i) held[i] = a[i * 256 + threadIdx.x];
  for (int i = 0; i < LIVE; ++i) held[at[i] % LIVE] += a[i];
  b[threadIdx.x] = held[at[threadIdx.x] % LIVE];
}
"""


@functools.cache
def compiled(arch: str, limit: str = "") -> dict[str, sass.Kernel]:
    toolkit = cuda_toolkit.find()
    assert toolkit is not None
    source = SOURCE.replace("LIMIT", limit).replace("LIVE", str(LIVE))
    with cuda._cuda_path(toolkit.root):
        return {kernel.name: kernel for kernel in sass.kernels(cuda._nvrtc(source, arch, "cubin", toolkit))}


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_widths_of_loads_and_stores(arch: str) -> None:
    for bits in (128, 64, 32, 16, 8):
        kernel = compiled(arch)[f"move{bits}"]
        assert kernel.arch == arch
        assert kernel.widest_load == bits // 8
        assert {key: n for key, n in kernel.mix.items() if key[:3] in ("LDG", "STG")} == {
            f"LDG.{bits}": 1,
            f"STG.{bits}": 1,
        }
        assert not kernel.stack and not kernel.local and not kernel.shared


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_instructions_that_stand_in_the_source(arch: str) -> None:
    multiply, reduce = compiled(arch)["multiply"], compiled(arch)["reduce"]
    assert multiply.mix["FFMA"] == 24 and multiply.mix["LDG.32"] == 3 and "SHFL" not in multiply.mix
    assert reduce.mix["SHFL"] == 5 and reduce.mix["BAR"] == 1 and reduce.mix["STS.32"] == 1
    # what the system keeps of each block on Hopper is not the kernel's
    assert reduce.shared == 32 * 4 and not multiply.shared
    assert multiply.mix["total"] < sum(multiply.opcodes.values())  # without the padding


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_planted_spill(arch: str) -> None:
    free, squeezed = compiled(arch)["keep_many"], compiled(arch, "__launch_bounds__(1024, 1)")["keep_many"]
    # 65536 registers for 1024 threads are 64 each, too few for 64 values and their addresses
    assert free.registers > LIVE and not free.stack and not free.mix.get("LDL.32")
    assert squeezed.registers <= 64 and squeezed.stack > 0
    stores = sum(n for key, n in squeezed.mix.items() if key.startswith("STL"))
    loads = sum(n for key, n in squeezed.mix.items() if key.startswith("LDL"))
    assert stores and loads and not squeezed.indexed_local


def test_an_array_indexed_at_run_time_is_told_from_a_spill() -> None:
    kernel = compiled("sm_80")["index_at_run_time"]
    assert kernel.stack >= 4 * LIVE and kernel.indexed_local > 0
    assert compiled("sm_80")["keep_many"].indexed_local == 0


def test_widths_in_names_of_instructions() -> None:
    names = {"LDG.E.128.CONSTANT": 128, "LDG.E.U16": 16, "STG.E": 32, "LDS.64": 64, "LDG.E.S8.CONSTANT": 8}
    names |= {"LDGSTS.E.BYPASS.LTC128B.128": 128, "LDG.E.64.STRONG.SYS": 64}
    assert {name: sass.width_bits(name) for name in names} == names
