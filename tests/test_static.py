"""The static table of whole models: every kernel of every kind of target, with its rule, its calls and its code."""

from __future__ import annotations

import csv
import functools
import io
import json
from pathlib import Path
from typing import Any

import pytest
from wgsl_harness import device

from gpt2_tvm import toolchains
from gpt2_tvm.errors import UserError
from targets import load_target
from tuning.static import KernelResources, amd, kernel_resources, pipelines, render, sass, static_rows, summary
from tuning.static.resources import UNKNOWN

Row = dict[str, Any]
TOOLS = {"cuda": sass.tool, "rocm": amd.tools}


@functools.cache
def compiled(model: Path, target: str, quantization: str, rules: str = "full") -> Any:
    """(plan, lowered, executable) of a model, compiled once for all tests; skips where the machine cannot."""
    import tvm

    from gpt2_tvm import build
    from gpt2_tvm.checkpoint import resolve_model

    found = load_target(target)
    if what := toolchains.missing(found):
        pytest.skip(f"needs {what}")
    if found.kind in TOOLS and TOOLS[found.kind]() is None:
        pytest.skip("needs the tools that read the code")
    plan = build.make_plan(resolve_model(str(model)).config, found, quantization, rules, verify_widths=())
    toolchains.prepare(found)
    with toolchains.compiling(found) as tvm_target:
        lowered, _ = build.lower_plan(plan)
        return plan, lowered, tvm.compile(lowered.final, tvm_target, relax_pipeline=None, tir_pipeline=None)


def rows_of(model: Path, target: str, quantization: str, rules: str = "full") -> list[Row]:
    from tuning.static.rows import rows_of

    plan, lowered, executable = compiled(model, target, quantization, rules)
    with toolchains.compiling(plan.target):
        return rows_of(plan, lowered, executable)


@pytest.fixture(scope="module")
def wide_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One layer of width 128: its products keep their loop over k, which a width of 32 does not."""
    from gpt2_tvm.checkpoint import random_model
    from gpt2_tvm.config import GPT2Config
    from gpt2_tvm.weights import write_hf_checkpoint

    config = GPT2Config(vocab_size=300, n_positions=48, n_embd=128, n_layer=1, n_head=2)
    return write_hf_checkpoint(tmp_path_factory.mktemp("checkpoint") / "wide", config, random_model(config, seed=1))


EVERYWHERE = [
    ("rtx-4090", "q0f16"),
    ("webgpu", "q0f32"),
    pytest.param("metal", "q0f16", marks=pytest.mark.heavy),
    pytest.param("gfx1100", "q0f16", marks=pytest.mark.heavy),
    ("x86-64-v3", "q0f32"),
    pytest.param("gfx90a", "q0f32", marks=pytest.mark.heavy),
    pytest.param("cuda", "q0f32", marks=pytest.mark.heavy),  # three architectures in one library
    pytest.param("apple-m", "q0f32", marks=pytest.mark.heavy),
]


@pytest.mark.parametrize(("target", "quantization"), EVERYWHERE)
def test_every_function_has_its_kernels(tiny_model: Path, target: str, quantization: str) -> None:
    from gpt2_tvm.inventory import function_table

    rows = rows_of(tiny_model, target, quantization)
    plan, lowered, _ = compiled(tiny_model, target, quantization)
    table = function_table(lowered, plan)
    archs = len({row["arch"] for row in rows})
    for function in table["functions"]:
        own = [row for row in rows if row["function"] == function["name"]]
        assert len(own) == function["kernels"] * archs, function["name"]
        assert {row["rule"] for row in own} == {function["rule"]}
        if isinstance(own[0]["threads"], int) and isinstance(block := function["block"], list):
            assert own[0]["threads"] == block[0] * block[1] * block[2]
    assert {row["function"] for row in rows} == {function["name"] for function in table["functions"]}
    told = summary(rows)
    assert told["launches_token"] == table["launches_per_decode"]
    assert told["launches_prefill"] == table["launches"]["prefill"]
    assert sum(told["hits"].values()) == len(table["functions"])
    unknown = UNKNOWN[plan.target.kind]
    for row in rows:
        for key in ("registers", "shared_bytes", "spill_bytes", "widest_load_bytes", "vector_bits"):
            assert (row[key] is None) == (key in unknown), (row["kernel"], key)
        assert row["instructions"] and all(isinstance(n, int) for n in row["instructions"].values())


def test_cuda_matmul_and_gemv(tiny_model: Path) -> None:
    rows = {row["kernel"]: row for row in rows_of(tiny_model, "rtx-4090", "q0f16")}
    matmuls = [row for row in rows.values() if row["rule"] == "tensor-matmul"]
    gemvs = [row for row in rows.values() if row["rule"].endswith("gemv")]
    assert matmuls and gemvs
    for row in matmuls:  # tiles copied to shared memory, from there to tensor cores
        assert all(row["instructions"][name] > 0 for name in ("HMMA", "LDSM", "LDGSTS.128")), row["instructions"]
        assert row["shared_bytes"] > 2048
    for row in gemvs:
        assert row["instructions"]["SHFL"] > 0 and row["shared_bytes"] <= 2048
    for row in rows.values():
        assert 8 <= row["registers"] <= 255 and 0 < row["occupancy"] <= 1 and row["threads"] % 32 == 0


def test_shared_memory_that_is_asked_for_at_launch(tmp_path: Path) -> None:
    """DLight's tensor-core matmul declares its tiles without a size; the host's code has it."""
    from types import SimpleNamespace

    from checkers.build import kernels
    from tvm.s_tir import dlight

    from gpt2_tvm.toolchains import modules
    from tuning.static.resources import _dynamic_shared

    target = load_target("h200")
    if toolchains.missing(target):
        pytest.skip("needs the CUDA compiler")
    import tvm

    toolchains.prepare(target)
    with toolchains.compiling(target) as tvm_target:
        module = dlight.ApplyDefaultSchedule(dlight.gpu.Matmul(), dlight.gpu.GEMV())(kernels("float16"))
        source = modules.sources(tvm.compile(module, tvm_target), "cuda")
        plan: Any = SimpleNamespace(target=target)
        found = _dynamic_shared(plan, SimpleNamespace(final=module), source)  # type: ignore[arg-type]
    # two tiles of 128 x 32 halves, or more: what DLight stages is its business, what the source indexes is not
    assert set(found) == {"matmul_kernel"} and 2 * 128 * 32 * 2 <= found["matmul_kernel"] <= 99 * 1024


def test_shared_memory_is_what_the_schedule_asks_for(tiny_model: Path) -> None:
    """WebGPU's shaders declare what the manifest says, and what TVM adds for reductions across threads."""
    from gpt2_tvm.inventory import function_table

    plan, lowered, _ = compiled(tiny_model, "webgpu", "q0f32")
    rows = {row["kernel"]: row for row in rows_of(tiny_model, "webgpu", "q0f32")}
    compared = set()
    for function in function_table(lowered, plan)["functions"]:
        asked = function["shared_memory_bytes"]
        if function["kernels"] != 1 or not isinstance(asked, int):
            continue
        found = rows[f"{function['name']}_kernel"]["shared_bytes"]
        compared.add(function["rule"])
        if function["rule"] in ("webgpu-matmul", "fallback"):
            assert found == asked, function["name"]
        elif function["rule"] in ("ours", "webgpu-gemv"):  # TVM leaves out the padding at the end of a tile
            assert 0.9 * asked <= found <= asked, function["name"]
        else:
            assert found >= asked, function["name"]
    assert {"webgpu-matmul", "webgpu-gemv", "fallback", "ours"} <= compared


@pytest.mark.heavy
def test_cpu_vectors_are_the_targets(wide_model: Path) -> None:
    for name, bits in (("x86-64-v3", 256), ("x86-64-v4", 512)):
        rows = rows_of(wide_model, name, "q0f32")
        products = [row for row in rows if row["rule"] in ("cpu-gemv", "cpu-matmul")]
        assert products and {row["vector_bits"] for row in products} == {bits}
        assert {row["widest_load_bytes"] for row in products} == {bits // 8}
        assert all(row["instructions"]["loop.fma"] > 0 for row in products)
    naive = rows_of(wide_model, "x86-64-v3", "q0f32", "baseline")
    assert all(row["rule"] in ("none", "ours") for row in naive)
    # without a rule one row of a panel is summed at a time, so that hardly a register is in use
    blocked = [row["registers"] for row in rows_of(wide_model, "x86-64-v3", "q0f32") if row["rule"] == "cpu-matmul"]
    slow = [row["registers"] for row in naive if "matmul" in row["function"] and row["calls"].get("prefill")]
    assert slow and max(slow) < min(blocked) <= 16


def test_records_by_kernel(tiny_model: Path) -> None:
    plan, lowered, executable = compiled(tiny_model, "webgpu", "q0f32")
    found = kernel_resources(plan, lowered, executable)
    assert all(isinstance(record, KernelResources) and record.kernel == name for name, record in found.items())


def test_formats(tiny_model: Path) -> None:
    rows = rows_of(tiny_model, "webgpu", "q0f32")
    read = json.loads(render(rows, "json"))
    assert read["rows"] == rows and read["summary"] == json.loads(json.dumps(summary(rows)))
    assert read["unknown"]["registers"]
    table = list(csv.DictReader(io.StringIO(render(rows, "csv"))))
    assert [row["kernel"] for row in table] == [row["kernel"] for row in rows]
    assert table[0]["registers"] == "" and int(table[0]["threads"]) == rows[0]["threads"]
    text = render(rows, "md")
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len(lines) == len(rows) + 2 and "registers" not in lines[0]
    assert f"{summary(rows)['launches_token']} a token" in text and "registers: the driver" in text
    with pytest.raises(UserError, match="unknown format"):
        render(rows, "html")
    assert render([], "md") == "no kernels\n"


def test_notes_of_spills(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A library with a kernel that spills, under the name of one of the model's."""
    from test_static_sass import compiled as written

    plan, lowered, executable = compiled(tiny_model, "rtx-4090", "q0f16")
    spilling = written("sm_89", "__launch_bounds__(1024, 1)")["keep_many"]
    name = next(hit.function for hit in lowered.hits if hit.rule == "norm-gemv") + "_kernel"
    renamed = sass.Kernel("sm_89", name, spilling.counts, 64, spilling.stack, spilling.listing)
    monkeypatch.setattr(sass, "kernels", lambda library: [renamed])
    (record,) = kernel_resources(plan, lowered, executable, b"").values()
    assert record.spill_bytes == spilling.stack > 0 and "spills" in record.notes[0]


def test_missing_tool_is_named(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, lowered, executable = compiled(tiny_model, "rtx-4090", "q0f16")
    monkeypatch.setattr(sass, "tool", lambda: None)
    with toolchains.compiling(plan.target), pytest.raises(UserError, match=r"gpt2-tvm\[test\]") as error:
        kernel_resources(plan, lowered, executable)
    assert "\n" not in str(error.value)


def test_pipelines_that_cannot_be_made(tiny_model: Path) -> None:
    from gpt2_tvm.toolchains import modules

    device()
    _, _, executable = compiled(tiny_model, "webgpu", "q0f32")
    source = modules.sources(executable, "webgpu")
    assert pipelines.refused(source) == {}
    name = "// Function: broken_kernel\n"
    broken = "@compute @workgroup_size(1, 1, 1) fn broken_kernel() { let x : i32 = 1.5f; }\n"
    wide = broken.replace("broken", "wide").replace("(1, 1, 1)", "(60000, 1, 1)").replace("let x : i32 = 1.5f;", "")
    faults = pipelines.refused(source + name + broken + name.replace("broken", "wide") + wide)
    assert set(faults) == {"broken_kernel", "wide_kernel"} and "60000" in faults["wide_kernel"]


def test_command_line(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tuning.static.__main__ import app

    file = tmp_path / "static.json"
    options = ["--model", str(tiny_model), "--verify-widths", ""]
    app([*options, "--target", "webgpu", "--rules", "baseline", "--json", str(file)], standalone_mode=False)
    told = json.loads(file.read_text())["summary"]
    assert set(told["hits"]) == {"fallback", "ours"} and "launches:" in capsys.readouterr().out
    for wrong, message in (
        (["--format", "html"], "unknown --format"),
        (["--target", "no-such"], "no-such"),
        (["--rules", "no-such"], "unknown rule"),
    ):
        with pytest.raises(UserError, match=message) as error:
            app([*options, *wrong], standalone_mode=False)
        assert "\n" not in str(error.value)


@pytest.mark.heavy
def test_124m_in_float16() -> None:
    if toolchains.missing(load_target("h200")) or sass.tool() is None:
        pytest.skip("needs the CUDA compiler and cuobjdump")
    rows = static_rows("gpt2", "h200", "full", "q0f16", verify_widths=(4,))
    told = summary(rows)
    assert 0 < told["launches_token"] <= 12 * 5 + 4 and told["registers_max"] <= 255
    assert any(row["instructions"].get("HMMA") for row in rows)
