"""GPT-2 in `relax.frontend.nn`, named as in Hugging Face.

Shapes in comments: b sequences, n rows (tokens) of this call, E = n_embd, H heads of size D, V = vocabulary, S = cache
capacity.

Where the study before us passed `total_seq_len` and a mask, every function here takes the *positions* of its sequences
as an int32 tensor on the device and derives both from it inside the kernels. A length that is a shape makes every step
a new shape: the host computes sizes between kernels and no step can be recorded. A length that is data leaves decode
with static shapes only, so one step is one CUDA graph or one WebGPU command buffer, and sequences of one batch may
stand at different positions.

The KV cache is one tensor a layer, [2, b, H, S, D], updated in place. In a pruned model H, the MLP's width and the
number of inputs that a layer takes are the layer's own (`GPT2Config.heads`, `inner`, `inputs`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm import te, tirx
from tvm.relax.frontend import nn
from tvm.relax.frontend.nn import Tensor, op

from gpt2_tvm.attention import AttentionKernels, Rows
from gpt2_tvm.config import GPT2Config
from gpt2_tvm.kernels.persistent.shape import StepShape
from gpt2_tvm.kernels.spec import AttentionSpec
from gpt2_tvm.quantization import Scheme
from gpt2_tvm.quantization.layers import Linear, Matrix, WeightLayout
from gpt2_tvm.streams import StreamPlan


@dataclass(frozen=True)
class ModelOptions:
    """What the target and the user decide about a model: storage, layout, kernels, and the capacity of its cache in
    tokens. step: decode one sequence by one kernel (`kernels.persistent`)."""

    scheme: Scheme
    layout: WeightLayout
    kernels: AttentionKernels
    capacity: int
    streams: StreamPlan | None = None
    step: StepShape | None = None


class LayerNorm(nn.Module):
    """Mean and variance in float32, in two passes: stable where the residual stream has large outliers.

    kept: how many of its outputs the next layer takes (a pruned one takes fewer than `size`); only these are written.
    """

    def __init__(self, size: int, epsilon: float, dtype: str, kept: int | None = None) -> None:
        super().__init__()
        self.out = size if kept is None else kept
        self.weight = nn.Parameter([self.out], dtype)
        self.bias = nn.Parameter([self.out], dtype)
        if self.out < size:
            self.kept = nn.Parameter([self.out], "int32")
        self.size, self.epsilon, self.dtype = size, epsilon, dtype

    def forward(self, x: Tensor) -> Tensor:
        """[b, n, E] -> [b, n, E], or [b, n, kept]."""
        E, f32 = self.size, "float32"

        def norm(x: te.Tensor, weight: te.Tensor, bias: te.Tensor, *kept: te.Tensor) -> te.Tensor:
            b, n = x.shape[0], x.shape[1]
            k = te.reduce_axis((0, E), name="k")
            total = te.compute((b, n), lambda i, t: te.sum(x[i, t, k].astype(f32), axis=k), name="total")
            mean = te.compute((b, n), lambda i, t: total[i, t] / tirx.const(E, f32), name="mean")
            k2 = te.reduce_axis((0, E), name="k2")
            square = te.compute(
                (b, n),
                lambda i, t: te.sum(
                    (x[i, t, k2].astype(f32) - mean[i, t]) * (x[i, t, k2].astype(f32) - mean[i, t]), axis=k2
                ),
                name="square",
            )
            rstd = te.compute(
                (b, n),
                lambda i, t: tirx.rsqrt(square[i, t] / tirx.const(E, f32) + tirx.const(self.epsilon, f32)),
                name="rstd",
            )

            def normalised(i: tirx.Var, t: tirx.Var, e: tirx.Var) -> tirx.Expr:
                value = x[i, t, kept[0][e] if kept else e].astype(f32)
                y = (value - mean[i, t]) * rstd[i, t] * weight[e].astype(f32) + bias[e].astype(f32)
                return y.astype(self.dtype)

            return te.compute((b, n, self.out), normalised, name="normalised")

        kept = [self.kept] if self.out < E else []
        return op.tensor_expr_op(norm, "layer_norm", [x, self.weight, self.bias, *kept])


class GPT2Attention(nn.Module):
    def __init__(self, config: GPT2Config, layer: int, options: ModelOptions) -> None:
        super().__init__()
        width = config.heads(layer) * config.head_dim  # E, unless heads were cut
        attn, proj, _ = config.inputs(layer)
        self.c_attn = Linear(attn, 3 * width, options.scheme, options.layout)
        self.c_proj = Linear(proj, config.n_embd, options.scheme, options.layout)
        self.gathers = proj < width
        if self.gathers:
            self.kept = nn.Parameter([proj], "int32")
        self.kernels = options.kernels
        self.spec = AttentionSpec(
            config.heads(layer),
            config.head_dim,
            options.capacity,
            options.scheme.compute_dtype,
            config.attention_scale(layer),
        )

    def forward(self, x: Tensor, residual: Tensor, cache: Tensor, rows: Rows) -> Tensor:
        qkv = self.c_attn(x)  # [b, n, 3HD], HD = E unless pruned
        cache = self.kernels.append(self.spec, qkv, cache, rows)  # [2, b, H, S, D], in place
        y = self.kernels.attend(self.spec, qkv, cache, rows)  # [b, n, HD]
        if self.gathers:
            y = op.tensor_expr_op(_taken, "take_inputs", [y, self.kept])  # [b, n, inputs of c_proj]
        return self.c_proj(y, residual=residual)


def _taken(y: te.Tensor, kept: te.Tensor) -> te.Tensor:
    return te.compute((*y.shape[:2], kept.shape[0]), lambda i, t, e: y[i, t, kept[e]], name="taken")


class GPT2MLP(nn.Module):
    def __init__(self, config: GPT2Config, layer: int, options: ModelOptions) -> None:
        super().__init__()
        inner, inputs = config.inner(layer), config.inputs(layer)[2]
        self.c_fc = Linear(inputs, inner, options.scheme, options.layout)
        self.c_proj = Linear(inner, config.n_embd, options.scheme, options.layout)
        self.activation = config.activation_function

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        h = self.c_fc(x, activation=self.activation)  # [b, n, inner]
        return self.c_proj(h, residual=residual)


class GPT2Block(nn.Module):
    def __init__(self, config: GPT2Config, layer: int, options: ModelOptions) -> None:
        super().__init__()
        dtype = options.scheme.compute_dtype
        attn, _, fc = config.inputs(layer)
        self.ln_1 = LayerNorm(config.n_embd, config.layer_norm_epsilon, dtype, attn)
        self.attn = GPT2Attention(config, layer, options)
        self.ln_2 = LayerNorm(config.n_embd, config.layer_norm_epsilon, dtype, fc)
        self.mlp = GPT2MLP(config, layer, options)

    def forward(self, x: Tensor, cache: Tensor, rows: Rows) -> Tensor:
        x = self.attn(self.ln_1(x), x, cache, rows)  # [b, n, E]
        return self.mlp(self.ln_2(x), x)


class GPT2Model(nn.Module):
    def __init__(self, config: GPT2Config, options: ModelOptions) -> None:
        super().__init__()
        E, dtype = config.n_embd, options.scheme.compute_dtype
        roles = ("embedding", "head") if config.tie_word_embeddings else ("embedding",)
        self.wte = Matrix(E, config.vocab_size, options.scheme.of_table(*roles), options.layout)
        self.wpe = nn.Embedding(config.n_positions, E, dtype)
        self.h = nn.ModuleList([GPT2Block(config, i, options) for i in range(config.n_layer)])
        self.ln_f = LayerNorm(E, config.layer_norm_epsilon, dtype)
        self.n_positions, self.n_embd, self.dtype = config.n_positions, E, dtype

    def embed(self, ids: Tensor, rows: Rows) -> Tensor:
        """[b, n] int32 -> [b, n, E]: the token's row plus its position's (positions[b] + t, or + its depth in a
        tree)."""
        table = self.wte.parameters_of_rows()

        def embed(ids: te.Tensor, *inputs: te.Tensor) -> te.Tensor:
            wte, (wpe, positions, *depths) = inputs[: len(table)], inputs[len(table) :]

            def value(i: tirx.Var, t: tirx.Var, e: tirx.Var) -> tirx.Expr:
                offset = depths[0][i, t] if depths else t.astype("int32")
                # padding rows may lie past the context; they must still read inside the table
                place = tirx.min(positions[i] + offset, tirx.const(self.n_positions - 1, "int32"))
                return self.wte.row_element(wte, ids[i, t], e, self.dtype) + wpe[place, e]

            return te.compute((*ids.shape, self.n_embd), value, name="embedding")

        depths = [rows.depths] if rows.depths is not None else []
        return op.tensor_expr_op(embed, "embed", [ids, *table, self.wpe.weight, rows.positions, *depths])

    def forward(self, ids: Tensor, caches: list[Tensor], rows: Rows) -> Tensor:
        """[b, n] int32 -> hidden states [b, n, E], before the last LayerNorm."""
        x = self.embed(ids, rows)
        for block, cache in zip(self.h, caches, strict=True):
            x = block(x, cache, rows)
        return x


class GPT2LMHeadModel(nn.Module):
    """The functions that an artifact exports. All ids, positions and lengths are int32, all logits float32."""

    def __init__(self, config: GPT2Config, options: ModelOptions) -> None:
        super().__init__()
        self.transformer = GPT2Model(config, options)
        self.tied = config.tie_word_embeddings
        if not self.tied:
            self.lm_head = Matrix(config.n_embd, config.vocab_size, options.scheme.of_table("head"), options.layout)
        self.config, self.options = config, options
        self.kernels = options.kernels
        if options.streams is not None:
            from gpt2_tvm.streams.module import Streams

            self.streams = Streams(config, options.streams, options)

    def logits(self, x: Tensor) -> Tensor:
        """[b, n, E] -> [b, n, V] float32; a tied head reads the token table itself."""
        head = self.transformer.wte if self.tied else self.lm_head
        return head.product(self.transformer.ln_f(x))

    def prefill(self, ids: Tensor, positions: Tensor, lengths: Tensor, caches: list[Tensor]) -> Tensor:
        """[b, n] right-padded prompts -> logits [b, 1, V] after each one's last valid row."""
        x = self.transformer(ids, caches, Rows(positions, lengths))  # [b, n, E]
        E = self.config.n_embd

        def last_row(x: te.Tensor, lengths: te.Tensor) -> te.Tensor:
            return te.compute(
                (x.shape[0], 1, E),
                lambda i, _, e: x[i, tirx.max(lengths[i] - 1, tirx.const(0, "int32")), e],
                name="last_row",
            )

        return self.logits(op.tensor_expr_op(last_row, "last_row", [x, lengths]))

    def decode(self, ids: Tensor, positions: Tensor, lengths: Tensor, caches: list[Tensor]) -> Tensor:
        """[B, 1], one new token a sequence -> logits [B, 1, V]. Static shapes throughout."""
        if self.options.step is not None and int(ids.shape[0]) == 1:
            from gpt2_tvm.kernels.persistent.call import decode

            return decode(self.options.step, ids, positions, lengths, dict(self.named_parameters()), caches)
        return self.logits(self.transformer(ids, caches, Rows(positions, lengths)))

    def greedy(
        self, token: Tensor, positions: Tensor, history: Tensor, lengths: Tensor, caches: list[Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One step of a greedy loop that stays on the device: token [B, 1], positions [B] and history [B, S] move on in
        place."""
        logits = self.decode(token, positions, lengths, caches)  # [B, 1, V]
        flat = op.reshape(logits, [token.shape[0], self.config.vocab_size])
        return self.kernels.greedy_advance(flat, token, positions, history)

    def sample(
        self,
        token: Tensor,
        positions: Tensor,
        history: Tensor,
        lengths: Tensor,
        settings: Tensor,
        choice: Tensor,
        caches: list[Tensor],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`greedy` with a draw: settings [B, 2] float32, temperature and top_p; choice [B, 2], top_k and seed."""
        logits = self.decode(token, positions, lengths, caches)  # [B, 1, V]
        flat = op.reshape(logits, [token.shape[0], self.config.vocab_size])
        return self.kernels.sample_advance(flat, settings, choice, token, positions, history)

    def verify(
        self,
        ids: Tensor,
        positions: Tensor,
        lengths: Tensor,
        tree: Tensor,
        depths: Tensor,
        caches: list[Tensor],
    ) -> Tensor:
        """[B, m] candidate tokens, a chain or a tree (`Rows`) -> logits [B, m, V] after each."""
        return self.logits(self.transformer(ids, caches, Rows(positions, lengths, tree, depths)))

    def speculate(
        self,
        history: Tensor,
        token: Tensor,
        positions: Tensor,
        drafting: Tensor,
        lengths: Tensor,
        tree: Tensor,
        depths: Tensor,
        caches: list[Tensor],
    ) -> tuple[Tensor, ...]:
        """Check what a draft has written into history [B, S] after positions [B], as many rows as the chain (tree,
        depths [B, m]) has, and accept what is greedy decoding's: told [B, m + 2] and the state that moved on in place
        (`kernels.accept_draft`)."""
        from gpt2_tvm.decoding.rejection import TIE
        from gpt2_tvm.speculation import accept, best_of_rows, drafted_rows

        ids = drafted_rows(history, positions, int(tree.shape[1]))  # [B, m]
        logits = self.logits(self.transformer(ids, caches, Rows(positions, lengths, tree, depths)))  # [B, m, V]
        tolerance = TIE if self.options.scheme.compute_dtype == "float32" else None
        best = best_of_rows(self.kernels, logits, lengths, tolerance)
        return accept(self.kernels, best, lengths, token, positions, drafting, history)

    def propose(
        self,
        token: Tensor,
        positions: Tensor,
        history: Tensor,
        lengths: Tensor,
        temperature: Tensor,
        seeds: Tensor,
        drawn: Tensor,
        caches: list[Tensor],
    ) -> tuple[Tensor, ...]:
        """`greedy` with a draw at temperature [B], as a draft's: the shares it was drawn from are kept in `drawn`
        [B, STORED, V] (`kernels.accept_drawn`)."""
        from gpt2_tvm.speculation import propose

        logits = self.decode(token, positions, lengths, caches)
        shares = self.softmax_with_temperature(logits, temperature)  # [B, 1, V]
        return propose(self.kernels, shares, token, positions, history, seeds, drawn)

    def decide(
        self,
        history: Tensor,
        token: Tensor,
        positions: Tensor,
        drafting: Tensor,
        lengths: Tensor,
        tree: Tensor,
        depths: Tensor,
        temperature: Tensor,
        seeds: Tensor,
        drawn: Tensor,
        caches: list[Tensor],
    ) -> tuple[Tensor, ...]:
        """`speculate` of what `propose` of a draft has drawn: what stands keeps the target's distribution."""
        from gpt2_tvm.speculation import decide, drafted_rows

        ids = drafted_rows(history, positions, int(tree.shape[1]))  # [B, m]
        logits = self.logits(self.transformer(ids, caches, Rows(positions, lengths, tree, depths)))  # [B, m, V]
        shares = self.softmax_with_temperature(logits, temperature)
        return decide(self.kernels, shares, lengths, token, positions, drafting, history, seeds, drawn)

    def stream(
        self,
        ids: Tensor,
        parents: Tensor,
        tree: Tensor,
        depths: Tensor,
        positions: Tensor,
        lengths: Tensor,
        caches: list[Tensor],
    ) -> Any:
        """Verify a tree and draft what may follow: `streams.module.stream_step`."""
        from gpt2_tvm.streams.module import stream_step

        return stream_step(self, ids, parents, tree, depths, positions, lengths, caches)

    def look(
        self,
        ids: Tensor,
        parents: Tensor,
        tree: Tensor,
        depths: Tensor,
        positions: Tensor,
        lengths: Tensor,
        caches: list[Tensor],
    ) -> Any:
        """`stream` with all logits in place of what they come to."""
        from gpt2_tvm.streams.module import stream_step

        return stream_step(self, ids, parents, tree, depths, positions, lengths, caches, look=True)

    def score(self, ids: Tensor, targets: Tensor, positions: Tensor, lengths: Tensor, caches: list[Tensor]) -> Tensor:
        """[b, n] ids and the ids that follow them -> log-probabilities [b, n] float32; the logits stay on the
        device."""
        logits = self.logits(self.transformer(ids, caches, Rows(positions, lengths)))  # [b, n, V]
        return self.kernels.log_prob(logits, targets)

    def keep(self, positions: Tensor, path: Tensor, lengths: Tensor, caches: list[Tensor]) -> list[Tensor]:
        """After a tree: slots positions[b] + path[b, :lengths[b]] become slots positions[b].. of every layer's cache,
        in place."""
        specs = [block.attn.spec for block in self.transformer.h]
        return [self.kernels.keep(s, c, positions, path, lengths) for s, c in zip(specs, caches, strict=True)]

    def softmax_with_temperature(self, logits: Tensor, temperature: Tensor) -> Tensor:
        """[b, n, V] float32 and [b] float32 -> probabilities [b, n, V]; temperature must be positive."""
        return op.softmax(op.divide(logits, op.reshape(temperature, [temperature.shape[0], 1, 1])), axis=-1)
