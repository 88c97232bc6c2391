"""Times of one kind of work, the last few of them, and what is typical of these."""

from __future__ import annotations

from collections import deque

WINDOW = 15  # of the last samples the median counts: a slow moment of the machine does not
STALL = 2.0  # times the median: what takes longer was held up by something else


class Samples:
    """The last `WINDOW` seconds that something took. What is asked for twice is worked out once."""

    __slots__ = ("_held", "_mean", "_sorted")

    def __init__(self) -> None:
        self._held: deque[float] = deque(maxlen=WINDOW)
        self._sorted: list[float] | None = None
        self._mean: float | None = None

    def __len__(self) -> int:
        return len(self._held)

    def add(self, seconds: float) -> None:
        """One more."""
        self._held.append(seconds)
        self._sorted = self._mean = None

    @property
    def median(self) -> float:
        """Of all that are held; there is one at least."""
        if self._sorted is None:
            self._sorted = sorted(self._held)
        n = len(self._sorted)
        return (self._sorted[(n - 1) // 2] + self._sorted[n // 2]) / 2

    @property
    def typical(self) -> float:
        """The median; of fewer than three the smallest, as a first call may have something to load."""
        return self.median if len(self._held) > 2 else min(self._held)

    @property
    def mean(self) -> float:
        """With what was held up counted as `STALL` medians."""
        if self._mean is None:
            most = STALL * self.typical
            self._mean = sum(min(s, most) for s in self._held) / len(self._held)
        return self._mean
