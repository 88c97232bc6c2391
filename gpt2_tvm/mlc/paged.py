"""The same GPT-2 over TVM's paged KV cache, with the functions that MLC's engines call.

Shapes as in `model.py`; t tokens of all sequences of a call lie side by side in one row, [1, t, E], and the cache
knows which is whose. The blocks are `model.GPT2Block` as they are: `PagedKernels` stands behind their attention call
and hands it to the cache, which appends and attends in one go (`tvm.relax.frontend.nn.llm.kv_cache`).

Signatures: mlc-llm, python/mlc_llm/model/gpt2/gpt2_model.py (get_default_spec); `functions.py` has the whole list.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm import relax, te, tirx
from tvm.relax.frontend import nn
from tvm.relax.frontend.nn import Tensor, op
from tvm.relax.frontend.nn.llm.kv_cache import PagedKVCache, RopeMode, TIRPagedKVCache
from tvm.target import Target

from gpt2_tvm.config import GPT2Config
from gpt2_tvm.kernels.gpu_merge_states import merge_states
from gpt2_tvm.kernels.spec import AttentionSpec
from gpt2_tvm.model import GPT2Model, ModelOptions
from gpt2_tvm.quantization.layers import Matrix

CREATE = "create_tir_paged_kv_cache"
MERGE = "tir_attention_merge_state"  # what TVM's cache calls its kernel for GPUs


@dataclass(frozen=True)
class LayerCache:
    """What a block is given as its cache: the cache of all layers, and the block's place in it."""

    paged: PagedKVCache
    layer: int


class PagedKernels:
    """`attention.AttentionKernels` over a `LayerCache`, as far as the blocks use it. Positions are the cache's
    business: the blocks are given no `Rows`."""

    def append(self, spec: AttentionSpec, qkv: Tensor, cache: LayerCache, rows: None) -> LayerCache:
        """Nothing: `attend` appends too."""
        return cache

    def attend(self, spec: AttentionSpec, qkv: Tensor, cache: LayerCache, rows: None) -> Tensor:
        """[b, n, 3*H*D] -> [b, n, H*D]; keys and values join the cache."""
        b, n = qkv.shape[:2]
        H, D = spec.n_head, spec.head_dim
        heads = op.reshape(qkv, [b, n, 3 * H, D])  # queries, keys, values, head after head
        y = cache.paged.attention_with_fused_qkv(cache.layer, heads, H, spec.scale)  # [b, n, H, D]
        return op.reshape(y, [b, n, H * D])


class PagedGPT2(nn.Module):
    """The functions of MLC's interface; parameters are those of `model.GPT2LMHeadModel`, name by name."""

    def __init__(self, config: GPT2Config, options: ModelOptions) -> None:
        super().__init__()
        self.transformer = GPT2Model(config, options)
        self.tied = config.tie_word_embeddings
        if not self.tied:
            self.lm_head = Matrix(config.n_embd, config.vocab_size, options.scheme, options.layout)
        self.config = config
        self.dtype = options.scheme.compute_dtype

    def embed(self, input_ids: Tensor) -> Tensor:
        """[t] int32 -> [t, E], without positions: the engine concatenates embeddings before the cache knows them."""
        wte = self.transformer.wte
        table = wte.parameters_of_rows()

        def rows(ids: te.Tensor, *table: te.Tensor) -> te.Tensor:
            return te.compute(
                (ids.shape[0], self.config.n_embd),
                lambda t, e: wte.row_element(table, ids[t], e, self.dtype),
                name="token_rows",
            )

        return op.tensor_expr_op(rows, "embed", [input_ids, *table])

    def hidden(self, embeds: Tensor, cache: PagedKVCache) -> Tensor:
        """[b, n, E] -> hidden states [b, n, E], before the last LayerNorm."""
        positions = cache.get_query_positions(embeds.shape[0] * embeds.shape[1])  # [b*n] int32
        last = self.config.n_positions - 1

        def placed(x: te.Tensor, positions: te.Tensor, wpe: te.Tensor) -> te.Tensor:
            def value(i: tirx.Var, t: tirx.Var, e: tirx.Var) -> tirx.Expr:
                place = tirx.max(
                    tirx.min(positions[i * x.shape[1] + t], tirx.const(last, "int32")), tirx.const(0, "int32")
                )
                return x[i, t, e] + wpe[place, e]

            return te.compute(x.shape, value, name="placed")

        x = op.tensor_expr_op(placed, "add_positions", [embeds, positions, self.transformer.wpe.weight])
        for layer, block in enumerate(self.transformer.h):
            x = block(x, LayerCache(cache, layer), None)
        return x

    def logits(self, x: Tensor) -> Tensor:
        """[b, n, E] -> [b, n, V] float32."""
        head = self.transformer.wte if self.tied else self.lm_head
        return head.product(self.transformer.ln_f(x))

    def prefill(self, input_embed: Tensor, paged_kv_cache: PagedKVCache) -> tuple[Tensor, PagedKVCache]:
        """[1, t, E] of one sequence -> logits [1, 1, V] after its last token."""
        x = self.hidden(input_embed, paged_kv_cache)

        def last(x: te.Tensor) -> te.Tensor:
            return te.compute((1, 1, self.config.n_embd), lambda i, _, e: x[i, x.shape[1] - 1, e], name="last_row")

        return self.logits(op.tensor_expr_op(last, "last_row", [x])), paged_kv_cache

    def decode(self, input_embed: Tensor, paged_kv_cache: PagedKVCache) -> tuple[Tensor, PagedKVCache]:
        """[1, 1, E] -> logits [1, 1, V]."""
        return self.logits(self.hidden(input_embed, paged_kv_cache)), paged_kv_cache

    def batch_prefill(
        self, input_embeds: Tensor, logit_positions: Tensor, paged_kv_cache: PagedKVCache
    ) -> tuple[Tensor, PagedKVCache]:
        """[1, t, E] of all sequences, and where in it each one ends, int32 [b] -> logits [1, b, V]."""
        x = self.hidden(input_embeds, paged_kv_cache)

        def taken(x: te.Tensor, at: te.Tensor) -> te.Tensor:
            return te.compute((1, at.shape[0], self.config.n_embd), lambda i, s, e: x[i, at[s], e], name="last_rows")

        return self.logits(op.tensor_expr_op(taken, "last_rows", [x, logit_positions])), paged_kv_cache

    def batch_decode(self, input_embeds: Tensor, paged_kv_cache: PagedKVCache) -> tuple[Tensor, PagedKVCache]:
        """[b, 1, E] -> logits [b, 1, V]."""
        return self.logits(self.hidden(input_embeds, paged_kv_cache)), paged_kv_cache

    def batch_verify(self, input_embeds: Tensor, paged_kv_cache: PagedKVCache) -> tuple[Tensor, PagedKVCache]:
        """[1, t, E], candidates of all sequences -> logits [1, t, V] after each."""
        return self.logits(self.hidden(input_embeds, paged_kv_cache)), paged_kv_cache

    def export_spec(self) -> nn.spec.ModuleSpec:
        """The exported functions with their symbolic sizes."""
        E, tensor = self.config.n_embd, nn.spec.Tensor
        cache = {"paged_kv_cache": nn.spec.Object(object_type=PagedKVCache)}
        one, side_by_side = tensor([1, 1, E], self.dtype), tensor([1, "seq_len", E], self.dtype)
        inputs: dict[str, dict[str, Any]] = {
            "embed": {"input_ids": tensor(["seq_len"], "int32")},
            "prefill": {"input_embed": side_by_side, **cache},
            "decode": {"input_embed": one, **cache},
            "batch_prefill": {
                "input_embeds": side_by_side,
                "logit_positions": tensor(["batch_size"], "int32"),
                **cache,
            },
            "batch_decode": {"input_embeds": tensor(["batch_size", 1, E], self.dtype), **cache},
            "batch_verify": {"input_embeds": side_by_side, **cache},
        }
        mode = {"$": {"param_mode": "packed", "effect_mode": "none"}}
        methods = [nn.spec.MethodSpec.from_raw({**spec, **mode}, getattr(self, name)) for name, spec in inputs.items()]
        return nn.spec.ModuleSpec(self, list(inputs), methods)


def add_cache_creation(bb: relax.BlockBuilder, config: GPT2Config, dtype: str, target: Target) -> None:
    """Add `create_tir_paged_kv_cache(batch, tokens in all, chunk, page, sliding window 0 or 1)`, each a shape of one
    number, to the module that `bb` builds. TVM brings its kernels with it, which on GPUs come scheduled; of those the
    one that merges two attentions is ours (`kernels.gpu_merge_states` says why)."""
    names = ("max_batch_size", "max_total_seq_len", "prefill_chunk_size", "page_size", "support_sliding_window")
    sizes = {name: tirx.Var(name, "int64") for name in names}
    params = [relax.Var(f"{name}_", relax.ShapeType([size])) for name, size in sizes.items()]
    with bb.function(CREATE, params):
        cache = TIRPagedKVCache(
            attn_kind="mha",
            **sizes,
            layer_partition=relax.ShapeExpr([0, config.n_layer]),
            num_hidden_layers=config.n_layer,
            num_attention_heads=config.n_head,
            num_key_value_heads=config.n_head,
            qk_head_dim=config.head_dim,
            v_head_dim=config.head_dim,
            mla_original_qk_head_dim=0,
            mla_original_v_head_dim=0,
            rope_mode=RopeMode.NONE,
            rope_scale=1,
            rope_theta=10000,  # of kernels that rotate, which RopeMode.NONE never calls
            rope_scaling={},
            rope_ext_factors=relax.prim_value(0),  # none
            rotary_dim=config.head_dim,
            enable_disaggregation=False,
            dtype=dtype,
            target=target,
        )
        bb.emit_func_output(cache._expr)
    if target.kind.name != "llvm":
        ours = merge_states(config.n_head, config.head_dim, dtype).with_attr("global_symbol", MERGE)
        bb.update_func(bb.get().get_global_var(MERGE), ours)
