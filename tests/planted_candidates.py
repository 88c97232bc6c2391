"""Backends for sweeps that measure nothing: times from a formula, and faults at chosen points."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gpt2_tvm.schedules.gemv_config import GemvConfig
from tuning.children import Failure
from tuning.sweeping import LOST


class Planted:
    """ts decides: 16 raises in the build, 32 hangs, 64 aborts, 128 computes wrong numbers, 256 makes no schedule."""

    def __init__(self, announce: Callable[..., None], log: str, pause_s: float = 0.0) -> None:
        self.announce, self.log, self.pause_s = announce, log, pause_s
        self.facts = {"device": "planted", "software": True, "method": "planted", "launch_floor_us": 1.0}

    def build(self, name: str, config: GemvConfig) -> dict[str, Any]:
        with Path(self.log).open("a") as file:
            file.write(f"{name} {config.ts} {config.tr} {config.tile_s} {config.tile_r}\n")
        self.announce("build")
        if config.ts == 16:
            raise ValueError("planted: the compiler says no")
        if config.ts == 32:
            time.sleep(600)
        if config.ts == 64:
            os.abort()
        if config.ts == 256:
            raise Failure("invalid", "planted: no schedule")
        return {"build_s": 0.0}

    def run(self, name: str, config: GemvConfig, best_us: float | None = None) -> dict[str, Any]:
        time.sleep(self.pause_s)
        if config.ts == 128:
            raise Failure("wrong-result", "planted: 3 of 7 outputs are off")
        return {"time_us": time_of(config), "time_us_sd": 0.5, "samples": 9, "error": 0.0}


class Vanishing(Planted):
    """A worker whose machine goes away at its second point."""

    count = 0

    def run(self, name: str, config: GemvConfig, best_us: float | None = None) -> dict[str, Any]:
        self.count += 1
        if self.count > 1:
            raise Failure("run-error", f"{LOST}: the plug was pulled")
        return super().run(name, config, best_us)


def time_of(config: GemvConfig) -> float:
    """Microseconds: best at TS=4, TR=8, TILE_S=2, TILE_R=8."""
    far = [config.ts / 4, config.tr / 8, config.tile_s / 2, config.tile_r / 8]
    return 100.0 * (1 + sum(abs(f - 1) if f > 1 else abs(1 / f - 1) for f in far))
