"""From a checkpoint's tensors to the parameters that an artifact stores."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from gpt2_tvm.quantization import SCALE, Scheme
from gpt2_tvm.quantization.rows import quantise_rows
from gpt2_tvm.weights import convert, iter_weights

if TYPE_CHECKING:
    from gpt2_tvm.checkpoint import ModelSource
    from gpt2_tvm.quantization.layers import WeightLayout

POSITIONS = "transformer.wpe.weight"


def stored_parameters(source: ModelSource, scheme: Scheme, layout: WeightLayout) -> Iterator[tuple[str, np.ndarray]]:
    """(name, array as stored) of each parameter, in the order of the module's; one tensor in memory at a time.

    Raises UserError, as `weights.iter_weights` does, for a tensor that is not finite or does not fit the dtype.
    """
    for name, array in iter_weights(source, "float32" if scheme.widened else scheme.weight_dtype):
        if array.ndim != 2 or name == POSITIONS:
            yield name, convert(name, array, scheme.compute_dtype)
        elif scheme.scaled:
            quantised, scales = quantise_rows(name, array)
            del array  # the caller writes what it gets before it asks for more
            yield name, layout.store(quantised)
            yield name + SCALE, scales
        else:
            yield name, layout.store(convert(name, array, scheme.weight_dtype))
