"""What can be proved about CUDA without a GPU: the SASS of sm_80, sm_89 and sm_90, and the launches of a decode step.

The quick tests compile a small model, the heavy ones two layers of GPT-2 124M's shapes and one of XL's.
"""

from __future__ import annotations

import functools
import tempfile
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from gpt2_tvm import toolchains
from gpt2_tvm.build import Plan, lower_plan, make_plan
from gpt2_tvm.config import PRESETS, GPT2Config
from gpt2_tvm.inventory import function_table
from gpt2_tvm.passes import cuda_graph
from gpt2_tvm.schedules.cuda_gemv import wide_config
from gpt2_tvm.schedules.tunable_gemv import GemvShape
from targets import load_target
from tuning.predict import predict_us
from tuning.space import stock_point, why_not
from tuning.static import sass
from tuning.static.resources import KernelResources, kernel_resources
from tuning.workloads import Workload

ARCHS = ("sm_80", "sm_89", "sm_90")
CONFIGS = {
    "small": GPT2Config(vocab_size=1000, n_positions=128, n_embd=256, n_layer=2, n_head=4),
    "124M": GPT2Config(vocab_size=50257, n_positions=1024, n_embd=768, n_layer=2, n_head=12),
    "xl": GPT2Config(vocab_size=50257, n_positions=1024, n_embd=1600, n_layer=1, n_head=25),
}
DTYPES = ["q0f16", "q0f32"]
GEMV_RULES = ("wide-gemv", "norm-gemv", "quantised-gemv", "tunable-gemv", "gemv")
UNROLLED = 64  # loads a thread in a row; a loop of more (the head of K = 1600) stays one
TENSOR_CORES = ("HMMA", "HGMMA")
# Share of a multiprocessor's threads that its registers and shared memory must leave room for. A GEMV lives on threads
# that wait for memory; a matmul on registers that hold its tile, where one block of 512 threads is enough.
# Attention of a decode step holds its splits' values in registers, and what ends a step is one block a row.
OCCUPANCY = {"gemv": 0.5, "matmul": 0.25, "attention": 0.4, "end": 0.5}
# In float32 those are twice as many, with twice the bytes on their way: 78 leave room for 6 blocks of sm_80's 16.
IN_FLOAT32 = {**OCCUPANCY, "attention": 0.35}
# A matmul of few rows waits for its weight: there the tiles on their way to shared memory count, on a multiprocessor.
IN_FLIGHT = 64 << 10
MOST_THREADS = {"sm_80": 2048, "sm_89": 1536, "sm_90": 2048}

needs_tools = [
    pytest.mark.skipif(
        (what := toolchains.missing(load_target("cuda"))) is not None, reason=f"cannot compile for CUDA: needs {what}"
    ),
    pytest.mark.skipif(sass.tool() is None, reason=f"needs {sass.PACKAGES} from PyPI"),
]


@dataclass(frozen=True)
class Built:
    """table: the manifest's · kernels: {architecture: what each kernel takes}."""

    plan: Plan
    table: dict[str, Any]
    kernels: dict[str, list[KernelResources]]

    def of(self, arch: str, row: dict[str, Any]) -> list[KernelResources]:
        """The kernels of one function."""
        found = [k for k in self.kernels[arch] if k.function == row["name"]]
        assert len(found) == row["kernels"], f"{arch} {row['name']}: {[k.kernel for k in found]}"
        return found


@functools.cache
def built(
    model: str, quantization: str, arch: str = "", batches: tuple[int, ...] = (), widths: tuple[int, ...] = ()
) -> Built:
    """arch: one alone, as the target's, instead of the three of a library for any GPU."""
    import tvm

    target = load_target("h200" if arch else "cuda")
    if arch:
        target = replace(target, tvm={**target.tvm, "arch": arch}, archs=(arch,))
    sizes = {"batch_sizes": batches} if batches else {}
    plan = make_plan(CONFIGS[model], target, quantization, verify_widths=widths, **sizes)
    toolchains.prepare(plan.target)
    with toolchains.compiling(plan.target) as target, tempfile.TemporaryDirectory() as folder:
        lowered, _ = lower_plan(plan)
        executable = tvm.compile(lowered.final, target=target, relax_pipeline=None, tir_pipeline=None)
        (library,) = toolchains.export(executable, plan.target, Path(folder))
        kernels = kernel_resources(plan, lowered, executable, Path(folder, library).read_bytes()).values()
    archs = (arch,) if arch else ARCHS
    return Built(plan, function_table(lowered, plan), {a: [k for k in kernels if k.arch == a] for a in archs})


def gemvs(made: Built) -> list[dict[str, Any]]:
    return [f for f in made.table["functions"] if f["rule"] in GEMV_RULES and "greedy_b1" in f["calls"]]


def matmuls(made: Built) -> list[dict[str, Any]]:
    return [f for f in made.table["functions"] if "matmul" in f["rule"] and "prefill" in f["calls"]]


def kinds(made: Built) -> dict[str, list[dict[str, Any]]]:
    """Rows of the table that have an occupancy to reach."""
    named = {f["name"]: f for f in made.table["functions"] if "greedy_b1" in f["calls"]}
    return {
        "gemv": gemvs(made),
        "matmul": matmuls(made),
        "attention": [named["decode_attention_append"]],
        "end": [named["greedy_advance"]],
    }


def weight_loads(made: Built, row: dict[str, Any]) -> int:
    """Loads of 16 bytes a thread for a product's weight alone: its rows' bytes, over the threads that share them. x,
    where it is not in shared memory (`wide-gemv`), takes 16 bytes a load too in float32, 8 in float16."""
    config, half = made.plan.config, made.plan.scheme.compute_dtype == "float16"
    along, across, _ = row["block"]
    reduced = 4 * config.n_embd if "mlp.c_proj" in row["role"] else config.n_embd
    steps, left = divmod(reduced * (2 if half else 4), 16 * along)
    assert not left, row
    outputs = {"logits": config.vocab_size, "c_attn": 3 * config.n_embd, "c_fc": 4 * config.n_embd}
    rows = next((count for part, count in outputs.items() if part in row["role"]), config.n_embd)
    tile = -(-rows // (row["grid"][0] * across))
    if steps * tile > UNROLLED:
        steps = 1
    return steps * tile * (1 if half or row["rule"] != "wide-gemv" else 2)


@pytest.mark.parametrize(
    ("model", "quantization"),
    [("small", "q0f16"), *(pytest.param("124M", quantization, marks=pytest.mark.heavy) for quantization in DTYPES)],
)
class TestSass:
    pytestmark = needs_tools

    def test_every_gemv_of_a_decode_step_loads_16_bytes(self, model: str, quantization: str) -> None:
        made = built(model, quantization)
        layers = made.plan.config.n_layer
        # four products a layer and the head, each once, whatever is fused around it
        assert sum(f["calls"]["greedy_b1"] for f in gemvs(made)) == 4 * layers + 1
        for arch in ARCHS:
            for row in gemvs(made):
                for kernel in made.of(arch, row):
                    assert kernel.widest_load_bytes == 16, f"{arch} {row['name']} ({row['rule']})"
                    found = kernel.instructions.get("LDG.128", 0) + kernel.instructions.get("LDGSTS.128", 0)
                    assert found >= weight_loads(made, row), f"{arch} {row['name']}: {kernel.instructions}"

    def test_every_launch_of_a_decode_step_is_in_the_machine_code(self, model: str, quantization: str) -> None:
        """Counted there, not in the table: what greedy_b1 calls, attention and the token's choice among it."""
        made = built(model, quantization)
        rows = [f for f in made.table["functions"] if "greedy_b1" in f["calls"]]
        assert {"decode_attention_append", "greedy_advance"} <= {f["name"] for f in rows}
        for arch in ARCHS:
            present = Counter(kernel.function for kernel in made.kernels[arch])
            assert not [f["name"] for f in rows if present[f["name"]] != f["kernels"]]
            launches = sum(present[f["name"]] * f["calls"]["greedy_b1"] for f in rows)
            assert launches == made.table["launches_per_decode"] <= 5 * made.plan.config.n_layer + 4

    def test_prefill_runs_on_tensor_cores(self, model: str, quantization: str) -> None:
        made = built(model, quantization)
        assert sum(f["calls"]["prefill"] for f in matmuls(made)) == 4 * made.plan.config.n_layer + 1
        (attention,) = [f for f in made.table["functions"] if f["name"] == "prefill_attention"]
        for arch in ARCHS:
            for row in (*matmuls(made), attention):
                for kernel in made.of(arch, row):
                    used = sum(kernel.instructions.get(name, 0) for name in TENSOR_CORES)
                    # float32 keeps its precision: no TF32
                    assert bool(used) == (quantization == "q0f16"), f"{arch} {row['name']}: {kernel.instructions}"

    def test_nothing_lives_in_local_memory(self, model: str, quantization: str) -> None:
        made = built(model, quantization)
        for arch in ARCHS:
            assert len(made.kernels[arch]) >= 20
            spilled = [
                kernel.kernel
                for kernel in made.kernels[arch]
                if kernel.spill_bytes or any(name[:3] in ("LDL", "STL") for name in kernel.instructions)
            ]
            assert not spilled, f"{arch}: {spilled}"

    def test_registers_and_shared_memory_leave_room(self, model: str, quantization: str) -> None:
        made = built(model, quantization)
        for arch in ARCHS:
            for kind, rows in kinds(made).items():
                for row in rows:
                    for kernel in made.of(arch, row):
                        assert kernel.registers * kernel.threads <= 65536
                        reached = f"{kernel.occupancy:.0%} with {kernel.registers} registers, {kernel.shared_bytes} B"
                        tiles = kernel.occupancy * MOST_THREADS[arch] / kernel.threads * kernel.shared_bytes
                        # few rows: the head's, one a sequence, and the first of the kernels that the host chooses from
                        first = kernel.kernel == f"{row['name']}_kernel" and row["kernels"] > row["launched"]
                        few = row["rule"] == "tensor-matmul" and ("logits" in row["role"] or first)
                        enough = few and tiles >= IN_FLIGHT
                        wanted = (IN_FLOAT32 if quantization == "q0f32" else OCCUPANCY)[kind]
                        assert kernel.occupancy >= wanted or enough, f"{arch} {row['name']}: {reached}"


@needs_tools[0]
@needs_tools[1]
@pytest.mark.heavy
def test_prefill_of_sm_90a_runs_on_tensor_cores() -> None:
    made = built("small", "q0f16", "sm_90a")
    rows = [f for f in made.table["functions"] if "prefill" in f["calls"] and f["rule"] == "tensor-matmul"]
    assert sum(f["calls"]["prefill"] for f in rows) == 4 * made.plan.config.n_layer + 1
    rows += [f for f in made.table["functions"] if f["name"] == "prefill_attention"]
    for row in rows:
        for kernel in made.of("sm_90a", row):
            assert any(kernel.instructions.get(name) for name in TENSOR_CORES), row["name"]


@needs_tools[0]
@needs_tools[1]
@pytest.mark.heavy
def test_wider_steps_of_gpt2_xl() -> None:
    """Batches of 1, 4 and 12 and a verify of 4, where rows are 8 threads x 25 loads: no spills, the weight 16 bytes a
    load, and blocks that fit."""
    made = built("xl", "q0f16", "sm_90", (1, 4, 12), (4,))
    steps = {"greedy_b1", "greedy_b4", "greedy_b12", "verify_b1_m4", "verify_b4_m4", "verify_b12_m4"}
    assert steps <= set(made.table["launches"])
    assert not [k.kernel for k in made.kernels["sm_90"] if k.spill_bytes]
    for row in (f for f in made.table["functions"] if steps & set(f["calls"])):
        kernels = made.of("sm_90", row)
        assert all(k.occupancy is None or k.occupancy > 0 for k in kernels), row["name"]
        if row["rule"] in ("wide-gemv", "norm-gemv"):
            (kernel,) = kernels
            assert kernel.instructions.get("LDG.128", 0) >= weight_loads(made, row), row["name"]
            assert kernel.shared_bytes <= 48 << 10, row["name"]
            # one row holds all its loads in registers instead of more threads: tests/test_cuda_loads.py counts bytes
            if "greedy_b1" not in row["calls"] or "logits" in row["role"]:
                assert kernel.registers <= 128 and kernel.occupancy >= 0.25, row["name"]


@pytest.mark.parametrize("model", ["small", "124M"])
@pytest.mark.parametrize("quantization", DTYPES)
def test_launches_of_a_decode_step(model: str, quantization: str) -> None:
    """At most 5 a layer and 4, counted in the module that is compiled; the manifest says the same."""
    config = CONFIGS[model]
    plan = make_plan(config, load_target("h200"), quantization, batch_sizes=(1,), verify_widths=())
    lowered, _ = lower_plan(plan)
    table = function_table(lowered, plan)
    kernels = {f["name"]: f["kernels"] for f in table["functions"]}
    outside, (graph,) = cuda_graph.launches(lowered.final, "graph_greedy_b1")
    count = sum(kernels[name] * times for name, times in graph.items())
    assert not outside
    assert count == table["launches_per_decode"] == table["launches"]["greedy_b1"]
    assert count <= 5 * config.n_layer + 4


# ---- the point that every product has until it is tuned


def product(outputs: int, reduced: int, dtype: str) -> Workload:
    return Workload("", outputs, reduced, 1, dtype, dtype, dtype, (), 1, 0, 0, (), "")


def family() -> list[tuple[int, int]]:
    """(N, K) of every product in gpt2, medium, large and xl."""
    found = []
    for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"):
        config = PRESETS[name]
        E = config.n_embd
        found += [(3 * E, E), (E, E), (4 * E, E), (E, 4 * E), (config.vocab_size, E)]
    return found


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("target", ["a100", "rtx-4090", "h100", "h200"])
def test_the_model_expects_no_less_than_of_dlights_point(target: str, dtype: str) -> None:
    device = load_target(target)
    for outputs, reduced in family():
        config = wide_config(GemvShape(outputs, reduced, 1, dtype), device.tvm_target())
        assert config is not None and config.vec_load == 16, (outputs, reduced)
        workload = product(outputs, reduced, dtype)
        assert why_not(config, workload, device) is None
        ratio = predict_us(config, workload, device) / predict_us(stock_point(workload, device), workload, device)
        # K = 1600 is 200 loads of 8 halves: only 8 threads divide them, and the last wave of the head's blocks is long
        assert ratio <= (1.35 if (outputs, reduced, dtype) == (50257, 1600, "float16") else 1.0), (outputs, reduced)


@pytest.mark.parametrize(
    "shape",
    [
        GemvShape(None, 768, 1, "float16"),
        GemvShape(768, None, 1, "float16"),
        GemvShape(768, 769, 1, "float32"),  # rows of an odd length: nothing is aligned
        GemvShape(768, 24, 1, "float16"),  # three loads a row
        GemvShape(768, 768, 1, "int8"),
        GemvShape(768, 768, 1, "float16", grouped=32),
    ],
)
def test_what_16_byte_loads_do_not_fit_is_left_alone(shape: GemvShape) -> None:
    assert wide_config(shape, load_target("h200").tvm_target()) is None


@pytest.mark.parametrize("arch", ["sm_90", "sm_90a"])
def test_tensor_cores_whatever_the_spelling(arch: str) -> None:
    """DLight takes sm_90a for a GPU without; our rule, and DLight's as we call it, give both the same."""
    target = load_target("h200")
    target = replace(target, tvm={**target.tvm, "arch": arch}, archs=(arch,))
    for rules, rule, instruction in (("full", "tensor-matmul", "mma"), ("without-tensor-matmul", "matmul", "wmma")):
        lowered, _ = lower_plan(make_plan(CONFIGS["small"], target, "q0f16", rules, verify_widths=()))
        taken = [hit.function for hit in lowered.hits if hit.rule == rule]
        assert len(taken) >= 5
        for name in taken:
            assert instruction in lowered.scheduled[name].script(), name


def test_turing_gets_no_schedule_that_it_cannot_launch() -> None:
    """DLight's tensor-core schedule takes 72 KiB of shared memory, a T4 has 64."""
    lowered, _ = lower_plan(make_plan(CONFIGS["small"], load_target("t4"), "q0f16", verify_widths=()))
    taken = [hit.function for hit in lowered.hits if hit.rule == "matmul"]
    assert len(taken) >= 5 and not any("wmma" in lowered.scheduled[name].script() for name in taken)
