"""What rounds have cost so far, as the clock says: a draft step, a pass of the target with all that the host does for
it, and a step without drafts, in which greedy decoding makes one token."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from gpt2_tvm.decoding.samples import STALL, Samples


class Costs:
    """Seconds, as measured: a draft step's, and a round's without its draft, by the rows that the target computes.

    Args:
        padded: rows that are computed for so many wanted ones (an artifact's verify widths are static).
    """

    def __init__(self, padded: Callable[[int], int]) -> None:
        self.padded = padded
        self._draft, self._behind = Samples(), Samples()
        self._target: dict[int, Samples] = {}
        self._rising: dict[int, float] | None = None
        self._checks: list[float] = []  # by drafted tokens

    def drafted(self, seconds: float, tokens: int) -> None:
        """A draft of `tokens` took `seconds`."""
        if tokens:
            self._draft.add(seconds / tokens)

    def caught_up(self, seconds: float, tokens: int) -> None:
        """The draft took in `tokens` of the text in `seconds`."""
        if tokens:
            self._behind.add(seconds / tokens)

    def checked(self, rows: int, seconds: float) -> None:
        """A round whose target had `rows` took `seconds` beside its draft; of one row, that is a plain step."""
        padded = self.padded(rows)
        samples = self._target.get(padded)
        if samples is None:
            samples = self._target[padded] = Samples()
        samples.add(seconds)
        self._rising, self._checks = None, []

    @property
    def draft_s(self) -> float | None:
        """Seconds a draft step; None before there was one."""
        return self._draft.typical if len(self._draft) else None

    @property
    def known(self) -> bool:
        """Whether there was a plain step."""
        return 1 in self._target

    @property
    def plain_s(self) -> float:
        """Seconds a plain step on the average, what held the machine up left out."""
        return self._target[1].mean

    @property
    def behind_s(self) -> float:
        """Seconds for each token of the text that a draft has yet to take in; 0 before there was one."""
        return self._behind.typical if len(self._behind) else 0.0

    @property
    def target(self) -> dict[int, float]:
        """Seconds by rows computed, as measured."""
        return {rows: samples.median for rows, samples in sorted(self._target.items())}

    @property
    def rising(self) -> dict[int, float]:
        """`target` as it is believed: more rows never take less time, and while only one or two passes were seen no
        more than as many passes over one row: a bad moment of the machine is no reason to give up a width."""
        if self._rising is None:
            self._rising = {}
            most = 0.0
            for rows, samples in sorted(self._target.items()):
                seconds = samples.typical
                if 1 in self._rising and len(samples) < 3:
                    seconds = min(seconds, rows * self._rising[1])
                most = self._rising[rows] = max(seconds, most)
        return self._rising

    def check_s(self, longest: int) -> list[float]:
        """Seconds of a round's check with 0 … `longest` drafted tokens, as believed."""
        while len(self._checks) <= longest:
            self._checks.append(at_rows(self.rising, self.padded(len(self._checks) + 1)))
        return self._checks

    def round_s(self, k: int, behind: int = 0) -> float:
        """Seconds of a round: k drafted tokens, after the draft has taken in `behind` of the text."""
        return k * (self.draft_s or 0.0) + behind * self.behind_s + self.check_s(k)[k]

    def charged(self, seconds: float, k: int, behind: int, passes: int) -> float:
        """A round's `seconds` in plain steps. One that was held up counts as STALL times what such rounds take: that
        could have happened to any other."""
        usual = self.round_s(k, behind) + (passes - 1) * self.check_s(0)[0]
        return min(seconds, STALL * usual) / self.plain_s

    def risks(self, longest: int, behind: int = 0) -> list[float]:
        """What rounds of 0 … `longest` tokens lose if nothing stands, in plain steps; a pass over more rows than any
        that was measured is taken to last longer by what its rows took there, one with another."""
        checks, draft_s, late = self.check_s(longest), self.draft_s or 0.0, behind * self.behind_s
        widest, made = max(self.rising), [0.0]
        a_row = (self.rising[widest] - checks[0]) / (widest - 1) if widest > 1 else checks[0]
        for k in range(1, longest + 1):
            seconds = checks[k] + a_row * max(0, self.padded(k + 1) - widest)
            made.append((k * draft_s + late + seconds) / checks[0] - 1)
        return made


def at_rows(measured: Mapping[int, float], rows: int) -> float:
    """Seconds for `rows` (padded), between measured ones in proportion; above the largest as the largest took, so that
    a width that was never tried looks worth a try."""
    if rows in measured:
        return measured[rows]
    below = max((r for r in measured if r <= rows), default=None)
    above = min((r for r in measured if r >= rows), default=None)
    if below is None or above is None:
        return measured[above if below is None else below]  # type: ignore[index]
    share = (rows - below) / (above - below)
    return measured[below] + share * (measured[above] - measured[below])
