"""Where drafted tokens come from: the interface, and a second model on an engine of its own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from gpt2_tvm.decoding.rejection import draw
from gpt2_tvm.decoding.sampling import Sampling
from gpt2_tvm.decoding.strategy import SPARE, TextRow
from gpt2_tvm.errors import UserError

if TYPE_CHECKING:
    from gpt2_tvm.artifact import Artifact
    from gpt2_tvm.engine import Engine


@dataclass
class Proposal:
    """tokens: that may come next, in order; shares: what each was drawn from, float64 [vocab], or None where the draft
    had no choice."""

    tokens: list[int] = field(default_factory=list)
    shares: list[np.ndarray | None] = field(default_factory=list)


class Draft(ABC):
    """What proposes tokens. One without a state of its own has nothing to begin with and is never behind."""

    def begin(self, rows: Sequence[TextRow], rngs: Sequence[np.random.Generator], now: bool = True) -> int:
        """New prompts; `rngs` are the sequences' own generators. now: take them in at once, rather than when first
        asked -> how many tokens that were, the longest's."""
        return 0

    def behind(self, rows: Sequence[TextRow]) -> list[int]:
        """How many tokens of each text must be taken in before one can be proposed; those of the last round are not
        counted."""
        return [0] * len(rows)

    def catch_up(self, rows: Sequence[TextRow], wanted: Sequence[bool]) -> int:
        """Take in what is `behind` for the rows that are wanted -> how many tokens that were, the longest's."""
        return 0

    @abstractmethod
    def propose(self, rows: Sequence[TextRow], counts: Sequence[int]) -> list[Proposal]:
        """Up to counts[b] tokens to follow rows[b].ids, for each row."""


class ModelDraft(Draft):
    """A smaller model, or the same one in int8 or with fewer layers, one decode step a token.

    Greedy drafts come out of one loop on the device, with one read-back a round. The cache needs no telling what became
    of its tokens: at each call it keeps what agrees with the text and takes in the rest. A text beyond its context is
    no longer drafted for.

    Args:
        engine: the draft's own; it may have another context length and precision than the target's.
        sampling: as the target's.
    """

    on_device = True  # whether greedy drafts may come out of the device's own loop

    def __init__(self, engine: Engine, sampling: Sampling | None = None) -> None:
        self.engine, self.sampling = engine, sampling or Sampling()
        self._rngs: Sequence[np.random.Generator] = ()
        self._cached: list[int] = []  # how many ids in the cache are certainly the text's
        self._guessed: list[list[int]] = []  # ids after them that were guesses when they were taken in

    def begin(self, rows: Sequence[TextRow], rngs: Sequence[np.random.Generator], now: bool = True) -> int:
        """See `Draft.begin`."""
        self._rngs = rngs
        self.engine.reset()
        self._cached, self._guessed = [0] * len(rows), [[] for _ in rows]
        return self._begin([row.ids if len(row.ids) < self.engine.max_seq_len else [] for row in rows]) if now else 0

    def _begin(self, prompts: Sequence[list[int]]) -> int:
        self.engine.prefill([ids or [SPARE] for ids in prompts])
        self._cached = [len(ids) for ids in prompts]
        return max(self._cached)

    def behind(self, rows: Sequence[TextRow]) -> list[int]:
        """See `Draft.behind`; 0 where the text is beyond the draft's context and nothing is proposed."""
        self._match(rows)
        late = [len(row.ids) - 1 - at for row, at in zip(rows, self._cached, strict=True)]
        # one token is what a round leaves whose tokens all stand; it goes into the next round's first pass
        least = 2 if self.engine.batch else 1
        return [n if n >= least and self._space(row) > 0 else 0 for row, n in zip(rows, late, strict=True)]

    def _space(self, row: TextRow) -> int:
        """How many tokens may be proposed: the k-th needs len(ids) + k - 1 in the cache."""
        return self.engine.max_seq_len + 1 - len(row.ids)

    def catch_up(self, rows: Sequence[TextRow], wanted: Sequence[bool]) -> int:
        """See `Draft.catch_up`."""
        late = [
            row.ids[self._cached[b] : -1] if wanted[b] and self._space(row) > 0 else [] for b, row in enumerate(rows)
        ]
        if not any(late):
            return 0
        if self.engine.batch == 0:
            return self._begin(late)
        self._settle([not ids for ids in late])
        given, longest, widths = (
            [ids or [SPARE] for ids in late],
            max(map(len, late)),
            self.engine.artifact.verify_widths,
        )
        if widths and longest <= widths[-1]:
            self.engine.verify(given)
        else:
            self.engine.prefill(given)
        self._cached = [at + len(ids) for at, ids in zip(self._cached, late, strict=True)]
        return longest

    def propose(self, rows: Sequence[TextRow], counts: Sequence[int]) -> list[Proposal]:
        """See `Draft.propose`."""
        space = [self._space(row) for row in rows]
        wanted = [max(0, min(n, s)) if row.live else 0 for n, s, row in zip(counts, space, rows, strict=True)]
        made = [Proposal() for _ in rows]
        if not any(wanted):
            return made
        n = max(wanted)
        if self.on_device and self.sampling.greedy and all(s >= n for s, w in zip(space, wanted, strict=True) if w):
            return self._loop(rows, wanted)
        logits = self._catch_up(rows, wanted)
        for i in range(max(wanted)):
            for b, n in enumerate(wanted):
                if i < n:
                    token, shares = self._choose(b, rows[b], i, logits[b])
                    made[b].tokens.append(token)
                    made[b].shares.append(shares)
            if i + 1 < max(wanted):
                logits = self._decode([p.tokens[-1] if i + 1 < n else None for p, n in zip(made, wanted, strict=True)])
        return made

    def _loop(self, rows: Sequence[TextRow], wanted: Sequence[int]) -> list[Proposal]:
        """Greedy drafts of the rows that are wanted, all as long as the longest; what is too much is cut off."""
        n = max(wanted)
        self._match(rows)
        if all(not w or self._cached[b] + 1 == len(rows[b].ids) for b, w in enumerate(wanted)):
            start, drafted = [rows[b].ids[-1] if w else SPARE for b, w in enumerate(wanted)], np.zeros((len(rows), 0))
        else:
            first = self._catch_up(rows, wanted).argmax(-1).astype(np.int32)
            start, drafted, n = first.tolist(), first[:, None], n - 1
        if n:
            self._settle([not w for w in wanted], n)
            run = self.engine.decode_greedy(n, start)
            following = self.engine.best
            assert following is not None
            for b, w in enumerate(wanted):
                if w and not drafted.size:  # the loop's first token is the text's last id
                    self._cached[b] += 1
                self._guessed[b] += run[b, 0 if drafted.size else 1 :].tolist() if w else []
            drafted = np.concatenate([drafted, run[:, 1:], following[:, None]], axis=1).astype(np.int32)
        return [Proposal(drafted[b, :w].tolist(), [None] * w) for b, w in enumerate(wanted)]

    def _choose(self, b: int, row: TextRow, i: int, logits: np.ndarray) -> tuple[int, np.ndarray | None]:
        """The i-th drafted token of sequence b, from logits [vocab], and what it was drawn from."""
        if self.sampling.greedy:
            return int(logits.argmax()), None
        shares = self.sampling.probabilities(logits)
        return draw(shares, self._rngs[b]), shares

    def _catch_up(self, rows: Sequence[TextRow], wanted: Sequence[int]) -> np.ndarray:
        """Take in what the text has gained -> logits [batch, vocab] after the last id of each row that is wanted."""
        self._match(rows)
        missing = [row.ids[self._cached[b] :] if wanted[b] else None for b, row in enumerate(rows)]
        self._settle([m is None for m in missing])
        given = [m if m is not None else [SPARE] for m in missing]
        for b, ids in enumerate(missing):
            self._cached[b] += len(ids or ())
        longest, widths = max(map(len, given)), self.engine.artifact.verify_widths
        if longest == 1:
            return self.engine.decode([ids[0] for ids in given])
        if widths and longest <= widths[-1]:
            logits = self.engine.verify(given)
            return logits[np.arange(len(given)), [len(ids) - 1 for ids in given]]
        return self.engine.prefill(given)

    def _match(self, rows: Sequence[TextRow]) -> None:
        """Count the guesses that have become the text's own ids to what is cached; forget the others."""
        for b, row in enumerate(rows):
            at = self._cached[b]
            for guess in self._guessed[b]:
                if at + 1 >= len(row.ids) or row.ids[at] != guess:  # the last id is always taken in: its logits count
                    break
                at += 1
            self._cached[b], self._guessed[b] = at, []

    def _decode(self, tokens: Sequence[int | None]) -> np.ndarray:
        self._settle([token is None for token in tokens])
        for b, token in enumerate(tokens):
            if token is not None:
                self._guessed[b].append(token)
        return self.engine.decode([SPARE if token is None else token for token in tokens])

    def _settle(self, idle: Sequence[bool], steps: int = 1) -> None:
        """Move positions back to what counts; a row that is idle in the next `steps` leaves slots for spare tokens."""
        for b, resting in enumerate(idle):
            over = self._cached[b] + len(self._guessed[b]) + steps - self.engine.max_seq_len if resting else 0
            if over > 0:
                forgotten = min(over, len(self._guessed[b]))
                del self._guessed[b][len(self._guessed[b]) - forgotten :]
                self._cached[b] -= over - forgotten
        self.engine.rewind([n + len(g) for n, g in zip(self._cached, self._guessed, strict=True)])


def check_pair(target: Artifact, draft: Artifact) -> None:
    """Refuse a draft whose ids do not mean what the target's mean: one line says why."""
    what = f"{draft.path} cannot draft for {target.path}"
    if target.config.vocab_size != draft.config.vocab_size:
        raise UserError(
            f"{what}: its vocabulary has {draft.config.vocab_size} ids, not {target.config.vocab_size}; "
            "take a draft with the same tokenizer"
        )
    ours, theirs = target.tokenizer, draft.tokenizer
    if ours is None or theirs is None or _digests(target) == _digests(draft):
        return
    from gpt2_tvm.tokenizer import load_tokenizer

    a, b = load_tokenizer(ours), load_tokenizer(theirs)
    for i in range(target.config.vocab_size):
        if a.token_bytes(i) != b.token_bytes(i):
            raise UserError(
                f"{what}: id {i} is {a.decode([i])!r} to one tokenizer and {b.decode([i])!r} to the other; "
                "take a draft with the same tokenizer"
            )


def _digests(artifact: Artifact) -> dict[str, str]:
    """sha256 of the files that say what an id means."""
    names = ("tokenizer/tokenizer.json", "tokenizer/vocab.json", "tokenizer/merges.txt")
    files = artifact.manifest["files"]
    return {name: files[name]["sha256"] for name in names if name in files}
