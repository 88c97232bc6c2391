"""Single weights, the smallest first: by matrix, or of all matrices together with exact selection in two passes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import numpy as np

HALF = 1 << 16
Weights = Iterable[tuple[str, np.ndarray]]


def is_matrix(name: str, array: np.ndarray) -> bool:
    """Whether it is a matrix of a block's linear layer; tables of tokens and positions, and the head, are not."""
    return array.ndim == 2 and ".h." in name


def _bits(array: np.ndarray) -> np.ndarray:
    """Magnitudes of float32 as integers, which are in the same order."""
    return np.ascontiguousarray(array, np.float32).reshape(-1).view(np.uint32) & 0x7FFFFFFF


def smallest(matrix: np.ndarray, count: int) -> np.ndarray:
    """Booleans over the flattened matrix: its `count` smallest magnitudes (of equals, the first)."""
    return _below(_bits(matrix), *_threshold(lambda: iter([_bits(matrix)]), count))[0]


def _threshold(pieces: Callable[[], Iterator[np.ndarray]], count: int) -> tuple[int, int]:
    """(t, n): the `count` smallest of all integers in the pieces are those below t and n of those equal to t.

    Two histograms, of the upper and of the lower 16 bits, so that memory does not grow with the model.
    """
    upper = _histogram(bits >> 16 for bits in pieces())
    high = int(np.searchsorted(np.cumsum(upper), max(count, 1)))
    before = int(upper[:high].sum())
    lower = _histogram(bits[bits >> 16 == high] & (HALF - 1) for bits in pieces())
    low = int(np.searchsorted(np.cumsum(lower) + before, max(count, 1)))
    return (high << 16) | low, count - before - int(lower[:low].sum())


def _histogram(pieces: Iterable[np.ndarray]) -> np.ndarray:
    counts = np.zeros(HALF, np.int64)
    for piece in pieces:
        counts += np.bincount(piece, minlength=HALF)
    return counts


def _below(bits: np.ndarray, threshold: int, equals: int) -> tuple[np.ndarray, int]:
    """Booleans: below the threshold, or among the first `equals` that equal it; and how many equals are left."""
    out = bits < threshold
    same = np.flatnonzero(bits == threshold)[:equals]
    out[same] = True
    return out, equals - len(same)


def zeroed(make: Callable[[], Weights], share: float, scope: str) -> Iterator[tuple[str, np.ndarray]]:
    """All parameters, with `share` of the weights of the blocks' matrices zero.

    make: gives the parameters anew each time that it is called. scope: "layer" takes the share of each matrix, "global"
    of all together. One tensor is in memory at a time.
    """
    threshold, equals = 0, 0
    if scope == "global":
        total = sum(array.size for name, array in make() if is_matrix(name, array))
        threshold, equals = _threshold(
            lambda: (_bits(array) for name, array in make() if is_matrix(name, array)), round(share * total)
        )
    for name, array in make():
        if not is_matrix(name, array):
            yield name, array
            continue
        if scope == "global":
            mask, equals = _below(_bits(array), threshold, equals)
        else:
            mask = smallest(array, round(share * array.size))
        yield name, np.where(mask.reshape(array.shape), array.dtype.type(0), array)
