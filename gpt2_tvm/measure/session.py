"""One run of the benchmark: check, load, time, and put the result together."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from gpt2_tvm.artifact import Artifact, open_artifact
from gpt2_tvm.errors import UserError
from gpt2_tvm.measure import bounds, peers, results
from gpt2_tvm.measure.cases import Case, Sample, check_fits, check_runners
from gpt2_tvm.measure.machine import MachineBounds, MachineSubject
from gpt2_tvm.measure.noise import OtherLoad
from gpt2_tvm.measure.subjects import EngineSubject
from gpt2_tvm.measure.timing import Samples, Say, run_rounds
from gpt2_tvm.measure.web_subject import WGPU, WebSubject
from gpt2_tvm.measure.workers import Worker


@dataclass
class Session:
    """Artifacts, and peers with the same weights, timed over the same cases in one run.

    Args:
        paths: the artifacts' folders.
        cases: what is timed of each.
        repeats, warmups: rounds that are kept, and rounds before them that are not.
        peer: names of `peers.PEERS` with commas between, or None.
        device, threads: as for `Engine`; peers and the machine's bounds get as many threads.
        runners: what runs webgpu artifacts, each with a turn of its own: wgpu, node, chromium, browser:PORT.

    Construction makes every check that needs nothing loaded and raises UserError. `run` times; `result` is
    what is known so far, at any time.
    """

    paths: Sequence[Path]
    cases: Sequence[Case]
    repeats: int = 5
    warmups: int = 1
    peer: str | None = None
    device: str | None = None
    threads: int | None = None
    runners: Sequence[str] = (WGPU,)
    complete: bool = False
    failures: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        # contents are hashed by the process that loads them; sizes and the manifest are checked here
        opened = [open_artifact(path, verify=False) for path in self.paths]
        check_runners(self.runners, opened, self.cases)
        self._peers = tuple(dict.fromkeys(part.strip() for part in (self.peer or "").split(",") if part.strip()))
        if self.peer is not None and not self._peers:
            raise UserError(f"--peer {self.peer!r} names nothing; choose of {', '.join(peers.PEERS)}")
        ways = [(a, way) for a in opened for way in (self.runners if a.kind == "webgpu" else [None])]
        self._artifacts, self._ways = [a for a, _ in ways], [way for _, way in ways]
        for artifact in self._artifacts:
            check_fits(artifact, self.cases)
            for peer in self._peers:
                peers.check_peer(peer, artifact)
        self._samples: Samples = {}
        self._workers: list[Worker] = []
        self._sources: list[tuple[Artifact, str | None]] = []  # a worker's artifact, and its name as a peer
        self._peers_of: list[tuple[int, int]] = []  # indices of an artifact's worker and of a peer's with its weights
        self._machine: Worker | None = None  # measures its own bounds, where an artifact's target does not state them
        self._probes: MachineBounds | None = None
        self._other_cores: float | None = None
        self._date = results.now()

    @property
    def turns(self) -> int:
        """How many turns `run` will take."""
        workers = len(self._artifacts) + len(self._peers) * len(self._peer_keys())
        return (self.warmups + self.repeats) * len(self.cases) * workers

    def samples(self, index: int, case: Case) -> Sequence[Sample]:
        """What was kept of a case by now, for `paths[index]`, a sample a round; with a peer or several
        runners in the run use `result`."""
        return self._samples.get((index, case), [])

    def run(self, say: Say = lambda what, turns: None) -> None:
        """Load everything, then time it. say: called with what comes next, and how many turns are done.

        Raises UserError where something cannot be loaded. What fails later goes to `failures`, and the rest
        goes on. On an interrupt the processes are ended at once.
        """
        with ExitStack() as stack:
            try:
                self._start(stack, say)
                others = OtherLoad([worker.pid for worker in self._processes])
                look = self._look if self._machine is not None else None
                failures = run_rounds(
                    self._workers, self.cases, self.repeats, self.warmups, self._samples, say, each_round=look
                )
                self.failures += failures
                self.complete = not self.failures
                self._other_cores = others.cores()
            except BaseException:
                for worker in self._processes:
                    worker.kill()
                raise
            for worker in self._processes:
                worker.close()

    @property
    def _processes(self) -> list[Worker]:
        return [*self._workers, *([self._machine] if self._machine is not None else [])]

    def _look(self) -> None:
        """Measure the machine once; if that fails, the rest goes on without."""
        assert self._machine is not None and self._probes is not None
        try:
            self._probes.probes.append(self._machine.turn(self.cases[0]))
        except UserError as error:
            if str(error) not in self.failures:
                self.failures.append(str(error))

    def _peer_keys(self) -> dict[str, int]:
        """Stored weights (by the digests of their files) to the first artifact that has them: one worker a peer."""
        if not self._peers:
            return {}
        keys: dict[str, int] = {}
        for index, artifact in enumerate(self._artifacts):
            keys.setdefault(_weights_key(artifact), index)
        return keys

    def _start(self, stack: ExitStack, say: Say) -> None:
        for artifact, way in zip(self._artifacts, self._ways, strict=True):
            path, label = str(artifact.path), f"{artifact.path}{f' in {way}' if way not in (None, WGPU) else ''}"
            say(f"loading {label}", 0)
            if way in (None, WGPU):
                worker = Worker(label, EngineSubject, path, self.device, self.threads)
            else:
                worker = Worker(label, WebSubject, path, way)
            self._workers.append(worker)
            self._sources.append((artifact, None))
            worker.ready()  # one after another: how long each takes to load is measured
        workers_of_peers: dict[str, list[int]] = {}
        for key, index in self._peer_keys().items():
            for peer in self._peers:
                artifact = self._artifacts[index]
                say(f"loading {peer} with the weights of {artifact.path}", 0)
                scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix="gpt2-tvm-peer-"))
                workers_of_peers.setdefault(key, []).append(len(self._workers))
                arguments = (str(artifact.path), scratch, self.threads)
                self._workers.append(Worker(f"{peer} ({artifact.path})", peers.SUBJECTS[peer], *arguments))
                self._sources.append((artifact, peer))
        if any(a.kind == "cpu" and None in _parts(bounds.target_bounds(a)) for a in self._artifacts):
            say("preparing to measure the machine's own bounds", 0)
            self._machine = Worker("this machine's bounds", MachineSubject, self.threads)
        for worker, (_, name) in zip(self._workers, self._sources, strict=True):
            if name is not None:
                worker.ready()
        if self._machine is not None:
            self._machine.ready()
            self._probes = MachineBounds(self._machine.facts)
        for index, artifact in enumerate(self._artifacts):
            if self._peers:
                self._peers_of += [(index, worker) for worker in workers_of_peers[_weights_key(artifact)]]

    def _bound(self, artifact: Artifact) -> bounds.Bounds:
        """The target's peaks; for a CPU what they leave open as the machine measured it."""
        stated = bounds.target_bounds(artifact)
        if artifact.kind != "cpu" or self._probes is None:
            return stated
        measured = self._probes.bounds()
        return bounds.Bounds(stated.bandwidth or measured.bandwidth, stated.arithmetic or measured.arithmetic)

    def result(self) -> dict[str, Any]:
        """The result as in `results`: rows by case, each artifact followed by its peer."""
        rows, comparisons = [], []
        limits = [self._bound(artifact) for artifact in self._artifacts]
        for case in self.cases:
            made: dict[int, results.Row] = {}
            for index, (artifact, peer) in enumerate(self._sources):
                samples = self._samples.get((index, case))
                if samples:
                    facts = self._workers[index].facts
                    bound = limits[self._artifacts.index(artifact)]
                    made[index] = results.make_row(artifact, case, samples, facts, bound, self._date, peer)
            rows += list(made.values())
            for ours, theirs in self._peers_of:
                if ours in made and theirs in made:
                    mine, other, name = self._samples[ours, case], self._samples[theirs, case], self._sources[theirs][1]
                    comparisons.append(results.make_comparison(made[ours], str(name), case, mine, other))
        stated = dict.fromkeys(part for limit in limits for part in _parts(limit) if part is not None)
        return {
            "complete": self.complete,
            "date": self._date,
            "bounds": [asdict(part) for part in stated],
            "other_cores": self._other_cores,
            "rows": rows,
            "comparisons": comparisons,
            "failures": self.failures,
        }


def _weights_key(artifact: Artifact) -> str:
    files = artifact.manifest["files"]
    digests = [files[name]["sha256"] for name in sorted(files) if name.startswith("params/")]
    return " ".join([artifact.kind, *digests])


def _parts(limit: bounds.Bounds) -> tuple[bounds.Bandwidth | None, bounds.Arithmetic | None]:
    return limit.bandwidth, limit.arithmetic
