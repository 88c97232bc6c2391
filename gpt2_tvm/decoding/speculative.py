"""A draft proposes tokens, one pass of the target checks them all, and what it would not have written is rolled back.

Greedy text is the target's own greedy text; sampled text has the target's own distribution (`rejection`).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from gpt2_tvm.decoding.costs import Costs
from gpt2_tvm.decoding.device_checks import DeviceChecks, can_check
from gpt2_tvm.decoding.draft import Draft, ModelDraft, Proposal, check_pair
from gpt2_tvm.decoding.lengths import DraftLength
from gpt2_tvm.decoding.rejection import TIE, accept_greedy, accept_sampled, near_tie
from gpt2_tvm.decoding.sampling import Sampling
from gpt2_tvm.decoding.strategy import SPARE, Strategy, TextRow, park
from gpt2_tvm.errors import UserError

if TYPE_CHECKING:
    from gpt2_tvm.engine import Engine


class Speculative(Strategy):
    """Any draft with any target.

    Args:
        engine: the target's; its artifact needs verify widths.
        draft: what proposes.
        length: how many tokens in each round.
        sampling: as for `Strategy`; the draft's must be the same.

    Attributes:
        costs: what drafting and checking took, the host's work included.
    """

    name: ClassVar[str] = "speculative"

    def __init__(self, engine: Engine, draft: Draft, length: DraftLength, sampling: Sampling | None = None) -> None:
        super().__init__(engine, sampling)
        if not engine.artifact.verify_widths:
            raise UserError(f"{engine.artifact.path} was compiled without verify; compile with --verify-widths 4,8")
        self.draft, self.length = draft, length
        self.costs = Costs(self._padded)
        self._checks = DeviceChecks(engine) if self.sampling.greedy and can_check(engine) else None
        self._tie = TIE if engine.artifact.manifest["compute_dtype"] == "float32" else None

    def begin(self, rows: Sequence[TextRow]) -> list[int]:
        """See `Strategy.begin`."""
        first = super().begin(rows)
        self.length.start(len(rows), min(row.room for row in rows))
        start = time.perf_counter()
        taken = self.draft.begin(rows, self.rngs, self.length.wants_draft())
        self.costs.caught_up(time.perf_counter() - start, taken)
        return first

    def step(self, rows: Sequence[TextRow]) -> list[list[int]]:
        """See `Strategy.step`: for each row the drafted tokens that stand and one of the target's own."""
        begun = time.perf_counter()
        if self.length.rests([b for b, row in enumerate(rows) if row.live]):
            return self._plain(rows, 0.0)
        behind = self.draft.behind(rows)
        # one token is always the target's own: a draft never overruns what may still come, nor the context
        counts = [
            min(self.length.choose(b, self.costs, behind[b]), row.left - 1) if row.live and row.left > 1 else 0
            for b, row in enumerate(rows)
        ]
        late = self._catch_up(rows, counts) if any(n for n, count in zip(behind, counts, strict=True) if count) else 0
        drafted = self._propose(rows, counts)
        proposed = time.perf_counter()
        if not any(p.tokens for p in drafted):
            return self._plain(rows, proposed - begun)
        given = [[row.ids[-1], *p.tokens] if row.live else [SPARE] for row, p in zip(rows, drafted, strict=True)]
        with self.clock("rollback"):
            park(self.engine, rows)
        base = self.engine.positions.copy()
        if self._checks is not None and max(map(len, given)) <= self._checks.longest + 1:
            with self.clock("verify"):
                drafts = [p.tokens if row.live else None for row, p in zip(rows, drafted, strict=True)]
                told = self._checks([row.ids for row in rows], drafts)
            new, doubtful = [t.tokens for t in told], [t.doubtful for t in told]
        else:
            logits = self._verify(given)
            with self.clock("sample"):
                new, doubtful = self._accept(rows, drafted, logits)
            with self.clock("rollback"):
                self.engine.rewind([int(at) + max(1, len(n)) for at, n in zip(base, new, strict=True)])
        for row in rows:
            row.steps += row.live
        if any(doubtful):
            self._decide(rows, given, base, new, doubtful)
        for b, (row, p) in enumerate(zip(rows, drafted, strict=True)):
            if row.live:
                accepted = len(new[b]) - 1
                examined = min(accepted + 1, len(p.tokens))
                row.drafted += len(p.tokens)
                row.examined += examined
                row.accepted += accepted
                self.length.saw(b, examined, accepted)
        fresh = [len(n) for n, row in zip(new, rows, strict=True) if row.live]
        longest = max(len(p.tokens) for p in drafted)
        ended = time.perf_counter()
        if not any(doubtful):
            self.costs.checked(longest + 1, ended - proposed)
        self.length.spent(self.costs, ended - begun, longest, late, sum(fresh) / len(fresh), 1 + any(doubtful))
        return new

    def _plain(self, rows: Sequence[TextRow], beside: float) -> list[list[int]]:
        """A step without drafts: what greedy or sample do, after `beside` seconds in search of one."""
        start = time.perf_counter()
        logits = self.decode(rows)
        with self.clock("sample"):
            new = [[token] for token in self.choose(logits, rows)]
        self.costs.checked(1, time.perf_counter() - start)
        self.length.plain(self.costs, beside)
        return new

    def _catch_up(self, rows: Sequence[TextRow], counts: Sequence[int]) -> int:
        with self.clock("draft"):
            start = time.perf_counter()
            taken = self.draft.catch_up(rows, [count > 0 for count in counts])
            self.costs.caught_up(time.perf_counter() - start, taken)
        return taken

    def _propose(self, rows: Sequence[TextRow], counts: Sequence[int]) -> list[Proposal]:
        if not any(counts):
            return [Proposal() for _ in rows]
        with self.clock("draft"):
            start = time.perf_counter()
            made = self.draft.propose(rows, counts)
            # a round that finds nothing costs as well; it counts as one token's draft
            self.costs.drafted(time.perf_counter() - start, max(1, *(len(p.tokens) for p in made)))
        return made

    def _verify(self, given: Sequence[Sequence[int]]) -> np.ndarray:
        """Logits [batch, rows, vocab] after each given token."""
        with self.clock("verify"):
            return self.engine.verify(given)

    def _accept(
        self, rows: Sequence[TextRow], drafted: Sequence[Proposal], logits: np.ndarray
    ) -> tuple[list[list[int]], list[bool]]:
        """The new tokens of each row; and whether the last of them is too near a tie to be taken from verify."""
        new: list[list[int]] = []
        doubtful = [False] * len(rows)
        for b, (row, p) in enumerate(zip(rows, drafted, strict=True)):
            if not row.live:
                new.append([])
                continue
            if self.sampling.greedy:
                best = logits[b, : len(p.tokens) + 1].argmax(-1)
                stand = accept_greedy(best.tolist(), p.tokens)
                if self._tie is not None:
                    tie = near_tie(logits[b, : stand + 1], self._tie)
                    if tie is not None:
                        stand, doubtful[b] = tie, True
                following = int(best[stand])
            else:
                stand, following = accept_sampled(
                    lambda i, at=b: self.sampling.probabilities(logits[at, i]),  # type: ignore[misc]
                    p.tokens,
                    p.shares,
                    self.rngs[b],
                )
            new.append([*p.tokens[:stand], following])
        return new, doubtful

    def _decide(
        self,
        rows: Sequence[TextRow],
        given: Sequence[Sequence[int]],
        base: np.ndarray,
        new: list[list[int]],
        doubtful: Sequence[bool],
    ) -> None:
        """Replace the last new token of doubtful rows by what a decode step says."""
        ends = [int(at) + max(1, len(n)) for at, n in zip(base, new, strict=True)]
        with self.clock("rollback"):
            self.engine.rewind([end - doubt for end, doubt in zip(ends, doubtful, strict=True)])
        with self.clock("verify"):
            again = [ids[len(n) - 1] if doubt else SPARE for ids, n, doubt in zip(given, new, doubtful, strict=True)]
            logits = self.engine.decode(again)
        with self.clock("rollback"):
            self.engine.rewind(ends)
        for b, row in enumerate(rows):
            if doubtful[b]:
                new[b][-1] = int(logits[b].argmax())
                row.steps += 1

    def _padded(self, rows: int) -> int:
        return padded_rows(self.engine.artifact.verify_widths, rows)


def padded_rows(widths: Sequence[int], rows: int) -> int:
    """Rows that a target with these verify widths computes when `rows` are wanted."""
    if rows <= 1:
        return 1
    whole, rest = divmod(rows, widths[-1])
    return whole * widths[-1] + (next(w for w in widths if w >= rest) if rest else 0)


def with_model(engine: Engine, draft: Engine, length: DraftLength, sampling: Sampling | None = None) -> Speculative:
    """The usual pair: a small model drafts. UserError for one with another tokenizer, or for fewer batch sizes."""
    check_pair(engine.artifact, draft.artifact)
    return Speculative(engine, ModelDraft(draft, sampling), length, sampling)
