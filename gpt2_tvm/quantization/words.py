"""Int8 and float16 in words of 32 bits: the lowest first, rows filled up with zeros to whole words.

Devices differ in what they can load: WGSL has no integer of 8 bits at all, and elsewhere a load of 16 bytes is written
as one of four words. So every GPU gets words. Float16 comes in words for WGSL alone, where half of the devices have no
such type, but all of them a function that makes two float32 of a word.
"""

from __future__ import annotations

import numpy as np

A_WORD = 4


def words_of(k: int) -> int:
    """Words of a row of k weights."""
    return -(-k // A_WORD)


def pack_words(quantised: np.ndarray) -> np.ndarray:
    """int8 [N, K] -> uint32 [N, words_of(K)]."""
    n, k = quantised.shape
    if k % A_WORD == 0:
        return np.ascontiguousarray(quantised).view("<u4").astype(np.uint32, copy=False)
    filled = np.zeros((n, words_of(k) * A_WORD), np.int8)
    filled[:, :k] = quantised
    return filled.view("<u4").astype(np.uint32, copy=False)


def unpack_words(words: np.ndarray, k: int) -> np.ndarray:
    """uint32 [N, words] -> int8 [N, k]: the inverse."""
    return np.ascontiguousarray(words, "<u4").view(np.int8)[:, :k]


HALVES = 2  # float16 in a word


def half_words_of(k: int) -> int:
    """Words of a row of k float16 weights."""
    return -(-k // HALVES)


def pack_halves(weights: np.ndarray) -> np.ndarray:
    """float16 [N, K] -> uint32 [N, half_words_of(K)]."""
    n, k = weights.shape
    if k % HALVES:
        weights = np.concatenate([weights, np.zeros((n, 1), np.float16)], axis=1)
    return np.ascontiguousarray(weights, "<f2").view("<u4").astype(np.uint32, copy=False)


def unpack_halves(words: np.ndarray, k: int) -> np.ndarray:
    """uint32 [N, words] -> float16 [N, k]: the inverse."""
    return np.ascontiguousarray(words, "<u4").view("<f2")[:, :k].astype(np.float16, copy=False)
