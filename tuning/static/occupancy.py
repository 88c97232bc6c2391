"""How much of a multiprocessor's threads a kernel can keep there at once, from what a block of it takes.

An upper bound from the architecture's limits, as NVIDIA's occupancy calculator gives it; what a kernel reaches depends
on how many blocks there are.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Multiprocessor:
    """Limits of one SM (NVIDIA) or one SIMD and its compute unit (AMD).

    threads, blocks: resident at most. registers: 32-bit ones, of all threads. register_unit: registers of a warp are
    handed out in multiples of this. shared_bytes: of all blocks; shared_unit: of a block, rounded up to this;
    shared_reserved: bytes of each block that the system takes.
    """

    threads: int
    blocks: int
    registers: int
    register_unit: int
    shared_bytes: int
    shared_unit: int
    shared_reserved: int


_K = 1024
# CUDA C++ Programming Guide 13.0, "Compute Capabilities", table of technical specifications; 1 KiB a block is reserved
# from capability 8.0 on (tuning guides of Ampere, Ada and Hopper, "Shared Memory").
NVIDIA = {
    "sm_70": Multiprocessor(2048, 32, 64 * _K, 256, 96 * _K, 256, 0),
    "sm_75": Multiprocessor(1024, 16, 64 * _K, 256, 64 * _K, 256, 0),
    "sm_80": Multiprocessor(2048, 32, 64 * _K, 256, 164 * _K, 128, _K),
    "sm_86": Multiprocessor(1536, 16, 64 * _K, 256, 100 * _K, 128, _K),
    "sm_89": Multiprocessor(1536, 24, 64 * _K, 256, 100 * _K, 128, _K),
    "sm_90": Multiprocessor(2048, 32, 64 * _K, 256, 228 * _K, 128, _K),
}
WARP = 32


@dataclass(frozen=True)
class ComputeUnit:
    """AMD: waves: of one SIMD at most. registers: vector registers of one lane of a SIMD, handed out in multiples of
    `register_unit`. simds: that share the `shared_bytes` of LDS (of a compute unit; for RDNA of a work-group processor,
    which LLVM schedules a block on).
    """

    waves: int
    registers: int
    register_unit: int
    simds: int
    shared_bytes: int


# LLVM 22, llvm/lib/Target/AMDGPU/Utils/AMDGPUBaseInfo.cpp (IsaInfo: getMaxWavesPerEU, getTotalNumVGPRs,
# getVGPRAllocGranule, getEUsPerCU) and the LDS of AMD's CDNA 2, CDNA 3 and RDNA 3 instruction set references.
AMD = {
    "gfx90a": ComputeUnit(8, 512, 8, 4, 64 * _K),
    "gfx942": ComputeUnit(8, 512, 8, 4, 64 * _K),
    "gfx1100": ComputeUnit(16, 1536, 24, 4, 128 * _K),
}


def cuda_occupancy(arch: str, threads: int, registers: int, shared_bytes: int) -> tuple[float, str] | None:
    """(share of an SM's threads, what bounds it) for blocks of `threads` threads with `registers` each and
    `shared_bytes` in all; None for an architecture that is not in `NVIDIA`.

    A share of 0 means that not even one block fits.
    """
    limits = NVIDIA.get(arch.rstrip("af"))  # the letter of "sm_90a" is for instructions
    if limits is None or threads < 1:
        return None
    warps = -(-threads // WARP)
    per_warp = _up(max(registers, 1) * WARP, limits.register_unit)
    shared = _up(shared_bytes + limits.shared_reserved, limits.shared_unit)
    blocks = {
        "threads": limits.threads // (warps * WARP),
        "blocks": limits.blocks,
        # the registers lie in four banks, one for each scheduler, and a warp takes its registers from one of them
        "registers": (limits.registers // 4 // per_warp) * 4 // warps,
        "shared memory": limits.shared_bytes // shared if shared else limits.blocks,
    }
    bound = min(blocks, key=lambda what: blocks[what])
    return blocks[bound] * warps * WARP / limits.threads, bound


def amd_occupancy(arch: str, wave: int, threads: int, registers: int, shared_bytes: int) -> tuple[float, str] | None:
    """(share of a SIMD's waves, what bounds it), as `cuda_occupancy`; None for an architecture that is not in `AMD`."""
    limits = AMD.get(arch)
    if limits is None or threads < 1:
        return None
    waves = -(-threads // wave)
    by = {
        "waves": limits.waves,
        "registers": min(limits.waves, limits.registers // _up(max(registers, 1), limits.register_unit)),
    }
    if shared_bytes:
        by["shared memory"] = limits.shared_bytes // shared_bytes * waves // limits.simds
    bound = min(by, key=lambda what: by[what])
    blocks = by[bound] * limits.simds // waves  # whole blocks only
    return min(1.0, blocks * waves / limits.simds / limits.waves), bound


def _up(value: int, unit: int) -> int:
    return -(-value // unit) * unit
