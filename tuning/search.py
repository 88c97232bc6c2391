"""In which order a sweep tries the points of a space, and when it has seen enough.

A strategy is asked for the next point with all results so far, so that it can learn from them. Resuming a sweep asks it
again with the results of before.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from gpt2_tvm.errors import UserError
from gpt2_tvm.schedules.gemv_config import GemvConfig
from targets import DeviceTarget
from tuning.workloads import Workload

Results = Mapping[GemvConfig, float | None]  # microseconds; None: tried, and failed


class Strategy(Protocol):
    """One search over the points of one workload."""

    trials: int  # how many points it will try at most

    def ask(self, results: Results, running: set[GemvConfig]) -> GemvConfig | None:
        """The next point, neither in `results` nor `running`; None where it is done (or must wait for `running`)."""
        ...


class Grid:
    """Every point, in an order without a pattern: a sweep that is stopped has seen a little of all the space."""

    def __init__(
        self, configs: Sequence[GemvConfig], workload: Workload, target: DeviceTarget, trials: int | None, seed: int
    ) -> None:
        self.order = list(configs)
        random.Random(seed).shuffle(self.order)
        self.trials = len(self.order) if trials is None else min(trials, len(self.order))

    def ask(self, results: Results, running: set[GemvConfig]) -> GemvConfig | None:
        todo = self.order[: self.trials]
        return next((config for config in todo if config not in results and config not in running), None)


class Random(Grid):
    """A sample of the points: `--trials` of them, else a tenth."""

    def __init__(
        self, configs: Sequence[GemvConfig], workload: Workload, target: DeviceTarget, trials: int | None, seed: int
    ) -> None:
        super().__init__(configs, workload, target, trials or max(1, len(configs) // 10), seed)


Maker = Callable[[Sequence[GemvConfig], Workload, DeviceTarget, int | None, int], Strategy]


def _model(
    configs: Sequence[GemvConfig], workload: Workload, target: DeviceTarget, trials: int | None, seed: int
) -> Strategy:
    from tuning.guided import ModelGuided

    return ModelGuided(configs, workload, target, trials, seed)


STRATEGIES: dict[str, Maker] = {"grid": Grid, "random": Random, "model": _model}


def get_strategy(name: str) -> Maker:
    """The strategy of that name; UserError lists the known ones."""
    if name not in STRATEGIES:
        raise UserError(f"unknown strategy {name!r}; choose {', '.join(STRATEGIES)}")
    return STRATEGIES[name]
