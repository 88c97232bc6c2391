"""`Speculative` with a model as its draft, where draft, check and accept stay on the device."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from gpt2_tvm.decoding.costs import Costs
from gpt2_tvm.decoding.device_rounds import DeviceRounds, Told
from gpt2_tvm.decoding.draft import check_pair
from gpt2_tvm.decoding.lengths import DraftLength
from gpt2_tvm.decoding.sampling import Sampling
from gpt2_tvm.decoding.speculative import padded_rows
from gpt2_tvm.decoding.strategy import SPARE, Strategy, TextRow, park
from gpt2_tvm.decoding.tokens import DEVICE_STEPS
from gpt2_tvm.errors import UserError

if TYPE_CHECKING:
    from gpt2_tvm.engine import Engine

TRIAL = 8  # draft steps in a row that say what one takes: inside a round nobody can tell


class DeviceSpeculative(Strategy):
    """A round is one submission and one read-back, however many tokens it drafts (`DeviceRounds`).

    Args:
        engine, draft: for which `device_rounds.usable` is true.
        length: as for `Speculative`.
        sampling: greedy, or a temperature alone. The device's draws are other ones than the host's: a seed gives the
            same text again, but another than without these rounds.

    Attributes:
        costs: a draft step's seconds are those of a trial before the first text; a check's are what a round takes
            beside its draft steps. The clock splits a round in the same proportion.
        rounds: the device's state.
    """

    name: ClassVar[str] = "speculative"

    def __init__(self, engine: Engine, draft: Engine, length: DraftLength, sampling: Sampling | None = None) -> None:
        super().__init__(engine, sampling)
        check_pair(engine.artifact, draft.artifact)
        if self.sampling.top_k or self.sampling.top_p < 1:
            raise UserError("speculation on the device draws from the whole vocabulary; leave --top-k and --top-p out")
        self.length = length
        self.rounds = DeviceRounds(engine, draft, self.sampling.temperature)
        self.costs = Costs(lambda rows: padded_rows(engine.artifact.verify_widths, rows))
        self._step_s: float | None = None  # of the draft

    def begin(self, rows: Sequence[TextRow]) -> list[int]:
        """See `Strategy.begin`."""
        first = super().begin(rows)
        draft = self.rounds.draft
        draft.reset()
        self.rounds.fresh = False
        if not self.sampling.greedy:
            self.rounds.seeds = np.array([rng.integers(2**31) for rng in self.rngs], np.int32)
        self.length.start(len(rows), min(row.room for row in rows))
        if self.length.wants_draft():
            start = time.perf_counter()
            draft.prefill([row.ids for row in rows])
            self.costs.caught_up(time.perf_counter() - start, max(len(row.ids) for row in rows))
            if self._step_s is None:
                self._try_steps(rows)
        return first

    def _try_steps(self, rows: Sequence[TextRow]) -> None:
        draft = self.rounds.draft
        steps = min(TRIAL, draft.max_seq_len - max(len(row.ids) for row in rows))
        if steps > 0:
            draft.decode_greedy(steps, [row.ids[-1] for row in rows])  # its first call may have something to load
            draft.rewind([len(row.ids) for row in rows])
            start = time.perf_counter()
            draft.decode_greedy(steps, [row.ids[-1] for row in rows])
            self._step_s = (time.perf_counter() - start) / steps
            draft.rewind([len(row.ids) for row in rows])

    def step(self, rows: Sequence[TextRow]) -> list[list[int]]:
        """See `Strategy.step`: for each row the drafted tokens that stand and one of the target's own."""
        begun = time.perf_counter()
        if self.length.rests([b for b, row in enumerate(rows) if row.live]):
            return self._plain(rows, 0.0)
        counts = [self._count(b, row) for b, row in enumerate(rows)]
        if not any(counts):
            return self._plain(rows, time.perf_counter() - begun)
        # the draft takes one step more than there are tokens, for every row as many as for the longest
        room = min(self.engine.max_seq_len - len(row.ids) for row, n in zip(rows, counts, strict=True) if n)
        counts = [n if n is None else min(n, room) for n in counts]
        start = time.perf_counter()
        with self.clock("draft"):
            caught_up = self._catch_up(rows, counts)
            caught_up_s = time.perf_counter() - start
        start = time.perf_counter()
        with self.clock("verify"):
            told = self.rounds.round([row.ids for row in rows], counts)
        k = max(n or 0 for n in counts)
        draft_s = min((self._step_s or 0.0) * (k + 1), time.perf_counter() - start)
        self.clock.move("verify", "draft", draft_s)
        if caught_up:
            self.costs.caught_up(caught_up_s, caught_up)
        new = [t.tokens for t in told]
        self._decide(rows, told, new)
        for b, (row, n) in enumerate(zip(rows, counts, strict=True)):
            if n is not None:
                row.steps += 1
                accepted = len(new[b]) - 1
                examined = min(accepted + 1, n)
                row.drafted, row.examined = row.drafted + n, row.examined + examined
                row.accepted += accepted
                self.length.saw(b, examined, accepted)
        live = [n for n, row in zip(new, rows, strict=True) if row.live]
        passes, ended = 1 + any(t.doubtful for t in told), time.perf_counter()
        self.costs.drafted(draft_s, k)
        if passes == 1:
            self.costs.checked(k + 1, ended - start - draft_s)
        self.length.spent(self.costs, ended - begun, k, caught_up, sum(map(len, live)) / len(live), passes)
        return new

    def _count(self, b: int, row: TextRow) -> int | None:
        if not row.live:
            return None
        draft = self.rounds.draft
        behind = len(row.ids) - 1 - (int(draft.positions[b]) if draft.batch else 0)
        longest = min(self.rounds.longest, row.left - 1)
        return min(self.length.choose(b, self.costs, behind), longest) if longest else 0

    def _catch_up(self, rows: Sequence[TextRow], counts: Sequence[int | None]) -> int:
        """Give the draft what it has not seen of the texts that it is to draft for -> how many tokens, at most."""
        draft = self.rounds.draft
        if draft.batch == 0:
            missing = [row.ids[:-1] if n else [] for row, n in zip(rows, counts, strict=True)]
            cached = [0] * len(rows)
        else:
            cached = [int(at) for at in draft.positions]
            missing = [row.ids[at:-1] if n else [] for row, n, at in zip(rows, counts, cached, strict=True)]
        most = max(map(len, missing))
        if not most:
            return 0
        self.rounds.fresh = False
        if (
            draft.batch
        ):  # a row with nothing to take in is given a spare token; it must not stand where there is no room
            cached = [min(at, draft.max_seq_len - 1) if not m else at for at, m in zip(cached, missing, strict=True)]
            draft.rewind(cached)
        given = [m or [SPARE] for m in missing]
        widths = draft.artifact.verify_widths
        if draft.batch and widths and most <= widths[-1]:
            draft.verify(given)
        else:
            draft.prefill(given)
        draft.rewind([at + len(m) for at, m in zip(cached, missing, strict=True)])
        return most

    def _plain(self, rows: Sequence[TextRow], beside: float) -> list[list[int]]:
        """Without drafts: what `Greedy` does on a GPU, a few tokens of a single text between two read-backs."""
        self.rounds.fresh = False
        start = time.perf_counter()
        n = min(DEVICE_STEPS, rows[0].left)
        if len(rows) > 1 or n == 1 or not self.sampling.greedy or self.engine.artifact.kind == "cpu":
            logits = self.decode(rows)
            new = [[token] for token in self.choose(logits, rows)]
            self.costs.checked(1, time.perf_counter() - start)
            self.length.plain(self.costs, beside)
            return new
        row = rows[0]
        with self.clock("verify"):
            run = self.engine.decode_greedy(n, row.ids[-1])
        best = self.engine.best
        assert best is not None
        row.steps += n
        self.costs.checked(1, (time.perf_counter() - start) / n)
        self.length.plain(self.costs, beside, n)
        return [[*(int(token) for token in run[0, 1:]), int(best[0])]]

    def _decide(self, rows: Sequence[TextRow], told: Sequence[Told], new: list[list[int]]) -> None:
        """Replace the last new token of doubtful rows by what a decode step says."""
        if not any(t.doubtful for t in told):
            return
        ends = self.engine.positions.copy()
        park(self.engine, rows)
        parked = self.engine.positions.copy()
        self.engine.rewind([int(at) - t.doubtful for at, t in zip(parked, told, strict=True)])
        before = [[row.ids[-1], *n][-2] if t.doubtful else SPARE for row, n, t in zip(rows, new, told, strict=True)]
        with self.clock("verify"):
            logits = self.engine.decode(before)
        self.engine.rewind([min(int(a), int(b)) for a, b in zip(ends, self.engine.positions, strict=True)])
        self.rounds.fresh = False
        for b, (row, t) in enumerate(zip(rows, told, strict=True)):
            if t.doubtful:
                new[b][-1] = int(np.argmax(logits[b]))
                row.steps += 1
