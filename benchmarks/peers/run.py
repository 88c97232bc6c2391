"""One run: prepare, load, time, result. Each engine in a process of its own, all taking turns within a round."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpt2_tvm.checkpoint import ModelSource
from gpt2_tvm.errors import UserError
from gpt2_tvm.measure import results
from gpt2_tvm.measure.cases import Case, Sample
from gpt2_tvm.measure.machine import MachineBounds, MachineSubject
from gpt2_tvm.measure.noise import OtherLoad
from gpt2_tvm.measure.timing import SETTLE_S, Samples, Say, run_rounds
from gpt2_tvm.measure.workers import Worker
from gpt2_tvm.runners.vm import processor_name

from . import report, verdict
from .engines import Engine, stored_bytes
from .setup import Setup, import_mb, in_child

TOKENIZER = ("vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json")


@dataclass
class Entry:
    """An engine in this run; a worker as `run_rounds` wants one.

    param_bytes: of each parameter as it stores them · failure: why it is not running, in one line.
    """

    engine: Engine
    failure: str | None = None
    worker: Worker | None = None
    param_bytes: dict[str, float] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)

    label: str = field(init=False)

    def __post_init__(self) -> None:
        self.label = self.engine.name

    def turn(self, case: Case) -> Sample:
        """Have its process run one case. Raises UserError with its failure, which it also keeps."""
        if self.failure is not None or self.worker is None:
            raise UserError(self.failure or "it was not loaded")
        try:
            return self.worker.turn(case)
        except UserError as error:
            self.failure = str(error).removeprefix(f"{self.label}: ")
            raise


@dataclass
class Run:
    """All engines over all cases.

    Args:
        source: the model; every engine gets its weights as the same float32 checkpoint.
        engines: in the order of the tables.
        cases: smallest batch first; each is finished before the next, so that caches stay warm.
        folder: for the checkpoint and what engines make of it; the caller removes it.

    `run` works; `result` is what is known so far, at any time.
    """

    source: ModelSource
    engines: Sequence[Engine]
    cases: Sequence[Case]
    repeats: int
    warmups: int
    threads: int
    folder: Path
    settle_s: float = SETTLE_S
    complete: bool = False

    def __post_init__(self) -> None:
        self.entries = [Entry(engine, engine.missing()) for engine in self.engines]
        self._samples: Samples = {}
        self._machine: Worker | None = None
        self._probes: MachineBounds | None = None
        self._import_mb: float | None = None
        self._others: list[float | None] = []
        self._date = results.now()

    @property
    def turns(self) -> int:
        """How many turns `run` will take."""
        return (self.warmups + self.repeats) * len(self.cases) * len(self.entries)

    def run(self, say: Say, save: Callable[[], Any] = lambda: None) -> None:
        """Prepare and load everything, then time it. say: as for `run_rounds`; save: called after each case.

        An engine that fails has its reason in the result; the others go on. On an interrupt the processes are ended at
        once.
        """
        try:
            say("measuring the machine's bounds", 0)
            self._machine = Worker("the machine's bounds", MachineSubject, self.threads)
            self._machine.ready()
            self._probes = MachineBounds(self._machine.facts)
            self._probe()
            self._import_mb = in_child("import tvm", import_mb)
            setup = self._setup(say)
            for entry in self.entries:
                if entry.failure is None:
                    try:
                        self._load(entry, setup, say)
                    except UserError as error:
                        entry.failure = str(error).removeprefix(f"{entry.label}: ")
            self._time(say, save)
        finally:
            self._end()  # what they know is here, and some engines take their time, or abort, on a way out of their own

    def _probe(self) -> None:
        assert self._machine is not None and self._probes is not None
        self._probes.probes.append(self._machine.turn(self.cases[0]))

    def _end(self) -> None:
        for worker in (self._machine, *(entry.worker for entry in self.entries)):
            if worker is not None:
                worker.kill()
        self._machine = None
        for entry in self.entries:
            entry.worker = None

    def _setup(self, say: Say) -> Setup:
        """Write the checkpoint that every engine reads."""
        from gpt2_tvm.data import prompt_for
        from gpt2_tvm.tokenizer import load_tokenizer
        from gpt2_tvm.weights import write_hf_checkpoint

        say("writing the checkpoint that all engines read", 0)
        checkpoint = write_hf_checkpoint(self.folder / self.source.name, self.source.config, self.source)
        tokenizer = None
        if self.source.folder is not None:
            for name in TOKENIZER:
                if (self.source.folder / name).is_file():
                    shutil.copy(self.source.folder / name, checkpoint / name)
            if (checkpoint / "tokenizer.json").is_file() or (checkpoint / "vocab.json").is_file():
                tokenizer = load_tokenizer(checkpoint)
        longest = max(case.prompt_tokens for case in self.cases)
        capacity = max(case.prompt_tokens + case.generate_tokens for case in self.cases)
        return Setup(
            checkpoint,
            tuple(prompt_for(tokenizer, self.source.config.vocab_size, longest)),
            tuple(sorted({case.batch for case in self.cases})),
            capacity,
            self.threads,
        )

    def _load(self, entry: Entry, setup: Setup, say: Say) -> None:
        """Make the engine's files, then start its process; one after another, since some measure while they load."""
        engine = entry.engine
        say(f"preparing {engine.name}", 0)
        path = str(setup.checkpoint)
        if engine.prepare is not None:
            folder = self.folder / engine.name.replace(" ", "-")
            folder.mkdir()
            path = in_child(engine.name, engine.prepare, setup, folder)
        if engine.weight_bits is not None:
            entry.param_bytes = stored_bytes(self.source.config, engine.weight_bits)
        else:
            from gpt2_tvm.artifact import open_artifact
            from gpt2_tvm.measure.bounds import artifact_param_bytes

            artifact = open_artifact(path, verify=False)
            entry.param_bytes = dict(artifact_param_bytes(artifact))
            entry.engine = engine = engine.with_cache(artifact.manifest["compute_dtype"])
        say(f"loading {engine.name}", 0)
        worker = Worker(engine.name, engine.subject, setup, path)
        try:
            worker.ready()
        except BaseException:
            worker.kill()
            raise
        entry.worker, entry.facts = worker, worker.facts

    def _time(self, say: Say, save: Callable[[], Any]) -> None:
        done = 0
        for case in self.cases:
            workers = [e.worker for e in self.entries if e.failure is None]
            others = OtherLoad([w.pid for w in (*workers, self._machine) if w is not None])
            run_rounds(
                self.entries,
                [case],
                self.repeats,
                self.warmups,
                self._samples,
                lambda what, turns: say(what, done + turns),  # noqa: B023 - called before `done` moves on
                self.settle_s,
                self._probe,
            )
            self._others.append(others.cores())
            done += self.turns // len(self.cases)
            self.complete = case == self.cases[-1]
            save()

    def result(self) -> dict[str, Any]:
        """`report.make_rows`, the verdict, and what is needed to read them."""
        bounds = self._bounds()
        rows = report.make_rows(self.source.config, self.entries, self.cases, self._samples, bounds)
        known = [cores for cores in self._others if cores is not None]
        return {
            "complete": self.complete,
            "date": self._date,
            "model": self.source.name,
            "note": self.source.note,
            "threads": self.threads,
            "repeats": self.repeats,
            "device": processor_name(),
            "bounds": bounds,
            "other_cores": max(known) if known else None,
            "engines": [
                {
                    "engine": e.label,
                    "precision": e.engine.precision,
                    "cache": e.engine.cache,
                    "settings": e.facts.get("settings", ""),
                    "versions": e.facts.get("versions", {}),
                    "failure": e.failure,
                }
                for e in self.entries
            ],
            "rows": rows,
            "verdict": verdict.judge(rows, bounds),
        }

    def _bounds(self) -> dict[str, Any] | None:
        """What the machine can do at the most (`gpt2_tvm.measure.machine`), the median of a probe a round; beside it
        `import_rss_mb`, what a bare `import tvm` takes. None before they are known."""
        if self._probes is None or self._import_mb is None:
            return None
        found = self._probes.bounds()
        read, fma = found.bandwidth, found.arithmetic
        return {
            "read_gb_s": read.gb_s if read else None,
            "read_gb_s_sd": read.gb_s_sd if read else None,
            "read_source": read.source if read else None,
            "fma_gflop_s": fma.gflop_s if fma else None,
            "fma_gflop_s_sd": fma.gflop_s_sd if fma else None,
            "fma_source": fma.source if fma else None,
            "import_rss_mb": self._import_mb,
        }
