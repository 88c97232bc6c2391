"""GPT-2 in plain PyTorch, written like gpt-fast: a static KV cache, a mask by position, one function a token.

transformers' own model spends most of a small step in Python; this one is what a careful user of torch would write, and
what torch.compile and CUDA graphs are at their best with. Shapes in comments: b sequences, n rows, E = n_embd, H heads
of size D, S = capacity.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpt2_tvm.artifact import Artifact
from gpt2_tvm.config import GPT2Config
from gpt2_tvm.measure.peers import artifact_weights

MODES = ("eager", "cuda-graph", "reduce-overhead", "max-autotune")
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu": F.gelu,
    "relu": F.relu,
}


class Block(nn.Module):
    keys: Tensor  # [b, H, S, D]
    values: Tensor

    def __init__(self, config: GPT2Config, layer: int, batch: int, capacity: int) -> None:
        super().__init__()
        E, H, D = config.n_embd, config.n_head, config.head_dim
        self.ln_1, self.ln_2 = (nn.LayerNorm(E, config.layer_norm_epsilon) for _ in range(2))
        self.c_attn, self.attn_proj = nn.Linear(E, 3 * E), nn.Linear(E, E)
        self.c_fc, self.mlp_proj = nn.Linear(E, config.n_inner), nn.Linear(config.n_inner, E)
        self.register_buffer("keys", torch.zeros(batch, H, capacity, D), persistent=False)
        self.register_buffer("values", torch.zeros(batch, H, capacity, D), persistent=False)
        self.heads, self.scale = H, config.attention_scale(layer)
        self.activation = ACTIVATIONS[config.activation_function]

    def forward(self, x: Tensor, positions: Tensor, mask: Tensor | None) -> Tensor:
        """mask [1, 1, n, S]; None for a prompt into an empty cache, which looks at itself alone: what flash attention
        takes, and no slot of the cache is read."""
        b, n, E = x.shape
        qkv = self.c_attn(self.ln_1(x)).view(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4)  # [3, b, H, n, D]
        self.keys.index_copy_(2, positions, qkv[1])
        self.values.index_copy_(2, positions, qkv[2])
        if mask is None:
            y = F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2], is_causal=True, scale=self.scale)
        else:
            y = F.scaled_dot_product_attention(qkv[0], self.keys, self.values, attn_mask=mask, scale=self.scale)
        x = x + self.attn_proj(y.transpose(1, 2).reshape(b, n, E))
        return x + self.mlp_proj(self.activation(self.c_fc(self.ln_2(x))))


class TorchGPT2(nn.Module):
    """capacity: slots of the cache. The weights are an artifact's (`load`)."""

    mask: Tensor
    h: Any

    def __init__(self, config: GPT2Config, batch: int, capacity: int) -> None:
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.h = nn.ModuleList([Block(config, i, batch, capacity) for i in range(config.n_layer)])
        self.ln_f = nn.LayerNorm(config.n_embd, config.layer_norm_epsilon)
        self.head = None if config.tie_word_embeddings else nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.register_buffer("mask", torch.ones(capacity, capacity, dtype=torch.bool).tril(), persistent=False)

    @classmethod
    def load(cls, artifact: Artifact, batch: int, capacity: int, dtype: Any, device: str) -> TorchGPT2:
        """The model with an artifact's weights, each rounded to `dtype` (from float16 storage nothing is lost)."""
        with torch.device("meta"):
            model = cls(artifact.config, batch, capacity)
        model = model.to(dtype).to_empty(device=device).eval()
        own = dict(model.named_parameters())
        missing = set(own)
        for name, array in artifact_weights(artifact):
            mine = _our_name(name)
            own[mine].data.copy_(torch.tensor(array))  # raises where the shapes differ
            missing.remove(mine)
        if missing:
            raise RuntimeError(f"{artifact.path} lacks {', '.join(sorted(missing))}")
        for name, buffer in model.named_buffers():
            buffer.copy_(torch.ones_like(buffer).tril() if name == "mask" else torch.zeros_like(buffer))
        return model

    def forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        """ids [b, n] and where they go, int64 [n] -> logits [b, V] after the last, in the model's dtype."""
        return self._logits(ids, positions, self.mask[positions][None, None])

    def prefill(self, ids: Tensor, positions: Tensor) -> Tensor:
        """`forward` into an empty cache; positions: 0, 1, … n - 1."""
        return self._logits(ids, positions, None)

    def _logits(self, ids: Tensor, positions: Tensor, mask: Tensor | None) -> Tensor:
        x = self.wte(ids) + self.wpe(positions)
        for block in self.h:
            x = block(x, positions, mask)
        x = self.ln_f(x[:, -1])
        return F.linear(x, self.wte.weight) if self.head is None else self.head(x)

    def best(self, ids: Tensor, positions: Tensor) -> Tensor:
        """The most likely next token of each sequence, [b, 1]."""
        return self(ids, positions).argmax(-1, keepdim=True)


def _our_name(name: str) -> str:
    """A parameter of `weights.expected_tensors` in this model."""
    name = name.removeprefix("transformer.").replace("lm_head.", "head.")
    return (
        name.replace("attn.c_proj", "attn_proj")
        .replace("attn.c_attn", "c_attn")
        .replace("mlp.c_proj", "mlp_proj")
        .replace("mlp.c_fc", "c_fc")
    )


class Decoder:
    """Prefill and greedy decoding of one model at one batch size, in one of `MODES`.

    eager: as written · cuda-graph: one step captured by hand, its token and position fed back on the device ·
    reduce-overhead, max-autotune: torch.compile's modes, prefill and step.
    """

    def __init__(self, model: TorchGPT2, mode: str, batch: int, capacity: int) -> None:
        if mode not in MODES:
            raise ValueError(f"mode {mode!r} is none of {', '.join(MODES)}")
        self.model, self.mode = model, mode
        device = model.wte.weight.device
        self.token = torch.zeros(batch, 1, dtype=torch.int64, device=device)
        self.position = torch.zeros(1, dtype=torch.int64, device=device)
        self.history = torch.zeros(batch, capacity, dtype=torch.int64, device=device)
        self.places = torch.arange(capacity, device=device)
        self._prefill: Any = model.prefill
        self._step: Any = model.best
        self._graph: Any = None
        if mode in ("reduce-overhead", "max-autotune"):
            self._prefill = torch.compile(model.prefill, mode=mode, fullgraph=True, dynamic=False)
            self._step = torch.compile(model.best, mode=mode, fullgraph=True, dynamic=False)

    def prefill(self, ids: Tensor) -> Tensor:
        """ids [b, n] from an empty cache -> the most likely next token [b, 1]. As in our engine the logits go to the
        host in float32, and it takes their maximum."""
        torch.compiler.cudagraph_mark_step_begin()
        logits = self._prefill(ids, self.places[: ids.shape[1]]).float().cpu().numpy()
        return torch.from_numpy(logits.argmax(-1)).view(-1, 1).to(self.token.device)

    def decode(self, token: Tensor, start: int, n: int) -> list[Tensor]:
        """n steps from slot `start` on -> the n tokens that were appended, on the device, in pieces [b, any]."""
        if self.mode == "cuda-graph":
            return self._replay(token, start, n)
        appended = []
        for i in range(n):
            appended.append(token)
            torch.compiler.cudagraph_mark_step_begin()
            token = self._step(token, self.places[start + i : start + i + 1]).clone()
        return appended

    def _replay(self, token: Tensor, start: int, n: int) -> list[Tensor]:
        if self._graph is None:
            self._capture()
        self.token.copy_(token)
        self.position.fill_(start)
        for _ in range(n):
            self._graph.replay()
        return [self.history[:, start : start + n].clone()]

    def _capture(self) -> None:
        """As torch's documentation asks: warm up on a side stream, then capture."""

        def step() -> None:
            self.history.index_copy_(1, self.position, self.token)
            self.token.copy_(self.model.best(self.token, self.position))
            self.position.add_(1)

        side = torch.cuda.Stream()
        kept = [(b.keys.clone(), b.values.clone()) for b in self.model.h]
        side.wait_stream(torch.cuda.current_stream())  # for the copies too: the steps write into what is copied
        with torch.cuda.stream(side):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            step()
        for block, (keys, values) in zip(self.model.h, kept, strict=True):
            block.keys.copy_(keys)
            block.values.copy_(values)
