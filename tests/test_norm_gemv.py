"""`NormGemv` and residual add with LayerNorm: numbers on a WebGPU device, against the same functions as plain loops."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
import pytest
import tvm
from tvm import tirx

from gpt2_tvm.build import make_plan
from gpt2_tvm.config import GPT2Config
from gpt2_tvm.schedules.gemv_config import GemvConfig
from gpt2_tvm.schedules.norm_gemv import NormGemv
from targets import load_target

pytest.importorskip("wgpu", reason="needs wgpu: pip install 'gpt2-tvm[webgpu]'")
wgsl_harness = pytest.importorskip("wgsl_harness")

POINTS = {
    "ours": None,
    "rows of threads": GemvConfig(ts=4, tr=16, tile_s=2, tile_r=4, vec_c=1),
    "one a block": GemvConfig(ts=1, tr=64),
    "partial tiles": GemvConfig(ts=16, tr=8, tile_s=3, tile_r=2, vec_c=1),
}


@cache
def fused(quantization: str, embd: int, passes: str = "all") -> Any:
    """Functions of a model before any rule, with the target that they are for."""
    from gpt2_tvm.build import lower_plan

    config = GPT2Config(vocab_size=61, n_positions=512, n_embd=embd, n_layer=1, n_head=3)
    plan = make_plan(config, load_target("webgpu"), quantization, batch_sizes=(1, 3), verify_widths=(2,), passes=passes)
    with plan.target.tvm_target() as target:
        return lower_plan(plan)[0].fused, target


def functions(mod: Any, *starts: str) -> Iterator[tuple[str, tirx.PrimFunc]]:
    for var, func in mod.functions_items():
        static = isinstance(func, tirx.PrimFunc) and all(
            isinstance(e, tirx.IntImm) for p in func.params for e in p.shape
        )
        if static and var.name_hint.startswith(starts):
            yield var.name_hint, func


def inputs(func: tirx.PrimFunc, results: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    made = []
    for i, p in enumerate(func.params):
        shape, dtype = [int(e) for e in p.shape], str(p.dtype)
        if i >= len(func.params) - results:
            made.append(np.zeros(shape, dtype))
        elif dtype == "int32":
            made.append(np.asarray(rng.integers(0, 3, shape), np.int32))  # lengths, some of them too short
        elif dtype == "uint32":
            made.append(rng.integers(0, 2**32, shape, dtype=np.uint32))
        else:
            made.append((rng.standard_normal(shape) * 0.5 + 3.0 * (len(shape) == 3)).astype(dtype))
    return made


def plain(func: tirx.PrimFunc, arrays: list[np.ndarray]) -> list[np.ndarray]:
    """What the loops give, as LLVM compiles them."""
    built = tvm.compile(tvm.IRModule({"main": func.with_attr("global_symbol", "main")}), tvm.target.Target("llvm"))
    held = [tvm.runtime.tensor(a) for a in arrays]
    built["main"](*held)
    return [h.numpy() for h in held]


def check(func: tirx.PrimFunc, target: Any, rule: NormGemv, results: int, tolerance: float) -> None:
    with target:
        scheduled = rule.apply(func, target, False)
    assert scheduled is not None
    (made,) = scheduled.mod.functions.values()
    arrays = inputs(func, results)
    expected = plain(func, arrays)
    found = wgsl_harness.run(made.with_attr("tirx.is_scheduled", True), arrays)
    for ours, theirs in zip(found[-results:], expected[-results:], strict=True):
        scale = float(np.abs(theirs.astype(np.float32)).max())
        np.testing.assert_allclose(ours.astype(np.float32), theirs.astype(np.float32), rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("embd", [36, 99])
def test_products_with_a_prologue(point: str, embd: int) -> None:
    mod, target = fused("q0f32", embd)
    config = POINTS[point]
    rule = NormGemv(None if config is None else lambda *_: config)
    found = dict(functions(mod, "fused_layer_norm", "fused_merge_splits"))
    rows = {int(f.params[-1].shape[0]) * int(f.params[-1].shape[1]) for f in found.values()}
    assert rows == {1, 2, 3, 6} and any(name.startswith("fused_merge") for name in found)
    one_of: dict[tuple[int, bool], tirx.PrimFunc] = {}
    for name, func in found.items():  # of each number of rows one with what follows a product, and a head without
        one_of[int(func.params[-1].shape[1]), "_add" in name] = func
        one_of[10 + int(func.params[-1].shape[0]), "merge" in name] = func
    for func in one_of.values() if point == "ours" else list(one_of.values())[:3]:
        check(func, target, rule, 1, 2e-6)


@pytest.mark.parametrize("quantization", ["q0f16", "q8f32", "q4f16_1"])
def test_other_dtypes(quantization: str) -> None:
    wgsl_harness.device(f16=quantization.endswith("f16") or "f16" in quantization)
    mod, target = fused(quantization, 96)
    for func in list(dict(functions(mod, "fused_layer_norm")).values())[:2]:
        check(func, target, NormGemv(), 1, 2e-6 if quantization == "q8f32" else 2e-3)


@pytest.mark.parametrize("quantization", ["q0f32", "q0f16"])
def test_add_and_norm(quantization: str) -> None:
    wgsl_harness.device(f16=quantization == "q0f16")
    mod, target = fused(quantization, 99, "norm-residual")
    found = [f for name, f in functions(mod, "fused_") if "layer_norm" in name]
    assert found
    for func in found[:2]:
        check(func, target, NormGemv(), 2, 2e-6 if quantization == "q0f32" else 2e-3)


def test_other_functions_are_left_alone() -> None:
    mod, target = fused("q0f32", 36, "none")
    with target:
        for name, func in functions(mod, "fused", "NT_matmul", "layer_norm", "embed", "gelu", "decode_attention"):
            if not (func.attrs and func.attrs.get("tirx.is_scheduled")):
                assert NormGemv().apply(func, target, False) is None, name
