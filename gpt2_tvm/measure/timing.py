"""The rounds: every configuration has one turn a round, so that a slow minute of the machine hits all alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from gpt2_tvm.errors import UserError
from gpt2_tvm.measure.cases import Case, Sample

# Between turns of different processes. A thread pool spins for a while after its last work (TVM's and
# OpenMP's do) and would take the next one's cores.
SETTLE_S = 0.25

Say = Callable[[str, int], Any]  # (what comes next, turns done)
Samples = dict[tuple[int, Case], list[Sample]]


class Timed(Protocol):
    """What `run_rounds` asks of a worker."""

    label: str

    def turn(self, case: Case) -> Sample:
        """Run one case from an empty cache."""
        ...


def run_rounds(
    workers: Sequence[Timed],
    cases: Sequence[Case],
    repeats: int,
    warmups: int,
    samples: Samples,
    say: Say = lambda what, turns: None,
    settle_s: float = SETTLE_S,
    each_round: Callable[[], Any] | None = None,
) -> list[str]:
    """Run `warmups` rounds that are thrown away, then `repeats` rounds that are kept.

    Args:
        samples: filled as the turns end, by (index of the worker, case): an interrupt leaves what there is.
        say: called before each turn with what it is, and how many are done.
        each_round: called at the beginning of each round that is kept (the machine's own bounds are measured there).

    Returns one line for each worker that failed; such a worker has no further turns, the others go on.
    """
    failures: dict[int, str] = {}
    turns = 0
    for round_ in range(-warmups, repeats):
        name = f"round {round_ + 1} of {repeats}" if round_ >= 0 else "warm-up"
        if each_round is not None and round_ >= 0:
            time.sleep(settle_s)
            each_round()
        for case in cases:
            for index, worker in enumerate(workers):
                what = f"{worker.label}, {case.batch} x {case.prompt_tokens} + {case.generate_tokens} tokens"
                say(f"{name}: {what}", turns)
                turns += 1
                if index in failures:
                    continue
                if len(workers) > 1:
                    time.sleep(settle_s)
                try:
                    sample = worker.turn(case)
                except UserError as error:
                    failures[index] = str(error)
                    continue
                if round_ >= 0:
                    samples.setdefault((index, case), []).append(sample)
    return list(failures.values())
