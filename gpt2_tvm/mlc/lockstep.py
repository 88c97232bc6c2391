"""`PagedEngine` behind the calls of `Engine` that measuring and checking use: sequences that grow together."""

from __future__ import annotations

from typing import Any

import numpy as np

from gpt2_tvm.errors import UserError
from gpt2_tvm.mlc.engine import PagedEngine


class Lockstep:
    """All sequences of `paged`, 0 to b - 1, as the rows of a batch. Calls mean what they do for `Engine`.

    The greedy choice is the host's, from logits that every step reads back, as in MLC's engines.
    """

    def __init__(self, paged: PagedEngine) -> None:
        self.paged = paged
        self._logits: np.ndarray | None = None  # of the last prefill or decode, [b, V]

    def reset(self) -> None:
        """Forget all sequences."""
        self.paged.reset()
        self._logits = None

    def prefill(self, ids: Any) -> np.ndarray:
        """[n] of one sequence or [b, n], from an empty cache -> float32 [b, V]."""
        rows = np.atleast_2d(np.asarray(ids, np.int32))
        if self.paged.lengths:
            raise UserError("the cache is not empty; call reset() first")
        for sequence in range(len(rows)):
            self.paged.add(sequence)
        self._logits = self.paged.prefill(dict(enumerate(rows)))
        return self._logits

    def decode(self, ids: Any) -> np.ndarray:
        """One token of each sequence, an int for one -> float32 [b, V]."""
        self._logits = self.paged.decode(dict(enumerate(np.asarray(ids).reshape(-1).tolist())))
        return self._logits

    def verify(self, ids: Any) -> np.ndarray:
        """[m] of one sequence or [b, m] -> float32 [b, m, V]."""
        rows = np.atleast_2d(np.asarray(ids, np.int32))
        self._logits = None
        return np.stack(self.paged.verify(dict(enumerate(rows))))

    def rewind(self, position: int) -> None:
        """Forget all but the first `position` tokens of each sequence."""
        for sequence, length in list(self.paged.lengths.items()):
            self.paged.popn(sequence, length - position)
        self._logits = None

    def decode_greedy(self, n: int) -> np.ndarray:
        """n times: the most likely next token, appended -> int32 [b, n]."""
        if self._logits is None:
            raise UserError("decode_greedy needs logits to start from: call prefill or decode first")
        tokens = []
        logits = self._logits
        for _ in range(n):
            tokens.append(logits.argmax(1).astype(np.int32))
            logits = self.decode(tokens[-1])
        return np.stack(tokens, 1)
