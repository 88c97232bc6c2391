"""Drafts of a known quality: the target's own next token with a given probability, another one otherwise.

For checking the theory: with weights that are random no real draft agrees, and of a trained pair nobody can choose the
acceptance.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gpt2_tvm.decoding.draft import Draft, ModelDraft, Proposal
from gpt2_tvm.decoding.strategy import TextRow
from gpt2_tvm.errors import UserError


class Plan:
    """What will be drafted.

    Args:
        rate: probability with which each token is the target's own, independent of all others.
        texts: the target's greedy tokens after each prompt, of each row.
        vocab: size of the vocabulary, at least 2.
        seed: of the chance.
    """

    def __init__(self, rate: float, texts: Sequence[Sequence[int]], vocab: int, seed: int = 0) -> None:
        if not 0 <= rate <= 1:
            raise UserError(f"--planted-acceptance {rate:g}: give a probability from 0 to 1")
        self.rate, self.texts, self.vocab = rate, texts, vocab
        self._rng = np.random.default_rng([seed, 1])

    def token(self, b: int, row: TextRow, i: int) -> int:
        """The i-th drafted token after rows[b].ids."""
        at, text = len(row.ids) - row.prompt_tokens + i, self.texts[b]
        right = text[at] if at < len(text) else 0
        return right if self._rng.random() < self.rate else (right + 1) % self.vocab


class PlantedDraft(Draft):
    """`Plan` for nothing: what drafts that cost no time would gain."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    def propose(self, rows: Sequence[TextRow], counts: Sequence[int]) -> list[Proposal]:
        """See `Draft.propose`."""
        tokens = [[self.plan.token(b, row, i) for i in range(counts[b])] for b, row in enumerate(rows)]
        return [Proposal(ids, [None] * len(ids)) for ids in tokens]


class PlantedModelDraft(ModelDraft):
    """`Plan` at the cost of a model, which is run as if the tokens were its own: its cache counts as holding them."""

    plan: Plan

    def propose(self, rows: Sequence[TextRow], counts: Sequence[int]) -> list[Proposal]:
        """See `Draft.propose`."""
        made = super().propose(rows, counts)
        for b, (row, p) in enumerate(zip(rows, made, strict=True)):
            p.tokens = [self.plan.token(b, row, i) for i in range(len(p.tokens))]
            self._guessed[b] = p.tokens[: len(self._guessed[b])]
        return made
