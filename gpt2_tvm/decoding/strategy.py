"""What decoding strategies share: the sequences of a batch, and the loop that asks for tokens until all have ended.

A strategy is asked for the next tokens of every sequence, one or several at a time. Its engine's cache holds all ids of
a sequence but the last, which the next pass takes in.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from gpt2_tvm.decoding.clock import Clock
from gpt2_tvm.decoding.sampling import Sampling, sample
from gpt2_tvm.errors import UserError

if TYPE_CHECKING:
    from gpt2_tvm.engine import Engine

SPARE = 0  # the id that a sequence which takes no part in a call is given; its position moves back before the next


@dataclass
class TextRow:
    """One sequence of a batch.

    Attributes:
        ids: the prompt and what has followed it.
        prompt_tokens: how many of them are the prompt.
        room: how many tokens may follow at most.
        finish: why it ended: "length", "eos", "context" (the context is full), or "" while it has not.
        steps: passes of the target that this sequence took part in, after the prompt's.
        drafted, examined, accepted: tokens that a draft proposed; that were looked at (those up to and with the first
            refusal); that stood.
    """

    ids: list[int]
    prompt_tokens: int
    room: int
    finish: str = ""
    steps: int = 0
    drafted: int = 0
    examined: int = 0
    accepted: int = 0

    @property
    def tokens(self) -> list[int]:
        """What has followed the prompt; an end-of-text token is not among them."""
        return self.ids[self.prompt_tokens :]

    @property
    def live(self) -> bool:
        return not self.finish

    @property
    def left(self) -> int:
        """How many tokens may still come."""
        return self.room - (len(self.ids) - self.prompt_tokens)


class Strategy(ABC):
    """A way to continue prompts on an engine.

    Args:
        engine: the target's. Its sequences are forgotten.
        sampling: how a token is chosen; greedy by default.

    Attributes:
        clock: where the time of steps went.
        rngs: one generator a sequence, set by `Decoding`.
    """

    name: ClassVar[str]

    def __init__(self, engine: Engine, sampling: Sampling | None = None) -> None:
        self.engine = engine
        self.sampling = sampling or Sampling()
        self.clock = Clock()
        self.rngs: list[np.random.Generator] = []

    def begin(self, rows: Sequence[TextRow]) -> list[int]:
        """Take in the prompts -> the first token after each."""
        self.engine.reset()
        return self.choose(self.engine.prefill([row.ids for row in rows]), rows)

    @abstractmethod
    def step(self, rows: Sequence[TextRow]) -> list[list[int]]:
        """The next tokens of each row: 1 to row.left of them for a live one, what it likes (ignored) for another."""

    def choose(self, logits: np.ndarray, rows: Sequence[TextRow]) -> list[int]:
        """A token from logits [batch, vocab] for every live row (others: `SPARE`)."""
        if self.sampling.greedy:
            return [int(token) for token in logits.argmax(-1)]
        s = self.sampling
        return [
            sample(logits[b], s.temperature, s.top_k, s.top_p, self.rngs[b]) if row.live else SPARE
            for b, row in enumerate(rows)
        ]

    def decode(self, rows: Sequence[TextRow]) -> np.ndarray:
        """One pass of the target over the last id of each row -> logits [batch, vocab]; ended rows stay where they
        are."""
        park(self.engine, rows)
        with self.clock("verify"):
            logits = self.engine.decode([row.ids[-1] if row.live else SPARE for row in rows])
        for row in rows:
            row.steps += row.live
        return logits


def park(engine: Engine, rows: Sequence[TextRow]) -> None:
    """Move ended rows to position 0, so that a call that must give them a token too never fills their context."""
    if not all(row.live for row in rows):
        engine.rewind([int(at) if row.live else 0 for at, row in zip(engine.positions, rows, strict=True)])


@dataclass
class Step:
    """seconds: of one step; tokens: how many it gave, of all rows."""

    seconds: float
    tokens: int


@dataclass
class Decoding:
    """Prompts being continued by a strategy. Iterate over it for the tokens as they come, or call `run`.

    Attributes:
        rows: the sequences.
        prefill_s: seconds for the prompts and the first token of each; decode_s: for all steps after that.
        steps: those steps.
        seed: that was used.

    Raises UserError, before anything runs, for an empty prompt and for one that leaves no room in the context.
    """

    strategy: Strategy
    prompts: Sequence[Sequence[int]]
    max_tokens: int
    eos_id: int | None = None
    seed: int | None = None
    rows: list[TextRow] = field(init=False)
    prefill_s: float = field(init=False, default=0.0)
    decode_s: float = field(init=False, default=0.0)
    steps: list[Step] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise UserError(f"--max-tokens {self.max_tokens}: give how many tokens to write, at least 1")
        if self.seed is not None and self.seed < 0:
            raise UserError(f"--seed {self.seed}: give 0 or more")
        if not self.prompts:
            raise UserError("there is no prompt: give at least one")
        if self.seed is None:
            self.seed = int(np.random.SeedSequence().generate_state(1)[0])
        capacity = self.strategy.engine.max_seq_len
        for prompt in self.prompts:
            if len(prompt) == 0:
                raise UserError("the prompt is empty: give at least one token")
            if len(prompt) >= capacity:
                raise UserError(
                    f"the prompt has {len(prompt)} tokens and the context holds {capacity}: nothing can follow; "
                    "shorten the prompt, or compile with a larger --max-seq-len if the model allows it"
                )
        self.rows = [TextRow(list(p), len(p), min(self.max_tokens, capacity - len(p))) for p in self.prompts]

    def run(self) -> list[list[int]]:
        """To the end -> the tokens that follow each prompt."""
        for _ in self:
            pass
        return [row.tokens for row in self.rows]

    def __iter__(self) -> Iterator[list[list[int]]]:
        """Yields the new tokens of each row after the prompts and after each step (none for a row that has ended)."""
        strategy, rows = self.strategy, self.rows
        strategy.rngs = [np.random.default_rng([self.seed or 0, b]) for b in range(len(rows))]
        start = time.perf_counter()
        first = strategy.begin(rows)
        self.prefill_s = time.perf_counter() - start
        strategy.clock.clear()  # the parts are those of steps; the prompts' time stands alone
        yield self._take([[token] for token in first])
        while any(row.live for row in rows):
            start = time.perf_counter()
            new = strategy.step(rows)
            seconds = time.perf_counter() - start
            taken = self._take(new)
            self.decode_s += seconds
            self.steps.append(Step(seconds, sum(len(tokens) for tokens in taken)))
            yield taken

    def _take(self, new: Sequence[Sequence[int]]) -> list[list[int]]:
        taken: list[list[int]] = []
        for row, tokens in zip(self.rows, new, strict=True):
            kept: list[int] = []
            for token in tokens if row.live else ():
                if token == self.eos_id:
                    row.finish = "eos"
                    break
                kept.append(token)
                row.ids.append(token)
                if row.left == 0:
                    row.finish = "length" if row.room == self.max_tokens else "context"
                    break
            taken.append(kept)
        return taken
