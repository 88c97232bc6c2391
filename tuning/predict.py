"""How long a point should take, from bandwidth and occupancy, and a search that corrects this by what it measures.

The model: a GEMV is bound by reading its weight, at the device's bandwidth as far as enough bytes are in flight
(Little's law: bandwidth x latency), by issuing instructions, and by its last, partial wave of blocks:

    resident  = blocks that a multiprocessor holds at once (threads, registers, shared memory)
    in flight = resident threads x TILE_S x TILE_R x bytes a weight x steps under way together
    memory    = weight bytes / (bandwidth x min(1, in flight / needed)) x whole waves / waves
    issue     = instructions of all warps / (multiprocessors x warps issued a cycle x clock)
    time      = max(memory, issue) + launches x launch + steps of the reduction across threads

It knows nothing of caches, banks or the compiler, and only has to rank. `ModelGuided` corrects it by what it measures.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gpt2_tvm.schedules.gemv_config import GemvConfig
from targets import DeviceTarget
from targets.device import Cores
from tuning.search import Results
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


class ModelGuided:
    """A tenth of the points: the model's best first, then where the corrected model expects the most.

    The correction is a Gaussian process over the logarithms of the parameters, fitted to what the model leaves open of
    log time; the next point has the largest expected improvement (Jones, Schonlau, Welch 1998, J. Global Optimization
    13).
    """

    FIRST = 0.3  # share of the trials that the model alone chooses: its best, and every so-many-th of the rest
    LENGTHS = (0.5, 1.0, 2.0, 4.0)  # of the process, in standard deviations of a parameter; the likeliest is taken
    NOISE = 1e-4  # variance of a measured logarithm: 1 %
    FAILED = math.log(4.0)  # a failed point counts as so much slower than the slowest

    def __init__(
        self, configs: Sequence[GemvConfig], workload: Workload, target: DeviceTarget, trials: int | None, seed: int
    ) -> None:
        self.configs = list(configs)
        self.trials = min(len(self.configs), trials if trials is not None else max(8, round(len(self.configs) / 10)))
        self.predicted = np.log([predict_us(c, workload, target) for c in self.configs])
        features = np.array([_features(c) for c in self.configs])
        spread = features.std(0)
        self.features = (features - features.mean(0)) / np.where(spread > 0, spread, 1)
        self.index = {c: i for i, c in enumerate(self.configs)}
        first = max(1, round(self.trials * self.FIRST))
        ranked = np.argsort(self.predicted)
        best, spread_out = ranked[: first // 2], ranked[:: max(1, len(ranked) // max(1, first - first // 2))]
        self.first = list(dict.fromkeys([*best.tolist(), *spread_out.tolist()]))[:first]

    def ask(self, results: Results, running: set[GemvConfig]) -> GemvConfig | None:
        tried = {self.index[c] for c in (*results, *running) if c in self.index}
        if len(tried) >= self.trials:
            return None
        for i in self.first:
            if i not in tried:
                return self.configs[i]
        score = self._improvement(results)
        return next((self.configs[i] for i in np.argsort(-score) if i not in tried), None)

    def _improvement(self, results: Results) -> np.ndarray:
        """Expected improvement of every point on the best known log time."""
        known = [(self.index[c], t) for c, t in results.items() if c in self.index]
        times = [math.log(t) for _, t in known if t is not None]
        if len(times) < 3:
            return -self.predicted
        rows = np.array([i for i, _ in known])
        measured = np.array([math.log(t) if t is not None else max(times) + self.FAILED for _, t in known])
        trend = self._trend(rows, measured)
        mean, sd = self._process(rows, measured - trend[rows])
        gain = min(times) - (trend + mean)
        z = gain / sd
        density = np.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)
        below = 0.5 * (1 + np.vectorize(math.erf)(z / math.sqrt(2)))
        return gain * below + sd * density

    def _trend(self, rows: np.ndarray, measured: np.ndarray) -> np.ndarray:
        """The model's prediction, as far as what was measured goes along with it: its least-squares slope, 0 to 1."""
        own = self.predicted[rows] - self.predicted[rows].mean()
        slope = float(own @ (measured - measured.mean()) / max(float(own @ own), 1e-9))
        return min(1.0, max(0.0, slope)) * self.predicted

    def _process(self, rows: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation at every point, given `values` at `rows` (Rasmussen, Williams 2006, ch. 2)."""
        centre, variance = values.mean(), max(float(values.var()), 1e-6)
        likeliest: tuple[float, np.ndarray, np.ndarray] | None = None
        distance = ((self.features[:, None, :] - self.features[None, rows, :]) ** 2).sum(-1)
        for length in self.LENGTHS:
            across = variance * np.exp(-0.5 * distance / length**2)
            factor = np.linalg.cholesky(across[rows] + (self.NOISE + 1e-3 * variance) * np.eye(len(rows)))
            weights = np.linalg.solve(factor.T, np.linalg.solve(factor, values - centre))
            likelihood = -0.5 * float((values - centre) @ weights) - float(np.log(np.diag(factor)).sum())
            if likeliest is None or likelihood > likeliest[0]:
                inner = np.linalg.solve(factor, across.T)
                left = np.maximum(variance - (inner**2).sum(0), 1e-9)
                likeliest = likelihood, centre + across @ weights, np.sqrt(left)
        assert likeliest is not None
        return likeliest[1], likeliest[2]


def _features(c: GemvConfig) -> list[float]:
    """What the process runs over: logarithms, so that halving and doubling are as far."""
    logs = [c.ts, c.tr, c.tile_s, c.tile_r, c.vec_load, c.vec_c, c.split_k, c.threads]
    flags = [c.s_axis == "x", c.shared_vector, c.reduction == "shared", c.unroll > 0]
    return [*(math.log2(v) for v in logs), *(float(f) for f in flags)]
