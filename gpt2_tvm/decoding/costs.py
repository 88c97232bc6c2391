"""What drafting and checking have cost so far, and the draft length that gains most at these costs.

The optimum is `theory.speculation`'s: the k with the most expected tokens a second, given how often drafted tokens
stand and what a draft step and a pass of the target over k + 1 tokens take here.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from statistics import median

from gpt2_tvm.theory import speculation

WINDOW = 15  # of the last samples the median counts: a slow moment of the machine does not
FORGET = 0.96  # a round: text changes, and with it what a draft is good for
PRIOR, PRIOR_WEIGHT = 0.6, 4.0  # the acceptance that is assumed before any was seen, worth so many tokens
FIRST = 3  # tokens to draft while nothing is known of the draft's cost
MOST = 0.99  # acceptance is never taken for certain
HOLD = 7  # rounds for which a choice holds: making it takes longer than a round's other host work
IDLE, IDLE_MOST = 16, 256  # rounds without drafts until one is tried again; twice as many each time it does not pay


class Costs:
    """Seconds, as measured: a draft step's, and a pass of the target's by the rows that it computes.

    Args:
        padded: rows that are computed for so many wanted ones (an artifact's verify widths are static).
    """

    def __init__(self, padded: Callable[[int], int]) -> None:
        self.padded = padded
        self._draft: deque[float] = deque(maxlen=WINDOW)
        self._target: dict[int, deque[float]] = {}

    def drafted(self, seconds: float, tokens: int) -> None:
        """A draft of `tokens` took `seconds`."""
        if tokens:
            self._draft.append(seconds / tokens)

    def checked(self, rows: int, seconds: float) -> None:
        """A pass of the target over `rows` took `seconds`."""
        self._target.setdefault(self.padded(rows), deque(maxlen=WINDOW)).append(seconds)

    @property
    def draft_s(self) -> float | None:
        """Seconds a draft step; None before there was one."""
        return median(self._draft) if self._draft else None

    @property
    def target(self) -> dict[int, float]:
        """Seconds of a pass by rows computed."""
        return {rows: median(samples) for rows, samples in sorted(self._target.items())}

    def target_s(self, rows: int) -> float:
        """Seconds of a pass over `rows`: `at_rows` of what was measured."""
        return at_rows(self.target, self.padded(rows))


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

    def choose(self, b: int, costs: Costs) -> int:
        """How many tokens to draft for sequence b."""
        return self.k

    def saw(self, b: int, examined: int, accepted: int) -> None:
        """Of sequence b's draft, `examined` tokens were looked at and `accepted` of them stood."""


@dataclass
class _Seen:
    k: int = 0  # the last choice, and for how many rounds more it holds
    holds: int = 0
    examined: float = 0.0
    accepted: float = 0.0
    idle: int = 0  # rounds without a draft since the last one
    patience: int = IDLE

    def add(self, examined: int, accepted: int) -> None:
        self.examined = FORGET * self.examined + examined
        self.accepted = FORGET * self.accepted + accepted


@dataclass
class Adaptive(DraftLength):
    """The length that gains most by what was measured so far, of each sequence by its own acceptance; 0 where drafting
    does not pay, with a try now and then.

    Timing decides, so two runs may draft differently: greedy text is the same all the same, sampled text has the same
    distribution but not the same tokens.
    """

    longest: int
    all: _Seen = field(default_factory=_Seen)  # of all texts so far: where the next one starts
    _rows: list[_Seen] = field(default_factory=list)

    def start(self, batch: int) -> None:
        """New texts begin, with what all before them have shown."""
        self._rows = [_Seen(idle=self.all.idle, patience=self.all.patience) for _ in range(batch)]

    def acceptance(self, b: int) -> float:
        """The share of examined tokens that is expected to stand, for sequence b."""
        row, weight = self._rows[b], PRIOR_WEIGHT
        before = (self.all.accepted + PRIOR * weight) / (self.all.examined + weight)
        return min(MOST, (row.accepted + before * weight) / (row.examined + weight))

    def choose(self, b: int, costs: Costs) -> int:
        """See `DraftLength.choose`."""
        if not costs.target:
            return 0  # the first pass shows what one without a draft takes
        row = self._rows[b]
        if row.holds and (row.k or row.idle + 1 < row.patience):
            row.holds -= 1
            row.idle += not row.k
            return row.k
        draft_s = costs.draft_s
        if draft_s is None:
            return min(FIRST, self.longest)
        rate = self.acceptance(b)
        target = costs.target  # medians, once for all lengths

        def gain(k: int) -> float:
            return speculation.speedup_measured(rate, k, draft_s, lambda m: at_rows(target, costs.padded(m)))

        k = speculation.best(rate, gain, self.longest).k
        pays = k > 0
        if pays:
            row.idle, row.patience = 0, IDLE
        else:
            row.idle += 1
            if row.idle >= row.patience:
                row.idle, row.patience, k = 0, min(2 * row.patience, IDLE_MOST), 1
        row.k, row.holds = k if pays else 0, HOLD
        self.all.idle, self.all.patience = row.idle, row.patience
        return k

    def saw(self, b: int, examined: int, accepted: int) -> None:
        """See `DraftLength.saw`."""
        if examined:
            self._rows[b].add(examined, accepted)
            self.all.add(examined, accepted)


def draft_length(text: str, longest: int) -> DraftLength:
    """From what --draft-length says: a number from 0 to 64, or "adaptive" (0 to `longest`)."""
    from gpt2_tvm.errors import UserError

    if text == "adaptive":
        return Adaptive(longest)
    if text.isdecimal() and int(text) <= speculation.LONGEST:
        return DraftLength(int(text))
    raise UserError(f"--draft-length {text}: give a number from 0 to {speculation.LONGEST}, or adaptive")
