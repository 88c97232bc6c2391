"""Which backend measures a target's points on the machine that has the device."""

from __future__ import annotations

from typing import Any

from gpt2_tvm.errors import UserError


def backend_of(target: str) -> Any:
    """The class for `tuning.children.Child`. UserError for a kind of target that nothing here can run."""
    from targets import load_target

    kind = load_target(target).kind
    if kind == "webgpu":
        from tuning.candidates.webgpu import WebgpuCandidates

        return WebgpuCandidates
    if kind == "cuda":
        from tuning.candidates.compiled import CompiledCandidates

        return CompiledCandidates
    raise UserError(
        f"{kind} kernels cannot be timed in this process; use --tracker with a TVM RPC server on a machine that has "
        "the device, or --static"
    )
