"""A search of a tenth of a grid: a model says where to begin, and what is measured corrects it.

Time is taken to be a sum: so many microseconds of the device model's (`predict_us`), and so many for each kind of work
that a point makes the device do (`work`), with weights fitted to what was measured, none below zero. So a device that
the model knows nothing of, a software one say, has its own price for a thread, a barrier or a load. What the sum leaves
open of log time is a Gaussian process over the logarithms of the parameters, half of it a sum of one process for each
parameter (Duvenaud, Nickisch, Rasmussen 2011, Additive Gaussian Processes, NIPS): what TR = 8 does to one tile it
mostly does to the others. Neighbours are alike, but nothing is smooth: a power of two fits a device's vectors or does
not. The next point has the largest expected improvement (Jones, Schonlau, Welch 1998, J. Global Optimization 13).

Before anything is known the points are chosen so that every value of every parameter is seen, where little work or time
is expected.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from gpt2_tvm.schedules.gemv_config import GemvConfig
from targets import DeviceTarget
from tuning.predict import predict_us, work
from tuning.search import Results
from tuning.workloads import Workload

MOST_FIRST = 64  # points that are chosen before anything is measured


class ModelGuided:
    """A tenth of the points: first some that are chosen before anything is known, then where most is expected."""

    FIRST = 0.4  # share of the trials that are chosen before anything is measured
    NEW = 2.0  # what a value that was not seen yet is worth, in ranks from best (0) to worst (1)
    ADDITIVE = 0.5  # share of the process that is a sum over parameters
    LENGTHS = (1.0, 2.0, 4.0)  # of the other half, in powers of two; the likeliest is taken
    NOISE = 1e-3  # variance of a measured logarithm: 3 %
    RIDGE = 0.1  # how strongly the fitted sum keeps to small weights
    FAILED = math.log(4.0)  # a failed point counts as so much slower than the slowest

    def __init__(
        self, configs: Sequence[GemvConfig], workload: Workload, target: DeviceTarget, trials: int | None, seed: int
    ) -> None:
        self.configs = list(configs)
        self.trials = min(len(self.configs), trials if trials is not None else max(8, round(len(self.configs) / 10)))
        self.predicted = np.log([predict_us(c, workload, target) for c in self.configs])
        logs = np.array([_logarithms(c) for c in self.configs])
        self.logs = logs[:, logs.std(0) > 0]
        self.index = {c: i for i, c in enumerate(self.configs)}
        counts = np.array([work(c, workload, target) for c in self.configs])
        parts = np.column_stack([counts, np.exp(self.predicted), np.ones(len(self.configs))])
        means = parts.mean(0)
        self.parts = parts / np.where(means > 0, means, 1)
        # a target that says what its cores are is what the model is of; of the others it knows too little
        promise = self.predicted if target.cores is not None else self.parts[:, : counts.shape[1]].sum(1)
        self.first = self._first(np.argsort(np.argsort(promise)) / len(self.configs))

    def _first(self, rank: np.ndarray) -> list[int]:
        """Greedily: what is new in a point, value by value, against its rank."""
        values = [list(c.to_json().values()) for c in self.configs]
        kinds = [np.unique([str(v) for v in column], return_inverse=True)[1] for column in zip(*values, strict=True)]
        kinds = [kind for kind in kinds if kind.max() > 0]
        seen = [np.zeros(kind.max() + 1) for kind in kinds]
        chosen: list[int] = []
        for _ in range(min(MOST_FIRST, max(1, round(self.trials * self.FIRST)))):
            new = sum(
                (1 / (1 + count[kind]) ** 2 for kind, count in zip(kinds, seen, strict=True)), np.zeros(len(rank))
            )
            score = self.NEW * new - rank
            score[chosen] = -np.inf
            chosen.append(int(np.argmax(score)))
            for kind, count in zip(kinds, seen, strict=True):
                count[kind[chosen[-1]]] += 1
        return chosen

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
        """Log of the sum that fits the measured times best, their relative errors squared."""
        centre = measured.mean()
        relative = self.parts[rows] / np.exp(measured - centre)[:, None]
        ridge = self.RIDGE * np.eye(self.parts.shape[1])
        weights = nonnegative(np.vstack([relative, ridge]), np.concatenate([np.ones(len(rows)), np.zeros(len(ridge))]))
        return np.log(np.maximum(self.parts @ weights, 1e-6)) + centre

    def _process(self, rows: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation at every point, given `values` at `rows` (Rasmussen, Williams 2006, ch. 2)."""
        centre, variance = values.mean(), max(float(values.var()), 1e-6)
        likeliest: tuple[float, np.ndarray, np.ndarray] | None = None
        each, apart = np.zeros((len(self.logs), len(rows))), np.zeros((len(self.logs), len(rows)))
        for column in self.logs.T:  # one at a time: `full` has tens of thousands of points
            along = np.abs(column[:, None] - column[None, rows])
            apart += along
            each += np.exp(-along) / self.logs.shape[1]
        for length in self.LENGTHS:
            together = np.exp(-apart / length)
            across = variance * (self.ADDITIVE * each + (1 - self.ADDITIVE) * together)
            factor = np.linalg.cholesky(across[rows] + (self.NOISE + 1e-3 * variance) * np.eye(len(rows)))
            weights = np.linalg.solve(factor.T, np.linalg.solve(factor, values - centre))
            likelihood = -0.5 * float((values - centre) @ weights) - float(np.log(np.diag(factor)).sum())
            if likeliest is None or likelihood > likeliest[0]:
                inner = np.linalg.solve(factor, across.T)
                left = np.maximum(variance - (inner**2).sum(0), 1e-9)
                likeliest = likelihood, centre + across @ weights, np.sqrt(left)
        assert likeliest is not None
        return likeliest[1], likeliest[2]


def _logarithms(c: GemvConfig) -> list[float]:
    """What the process runs over, in powers of two; a flag's two values are as far apart as 1 and 2."""
    sizes = [math.log2(v) for v in (c.ts, c.tr, c.tile_s, c.tile_r, c.vec_load, c.vec_c, c.split_k, c.threads)]
    flags = [c.s_axis == "x", c.shared_vector, c.reduction == "shared", c.unroll > 0]
    return [*sizes, *(float(f) for f in flags)]


def nonnegative(a: np.ndarray, b: np.ndarray, rounds: int = 300) -> np.ndarray:
    """x >= 0 with the smallest |a x - b|², by coordinate descent (Franc, Hlaváč, Navara 2005, CAIP); for columns that
    are not zero."""
    gram, towards = a.T @ a, a.T @ b
    x = np.zeros(len(towards))
    for _ in range(rounds):
        for i in range(len(x)):
            x[i] = max(0.0, x[i] + (towards[i] - gram[i] @ x) / gram[i, i])
    return x
