"""The persistent step on the CPU (its CUDA source, by `cuda_on_cpu`) and what it must compute: GPT-2 in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from cuda_on_cpu import run

from gpt2_tvm.kernels.persistent.kernel import parameter_shapes, persistent_step, work_elements
from gpt2_tvm.kernels.persistent.shape import StepShape

ACTIVATIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "gelu_new": lambda v: 0.5 * v * (1 + np.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3))),
    "gelu": lambda v: 0.5 * v * (1 + np.vectorize(math.erf)(v / math.sqrt(2))),
    "relu": lambda v: np.maximum(v, 0),
    "silu": lambda v: v / (1 + np.exp(-v)),
    "tanh": np.tanh,
}


@dataclass
class Sequence1:
    """One sequence that both decode, each with caches of its own. Slots that nobody wrote hold NaN."""

    shape: StepShape
    seed: int = 0
    weights: dict[str, np.ndarray] = field(init=False)
    caches: list[np.ndarray] = field(init=False)
    exact: list[np.ndarray] = field(init=False)

    def __post_init__(self) -> None:
        random, c = np.random.default_rng(self.seed), self.shape.config
        self.weights = {}
        for name, size in parameter_shapes(self.shape):
            values = random.standard_normal(size) * (0.5 if len(size) == 1 else size[-1] ** -0.5)
            if name.endswith(("ln_1.weight", "ln_2.weight", "ln_f.weight")):
                values += 1
            self.weights[name] = values.astype(self.shape.dtype)
        empty = np.full((2, 1, c.n_head, self.shape.capacity, c.head_dim), np.nan, self.shape.dtype)
        self.caches = [empty.copy() for _ in range(c.n_layer)]
        self.exact = [empty.astype(np.float64) for _ in range(c.n_layer)]

    def fill(self, tokens: int) -> None:
        """As if that many tokens had been decoded: random keys and values, the same for both."""
        random = np.random.default_rng(self.seed + tokens)
        for cache, exact in zip(self.caches, self.exact, strict=True):
            cache[:, :, :, :tokens] = random.standard_normal(cache[:, :, :, :tokens].shape)
            exact[:, :, :, :tokens] = cache[:, :, :, :tokens]

    def step(self, token: int, position: int, length: int = 1, arch: str = "sm_80") -> np.ndarray:
        """Logits [V] of the kernel; its caches have the new slot."""
        s, c = self.shape, self.shape.config
        ints = [np.array([[token]], np.int32), np.array([position], np.int32), np.array([length], np.int32)]
        logits = np.full((1, 1, c.vocab_size), np.nan, np.float32)
        work = np.full(work_elements(s), np.nan, np.float32)
        arrays = [*ints, *self.weights.values(), *self.caches, logits, work]
        after = run(persistent_step(s), arrays, arch)
        self.caches = after[-2 - c.n_layer : -2]
        for before, now in zip(arrays[: -2 - c.n_layer], after, strict=False):
            np.testing.assert_array_equal(before, now)
        return after[-2][0, 0]

    def expected(self, token: int, position: int, length: int = 1) -> np.ndarray:
        """The same from the definition, in float64."""
        c = self.shape.config
        w = {name: value.astype(np.float64) for name, value in self.weights.items()}
        x = w["transformer.wte.weight"][token] + w["transformer.wpe.weight"][min(position, c.n_positions - 1)]
        live = min(position + 1, self.shape.capacity) if length else 0
        for i in range(c.n_layer):

            def linear(name: str, v: np.ndarray, at: str = f"transformer.h.{i}.") -> np.ndarray:
                return w[f"{at}{name}.weight"] @ v + w[f"{at}{name}.bias"]

            qkv = linear("attn.c_attn", self._norm(w, f"transformer.h.{i}.ln_1", x))
            query, key, value = qkv.reshape(3, c.n_head, c.head_dim)
            cache = self.exact[i][:, 0]
            if length and position < self.shape.capacity:
                cache[0, :, position], cache[1, :, position] = key, value
            y = np.zeros((c.n_head, c.head_dim))
            if live:
                scores = np.einsum("hd,hsd->hs", query, cache[0, :, :live]) * c.attention_scale(i)
                factors = np.exp(scores - scores.max(-1, keepdims=True))
                y = np.einsum("hs,hsd->hd", factors / factors.sum(-1, keepdims=True), cache[1, :, :live])
            x = x + linear("attn.c_proj", y.reshape(-1))
            inner = ACTIVATIONS[c.activation_function](linear("mlp.c_fc", self._norm(w, f"transformer.h.{i}.ln_2", x)))
            x = x + linear("mlp.c_proj", inner)
        head = w["transformer.wte.weight" if c.tie_word_embeddings else "lm_head.weight"]
        return head @ self._norm(w, "transformer.ln_f", x)

    def _norm(self, w: dict[str, np.ndarray], name: str, x: np.ndarray) -> np.ndarray:
        y = (x - x.mean()) / np.sqrt(x.var() + self.shape.config.layer_norm_epsilon)
        return y * w[f"{name}.weight"] + w[f"{name}.bias"]

    def check(self, token: int, position: int, length: int = 1) -> np.ndarray:
        """One step of both, compared: logits, and what is in the caches."""
        found, wanted = self.step(token, position, length), self.expected(token, position, length)
        # only keys and values are ever rounded to float16, all else is float32
        near = 2e-3 if self.shape.dtype == "float16" else 2e-5
        assert np.abs(found - wanted).max() <= near * np.abs(wanted).max()
        for cache, exact in zip(self.caches, self.exact, strict=True):
            np.testing.assert_allclose(cache, exact, rtol=near, atol=near * np.nanmax(np.abs(exact), initial=1))
        return found

    def tokens(self, count: int) -> Sequence[int]:
        return [int(t) for t in np.random.default_rng(7).integers(0, self.shape.config.vocab_size, count)]
