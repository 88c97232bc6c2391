"""The rounds of bench_decoding: each prompt by every subject in turn, so that a slow minute of the machine hits all."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from gpt2_tvm.decoding.device_speculative import DeviceSpeculative
from gpt2_tvm.decoding.planted import Plan, PlantedDraft, PlantedModelDraft
from gpt2_tvm.decoding.prompts import Unit
from gpt2_tvm.decoding.registry import make_strategy
from gpt2_tvm.decoding.sampling import Sampling
from gpt2_tvm.decoding.speculative import Speculative
from gpt2_tvm.decoding.strategy import Decoding, Strategy
from gpt2_tvm.decoding.streaming import Streaming
from gpt2_tvm.decoding.subjects import Subject
from tuning.journal import JournalFile, Line

if TYPE_CHECKING:
    from gpt2_tvm.engine import Engine

WARM_TOKENS = 24  # of each subject before anything counts
Say = Callable[[str, int], Any]  # (what comes next, turns done)


class Journal(JournalFile):
    """One line a turn. Attributes: turns, by (subject's key, unit's key, repeat)."""

    format_name: ClassVar[str] = "gpt2-tvm-decoding-1"
    identity: ClassVar[Mapping[str, str]] = {
        "artifacts": "artifact (compiled again since?)",
        "datasets": "choice of data sets",
        "options": "choice of options",
    }
    maker: ClassVar[str] = "python -m gpt2_tvm.bench_decoding"

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.turns: dict[tuple[str, str, int], Line] = {}

    def note(self, line: Line) -> None:
        """See `JournalFile.note`."""
        self.turns[(line["subject"], line["unit"], line["repeat"])] = line


@dataclass
class Bench:
    """Runs what the journal lacks.

    Args:
        subjects, units: what to run on what.
        engines, drafts: of targets and of drafts, by artifact; one each, shared by all subjects. An artifact that is
            both has two.
        eos: end-of-text ids by model.
        max_tokens, sampling, seed, repeats: as the command line has them.
    """

    subjects: Sequence[Subject]
    units: Sequence[Unit]
    engines: Mapping[Path, Engine]
    drafts: Mapping[Path, Engine]
    eos: Mapping[Path, int | None]
    max_tokens: int
    sampling: Sampling
    seed: int = 0
    repeats: int = 1
    _strategies: dict[Subject, Strategy] = field(default_factory=dict)
    _greedy: dict[tuple[Path, str], list[list[int]]] = field(default_factory=dict)

    @property
    def turns(self) -> int:
        """How many there are in all."""
        return len(self.subjects) * len(self.units) * self.repeats

    def run(self, journal: Journal, say: Say = lambda what, done: None) -> None:
        """Every turn that the journal does not have; each is written as it ends.

        A strategy is warmed up, and an adaptive one shown some text, before its first turn.
        """
        done = 0
        for repeat in range(self.repeats):
            for unit in self.units:
                for subject in self.subjects:
                    say(f"{unit.key}: {subject.label}", done)
                    done += 1
                    if (subject.key, unit.key, repeat) not in journal.turns:
                        journal.append(self.turn(subject, unit, repeat))

    def turn(self, subject: Subject, unit: Unit, repeat: int) -> Line:
        """One subject on one unit -> its line."""
        strategy = self._strategies.get(subject)
        if strategy is None:
            strategy = self._strategies[subject] = self._make(subject)
            self._plan(subject, strategy, unit)
            for _ in range(2):
                self._decoding(subject, strategy, unit, min(WARM_TOKENS, self.max_tokens)).run()
        self._plan(subject, strategy, unit)
        decoding = self._decoding(subject, strategy, unit, self.max_tokens)
        tokens = decoding.run()
        rows = decoding.rows
        line: Line = {
            "subject": subject.key,
            "unit": unit.key,
            "repeat": repeat,
            "tokens": tokens,
            "prompt_tokens": [row.prompt_tokens for row in rows],
            "finish": [row.finish for row in rows],
            "prefill_s": round(decoding.prefill_s, 9),
            "decode_s": round(decoding.decode_s, 9),
            "steps": [[round(step.seconds, 9), step.tokens] for step in decoding.steps],
            "parts": {k: round(v, 9) for k, v in strategy.clock.split(decoding.decode_s).items()},
            "passes": sum(row.steps for row in rows),
            "drafted": sum(row.drafted for row in rows),
            "examined": sum(row.examined for row in rows),
            "accepted": sum(row.accepted for row in rows),
        }
        if isinstance(strategy, Speculative | DeviceSpeculative | Streaming):
            line["draft_s"] = strategy.costs.draft_s
            line["target_s"] = {str(rows): seconds for rows, seconds in strategy.costs.target.items()}
        return line

    def _make(self, subject: Subject) -> Strategy:
        draft = self.drafts[subject.draft] if subject.draft else None
        plan = None
        if subject.planted is not None:
            plan = Plan(subject.planted, [], self.engines[subject.model].config.vocab_size, self.seed)
        return make_strategy(
            subject.strategy, self.engines[subject.model], draft, subject.length or "0", self.sampling, plan
        )

    def _decoding(self, subject: Subject, strategy: Strategy, unit: Unit, max_tokens: int) -> Decoding:
        return Decoding(strategy, unit.ids[subject.model], max_tokens, self.eos[subject.model], self.seed)

    def _plan(self, subject: Subject, strategy: Strategy, unit: Unit) -> None:
        """Tell a planted draft the unit's greedy text (untimed)."""
        if not isinstance(strategy, Speculative) or not isinstance(strategy.draft, PlantedDraft | PlantedModelDraft):
            return
        key = (subject.model, unit.key)
        if key not in self._greedy:
            greedy = make_strategy("greedy", self.engines[subject.model])
            self._greedy[key] = self._decoding(subject, greedy, unit, self.max_tokens).run()
        strategy.draft.plan.texts = self._greedy[key]
