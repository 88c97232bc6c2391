"""A round of speculation that stays on the device: draft, check and accept in one submission, and one read-back of what
came of it.

The text is on the device: `history`, a slot an id, is shared by both models, and so is the token that each goes on
from. A round is k + 1 greedy steps of the draft, which write k tokens (and one too many) after the text and leave all
but the last in the draft's cache, and `speculate` of the target, which checks them, accepts, writes its own token after
those that stand, and moves the positions of both models to it. So the draft's cache is never behind, whatever stood:
that is what its last step, whose token nobody looks at, is for.

Sampled text has the same rounds with draws in place of maxima (`kernels.accept_drawn`): `propose` of the draft keeps
what it drew from where `decide` of the target finds it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from gpt2_tvm.runners.together import Call, Together, share_device

if TYPE_CHECKING:
    from gpt2_tvm.decoding.sampling import Sampling
    from gpt2_tvm.engine import Engine

STORED = 16  # as in `kernels.accept_drawn`, which needs a compiler
TOLD = 2  # what `speculate` says of a sequence before its tokens: how many they are, and whether the last is in doubt


def usable(target: Engine, draft: Engine, sampling: Sampling | None = None) -> bool:
    """Whether rounds of these two can stay on the device: both on the same one, with caches and batches of the same
    sizes, and compiled for it. Draws are from the whole vocabulary: top-k and top-p stay on the host."""
    greedy = sampling is None or sampling.greedy
    if not greedy and (sampling.top_k or sampling.top_p < 1):  # type: ignore[union-attr]
        return False
    ours, theirs = (engine.artifact.manifest["launches"] for engine in (target, draft))
    return (
        any(name.startswith("speculate_b" if greedy else "decide_b") for name in ours)
        and any(name.startswith("greedy_b" if greedy else "propose_b") for name in theirs)
        and share_device(target.runner, draft.runner)
        and target.max_seq_len == draft.max_seq_len
        and target.artifact.batch_sizes == draft.artifact.batch_sizes
    )


@dataclass(frozen=True)
class Told:
    """Of one sequence in one round: its new tokens, and whether the last is too near a tie to be taken from `speculate`
    (then a decode step is to say it)."""

    tokens: list[int]
    doubtful: bool


class DeviceRounds:
    """The shared state of a target and its draft, and rounds on it.

    Args:
        target, draft: engines for which `usable` is true.
        temperature: 0: greedy.

    Attributes:
        seeds: of the sequences' draws, int32 [batch]; set before the first round of new texts.
        fresh: whether the device's state is the texts'; set it to False after any other call of either engine.
        read_backs: how many there were, one a round.

    Both engines' `positions` are kept up to date.
    """

    def __init__(self, target: Engine, draft: Engine, temperature: float = 0.0) -> None:
        self.target, self.draft, self.temperature = target, draft, temperature
        self.seeds = np.zeros(0, np.int32)
        self._chance: list[Any] = []  # temperature, seeds and what was drawn from, on the device
        self.fresh = False
        self.read_backs = 0
        self._prepared: dict[int, Together] = {}
        self._owner: tuple[Any, ...] = ()  # what the prepared calls are bound to
        self._rows: tuple[list[int], list[int]] = ([], [])  # lengths of the target, of the draft, as uploaded

    @property
    def longest(self) -> int:
        """How many tokens a round can draft at most."""
        widths = self.target.artifact.verify_widths
        most = max(w for w in widths if w <= STORED) if self.temperature else widths[-1]
        return max(1, most - 1)

    def round(self, ids: Sequence[Sequence[int]], counts: Sequence[int | None]) -> list[Told]:
        """Draft counts[b] tokens after each text and take those that stand (0: only the target's own; None: the
        sequence takes no part).

        ids: of each sequence, all that is written. Its last id is in neither cache; the others are in the target's
        and, where something is drafted, in the draft's. There must be room for counts[b] + 1 more.
        """
        target, draft = self.target, self.draft
        k = max(count or 0 for count in counts)
        lengths = [0 if count is None else count + 1 for count in counts]
        drafting = [int(bool(count)) for count in counts]
        self._hold()
        if not self.fresh:
            self._upload(ids)
        if self._rows != (lengths, drafting):
            self._lengths(target, lengths)
            self._lengths(draft, drafting)
            self._rows = lengths, drafting
        run = self._prepared.get(k)
        if run is None:
            run = self._prepared[k] = Together(self._calls(k))
        told = target.runner.download(run()[0])[: target.batch]
        self.read_backs += 1
        new = told[:, 0].astype(np.int32)
        target.positions = target.positions + new
        draft.positions = np.where(np.array(drafting) > 0, target.positions, draft.positions).astype(np.int32)
        for engine in (target, draft):
            engine._next, engine._tree = None, None
        return [Told([int(t) for t in row[TOLD : TOLD + row[0]]], bool(row[1])) for row in told]

    def _hold(self) -> None:
        """Forget what is bound to another batch's buffers."""
        owner = (self.target._caches, self.draft._caches, self.target._slots)
        if len(self._owner) != len(owner) or any(a is not b for a, b in zip(owner, self._owner, strict=True)):
            self._owner, self._prepared, self.fresh, self._rows = owner, {}, False, ([], [])
            self._chance = []

    def _upload(self, ids: Sequence[Sequence[int]]) -> None:
        """The texts, where they end, and no lengths yet."""
        target, slots = self.target, self.target._slots
        history, token = np.zeros((slots, target.max_seq_len), np.int32), np.zeros((slots, 1), np.int32)
        positions = np.zeros(slots, np.int32)
        for b, row in enumerate(ids):
            history[b, : len(row)] = row
            token[b, 0] = row[-1]
        positions[: target.batch] = target.positions
        target._int("history", history)
        target._int("greedy_token", token)
        target._int("positions", positions)
        # where nothing is drafted too: a draft that stood further back would write over the text
        self.draft._int("positions", positions)
        if self.temperature:
            self._upload_chance()
        self._rows = ([], [])
        self.fresh = True

    def _upload_chance(self) -> None:
        runner, slots = self.target.runner, self.target._slots
        if not self._chance:
            shapes = (
                ([slots], "float32"),
                ([slots], "int32"),
                ([slots, STORED, self.target.config.vocab_size], "float32"),
            )
            self._chance = [runner.empty(shape, dtype) for shape, dtype in shapes]
            runner.upload(self._chance[0], np.full(slots, self.temperature, np.float32))
        seeds = np.zeros(slots, np.int32)
        seeds[: len(self.seeds)] = self.seeds
        runner.upload(self._chance[1], seeds)

    def _lengths(self, engine: Engine, lengths: Sequence[int]) -> None:
        padded = np.zeros(engine._slots, np.int32)
        padded[: len(lengths)] = lengths
        engine._int("lengths", padded)

    def _calls(self, k: int) -> list[Call]:
        target, draft, slots = self.target, self.draft, self.target._slots
        width = next(w for w in target.artifact.verify_widths if w > k and w > 1)

        def tensor(engine: Engine, name: str, *shape: int) -> Any:
            return engine._tensor(name, (slots, *shape))

        history, token = tensor(target, "history", target.max_seq_len), tensor(target, "greedy_token", 1)
        at = tensor(draft, "positions")
        own, lengths = self._chance, tensor(draft, "lengths")
        name = "propose" if own else "greedy"
        step = Call(draft.runner, f"{name}_b{slots}", [token, at, history, lengths, *own, draft._caches])
        state = [history, token, tensor(target, "positions"), at, tensor(target, "lengths")]
        chain = target._branches(width, None)
        name = "decide" if own else "speculate"
        check = Call(target.runner, f"{name}_b{slots}_m{width}", [*state, *chain, *own, target._caches])
        return [*([step] * (k + 1 if k else 0)), check]
