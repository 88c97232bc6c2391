"""How long a point should take, from bandwidth and occupancy.

The model: a GEMV is bound by reading its weight, at the device's bandwidth as far as enough bytes are in flight
(Little's law: bandwidth x latency), by issuing instructions, and by its last, partial wave of blocks:

    resident  = blocks that a multiprocessor holds at once (threads, registers, shared memory)
    in flight = resident threads x TILE_S x TILE_R x bytes a weight x steps under way together
    memory    = weight bytes / (bandwidth x min(1, in flight / needed)) x whole waves / waves
    issue     = instructions of all warps / (multiprocessors x warps issued a cycle x clock)
    time      = max(memory, issue) + launches x launch + steps of the reduction across threads

It knows nothing of caches, banks or the compiler, and only has to rank; `tuning.guided` corrects it by what is
measured.

`work` counts what a point makes any device do; what each of these costs there is left to a fit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from gpt2_tvm.schedules.gemv_config import GemvConfig
from targets import DeviceTarget
from targets.device import Cores
from tuning.space import Context
from tuning.workloads import Workload


@dataclass(frozen=True)
class Machine:
    """What the model knows of a device.

    multiprocessors: SMs, compute units, GPU cores · threads, registers, shared_bytes: of one · clock_ghz · lanes: of a
    warp · issue: warps issued a cycle and multiprocessor · latency_ns of a read from memory · launch_us of a kernel ·
    gb_s: of its memory.
    """

    multiprocessors: int
    threads: int
    registers: int
    shared_bytes: int
    clock_ghz: float
    lanes: int
    issue: int
    latency_ns: float
    launch_us: float
    gb_s: float


STEPS_AHEAD = 4  # steps of an unrolled loop whose loads are under way together
_TYPICAL = Cores(64, 1024, 65536, 65536, 1.5)  # of a GPU whose target names none


def machine_of(target: DeviceTarget) -> Machine:
    """The device's figures, or a typical GPU's where its name says nothing."""
    cores = target.cores or _TYPICAL
    lanes = int(target.tvm.get("thread_warp_size", 32))
    gb_s = target.peak.bandwidth_gb_s if target.peak and target.peak.bandwidth_gb_s else 500.0
    return Machine(
        cores.count,
        cores.threads,
        cores.registers,
        cores.shared_memory_bytes,
        cores.clock_ghz,
        lanes,
        4 if lanes == 32 else 1,
        600.0,
        2.0,
        gb_s,
    )


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of a point, where that is known: it replaces the model's guesses."""

    registers: int | None = None
    spill_bytes: int | None = None
    shared_bytes: int | None = None


def predict_us(config: GemvConfig, workload: Workload, target: DeviceTarget, compiled: Compiled | None = None) -> float:
    """Microseconds of one call, by the model above."""
    m, at, made = machine_of(target), Context(workload, target), compiled or Compiled()
    registers = made.registers or at.registers(config)
    shared = made.shared_bytes if made.shared_bytes is not None else at.shared_bytes(config)
    warps = -(-config.threads // m.lanes)
    limits = [m.threads // (warps * m.lanes), m.registers // (registers * warps * m.lanes), 32]
    if shared:
        limits.append(m.shared_bytes // shared)
    resident = max(1, min(limits))
    blocks = -(-workload.outputs // (config.ts * config.tile_s)) * config.split_k
    waves = blocks / (resident * m.multiprocessors)
    # a last wave that is not full: with few waves it is most of the time
    tail = math.ceil(waves) / waves if waves > 1 else 1.0
    active = min(blocks / m.multiprocessors, resident) * config.threads * m.multiprocessors
    steps_of_k = workload.reduced // (config.tr * config.tile_r * config.split_k)
    ahead = min(STEPS_AHEAD, max(1, steps_of_k)) if config.unroll else 1
    flight = active * config.tile_s * config.tile_r * at.item * ahead
    needed = m.gb_s * m.latency_ns
    # one load narrower than a sector, or lanes that skip over each other's bytes, fetch more than they use
    row_bytes = config.tr * config.tile_r * at.item
    sectors = max(1.0, 32 / row_bytes)
    # lanes a stride apart: each load touches more sectors than it uses, and relies on the cache for the rest
    used = min(1.0, config.vec_load / min(32, config.tile_r * at.item))
    sectors /= 0.8 + 0.2 * used
    memory_us = workload.weight_bytes * sectors / (m.gb_s * min(1.0, flight / needed)) / 1e3 * min(tail, 1.5)
    elements = workload.outputs * workload.reduced
    loads = elements * at.item / config.vec_load
    # x: once a tile of rows from the first-level cache, else from shared memory
    vectors = elements / config.tile_s * workload.rows / max(1, min(4, config.tile_r))
    convert = 1.0 if workload.dtype != "float32" else 0.0
    instructions = loads + vectors + elements * (workload.rows + convert)
    issue_us = instructions / m.lanes / (m.multiprocessors * m.issue * m.clock_ghz * 1e3)
    steps = math.log2(config.tr) if config.tr > 1 else 0.0
    across = 0.02 if config.reduction == "shuffle" and target.kind in ("cuda", "metal") else 0.08
    reduce_us = math.ceil(max(waves, 1)) * config.tile_s * workload.rows * steps * across
    memory_us *= 1 + (made.spill_bytes or 0) / 256  # spilled registers travel with the weights
    return max(memory_us, issue_us) + reduce_us + m.launch_us * (1 if config.split_k == 1 else 2)


WORK = ("multiply-adds", "steps", "threads", "weight loads", "x loads", "sums across threads", "barriers", "blocks")


def work(config: GemvConfig, workload: Workload, target: DeviceTarget) -> list[float]:
    """How much of each of WORK one call does, in all threads together; what a block does past the last output, or past
    the end of a row, is work too."""
    at = Context(workload, target)
    blocks = -(-workload.outputs // (config.ts * config.tile_s)) * config.split_k
    threads = blocks * config.threads
    steps = threads * max(1, -(-workload.reduced // (config.tr * config.tile_r * config.split_k)))
    weights = steps * config.tile_s * config.tile_r
    across = math.log2(config.tr) if config.tr > 1 else 0.0
    return [
        weights * workload.rows,
        steps,
        threads,
        weights * at.item / config.vec_load,
        steps * config.tile_r * workload.rows / config.vec_c,
        threads * across * config.tile_s * workload.rows,
        threads * across,
        blocks,
    ]
