"""Our engine: an artifact compiled for this CPU from the checkpoint, one for each scheme."""

from __future__ import annotations

from pathlib import Path

from gpt2_tvm.measure.cases import Case, Sample

from .setup import CaseSubject, Setup


def compile_artifact(setup: Setup, folder: Path, scheme: str) -> str:
    """Compile for cpu with every batch size of the run -> the artifact's folder. UserError where compile refuses."""
    from gpt2_tvm.build import compile_model

    made = compile_model(
        str(setup.checkpoint),
        "cpu",
        scheme,
        folder / f"ours-{scheme}",
        batch_sizes=setup.batches,
        max_seq_len=setup.capacity,
        verify_widths=(),
    )
    return str(made)


class OursSubject(CaseSubject):
    """`measure.subjects.EngineSubject` with the run's number of threads."""

    def __init__(self, setup: Setup, path: str) -> None:
        from gpt2_tvm.measure.subjects import EngineSubject

        super().__init__(setup)
        self._subject = EngineSubject(path, threads=setup.threads)
        self.facts |= self._subject.facts
        self.facts["settings"] = f"cache for {setup.capacity} tokens"

    def run(self, case: Case) -> Sample:
        return self._subject.turn(case)
