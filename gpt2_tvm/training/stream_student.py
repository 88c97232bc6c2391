"""A frozen GPT-2 in torch with trainable streams in its last layers (`gpt2_tvm.streams`), and their training.

At some places of a text the streams of that place are run, each attending to the text up to there and to the streams
before it, exactly as the compiled model runs them. Stream j learns the model's own distribution two and more tokens
on; where the tokens between were drawn by chance nobody can know them, and such places count for little.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gpt2_tvm.files import replacing_file
from gpt2_tvm.streams import LINEARS, StreamConfig, tensor_shapes
from gpt2_tvm.training.student import HARD, REPORT_EVERY, STATE_EVERY, Course, make_optimizer

if TYPE_CHECKING:
    from gpt2_tvm.config import GPT2Config
    from gpt2_tvm.training.texts import Texts

PLACES = 96  # of each text, where streams are run in one step
SHORTEST = 192  # tokens of a text that are read in one step, at least: short texts are cheap, long ones come as well
APART = 0.5  # the embeddings' deviation at first: streams that start alike take longer to tell their tokens apart
LOOSE_WEIGHT = 0.1  # of a target after a token that was drawn by chance
OURS = dict(zip(LINEARS, ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"), strict=True))
Say = Callable[[str, float], None]


class StreamModel:
    """The model and its streams, in float32.

    Args:
        config: the base model's shape.
        weights: its parameters, as `weights.iter_weights` gives them.
        streams: what to add; `tensors` are their parameters, new ones where None (adapters that change nothing yet).
    """

    def __init__(
        self,
        config: GPT2Config,
        weights: Mapping[str, np.ndarray],
        streams: StreamConfig,
        tensors: Mapping[str, np.ndarray] | None = None,
        seed: int = 0,
    ) -> None:
        import torch

        self.config, self.streams = config, streams
        self.base = {name: torch.from_numpy(np.array(a, np.float32)) for name, a in weights.items()}
        self.tensors: dict[str, Any] = {}
        rng = np.random.default_rng(seed)
        for name, shape in tensor_shapes(streams, config).items():
            if tensors is not None:
                array = np.asarray(tensors[name], np.float32)
            elif name.endswith(".up.weight"):
                array = np.zeros(shape, np.float32)
            else:
                spread = APART if name == "streams.embedding" else shape[1] ** -0.5
                array = rng.normal(0, spread, shape).astype(np.float32)
            self.tensors[name] = torch.from_numpy(array.copy()).requires_grad_()

    @property
    def first(self) -> int:
        """The first layer that streams run through."""
        return self.config.n_layer - self.streams.layers

    def parameters(self) -> list[Any]:
        """What is trained."""
        return list(self.tensors.values())

    def _norm(self, x: Any, name: str) -> Any:
        from torch.nn import functional as F

        b = self.base
        return F.layer_norm(x, x.shape[-1:], b[f"{name}.weight"], b[f"{name}.bias"], self.config.layer_norm_epsilon)

    def _linear(self, x: Any, layer: int, kind: str, streams: bool) -> Any:
        from torch.nn import functional as F

        name = f"transformer.h.{layer}.{OURS[kind]}"
        y = F.linear(x, self.base[f"{name}.weight"], self.base[f"{name}.bias"])
        if streams:
            own = f"streams.h.{layer - self.first}.{kind}"
            y = y + F.linear(F.linear(x, self.tensors[f"{own}.down.weight"]), self.tensors[f"{own}.up.weight"])
        return y

    def _act(self, x: Any) -> Any:
        from torch.nn import functional as F

        kinds = {
            "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
            "gelu": F.gelu,
            "relu": F.relu,
            "silu": F.silu,
        }
        return kinds[self.config.activation_function](x)

    def head(self, x: Any) -> Any:
        """[..., E] -> logits [..., V]."""
        table = "transformer.wte.weight" if self.config.tie_word_embeddings else "lm_head.weight"
        return self._norm(x, "transformer.ln_f") @ self.base[table].T

    def run_base(self, ids: Any) -> tuple[Any, list[tuple[Any, Any]], Any]:
        """int64 [R, T] -> what the streams start from [R, T, E], (keys, values) [R, H, T, D] of their layers, and the
        last layer's output [R, T, E]. Without gradients."""
        import torch
        from torch.nn import functional as F

        c = self.config
        with torch.no_grad():
            x = self.base["transformer.wte.weight"][ids] + self.base["transformer.wpe.weight"][: ids.shape[1]]
            start, held = x, []
            for i in range(c.n_layer):
                if i == self.first:
                    start = x
                name = f"transformer.h.{i}"
                q, k, v = (
                    part.unflatten(-1, (c.n_head, c.head_dim)).transpose(1, 2)
                    for part in self._linear(self._norm(x, f"{name}.ln_1"), i, "c_attn", False).chunk(3, -1)
                )
                if i >= self.first:
                    held.append((k, v))
                y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=c.attention_scale(i))
                x = x + self._linear(y.transpose(1, 2).flatten(2), i, "attn_proj", False)
                h = self._act(self._linear(self._norm(x, f"{name}.ln_2"), i, "c_fc", False))
                x = x + self._linear(h, i, "mlp_proj", False)
        return start, held, x

    def run_streams(self, start: Any, held: list[tuple[Any, Any]], places: Any) -> Any:
        """Logits [R, P, G, V] of the streams at the places int64 [P] of every text."""
        import torch

        c, G = self.config, self.streams.streams
        x = start[:, places][:, :, None] + self.tensors["streams.embedding"]  # [R, P, G, E]
        seen = torch.arange(start.shape[1]) <= places[:, None]  # [P, T]
        before = torch.ones(G, G).tril().bool()
        for i, (k, v) in enumerate(held):
            layer = self.first + i
            name = f"transformer.h.{layer}"
            qkv = self._linear(self._norm(x, f"{name}.ln_1"), layer, "c_attn", True)
            q, own_k, own_v = (part.unflatten(-1, (c.n_head, c.head_dim)) for part in qkv.chunk(3, -1))
            scale = c.attention_scale(layer)
            text = torch.einsum("rpghd,rhtd->rphgt", q, k) * scale
            own = torch.einsum("rpghd,rpkhd->rphgk", q, own_k) * scale
            scores = torch.cat(
                [
                    text.masked_fill(~seen[None, :, None, None], -torch.inf),
                    own.masked_fill(~before[None, None, None], -torch.inf),
                ],
                dim=-1,
            )
            weights = scores.softmax(-1)
            on_text, on_own = weights[..., : k.shape[2]], weights[..., k.shape[2] :]
            y = torch.einsum("rphgt,rhtd->rpghd", on_text, v) + torch.einsum("rphgk,rpkhd->rpghd", on_own, own_v)
            x = x + self._linear(y.flatten(-2), layer, "attn_proj", True)
            h = self._act(self._linear(self._norm(x, f"{name}.ln_2"), layer, "c_fc", True))
            x = x + self._linear(h, layer, "mlp_proj", True)
        return self.head(x)


def stream_loss(model: StreamModel, texts: Texts, rows: np.ndarray, rng: np.random.Generator) -> Any:
    """The loss over some texts at random places, a scalar tensor."""
    import torch

    G, whole = model.streams.streams, texts.ids.shape[1]
    length = int(rng.integers(min(SHORTEST, whole), whole + 1))
    places = np.sort(rng.choice(length - G - 2, PLACES, replace=False))
    start, held, _ = model.run_base(torch.from_numpy(texts.ids[rows][:, :length].astype(np.int64)))
    logits = model.run_streams(start, held, torch.from_numpy(places))
    # stream j at place t says what follows ids[:t + 2 + j]: top[t + 1 + j]
    at = places[:, None] + 1 + np.arange(G)
    top = torch.from_numpy(texts.top[rows][:, at].astype(np.int64))  # [R, P, G, KEPT]
    shares = torch.from_numpy(texts.shares[rows][:, at].astype(np.float32))
    chosen = np.logical_and.accumulate(texts.greedy[rows][:, at], axis=-1)
    weight = torch.from_numpy(np.where(chosen, 1.0, LOOSE_WEIGHT).astype(np.float32))
    logs = torch.log_softmax(logits, -1).gather(-1, top)
    soft = (shares / shares.sum(-1, keepdim=True) * logs).sum(-1)
    return -((soft + HARD * logs[..., 0]) * weight).sum() / weight.sum()


def stream_agreement(model: StreamModel, texts: Texts, seed: int = 0) -> list[float]:
    """For each stream, the share of places in greedy text where it and all before it find the token."""
    import torch

    G, rng = model.streams.streams, np.random.default_rng(seed)
    right, total = np.zeros(G), 0
    with torch.no_grad():
        for row in range(0, len(texts), 4):
            rows = np.arange(row, min(row + 4, len(texts)))
            places = np.sort(rng.choice(texts.ids.shape[1] - G - 2, PLACES, replace=False))
            start, held, _ = model.run_base(torch.from_numpy(texts.ids[rows].astype(np.int64)))
            found = model.run_streams(start, held, torch.from_numpy(places)).argmax(-1).numpy()
            at = places[:, None] + 2 + np.arange(G)
            greedy = texts.greedy[rows][:, at].all(-1)
            right += np.logical_and.accumulate(found == texts.ids[rows][:, at], axis=-1)[greedy].sum(0)
            total += int(greedy.sum())
    return [float(share) for share in right / max(1, total)]


def train_streams(model: StreamModel, texts: Texts, course: Course, state: Path, say: Say) -> None:
    """Train `model.tensors` in place. state: a file that the state is kept in; training goes on from it."""
    import torch

    optimizer, done = make_optimizer(iter(model.parameters()), course.rate), 0
    if state.is_file():
        kept = torch.load(state, weights_only=True)
        with torch.no_grad():
            for name, tensor in kept["tensors"].items():
                model.tensors[name].copy_(tensor)
        optimizer.load_state_dict(kept["optimizer"])
        done = int(kept["step"])
    mean = math.nan
    for step in range(done, course.steps):
        for group in optimizer.param_groups:
            group["lr"] = course.rate_at(step)
        rng = np.random.default_rng([course.seed, step])
        loss = stream_loss(model, texts, rng.integers(0, len(texts), course.rows), rng)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        mean = loss.item() if math.isnan(mean) else 0.98 * mean + 0.02 * loss.item()
        if (step + 1) % REPORT_EVERY == 0:
            say(f"training: step {step + 1} of {course.steps}, loss {mean:.3f}", (step + 1) / course.steps)
        if (step + 1) % STATE_EVERY == 0:
            tensors = {name: tensor.detach() for name, tensor in model.tensors.items()}
            with replacing_file(state) as file:
                torch.save({"tensors": tensors, "optimizer": optimizer.state_dict(), "step": step + 1}, file)
