"""Sampling that stays on the device: n tokens are n replays of one CUDA graph and one read-back."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from gpt2_tvm.decoding.sampling import Sampling
from gpt2_tvm.errors import UserError

if TYPE_CHECKING:
    from gpt2_tvm.engine import Engine, Ids


def decode_sampled(engine: Engine, n: int, first: Ids, sampling: Sampling, seed: int = 0) -> np.ndarray:
    """Append `first` and then n - 1 tokens that the device draws -> int32 [batch, n]; `engine.best` is the next draw.

    Args:
        first: what each sequence goes on with (an int, or one a sequence): drawn from the prefill's logits on the host,
            as a rule (`decoding.sampling.sample`).
        sampling: temperature, top_k and top_p; of equal logits at a cut all are kept, else as on the host.
        seed: of sequence 0; sequence b has seed + b. The same seed gives the same text on the same device.

    Afterwards the engine stands as if `decode` had been called with each of the tokens. Raises UserError where the
    artifact cannot (only CUDA ones can), or where the context is too short.
    """
    if f"sample_b{engine.artifact.batch_sizes[0]}" not in engine.artifact.manifest["launches"]:
        raise UserError(f"{engine.artifact.path} draws on the host; for draws on the device compile for CUDA")
    slots = next(size for size in engine.artifact.batch_sizes if size >= engine.batch)
    key = ("settings", (slots, 2))  # kept: a graph belongs to its buffers
    if key not in engine._tensors:
        engine._tensors[key] = engine.runner.empty((slots, 2), "float32")
    settings = np.array([[sampling.temperature, sampling.top_p]] * slots, np.float32)
    engine.runner.upload(engine._tensors[key], settings)
    seeds = (seed + np.arange(slots)).astype(np.uint32).view(np.int32)
    choice = engine._int("choice", np.stack([np.full(slots, sampling.top_k, np.int32), seeds], 1))
    engine._next = np.concatenate(engine._rows(np.asarray(first).reshape(-1, 1), exactly=1))
    return engine._advance("sample", n, [engine._tensors[key], choice])
