"""The end of a sampled decode step on a GPU: temperature, top-k and top-p, a draw, the token handed to the next step.

One block serves a row. Nothing is sorted: both cuts are a threshold on the logits, and a threshold is found by halving
the range of float32's 2^32 bit patterns, taken as integers in the order of the numbers (see `gpu_sampling`):

1. the largest logit m
2. top-k: the highest threshold that k logits reach
3. top-p: the highest threshold that leaves a share p of what is left after 2, of exp((x - m) / temperature)
4. the draw: the largest x / temperature + g of those above the threshold, where g = -log(-log(u)) (Gumbel 1954;
   Maddison et al. 2014, "A* sampling"). Each thread draws for its own logits: the token does not depend on their order.

A thread's loop over its logits ends after as many as it has, a number that no compiler knows: told "50 rounds", nvcc
unrolled them all and ran out of registers.

u comes from a hash of the row's seed, the position and the token's id (lowbias32, Ellis 2018): the same seed gives the
same text, whatever the batch, and a step needs no state but the position.
"""

# mypy: disable-error-code="valid-type,misc"
from __future__ import annotations

from functools import cache
from typing import Any

from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from gpt2_tvm.kernels.gpu_sampling import LOWEST, _fan, _threads, in_order
from gpt2_tvm.kernels.spec import GpuLimits

HALVINGS = 32
TOP = 0x7F800000  # +infinity as an ordered integer: the highest threshold
UNIT = 2.0**-24


def _mixed(x: Any) -> Any:
    """lowbias32: uint32 -> uint32, every bit of which depends on every bit of x."""
    x = T.bitwise_xor(x, T.shift_right(x, T.uint32(16))) * T.uint32(0x7FEB352D)
    x = T.bitwise_xor(x, T.shift_right(x, T.uint32(15))) * T.uint32(0x846CA68B)
    return T.bitwise_xor(x, T.shift_right(x, T.uint32(16)))


def _uniform(bits: Any) -> Any:
    """uint32 -> float32 in (0, 1), of 2^24 values."""
    top = T.Cast("int32", T.shift_right(bits, T.uint32(8)))  # a plain signed number: every backend converts it alike
    return (T.Cast("float32", top) + T.float32(0.5)) * T.float32(UNIT)


@cache
def sample_advance(batch: int, vocab: int, capacity: int, limits: GpuLimits) -> PrimFunc:
    """``(logits [B, V] float32, settings [B, 2] float32, choice [B, 2] int32, token [B, 1], positions [B],
    history [B, capacity])``; the last three int32 and in place (arguments 3, 4, 5).

    settings: temperature (0: the most likely token), top_p (1 or more: all) · choice: top_k (0: all), seed. Of equal
    logits at a threshold all are kept. NaN is never drawn. The token goes where `gpu_sampling.greedy_advance` puts it,
    and the position moves on.
    """
    threads = _threads(limits, vocab)
    fan = _fan(threads)

    # fmt: off
    @T.inline
    def total(tid, mine, sums, last, result):
        """result[0] of every thread: the sum of every thread's mine[0]. Two barriers."""
        sums[tid] = mine[0]
        T.tvm_storage_sync("shared")
        if tid < fan:
            mine[0] = T.float32(0)
            for j in T.serial(threads // fan):
                mine[0] = mine[0] + sums[j * fan + tid]
            last[tid] = mine[0]
        T.tvm_storage_sync("shared")
        result[0] = T.float32(0)
        for j in T.serial(fan):
            result[0] = result[0] + last[j]

    @T.inline
    def best(tid, key, found, keys, indices, last_keys, last_indices):
        """key[0], found[0] of every thread: the largest key of all and its index, the lowest of equal ones."""
        keys[tid] = key[0]
        indices[tid] = found[0]
        T.tvm_storage_sync("shared")
        if tid < fan:
            key[0] = LOWEST
            found[0] = 0
            for j in T.serial(threads // fan):
                key[1] = keys[j * fan + tid]
                found[1] = indices[j * fan + tid]
                if key[1] > key[0] or (key[1] == key[0] and found[1] < found[0]):
                    key[0] = key[1]
                    found[0] = found[1]
            last_keys[tid] = key[0]
            last_indices[tid] = found[0]
        T.tvm_storage_sync("shared")
        key[0] = LOWEST
        found[0] = 0
        for j in T.serial(fan):
            key[1] = last_keys[j]
            found[1] = last_indices[j]
            if key[1] > key[0] or (key[1] == key[0] and found[1] < found[0]):
                key[0] = key[1]
                found[0] = found[1]

    @T.inline
    def middle(low, high):
        """low[1]: halfway between low[0] and high[0], rounded up, without overflow."""
        low[1] = T.shift_right(low[0], 1) + T.shift_right(high[0], 1) + T.bitwise_and(
            T.bitwise_or(low[0], high[0]), 1
        )

    @T.prim_func(private=True, s_tir=True)
    def sample_advance(
        logits: T.Buffer((batch, vocab), "float32"),
        settings: T.Buffer((batch, 2), "float32"),
        choice: T.Buffer((batch, 2), "int32"),
        token: T.Buffer((batch, 1), "int32"),
        positions: T.Buffer((batch,), "int32"),
        history: T.Buffer((batch, capacity), "int32"),
    ):
        T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True, "op_pattern": 8})
        sums = T.sblock_alloc_buffer((threads,), "float32", scope="shared")
        last = T.sblock_alloc_buffer((fan,), "float32", scope="shared")
        keys = T.sblock_alloc_buffer((threads,), "int32", scope="shared")
        indices = T.sblock_alloc_buffer((threads,), "int32", scope="shared")
        last_keys = T.sblock_alloc_buffer((fan,), "int32", scope="shared")
        last_indices = T.sblock_alloc_buffer((fan,), "int32", scope="shared")
        x = T.sblock_alloc_buffer((1,), "float32", scope="local")
        bits = T.sblock_alloc_buffer((1,), "int32", scope="local")
        key = T.sblock_alloc_buffer((2,), "int32", scope="local")
        found = T.sblock_alloc_buffer((2,), "int32", scope="local")
        low = T.sblock_alloc_buffer((2,), "int32", scope="local")  # reached by enough, halfway
        high = T.sblock_alloc_buffer((1,), "int32", scope="local")
        mine = T.sblock_alloc_buffer((1,), "float32", scope="local")
        mass = T.sblock_alloc_buffer((1,), "float32", scope="local")
        wanted = T.sblock_alloc_buffer((1,), "float32", scope="local")
        scale = T.sblock_alloc_buffer((2,), "float32", scope="local")  # 1 / temperature, share of the noise
        top = T.sblock_alloc_buffer((1,), "float32", scope="local")
        hashed = T.sblock_alloc_buffer((2,), "uint32", scope="local")
        slot = T.sblock_alloc_buffer((1,), "int32", scope="local")
        for row in T.thread_binding(batch, thread="blockIdx.x"):
            for tid in T.thread_binding(threads, thread="threadIdx.x"):
                scale[0] = T.float32(1)
                scale[1] = T.float32(0)
                if settings[row, 0] > T.float32(0):
                    scale[0] = T.float32(1) / settings[row, 0]
                    scale[1] = T.float32(1)
                # 1. the largest logit
                key[0] = LOWEST
                found[0] = 0
                for i in T.serial((vocab - 1 - tid) // threads + 1):
                    bits[0] = T.reinterpret("int32", logits[row, i * threads + tid])
                    bits[0] = in_order(bits[0])
                    if bits[0] > key[0]:
                        key[0] = bits[0]
                        found[0] = i * threads + tid
                best(tid, key, found, keys, indices, last_keys, last_indices)
                high[0] = key[0]
                top[0] = logits[row, found[0]]
                # 2. top-k
                low[0] = LOWEST + 1
                for cut in T.serial(T.Select(choice[row, 0] > 0, HALVINGS, 0)):  # noqa: B007 - WGSL has no _
                    middle(low, high)
                    mine[0] = T.float32(0)  # counts are exact below 2^24
                    for i in T.serial((vocab - 1 - tid) // threads + 1):
                        bits[0] = T.reinterpret("int32", logits[row, i * threads + tid])
                        bits[0] = in_order(bits[0])
                        if bits[0] >= low[1]:
                            mine[0] = mine[0] + T.float32(1)
                    total(tid, mine, sums, last, mass)
                    if mass[0] >= T.Cast("float32", choice[row, 0]):
                        low[0] = low[1]
                    else:
                        high[0] = low[1] - 1
                # 3. top-p: the first round, with nothing cut, measures what there is
                high[0] = key[0]
                wanted[0] = T.float32(0)
                for halving in T.serial(T.Select(settings[row, 1] < T.float32(1), HALVINGS + 1, 0)):
                    middle(low, high)
                    if halving == 0:
                        low[1] = low[0]
                    mine[0] = T.float32(0)
                    for i in T.serial((vocab - 1 - tid) // threads + 1):
                        x[0] = logits[row, i * threads + tid]
                        bits[0] = T.reinterpret("int32", x[0])
                        bits[0] = in_order(bits[0])
                        if bits[0] >= low[1]:
                            mine[0] = mine[0] + T.exp((x[0] - top[0]) * scale[0])
                    total(tid, mine, sums, last, mass)
                    if halving == 0:
                        wanted[0] = mass[0] * settings[row, 1]
                    if mass[0] >= wanted[0]:
                        low[0] = low[1]
                    else:
                        high[0] = low[1] - 1
                # 4. the draw
                hashed[0] = T.Cast("uint32", choice[row, 1])
                hashed[0] = _mixed(hashed[0])
                hashed[0] = T.bitwise_xor(hashed[0], T.Cast("uint32", positions[row]))
                hashed[0] = _mixed(hashed[0])
                key[0] = LOWEST
                found[0] = 0
                for i in T.serial((vocab - 1 - tid) // threads + 1):
                    x[0] = logits[row, i * threads + tid]
                    bits[0] = T.reinterpret("int32", x[0])
                    bits[0] = in_order(bits[0])
                    if bits[0] >= low[0]:
                        hashed[1] = T.bitwise_xor(hashed[0], T.Cast("uint32", i * threads + tid))
                        hashed[1] = _mixed(hashed[1])
                        mine[0] = _uniform(hashed[1])
                        mine[0] = -T.log(-T.log(mine[0]))
                        x[0] = (x[0] - top[0]) * scale[0] + scale[1] * mine[0]
                        bits[0] = T.reinterpret("int32", x[0])
                        bits[0] = in_order(bits[0])
                        if bits[0] > key[0]:
                            key[0] = bits[0]
                            found[0] = i * threads + tid
                best(tid, key, found, keys, indices, last_keys, last_indices)
                if tid == 0:
                    slot[0] = positions[row] + 1
                    token[row, 0] = found[0]
                    if slot[0] >= 0 and slot[0] < capacity:
                        history[row, slot[0]] = found[0]
                    positions[row] = slot[0]
    # fmt: on
    return sample_advance
