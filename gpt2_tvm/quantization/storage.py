"""From a checkpoint's tensors to the parameters that an artifact stores."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from gpt2_tvm.quantization import TABLES, Scheme
from gpt2_tvm.quantization.forms import form_of
from gpt2_tvm.weights import EMBEDDING, HEAD, check_range, convert, iter_weights

if TYPE_CHECKING:
    from gpt2_tvm.checkpoint import ModelSource
    from gpt2_tvm.config import GPT2Config
    from gpt2_tvm.quantization.forms import WeightLayout
    from gpt2_tvm.streams import StreamPlan

POSITIONS = "transformer.wpe.weight"


def stored_parameters(source: ModelSource, scheme: Scheme, layout: WeightLayout) -> Iterator[tuple[str, np.ndarray]]:
    """(name, array as stored) of each parameter, in the order of the module's; one tensor in memory at a time.

    Raises UserError, as `weights.iter_weights` does, for a tensor that is not finite or does not fit the dtype.
    """
    tied = source.config.tie_word_embeddings
    for name, array in iter_weights(source, "float32" if scheme.widened else scheme.weight_dtype):
        if not is_matrix(name, array.shape):
            yield name, convert(name, array, scheme.compute_dtype)
            continue
        if scheme.scaled and scheme.compute_dtype != "float32":
            check_range(name, array, scheme.compute_dtype)
        for suffix, stored in form_of(scheme_of(name, scheme, tied), layout).store(name, array):
            yield name + suffix, stored


def is_matrix(name: str, shape: Sequence[int]) -> bool:
    """Whether a parameter is stored as the scheme says: a linear weight, or the token table."""
    return len(shape) == 2 and name != POSITIONS


def scheme_of(name: str, scheme: Scheme, tied: bool) -> Scheme:
    """The scheme of the matrix `name` of a model: a table may keep its floats."""
    if name == EMBEDDING:
        return scheme.of_table(*TABLES) if tied else scheme.of_table("embedding")
    return scheme.of_table("head") if name == HEAD else scheme


def stored_streams(
    plan: StreamPlan, config: GPT2Config, scheme: Scheme, layout: WeightLayout
) -> Iterator[tuple[str, np.ndarray]]:
    """The same for streams, whose adapters are stored in the dtype of the arithmetic, whatever the scheme."""
    from gpt2_tvm.streams import read_tensors

    form = form_of(Scheme("", scheme.compute_dtype, scheme.compute_dtype), layout)
    for name, array in read_tensors(plan, config):
        if name == "streams.embedding":
            yield name, convert(name, array, scheme.compute_dtype)
        else:
            for suffix, stored in form.store(name, array):
                yield name + suffix, stored
