"""Weights of a decode step that are on their way at once, read from the machine code of sm_80 and sm_90."""

from __future__ import annotations

import functools
import tempfile
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import pytest
import tvm

from gpt2_tvm import toolchains
from gpt2_tvm.build import lower_plan, make_plan
from gpt2_tvm.config import PRESETS
from gpt2_tvm.inventory import function_table
from gpt2_tvm.schedules import launch_bounds
from gpt2_tvm.schedules.gemv_config import GemvConfig
from gpt2_tvm.schedules.norm_gemv import NormGemv
from targets import load_target
from tuning.static import sass

ARCHS = ("sm_80", "sm_90")
RULES = ("norm-gemv", "late-norm-gemv", "wide-gemv")
# An H200 (4.8 TB/s, and we take 600 ns to memory) is busy when this much is on its way (Little), or a whole matrix.
BUSY = 2.9e6
MULTIPROCESSORS = 132

pytestmark = [
    pytest.mark.skipif(
        (what := toolchains.missing(load_target("cuda"))) is not None, reason=f"cannot compile for CUDA: needs {what}"
    ),
    pytest.mark.skipif(sass.tool() is None, reason=f"needs {sass.PACKAGES} from PyPI"),
]


@functools.cache
def products(model: str, quantization: str, rules: str = "full") -> dict[str, tuple[dict[str, Any], list[sass.Kernel]]]:
    """{weight: (its row of the function table, its kernel on each of ARCHS)} of a greedy step of one layer."""
    config = replace(PRESETS[model], n_layer=1)
    plan = make_plan(
        config, replace(load_target("cuda"), archs=ARCHS), quantization, rules, batch_sizes=(1,), verify_widths=()
    )
    lowered, _ = lower_plan(plan)
    rows = [
        row
        for row in function_table(lowered, plan)["functions"]
        if "greedy_b1" in row["calls"] and row["rule"] in RULES
    ]
    funcs = {row["name"]: lowered.scheduled[row["name"]] for row in rows}
    mod = tvm.IRModule({name: func.with_attr("global_symbol", name) for name, func in funcs.items()})
    found: dict[str, tuple[dict[str, Any], list[sass.Kernel]]] = {}
    with toolchains.compiling(plan.target) as target, tempfile.TemporaryDirectory() as folder:
        (name,) = toolchains.export(tvm.compile(mod, target=target), plan.target, Path(folder))
        kernels = sass.kernels(Path(folder, name).read_bytes())
    for row in rows:
        own = [kernel for kernel in kernels if kernel.name == f"{row['name']}_kernel"]
        assert [kernel.arch for kernel in own] == list(ARCHS)
        weight = next(p for p in ("c_attn", "attn.c_proj", "c_fc", "mlp.c_proj", "wte") if p in row["role"])
        found[weight] = row, own
    assert len(found) == 5
    return found


MODELS = ["gpt2", pytest.param("gpt2-xl", marks=pytest.mark.heavy)]
DTYPES = ["q0f16", pytest.param("q0f32", marks=pytest.mark.heavy)]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("quantization", DTYPES)
class TestLoads:
    def test_weights_are_asked_for_before_their_vector_is_known(self, model: str, quantization: str) -> None:
        for weight in ("c_attn", "attn.c_proj", "c_fc"):
            row, kernels = products(model, quantization)[weight]
            assert row["rule"] == "norm-gemv"
            width = PRESETS[model].n_embd * (2 if quantization == "q0f16" else 4)
            for kernel in kernels:
                early, all_of_them = kernel.loads_before_barrier()
                assert early == all_of_them == width // 16 // row["block"][0], f"{kernel.arch} {weight}"

    def test_enough_is_on_its_way(self, model: str, quantization: str) -> None:
        """All of a small matrix, what keeps an H200 busy of a large one; and no register lives in memory for it."""
        config = PRESETS[model]
        outputs = {"c_attn": 3 * config.n_embd, "c_fc": 4 * config.n_embd, "wte": config.vocab_size}
        for weight, (row, kernels) in products(model, quantization).items():
            reduced = config.n_embd * (4 if weight == "mlp.c_proj" else 1)
            size = outputs.get(weight, config.n_embd) * reduced * (2 if quantization == "q0f16" else 4)
            for kernel in kernels:
                flying = on_its_way(row, kernel)
                assert flying >= min(size, BUSY), f"{kernel.arch} {weight}: {flying / 1e6:.1f} of {size / 1e6:.1f} MB"
                assert not kernel.stack and not kernel.local, f"{kernel.arch} {weight}"


def on_its_way(row: dict[str, Any], kernel: sass.Kernel) -> int:
    """Bytes, on a whole H200."""
    threads, blocks = prod(row["block"]), prod(row["grid"])
    registers = -(-kernel.registers // 8) * 8
    resident = min(65536 // (threads * registers), 2048 // threads, 32, (227 << 10) // (kernel.shared + 1024))
    return min(blocks, MULTIPROCESSORS * resident) * threads * kernel.bytes_in_flight


@pytest.mark.heavy
def test_told_nothing_the_compiler_saves_registers(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `launch_bounds.py` is for: XL's smallest product, neither early nor with room."""
    monkeypatch.setattr(launch_bounds, "least_blocks", lambda *_: None)
    row, kernels = products.__wrapped__("gpt2-xl", "q0f16", "with-late-norm-gemv")["attn.c_proj"]
    for kernel in kernels:
        assert on_its_way(row, kernel) < BUSY / 3, kernel.arch


def test_large_blocks_keep_to_their_registers() -> None:
    """1,024 threads, as a sweep may choose: 64 registers each."""
    plan = make_plan(replace(PRESETS["gpt2-medium"], n_layer=1), load_target("h200"), "q0f16", verify_widths=())
    lowered, _ = lower_plan(plan)
    name = next(
        row["name"]
        for row in function_table(lowered, plan)["functions"]
        if "attn.c_attn" in row["role"] and row["rule"] == "norm-gemv"
    )
    point = GemvConfig(ts=128, tr=8, tile_r=8, vec_load=16, vec_c=4)
    with toolchains.compiling(plan.target) as target, tempfile.TemporaryDirectory() as folder:
        schedule = NormGemv(lambda *_: point).apply(lowered.fused[name], target, False)
        assert schedule is not None
        made = tvm.compile(tvm.IRModule({name: schedule.mod["main"].with_attr("global_symbol", name)}), target=target)
        (library,) = toolchains.export(made, plan.target, Path(folder))
        kernels = sass.kernels(Path(folder, library).read_bytes())
    assert kernels and not any(kernel.stack or kernel.local for kernel in kernels)


def test_without_the_rule_they_wait() -> None:
    for weight in ("c_attn", "attn.c_proj", "c_fc"):
        row, kernels = products("gpt2", "q0f16", "with-late-norm-gemv")[weight]
        assert row["rule"] == "late-norm-gemv"
        for kernel in kernels:
            early, all_of_them = kernel.loads_before_barrier()
            assert early == 0 < all_of_them, f"{kernel.arch} {weight}"
