"""Streams as part of the compiled model: one call verifies a tree, keeps what stands, and drafts what may follow.

    x = the lower layers of all M rows of the tree
    prune: an early exit's logits choose K of the M rows           (left out where K is M)
    logits = the upper layers and the head of these rows
    accept: the branch that greedy decoding goes down; its keys and values move to the front of every layer's cache
    streams = the upper layers of G rows that start from the last row of that branch, and the head
    tell: the branch's tokens and the streams' likeliest ones, a few integers

The paper gives every row of the tree its own streams, as nobody knows yet which will be the last; here they follow once
it is known, in the same call: the same candidates from G rows instead of M * G, for a second look at the upper layers'
weights. Where rows cost time, as on a CPU, that is much less.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tvm import te, tirx
from tvm.relax.frontend import nn
from tvm.relax.frontend.nn import Tensor, op

from gpt2_tvm.attention import Rows
from gpt2_tvm.decoding.rejection import TIE
from gpt2_tvm.kernels.math import activation as activate
from gpt2_tvm.quantization import Scheme
from gpt2_tvm.quantization.layers import Linear, Matrix, WeightLayout
from gpt2_tvm.speculation import best_of_rows
from gpt2_tvm.streams import LINEARS, StreamPlan
from gpt2_tvm.streams import tree as trees

if TYPE_CHECKING:
    from gpt2_tvm.config import GPT2Config
    from gpt2_tvm.model import GPT2Block, GPT2LMHeadModel, ModelOptions


def adapter_scheme(scheme: Scheme) -> Scheme:
    """Adapters are not quantised: they are stored in the dtype of the arithmetic."""
    return Scheme("", scheme.compute_dtype, scheme.compute_dtype)


class Adapter(nn.Module):
    """up(down(x)), of low rank."""

    def __init__(self, into: int, out: int, rank: int, scheme: Scheme, layout: WeightLayout) -> None:
        super().__init__()
        self.down = Matrix(into, rank, scheme, layout)
        self.up = Matrix(rank, out, scheme, layout)
        self.dtype = scheme.compute_dtype

    def forward(self, x: Tensor) -> Tensor:
        """[b, n, in] -> float32 [b, n, out]."""
        return self.up.product(self.down.product(x).astype(self.dtype))


class StreamBlock(nn.Module):
    """The adapters of one block."""

    def __init__(self, config: GPT2Config, rank: int, scheme: Scheme, layout: WeightLayout) -> None:
        super().__init__()
        e, inner = config.n_embd, config.n_inner
        self.c_attn = Adapter(e, 3 * e, rank, scheme, layout)
        self.attn_proj = Adapter(e, e, rank, scheme, layout)
        self.c_fc = Adapter(e, inner, rank, scheme, layout)
        self.mlp_proj = Adapter(inner, e, rank, scheme, layout)


class Streams(nn.Module):
    """All that streams add to a model."""

    def __init__(self, config: GPT2Config, plan: StreamPlan, options: ModelOptions) -> None:
        super().__init__()
        scheme = adapter_scheme(options.scheme)
        self.embedding = nn.Parameter([plan.config.streams, config.n_embd], scheme.compute_dtype)
        blocks = [StreamBlock(config, plan.config.rank, scheme, options.layout) for _ in range(plan.config.layers)]
        self.h = nn.ModuleList(blocks)
        self.count, self.layers, self.kept = plan.config.streams, plan.config.layers, plan.kept

    def start(self, x: Tensor, path: Tensor, counts: Tensor) -> Tensor:
        """[B, K, E] and the branch that stood -> [B, G, E], the streams below their first layer."""

        def begin(x: te.Tensor, embedding: te.Tensor, path: te.Tensor, counts: te.Tensor) -> te.Tensor:
            shape, one = (x.shape[0], self.count, x.shape[2]), tirx.const(1, "int32")

            def value(i: tirx.Var, j: tirx.Var, e: tirx.Var) -> tirx.Expr:
                return x[i, path[i, tirx.max(counts[i], one) - one], e] + embedding[j, e]

            return te.compute(shape, value, name="streams")

        return op.tensor_expr_op(begin, "start_streams", [x, self.embedding, path, counts])


def _linear(linear: Linear, x: Tensor, adapter: Adapter | None, act: str | None = None, residual: Any = None) -> Tensor:
    """`Linear.forward`, with an adapter before the activation."""
    if adapter is None:
        return linear(x, activation=act, residual=residual)
    y = op.add(op.add(linear.product(x), linear.bias.astype("float32")), adapter(x))
    if act is not None:
        fast = linear.layout.fast_math

        def activated(y: te.Tensor) -> te.Tensor:
            return te.compute(y.shape, lambda *i: activate(act, y(*i), fast), name="activation")

        y = op.tensor_expr_op(activated, act, [y])
    if residual is not None:
        y = op.add(y, residual.astype("float32"))
    return y.astype(linear.dtype)


def run_block(
    block: GPT2Block, x: Tensor, cache: Tensor, rows: Rows, adapters: StreamBlock | None = None
) -> tuple[Tensor, Tensor]:
    """A block of the model, with adapters or without -> its output and the cache, written to."""
    c_attn, attn_proj, c_fc, mlp_proj = (getattr(adapters, name) if adapters is not None else None for name in LINEARS)
    attn, mlp = block.attn, block.mlp
    qkv = _linear(attn.c_attn, block.ln_1(x), c_attn)
    cache = attn.kernels.append(attn.spec, qkv, cache, rows)
    x = _linear(attn.c_proj, attn.kernels.attend(attn.spec, qkv, cache, rows), attn_proj, residual=x)
    hidden = _linear(mlp.c_fc, block.ln_2(x), c_fc, mlp.activation)
    return _linear(mlp.c_proj, hidden, mlp_proj, residual=x), cache


def stream_step(
    model: GPT2LMHeadModel,
    ids: Tensor,
    parents: Tensor,
    tree: Tensor,
    depths: Tensor,
    positions: Tensor,
    lengths: Tensor,
    caches: list[Tensor],
    look: bool = False,
) -> tuple[Any, ...]:
    """See the module. Inputs int32 [B, M] and [B], as in `tree`; caches are written in place.

    Returns what the host is told (`stream_told.tell_host`; in float32 a branch ends at a near tie) and the caches;
    with `look` logits [B, K, V] of the kept rows, logits [B, G, V] of the streams, counts [B] (rows of the branch that
    stood), kept [B, K] (which rows of the tree these are), and the caches.
    """
    streams, blocks, kernels = model.streams, list(model.transformer.h), model.kernels
    lower = len(blocks) - streams.layers
    held = list(caches)
    rows = Rows(positions, lengths, tree, depths)
    x = model.transformer.embed(ids, rows)
    for i in range(lower):
        x, held[i] = run_block(blocks[i], x, held[i], rows)
    branches, kept = trees.TreeRows(ids, parents, tree, depths, lengths), None
    if streams.kept < branches.rows:
        kept, branches = trees.prune(kernels, model.logits(x), branches, streams.kept)
        x = trees.take(x, kept)
        rows = Rows(positions, branches.lengths, branches.masks, branches.depths)
    top = x
    for i in range(lower, len(blocks)):
        top, held[i] = run_block(blocks[i], top, held[i], rows)
    logits = model.logits(top)

    tolerance = TIE if model.options.scheme.compute_dtype == "float32" else None
    best = best_of_rows(kernels, logits, branches.lengths, tolerance)
    path, counts, after, taking = trees.accept(kernels, best, branches, positions, streams.count)
    path_below = path if kept is None else trees.take(kept, path, "take_path")
    for i, block in enumerate(blocks):
        held[i] = kernels.keep(block.attn.spec, held[i], positions, path_below if i < lower else path, counts)

    chain = Rows(after, taking)
    s = streams.start(x, path, counts)
    for i, adapters in zip(range(lower, len(blocks)), streams.h, strict=True):
        s, held[i] = run_block(blocks[i], s, held[i], chain, adapters)
    if look:
        return (logits, model.logits(s), counts, kept if kept is not None else path, *held)
    return (trees.tell(kernels, best, path, counts, model.logits(s)), *held)
