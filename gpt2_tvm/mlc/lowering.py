"""From a plan to the module that MLC's engines load: the paged functions, their caches, and the model's metadata."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gpt2_tvm.errors import UserError
from gpt2_tvm.toolchains import tensor_intrin

if TYPE_CHECKING:
    from gpt2_tvm.build import Plan
    from gpt2_tvm.pipeline import Lowered

PREFILL_CHUNK = 512  # tokens of one prefill call: longer prompts go in several


@dataclass(frozen=True)
class Limits:
    """What memory is planned for: sequences at a time, and tokens of one call."""

    max_batch_size: int
    prefill_chunk_size: int

    @classmethod
    def of(cls, plan: Plan) -> Limits:
        """The largest batch of the plan, and a chunk that its context can hold."""
        return cls(max(plan.batch_sizes), min(PREFILL_CHUNK, plan.max_seq_len))


def metadata(plan: Plan, parameters: list[tuple[str, Any]], limits: Limits) -> dict[str, Any]:
    """What `_metadata` answers (mlc-llm, python/mlc_llm/interface/compile.py). parameters: of export_tvm."""
    config = plan.config
    return {
        "model_type": "gpt2",
        "quantization": plan.scheme.name,
        "context_window_size": plan.max_seq_len,
        "sliding_window_size": -1,
        "attention_sink_size": -1,
        "prefill_chunk_size": limits.prefill_chunk_size,
        "tensor_parallel_shards": 1,
        "pipeline_parallel_stages": 1,
        "disaggregation": False,
        "kv_state_kind": "kv_cache",
        "max_batch_size": limits.max_batch_size,
        "active_vocab_size": config.vocab_size,
        "model_task": "chat",
        "kv_cache": {
            "num_hidden_layers": config.n_layer,
            "num_attention_heads": config.n_head,
            "num_key_value_heads": config.n_head,
            "head_dim": config.head_dim,
        },
        "params": [
            {
                "name": name,
                "shape": [int(size) for size in parameter.shape],
                "dtype": str(parameter.dtype),
                "preprocs": [],
                "pipeline_stages": [0],
            }
            for name, parameter in parameters
        ],
    }


def lower_paged(plan: Plan) -> tuple[Lowered, dict[str, Any]]:
    """The module after every phase, and its metadata. The kernels that TVM brings for its cache keep their own
    schedules: those of a CPU are plain loops, but come as they should be built."""
    from tvm import relax, tirx
    from tvm.ir import StringImm

    from gpt2_tvm.build import weight_layout
    from gpt2_tvm.mlc.functions import add_functions
    from gpt2_tvm.mlc.paged import PagedGPT2, PagedKernels, add_cache_creation
    from gpt2_tvm.model import ModelOptions
    from gpt2_tvm.pipeline import lower

    if plan.config.pruned:
        raise UserError("MLC's paged cache has as many heads in every layer: give a model that is not pruned")
    limits = Limits.of(plan)
    target = plan.target.tvm_target()
    with tensor_intrin.light_stack():
        kernels: Any = PagedKernels()
        model = PagedGPT2(plan.config, ModelOptions(plan.scheme, weight_layout(plan.target), kernels, plan.max_seq_len))
        mod, parameters, _ = model.export_tvm(spec=model.export_spec(), allow_extern=True)
        told = metadata(plan, parameters, limits)
        ours = {var.name_hint for var in mod.get_global_vars()}
        builder = relax.BlockBuilder(mod)
        with target:
            add_cache_creation(builder, plan.config, plan.scheme.compute_dtype, target)
        mod = builder.finalize()
    if plan.target.kind == "cpu":
        for var in mod.get_global_vars():
            if var.name_hint not in ours and isinstance(mod[var], tirx.PrimFunc):
                mod.update_func(var, mod[var].with_attr("tirx.is_scheduled", True))
    mod = add_functions(mod, plan.config.vocab_size, target)
    answer = relax.Function([], body=StringImm(json.dumps(told)), ret_ty=relax.AnyType())
    mod["_metadata"] = answer.with_attr("global_symbol", "_metadata")  # without, it counts as dead code
    rows = {"seq_len": limits.prefill_chunk_size}
    bounds = {
        "embed": rows,
        "prefill": rows,
        "batch_prefill": {**rows, "batch_size": limits.max_batch_size},
        "batch_decode": {"batch_size": limits.max_batch_size},
        "batch_verify": rows,
        **{name: {"batch_size": limits.max_batch_size} for name in ("softmax_with_temperature", "argsort_probs")},
        **{
            name: {"batch_size": limits.max_batch_size, "num_samples": limits.max_batch_size}
            for name in ("sample_with_top_p", "multinomial_from_uniform")
        },
    }
    return lower(mod, plan.target, plan.rules, bounds), told
