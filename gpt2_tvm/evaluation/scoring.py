"""Perplexity of a text on an engine.

Numerics: logits and log-softmax are float32 on the device, each row shifted by its maximum (`kernels/*_sampling.py`);
only one log-probability a token comes to the host, where the sum runs in float64. The logits of at most 128 rows a
sequence exist at a time (`artifact.SCORE_ROWS`), whatever the context.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from gpt2_tvm.errors import UserError
from gpt2_tvm.evaluation.windows import Window, sliding_windows

if TYPE_CHECKING:
    from gpt2_tvm.engine import Engine
    from gpt2_tvm.tokenizer import Tokenizer

DEFAULT_STRIDE, DEFAULT_BATCH = 512, 4
Progress = Callable[[int, float], None]  # (windows done, perplexity so far)


@dataclass(frozen=True)
class Score:
    """How well a text was predicted.

    Attributes:
        tokens: of the text. scored_tokens, scored_bytes: those that were predicted, and their UTF-8 bytes (0 where
            there is no tokenizer to tell). windows: done. nll: total negative log-likelihood of the scored tokens, in
            nats. complete: whether every window was done.
    """

    tokens: int
    scored_tokens: int
    scored_bytes: int
    windows: int
    nll: float
    complete: bool

    @property
    def mean_nll(self) -> float:
        """Nats a token; NaN before anything was scored."""
        return self.nll / self.scored_tokens if self.scored_tokens else math.nan

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log-likelihood; inf where that overflows."""
        return math.exp(self.mean_nll) if self.mean_nll < 700 else math.inf if self.scored_tokens else math.nan

    @property
    def bits_per_token(self) -> float:
        """The same in bits."""
        return self.mean_nll / math.log(2)

    @property
    def bits_per_byte(self) -> float:
        """Bits a byte of the scored tokens' text: comparable across tokenizers. NaN without a tokenizer."""
        return self.nll / math.log(2) / self.scored_bytes if self.scored_bytes else math.nan


class Scorer:
    """One evaluation, which can be interrupted: `result` tells what there is at any time.

    Args:
        engine: from an empty context; its state is lost.
        ids: the text's tokens.
        tokenizer: for bits a byte; None leaves them out.
        context: tokens in a window; default the artifact's capacity.
        stride: tokens from window to window; default 512, or the context where that is shorter.
        batch: windows at a time; default 4, or what the artifact was compiled for where that is less.

    Raises UserError for sizes that do not fit.
    """

    def __init__(
        self,
        engine: Engine,
        ids: Sequence[int],
        tokenizer: Tokenizer | None = None,
        context: int | None = None,
        stride: int | None = None,
        batch: int | None = None,
    ) -> None:
        capacity, largest = engine.max_seq_len, max(engine.artifact.batch_sizes)
        self.context = capacity if context is None else context
        if self.context > capacity:
            raise UserError(f"--context {self.context}: the artifact holds {capacity} tokens; choose at most that")
        self.stride = min(DEFAULT_STRIDE, self.context) if stride is None else stride
        self.batch = min(DEFAULT_BATCH, largest) if batch is None else batch
        if not 1 <= self.batch <= largest:
            raise UserError(
                f"--batch {self.batch}: {engine.artifact.path} was compiled for 1 to {largest} sequences; "
                f"compile it with --batch-sizes {','.join(map(str, sorted({1, largest, max(1, self.batch)})))}"
            )
        self.engine, self.ids = engine, np.asarray(ids, np.int32)
        self.windows = sliding_windows(len(self.ids), self.context, self.stride)
        self._sums: list[float] = []
        self._tokens, self._bytes = 0, 0
        self._bytes_of = {int(i): len(tokenizer.token_bytes(i)) for i in np.unique(self.ids)} if tokenizer else {}

    def run(self, progress: Progress | None = None) -> Score:
        """Score every window that is not done yet."""
        for group in self._groups():
            inputs = np.stack([self.ids[w.begin : w.end] for w in group])
            log_probs = self.engine.score(inputs)  # [len(group), n - 1]; column t is of token begin + t + 1
            for window, row in zip(group, log_probs, strict=True):
                self._add(window, row[window.first - window.begin - 1 :])
            if progress is not None:
                progress(len(self._sums), self.result().perplexity)
        return self.result()

    def result(self) -> Score:
        """What is known by now."""
        complete = len(self._sums) == len(self.windows)
        nll = -math.fsum(self._sums)
        return Score(len(self.ids), self._tokens, self._bytes, len(self._sums), nll, complete)

    def _groups(self) -> Iterator[list[Window]]:
        """Neighbouring windows of one length, up to `batch` of them, from the first that is not done."""
        left = self.windows[len(self._sums) :]
        while left:
            size = left[0].end - left[0].begin
            same = [w for w in left[: self.batch] if w.end - w.begin == size]
            yield same
            left = left[len(same) :]

    def _add(self, window: Window, log_probs: np.ndarray) -> None:
        total = float(log_probs.sum(dtype=np.float64))
        if not math.isfinite(total):
            where = window.first + int(np.flatnonzero(~np.isfinite(log_probs))[0])
            raise UserError(
                f"token {where} got a log-probability of {log_probs[where - window.first]}: the weights hold NaN or "
                "overflow in this scheme; check the checkpoint, or compile with q0f32"
            )
        self._sums.append(total)
        self._tokens += window.scored
        self._bytes += sum(self._bytes_of.get(int(i), 0) for i in self.ids[window.first : window.end])
