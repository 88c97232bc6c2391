"""Where the time of a step goes, by name, each moment counted once."""

from __future__ import annotations

import time
from collections import defaultdict

PARTS = ("draft", "verify", "sample", "rollback", "host")  # of a step; "verify" is every pass of the target


class Clock:
    """Seconds by name. Inside a nested block the outer one stands still.

    Attributes:
        seconds: by name, since construction or `clear`.
    """

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._blocks: dict[str, _Block] = {}
        self._running: list[str] = []
        self._since = 0.0

    def __call__(self, name: str) -> _Block:
        """For `with`: what runs inside counts to `name`."""
        block = self._blocks.get(name)
        if block is None:
            block = self._blocks[name] = _Block(self, name)
        return block

    def begin(self, name: str) -> None:
        """From here on time counts to `name`, until `end`."""
        self._switch()
        self._running.append(name)

    def end(self) -> None:
        """Back to the block around the last `begin`, or to none."""
        self._switch()
        self._running.pop()

    def move(self, source: str, to: str, seconds: float) -> None:
        """Count `seconds` of one name to another: what is known of a time that could not be taken apart."""
        self.seconds[source] -= seconds
        self.seconds[to] += seconds

    def clear(self) -> None:
        """Begin again at zero."""
        self.seconds.clear()

    def split(self, total: float) -> dict[str, float]:
        """`PARTS` of `total` seconds: what no block covered is the host's."""
        parts = {name: self.seconds.get(name, 0.0) for name in PARTS}
        parts["host"] += max(0.0, total - sum(parts.values()))
        return parts

    def _switch(self) -> None:
        now = time.perf_counter()
        if self._running:
            self.seconds[self._running[-1]] += now - self._since
        self._since = now


class _Block:
    """A clock's block of one name, entered again and again: a generator for each would cost as much as the sampling
    that it times."""

    __slots__ = ("_clock", "_name")

    def __init__(self, clock: Clock, name: str) -> None:
        self._clock, self._name = clock, name

    def __enter__(self) -> None:
        self._clock.begin(self._name)

    def __exit__(self, *error: object) -> None:
        self._clock.end()
