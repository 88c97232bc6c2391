"""Whether a WebGPU implementation takes the shaders of a module: each pipeline is made once, in a child process with
a time limit, since a shader can also hang the compiler or kill it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gpt2_tvm.errors import UserError

if TYPE_CHECKING:
    from tuning.children import Announce

TIMEOUT_S = 120.0


def refused(source: str, timeout_s: float = TIMEOUT_S) -> dict[str, str]:
    """Kernel -> why its pipeline cannot be made here; empty if all can.

    Args:
        source: WGSL as TVM writes it. timeout_s: for the whole of it, before a kernel that is being compiled counts as
            one that does not finish.

    Raises UserError where there is no WebGPU device to ask.
    """
    from tuning.children import run_once

    faults: dict[str, str] = {}
    while True:
        outcome = run_once("WebGPU's compiler", _compile, source, tuple(faults), timeout_s=timeout_s)
        if outcome.status == "ok":
            return {**faults, **outcome.value}
        name = outcome.stage.partition(": ")[2]
        if not outcome.stage.startswith("shader") or name in faults:
            raise UserError(f"cannot try the shaders: {outcome.detail}")
        faults = {**outcome.notes.get("refused", {}), **faults, name: outcome.detail}


def _compile(announce: Announce, source: str, skip: tuple[str, ...]) -> dict[str, str]:
    """In the child: make every pipeline but those in `skip`; returns what was refused."""
    from gpt2_tvm.runners.wgpu_device import Device
    from gpt2_tvm.runners.wgsl import parse_wgsl

    announce("opening the device")
    device: Any = Device()
    faults: dict[str, str] = {}
    for name, shader in parse_wgsl(source).items():
        if name in skip:
            continue
        announce(f"shader: {name}", {"refused": dict(faults)})
        try:
            device.compile(shader)
        except (UserError, RuntimeError) as error:
            faults[name] = " ".join(str(error).split())[:300]
    return faults
