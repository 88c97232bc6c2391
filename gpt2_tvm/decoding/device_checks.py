"""Checking on the device what the host has drafted (`lookup`): one submission and one read-back of a few integers,
where `Engine.verify` would hand over the logits of every row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from gpt2_tvm.decoding.device_rounds import TOLD, Told

if TYPE_CHECKING:
    from gpt2_tvm.engine import Engine


def can_check(engine: Engine) -> bool:
    """Whether the artifact was compiled for it."""
    return any(name.startswith("speculate_b") for name in engine.artifact.manifest["launches"])


class DeviceChecks:
    """Greedy checks of drafts on an engine for which `can_check` is true."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    @property
    def longest(self) -> int:
        """How many drafted tokens one check takes at most."""
        return self.engine.artifact.verify_widths[-1] - 1

    def __call__(self, ids: Sequence[Sequence[int]], drafts: Sequence[Sequence[int] | None]) -> list[Told]:
        """Check drafts[b] after the text ids[b], whose last id is not in the cache (None: the sequence takes no part),
        append what stands and move the positions past it. There must be room for one more than is drafted."""
        engine, slots = self.engine, self.engine._slots
        rows = max(len(d or ()) for d in drafts) + 1
        width = next(w for w in engine.artifact.verify_widths if w >= rows and w > 1)
        history, lengths = np.zeros((slots, engine.max_seq_len), np.int32), np.zeros(engine.batch, np.int32)
        for b, (text, draft) in enumerate(zip(ids, drafts, strict=True)):
            if draft is not None:
                at, whole = int(engine.positions[b]), [*text, *draft]
                history[b, at : len(whole)] = whole[at:]
                lengths[b] = 1 + len(draft)
        at_, lengths_ = engine._where(lengths)
        state = [engine._int("history", history), engine._tensor("greedy_token", (slots, 1)), at_]
        state += [engine._tensor("drafting", (slots,)), lengths_]
        inputs = [*state, *engine._branches(width, None), engine._caches]
        told = engine.runner.download(engine.runner.call(f"speculate_b{slots}_m{width}", inputs)[0])[: engine.batch]
        engine.positions = engine.positions + told[:, 0].astype(np.int32)
        engine._next, engine._tree = None, None
        return [Told(row[TOLD : TOLD + row[0]].tolist(), bool(row[1])) for row in told]
