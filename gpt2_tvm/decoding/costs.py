"""What drafting and checking have cost so far, and the draft length that gains most at these costs.

The optimum is `theory.speculation`'s: the k with the most expected tokens a second, given how often drafted tokens
stand and what a draft step and a pass of the target over k + 1 tokens take here. It is tried only as far as there is
credit for it, in plain steps of the target: some to begin with, a little for each step without a draft, and what drafts
have gained. A round that could lose more, should nothing stand, is not made. So text with adaptive drafts takes no
longer than START + (1 + EARN) * tokens of these steps, whatever the draft, as far as costs are what they were.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

from gpt2_tvm.theory import speculation

WINDOW = 15  # of the last samples the median counts: a slow moment of the machine does not
FORGET = 0.96  # a round: text changes, and with it what a draft is good for
PRIOR, PRIOR_WEIGHT = 0.6, 4.0  # the acceptance that is assumed before any was seen, worth so many tokens
MOST = 0.99  # acceptance is never taken for certain
HOLD, SURE = 7, 16  # rounds for which a choice holds (making it takes longer than a round's other host work), once so
# many tokens were looked at
IDLE, IDLE_MOST = 16, 256  # rounds without drafts until one is tried again; twice as many each time it does not pay
START, EARN, CREDIT_MOST = 1.5, 0.02, 8.0  # plain steps: credit at first (and the most that EARN makes), for each
# plain step, and the most that gains make: what was won long ago is no reason to lose as much


class Costs:
    """Seconds, as measured: a draft step's, and a pass of the target's by the rows that it computes.

    Args:
        padded: rows that are computed for so many wanted ones (an artifact's verify widths are static).
    """

    def __init__(self, padded: Callable[[int], int]) -> None:
        self.padded = padded
        self._draft: deque[float] = deque(maxlen=WINDOW)
        self._behind: deque[float] = deque(maxlen=WINDOW)
        self._target: dict[int, deque[float]] = {}

    def drafted(self, seconds: float, tokens: int) -> None:
        """A draft of `tokens` took `seconds`."""
        if tokens:
            self._draft.append(seconds / tokens)

    def caught_up(self, seconds: float, tokens: int) -> None:
        """The draft took in `tokens` of the text in `seconds`."""
        if tokens:
            self._behind.append(seconds / tokens)

    def checked(self, rows: int, seconds: float) -> None:
        """A pass of the target over `rows` took `seconds`."""
        self._target.setdefault(self.padded(rows), deque(maxlen=WINDOW)).append(seconds)

    @property
    def draft_s(self) -> float | None:
        """Seconds a draft step; None before there was one."""
        return _typical(self._draft) if self._draft else None

    @property
    def known(self) -> bool:
        """Whether there was a pass of the target."""
        return bool(self._target)

    @property
    def behind_s(self) -> float:
        """Seconds for each token of the text that a draft has yet to take in; 0 before there was one."""
        return _typical(self._behind) if self._behind else 0.0

    @property
    def target(self) -> dict[int, float]:
        """Seconds of a pass by rows computed, as measured."""
        return {rows: median(samples) for rows, samples in sorted(self._target.items())}

    @property
    def rising(self) -> dict[int, float]:
        """`target` as it is believed: more rows never take less time, and while only one or two passes were seen no
        more than as many passes over one row: a bad moment of the machine is no reason to give up a width."""
        made: dict[int, float] = {}
        for rows, samples in sorted(self._target.items()):
            seconds = _typical(samples)
            if 1 in made and len(samples) < 3:
                seconds = min(seconds, rows * made[1])
            made[rows] = max([seconds, *made.values()])
        return made

    def target_s(self, rows: int) -> float:
        """Seconds of a pass over `rows`: `at_rows` of what is believed."""
        return at_rows(self.rising, self.padded(rows))

    def round(self, k: int, behind: int = 0) -> float:
        """A round's cost in plain steps: k drafted tokens, after the draft has taken in `behind` of the text."""
        target = self.rising
        seconds = k * (self.draft_s or 0.0) + behind * self.behind_s + at_rows(target, self.padded(k + 1))
        return seconds / at_rows(target, 1)

    def risks(self, longest: int, behind: int = 0) -> list[float]:
        """What rounds of 0 … `longest` tokens lose if nothing stands, in plain steps; a pass over more rows than any
        that was measured is taken to last as much longer as it has more rows."""
        target, draft_s, late = self.rising, self.draft_s or 0.0, behind * self.behind_s
        plain, widest, made = at_rows(target, 1), max(target), [0.0]
        for k in range(1, longest + 1):
            rows = self.padded(k + 1)
            seconds = at_rows(target, rows) * max(1.0, rows / widest)
            made.append((k * draft_s + late + seconds) / plain - 1)
        return made


def _typical(samples: deque[float]) -> float:
    """The median; of fewer than three the smallest, as a first call may have something to load."""
    return median(samples) if len(samples) > 2 else min(samples)


def at_rows(measured: Mapping[int, float], rows: int) -> float:
    """Seconds for `rows` (padded), between measured ones in proportion; above the largest as the largest took, so that
    a width that was never tried looks worth a try."""
    below = max((r for r in measured if r <= rows), default=None)
    above = min((r for r in measured if r >= rows), default=None)
    if below is None or above is None:
        return measured[above if below is None else below]  # type: ignore[index]
    share = (rows - below) / (above - below) if above > below else 0.0
    return measured[below] + share * (measured[above] - measured[below])


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

    def saw(self, b: int, examined: int, accepted: int) -> None:
        """Of sequence b's draft, `examined` tokens were looked at and `accepted` of them stood."""

    def spent(self, costs: Costs, k: int, behind: int, tokens: float, passes: int = 1) -> None:
        """A round ended: k drafted tokens (the longest of the batch), `behind` taken in first, `tokens` new ones a
        sequence, by so many passes of the target."""


@dataclass
class _Seen:
    """Of one text, or of all so far."""

    k: int = 0  # the last choice, for how many rounds more it holds, and what it may lose
    holds: int = 0
    risk: float = 0.0
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
        rows = [self._rows[b] for b in live]
        if any(row.k or not row.holds for row in rows):
            return False
        for row in rows:
            row.holds -= 1
            row.idle += 1
            self.all.idle = row.idle
        return True

    def choose(self, b: int, costs: Costs, behind: int = 0) -> int:
        """See `DraftLength.choose`."""
        if not costs.known:
            return 0  # the first pass shows what one without a draft takes
        row = self._rows[b]
        if row.holds and (not row.k or self.credit >= row.risk):
            row.holds -= 1
            row.idle += not row.k
            return row.k
        draft_s = costs.draft_s
        if draft_s is None:
            return 1 if self.credit > 0 else 0  # what a draft costs is found out with one token
        rate = self.acceptance(b)
        risks = costs.risks(self.longest, behind)
        target = costs.rising  # once for all lengths

        def gain(k: int) -> float:
            return speculation.speedup_measured(rate, k, draft_s, lambda m: at_rows(target, costs.padded(m)))

        pays = speculation.best(rate, gain, self.longest).k > 0
        k = speculation.best(rate, lambda k: gain(k) if risks[k] <= self.credit else 0.0, self.longest).k if pays else 0
        if k > 0:
            row.idle, row.patience = 0, IDLE
        else:
            row.idle += 1
            # full credit is enough where the draft is at hand: a cost may have been measured in a bad moment
            allowed = risks[1] <= self.credit or (self.credit >= START and not behind)
            if row.idle >= row.patience and allowed:
                row.idle, row.patience, k = 0, min(2 * row.patience, IDLE_MOST), 1
        tried = k > 0 and row.patience > IDLE
        row.k, row.risk = (0 if tried else k), risks[k]
        if k > 0:
            row.holds = HOLD if self.all.examined >= SURE and not tried else 0
        elif pays or row.idle >= row.patience:  # only credit lacks, which comes by and by
            row.holds = HOLD
        else:  # nothing will be learnt until the next try
            row.holds = row.patience - row.idle - 1
        self.all.idle, self.all.patience = row.idle, row.patience
        return k

    def saw(self, b: int, examined: int, accepted: int) -> None:
        """See `DraftLength.saw`."""
        if examined:
            self._rows[b].add(examined, accepted)
            self.all.add(examined, accepted)

    def spent(self, costs: Costs, k: int, behind: int, tokens: float, passes: int = 1) -> None:
        """See `DraftLength.spent`."""
        if k:
            self.credit = min(self.credit + tokens - costs.round(k, behind) - (passes - 1), CREDIT_MOST)
        elif self.credit < START:
            self.credit += EARN


def draft_length(text: str, longest: int) -> DraftLength:
    """From what --draft-length says: a number from 0 to 64, or "adaptive" (0 to `longest`)."""
    from gpt2_tvm.errors import UserError

    if text == "adaptive":
        return Adaptive(longest)
    if text.isdecimal() and int(text) <= speculation.LONGEST:
        return DraftLength(int(text))
    raise UserError(f"--draft-length {text}: give a number from 0 to {speculation.LONGEST}, or adaptive")
