"""Speculative streaming: the model drafts for itself, in the pass that checks its last draft (`gpt2_tvm.streams`).

Each step gives a tree of candidates, best paths first by what the streams said, and takes back what of it stands and
the streams' word on what may follow. Greedy only: which branch stands is decided on the device.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from gpt2_tvm.decoding.costs import Costs
from gpt2_tvm.decoding.lengths import DraftLength
from gpt2_tvm.decoding.sampling import Sampling
from gpt2_tvm.decoding.strategy import SPARE, Strategy, TextRow, park
from gpt2_tvm.errors import UserError
from gpt2_tvm.streams.running import Choices, TreePass

if TYPE_CHECKING:
    from gpt2_tvm.engine import Engine


@dataclass
class Tree:
    """Tokens after a text: ids, and the index of each one's parent among them (-1: it follows the text)."""

    ids: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)


def likeliest_paths(choices: Choices, depth: int, size: int) -> Tree:
    """The `size` tokens of the most probable paths, parents first.

    Args:
        choices: each stream's, blind to what the others choose.
        depth: of the tree, at most.
    """
    ids, logs, made = choices.ids, choices.logs, Tree()
    depth = min(depth, len(ids))
    if depth < 1 or size < 1:
        return made
    # (minus the path's log-probability, parent, depth, which of the stream's choices)
    waiting = [(-logs[0][0], -1, 0, 0)]
    while waiting and len(made.ids) < size:
        cost, parent, d, c = heappop(waiting)
        made.ids.append(ids[d][c])
        made.parents.append(parent)
        if c + 1 < len(ids[d]):
            heappush(waiting, (cost + logs[d][c] - logs[d][c + 1], parent, d, c + 1))
        if d + 1 < depth:
            heappush(waiting, (cost - logs[d + 1][0], len(made.ids) - 1, d + 1, 0))
    return made


class Streaming(Strategy):
    """See the module.

    Args:
        engine: of an artifact with streams.
        length: how deep a tree may be; the streams' number is the limit. 0 is a plain decode step.
        sampling: greedy.

    Attributes:
        costs: what steps took; one with streams counts as as many rows as its tree has.
        rows, deepest: the most that a tree may have, and how deep it may be.
    """

    name: ClassVar[str] = "streaming"

    def __init__(self, engine: Engine, length: DraftLength, sampling: Sampling | None = None) -> None:
        super().__init__(engine, sampling)
        self._pass = TreePass(engine)
        if not self.sampling.greedy:
            raise UserError("--strategy streaming writes greedy text; leave --temperature out")
        self.length = length
        self.rows, self.deepest = self._pass.width, self._pass.streams
        self.costs = Costs(lambda rows: 1 if rows <= 1 else self.rows)
        self._said: list[Choices | None] = []  # what the streams said after each row's last id
        self._begun: list[bool] = []  # whether each row's streams have just begun

    def begin(self, rows: Sequence[TextRow]) -> list[int]:
        """See `Strategy.begin`."""
        first = super().begin(rows)
        self.length.start(len(rows))
        self._said, self._begun = [None] * len(rows), [False] * len(rows)
        return first

    def step(self, rows: Sequence[TextRow]) -> list[list[int]]:
        """See `Strategy.step`: for each row the candidates that stand and one token of the model's own."""
        begun = time.perf_counter()
        if self.length.rests([b for b, row in enumerate(rows) if row.live]):
            return self._plain(rows, 0.0)
        with self.clock("draft"):
            trees = [self._tree(b, row) for b, row in enumerate(rows)]
        if all(tree is None for tree in trees):
            return self._plain(rows, time.perf_counter() - begun)
        with self.clock("rollback"):
            park(self.engine, rows)
        base = self.engine.positions
        given = [
            [row.ids[-1] if row.live else SPARE, *(t.ids if t else ())] for row, t in zip(rows, trees, strict=True)
        ]
        parents = [[-1, *(p + 1 for p in (t.parents if t else ()))] for t in trees]
        with self.clock("verify"):
            told = self._pass(given, parents)
        new = [t.tokens if row.live else [] for row, t in zip(rows, told, strict=True)]
        doubtful = [t.doubtful and row.live for row, t in zip(rows, told, strict=True)]
        self._said = [None if doubt else t.choices for t, doubt in zip(told, doubtful, strict=True)]
        for row in rows:
            row.steps += row.live
        if any(doubtful):
            self._decide(rows, base, new, doubtful)
        for b, (row, tree) in enumerate(zip(rows, trees, strict=True)):
            if row.live and tree is not None:
                self._count(b, row, tree, len(new[b]) - 1)
        made = [len(n) for n, row in zip(new, rows, strict=True) if row.live]
        self._spent(time.perf_counter() - begun, sum(made) / len(made), any(doubtful))
        return new

    def _spent(self, seconds: float, tokens: float, doubtful: bool) -> None:
        if not doubtful:
            self.costs.checked(self.rows, seconds)
            self.costs.drafted(0.0, 1)
            if self.costs.known:  # the first pass for a text is one more, which cannot gain anything
                self.costs.caught_up(max(0.0, seconds - self.costs.plain_s), 1)
        self.length.spent(self.costs, seconds, 1, 0, tokens, 1 + doubtful)

    def _plain(self, rows: Sequence[TextRow], beside: float) -> list[list[int]]:
        """A step without streams: what greedy does, after `beside` seconds of thinking about it."""
        start = time.perf_counter()
        self._said = [None] * len(rows)
        logits = self.decode(rows)
        with self.clock("sample"):
            new = [[token] for token in self.choose(logits, rows)]
        self.costs.checked(1, time.perf_counter() - start)
        self.length.plain(self.costs, beside)
        return new

    def _tree(self, b: int, row: TextRow) -> Tree | None:
        """Candidates for a row; an empty tree where the streams are to begin, None for a plain step."""
        if not row.live:
            return None
        said, begun = self._said[b], self._begun[b]
        self._begun[b] = False
        if row.left < 2:
            return None
        wanted = self.length.choose(b, self.costs, behind=int(said is None))
        if not wanted and begun and said is not None and self.length.affords(1, self.costs):
            wanted = self.deepest  # the pass that began them was for nothing if they were not heard
        # streams that begin with two tokens to come could say nothing that is of use
        if not wanted or (said is None and row.left < 3):
            return None
        if said is None:
            self._begun[b] = True
            return Tree()
        depth = min(wanted, row.left - 1)
        room = self.engine.max_seq_len - len(row.ids)  # a tree is in the cache as a whole before a branch is kept
        return likeliest_paths(said, depth, min(self.rows - 1, room))

    def _decide(
        self, rows: Sequence[TextRow], base: np.ndarray, new: list[list[int]], doubtful: Sequence[bool]
    ) -> None:
        """Replace the last new token of doubtful rows by what a decode step says."""
        ends = [int(at) + max(1, len(n)) for at, n in zip(base, new, strict=True)]
        with self.clock("rollback"):
            self.engine.rewind([end - doubt for end, doubt in zip(ends, doubtful, strict=True)])
        with self.clock("verify"):
            before = [
                [row.ids[-1], *n][-2] if doubt else SPARE for row, n, doubt in zip(rows, new, doubtful, strict=True)
            ]
            logits = self.engine.decode(before)
        with self.clock("rollback"):
            self.engine.rewind(ends)
        for b, row in enumerate(rows):
            if doubtful[b]:
                new[b][-1] = int(logits[b].argmax())
                row.steps += 1

    def _count(self, b: int, row: TextRow, tree: Tree, accepted: int) -> None:
        """A level of the tree counts as one token of a draft: it stands where one of its candidates does."""
        depths = [0] * len(tree.ids)
        for j, parent in enumerate(tree.parents):
            depths[j] = depths[parent] + 1 if parent >= 0 else 1
        deepest = max(depths, default=0)
        examined = min(accepted + 1, deepest)
        row.drafted += deepest
        row.examined += examined
        row.accepted += accepted
        self.length.saw(b, examined, accepted)
