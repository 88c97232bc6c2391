"""A tree of candidates in the compiled model: calls of `kernels.stream_tree`, and gathers that targets schedule."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm import te, tirx
from tvm.relax.frontend.nn import Tensor, op

from gpt2_tvm.attention import AttentionKernels, CpuKernels
from gpt2_tvm.kernels.stream_told import CHOICES, TOLD, cpu_choices, gpu_choices, tell_host
from gpt2_tvm.kernels.stream_tree import accept_branch, cpu_argmax, prune_tree


@dataclass(frozen=True)
class TreeRows:
    """ids, parents, masks, depths int32 [B, M]; lengths int32 [B]: see `kernels.stream_tree`."""

    ids: Tensor
    parents: Tensor
    masks: Tensor
    depths: Tensor
    lengths: Tensor

    @property
    def batch(self) -> int:
        return int(self.ids.shape[0])

    @property
    def rows(self) -> int:
        return int(self.ids.shape[1])


def plain(kernels: AttentionKernels) -> AttentionKernels:
    """A target's own kernels, also where attention is materialised."""
    return getattr(kernels, "kernels", kernels)


def on_gpu(kernels: AttentionKernels) -> bool:
    """Whether a model's kernels are a GPU's."""
    return not isinstance(plain(kernels), CpuKernels)


def most_likely(kernels: AttentionKernels, logits: Tensor, lengths: Tensor) -> Tensor:
    """[B, M, V] float32 -> int32 [B, M], the lowest of equal ones; rows past lengths [B] are without meaning."""
    b, m, vocab = (int(s) for s in logits.shape)
    if not on_gpu(kernels):
        out = Tensor.placeholder([b, m], "int32")
        return op.tensor_ir_op(cpu_argmax(b, m, vocab), "most_likely", [logits, lengths], out)
    from gpt2_tvm.kernels.gpu_sampling import argmax

    func = argmax(b * m, vocab, plain(kernels).limits)  # type: ignore[attr-defined]
    flat, out = op.reshape(logits, [b * m, vocab]), Tensor.placeholder([b * m], "int32")
    return op.reshape(op.tensor_ir_op(func, "most_likely", [flat], out), [b, m])


def take(values: Tensor, rows: Tensor, name: str = "take_rows") -> Tensor:
    """values[b, max(rows[b, r], 0)], [B, M, …] -> [B, K, …]."""

    def taken(values: te.Tensor, rows: te.Tensor) -> te.Tensor:
        shape = (rows.shape[0], rows.shape[1], *values.shape[2:])
        zero = tirx.const(0, "int32")

        def value(i: tirx.Var, r: tirx.Var, *e: tirx.Var) -> tirx.Expr:
            place = (i, tirx.max(rows[i, r], zero), *e)
            return values[place]

        return te.compute(shape, value, name="taken")

    return op.tensor_expr_op(taken, name, [values, rows])


def prune(kernels: AttentionKernels, logits: Tensor, tree: TreeRows, keep: int) -> tuple[Tensor, TreeRows]:
    """The `keep` rows whose branches the logits [B, M, V] of an early exit find likeliest -> which these are, int32
    [B, keep], and their own tree."""
    # after its parent, as each token's own row says what comes after itself
    logs = kernels.log_prob(take(logits, tree.parents, "take_parents"), tree.ids)
    b, m = tree.batch, tree.rows
    few, one, all_ = [b, keep], [b], [b, m]
    shapes = [(few, "int32")] * 5 + [(one, "int32"), (all_, "float32"), (all_, "int32")]
    out = [Tensor.placeholder(shape, dtype) for shape, dtype in shapes]
    made: Any = op.tensor_ir_op(
        prune_tree(b, m, keep, on_gpu(kernels)),
        "prune_tree",
        [logs, tree.ids, tree.parents, tree.depths, tree.lengths],
        out,
    )
    kept, ids, parents, masks, depths, lengths, *_ = made
    return kept, TreeRows(ids, parents, masks, depths, lengths)


def accept(
    kernels: AttentionKernels, best: Tensor, tree: TreeRows, positions: Tensor, streams: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The branch that greedy decoding goes down -> path [B, M], counts, positions after it, and rows of streams [B]."""
    b, m = tree.batch, tree.rows
    shapes = [[b, m], [b], [b], [b], [b, m]]
    made: Any = op.tensor_ir_op(
        accept_branch(b, m, streams, on_gpu(kernels)),
        "accept_branch",
        [best, tree.ids, tree.parents, tree.depths, tree.lengths, positions],
        [Tensor.placeholder(shape, "int32") for shape in shapes],
    )
    path, counts, after, taking, _ = made
    return path, counts, after, taking


def choices(kernels: AttentionKernels, logits: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """[B, G, V] float32 -> the likeliest tokens of each row, int32 and float32 [B, G, C]: ids and log-probabilities;
    without meaning where counts [B] are 0."""
    b, g, vocab = (int(s) for s in logits.shape)
    count = min(CHOICES, vocab)
    if not on_gpu(kernels):
        out = [Tensor.placeholder([b, g, count], dtype) for dtype in ("int32", "float32")]
        ids, logs = op.tensor_ir_op(cpu_choices(b, g, vocab, count), "choices", [logits, counts], out)
        return ids, logs
    func = gpu_choices(b * g, vocab, count, plain(kernels).limits)  # type: ignore[attr-defined]
    out = [Tensor.placeholder([b * g, count], dtype) for dtype in ("int32", "float32")]
    ids, logs = op.tensor_ir_op(func, "choices", [op.reshape(logits, [b * g, vocab])], out)
    return op.reshape(ids, [b, g, count]), op.reshape(logs, [b, g, count])


def tell(kernels: AttentionKernels, best: Tensor, path: Tensor, counts: Tensor, logits: Tensor) -> Tensor:
    """What the host needs of a step, streams' logits [B, G, V] included -> int32 [B, …] (`stream_told.tell_host`)."""
    ids, logs = choices(kernels, logits, counts)
    b, rows, g, count = (int(s) for s in (*best.shape, *ids.shape[1:]))
    func = tell_host(b, rows, g, count, on_gpu(kernels))
    out = Tensor.placeholder([b, TOLD + rows + 2 * g * count], "int32")
    return op.tensor_ir_op(func, "tell_host", [best, path, counts, ids, logs], out)
