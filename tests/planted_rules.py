"""Schedule rules with a fault each, for the tests of the ablation: `--rule planted_rules:Raises`."""

from __future__ import annotations

import os
import time
from typing import Any


class Raises:
    """A plain mistake."""

    def apply(self, func: Any, target: Any, tunable: bool) -> Any:
        raise ValueError("planted: this rule cannot count")


class Hangs:
    """A loop that does not end."""

    def apply(self, func: Any, target: Any, tunable: bool) -> Any:
        while True:
            time.sleep(60)


class Aborts:
    """An assertion in a library of C++."""

    def apply(self, func: Any, target: Any, tunable: bool) -> Any:
        os.abort()


class WrongNumbers:
    """Takes every layer norm, and gives it its weight for its bias."""

    def apply(self, func: Any, target: Any, tunable: bool) -> Any:
        import tvm
        from tvm import s_tir, tirx

        if len(func.params) != 4 or "_ln_" not in str(func.params[1].name):
            return None
        x, weight, bias, out = func.params
        changed = tirx.PrimFunc([x, bias, weight, out], func.body, func.ret_type, func.attrs)
        return s_tir.Schedule(tvm.IRModule({"main": changed}))


class Unbound:
    """Takes everything and leaves its loops to no thread."""

    def apply(self, func: Any, target: Any, tunable: bool) -> Any:
        import tvm
        from tvm import s_tir

        return s_tir.Schedule(tvm.IRModule({"main": func}))


class TakesNothing:
    """Wants the target, and declines whatever it is asked for: what comes out is `full`."""

    def __init__(self, target: Any) -> None:
        assert target.kind in ("cpu", "cuda", "metal", "webgpu", "rocm")

    def apply(self, func: Any, target: Any, tunable: bool) -> Any:
        return None
