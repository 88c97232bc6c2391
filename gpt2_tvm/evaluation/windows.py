"""Sliding windows over a text that is longer than the model's context."""

from __future__ import annotations

from dataclasses import dataclass

from gpt2_tvm.errors import UserError


@dataclass(frozen=True)
class Window:
    """Tokens [begin, end) are given to the model, and those from `first` on are scored; begin < first < end."""

    begin: int
    end: int
    first: int

    @property
    def scored(self) -> int:
        """How many tokens are scored."""
        return self.end - self.first


def sliding_windows(tokens: int, context: int, stride: int) -> list[Window]:
    """Windows of up to `context` tokens, each `stride` tokens after the one before, as transformers' guide on the
    perplexity of fixed-length models has them: a token is scored in the first window that holds it, from the second on
    with at least `context - stride` tokens before it.

    A window's own first token has nothing before it, so the text's first token is never scored, and with
    ``stride == context`` (disjoint windows) neither is any other window's first.

    Raises UserError where the text has fewer than 2 tokens, context fewer than 2, or stride is not in 1..context.
    """
    if context < 2:
        raise UserError(f"--context {context}: a window needs at least 2 tokens, one to see and one to predict")
    if not 1 <= stride <= context:
        raise UserError(f"--stride {stride}: it must be from 1 to the context, {context}; a larger one skips tokens")
    if tokens < 2:
        raise UserError(f"the text has {tokens} token{'s' * (tokens != 1)}; at least 2 are needed to predict one")
    windows, done = [], 0
    for begin in range(0, tokens, stride):
        end = min(begin + context, tokens)
        first = max(done, begin + 1)
        if first < end:  # not a last window of one token
            windows.append(Window(begin, end, first))
        done = end
        if end == tokens:
            break
    return windows
