"""Text as tokens: what to learn from, and what to be judged by."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gpt2_tvm.checkpoint import ModelSource
from gpt2_tvm.errors import UserError
from gpt2_tvm.evaluation.text import load_text

HELD_OUT = 0.1  # of the text, its end, where no other is given to validate on


@dataclass(frozen=True)
class Corpus:
    """train, validation: int32 token ids."""

    train: np.ndarray
    validation: np.ndarray

    def digest(self) -> str:
        """16 hexadecimal digits that tell this corpus from others."""
        found = hashlib.sha256(self.train.tobytes())
        found.update(b"|" + self.validation.tobytes())
        return found.hexdigest()[:16]

    def batch(self, step: int, seed: int, batch: int, context: int) -> np.ndarray:
        """What a step learns from, int64 [batch, context]: pieces from random places, the same for the same seed."""
        places = np.random.default_rng([seed, step]).integers(0, len(self.train) - context + 1, batch)
        return np.stack([self.train[at : at + context] for at in places]).astype(np.int64)

    def windows(self, context: int, most: int) -> list[np.ndarray]:
        """Up to `most` windows of up to `context` tokens, evenly over the validation text, none overlapping."""
        ids = self.validation.astype(np.int64)
        every = [ids[at : at + context] for at in range(0, len(ids) - 1, context)]
        if len(every) <= most:
            return every
        return [every[round(i)] for i in np.linspace(0, len(every) - 1, most)]


def load_corpus(
    source: ModelSource, text: Path, validation: Path | None, format_: str, context: int, detokenize: bool = True
) -> Corpus:
    """Read and encode text with the checkpoint's tokenizer.

    Args:
        text: to learn from. validation: to be judged by; None holds the last tenth of `text` out.
        format_: plain, wikitext-raw or wikitext-tokens, of both.
        context: tokens in a sequence, which both must have.

    Raises UserError for files that are missing or too short, and for a model without a tokenizer.
    """
    from gpt2_tvm.tokenizer import load_tokenizer

    if source.folder is None:
        raise UserError(f"{source.name} has random weights and no tokenizer; give a trained checkpoint")
    tokenizer = load_tokenizer(source.folder)
    ids = np.asarray(tokenizer.encode(load_text(text, format_, detokenize)), np.int32)
    if validation is None:
        cut = len(ids) - int(len(ids) * HELD_OUT)
        corpus = Corpus(ids[:cut], ids[cut:])
    else:
        held = tokenizer.encode(load_text(validation, format_, detokenize))
        corpus = Corpus(ids, np.asarray(held, np.int32))
    for name, part in (("to learn from", corpus.train), ("to validate on", corpus.validation)):
        if len(part) < context:
            raise UserError(f"{text} has {len(part)} tokens {name}, fewer than --context {context}; give a longer text")
        if int(part.max()) >= source.config.vocab_size:
            raise UserError(
                f"the tokenizer of {source.name} gives ids beyond its vocabulary of {source.config.vocab_size}"
            )
    return corpus
