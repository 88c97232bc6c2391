"""A prefill and a decode as a whole, on this machine or on another one through RPC, with one meaning of the numbers.

Here the clock is read around the engine's calls. Through RPC a call's round trip would count as the device's time, and
a token has one; there the worker times its own calls instead (`runners.rpc.RpcRunner.seconds`): the same functions on
the same tensors, without uploading the prompt and reading back logits and tokens. A page, or node, times its own loop.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from tuning.measure.calls import Call, watched


@dataclass(frozen=True)
class Turn:
    """One measurement.

    prefill_s: the whole prompt. decode_s: all decode steps. tokens: int32 [batch, generate], the greedy choice.
    clock: "here" (the engine's calls as their caller sees them) or "worker" (the functions alone, by the worker).
    """

    prefill_s: float
    decode_s: float
    tokens: np.ndarray
    clock: str


def turn(engine: Any, prompt: np.ndarray, generate: int, parts: int = 1) -> Turn:
    """From an empty cache: prefill `prompt` (int32 [batch, n]), then append the most likely token `generate` times.

    parts: where the clock is here, decode in so many calls; decode_s is that many times the fastest.

    Raises UserError where it does not fit the context, or the worker is lost. Through RPC everything runs a second
    time, untimed, for the tokens.
    """
    engine.reset()
    if hasattr(engine.runner, "agent"):
        prefill_s, decode_s, tokens = engine.runner.turn(prompt[0], generate)
        return Turn(prefill_s, decode_s, np.asarray([tokens], np.int32), "worker")
    if hasattr(engine.runner, "seconds"):
        return _by_worker(engine, prompt, generate)
    engine.runner.sync()
    start = time.perf_counter()
    engine.prefill(prompt)
    prefill_s = time.perf_counter() - start
    tokens, seconds = [], []
    for part in range(parts):
        steps = generate * (part + 1) // parts - generate * part // parts
        start = time.perf_counter()
        tokens.append(engine.decode_greedy(steps))
        seconds.append((time.perf_counter() - start) / steps)
    return Turn(prefill_s, min(seconds) * generate, np.concatenate(tokens, axis=1), "here")


def _by_worker(engine: Any, prompt: np.ndarray, generate: int) -> Turn:
    """Each function is timed just before the engine calls it for the first time, when its inputs are in place."""
    runner, found = engine.runner, {}
    # the evaluator makes one call that does not count, and a greedy step moves on: it must not leave the context
    steps = min(generate, engine.max_seq_len - prompt.shape[1] - 1)

    def see(call: Call) -> None:
        if call.function == "prefill":
            found["prefill"] = runner.seconds("prefill", call.inputs)[0]
        elif call.function.startswith("greedy") and "decode" not in found:
            mean = runner.seconds(call.function, call.inputs, number=max(1, steps))[0] if steps > 0 else 0.0
            found["decode"] = mean * generate

    with watched(engine, see):
        engine.prefill(prompt)
        tokens = engine.decode_greedy(generate)
    return Turn(found["prefill"], found.get("decode", 0.0), tokens, "worker")
