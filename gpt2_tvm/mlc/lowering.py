"""From a plan to the module that MLC's engines load: the paged functions, their caches, and the model's metadata."""

from __future__ import annotations

import json
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpt2_tvm.errors import UserError
from gpt2_tvm.mlc.names import mlc_name
from gpt2_tvm.toolchains import tensor_intrin

if TYPE_CHECKING:
    from gpt2_tvm.build import Plan
    from gpt2_tvm.pipeline import Lowered


@dataclass(frozen=True)
class Limits:
    """What memory is planned for: sequences at a time, and tokens of one call."""

    max_batch_size: int
    prefill_chunk_size: int

    @classmethod
    def of(cls, plan: Plan) -> Limits:
        """The largest batch of the plan, and its chunk."""
        return cls(max(plan.batch_sizes), plan.prefill_chunk)


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
                "name": mlc_name(name, str(parameter.dtype), plan.scheme),
                "shape": [int(size) for size in parameter.shape],
                "dtype": str(parameter.dtype),
                "preprocs": [],
                "pipeline_stages": [0],
            }
            for name, parameter in parameters
        ],
    }


def lower_paged(plan: Plan, dump_ir: Path | None = None) -> tuple[Lowered, dict[str, Any]]:
    """The module after every phase, and its metadata. The kernels that TVM brings for its cache keep their own
    schedules: those of a CPU are plain loops, but come as they should be built."""
    from tvm import relax, tirx

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
    lowered = lower(mod, plan.target, plan.rules, bounds, dump_ir, plan.tuned, passes=plan.passes)
    told["memory_usage"] = memory_usage(lowered.lowered, bounds)
    _answer(lowered.final, told)
    return lowered, told


def _answer(mod: Any, told: dict[str, Any]) -> None:
    """Add `_metadata()`, which answers with `told` as JSON; last of all, because it tells what memory was planned."""
    from tvm import relax
    from tvm.ir import IRModule, StringImm, transform

    from gpt2_tvm.pipeline import FINALISE

    function = relax.Function([], body=StringImm(json.dumps(told)), ret_ty=relax.AnyType())
    alone = IRModule({"_metadata": function.with_attr("global_symbol", "_metadata")})
    for var, made in transform.Sequential([make() for make in FINALISE])(alone).functions_items():
        mod[var.name_hint] = made


def memory_usage(mod: Any, bounds: dict[str, dict[str, int]]) -> dict[str, int]:
    """Bytes that each exported function takes for itself in a call, at the largest sizes that `bounds` gives it: what
    was planned once, and its results. mod: with memory planned (`Lowered.lowered`)."""
    import tvm_ffi
    from tvm import DataType, relax, tirx

    from gpt2_tvm.expressions import evaluate, to_text

    found: dict[str, int] = {}
    for var, function in mod.functions_items():
        if not isinstance(function, relax.Function):
            continue
        sizes: list[int] = []
        largest = bounds.get(var.name_hint, {})

        def see(call: relax.Call, sizes: list[int] = sizes, largest: dict[str, int] = largest) -> None:
            name = str(getattr(call.op, "name", ""))
            if name not in ("relax.memory.alloc_storage", "relax.builtin.alloc_tensor"):
                return
            extents = (to_text(e, lambda n: str(n.name) if isinstance(n, tirx.Var) else None) for e in call.args[0])
            item = 1 if name.endswith("storage") else DataType(str(call.args[1].value)).itemsize
            sizes.append(prod(evaluate(extent, largest) for extent in extents) * item)

        tvm_ffi.structural_walk(function.body, [(relax.Call, see)], order="pre")
        found[var.name_hint] = sum(sizes)
    return dict(sorted(found.items()))
