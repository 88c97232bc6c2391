"""What MLC's engines look up in a compiled model: one table, and the module that brings what the model itself does not.

Read from web-llm, src/llm_chat.ts (0.2.83) and mlc-llm, cpp/serve/function_table.cc, in 2026.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tvm.ir import IRModule

WEB_LLM, MLC_LLM = "web-llm", "mlc-llm"


@dataclass(frozen=True)
class Function:
    """One name. part: where it comes from: "model" (`paged.PagedGPT2`), "cache", "sampler", "logits", "metadata".
    wanted_by: the engines that cannot do without it; the other one uses it where it is there, or not at all.
    """

    name: str
    part: str
    wanted_by: tuple[str, ...] = ()


FUNCTIONS = (
    Function("_metadata", "metadata", (WEB_LLM, MLC_LLM)),
    Function("embed", "model", (WEB_LLM, MLC_LLM)),
    Function("prefill", "model", (WEB_LLM,)),  # or the batch form, as for decode
    Function("decode", "model", (WEB_LLM,)),
    Function("batch_prefill", "model", (MLC_LLM,)),
    Function("batch_decode", "model", (MLC_LLM,)),
    Function("batch_verify", "model"),
    Function("create_tir_paged_kv_cache", "cache", (WEB_LLM, MLC_LLM)),
    Function("softmax_with_temperature", "sampler", (WEB_LLM, MLC_LLM)),
    Function("argsort_probs", "sampler", (WEB_LLM,)),
    Function("sample_with_top_p", "sampler", (WEB_LLM,)),
    Function("multinomial_from_uniform", "sampler"),
    Function("apply_logit_bias_inplace", "logits", (WEB_LLM, MLC_LLM)),
    Function("apply_penalty_inplace", "logits", (WEB_LLM, MLC_LLM)),
    Function("apply_bitmask_inplace", "logits", (WEB_LLM, MLC_LLM)),
)


def add_functions(mod: IRModule, vocab: int, target: Any) -> IRModule:
    """The module with the sampler and the logit processors beside what it has, for this `tvm.target.Target`."""
    from tvm import IRModule, relax

    from gpt2_tvm.kernels import logit_processors
    from gpt2_tvm.mlc.sampling import Sampler

    gpu = target.kind.name != "llvm"
    sampler = Sampler(gpu)
    brought, _, _ = sampler.export_tvm(spec=sampler.export_spec(vocab), allow_extern=True)
    if not gpu:
        with target:
            brought = relax.backend.DispatchSortScan()(brought)  # the sampler's argsort
    found = dict(mod.functions_items())
    taken = {var.name_hint for var in found}
    for var, function in brought.functions_items():
        if var.name_hint in taken:
            raise RuntimeError(f"two functions are called {var.name_hint}")
        found[var] = function
    joined = IRModule(found, attrs=mod.attrs)
    processors = {
        "apply_logit_bias_inplace": logit_processors.logit_bias,
        "apply_penalty_inplace": logit_processors.penalty,
        "apply_bitmask_inplace": logit_processors.bitmask,
    }
    for name, make in processors.items():
        joined[name] = make(gpu).with_attr("global_symbol", name)
    return joined
