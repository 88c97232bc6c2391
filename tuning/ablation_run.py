"""One run of an ablation: compile every set, check every code, time them in interleaved rounds; all journalled."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from gpt2_tvm.checkpoint import ModelSource
from gpt2_tvm.errors import UserError
from gpt2_tvm.measure.timing import SETTLE_S
from gpt2_tvm.mlc.chat_config import CHAT_CONFIG
from gpt2_tvm.schedules.registry import OUTSIDE
from targets import DeviceTarget
from tuning import ablation_cache, ablation_peer, ablation_reference, ablation_work
from tuning.ablation_records import Journal
from tuning.ablation_work import Job
from tuning.children import Call, Child, Outcome, jobs_at_once, run_each, run_once
from tuning.journal import Line
from tuning.measure.functions import WARMUPS
from tuning.variants import Variant

TIMING = "fastest cycle of a round, in parts on a software device"  # samples taken in another way are not mixed in
FEWEST = 3  # repeats of a set whose budget is spent
FUNCTIONS_S, MOST_ROUNDS = 3.0, 20  # prefills that the timing of functions may take, in seconds and in rounds
SLOW_FUNCTIONS_S = 1.0  # of a prefill: its functions are timed without rounds before
WARM_S = 2.0  # a check that takes longer has run all that a turn runs for long enough
# Of a prefill. One that long is warmed up with a short one. On a software device it goes through more of a process's
# memory than the TLB reaches, and where that lies makes a tenth to a third: there each turn has a process of its own.
SLOW_S = 2.5
RESERVE = 0.5  # the share of free memory that engines may take
WHOLE = ("manifest.json", CHAT_CONFIG)  # either is the last file of a folder that a set was compiled into
EACH_BYTES, EACH_WEIGHTS = 2 << 30, 4  # memory of one that compiles a set: the least, and how many times its weights
CONTEXT_BYTES = 600 << 20  # of a GPU for each process: driver context, caches, work space

Say = Callable[[str, float], Any]  # (what comes next, share done), as `build.Progress`


@dataclass
class Ablation:
    """An experiment.

    Args:
        job: what all sets have in common.
        source, target: `job`'s model and target, resolved.
        variants: the sets, in the order of the table.
        records: the journal's file; what it holds is not measured again.
        repeats: rounds; `budget_s`: a set that has been timed for longer is left out of further rounds, after FEWEST.
        timeout_s: for compiling a set, loading it, checking it, and each turn.
        reference: one of `ablation_reference.CHOICES`.
        alive: how many engines may be in memory at once; default what half of the free memory holds.
        functions: names of the sets whose single functions are timed too (not through RPC).
        lighter: attributes of `job` that are others on a software device.
    """

    job: Job
    source: ModelSource
    target: DeviceTarget
    variants: Sequence[Variant]
    records: Path
    repeats: int = 5
    budget_s: float = 20.0
    timeout_s: float = 300.0
    reference: str = "auto"
    alive: int | None = None
    functions: Sequence[str] = ()
    fresh: bool = False
    lighter: Mapping[str, Any] = field(default_factory=dict)
    _children: OrderedDict[str, Child] = field(default_factory=OrderedDict)
    _device: dict[str, Any] = field(default_factory=dict)
    _digests: dict[frozenset[str], str] = field(default_factory=dict)
    _compiled: int = 0

    def run(self, say: Say = lambda what, share: None) -> Journal:
        """Measure what the journal lacks. An interrupt ends the children at once; what was measured is kept.

        Raises UserError where there is no device, the records are another experiment's, or the prompt does not fit.
        """
        started = time.monotonic()
        how = ablation_reference.choose(self.reference, self.job.quantization, self.target.kind)
        self._device = self._need(run_once("device", ablation_work.probe, self.job, timeout_s=self.timeout_s))
        lighter = self.lighter if self._device.get("software") else {}
        self.job = replace(self.job, adapter=self._device.get("adapter"), **lighter)
        self._check_fits()
        with Journal.begin(self.records, self._header(how), self.fresh) as journal:
            self._compiled, before = 0, self.records.stat().st_size
            try:
                codes = self._compile(journal, say)
                if any(not self._done(journal, code) for code in codes):
                    self._measure(journal, codes, self._reference_file(how, say), say)
                self._functions_left(journal, codes, say)
            finally:
                for child in self._children.values():
                    child.kill()
                if self.records.stat().st_size > before:
                    seconds = round(time.monotonic() - started, 1)
                    journal.append({"kind": "run", "seconds": seconds, "compiled": self._compiled})
        return journal

    # What is measured --------------------------------------------------------------------------------------------

    def _check_fits(self) -> None:
        job, capacity = self.job, self.source.config.n_positions
        total = ablation_reference.tokens_needed(job.prompt_tokens, job.generate_tokens)
        if job.prompt_tokens < 1 or job.generate_tokens < 1 or total > capacity:
            raise UserError(
                f"--prompt-tokens {job.prompt_tokens} --generate {job.generate_tokens}: at least 1 each, and with the "
                f"checks {total} tokens, where the model has positions for {capacity}"
            )

    def _header(self, how: str) -> Line:
        job = self.job
        tvm = " / ".join(f"{name} {_version(name)}" for name in ("apache-tvm", "apache-tvm-ffi"))
        return {
            "model": self.source.name,
            "weights": ablation_cache.weights_identity(self.source),
            "quantization": job.quantization,
            "target": self.target.name,
            "target_kind": self.target.kind,
            "attention": job.attention,
            "prompt_tokens": job.prompt_tokens,
            "generate_tokens": job.generate_tokens,
            "device": self._device["device"],
            "tvm": tvm,
            "reference": ablation_reference.describe(how),
            "tolerance": ablation_reference.tolerance(job.quantization),
            "timing": TIMING,
            **({"toggles": job.toggles} if job.toggles != "rules" else {}),
        }

    def _reference_file(self, how: str, say: Say) -> str:
        job = self.job
        made_of = [how, ablation_cache.weights_identity(self.source), job.prompt_tokens, self.source.name]
        if how != "transformers":
            made_of.append(ablation_cache.sources())
        file = Path(job.cache) / f"reference-{ablation_cache.digest(made_of)}.npz"
        if not file.is_file():
            say(f"reference: {ablation_reference.describe(how)}", 0.4)
            outcome = run_once("reference", ablation_reference.make, job, how, str(file), timeout_s=self.timeout_s)
            self._need(outcome)
        return str(file)

    @staticmethod
    def _need(outcome: Outcome) -> Any:
        """The value of something without which nothing can be measured."""
        if not outcome.ok:
            raise UserError(outcome.detail)
        return outcome.value

    # Compiling ---------------------------------------------------------------------------------------------------

    def _folder(self, line: Line) -> Path:
        return Path(self.job.cache) / line["artifact"]

    def _compile(self, journal: Journal, say: Say) -> dict[str, Line]:
        """Every set lowered, and its module built unless another set made the same; returns code to a set's line."""
        lines: dict[str, Line] = {}
        todo = []
        for variant in self.variants:
            line = journal.sets.get(variant.name)
            if line is None or not self._stands(journal, variant, line, self._made_from(variant.rules)):
                todo.append(variant)
            else:
                lines[variant.name] = line
        jobs = jobs_at_once(EACH_BYTES + EACH_WEIGHTS * 4 * self.source.config.num_parameters())
        calls = [self._call(variant) for variant in todo]
        if calls:
            say(f"compiling {len(calls)} rule sets, {min(jobs, len(calls))} at a time", 0.02)
        with closing(run_each(calls, self.timeout_s, jobs)) as outcomes:
            for index, (variant, outcome) in enumerate(zip(todo, outcomes, strict=True)):
                lines[variant.name] = self._set_line(variant, outcome)
                journal.append(lines[variant.name])
                self._compiled += lines[variant.name].get("compile_s") is not None
                say(f"compiled {variant.name}", 0.02 + 0.38 * (index + 1) / len(todo))
        codes: dict[str, Line] = {}
        for variant in self.variants:
            line = lines[variant.name]
            if line["status"] == "ok":
                codes.setdefault(line["code"], line)
        return codes

    def _made_from(self, rules: Sequence[str] = ()) -> str:
        """The digest of the sources, as they are when it is first asked for: an edit during a run is the next run's
        business."""
        outside = frozenset(rule for rule in rules if OUTSIDE.fullmatch(rule))
        if outside not in self._digests:
            self._digests[outside] = ablation_cache.sources(sorted(outside), self.target.path)
        return self._digests[outside]

    def _stands(self, journal: Journal, variant: Variant, line: Line, made_from: str) -> bool:
        """Whether a set's line still says what compiling it again would."""
        if line["rules"] != list(variant.rules) or line["sources"] != made_from:
            return False
        if line["status"] != "ok":
            return line["status"] != "timeout" or self.timeout_s <= line["timeout_s"]
        return self._done(journal, line["code"]) or any((self._folder(line) / name).is_file() for name in WHOLE)

    def _call(self, variant: Variant) -> Call:
        """What compiles a set."""
        label = f"compile {variant.name}"
        if variant == ablation_peer.VARIANT:
            return Call(label, ablation_peer.build, (self.job,))
        # The name of a set may be another's under other options; the rules as a list are what it means.
        rules = ",".join(variant.rules) or "baseline"
        # what rules of other people did is in the code's digest
        return Call(label, ablation_work.build, (self.job, rules, self._made_from()))

    def _set_line(self, variant: Variant, outcome: Outcome) -> Line:
        line: Line = {
            "kind": "set",
            "set": variant.name,
            "rules": list(variant.rules),
            "sources": self._made_from(variant.rules),
            "status": outcome.status,
            **outcome.notes,
        }
        if outcome.ok:
            line.update(outcome.value)
        else:
            line.update(stage=outcome.stage, detail=outcome.detail, timeout_s=self.timeout_s)
        return line

    # Measuring ---------------------------------------------------------------------------------------------------

    def _done(self, journal: Journal, code: str) -> bool:
        """Whether a code needs no further turn."""
        failure = journal.failures.get(code)
        if failure is not None:
            return not (failure["status"].endswith("timeout") and self.timeout_s > failure["timeout_s"])
        samples = journal.samples.get(code, {})
        spent = sum(sample["seconds"] for sample in samples.values())
        return len(samples) >= self.repeats or (len(samples) >= FEWEST and spent > self.budget_s)

    def _measure(self, journal: Journal, codes: dict[str, Line], reference: str, say: Say) -> None:
        """Rounds: every code has one turn a round, so that a slow minute of the machine hits all alike. A worker behind
        RPC holds one engine at a time, and loading it takes a while: there the rounds of a code follow each other."""
        turns = [(round_, code) for round_ in range(self.repeats) for code in codes]
        if self.job.remote:
            turns = [(round_, code) for code in codes for round_ in range(self.repeats)]
        for index, (round_, code) in enumerate(turns):
            if round_ in journal.samples.get(code, {}) or self._done(journal, code):
                continue
            name = codes[code]["set"]
            say(f"round {round_ + 1} of {self.repeats}: {name}", 0.42 + 0.5 * index / len(turns))
            child = self._ready(journal, code, codes[code], reference)
            if child is None:
                continue
            time.sleep(SETTLE_S)
            if not self._turn(journal, child, code, round_):
                continue
            if self._done(journal, code):
                self._time_functions(journal, code, codes[code])  # while its shaders are compiled
            elif (
                self._device.get("software")
                and not self.job.in_a_page
                and journal.samples[code][round_]["prefill_s"] > SLOW_S
            ):
                self._children.pop(code).close()  # see `SLOW_S`

    def _turn(self, journal: Journal, child: Child, code: str, round_: int) -> bool:
        """Whether it went well."""
        outcome = child.ask("turn", timeout_s=self.timeout_s)
        if not self._fine(journal, code, outcome):
            return False
        sample = {"kind": "sample", "code": code, "round": round_, "seconds": round(outcome.seconds, 3)}
        journal.append({**sample, **outcome.value})
        return True

    def _fine(self, journal: Journal, code: str, outcome: Outcome) -> bool:
        """Whether a child's answer is one; journals what it is otherwise."""
        if outcome.ok:
            return True
        self._children.pop(code, None)
        told = {"status": outcome.status, "stage": outcome.stage, "detail": outcome.detail}
        journal.append({"kind": "failure", "code": code, **told, "timeout_s": self.timeout_s})
        return False

    def _ready(self, journal: Journal, code: str, line: Line, reference: str) -> Child | None:
        """The child that holds a code's engine, loaded and checked; None where it failed (that is journalled)."""
        child = self._children.get(code)
        if child is not None:
            self._children.move_to_end(code)
            return child
        while self._children and len(self._children) >= self._room():
            _, oldest = self._children.popitem(last=False)
            oldest.close()
        folder = self._folder(line)
        subject = ablation_peer.PeerSubject if line["set"] == ablation_peer.PEER else ablation_work.Subject
        child = Child(line["set"], subject, self.job, str(folder))
        self._children[code] = child
        outcome = child.ready(self.timeout_s)
        if not self._fine(journal, code, outcome):
            return None
        checked_s = 0.0
        if code not in journal.checks:
            outcome = child.ask("check", reference, timeout_s=self.timeout_s)
            if not self._fine(journal, code, outcome):
                return None
            journal.append({"kind": "check", "code": code, "difference": outcome.value})
            checked_s = outcome.seconds
        if checked_s < WARM_S:
            slow = any(sample["prefill_s"] > SLOW_S for sample in journal.samples.get(code, {}).values())
            outcome = child.ask("warm", slow, timeout_s=self.timeout_s)
            if not self._fine(journal, code, outcome):
                return None
        return child

    def _room(self) -> int:
        """How many engines fit into memory at once, told by those that are there."""
        if self.alive is not None or self.job.remote:
            return self.alive or 1
        import psutil

        held = []
        for child in self._children.values():
            try:
                held.append(psutil.Process(child.pid).memory_info().rss)
            except psutil.Error:
                continue
        if not held:
            return 1
        more = int(psutil.virtual_memory().available * RESERVE / max(held))
        room = len(held) + more
        if self._device["memory_bytes"]:
            weights = sum(file.stat().st_size for file in Path(self.job.cache).glob("*/params/*.bin"))
            each = weights / max(1, len(list(Path(self.job.cache).glob("*/params")))) + CONTEXT_BYTES
            room = min(room, int(self._device["memory_bytes"] / each))
        return max(1, room)

    # Single functions --------------------------------------------------------------------------------------------

    def _functions_left(self, journal: Journal, codes: dict[str, Line], say: Say) -> None:
        """Of those codes that were done before this run."""
        for index, (code, line) in enumerate(codes.items()):
            say(f"timing functions: {line['set']}", 0.92 + 0.07 * index / len(codes))
            self._time_functions(journal, code, line)

    def _time_functions(self, journal: Journal, code: str, line: Line) -> None:
        """Once, of a code that one of the sets asked for has."""
        of_sets = {journal.sets[name].get("code") for name in self.functions if name in journal.sets}
        measured = code in journal.samples and code not in journal.failures
        if self.job.remote or code not in of_sets or code in journal.functions or not measured:
            return
        fastest = min(sample["prefill_s"] for sample in journal.samples[code].values())
        repeats = max(1, min(MOST_ROUNDS, int(FUNCTIONS_S / fastest)))
        warmups = 0 if fastest > SLOW_FUNCTIONS_S else WARMUPS
        child = self._children.get(code)
        if child is not None:
            outcome = child.ask("time_functions", repeats, warmups, timeout_s=self.timeout_s)
            if not outcome.ok:
                self._children.pop(code)
        else:
            arguments = (self.job, str(self._folder(line)), repeats, warmups)
            outcome = run_once(line["set"], ablation_work.time_functions, *arguments, timeout_s=self.timeout_s)
        told = {"times": outcome.value} if outcome.ok else {"times": {}, "detail": outcome.detail}
        journal.append({"kind": "functions", "code": code, "status": outcome.status, **told})


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"
