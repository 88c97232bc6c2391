"""Drafts from the text itself where it repeats itself, and from a second model everywhere else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from gpt2_tvm.decoding.draft import Draft, ModelDraft, Proposal, check_pair
from gpt2_tvm.decoding.lengths import DraftLength
from gpt2_tvm.decoding.lookup import LookupDraft
from gpt2_tvm.decoding.sampling import Sampling
from gpt2_tvm.decoding.speculative import Speculative
from gpt2_tvm.decoding.strategy import TextRow

if TYPE_CHECKING:
    from gpt2_tvm.engine import Engine

SHORTEST = 3  # ids that must agree: a model is a better guide than two


class MixedDraft(Draft):
    """`first` proposes, and `second` for the rows where it has nothing to say."""

    def __init__(self, first: Draft, second: Draft) -> None:
        self.first, self.second = first, second

    def begin(self, rows: Sequence[TextRow], rngs: Sequence[np.random.Generator], now: bool = True) -> int:
        """See `Draft.begin`."""
        return max(self.first.begin(rows, rngs, now), self.second.begin(rows, rngs, now))

    def behind(self, rows: Sequence[TextRow]) -> list[int]:
        """See `Draft.behind`."""
        return self.second.behind(rows)

    def catch_up(self, rows: Sequence[TextRow], wanted: Sequence[bool]) -> int:
        """See `Draft.catch_up`: only for rows where the first has nothing to say."""
        said = self.first.propose(rows, [int(want) for want in wanted])
        return self.second.catch_up(rows, [w and not p.tokens for w, p in zip(wanted, said, strict=True)])

    def propose(self, rows: Sequence[TextRow], counts: Sequence[int]) -> list[Proposal]:
        """See `Draft.propose`."""
        made = self.first.propose(rows, counts)
        left = [0 if p.tokens else n for p, n in zip(made, counts, strict=True)]
        if not any(left):
            return made
        return [a if a.tokens else b for a, b in zip(made, self.second.propose(rows, left), strict=True)]


class Mixed(Speculative):
    """`Lookup` and `Speculative` in one, greedy or sampled. UserError for a draft with another tokenizer."""

    name: ClassVar[str] = "mixed"

    def __init__(self, engine: Engine, draft: Engine, length: DraftLength, sampling: Sampling | None = None) -> None:
        check_pair(engine.artifact, draft.artifact)
        both = MixedDraft(LookupDraft(SHORTEST), ModelDraft(draft, sampling))
        super().__init__(engine, both, length, sampling)
