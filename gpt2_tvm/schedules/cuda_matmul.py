"""DLight's matmul rule, told what an architecture can really do. Of TVM 0.27, two things:

- It reads an architecture's digits and gives "sm_90a" or "sm_120f", whose letters only add instructions, the schedule
  of GPUs without tensor cores: FFMA in float16 prefill. Here it sees "sm_90".
- Its schedule for tensor cores takes 72 KiB of shared memory a block. Turing (sm_75) allows 64: the kernel compiles,
  and the driver refuses to launch it. Here that architecture gets the schedule without tensor cores.
"""

from __future__ import annotations

import re
from typing import Any

from tvm.s_tir.dlight.gpu import Matmul
from tvm.target import Target

SUFFIXED = re.compile(r"(sm_\d+)[a-z]")
TOO_SMALL = ("sm_75",)
NO_TENSOR_CORES = "sm_60"


class MendedMatmul(Matmul):
    """`dl.gpu.Matmul` with the architecture as `plain` gives it."""

    def apply(self, func: Any, target: Target, tunable: bool) -> Any:
        return super().apply(func, plain(target), tunable)


def plain(target: Target) -> Target:
    """The target that DLight should decide by: without the letter, or without tensor cores; itself as a rule."""
    if target.kind.name != "cuda":
        return target
    arch = str(target.attrs.get("arch", ""))
    found = SUFFIXED.fullmatch(arch)
    shown = NO_TENSOR_CORES if arch in TOO_SMALL else found.group(1) if found else arch
    return target if shown == arch else Target({**dict(target.export()), "arch": shown})
