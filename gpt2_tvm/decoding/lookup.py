"""Drafts without a model: the text's last few ids, found earlier in it, are followed by what followed them there.

After Saxena 2023, "Prompt Lookup Decoding". Good where a text repeats its prompt: summaries, edits, code, and the loops
that greedy text of small models falls into.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from gpt2_tvm.decoding.draft import Draft, Proposal
from gpt2_tvm.decoding.lengths import DraftLength
from gpt2_tvm.decoding.sampling import Sampling
from gpt2_tvm.decoding.speculative import Speculative
from gpt2_tvm.decoding.strategy import TextRow

if TYPE_CHECKING:
    from gpt2_tvm.engine import Engine

LONGEST, SHORTEST = 4, 2  # ids that must agree: the longest match is looked for first


class Index:
    """Where each run of ids was last seen, growing with the text. One dictionary look-up a length and a token."""

    def __init__(self, shortest: int = SHORTEST) -> None:
        self.ids: list[int] = []
        self.shortest = shortest
        self._after: dict[tuple[int, ...], int] = {}

    def extend(self, ids: Sequence[int]) -> None:
        """Take in the ids that follow."""
        for token in ids:
            # a run is entered when the id after it comes, so that the text's own end never finds itself
            for n in range(self.shortest, LONGEST + 1):
                if len(self.ids) >= n:
                    self._after[tuple(self.ids[-n:])] = len(self.ids)
            self.ids.append(token)

    def following(self, count: int) -> list[int]:
        """What followed the text's last ids the last time: `count` ids, or none where there was no such time.

        A copy that reaches the text's end goes on with what it has copied.
        """
        for n in range(min(LONGEST, len(self.ids)), self.shortest - 1, -1):
            at = self._after.get(tuple(self.ids[-n:]))
            if at is not None:
                text = list(self.ids[at:])
                while len(text) < count:
                    text += text[: count - len(text)]
                return text[:count]
        return []


class LookupDraft(Draft):
    """`Index` of every row, its prompt and what was written since."""

    def __init__(self, shortest: int = SHORTEST) -> None:
        self.shortest = shortest
        self._indices: list[Index] = []

    def begin(self, rows: Sequence[TextRow], rngs: Sequence[np.random.Generator], now: bool = True) -> int:
        """See `Draft.begin`: prompts are indexed at once, which costs next to nothing."""
        self._indices = [Index(self.shortest) for _ in rows]
        for index, row in zip(self._indices, rows, strict=True):
            index.extend(row.ids)
        return 0

    def propose(self, rows: Sequence[TextRow], counts: Sequence[int]) -> list[Proposal]:
        """See `Draft.propose`."""
        made = []
        for index, row, count in zip(self._indices, rows, counts, strict=True):
            index.extend(row.ids[len(index.ids) :])
            tokens = index.following(count) if count else []
            made.append(Proposal(tokens, [None] * len(tokens)))
        return made


class Lookup(Speculative):
    """Speculation with drafts from the text itself, greedy or sampled."""

    name: ClassVar[str] = "lookup"

    def __init__(self, engine: Engine, length: DraftLength, sampling: Sampling | None = None) -> None:
        super().__init__(engine, LookupDraft(), length, sampling)
