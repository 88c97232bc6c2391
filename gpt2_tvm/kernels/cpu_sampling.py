"""Argmax, the greedy loop's hand-over to its next step, and log-probabilities for CPUs."""

from __future__ import annotations

from functools import cache

from tvm import tirx
from tvm.script import tirx as T

from gpt2_tvm.kernels.math import exp

BLOCK = 16  # lanes that search side by side: LLVM keeps the running maxima in one or two registers


@cache
def greedy_advance(batch: int, vocab: int, capacity: int) -> tirx.PrimFunc:
    """(logits [B, V], token [B, 1] in place, positions [B] in place, history [B, capacity] in place).

    positions[b] += 1, token[b] := argmax(logits[b]) (the lowest index wins ties, NaN never wins), and the new token is
    remembered at history[b, positions[b]], the slot where the next step will append it (dropped past the capacity).
    """
    tail = vocab - vocab % BLOCK

    # fmt: off
    @T.prim_func(private=True, check_well_formed=False)
    def greedy_advance_(
        logits: T.Buffer((batch, vocab), "float32"),
        token: T.Buffer((batch, 1), "int32"),
        positions: T.Buffer((batch,), "int32"),
        history: T.Buffer((batch, capacity), "int32"),
    ):
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True, "op_pattern": 8})
        for i in T.serial(batch):
            best = T.alloc_buffer((BLOCK,), "float32", scope="local")
            where = T.alloc_buffer((BLOCK,), "int32", scope="local")
            for v in T.vectorized(BLOCK):
                best[v] = T.float32(-3.4028234e38)
                where[v] = 0
            for j in T.serial(vocab // BLOCK):
                for v in T.vectorized(BLOCK):
                    where[v] = T.Select(logits[i, j * BLOCK + v] > best[v], j * BLOCK + v, where[v])
                    best[v] = T.Select(logits[i, j * BLOCK + v] > best[v], logits[i, j * BLOCK + v], best[v])
            for v in T.serial(1, BLOCK):
                if T.Or(best[v] > best[0], T.And(best[v] == best[0], where[v] < where[0])):
                    best[0] = best[v]
                    where[0] = where[v]
            for j in T.serial(tail, vocab):
                if logits[i, j] > best[0]:
                    best[0] = logits[i, j]
                    where[0] = j
            token[i, 0] = where[0]
            positions[i] = positions[i] + 1
            if T.And(positions[i] >= 0, positions[i] < capacity):
                history[i, positions[i]] = where[0]
    # fmt: on
    return greedy_advance_


@cache
def log_prob(vocab: int) -> tirx.PrimFunc:
    """(logits [b, n, V] float32, targets [b, n] int32, out [b, n] float32): log softmax at the target, stable."""
    blocks = vocab // BLOCK

    # fmt: off
    @T.prim_func(private=True, check_well_formed=False)
    def log_prob_(lo: T.handle, ta: T.handle, o: T.handle):
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True, "op_pattern": 8})
        b, n = T.int64(), T.int64()
        logits = T.match_buffer(lo, (b, n, vocab), "float32")
        targets = T.match_buffer(ta, (b, n), "int32")
        out = T.match_buffer(o, (b, n), "float32")
        for row in T.parallel(b * n):
            i = T.bind(row // n)
            t = T.bind(row % n)
            lane = T.alloc_buffer((BLOCK,), "float32", scope="local")
            run = T.alloc_buffer((2,), "float32", scope="local")  # maximum, sum
            run[0] = logits[i, t, 0]
            for v in T.vectorized(BLOCK):
                lane[v] = logits[i, t, 0]
            for j in T.serial(blocks):
                for v in T.vectorized(BLOCK):
                    lane[v] = T.max(lane[v], logits[i, t, j * BLOCK + v])
            for v in T.serial(BLOCK):
                run[0] = T.max(run[0], lane[v])
            for j in T.serial(blocks * BLOCK, vocab):
                run[0] = T.max(run[0], logits[i, t, j])
            run[1] = T.float32(0)
            for v in T.vectorized(BLOCK):
                lane[v] = T.float32(0)
            for j in T.serial(blocks):
                for v in T.vectorized(BLOCK):
                    lane[v] = lane[v] + exp(logits[i, t, j * BLOCK + v] - run[0])
            for v in T.serial(BLOCK):
                run[1] = run[1] + lane[v]
            for j in T.serial(blocks * BLOCK, vocab):
                run[1] = run[1] + exp(logits[i, t, j] - run[0])
            out[i, t] = logits[i, t, targets[i, t]] - run[0] - T.log(run[1])
    # fmt: on
    return log_prob_
