"""What a pass over a tree of candidates decides on the device: which rows go on, and which branch stands.

One task a sequence, whatever the target: a tree has at most 16 rows, and each row needs what became of its parent.
Inputs are int32: `ids`, `parents` (-1 for row 0, the last token of the text; below its own number for every other row)
and `depths` (0 for row 0), each [B, M]; `lengths` [B], the rows that count (0: the sequence takes no part).
"""

# TVMScript is parsed by TVM, not executed: its annotations mean nothing to a type checker.
# mypy: disable-error-code="no-untyped-def,valid-type,misc"

from __future__ import annotations

from functools import cache

from tvm.script import tirx as T
from tvm.tirx import PrimFunc

FAR = -1e30  # below the score of every branch
LANES = 16  # that search side by side


# fmt: off
@T.inline
def _accept(i, rows, streams, best, ids, parents, depths, lengths, positions, path, counts, after, taking, falls):
    for j in T.serial(rows):
        falls[i, j] = 0
        if j > 0:
            falls[i, j] = 1
            if ids[i, j] == best[i, T.max(parents[i, j], 0)]:
                falls[i, j] = falls[i, T.max(parents[i, j], 0)]
    counts[i] = 0
    taking[i] = 0
    after[i] = 0  # the last row of the branch, for now
    for j in T.serial(rows):
        if j < lengths[i] and falls[i, j] == 0 and depths[i, j] >= counts[i]:
            counts[i] = depths[i, j] + 1
            taking[i] = streams
            after[i] = j
    for j in T.serial(rows):
        path[i, j] = 0
    for j in T.serial(rows):
        if j < counts[i]:
            path[i, counts[i] - 1 - j] = after[i]
            after[i] = T.max(parents[i, after[i]], 0)
    after[i] = positions[i] + counts[i]


@T.inline
def _prune(i, rows, keep, logs, ids, parents, depths, lengths, kept, ids_, parents_, masks_, depths_, lengths_, score,
           place):
    for j in T.serial(rows):
        score[i, j] = T.float32(0)
        if j > 0:
            # a token's log-probability is 0 or less, so that no branch scores better than a part of it
            score[i, j] = score[i, T.max(parents[i, j], 0)] + T.min(logs[i, j], T.float32(0))
        if j >= lengths[i]:
            score[i, j] = T.float32(FAR)
    lengths_[i] = 0
    for j in T.serial(rows):
        place[i, j] = 0  # how many come before it; then, for one that is kept, its new number
        for other in T.serial(rows):
            if score[i, other] > score[i, j] or (score[i, other] == score[i, j] and other < j):
                place[i, j] = place[i, j] + 1
        if place[i, j] < keep:
            place[i, j] = lengths_[i]
            kept[i, place[i, j]] = j
            ids_[i, place[i, j]] = ids[i, j]
            depths_[i, place[i, j]] = depths[i, j]
            parents_[i, place[i, j]] = -1
            masks_[i, place[i, j]] = T.shift_left(1, place[i, j])
            if j > 0:
                parents_[i, place[i, j]] = place[i, T.max(parents[i, j], 0)]
                masks_[i, place[i, j]] = T.bitwise_or(
                    masks_[i, place[i, j]], masks_[i, T.min(place[i, T.max(parents[i, j], 0)], keep - 1)])
            lengths_[i] = lengths_[i] + 1
    lengths_[i] = T.min(lengths[i], keep)


@cache
def cpu_argmax(batch: int, rows: int, vocab: int) -> PrimFunc:
    """(logits float32 [B, M, V], lengths [B]) -> int32 [B, M]: the lowest of the indices with the largest value; NaN
    never wins. Rows past a sequence's own are 0."""
    whole = vocab // LANES

    @T.prim_func(private=True, check_well_formed=False)
    def argmax(
        logits: T.Buffer((batch, rows, vocab), "float32"), lengths: T.Buffer((batch,), "int32"),
        best: T.Buffer((batch, rows), "int32"),
    ):
        T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True, "op_pattern": 8})
        for i in T.serial(batch):
            for r in T.serial(rows):
                best[i, r] = 0
                if r < lengths[i]:
                    top = T.alloc_buffer((LANES,), "float32", scope="local")
                    where = T.alloc_buffer((LANES,), "int32", scope="local")
                    for v in T.vectorized(LANES):
                        top[v] = T.float32(-3.4028234e38)
                        where[v] = 0
                    for j in T.serial(whole):
                        for v in T.vectorized(LANES):
                            where[v] = T.Select(logits[i, r, j * LANES + v] > top[v], j * LANES + v, where[v])
                            top[v] = T.max(top[v], logits[i, r, j * LANES + v])
                    for j in T.serial(whole * LANES, vocab):
                        if logits[i, r, j] > top[0] or (logits[i, r, j] == top[0] and j < where[0]):
                            top[0] = logits[i, r, j]
                            where[0] = j
                    for v in T.serial(1, LANES):
                        if top[v] > top[0] or (top[v] == top[0] and where[v] < where[0]):
                            top[0] = top[v]
                            where[0] = where[v]
                    best[i, r] = where[0]

    return argmax


@cache
def accept_branch(batch: int, rows: int, streams: int, gpu: bool) -> PrimFunc:
    """(best, ids, parents, depths [B, M], lengths, positions [B]) -> (path [B, M], counts, after, taking [B], falls
    [B, M]), all int32.

    best: the most likely token after each row. path: the rows of the branch that greedy decoding goes down, from row
    0; counts: how many these are (0 for a sequence that takes no part); after: positions + counts; taking: `streams`,
    or 0 with counts; falls: 1 for a row that does not stand, or that one above does not.
    """
    if gpu:
        @T.prim_func(private=True, s_tir=True)
        def accept(
            best: T.Buffer((batch, rows), "int32"), ids: T.Buffer((batch, rows), "int32"),
            parents: T.Buffer((batch, rows), "int32"), depths: T.Buffer((batch, rows), "int32"),
            lengths: T.Buffer((batch,), "int32"), positions: T.Buffer((batch,), "int32"),
            path: T.Buffer((batch, rows), "int32"), counts: T.Buffer((batch,), "int32"),
            after: T.Buffer((batch,), "int32"), taking: T.Buffer((batch,), "int32"),
            falls: T.Buffer((batch, rows), "int32"),
        ):
            T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True, "op_pattern": 8})
            for i in T.thread_binding(batch, thread="blockIdx.x"):
                for _ in T.thread_binding(1, thread="threadIdx.x"):
                    _accept(i, rows, streams, best, ids, parents, depths, lengths, positions, path, counts, after,
                            taking, falls)

        return accept

    @T.prim_func(private=True, check_well_formed=False)
    def accept_(
        best: T.Buffer((batch, rows), "int32"), ids: T.Buffer((batch, rows), "int32"),
        parents: T.Buffer((batch, rows), "int32"), depths: T.Buffer((batch, rows), "int32"),
        lengths: T.Buffer((batch,), "int32"), positions: T.Buffer((batch,), "int32"),
        path: T.Buffer((batch, rows), "int32"), counts: T.Buffer((batch,), "int32"),
        after: T.Buffer((batch,), "int32"), taking: T.Buffer((batch,), "int32"),
        falls: T.Buffer((batch, rows), "int32"),
    ):
        T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True, "op_pattern": 8})
        for i in T.serial(batch):
            _accept(i, rows, streams, best, ids, parents, depths, lengths, positions, path, counts, after, taking,
                    falls)

    return accept_


@cache
def prune_tree(batch: int, rows: int, keep: int, gpu: bool) -> PrimFunc:
    """(logs float32 [B, M], ids, parents, depths [B, M], lengths [B]) -> (kept, ids, parents, masks, depths [B, K],
    lengths [B], score float32 [B, M], place [B, M]), int32 but for two.

    logs: the log-probability of each row's token after its parent. kept: the K rows whose branches have the largest
    sums of these, in order: with a row are kept those above it. What follows is the tree of these rows alone; bit r of
    a row's mask says that row r is itself or above it.
    """
    if gpu:
        @T.prim_func(private=True, s_tir=True)
        def prune(
            logs: T.Buffer((batch, rows), "float32"), ids: T.Buffer((batch, rows), "int32"),
            parents: T.Buffer((batch, rows), "int32"), depths: T.Buffer((batch, rows), "int32"),
            lengths: T.Buffer((batch,), "int32"), kept: T.Buffer((batch, keep), "int32"),
            ids_: T.Buffer((batch, keep), "int32"), parents_: T.Buffer((batch, keep), "int32"),
            masks_: T.Buffer((batch, keep), "int32"), depths_: T.Buffer((batch, keep), "int32"),
            lengths_: T.Buffer((batch,), "int32"), score: T.Buffer((batch, rows), "float32"),
            place: T.Buffer((batch, rows), "int32"),
        ):
            T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True, "op_pattern": 8})
            for i in T.thread_binding(batch, thread="blockIdx.x"):
                for _ in T.thread_binding(1, thread="threadIdx.x"):
                    _prune(i, rows, keep, logs, ids, parents, depths, lengths, kept, ids_, parents_, masks_, depths_,
                           lengths_, score, place)

        return prune

    @T.prim_func(private=True, check_well_formed=False)
    def prune_(
        logs: T.Buffer((batch, rows), "float32"), ids: T.Buffer((batch, rows), "int32"),
        parents: T.Buffer((batch, rows), "int32"), depths: T.Buffer((batch, rows), "int32"),
        lengths: T.Buffer((batch,), "int32"), kept: T.Buffer((batch, keep), "int32"),
        ids_: T.Buffer((batch, keep), "int32"), parents_: T.Buffer((batch, keep), "int32"),
        masks_: T.Buffer((batch, keep), "int32"), depths_: T.Buffer((batch, keep), "int32"),
        lengths_: T.Buffer((batch,), "int32"), score: T.Buffer((batch, rows), "float32"),
        place: T.Buffer((batch, rows), "int32"),
    ):
        T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True, "op_pattern": 8})
        for i in T.serial(batch):
            _prune(i, rows, keep, logs, ids, parents, depths, lengths, kept, ids_, parents_, masks_, depths_,
                   lengths_, score, place)

    return prune_
# fmt: on
