"""Sampling on the device under the names of MLC's engines: softmax, sorting, and a draw from the nucleus.

Signatures: mlc-llm, python/mlc_llm/compiler_pass/attach_sampler.py and attach_softmax_with_temperature.py. On a
CPU the sort is TVM's own; the rest is ours.
"""

from __future__ import annotations

from typing import Any

from tvm import relax, te, tirx
from tvm.relax.frontend import nn
from tvm.relax.frontend.nn import Tensor, op

from gpt2_tvm.kernels.gpu_sort import sort_falling
from gpt2_tvm.kernels.nucleus import nucleus


class Sampler(nn.Module):
    """The sampling functions; without parameters. gpu: for a device with blocks of threads."""

    def __init__(self, gpu: bool) -> None:
        super().__init__()
        self.gpu = gpu

    def softmax_with_temperature(self, logits: Tensor, temperature: Tensor) -> Tensor:
        """[b, 1, V] float32 and [b] float32 -> probabilities [b, 1, V]; temperatures are positive."""
        return op.softmax(op.divide(logits, op.reshape(temperature, [temperature.shape[0], 1, 1])), axis=-1)

    def argsort_probs(self, probs: Tensor) -> tuple[Tensor, Tensor]:
        """[b, V] float32 -> the same, falling, and where each was, int32 [b, V]."""
        if self.gpu:
            out = [Tensor.placeholder(probs.shape, dtype) for dtype in ("float32", "int32")]
            values, where = op.tensor_ir_op(sort_falling(), "sort_falling", [probs], out)
            return values, where
        builder = relax.BlockBuilder.current()
        order = Tensor(_expr=builder.emit(relax.op.argsort(probs._expr, descending=True, dtype="int32")))

        def taken(probs: te.Tensor, order: te.Tensor) -> te.Tensor:
            return te.compute(probs.shape, lambda i, j: probs[i, order[i, j]], name="sorted_probs")

        return op.tensor_expr_op(taken, "sorted_probs", [probs, order]), order

    def sample_with_top_p(
        self,
        sorted_probs: Tensor,
        sorted_indices: Tensor,
        uniform_samples: Tensor,
        sample_indices: Tensor,
        top_p: Tensor,
    ) -> Tensor:
        """See `nucleus`; -> int32 [n]."""
        out = Tensor.placeholder(sample_indices.shape, "int32")
        inputs = [sorted_probs, sorted_indices, uniform_samples, sample_indices, top_p]
        return op.tensor_ir_op(nucleus(self.gpu), "sample_from_nucleus", inputs, out)

    def multinomial_from_uniform(self, probs: Tensor, uniform_samples: Tensor, sample_indices: Tensor) -> Tensor:
        """Draws from whole rows, in any order of probabilities: [b, V], [n], [n] -> int32 [n]."""

        def counted(probs: te.Tensor) -> te.Tensor:
            return te.compute(probs.shape, lambda i, j: j.astype("int32"), name="every_token")

        def ones(probs: te.Tensor) -> te.Tensor:
            return te.compute((probs.shape[0],), lambda i: tirx.const(1, "float32"), name="whole_mass")

        every = op.tensor_expr_op(counted, "every_token", [probs])
        whole = op.tensor_expr_op(ones, "whole_mass", [probs])
        return self.sample_with_top_p(probs, every, uniform_samples, sample_indices, whole)

    def export_spec(self, vocab: int) -> nn.spec.ModuleSpec:
        """The exported functions; their batch is symbolic, the vocabulary the model's."""
        f32, i32, tensor = "float32", "int32", nn.spec.Tensor
        probs = tensor(["batch_size", vocab], f32)
        draws = {"uniform_samples": tensor(["num_samples"], f32), "sample_indices": tensor(["num_samples"], i32)}
        inputs: dict[str, dict[str, Any]] = {
            "softmax_with_temperature": {
                "logits": tensor(["batch_size", 1, vocab], f32),
                "temperature": tensor(["batch_size"], f32),
            },
            "argsort_probs": {"probs": probs},
            "sample_with_top_p": {
                "sorted_probs": probs,
                "sorted_indices": tensor(["batch_size", vocab], i32),
                **draws,
                "top_p": tensor(["batch_size"], f32),
            },
            "multinomial_from_uniform": {"probs": probs, **draws},
        }
        mode = {"$": {"param_mode": "none", "effect_mode": "none"}}
        methods = [nn.spec.MethodSpec.from_raw({**spec, **mode}, getattr(self, name)) for name, spec in inputs.items()]
        return nn.spec.ModuleSpec(self, list(inputs), methods)
