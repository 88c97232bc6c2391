"""Sampled speculation on the device: what a draft draws, which of it stands, and what is drawn where it does not.

The rule is `decoding.rejection`'s (Leviathan et al. 2023, algorithm 1; Chen et al. 2023): a token drawn with
probability q(x) stands where u q(x) < p(x), and in place of the first that does not comes a draw from max(0, p - q).
Draws take the largest log-probability plus Gumbel noise (Gumbel 1954), so that a draw is an argmax.

Chance is a hash (lowbias32, Ellis 2018) of the sequence's seed, the slot that a token goes to, and for what it is: a
draft's draw, whether that stands, or the target's own draw. What a round throws away at a slot has had no say in
anything before that slot, so that the next round may use the slot's chance again.
"""

# TVMScript is parsed by TVM, not executed: its annotations mean nothing to a type checker.
# mypy: disable-error-code="no-untyped-def,valid-type,misc"

from __future__ import annotations

from functools import cache

from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from gpt2_tvm.kernels.gpu_sample import _mixed, _uniform
from gpt2_tvm.kernels.spec import GpuLimits

STORED = 16  # rows of `drawn`: the shares of the token at slot s are in row s % STORED, so a round has fewer tokens
TOLD = 2  # columns of `told` before the tokens, as in `accept_draft`
DRAFTS, STANDS, OWN = 0x51ED270B, 0x2545F491, 0x1B873593  # what chance is for
LEAST = 1e-37  # below any share that counts, and above the smallest normal float32
NEVER = -1e4  # added to what is drawn only where nothing else can be


# fmt: off
@T.inline
def _hash(hashed, seed, purpose, slot):
    """hashed[0]: what a sequence's chance at a slot begins with."""
    hashed[0] = T.bitwise_xor(T.Cast("uint32", seed), T.uint32(purpose))
    hashed[0] = _mixed(hashed[0])
    hashed[0] = T.bitwise_xor(hashed[0], T.Cast("uint32", slot))
    hashed[0] = _mixed(hashed[0])


@T.inline
def _gumbel(hashed, noise, v):
    """noise[0]: -log(-log(u)), u being the token's own."""
    hashed[1] = T.bitwise_xor(hashed[0], T.Cast("uint32", v))
    hashed[1] = _mixed(hashed[1])
    noise[0] = _uniform(hashed[1])
    noise[0] = -T.log(-T.log(noise[0]))


@T.inline
def _draft_score(i, v, hashed, x, shares, positions, drawn, scores):
    _gumbel(hashed, x, v)
    x[1] = shares[i, v]
    drawn[i, (positions[i] + 1) % STORED, v] = x[1]
    scores[i, v] = T.log(T.max(x[1], T.float32(LEAST))) + x[0]


@T.inline
def _own_score(i, v, hashed, x, shares, drawn, stood, positions, scores):
    """A token that is left of p - q (or of p where all stood), else one of p that nothing left would beat."""
    _gumbel(hashed, x, v)
    x[1] = shares[i, stood[i, 0], v]
    x[2] = x[1]
    if stood[i, 1] == 1:
        x[2] = x[2] - drawn[i, (positions[i] + 1 + stood[i, 0]) % STORED, v]
    if x[2] > T.float32(0):
        scores[i, v] = T.log(T.max(x[2], T.float32(LEAST))) + x[0]
    if x[2] <= T.float32(0):
        scores[i, v] = T.log(T.max(x[1], T.float32(LEAST))) + x[0] + T.float32(NEVER)


@T.inline
def _stand(i, rows, capacity, hashed, x, shares, drawn, history, positions, lengths, seeds, stood):
    stood[i, 0] = 0  # how many stand
    stood[i, 1] = 0  # whether one did not
    for j in T.serial(rows - 1):
        if stood[i, 0] == j and stood[i, 1] == 0 and j + 1 < lengths[i] and positions[i] + 1 + j < capacity:
            _hash(hashed, seeds[i], STANDS, positions[i] + 1 + j)
            x[0] = _uniform(hashed[0])
            x[0] = x[0] * drawn[i, (positions[i] + 1 + j) % STORED, history[i, positions[i] + 1 + j]]
            x[1] = shares[i, j, history[i, positions[i] + 1 + j]]
            stood[i, 1] = 1
            if x[0] < x[1]:
                stood[i, 0] = j + 1
                stood[i, 1] = 0


@T.inline
def _finish(i, rows, capacity, best, stood, lengths, token, positions, drafting, history, told):
    for j in T.serial(rows + TOLD):
        told[i, j] = 0
    if lengths[i] > 0 and positions[i] >= 0 and positions[i] < capacity:
        for j in T.serial(rows - 1):
            if j < stood[i, 0]:
                told[i, TOLD + j] = history[i, T.min(positions[i] + 1 + j, capacity - 1)]
        token[i, 0] = best[i, 0]
        told[i, TOLD + stood[i, 0]] = token[i, 0]
        told[i, 0] = stood[i, 0] + 1
        positions[i] = positions[i] + told[i, 0]
        if positions[i] < capacity:
            history[i, positions[i]] = token[i, 0]
    drafting[i] = positions[i]


@cache
def draft_scores(batch: int, vocab: int, limits: GpuLimits | None) -> PrimFunc:
    """(shares float32 [B, V], positions, seeds int32 [B], drawn float32 [B, STORED, V] in place) -> scores float32
    [B, V], whose largest is a draw from the shares for the slot after positions, where `drawn` remembers them.

    limits: of a GPU; None: for a CPU.
    """
    if limits is not None:
        threads = min(256, limits.threads_per_block)

        @T.prim_func(private=True, s_tir=True)
        def scores_of_draft(
            shares: T.Buffer((batch, vocab), "float32"), positions: T.Buffer((batch,), "int32"),
            seeds: T.Buffer((batch,), "int32"), drawn: T.Buffer((batch, STORED, vocab), "float32"),
            scores: T.Buffer((batch, vocab), "float32"),
        ):
            T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True, "op_pattern": 8})
            hashed = T.sblock_alloc_buffer((2,), "uint32", scope="local")
            x = T.sblock_alloc_buffer((2,), "float32", scope="local")
            for block in T.thread_binding((vocab + threads - 1) // threads, thread="blockIdx.x"):
                for i in T.thread_binding(batch, thread="blockIdx.y"):
                    for tid in T.thread_binding(threads, thread="threadIdx.x"):
                        if block * threads + tid < vocab:
                            _hash(hashed, seeds[i], DRAFTS, positions[i] + 1)
                            _draft_score(i, block * threads + tid, hashed, x, shares, positions, drawn, scores)

        return scores_of_draft

    @T.prim_func(private=True, check_well_formed=False)
    def scores_of_draft_(
        shares: T.Buffer((batch, vocab), "float32"), positions: T.Buffer((batch,), "int32"),
        seeds: T.Buffer((batch,), "int32"), drawn: T.Buffer((batch, STORED, vocab), "float32"),
        scores: T.Buffer((batch, vocab), "float32"),
    ):
        T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True, "op_pattern": 8})
        for i in T.serial(batch):
            hashed = T.alloc_buffer((2,), "uint32", scope="global")
            x = T.alloc_buffer((2,), "float32", scope="global")
            _hash(hashed, seeds[i], DRAFTS, positions[i] + 1)
            for v in T.serial(vocab):
                _draft_score(i, v, hashed, x, shares, positions, drawn, scores)

    return scores_of_draft_


@cache
def accept_drawn(batch: int, rows: int, vocab: int, capacity: int, gpu: bool) -> PrimFunc:
    """(shares float32 [B, M, V], drawn float32 [B, STORED, V], history int32 [B, capacity], positions, lengths, seeds
    int32 [B]) -> stood int32 [B, 2]: how many of the lengths - 1 tokens after positions stand, and 1 if one did not.

    shares: the target's after each row; row 0 is the last id of the text, and row j what was drafted at the j-th slot
    after it.
    """
    if gpu:
        @T.prim_func(private=True, s_tir=True)
        def accept(
            shares: T.Buffer((batch, rows, vocab), "float32"), drawn: T.Buffer((batch, STORED, vocab), "float32"),
            history: T.Buffer((batch, capacity), "int32"), positions: T.Buffer((batch,), "int32"),
            lengths: T.Buffer((batch,), "int32"), seeds: T.Buffer((batch,), "int32"),
            stood: T.Buffer((batch, 2), "int32"),
        ):
            T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True, "op_pattern": 8})
            hashed = T.sblock_alloc_buffer((2,), "uint32", scope="local")
            x = T.sblock_alloc_buffer((2,), "float32", scope="local")
            for i in T.thread_binding(batch, thread="blockIdx.x"):
                for _ in T.thread_binding(1, thread="threadIdx.x"):
                    _stand(i, rows, capacity, hashed, x, shares, drawn, history, positions, lengths, seeds, stood)

        return accept

    @T.prim_func(private=True, check_well_formed=False)
    def accept_(
        shares: T.Buffer((batch, rows, vocab), "float32"), drawn: T.Buffer((batch, STORED, vocab), "float32"),
        history: T.Buffer((batch, capacity), "int32"), positions: T.Buffer((batch,), "int32"),
        lengths: T.Buffer((batch,), "int32"), seeds: T.Buffer((batch,), "int32"),
        stood: T.Buffer((batch, 2), "int32"),
    ):
        T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True, "op_pattern": 8})
        for i in T.serial(batch):
            hashed = T.alloc_buffer((2,), "uint32", scope="global")
            x = T.alloc_buffer((2,), "float32", scope="global")
            _stand(i, rows, capacity, hashed, x, shares, drawn, history, positions, lengths, seeds, stood)

    return accept_


@cache
def own_scores(batch: int, rows: int, vocab: int, limits: GpuLimits | None) -> PrimFunc:
    """(shares float32 [B, M, V], drawn float32 [B, STORED, V], stood int32 [B, 2], positions, seeds int32 [B]) ->
    scores float32 [B, V], whose largest is the target's own draw after the tokens that stood.

    limits: of a GPU; None: for a CPU.
    """
    if limits is not None:
        threads = min(256, limits.threads_per_block)

        @T.prim_func(private=True, s_tir=True)
        def scores_of_target(
            shares: T.Buffer((batch, rows, vocab), "float32"), drawn: T.Buffer((batch, STORED, vocab), "float32"),
            stood: T.Buffer((batch, 2), "int32"), positions: T.Buffer((batch,), "int32"),
            seeds: T.Buffer((batch,), "int32"), scores: T.Buffer((batch, vocab), "float32"),
        ):
            T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True, "op_pattern": 8})
            hashed = T.sblock_alloc_buffer((2,), "uint32", scope="local")
            x = T.sblock_alloc_buffer((3,), "float32", scope="local")
            for block in T.thread_binding((vocab + threads - 1) // threads, thread="blockIdx.x"):
                for i in T.thread_binding(batch, thread="blockIdx.y"):
                    for tid in T.thread_binding(threads, thread="threadIdx.x"):
                        if block * threads + tid < vocab:
                            _hash(hashed, seeds[i], OWN, positions[i] + 1 + stood[i, 0])
                            _own_score(
                                i, block * threads + tid, hashed, x, shares, drawn, stood, positions, scores)

        return scores_of_target

    @T.prim_func(private=True, check_well_formed=False)
    def scores_of_target_(
        shares: T.Buffer((batch, rows, vocab), "float32"), drawn: T.Buffer((batch, STORED, vocab), "float32"),
        stood: T.Buffer((batch, 2), "int32"), positions: T.Buffer((batch,), "int32"),
        seeds: T.Buffer((batch,), "int32"), scores: T.Buffer((batch, vocab), "float32"),
    ):
        T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True, "op_pattern": 8})
        for i in T.serial(batch):
            hashed = T.alloc_buffer((2,), "uint32", scope="global")
            x = T.alloc_buffer((3,), "float32", scope="global")
            _hash(hashed, seeds[i], OWN, positions[i] + 1 + stood[i, 0])
            for v in T.serial(vocab):
                _own_score(i, v, hashed, x, shares, drawn, stood, positions, scores)

    return scores_of_target_


@cache
def finish_drawn(batch: int, rows: int, capacity: int, gpu: bool) -> PrimFunc:
    """(best int32 [B, 1], stood int32 [B, 2], lengths int32 [B], token, positions, drafting, history, told): the end of
    a round as `accept_draft` has it, with what `accept_drawn` and the target's own draw have decided."""
    if gpu:
        @T.prim_func(private=True, s_tir=True)
        def finish(
            best: T.Buffer((batch, 1), "int32"), stood: T.Buffer((batch, 2), "int32"),
            lengths: T.Buffer((batch,), "int32"), token: T.Buffer((batch, 1), "int32"),
            positions: T.Buffer((batch,), "int32"), drafting: T.Buffer((batch,), "int32"),
            history: T.Buffer((batch, capacity), "int32"), told: T.Buffer((batch, rows + TOLD), "int32"),
        ):
            T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True, "op_pattern": 8})
            for i in T.thread_binding(batch, thread="blockIdx.x"):
                for _ in T.thread_binding(1, thread="threadIdx.x"):
                    _finish(i, rows, capacity, best, stood, lengths, token, positions, drafting, history, told)

        return finish

    @T.prim_func(private=True, check_well_formed=False)
    def finish_(
        best: T.Buffer((batch, 1), "int32"), stood: T.Buffer((batch, 2), "int32"),
        lengths: T.Buffer((batch,), "int32"), token: T.Buffer((batch, 1), "int32"),
        positions: T.Buffer((batch,), "int32"), drafting: T.Buffer((batch,), "int32"),
        history: T.Buffer((batch, capacity), "int32"), told: T.Buffer((batch, rows + TOLD), "int32"),
    ):
        T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True, "op_pattern": 8})
        for i in T.serial(batch):
            _finish(i, rows, capacity, best, stood, lengths, token, positions, drafting, history, told)

    return finish_
# fmt: on
