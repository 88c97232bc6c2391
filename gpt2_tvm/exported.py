"""What an artifact exports of a model: its functions by name, each with the shapes of its arguments."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tvm.relax.frontend import nn

from gpt2_tvm.kernels.accept_drawn import STORED

if TYPE_CHECKING:
    from gpt2_tvm.model import GPT2LMHeadModel


def export_spec(
    model: GPT2LMHeadModel, batch_sizes: tuple[int, ...], verify_widths: tuple[int, ...]
) -> nn.spec.ModuleSpec:
    """The exported functions: symbolic b and n where the shape is the caller's, one static variant a batch size
    elsewhere."""
    i32, S, V = "int32", model.options.capacity, model.config.vocab_size
    tensor = nn.spec.Tensor

    def caches(b: Any) -> list[nn.spec.Tensor]:
        D, dtype = model.config.head_dim, model.options.scheme.compute_dtype
        return [tensor([2, b, model.config.heads(i), S, D], dtype) for i in range(model.config.n_layer)]

    def method(name: str, **inputs: Any) -> nn.spec.MethodSpec:
        mode = "none" if name in ("keep", "softmax_with_temperature") else "packed"
        spec = {**inputs, "$": {"param_mode": mode, "effect_mode": "none"}}
        return nn.spec.MethodSpec.from_raw(spec, getattr(model, name))

    at = {"positions": tensor(["b"], i32), "lengths": tensor(["b"], i32), "caches": caches("b")}
    ids = tensor(["b", "n"], i32)
    methods = {
        "prefill": method("prefill", ids=ids, **at),
        "score": method("score", ids=ids, targets=ids, **at),
        "softmax_with_temperature": method(
            "softmax_with_temperature",
            logits=tensor(["b", 1, V], "float32"),
            temperature=tensor(["b"], "float32"),
        ),
    }
    for B in batch_sizes:
        at = {"positions": tensor([B], i32), "lengths": tensor([B], i32), "caches": caches(B)}
        token = tensor([B, 1], i32)
        methods[f"decode_b{B}"] = method("decode", ids=token, **at)
        methods[f"greedy_b{B}"] = method("greedy", token=token, history=tensor([B, S], i32), **at)
        if model.kernels.samples:
            drawn = {"settings": tensor([B, 2], "float32"), "choice": tensor([B, 2], i32)}
            methods[f"sample_b{B}"] = method("sample", token=token, history=tensor([B, S], i32), **drawn, **at)
        if model.options.streams is not None:
            rows = tensor([B, model.options.streams.rows], i32)
            for name in ("stream", "look"):
                methods[f"{name}_b{B}"] = method(name, ids=rows, parents=rows, tree=rows, depths=rows, **at)
        chance = {"temperature": tensor([B], "float32"), "seeds": tensor([B], i32)}
        chance["drawn"] = tensor([B, STORED, V], "float32")
        if model.kernels.speculates:
            methods[f"propose_b{B}"] = method("propose", token=token, history=tensor([B, S], i32), **chance, **at)
        for m in verify_widths:
            rows = tensor([B, m], i32)
            methods[f"verify_b{B}_m{m}"] = method("verify", ids=rows, tree=rows, depths=rows, **at)
            methods[f"keep_b{B}_m{m}"] = method("keep", path=rows, **at)
            if model.kernels.speculates and m > 1:
                state = {"history": tensor([B, S], i32), "token": token, "positions": at["positions"]}
                state |= {"drafting": at["positions"], "lengths": at["lengths"], "tree": rows, "depths": rows}
                methods[f"speculate_b{B}_m{m}"] = method("speculate", **state, caches=at["caches"])
                if m <= STORED:
                    methods[f"decide_b{B}_m{m}"] = method("decide", **state, **chance, caches=at["caches"])
    return nn.spec.ModuleSpec(model, list(methods), list(methods.values()))
