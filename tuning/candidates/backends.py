"""Which backend measures a target's points on the machine that has the device."""

from __future__ import annotations

from typing import Any

from gpt2_tvm.errors import UserError


def backend_of(target: str, browser: bool = False) -> Any:
    """The class for `tuning.children.Child`. UserError for a kind of target that nothing here can run.

    browser: measure webgpu in a page instead of through wgpu.
    """
    from targets import load_target

    kind = load_target(target).kind
    if browser:
        if kind != "webgpu":
            raise UserError(f"a browser measures WebGPU kernels, not {kind}; give --target webgpu")
        from tuning.candidates.browser import BrowserCandidates

        return BrowserCandidates
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
