"""transformers in float32 as the reference: the logits that any function of ours must give."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gpt2_tvm.checkpoint import random_model
from gpt2_tvm.config import GPT2Config
from gpt2_tvm.weights import write_hf_checkpoint

# The rule set of every artifact in the parity tests; another can be put to the same tests through the environment.
RULES = os.environ.get("GPT2_TVM_TEST_RULES", "full")
FLOAT32 = 1e-3  # largest difference allowed, as a share of the reference's largest logit
FLOAT16 = 2e-2
TOKENS_AT_ONCE = 4096  # of one reference forward: bounds its logits in memory


class Reference:
    """A checkpoint in transformers, in float32."""

    def __init__(self, folder: Path) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        self.torch = torch
        self.model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def logits(self, rows: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """Logits after every token of each row -> float32 [len(row), V] each.

        Rows are padded at the right, which causal attention does not see.
        """
        out: list[np.ndarray] = []
        width = max(len(r) for r in rows)
        step = max(1, TOKENS_AT_ONCE // width)
        with self.torch.no_grad():
            for i in range(0, len(rows), step):
                part = rows[i : i + step]
                ids = self.torch.tensor([[*r, *[0] * (width - len(r))] for r in part])
                logits = self.model(input_ids=ids, use_cache=False).logits.numpy()
                out += [logits[j, : len(r)].copy() for j, r in enumerate(part)]
        return out

    def greedy(self, ids: Sequence[int], n: int) -> list[int]:
        """transformers' own greedy continuation of `ids` by exactly n tokens."""
        with self.torch.no_grad():
            prompt = self.torch.tensor([list(ids)])
            out = self.model.generate(
                prompt,
                attention_mask=self.torch.ones_like(prompt),
                max_new_tokens=n,
                min_new_tokens=n,
                do_sample=False,
                pad_token_id=0,
            )
        return [int(t) for t in out[0, len(ids) :]]


def checkpoint(folder: Path, config: GPT2Config, seed: int = 0, spread: float = 1.0) -> Path:
    """Seeded random weights in Hugging Face layout. `spread` multiplies the matrices, so that attention and activations
    leave their linear range.
    """
    from gpt2_tvm.weights import iter_weights

    weights = (
        (name, array * np.float32(spread) if array.ndim == 2 else array)
        for name, array in iter_weights(random_model(config, seed))
    )
    return write_hf_checkpoint(folder, config, weights)


def random_rows(config: GPT2Config, lengths: Sequence[int], seed: int = 0) -> list[list[int]]:
    """One row of random token ids for each length."""
    generator = np.random.default_rng(seed)
    return [generator.integers(0, config.vocab_size, n).tolist() for n in lengths]


def assert_close(ours: np.ndarray, reference: np.ndarray, share: float, what: str) -> None:
    """max |difference| <= share x max |logit|, no NaN, and the same most likely token wherever the reference's first
    two are further apart than that.
    """
    assert ours.shape == reference.shape, f"{what}: shape {ours.shape}, expected {reference.shape}"
    assert ours.dtype == np.float32, f"{what}: {ours.dtype}"
    bound = share * float(np.abs(reference).max())
    difference = float(np.abs(ours - reference).max())
    assert difference <= bound, f"{what}: largest difference {difference:.3g}, allowed {bound:.3g}"  # also fails on NaN
    second, first = np.partition(reference, -2, axis=-1)[..., -2:].transpose(-1, *range(reference.ndim - 1))
    clear = first - second > bound
    assert (ours.argmax(-1) == reference.argmax(-1))[clear].all(), f"{what}: another most likely token"
