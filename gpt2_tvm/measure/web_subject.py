"""An artifact in a page or in node, as something to be timed: by the page's own clock, no message in between."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from gpt2_tvm.measure.cases import Case, Sample
from gpt2_tvm.measure.subjects import prompt_of

WGPU = "wgpu"  # the executor in this process (`runners.wgpu`); the others are `runners.web.KINDS`


class WebSubject:
    """See `measure.subjects.Subject`.

    path: the artifact's folder. device: as `runners.web` has it. Its facts also say "runner", and "load_seconds":
    fetching, checking and copying the weights, shaders compiled meanwhile.
    """

    def __init__(self, path: str, device: str) -> None:
        from gpt2_tvm.artifact import open_artifact
        from gpt2_tvm.build import versions
        from gpt2_tvm.runners.web import Agent

        self.artifact = open_artifact(path, verify=False)  # the page compares every file with the manifest
        self.agent = Agent(self.artifact, device)
        self.facts: dict[str, Any] = {
            "device": f"{self.agent.facts['adapter']} in {self.agent.where}",
            "threads": None,
            "runner": device.partition(":")[0],
            "load_seconds": self.agent.facts["load_ms"] / 1e3,
            "versions": versions(),
        }

    def ids(self, case: Case) -> list[int]:
        """The benchmark's prompt."""
        return [int(i) for i in prompt_of(self.artifact, case)[0]]

    def turn(self, case: Case) -> Sample:
        answer, _ = self.agent.ask({"do": "turn", "ids": self.ids(case), "count": case.generate_tokens})
        sample = Sample(answer["prefill_ms"] / 1e3, answer["decode_ms"] / 1e3, (tuple(answer["tokens"]),))
        return replace(sample, peak_rss_mb=self.agent.peak_rss_mb())
