"""Ways to run an artifact, behind one interface (`runners.base.Runner`)."""

from __future__ import annotations

from gpt2_tvm.artifact import Artifact
from gpt2_tvm.runners.base import Runner


def make_runner(artifact: Artifact, device: str | None = None) -> Runner:
    """The runner for an artifact's kind: TVM's virtual machine, or for WGSL the executor on wgpu."""
    if artifact.kind == "webgpu":
        from gpt2_tvm.runners.wgpu import WgpuRunner

        return WgpuRunner(artifact, device)
    from gpt2_tvm.runners.vm import VmRunner

    return VmRunner(artifact, device)
