"""A round's end of greedy speculation inside the compiled model: the target checks what a draft has written into the
text and accepts it, all on the device (`kernels.accept_draft`)."""

from __future__ import annotations

from typing import Any

from tvm import te, tirx
from tvm.relax.frontend.nn import Tensor, op

from gpt2_tvm.attention import AttentionKernels
from gpt2_tvm.kernels.accept_draft import TOLD, accept_draft, cpu_near_ties, gpu_near_ties
from gpt2_tvm.streams.tree import most_likely, on_gpu, plain


def drafted_rows(history: Tensor, positions: Tensor, rows: int) -> Tensor:
    """The last id of each sequence and what was drafted after it: [B, S] int32 and [B] -> [B, rows]."""

    def taken(history: te.Tensor, positions: te.Tensor) -> te.Tensor:
        last = tirx.const(int(history.shape[1]) - 1, "int32")

        def value(i: tirx.Var, j: tirx.Var) -> tirx.Expr:
            slot = tirx.max(positions[i], tirx.const(0, "int32")) + j.astype("int32")
            return history[i, tirx.min(slot, last)]

        return te.compute((history.shape[0], rows), value, name="drafted_rows")

    return op.tensor_expr_op(taken, "drafted_rows", [history, positions])


def best_of_rows(kernels: AttentionKernels, logits: Tensor, lengths: Tensor, tolerance: float | None) -> Tensor:
    """[B, M, V] float32 -> int32 [B, M], the most likely token; -1 - token where another is within `tolerance`."""
    b, m, vocab = (int(s) for s in logits.shape)
    if tolerance is None:
        return most_likely(kernels, logits, lengths)
    if not on_gpu(kernels):
        best = most_likely(kernels, logits, lengths)
        func = cpu_near_ties(b, m, vocab, tolerance)
        return op.tensor_ir_inplace_op(func, "near_ties", [logits, best], 1, best)
    from gpt2_tvm.kernels.gpu_sampling import argmax

    limits = plain(kernels).limits  # type: ignore[attr-defined]
    flat = op.reshape(logits, [b * m, vocab])
    best = op.tensor_ir_op(argmax(b * m, vocab, limits), "most_likely", [flat], Tensor.placeholder([b * m], "int32"))
    best = op.tensor_ir_inplace_op(gpu_near_ties(b * m, vocab, tolerance, limits), "near_ties", [flat, best], 1, best)
    return op.reshape(best, [b, m])


def accept(
    kernels: AttentionKernels,
    best: Tensor,
    lengths: Tensor,
    token: Tensor,
    positions: Tensor,
    drafting: Tensor,
    history: Tensor,
) -> tuple[Tensor, ...]:
    """`kernels.accept_draft` -> told, token, positions, drafting, history."""
    b, m = (int(s) for s in best.shape)
    moved = [token, positions, drafting, history]
    made: Any = op.tensor_ir_inplace_op(
        accept_draft(b, m, int(history.shape[1]), on_gpu(kernels)),
        "accept_draft",
        [best, lengths, *moved],
        [2, 3, 4, 5, -1],
        [*moved, Tensor.placeholder([b, m + TOLD], "int32")],
    )
    *moved, told = made
    return (told, *moved)
