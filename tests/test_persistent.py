"""The decode step as one kernel: its CUDA source run on the CPU, all blocks at once, beside GPT-2 in float64; its place
in the compiled module; and its machine code."""

from __future__ import annotations

import ctypes
import math
import multiprocessing
import re
import tempfile
from dataclasses import replace
from pathlib import Path

import cuda_on_cpu
import numpy as np
import pytest
import tvm
from persistent_steps import Sequence1

from gpt2_tvm import toolchains
from gpt2_tvm.build import lower_plan, make_plan, stored_weights
from gpt2_tvm.checkpoint import resolve_model
from gpt2_tvm.config import PRESETS, GPT2Config
from gpt2_tvm.engine import Engine
from gpt2_tvm.errors import UserError
from gpt2_tvm.host_code import split_launches
from gpt2_tvm.inventory import _calls, function_table
from gpt2_tvm.kernels.persistent import kernel
from gpt2_tvm.kernels.persistent.kernel import parameter_shapes, persistent_step
from gpt2_tvm.kernels.persistent.shape import OLDEST, THREADS, StepShape, step_shape
from gpt2_tvm.passes import cuda_graph
from gpt2_tvm.quantization import get_scheme
from targets import load_target
from tuning.static import occupancy, sass
from tuning.variants import variants

SMALL = GPT2Config(vocab_size=1000, n_positions=128, n_embd=256, n_layer=2, n_head=4)
DTYPES = ["float16", "float32"]
GPUS = {"sm_80": "a100", "sm_89": "rtx-4090", "sm_90": "h200"}


def config(width: int, heads: int, inner: int, layers: int = 2, **more: object) -> GPT2Config:
    return GPT2Config(vocab_size=53, n_positions=90, n_embd=width, n_layer=layers, n_head=heads, n_inner=inner, **more)


SHAPES = {
    # heads of 8, an MLP that no warp's share divides, more blocks than heads
    "small": (config(24, 3, 56), 33, 5),
    # up to 4 splits of a head's slots; a head of its own; every layer another scale
    "splits": (
        config(64, 2, 128, tie_word_embeddings=False, scale_attn_by_inverse_layer_idx=True, activation_function="gelu"),
        70,
        9,
    ),
    # a row of several packets, the last not full; more than 32 rows a warp; heads of 11 pieces, which 16 lanes share
    "wide": (config(1056, 12, 1064, layers=1), 9, 3),
    "wide-float32": (config(528, 12, 1064, layers=1), 9, 3),
    "one-block": (
        config(40, 1, 8, activation_function="silu"),
        12,
        1,
    ),  # 5 of 8 lanes (10 of 16) have a piece of a slot
    "more-heads": (config(40, 5, 40, activation_function="relu"), 12, 2),  # than blocks: each has several
}


def shape_of(name: str, dtype: str, threads: int = 64) -> StepShape:
    model, capacity, grid = SHAPES.get(f"{name}-{dtype}", SHAPES[name])
    return StepShape(model, dtype, capacity, grid, shared_limit=48 << 10, threads=threads)


# ---- numbers


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["small", "splits", "wide", "one-block", "more-heads"])
def test_steps_are_gpt2(name: str, dtype: str) -> None:
    """From an empty cache, at the last slot, past it, and for a sequence that takes no part."""
    sequence = Sequence1(shape_of(name, dtype))
    large = name == "wide"  # seconds a step
    for position, token in enumerate(sequence.tokens(1 if large else 3)):
        sequence.check(token, position)
    full = sequence.shape.capacity - 1
    sequence.fill(full)
    sequence.check(1, full)
    if large:
        return
    sequence.check(2, full + 1)  # sees every slot, writes none
    sequence.check(3, 0, length=0)


def test_splits_are_as_many_as_there_are_slots_for() -> None:
    """Every number of splits, and slots that they do not divide."""
    shape = shape_of("splits", "float32")
    assert shape.splits == 4
    for position in (7, 8, 16, 24, 30, 62):
        sequence = Sequence1(shape)
        sequence.fill(position)
        sequence.check(5, position)


def test_the_barrier_needs_no_reset() -> None:
    """After any number of steps it stands as after loading, or with its highest bit turned over: 5 a layer."""
    shape = shape_of("one-block", "float32")
    shape = replace(shape, grid=3, config=replace(shape.config, n_layer=1))
    sequence = Sequence1(shape)
    library = cuda_on_cpu.build(persistent_step(shape), "sm_80").library
    word = ctypes.c_uint32.in_dll(library, "_ZN9gpt2_step8arrivalsE")
    turned = word.value
    assert turned == 0 and shape.barriers == 5
    for position, token in enumerate(sequence.tokens(5)):
        sequence.check(token, position)
        turned ^= (2 * shape.barriers % 2) << 31  # `run` steps twice
        assert word.value == turned
    word.value = 1 << 31  # as one step leaves it
    sequence.check(1, 5)
    assert word.value == 1 << 31


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("found", "instead", "may_hang"),
    [
        ("    barrier.wait();\n    attend(", "    attend(", True),
        ("    barrier.wait();\n    merge_splits(", "    merge_splits(", True),
        ("arrived<DEPTH - 1>();", "", False),  # copies that are read before they are there
        ("row += ROWS_AT_ONCE;", "row += ROWS_AT_ONCE - 1;", False),
    ],
)
def test_what_is_wrong_shows(monkeypatch: pytest.MonkeyPatch, found: str, instead: str, may_hang: bool) -> None:
    source = kernel.cuda_source

    def broken(shape: StepShape) -> str:
        text = source(shape)
        assert text.count(found) == 1
        return text.replace(found, instead)

    def steps() -> None:
        sequence = Sequence1(shape_of("small", "float32"))
        for position, token in enumerate(sequence.tokens(2)):
            sequence.check(token, position)

    persistent_step.cache_clear()
    monkeypatch.setattr(kernel, "cuda_source", broken)
    try:  # in a process of its own: where blocks would hang a GPU, it ends
        child = multiprocessing.get_context("fork").Process(target=steps)
        child.start()
        child.join(8 if may_hang else 300)  # right ones take two seconds
        hangs = child.is_alive()
        if hangs:  # blocks out of step wait for each other for ever; wrong values alone must not
            child.kill()
            child.join()
        assert may_hang or not hangs
        assert child.exitcode
    finally:
        persistent_step.cache_clear()


def test_is_the_engines_step(tiny_model: Path, tiny_artifact: Path) -> None:
    """A checkpoint's parameters, as a CUDA artifact stores them, give the CPU engine's logits."""
    source = resolve_model(str(tiny_model))
    target = load_target("h200")
    plan = make_plan(source.config, target, "q0f32", "with-persistent")
    assert plan.step is not None and plan.step.grid == target.cores.count
    sequence = Sequence1(replace(plan.step, grid=4, threads=64, shared_limit=48 << 10))
    stored = dict(stored_weights(source, plan))
    sequence.weights = {name: stored.pop(name) for name, _ in parameter_shapes(plan.step)}
    assert not stored
    tokens = sequence.tokens(3)
    engine = Engine(tiny_artifact)
    logits = engine.prefill(tokens[:1])
    for position, token in enumerate(tokens):
        if position:
            logits = engine.decode(token)
        found = sequence.step(token, position)
        np.testing.assert_allclose(found, np.reshape(logits, -1), rtol=0, atol=1e-4 * np.abs(logits).max())


# ---- its place in a module


def test_a_step_is_two_launches_of_one_graph() -> None:
    plan = make_plan(SMALL, load_target("h200"), "q0f16", "with-persistent", batch_sizes=(1, 2), verify_widths=(4,))
    lowered, _ = lower_plan(plan)
    table = function_table(lowered, plan)
    rows = {row["name"]: row for row in table["functions"]}
    step = rows["persistent_step"]
    assert step["calls"] == {"decode_b1": 1, "greedy_b1": 1, "sample_b1": 1, "propose_b1": 1}
    assert (step["rule"], step["kernels"], step["grid"], step["block"]) == (
        "persistent",
        1,
        [132, 1, 1],
        [THREADS, 1, 1],
    )
    outside, (graph,) = cuda_graph.launches(lowered.final, "graph_greedy_b1")
    assert not outside and graph == {"persistent_step": 1, "greedy_advance": 1}
    assert sum(rows[name]["kernels"] * times for name, times in graph.items()) == table["launches_per_decode"] == 2
    assert table["launches"]["greedy_b2"] > 10 and "persistent_step" not in str(table["launches"])
    # what it is called with, by name: the types alone would let two of one shape change places
    (call,) = [args for name, args in _calls(lowered.lowered["decode_b1"]) if name == "persistent_step"]
    weights = [name.replace(".", "_") for name, _ in parameter_shapes(plan.step)]
    call = [re.sub(r"(weight|bias)\d+$", r"\1", name) for name in call]  # numbers that TVM adds
    assert call[:3] == ["ids", "positions", "lengths"] and call[3 : 3 + len(weights)] == weights
    for layer, cache in enumerate(call[3 + len(weights) :][: SMALL.n_layer]):
        assert cache.startswith(f"caches_{layer}")


def test_work_is_that_of_the_model() -> None:
    from gpt2_tvm.expressions import evaluate
    from gpt2_tvm.work import work_of

    nbytes, flops = work_of("persistent_step", persistent_step(shape_of("small", "float32")))
    E, N, V, S = 24, 56, 53, 10
    matrices = 2 * (3 * E * E + E * E + 2 * N * E) + V * E
    vectors = 2 * (4 * E + 3 * E + E + N + E) + 2 * E
    assert evaluate(nbytes, {"p": S}) == 4 * (matrices + vectors + E + V) + 2 * 2 * 4 * E * (S + 2)
    assert evaluate(flops, {"p": S}) == 2 * matrices + 8 * E * 5 + 2 * 3 * (4 * 8 + 5) * (S + 1)


def test_the_launch_is_cooperative() -> None:
    func = persistent_step(shape_of("small", "float16")).with_attr("global_symbol", "step")
    target = load_target("h200").tvm_target()
    launches, kernels = split_launches({tvm.ir.GlobalVar("step"): func}, target)
    (launch,) = launches["step"]
    assert launch.cooperative and len(launch.buffers) == 3 + 2 * 12 + 4 + 2 + 2
    ((device, module),) = kernels.items()
    assert "__launch_bounds__(64, 1)" in cuda_on_cpu.cuda_source(module, device)


def test_it_is_an_alternative() -> None:
    def named(target: str) -> dict[str, tuple[str, ...]]:
        return {v.name: v.rules for v in variants(load_target(target))}

    full = load_target("h200").rules
    assert "persistent" not in full and named("h200")["with-persistent"] == ("persistent", *full)
    assert not any("with-persistent" in named(target) for target in ("cuda", "t4", "cpu", "webgpu"))


def refused(model: GPT2Config = SMALL, target: str = "h200", quantization: str = "q0f16", **more: object) -> str:
    with pytest.raises(UserError) as error:
        make_plan(model, load_target(target), quantization, "with-persistent", **more)  # type: ignore[arg-type]
    text = str(error.value)
    assert text.startswith("rule 'persistent'") and "\n" not in text and len(text) < 200
    return text


def test_what_it_is_not_made_for() -> None:
    assert "no 1; add 1" in refused(batch_sizes=(2, 4))
    assert "does not say how many" in refused(target="cuda")
    for target in ("t4", "webgpu", "gfx90a"):
        assert f"from sm_{OLDEST} on, not {target}" in refused(target=target, quantization="q0f32")
    assert "has no q8f16" in refused(quantization="q8f16")
    assert "n_embd 20 is no multiple" in refused(replace(SMALL, n_embd=20, n_inner=80))
    assert "head size 4 " in refused(replace(SMALL, n_embd=16, n_inner=64))
    assert "a head of 256 float32" in refused(replace(SMALL, n_embd=256, n_head=1), quantization="q0f32")
    assert "pruned" in refused(replace(SMALL, layer_heads=(4, 3)))
    assert "leave out --interface" in refused(interface="mlc")
    assert "--attention" in refused(attention="materialized")
    assert "too few" in refused(replace(SMALL, n_embd=8192, n_inner=32768, n_head=64), "rtx-4090")


@pytest.mark.parametrize("target", GPUS.values())
@pytest.mark.parametrize("quantization", ["q0f16", "q0f32"])
@pytest.mark.parametrize("model", ["gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"])
def test_the_family_fits(model: str, quantization: str, target: str) -> None:
    """Room in the ring for what covers a trip to memory: 700 ns at the target's bandwidth, a multiprocessor's share."""
    device = load_target(target)
    shape = step_shape(PRESETS[model], get_scheme(quantization), device, 1024)
    assert shape.shared_bytes <= device.cores.shared_memory_bytes - 1024
    ring = shape.depth * shape.packet * 16 * shape.threads
    assert ring >= 700e-9 * device.peak.bandwidth_gb_s * 1e9 / device.cores.count
    assert math.prod((shape.grid, shape.threads)) <= device.cores.count * device.cores.threads


# ---- machine code


@pytest.mark.skipif(
    (what := toolchains.missing(load_target("cuda"))) is not None, reason=f"cannot compile for CUDA: needs {what}"
)
@pytest.mark.skipif(sass.tool() is None, reason=f"needs {sass.PACKAGES} from PyPI")
@pytest.mark.parametrize("arch", GPUS)
@pytest.mark.parametrize("quantization", ["q0f16", "q0f32"])
@pytest.mark.parametrize("model", ["small", pytest.param("gpt2", marks=pytest.mark.heavy)])
def test_machine_code(model: str, quantization: str, arch: str) -> None:
    """Weights come 16 bytes at a time, past the registers; nothing lives in local memory; a block fits."""
    device = load_target(GPUS[arch])
    shape = step_shape({"small": SMALL, **PRESETS}[model], get_scheme(quantization), device, 128)
    func = persistent_step(shape).with_attr("global_symbol", "step")
    with toolchains.compiling(device) as target, tempfile.TemporaryDirectory() as folder:
        built = tvm.compile(tvm.IRModule({"step": func}), target)
        (library,) = toolchains.export(built, device, Path(folder))
        (found,) = sass.kernels(Path(folder, library).read_bytes())
    assert found.arch == arch
    assert found.mix["LDGSTS.128"] >= 6 * shape.packet, found.mix  # of each of five products, and before the first
    assert not [name for name in found.opcodes if name.startswith("LDGSTS") and ".128" not in name]
    assert not found.stack and not found.local and not found.counts["LDL"] and not found.counts["STL"], found.mix
    assert not found.mix.get("LD.16") and not found.mix.get("LD.32")  # the compiler knows what is global memory
    assert sum(count for name, count in found.opcodes.items() if name.startswith(("RED", "REDG"))) == 5
    assert not [name for name in found.opcodes if name.startswith("ATOM")]
    resident = occupancy.cuda_occupancy(arch, shape.threads, found.registers, shape.shared_bytes + found.shared)
    assert resident is not None and resident[0] * device.cores.threads >= shape.threads, resident
