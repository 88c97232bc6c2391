"""How many tokens to draft: as many as told, or as many as gain most by what the clock has said so far.

The optimum is `theory.speculation`'s: the k with the most expected tokens a second, given how often drafted tokens
stand and what a draft step and a round that checks k + 1 tokens take here. It is tried only as far as there is credit
for it, in plain steps of the target: some to begin with, a little for each step without a draft, and what drafts have
gained. Every round is charged what the clock says of it, first ones and tries too; one that could lose more than there
is, should nothing stand, is not made. So a text with adaptive drafts takes no longer than START + (1 + EARN) * tokens
of these steps, whatever the draft, as far as a round's cost is what it was in the rounds before.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from gpt2_tvm.decoding.costs import Costs
from gpt2_tvm.theory import speculation

FORGET = 0.96  # a round: text changes, and with it what a draft is good for
PRIOR, PRIOR_WEIGHT = 0.6, 4.0  # the acceptance that is assumed before any was seen, worth so many tokens
MOST = 0.99  # acceptance is never taken for certain
HOLD, SURE = 7, 16  # rounds for which a choice holds, once so many tokens were looked at
IDLE, IDLE_MOST = 16, 256  # rounds without drafts until one is tried again; twice as many each time it does not pay
# plain steps: credit of a text at first (what other texts won is no reason to lose as much in this one), for each plain
# step, how much these make, and how much gains make
START, EARN, EARN_MOST, CREDIT_MOST = 2.5, 0.008, 4.0, 8.0


class DraftLength:
    """A fixed number of tokens to draft in each round."""

    def __init__(self, k: int) -> None:
        self.k = k

    def start(self, batch: int) -> None:
        """New texts begin."""

    def wants_draft(self) -> bool:
        """Whether a draft should take in new prompts at once; otherwise it does when it is first asked."""
        return self.k > 0

    def rests(self, live: Sequence[int]) -> bool:
        """Whether none of these sequences is to have a draft in this round, said at once; else `choose` says."""
        return self.k == 0

    def choose(self, b: int, costs: Costs, behind: int = 0) -> int:
        """How many tokens to draft for sequence b; the draft has yet to take in `behind` tokens of its text."""
        return self.k

    def affords(self, k: int, costs: Costs) -> bool:
        """Whether a round of k tokens may be made that an earlier choice has prepared."""
        return True

    def saw(self, b: int, examined: int, accepted: int) -> None:
        """Of sequence b's draft, `examined` tokens were looked at and `accepted` of them stood."""

    def spent(self, costs: Costs, seconds: float, k: int, behind: int, tokens: float, passes: int = 1) -> None:
        """A round of `seconds` in all ended: k drafted tokens (the longest of the batch), `behind` taken in first,
        `tokens` new ones a sequence, by so many passes of the target."""

    def plain(self, costs: Costs, beside: float = 0.0, steps: int = 1) -> None:
        """So many steps without drafts; it took `beside` seconds to find that out."""


@dataclass
class _Seen:
    """Of one text, or of all so far."""

    k: int = 0  # the last choice, for how many rounds more it holds, and what it may lose
    holds: int = 0
    risk: float = 0.0
    wakes: float = math.inf  # the credit with which a choice of nothing no longer holds
    examined: float = 0.0
    accepted: float = 0.0
    idle: int = 0  # rounds without a draft since the last one
    patience: int = IDLE

    def add(self, examined: int, accepted: int) -> None:
        self.examined = FORGET * self.examined + examined
        self.accepted = FORGET * self.accepted + accepted


@dataclass
class Adaptive(DraftLength):
    """The length that gains most by what was measured so far, of each sequence by its own acceptance, as far as there
    is credit for it; 0 where drafting does not pay, with a try now and then.

    Timing decides, so two runs may draft differently: greedy text is the same all the same, sampled text has the same
    distribution but not the same tokens.

    Attributes:
        credit: how many plain steps of the target drafts may lose.
    """

    longest: int
    credit: float = START
    all: _Seen = field(default_factory=_Seen)  # of all texts so far: where the next one starts
    _rows: list[_Seen] = field(default_factory=list)

    def start(self, batch: int) -> None:
        """New texts begin, with what all before them have shown."""
        self._rows = [_Seen(idle=self.all.idle, patience=self.all.patience) for _ in range(batch)]
        self.credit = min(self.credit, START)

    def wants_draft(self) -> bool:
        """See `DraftLength.wants_draft`: not while drafts do not pay, unless it is time for another try."""
        return self.all.idle == 0 or self.all.idle >= self.all.patience

    def acceptance(self, b: int) -> float:
        """The share of examined tokens that is expected to stand, for sequence b."""
        row, weight = self._rows[b], PRIOR_WEIGHT
        before = (self.all.accepted + PRIOR * weight) / (self.all.examined + weight)
        return min(MOST, (row.accepted + before * weight) / (row.examined + weight))

    def rests(self, live: Sequence[int]) -> bool:
        """See `DraftLength.rests`: as long as choices of 0 hold."""
        rows = self._rows
        for b in live:
            row = rows[b]
            if row.k or not row.holds or self.credit >= row.wakes:
                return False
        for b in live:
            rows[b].holds -= 1
            rows[b].idle += 1
            self.all.idle = rows[b].idle
        return True

    def choose(self, b: int, costs: Costs, behind: int = 0) -> int:
        """See `DraftLength.choose`."""
        if not costs.known:
            return 0  # the first pass shows what one without a draft takes
        row = self._rows[b]
        if row.holds and (self.credit >= row.risk if row.k else self.credit < row.wakes):
            row.holds -= 1
            row.idle += not row.k
            return row.k
        if costs.draft_s is None:
            return 1 if self.credit > 0 else 0  # what a draft costs is found out with one token
        risks = costs.risks(self.longest, behind)
        gains = self._gains(self.acceptance(b), costs)
        pays = max(gains) > 1.0
        k = 0
        if pays:
            k = max(range(self.longest + 1), key=lambda k: (gains[k] if risks[k] <= self.credit else 0.0, -k))
        if k > 0:
            row.idle, row.patience = 0, IDLE
        else:
            row.idle += 1
            # full credit is enough where the draft is at hand: a cost may have been measured in a bad moment
            allowed = risks[1] <= self.credit or (self.credit >= START and not behind)
            if row.idle >= row.patience and allowed:
                row.idle, row.patience, k = 0, min(2 * row.patience, IDLE_MOST), 1
        tried = k > 0 and row.patience > IDLE
        row.k, row.risk, row.wakes = (0 if tried else k), risks[k], math.inf
        if k > 0:
            row.holds = HOLD if self.all.examined >= SURE and not tried else 0
        elif pays or row.idle >= row.patience:  # only credit lacks, which comes by and by
            row.wakes = min(r for r, gain in zip(risks, gains, strict=True) if gain > 1) if pays else risks[1]
            row.holds = IDLE_MOST
        else:  # nothing will be learnt until the next try
            row.holds = row.patience - row.idle - 1
        self.all.idle, self.all.patience = row.idle, row.patience
        return k

    def affords(self, k: int, costs: Costs) -> bool:
        """See `DraftLength.affords`."""
        return costs.risks(k)[k] <= self.credit

    def _gains(self, rate: float, costs: Costs) -> list[float]:
        """`speculation.speedup_measured` of 0 … `longest` drafted tokens."""
        checks, draft_s = costs.check_s(self.longest), costs.draft_s or 0.0
        tokens, stands, gains = 1.0, 1.0, [1.0]
        for k in range(1, self.longest + 1):
            stands *= rate
            tokens += stands
            gains.append(tokens * checks[0] / (k * draft_s + checks[k]))
        return gains

    def saw(self, b: int, examined: int, accepted: int) -> None:
        """See `DraftLength.saw`."""
        if examined:
            self._rows[b].add(examined, accepted)
            self.all.add(examined, accepted)

    def spent(self, costs: Costs, seconds: float, k: int, behind: int, tokens: float, passes: int = 1) -> None:
        """See `DraftLength.spent`."""
        if costs.known:
            self.credit = min(self.credit + tokens - costs.charged(seconds, k, behind, passes), CREDIT_MOST)

    def plain(self, costs: Costs, beside: float = 0.0, steps: int = 1) -> None:
        """See `DraftLength.plain`: what a look for a draft took is charged, found or not."""
        if self.credit < EARN_MOST:
            self.credit = min(self.credit + steps * EARN, EARN_MOST)
        if beside > 0.0:
            self.credit -= min(beside / costs.plain_s, 1.0)


def draft_length(text: str, longest: int) -> DraftLength:
    """From what --draft-length says: a number from 0 to 64, or "adaptive" (0 to `longest`)."""
    from gpt2_tvm.errors import UserError

    if text == "adaptive":
        return Adaptive(longest)
    if text.isdecimal() and int(text) <= speculation.LONGEST:
        return DraftLength(int(text))
    raise UserError(f"--draft-length {text}: give a number from 0 to {speculation.LONGEST}, or adaptive")
