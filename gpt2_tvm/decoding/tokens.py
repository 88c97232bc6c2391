"""One sequence, one token at a time: greedy on the device, or sampled on the host."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from gpt2_tvm.decoding.pipelined import Pipelined, can_pipeline
from gpt2_tvm.decoding.sampling import check_options, sample
from gpt2_tvm.errors import UserError

if TYPE_CHECKING:
    from gpt2_tvm.engine import Engine

DEVICE_STEPS = (
    8  # greedy tokens made on a GPU between two read-backs: text comes in small pieces, the device never waits
)


class Generation:
    """An iterator over the tokens that follow a prompt.

    Args:
        engine: its sequences are forgotten; afterwards its cache holds the prompt and the tokens.
        prompt: token ids; they must fit the context with room for one token.
        max_tokens: how many tokens at most.
        temperature, top_k, top_p: `sampling.distribution`; temperature 0 is greedy and stays on the device.
        seed: of the sampling; None: another one each time, found in `seed` afterwards.
        eos_id: a token that ends the text; it is not given out. None: there is no such token.

    Attributes:
        finish: why it ended: "length" (max_tokens), "eos", "context" (the context is full), or "" while it has not.
        prefill_s, decode_s: seconds in the engine, for the prompt and for the decode steps since.
        steps: how many decode steps these were (greedy: one a token; sampled: none for the last token).

    Raises UserError, before anything runs, for a prompt that does not fit and for options out of range.
    """

    def __init__(
        self,
        engine: Engine,
        prompt: Sequence[int],
        max_tokens: int,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int | None = None,
        eos_id: int | None = None,
    ) -> None:
        check_options(temperature, top_k, top_p)
        if max_tokens < 1:
            raise UserError(f"--max-tokens {max_tokens}: give how many tokens to write, at least 1")
        if seed is not None and seed < 0:
            raise UserError(f"--seed {seed}: give 0 or more")
        if len(prompt) == 0:
            raise UserError("the prompt is empty: give at least one token")
        if len(prompt) >= engine.max_seq_len:
            raise UserError(
                f"the prompt has {len(prompt)} tokens and the context holds {engine.max_seq_len}: nothing can follow; "
                "shorten the prompt, or compile with a larger --max-seq-len if the model allows it"
            )
        self.engine, self.prompt, self.eos_id = engine, list(prompt), eos_id
        self.finish, self.prefill_s, self.decode_s, self.steps = "", 0.0, 0.0, 0
        self.seed = int(np.random.SeedSequence().generate_state(1)[0]) if seed is None else seed
        self._room = engine.max_seq_len - len(prompt)
        self._max_tokens = max_tokens
        self._sampling = (temperature, top_k, top_p)

    def __iter__(self) -> Iterator[int]:
        start = time.perf_counter()
        self.engine.reset()
        logits = self.engine.prefill(self.prompt)[0]
        self.prefill_s = time.perf_counter() - start
        count = min(self._max_tokens, self._room)
        for token in self._greedy(count) if self._sampling[0] == 0 else self._sampled(count, logits):
            if token == self.eos_id:
                self.finish = "eos"
                return
            yield token
        self.finish = "length" if count == self._max_tokens else "context"

    def _greedy(self, count: int) -> Iterator[int]:
        if can_pipeline(self.engine):
            tokens = Pipelined(self.engine, count)
            for done in range(count):
                token = self._timed(1, lambda _: np.array(next(tokens)), 1)
                if done + 1 == count:
                    tokens.settle()
                yield int(token)
            return
        at_once = 1 if self.engine.artifact.kind == "cpu" else DEVICE_STEPS
        for done in range(0, count, at_once):
            steps = min(at_once, count - done)
            yield from self._timed(steps, lambda n: self.engine.decode_greedy(n)[0], steps).tolist()

    def _sampled(self, count: int, logits: np.ndarray) -> Iterator[int]:
        rng = np.random.default_rng(self.seed)
        for i in range(count):
            token = sample(logits, *self._sampling, rng)
            yield token
            if i + 1 < count:
                logits = self._timed(1, lambda t: self.engine.decode(t)[0], token)

    def _timed(self, steps: int, call: Callable[[int], np.ndarray], argument: int) -> np.ndarray:
        start = time.perf_counter()
        result = call(argument)
        self.decode_s += time.perf_counter() - start
        self.steps += steps
        return result
