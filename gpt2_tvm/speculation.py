"""Speculation inside the compiled model: the target checks what a draft has written into the text and accepts it, all
on the device, greedily (`kernels.accept_draft`) or so that draws keep its distribution (`kernels.accept_drawn`)."""

from __future__ import annotations

from typing import Any

from tvm import te, tirx
from tvm.relax.frontend.nn import Tensor, op

from gpt2_tvm.attention import AttentionKernels
from gpt2_tvm.kernels.accept_draft import TOLD, accept_draft, cpu_near_ties, gpu_near_ties
from gpt2_tvm.kernels.accept_drawn import accept_drawn, draft_scores, finish_drawn, own_scores
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


def _limits(kernels: AttentionKernels) -> Any:
    return plain(kernels).limits if on_gpu(kernels) else None  # type: ignore[attr-defined]


def propose(
    kernels: AttentionKernels,
    shares: Tensor,
    token: Tensor,
    positions: Tensor,
    history: Tensor,
    seeds: Tensor,
    drawn: Tensor,
) -> tuple[Tensor, ...]:
    """A draft's draw from shares [B, 1, V] for the slot after positions -> token, positions and history as
    `greedy_advance` leaves them, and drawn."""
    b, vocab = int(shares.shape[0]), int(shares.shape[2])
    flat = op.reshape(shares, [b, vocab])
    made: Any = op.tensor_ir_inplace_op(
        draft_scores(b, vocab, _limits(kernels)),
        "draft_scores",
        [flat, positions, seeds, drawn],
        [3, -1],
        [drawn, Tensor.placeholder([b, vocab], "float32")],
    )
    drawn, scores = made
    return (*kernels.greedy_advance(scores, token, positions, history), drawn)


def decide(
    kernels: AttentionKernels,
    shares: Tensor,
    lengths: Tensor,
    token: Tensor,
    positions: Tensor,
    drafting: Tensor,
    history: Tensor,
    seeds: Tensor,
    drawn: Tensor,
) -> tuple[Tensor, ...]:
    """The target's shares [B, M, V] after each row and the draft's own -> told, token, positions, drafting, history."""
    b, m, vocab = (int(s) for s in shares.shape)
    capacity, gpu = int(history.shape[1]), on_gpu(kernels)
    stood = op.tensor_ir_op(
        accept_drawn(b, m, vocab, capacity, gpu),
        "accept_drawn",
        [shares, drawn, history, positions, lengths, seeds],
        Tensor.placeholder([b, 2], "int32"),
    )
    scores = op.tensor_ir_op(
        own_scores(b, m, vocab, _limits(kernels)),
        "own_scores",
        [shares, drawn, stood, positions, seeds],
        Tensor.placeholder([b, vocab], "float32"),
    )
    best = most_likely(kernels, op.reshape(scores, [b, 1, vocab]), lengths)
    moved = [token, positions, drafting, history]
    made: Any = op.tensor_ir_inplace_op(
        finish_drawn(b, m, capacity, gpu),
        "finish_drawn",
        [best, stood, lengths, *moved],
        [3, 4, 5, 6, -1],
        [*moved, Tensor.placeholder([b, m + TOLD], "int32")],
    )
    *moved, told = made
    return (told, *moved)
