"""What is read from assembly and shaders, against pieces written by hand; and occupancy against the makers' tables."""

from __future__ import annotations

import pytest

from tuning.static import assembly, occupancy, shaders
from tuning.static.amd import Kernel as AmdKernel

# Assembly -------------------------------------------------------------------------------------------------------------

X86 = """\
\t.text
\t.globl\t__tvm_ffi_gemv
__tvm_ffi_gemv:
.Lfunc_begin0:
\tpushq\t%rbx
\tcmpl\t$3, %edx
\tjne\t.LBB0_2
\tcallq\tgemv_compute_@PLT
.LBB0_2:
\tpopq\t%rbx
\tretq
gemv_compute_:
\tsubq\t$40, %rsp
\tleaq\t.L__tvm_parallel_lambda(%rip), %rdi
\tmovq\t__TVMBackendParallelLaunch@GOTPCREL(%rip), %rax
\tcallq\t*(%rax)
\tretq
\t.p2align\t4
.L__tvm_parallel_lambda:
\tpushq\t%rbp
\tsubq\t$72, %rsp
\tmovq\t__TVMBackendAllocWorkspace@GOTPCREL(%rip), %r12
\tcallq\t*(%r12)
.LBB2_1:
\tvxorps\t%xmm0, %xmm0, %xmm0
.LBB2_2:
\tvbroadcastss\t(%rdx), %ymm8
\tmovq\t56(%rsp), %rsi
\tvfmadd231ps\t-64(%rsi,%rcx), %ymm8, %ymm0
\tvfmadd231ps\t-32(%rsi,%rcx), %ymm8, %ymm1
\tvmovups\t%ymm0, (%rdi,%rcx)
\taddq\t$4, %rdx
\tjne\t.LBB2_2
\tvmulps\t.LCPI2_0(%rip), %ymm0, %ymm0
.LBB2_4:
\tvaddps\t(%rax), %ymm0, %ymm0
\tvaddps\t%ymm1, %ymm0, %ymm0
\tvaddps\t%ymm2, %ymm0, %ymm0
\tvaddps\t%ymm3, %ymm0, %ymm0
\tvaddps\t%ymm4, %ymm0, %ymm0
\tvaddps\t%ymm5, %ymm0, %ymm0
\tdecq\t%rax
\tjne\t.LBB2_4
\tcallq\texpf@PLT
\tincq\t%r15
\tjne\t.LBB2_1
\tretq
\t.globl\t__tvm_ffi_other
__tvm_ffi_other:
.LBB3_1:
\tvmovss\t(%rdi), %xmm0
\tvaddss\t(%rsi), %xmm0, %xmm0
\tdecq\t%rcx
\tjne\t.LBB3_1
\tretq
"""


def test_x86_function_with_its_parallel_body() -> None:
    found = assembly.functions(X86)
    assert list(found) == ["gemv", "other"]
    gemv = found["gemv"]
    assert gemv.symbols == ("gemv_compute_", ".L__tvm_parallel_lambda")  # not the entry, which checks arguments
    assert len(gemv.loops) == 2  # the outer one is not innermost
    loop = gemv.hottest
    assert loop is not None and loop.depth == 2
    assert loop.load_bytes == 4 + 32 + 32 and loop.lanes == 2 * 2 * 8  # the epilogue has more adds, and loads less
    assert loop.stack_slots == {"56(%rsp)": 8}
    assert gemv.vector_bits == 256 and gemv.libm == {"expf": 1}
    counted = assembly.counts(loop.instructions)
    assert counted == {"branch": 1, "broadcast": 1, "fma": 2, "load": 3, "stack": 1, "store": 1, "total": 7}
    assert assembly.counts(gemv.instructions)["workspace"] == 1
    other = found["other"]
    assert other.vector_bits == 32 and other.hottest is not None and other.hottest.load_bytes == 8


@pytest.mark.parametrize(
    ("line", "kind", "bits", "load", "store", "stack"),
    [
        ("vfmadd231ps (%rax), %zmm1, %zmm2", "fma", 512, 64, 0, 0),
        ("vfmadd231ps (%rax){1to16}, %zmm1, %zmm2", "fma", 512, 4, 0, 0),
        ("vfmadd213ss (%rax), %xmm1, %xmm2", "fma", 32, 4, 0, 0),
        ("vfmadd213sd %xmm0, %xmm1, %xmm2", "fma", 64, 0, 0, 0),
        ("mulps (%rdi), %xmm1", "mul", 128, 16, 0, 0),
        ("vdivps %ymm1, %ymm0, %ymm0", "divide", 256, 0, 0, 0),
        ("vmovups 64(%rdi,%rcx,4), %ymm3", "load", 256, 32, 0, 0),
        ("vmovups %zmm3, 128(%rdi)", "store", 512, 0, 64, 0),
        ("vmovups %ymm3, 96(%rsp)", "store", 256, 0, 0, 32),
        ("vmovss 8(%rsp), %xmm3", "load", 32, 0, 0, 4),
        ("vmovups 96(%rsp,%rcx), %ymm3", "load", 256, 32, 0, 0),  # an array of the function, not a spilled register
        ("vcvtph2ps (%rsi), %zmm0", "convert", 512, 32, 0, 0),
        ("vpmovsxbd (%rsi), %zmm0", "convert", 512, 16, 0, 0),
        ("vpmovsxbd (%rsi), %ymm0", "convert", 256, 8, 0, 0),
        ("vbroadcastss 4(%rsi), %zmm0", "broadcast", 512, 4, 0, 0),
        ("vbroadcastf32x4 (%rsi), %zmm0", "broadcast", 512, 16, 0, 0),
        ("vinsertf128 $1, (%rsi), %ymm0, %ymm1", "shuffle", 256, 16, 0, 0),
        ("vmulps .LCPI2_0(%rip), %ymm0, %ymm0", "mul", 256, 0, 0, 0),
        ("vmaxps %zmm1, %zmm0, %zmm0", "minmax", 512, 0, 0, 0),
        ("vpdpbusd (%rsi), %zmm0, %zmm1", "dot", 512, 64, 0, 0),
        ("prefetcht0 4096(%rsi)", "prefetch", 0, 0, 0, 0),
        ("movq 56(%rsp), %rsi", "load", 0, 0, 0, 8),
        ("movl $-1, 12(%rdi)", "store", 0, 0, 4, 0),
        ("addl 12(%rdi), %eax", "other", 0, 4, 0, 0),
        ("leaq 12(%rdi), %rax", "other", 0, 0, 0, 0),
    ],
)
def test_x86_instruction(line: str, kind: str, bits: int, load: int, store: int, stack: int) -> None:
    from tuning.static.x86 import X86

    found = X86().read(f"\t{line.replace(' ', chr(9), 1)}")
    assert (found.kind, found.bits, found.load_bytes, found.store_bytes, found.stack_bytes) == (
        *(kind, bits, load, store, stack),
    )


def test_x86_frame_pointer_is_one_only_once_it_was_set() -> None:
    from tuning.static.x86 import X86

    reader = X86()
    assert not reader.read("\tmovq\t-8(%rbp), %rax").stack_slot
    reader.read("\tmovq\t%rsp, %rbp")
    assert reader.read("\tmovq\t-8(%rbp), %rax").stack_slot == "-8(%rbp)"
    reader.read("\tpushq\t%rbp")  # the next function
    assert not reader.read("\tmovq\t-8(%rbp), %rax").stack_slot


@pytest.mark.parametrize(
    ("line", "kind", "bits", "load", "store", "stack"),
    [
        ("fmla v0.4s, v1.4s, v2.s[0]", "fma", 128, 0, 0, 0),
        ("fmadd s0, s1, s2, s3", "fma", 32, 0, 0, 0),
        ("ldr q0, [x0, #16]", "load", 128, 16, 0, 0),
        ("ldp q0, q1, [x0], #32", "load", 128, 32, 0, 0),
        ("ldp q0, q1, [sp, #64]", "load", 128, 0, 0, 32),
        ("str d8, [x29, #-16]", "store", 64, 0, 0, 8),
        ("ld1 { v0.4s, v1.4s }, [x8]", "load", 128, 32, 0, 0),
        ("ld1r { v0.4s }, [x8]", "broadcast", 128, 4, 0, 0),
        ("ldrb w8, [x9]", "load", 0, 1, 0, 0),
        ("ldr x8, [x9, x10, lsl #3]", "load", 0, 8, 0, 0),
        ("fcvtl v0.4s, v1.4h", "convert", 128, 0, 0, 0),
        ("sdot v0.4s, v1.16b, v2.16b", "dot", 128, 0, 0, 0),
        ("prfm pldl1keep, [x8, #512]", "prefetch", 0, 0, 0, 0),
    ],
)
def test_arm_instruction(line: str, kind: str, bits: int, load: int, store: int, stack: int) -> None:
    from tuning.static.arm import AArch64

    found = AArch64().read(f"\t{line.replace(' ', chr(9), 1)}")
    assert (found.kind, found.bits, found.load_bytes, found.store_bytes, found.stack_bytes) == (
        *(kind, bits, load, store, stack),
    )


def test_arm_loops_in_macho() -> None:
    text = """\
\t.globl\t___tvm_ffi_sum
___tvm_ffi_sum:
\tstp\tx29, x30, [sp, #-16]!
\tbl\t_sum_compute_
\tret
_sum_compute_:
LBB1_1:
\tldr\tq1, [x0], #16
\tfadd.4s\tv0, v0, v1
\tfmla\tv2.4s, v1.4s, v1.4s
\tsubs\tx8, x8, #4
\tb.ne\tLBB1_1
\tbl\t_expf
\tret
"""
    (function,) = assembly.functions(text).values()
    assert function.name == "sum" and function.symbols == ("_sum_compute_",)
    assert function.vector_bits == 128 and function.libm == {"expf": 1}
    assert function.hottest is not None and function.hottest.load_bytes == 16


def test_other_assembly_is_refused() -> None:
    with pytest.raises(ValueError, match="neither"):
        assembly.functions("\taddi a0, a0, 1\n\tjr ra\n")


# Shaders --------------------------------------------------------------------------------------------------------------

WGSL = """\
// Function: f_kernel
@group(0) @binding(0) var<storage, read_write> out_ptr : array<f32>;
@group(0) @binding(1) var<storage, read> x_ptr : array<f32>;
@group(0) @binding(2) var<storage, read> w_ptr : array<vec4<f32>>;
struct PODArgs { packGridDimX: u32 }
@group(0) @binding(3) var<uniform> podArgs : PODArgs;
var<workgroup> tile : array<vec4<f32>, 32>;
var<workgroup> sums : array<f32, 64>;
@compute @workgroup_size(8, 4, 2)
fn f_kernel(@builtin(workgroup_id) blockIdx : vec3<u32>) {
  tile[i32(threadIdx.x)] = w_ptr[(i32(threadIdx.x) * 2i)];
  workgroupBarrier();
  for (var k : i32 = 0i; k < 4i; k++) {
    sums[k] = fma(x_ptr[k], tile[k].x, sums[k]);
  }
  out_ptr[i32(blockIdx.x)] = exp(sums[0i]);
}
// Function: g_kernel
@group(0) @binding(0) var<storage, read> a_ptr : array<i32>;
@compute @workgroup_size(64, 1, 1)
fn g_kernel() { }
"""


def test_wgsl() -> None:
    f, g = shaders.wgsl_kernels(WGSL)
    assert (f.name, f.threads, f.shared_bytes) == ("f_kernel", 64, 32 * 16 + 64 * 4)
    assert f.widest_load_bytes == 16 and f.vector_bits == 32
    assert f.mix == {
        "bindings": 3,
        "global_load": 2,
        "global_store": 1,
        "shared_load": 3,
        "shared_store": 2,
        "fma": 1,
        "barrier": 1,
        "transcendental": 1,
        "loop": 1,
    }
    assert (g.name, g.threads, g.shared_bytes, g.widest_load_bytes) == ("g_kernel", 64, 0, 0)


MSL = """\
// Function: f_kernel
#include <metal_stdlib>
using namespace metal;
kernel void f_kernel(  device float* out_ptr [[ buffer(0) ]],
  device half* w_ptr [[ buffer(1) ]],
  uint2 blockIdx [[threadgroup_position_in_grid]]
) {
  threadgroup half4 tile[32];
  threadgroup float red_buf0[64];
  thread float sum[1];
  tile[((int)threadIdx.x)] = *(device half4*)(w_ptr + ((((int)blockIdx.x) * 4) + 4));
  threadgroup_barrier(mem_flags::mem_threadgroup);
  ((volatile threadgroup float*)red_buf0)[((int)threadIdx.x)] = simd_shuffle_down(sum[0], 16);
  out_ptr[((int)blockIdx.x)] = (exp(((volatile threadgroup float*)red_buf0)[0]) + ((float)w_ptr[0]));
}
"""


def test_msl() -> None:
    (f,) = shaders.msl_kernels(MSL)
    assert (f.name, f.threads, f.shared_bytes) == ("f_kernel", None, 32 * 8 + 64 * 4)
    assert f.widest_load_bytes == 8 and f.vector_bits == 64
    assert f.mix == {
        "bindings": 2,
        "global_load": 2,
        "global_store": 1,
        "shared_load": 1,
        "shared_store": 2,
        "shuffle": 1,
        "barrier": 1,
        "transcendental": 1,
    }


# AMD and occupancy ----------------------------------------------------------------------------------------------------


def test_amd_mix() -> None:
    body = "\n".join(
        f"\t{line}"
        for line in (
            "global_load_dwordx4 v[0:3], v4, s[0:1]",
            "global_load_b128 v[0:3], v4, s[0:1]",
            "global_load_ushort v0, v1, s[0:1]",
            "global_load_short_d16_hi v0, v1, s[0:1]",
            "global_store_dword v0, v1, s[0:1]",
            "ds_read2_b32 v[0:1], v2 offset1:1",
            "ds_bpermute_b32 v0, v1, v2",
            "v_fmac_f32_e32 v0, v1, v2",
            "v_pk_fma_f32 v[0:1], v[2:3], v[4:5], v[0:1]",
            "v_cvt_f32_f16_sdwa v0, v1",
            "s_load_dwordx4 s[0:3], s[4:5], 0x0",
            "s_barrier",
        )
    )
    kernel = AmdKernel("k", 64, 256, 8, 0, 0, 0, 0, {}, body=body)
    assert kernel.widest_load == 16
    assert kernel.mix == {
        "ds_load.64": 1,
        "global_load.128": 2,
        "global_load.16": 2,
        "global_store.32": 1,
        "barrier": 1,
        "convert": 1,
        "fma": 2,
        "shuffle": 1,
        "total": 12,
    }


@pytest.mark.parametrize(
    ("arch", "threads", "registers", "shared", "share", "bound"),
    [  # NVIDIA's occupancy calculator
        ("sm_80", 256, 32, 0, 1.0, "threads"),
        ("sm_80", 256, 64, 0, 0.5, "registers"),
        ("sm_80", 256, 128, 0, 0.25, "registers"),
        ("sm_80", 1024, 64, 0, 0.5, "registers"),
        ("sm_80", 1024, 65, 0, 0.0, "registers"),
        ("sm_80", 128, 32, 48 * 1024, 3 * 128 / 2048, "shared memory"),
        ("sm_80", 32, 16, 0, 0.5, "blocks"),
        ("sm_89", 256, 40, 0, 1.0, "threads"),
        ("sm_89", 1024, 32, 0, 1024 / 1536, "threads"),
        ("sm_75", 64, 32, 0, 1.0, "threads"),
        ("sm_90", 512, 128, 74752, 0.25, "registers"),
        ("sm_90a", 256, 126, 3 * 36864, 0.25, "registers"),  # wgmma-matmul: 160 columns, three stages
    ],
)
def test_occupancy_of_nvidia(arch: str, threads: int, registers: int, shared: int, share: float, bound: str) -> None:
    found = occupancy.cuda_occupancy(arch, threads, registers, shared)
    assert found == (pytest.approx(share), bound)


@pytest.mark.parametrize(
    ("arch", "wave", "threads", "registers", "shared", "share"),
    [
        ("gfx90a", 64, 256, 64, 0, 1.0),
        ("gfx90a", 64, 256, 65, 0, 7 / 8),
        ("gfx90a", 64, 256, 128, 0, 0.5),
        ("gfx90a", 64, 256, 16, 32 * 1024, 2 / 8),
        ("gfx1100", 32, 256, 96, 0, 1.0),
        ("gfx1100", 32, 256, 192, 0, 0.5),
    ],
)
def test_occupancy_of_amd(arch: str, wave: int, threads: int, registers: int, shared: int, share: float) -> None:
    found = occupancy.amd_occupancy(arch, wave, threads, registers, shared)
    assert found is not None and found[0] == pytest.approx(share)


def test_occupancy_of_an_architecture_that_nobody_wrote_down() -> None:
    assert occupancy.cuda_occupancy("sm_999", 256, 32, 0) is None
    assert occupancy.amd_occupancy("gfx0", 64, 256, 32, 0) is None
