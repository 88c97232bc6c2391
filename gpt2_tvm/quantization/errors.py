"""What quantisation does to each matrix of a checkpoint: how far the stored values are from the original ones."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from gpt2_tvm.quantization import Scheme
from gpt2_tvm.quantization.forms import Form, WeightLayout, form_of
from gpt2_tvm.quantization.storage import is_matrix, scheme_of
from gpt2_tvm.weights import check_range, iter_weights

if TYPE_CHECKING:
    from gpt2_tvm.checkpoint import ModelSource

ROWS = WeightLayout()  # the layout makes no difference to the values
_AT_ONCE = 4 << 20  # elements compared at a time


@dataclass(frozen=True)
class MatrixError:
    """One matrix, or a whole model.

    Attributes:
        name: of the parameter · rows, columns: its shape · stored_as: "int8", "int4" or a float dtype.
        parameters: weights · stored_mb: megabytes (10^6), scales included · bits: the same for a weight.
        relative_rms: RMS of the error over RMS of the weights, 0 where all weights are 0.
        rms: root mean square of the error · max: its largest magnitude · max_weight: the largest weight's.
        worst_row: the row with the largest relative error (its RMS over the row's), and that error.
    """

    name: str
    rows: int
    columns: int
    stored_as: str
    parameters: int
    stored_mb: float
    bits: float
    relative_rms: float
    rms: float
    max: float
    max_weight: float
    worst_row: int
    worst_row_relative_rms: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def matrix_errors(source: ModelSource, scheme: Scheme) -> Iterator[tuple[MatrixError, float, float]]:
    """Each matrix of a checkpoint, with the sums of squares of its error and of its weights (float64), in the model's
    order; one matrix in memory at a time. Raises UserError for what the scheme cannot store.
    """
    tied = source.config.tie_word_embeddings
    for name, weight in iter_weights(source, "float32"):
        if not is_matrix(name, weight.shape):
            continue
        if scheme.scaled:
            check_range(name, weight, scheme.compute_dtype)
        kind = scheme_of(name, scheme, tied)
        yield _compare(name, weight, kind.weight_dtype, form_of(kind, ROWS))


def _compare(name: str, weight: np.ndarray, stored_as: str, form: Form) -> tuple[MatrixError, float, float]:
    n, k = weight.shape
    arrays = [array for _, array in form.store(name, weight)]
    errors, weights = np.empty(n), np.empty(n)  # sums of squares, by row
    largest = 0.0
    step = max(1, _AT_ONCE // k)
    for start in range(0, n, step):
        some = slice(start, min(start + step, n))
        rows = weight[some].astype(np.float64)
        error = form.values([array[some] for array in arrays], some.stop - start, k).astype(np.float64) - rows
        errors[some], weights[some] = (error**2).sum(axis=1), (rows**2).sum(axis=1)
        largest = max(largest, float(np.abs(error).max()))
    relative = np.sqrt(np.divide(errors, weights, out=np.zeros(n), where=weights > 0))
    worst = int(relative.argmax())
    total, base = float(errors.sum()), float(weights.sum())
    stored = sum(array.nbytes for array in arrays)
    found = MatrixError(
        name=name,
        rows=n,
        columns=k,
        stored_as=stored_as,
        parameters=n * k,
        stored_mb=stored / 1e6,
        bits=8 * stored / (n * k),
        relative_rms=_relative(total, base),
        rms=(total / (n * k)) ** 0.5,
        max=largest,
        max_weight=float(np.abs(weight).max()),
        worst_row=worst,
        worst_row_relative_rms=float(relative[worst]),
    )
    return found, total, base


def whole_model(parts: list[tuple[MatrixError, float, float]]) -> MatrixError:
    """All matrices as one; its worst row is that of the worst matrix (`name` says which)."""
    matrices = [matrix for matrix, _, _ in parts]
    worst = max(matrices, key=lambda m: m.worst_row_relative_rms)
    count = sum(m.parameters for m in matrices)
    stored = sum(m.stored_mb for m in matrices)
    error, base = sum(part[1] for part in parts), sum(part[2] for part in parts)
    return MatrixError(
        name=f"all matrices (worst row: {worst.name})",
        rows=sum(m.rows for m in matrices),
        columns=0,
        stored_as="/".join(dict.fromkeys(m.stored_as for m in matrices)),
        parameters=count,
        stored_mb=stored,
        bits=8e6 * stored / count,
        relative_rms=_relative(error, base),
        rms=(error / count) ** 0.5,
        max=max(m.max for m in matrices),
        max_weight=max(m.max_weight for m in matrices),
        worst_row=worst.worst_row,
        worst_row_relative_rms=worst.worst_row_relative_rms,
    )


def _relative(error: float, base: float) -> float:
    return (error / base) ** 0.5 if base else 0.0
