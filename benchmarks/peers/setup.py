"""What every engine is given, and what their subjects share."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gpt2_tvm.config import GPT2Config
from gpt2_tvm.errors import UserError
from gpt2_tvm.measure.cases import Case, Sample
from gpt2_tvm.measure.workers import Worker


@dataclass(frozen=True)
class Setup:
    """checkpoint: a folder in Hugging Face layout, float32 · prompt: ids of the longest prompt · batches: sizes that
    will be asked for · capacity: tokens that a sequence grows to at most · threads: of every engine."""

    checkpoint: Path
    prompt: tuple[int, ...]
    batches: tuple[int, ...]
    capacity: int
    threads: int

    def ids(self, case: Case) -> np.ndarray:
        """The prompt, the same in every sequence -> int64 [batch, prompt_tokens]."""
        return np.tile(np.asarray(self.prompt[: case.prompt_tokens], np.int64), (case.batch, 1))

    def config(self) -> GPT2Config:
        """The checkpoint's shape."""
        return GPT2Config.from_json(self.checkpoint)


class CaseSubject:
    """A `measure.subjects.Subject` that gets ready for a case when it is first asked for it, outside the timing.

    Cases are asked for one after another, each for all of its rounds, so what `begin` makes stays warm. The peak of the
    process's memory is forgotten when a case has begun: it then is that of working on this case, not of loading.
    """

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.facts: dict[str, Any] = {"device": "", "versions": {}, "settings": ""}
        self._case: Case | None = None

    def begin(self, case: Case) -> None:
        """Allocate (and compile) what `run` needs for this case, in place of what another case needed."""

    def run(self, case: Case) -> Sample:
        """From an empty cache: prefill the prompt, then append the most likely token `generate_tokens` times."""
        raise NotImplementedError

    def turn(self, case: Case) -> Sample:
        """As `Subject.turn`."""
        if case != self._case:
            self.begin(case)
            self._case = case
            forget_peak()
        return self.run(case)


def forget_peak() -> None:
    """Have the kernel count this process's peak of resident memory from now on (Linux; elsewhere it stays)."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


class Job:
    """A function's result as a subject's facts, so that `in_child` can use a `Worker` for it."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.facts = {"result": function(*arguments)}

    def turn(self, case: Case) -> Sample:
        """Not asked for."""
        raise NotImplementedError


def in_child(label: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a module-level function in a process of its own -> its result.

    Raises UserError, one line, where it fails or its process dies.
    """
    worker = Worker(label, Job, function, *arguments)
    try:
        worker.ready()
    except BaseException:
        worker.kill()
        raise
    worker.close()
    return worker.facts["result"]


def import_mb() -> float:
    """Resident memory of a process that has imported TVM and nothing else of ours, in 10^6 bytes. For `in_child`."""
    import tvm  # noqa: F401

    from gpt2_tvm.measure.workers import peak_rss_mb

    return peak_rss_mb()


def require_plain(config: GPT2Config, engine: str) -> None:
    """Refuse what an engine with a fixed GPT-2 graph would compute wrongly without a word."""
    if config.activation_function != "gelu_new":
        raise UserError(f"{engine} computes GPT-2 with gelu_new, this model asks for {config.activation_function}")
    if not config.scale_attn_weights or config.scale_attn_by_inverse_layer_idx:
        raise UserError(f"{engine} scales attention by 1/sqrt(head size), this model does not")
