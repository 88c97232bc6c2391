"""A webgpu artifact's choices at load time: kernels by adapter, and tensors larger than the device binds."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tvm
from reference import FLOAT32, assert_close
from tvm import tirx
from wgsl_harness import device, source

from gpt2_tvm import Engine, compile_model
from gpt2_tvm.errors import UserError
from gpt2_tvm.host_code import split_launches
from gpt2_tvm.runners.wgpu_device import Device
from gpt2_tvm.runners.wgsl import parse_wgsl
from gpt2_tvm.schedules import webgpu_prologue
from gpt2_tvm.schedules.webgpu_variants import VARIANTS, variant_functions
from gpt2_tvm.schedules.webgpu_windows import ALIGNMENT, windows_of, with_windows
from gpt2_tvm.toolchains.web_needs import shared_bytes
from targets import load_target

PROMPT = [5, 17, 3, 96, 44, 0, 8, 33, 51]
LIMIT = 12300  # bytes a binding: less than the table of the tiny model, more than its caches and activations


@pytest.fixture(scope="module")
def artifact(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    device()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(webgpu_prologue, "WINDOW", 16)  # the model's vectors have 32 elements
        return compile_model(
            str(tiny_model), "webgpu", output=tmp_path_factory.mktemp("webgpu") / "a", verify_widths=()
        )


@pytest.fixture(scope="module")
def reference(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    folder = tmp_path_factory.mktemp("cpu") / "a"
    return Engine(compile_model(str(tiny_model), "cpu", output=folder, rules="baseline", verify_widths=()))


def assert_same(ours: Engine, reference: Engine) -> None:
    for engine in (ours, reference):
        engine.reset()
    assert_close(ours.prefill(PROMPT), reference.prefill(PROMPT), FLOAT32, "prefill")
    assert_close(ours.decode(7), reference.decode(7), FLOAT32, "decode")
    assert ours.decode_greedy(6).tolist() == reference.decode_greedy(6).tolist()
    scored = ours.score([PROMPT]), reference.score([PROMPT])
    np.testing.assert_allclose(scored[0], scored[1], atol=1e-3)


# -- variants -----------------------------------------------------------------------------------------------


def test_variants_have_the_interface_of_what_they_replace(artifact: Path) -> None:
    plain = parse_wgsl((artifact / "kernels.wgsl").read_text())
    listed = json.loads((artifact / "kernels.json").read_text())["variants"]
    assert [variant["requires"] for variant in listed] == [["software"], ["swiftshader"]]
    for variant in listed:
        others = parse_wgsl((artifact / variant["file"]).read_text())
        assert sorted(others) == variant["kernels"] and others
        for name, shader in others.items():
            assert [kind for _, kind in shader.scalars] == [kind for _, kind in plain[name].scalars]
            assert [b[:2] for b in shader.bindings] == [b[:2] for b in plain[name].bindings]
            staged = [shared_bytes(one) for one in (plain[name], shader)]
            assert staged[1] < staged[0], name
            if "matmul" in name and "norm" not in name and "merge" not in name:
                assert "workgroupBarrier" in plain[name].source and "workgroupBarrier" not in shader.source


@pytest.mark.parametrize("software", [True, False])
def test_the_adapter_decides_which_kernels_run(
    artifact: Path, reference: Engine, software: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = Device.meets
    monkeypatch.setattr(Device, "meets", lambda self, what: software if what == "software" else plain(self, what))
    engine = Engine(artifact)
    variant = json.loads((artifact / "kernels.json").read_text())["variants"][0]
    name = next(name for name in variant["kernels"] if "matmul" in name and "norm" not in name and "merge" not in name)
    assert ("workgroupBarrier" in engine.runner._shaders[name].source) is not software
    assert_same(engine, reference)


def test_swiftshader_gets_little_shared_memory(
    artifact: Path, reference: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it is given clears a window where others clear a whole vector, and the numbers are the same."""
    plain = Device.meets
    chosen = ("software", "swiftshader")
    monkeypatch.setattr(Device, "meets", lambda self, what: what in chosen or plain(self, what))
    engine = Engine(artifact)
    variant = json.loads((artifact / "kernels.json").read_text())["variants"][1]
    assert variant["requires"] == ["swiftshader"] and all("norm" in name for name in variant["kernels"])
    kernels = parse_wgsl((artifact / variant["file"]).read_text())
    assert all(engine.runner._shaders[name] == shader for name, shader in kernels.items())
    assert_same(engine, reference)


# -- float16 in words ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def halves(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    device()
    folder = tmp_path_factory.mktemp("halves") / "a"
    return compile_model(str(tiny_model), "webgpu", "q16f32", output=folder, verify_widths=(4,))


@pytest.fixture(scope="module")
def halves_here(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """The model of `halves` on the CPU."""
    folder = tmp_path_factory.mktemp("halves") / "cpu"
    made = compile_model(str(tiny_model), "cpu", "q16f32", output=folder, rules="baseline", verify_widths=(4,))
    return Engine(made)


@pytest.mark.heavy
@pytest.mark.parametrize("native", [True, False], ids=["shader-f16", "words"])
def test_float16_weights_run_with_the_feature_and_without(
    halves: Path, halves_here: Engine, native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if native:
        device(f16=True)
    monkeypatch.setattr(Device, "meets", lambda self, what: native and what == "shader-f16")
    engine = Engine(halves)
    variant = json.loads((halves / "kernels.json").read_text())["variants"][0]
    assert variant["requires"] == ["shader-f16"]
    for name in variant["kernels"]:
        shader = engine.runner._shaders[name]
        assert shader.needs_f16 is native and ("unpack2x16float" in shader.source) is not native, name
    plain = parse_wgsl((halves / "kernels.wgsl").read_text())
    assert not any(shader.needs_f16 for shader in plain.values())
    assert json.loads((halves / "manifest.json").read_text())["webgpu"].get("features", []) == []
    assert_same(engine, halves_here)
    for each in (engine, halves_here):
        each.reset()
        each.prefill(PROMPT)
    assert_close(engine.verify([3, 1, 4, 1]), halves_here.verify([3, 1, 4, 1]), FLOAT32, "verify")


def test_float16_weights_take_half_the_memory(halves: Path, artifact: Path) -> None:
    sizes = [sum(f.stat().st_size for f in (one / "params").glob("params_shard_*")) for one in (halves, artifact)]
    assert 0.5 < sizes[0] / sizes[1] < 0.65


def test_what_a_device_meets() -> None:
    found = device()
    assert found.meets("software") is found.is_software
    assert found.meets("shader-f16") is found.has_f16
    assert found.meets("swiftshader") is ("SwiftShader" in found.name)
    assert not found.meets("a-feature-of-tomorrow")


def test_a_missing_variant_is_named(artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gpt2_tvm.artifact import Artifact, read_manifest
    from gpt2_tvm.runners.wgpu import WgpuRunner

    monkeypatch.setattr(Device, "meets", lambda self, what: True)
    copy = tmp_path / "copy"
    shutil.copytree(artifact, copy)
    (copy / "kernels.software.wgsl").unlink()
    with pytest.raises(UserError, match=r"lacks kernels\.software\.wgsl"):
        WgpuRunner(Artifact(copy, read_manifest(copy)))


def test_a_variant_takes_only_what_its_rule_took() -> None:
    hits: list[Any] = [type("Hit", (), {"function": "f", "rule": "gemv"})]
    assert variant_functions(VARIANTS[0], {}, hits, load_target("webgpu").tvm_target()) == {}


# -- windows ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("nbytes", "most"), [(12416, 12300), (154_389_504, 134_217_728), (1000, 256), (513, 512), (300, 4096)]
)
def test_windows_cover_a_tensor_once(nbytes: int, most: int) -> None:
    windows = windows_of(nbytes, most)
    assert sum(w.size for w in windows) == nbytes
    assert all(w.size <= most and w.offset % ALIGNMENT == 0 for w in windows)
    assert [w.offset for w in windows[1:]] == [w.offset + w.size for w in windows[:-1]]
    assert (len(windows) == 1) == (nbytes <= most // ALIGNMENT * ALIGNMENT)


@pytest.mark.heavy
def test_a_table_above_the_limit_is_bound_in_windows(
    tiny_model: Path, reference: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device()
    text = (load_target("webgpu").path).read_text(encoding="utf-8")
    assert "storage_binding_bytes = 134217728" in text
    target = tmp_path / "small.toml"
    target.write_text(text.replace("134217728", str(LIMIT)).replace('name = "webgpu"', 'name = "small"'))
    made = compile_model(str(tiny_model), str(target), output=tmp_path / "a", max_seq_len=24, verify_widths=())
    programs = json.loads((made / "kernels.json").read_text())["functions"]
    table = json.loads((made / "manifest.json").read_text())["params"].index("transformer.wte.weight")
    windows = [
        ref
        for launch in programs["greedy_b1"]["launches"]
        for ref in launch["buffers"]
        if ref[0] == "window" and ref[1] == ["param", table]
    ]
    assert len(windows) == 4  # two for the first embedding, two for the head
    assert sum(ref[3] for ref in windows) == 2 * 97 * 32 * 4
    monkeypatch.setattr(Device, "max_binding_bytes", property(lambda self: LIMIT))
    bound: list[int] = []
    plain = Device.launch

    def launch(self: Device, kernel: Any, buffers: Any, *rest: Any) -> Any:
        bound.extend(int(b.size) for b in buffers)
        return plain(self, kernel, buffers, *rest)

    monkeypatch.setattr(Device, "launch", launch)
    assert_same(Engine(made), reference)
    assert max(bound) <= LIMIT


def test_what_is_written_cannot_be_a_window() -> None:
    from tvm.script import tirx as T

    @T.prim_func(private=True, s_tir=True)
    def double(x: T.Buffer((64,), "float32"), y: T.Buffer((64,), "float32")):
        T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True})
        for _ in T.thread_binding(1, thread="blockIdx.x"):
            for t in T.thread_binding(64, thread="threadIdx.x"):
                y[t] = x[t] + x[t]

    _, modules = split_launches(
        {tvm.ir.GlobalVar("double"): double.with_attr("global_symbol", "double")}, load_target("webgpu").tvm_target()
    )
    ((_, module),) = modules.items()
    ((_, kernel),) = module.functions_items()
    assert isinstance(kernel, tirx.PrimFunc) and "x_ptr" in source(double, load_target("webgpu").tvm_target())
    names = [str(p.name) for p in kernel.params]
    with_windows(kernel, {names.index("x_ptr"): windows_of(256, 256)})
    with pytest.raises(ValueError, match="cannot be bound in windows"):
        with_windows(kernel, {names.index("y_ptr"): windows_of(256, 256)})
    with pytest.raises(ValueError, match="whole elements"):
        with_windows(kernel, {names.index("x_ptr"): windows_of(255, 256)})


# -- launches -----------------------------------------------------------------------------------------------


def test_a_token_takes_five_launches_a_layer_and_five_at_most(artifact: Path) -> None:
    manifest = json.loads((artifact / "manifest.json").read_text())
    layers = manifest["config"]["n_layer"]
    assert manifest["launches"]["greedy_b1"] <= 5 * layers + 5
    heavy = [f["rule"] for f in manifest["functions"] if "matmul" in f["name"]]
    assert heavy and set(heavy) <= {"webgpu-gemv", "webgpu-matmul"}
