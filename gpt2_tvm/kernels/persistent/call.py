"""The persistent step where the model calls it."""

from __future__ import annotations

from collections.abc import Mapping

from tvm.relax.frontend.nn import Tensor, op

from gpt2_tvm.kernels.persistent.kernel import parameter_shapes, persistent_step, work_elements
from gpt2_tvm.kernels.persistent.shape import StepShape


def decode(
    shape: StepShape,
    ids: Tensor,
    positions: Tensor,
    lengths: Tensor,
    parameters: Mapping[str, Tensor],
    caches: list[Tensor],
) -> Tensor:
    """ids [1, 1], positions [1], lengths [1], the model's parameters by name, caches [2, 1, H, S, D] written in place
    -> logits [1, 1, V] float32."""
    weights = [parameters[name] for name, _ in parameter_shapes(shape)]
    logits = Tensor.placeholder([1, 1, shape.config.vocab_size], "float32")
    work = Tensor.placeholder([work_elements(shape)], "float32")
    first = 3 + len(weights)
    made = op.tensor_ir_inplace_op(
        persistent_step(shape),
        "persistent_step",
        [ids, positions, lengths, *weights, *caches],
        [*range(first, first + len(caches)), -1, -1],
        [*caches, logits, work],
    )
    return made[len(caches)]
