"""Ending a text at a stop string, while it is being streamed."""

from __future__ import annotations

from collections.abc import Sequence

from gpt2_tvm.errors import UserError


class StopStrings:
    """Lets text through up to the first stop string, which may be spread over any number of pieces.

    Text that may be the beginning of a stop string is held back until it is clear that it is none.

    Attributes:
        found: the stop string that ended the text, or None.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if "" in stops:
            raise UserError("--stop '': a stop string has at least one character")
        self.found: str | None = None
        self._stops, self._held = tuple(stops), ""

    def push(self, text: str) -> str:
        """What may be shown now that `text` has come; nothing once a stop string was found."""
        if self.found is not None:
            return ""
        self._held += text
        hits = [(at, stop) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if hits:
            # the earliest, and of two at one place the one that was complete first: the shorter
            at, self.found = min(hits, key=lambda hit: (hit[0], len(hit[1])))
            shown, self._held = self._held[:at], ""
            return shown
        keep = max((self._overlap(stop) for stop in self._stops), default=0)
        shown = self._held[: len(self._held) - keep]
        self._held = self._held[len(self._held) - keep :]
        return shown

    def finish(self) -> str:
        """What was held back, when the text ends for another reason."""
        shown, self._held = self._held, ""
        return shown

    def _overlap(self, stop: str) -> int:
        """How many of the last characters are a beginning of `stop`."""
        longest = min(len(stop) - 1, len(self._held))
        return next((n for n in range(longest, 0, -1) if self._held.endswith(stop[:n])), 0)
