"""What a worker process can time, behind one interface; here our own engine."""

from __future__ import annotations

import time
from contextlib import suppress
from typing import Any, Protocol

import numpy as np

from gpt2_tvm.artifact import Artifact
from gpt2_tvm.measure.cases import Case, Sample


class Subject(Protocol):
    """Something that prefills and decodes. It is made in the process that will time it.

    `facts` is sent to the parent once it is ready: "device" (a name) and "versions" (package to version).
    """

    facts: dict[str, Any]

    def turn(self, case: Case) -> Sample:
        """From an empty cache: prefill the prompt, then append the most likely token `generate_tokens` times."""
        ...


def prompt_of(artifact: Artifact, case: Case) -> np.ndarray:
    """The benchmark's prompt for this model, the same in every sequence -> int32 [batch, prompt_tokens]. Where the
    tokenizers package is missing (a kit has TVM's runtime and numpy alone) it is that of a model without tokenizer."""
    from gpt2_tvm.data import prompt_for

    tokenizer = None
    if artifact.tokenizer:
        with suppress(ModuleNotFoundError):
            from gpt2_tvm.tokenizer import load_tokenizer

            tokenizer = load_tokenizer(artifact.tokenizer)
    ids = prompt_for(tokenizer, artifact.config.vocab_size, case.prompt_tokens)
    return np.tile(np.asarray(ids, np.int32), (case.batch, 1))


class EngineSubject:
    """An artifact in our engine (`Subject`).

    Args:
        path: the artifact's folder; every file is checked against the manifest first.
        device, threads: as for `Engine`.

    Its facts also say "threads" (None but on a CPU) and "load_seconds": opening the artifact, every file's sha256
    included, TVM being imported; on a CPU the second time, when the files are in memory.
    """

    def __init__(self, path: str, device: str | None = None, threads: int | None = None) -> None:
        import tvm  # noqa: F401 - not a part of loading an artifact

        from gpt2_tvm.build import versions
        from gpt2_tvm.engine import Engine

        def load() -> tuple[Engine, float]:
            start = time.perf_counter()
            return Engine(path, device, threads=threads), time.perf_counter() - start

        self.engine, load_seconds = load()
        if self.engine.artifact.kind == "cpu":  # elsewhere a second one might not fit the device's memory
            self.engine, load_seconds = load()
        self._prompts: dict[Case, np.ndarray] = {}
        self.facts = {
            "device": self.engine.runner.device_name,
            "threads": self.engine.threads,
            "runner": "wgpu" if self.engine.artifact.kind == "webgpu" else None,
            "load_seconds": load_seconds,
            "versions": versions(),
        }

    def prompt(self, case: Case) -> np.ndarray:
        """`prompt_of`, kept."""
        if case not in self._prompts:
            self._prompts[case] = prompt_of(self.engine.artifact, case)
        return self._prompts[case]

    def turn(self, case: Case) -> Sample:
        engine, ids = self.engine, self.prompt(case)
        # One token untimed: threads that slept while the others had their turn wake up here.
        engine.reset()
        engine.prefill(ids[:, :1])
        engine.reset()
        engine.runner.sync()
        start = time.perf_counter()
        engine.prefill(ids)  # returns when the logits are here
        middle = time.perf_counter()
        tokens = engine.decode_greedy(case.generate_tokens)  # one read-back, at the end
        end = time.perf_counter()
        return Sample(middle - start, end - middle, tuple(tuple(row) for row in tokens.tolist()))
