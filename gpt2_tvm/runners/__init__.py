"""Ways to run an artifact, behind one interface (`runners.base.Runner`)."""

from __future__ import annotations

from gpt2_tvm.artifact import Artifact
from gpt2_tvm.errors import UserError
from gpt2_tvm.runners.base import Runner


def make_runner(artifact: Artifact, device: str | None = None, threads: int | None = None) -> Runner:
    """The runner for an artifact's kind: TVM's virtual machine, for WGSL the executor on wgpu, or for a
    device written rpc://... the same on another machine (`runners.rpc`); for node, chromium or browser:PORT the web
    runtime (`runners.web`).

    threads: of a CPU (`runners.threads`); UserError for another kind.
    """
    if threads is not None and artifact.kind != "cpu":
        raise UserError(f"--threads {threads}: {artifact.path} runs on {artifact.kind}, not on the CPU; leave it out")
    if device is not None and device.startswith("rpc://"):
        from gpt2_tvm.runners.rpc import RpcRunner

        return RpcRunner(artifact, device, threads)
    if device is not None and device.partition(":")[0] in ("node", "chromium", "browser"):
        from gpt2_tvm.runners.web import WebRunner

        return WebRunner(artifact, device)
    if artifact.kind == "webgpu":
        from gpt2_tvm.runners.wgpu import WgpuRunner

        return WgpuRunner(artifact, device)
    from gpt2_tvm.runners.vm import VmRunner

    return VmRunner(artifact, device, threads)
