"""A webgpu artifact run by PyPI's wgpu: the logits, tokens and scores of the CPU's artifact and of transformers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reference import FLOAT16, FLOAT32, assert_close
from wgsl_harness import device

from gpt2_tvm import Engine, compile_model
from gpt2_tvm.decoding.greedy import Greedy
from gpt2_tvm.decoding.pipelined import Pipelined
from gpt2_tvm.decoding.strategy import Decoding
from gpt2_tvm.decoding.tokens import Generation
from gpt2_tvm.errors import UserError

IDS = [[5, 17, 3, 96, 44, 0, 8], [1, 2], [90, 31, 64, 7]]  # ragged; the tiny model knows 97 ids

PROMPT = IDS[0]

Make = Callable[..., Path]


@pytest.fixture(scope="module")
def make(tiny_model: Path, no_page: None, tmp_path_factory: pytest.TempPathFactory) -> Make:
    """The tiny model for webgpu, in any quantization and attention, for batches of 4, and of 1 as it is by default;
    skips where the machine has no WebGPU device."""
    folder = tmp_path_factory.mktemp("webgpu")

    def make(quantization: str = "q0f32", attention: str = "flash", rules: str = "full") -> Path:
        device(f16=quantization == "q0f16")
        path = folder / f"{quantization}-{attention}-{rules}"
        if path.exists():
            return path
        batches = (1, 4) if (quantization, attention, rules) == ("q0f32", "flash", "full") else (4,)
        return compile_model(
            str(tiny_model),
            "webgpu",
            quantization,
            path,
            rules,
            attention=attention,
            batch_sizes=batches,
            verify_widths=(4,),
        )

    return make


@pytest.fixture(scope="module")
def reference(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """The same model on the CPU with no rules, which other tests compare with transformers."""
    path = tmp_path_factory.mktemp("cpu") / "tiny"
    return Engine(
        compile_model(str(tiny_model), "cpu", output=path, rules="baseline", batch_sizes=(1, 4), verify_widths=(4,))
    )


def walk_through(ours: Engine, reference: Engine, share: float) -> None:
    """Every function of the engine, in an order that uses what the one before left in the cache."""
    ours.reset()
    reference.reset()

    def same(what: str, *arguments: object) -> None:
        assert_close(getattr(ours, what)(*arguments), getattr(reference, what)(*arguments), share, what)

    same("prefill", IDS)  # three sequences in a batch of four
    same("decode", [7, 8, 9])
    same("decode", [1, 96, 0])
    same("prefill", [[3, 4], [5, 6, 7], [8]])  # goes on with the same sequences, another width
    same("verify", [[11, 12, 13], [14], [15, 16]])
    same("verify", [[3, 4, 5, 6]] * 3, [-1, 0, 0, 2])
    for engine in (ours, reference):
        engine.keep([[0, 2, 3], [0, 1], []])
    assert ours.positions.tolist() == reference.positions.tolist()
    same("decode", [9, 9, 9])
    for engine in (ours, reference):
        engine.rewind(2)
    same("decode", [50, 51, 52])
    scored = ours.score([IDS[0]]), reference.score([IDS[0]])
    assert np.abs(scored[0] - scored[1]).max() <= share * np.abs(scored[1]).max()


@pytest.mark.parametrize(
    ("quantization", "attention", "rules"),
    [
        ("q0f32", "flash", "full"),
        pytest.param("q0f32", "materialized", "full", marks=pytest.mark.heavy),
        pytest.param("q0f16", "flash", "full", marks=pytest.mark.heavy),
        pytest.param("q0f32", "flash", "baseline", marks=pytest.mark.heavy),  # several kernels a function
    ],
)
def test_every_function_agrees_with_the_cpu(
    make: Make, reference: Engine, quantization: str, attention: str, rules: str
) -> None:
    ours = Engine(make(quantization, attention, rules))
    walk_through(ours, reference, FLOAT16 if quantization == "q0f16" else FLOAT32)


def test_greedy_tokens_are_those_of_step_by_step_decode(make: Make) -> None:
    engine = Engine(make())
    engine.prefill(IDS)
    tokens = engine.decode_greedy(12)
    engine.reset()
    logits = engine.prefill(IDS)
    steps = []
    for _ in range(12):
        steps.append(logits.argmax(-1))
        logits = engine.decode(steps[-1])
    assert tokens.tolist() == np.stack(steps, axis=1).tolist()


def test_greedy_tokens_come_one_by_one_while_the_next_is_made(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same tokens; each step is queued before the token before it is read, and leaving early keeps the engine."""
    engine = Engine(make())
    engine.prefill(PROMPT)
    expected = engine.decode_greedy(6)[0].tolist()
    after = int(engine.best[0])  # type: ignore[index]
    seen: list[str] = []
    call, later = engine.runner.call, engine.runner.later  # type: ignore[attr-defined]

    def read(tensor: Any) -> Any:
        wait, number = later(tensor), seen.count("step")
        return lambda: (seen.append(f"read {number}"), wait())[1]

    monkeypatch.setattr(engine.runner, "call", lambda *given: (seen.append("step"), call(*given))[1])
    monkeypatch.setattr(engine.runner, "later", read)
    engine.reset()
    engine.prefill(PROMPT)
    seen.clear()
    assert list(Pipelined(engine, 6)) == expected and engine.best.tolist() == [after]  # type: ignore[union-attr]
    steps = [["step"], *(["step", f"read {n}"] for n in range(1, 6)), ["read 6"]]
    assert seen == [event for step in steps for event in step]

    engine.reset()
    engine.prefill(PROMPT)
    tokens = Pipelined(engine, 6)
    assert [next(tokens) for _ in range(3)] == expected[:3]
    tokens.settle()
    assert engine.positions.tolist() == [len(PROMPT) + 3]
    assert engine.decode_greedy(3)[0].tolist() == expected[3:]
    assert list(Generation(engine, PROMPT, 6)) == expected
    assert Decoding(Greedy(engine), [PROMPT], 6).run() == [expected]


def test_decode_binds_once(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    from gpt2_tvm.runners.wgpu import WgpuRunner

    engine = Engine(make())
    engine.prefill(IDS[0])
    bound: list[str] = []
    plain = WgpuRunner._bind
    monkeypatch.setattr(WgpuRunner, "_bind", lambda self, f, x: (bound.append(f), plain(self, f, x))[1])
    for token in range(5):
        engine.decode(token)
    engine.decode_greedy(5)
    assert bound == ["decode_b1", "greedy_b1"]


def test_what_is_bound_to_old_caches_is_let_go(make: Make) -> None:
    engine = Engine(make())
    engine.prefill(IDS[0])
    engine.decode(1)
    old = engine._caches[0]
    engine.reset()
    engine.prefill(IDS)  # a larger batch: new caches
    held = [x for _, bound in engine.runner._bound.values() for part in bound.inputs for x in np.atleast_1d(part)]
    assert not any(x is old for x in held)


def test_the_kernel_list_launches_what_the_manifest_counts(make: Make) -> None:
    path = make()
    listed = json.loads((path / "kernels.json").read_text())["functions"]
    manifest = json.loads((path / "manifest.json").read_text())
    assert {name: len(program["launches"]) for name, program in listed.items()} == manifest["launches"]
    source = (path / "kernels.wgsl").read_text()
    names = {launch["kernel"] for program in listed.values() for launch in program["launches"]}
    assert all(f"// Function: {name}\n" in source for name in names)


def test_a_large_binding_is_refused_by_name(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    from gpt2_tvm.runners.wgpu_device import Device

    monkeypatch.setattr(Device, "max_binding_bytes", property(lambda self: 5000))
    with pytest.raises(UserError, match=r"transformer\.wte\.weight has 12,416 bytes.* 5,000.*float16"):
        Engine(make())


def test_a_device_of_another_kind_is_refused(make: Make) -> None:
    with pytest.raises(UserError, match="not on cuda"):
        Engine(make(), device="cuda")
    with pytest.raises(UserError, match="no webgpu:77"):
        Engine(make(), device="webgpu:77")


@pytest.mark.parametrize("content", ["", "{}", '{"format": 99, "functions": {}}'])
def test_a_damaged_kernel_list_is_refused(make: Make, tmp_path: Path, content: str) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(make(), copy)
    (copy / "kernels.json").write_text(content)
    with pytest.raises(UserError, match=r"kernels\.json"):
        Engine(copy)  # by its sha256
    from gpt2_tvm.artifact import Artifact, read_manifest
    from gpt2_tvm.runners.wgpu import WgpuRunner

    with pytest.raises(UserError, match=r"kernels\.json cannot be used .* compile"):
        WgpuRunner(Artifact(copy, read_manifest(copy)))


def test_wrong_shapes_are_refused(make: Make) -> None:
    runner = Engine(make()).runner
    logits, temperature = runner.empty((2, 1, 97), "float32"), runner.empty((3,), "float32")
    with pytest.raises(ValueError, match="softmax_with_temperature wants"):
        runner.call("softmax_with_temperature", [logits, temperature], with_params=False)


def test_softmax_with_temperature(make: Make) -> None:
    runner = Engine(make()).runner
    values = np.random.default_rng(0).normal(0, 4, (2, 1, 97)).astype(np.float32)
    logits, temperature = runner.empty((2, 1, 97), "float32"), runner.empty((2,), "float32")
    runner.upload(logits, values)
    runner.upload(temperature, np.array([0.7, 2.0], np.float32))
    out = runner.download(runner.call("softmax_with_temperature", [logits, temperature], with_params=False))
    scaled = np.exp(values / np.array([0.7, 2.0], np.float32)[:, None, None])
    np.testing.assert_allclose(out, scaled / scaled.sum(-1, keepdims=True), rtol=1e-4, atol=1e-7)


@pytest.mark.heavy
@pytest.mark.parametrize("quantization", ["q0f32", "q0f16"])
def test_the_bundled_model_agrees_with_transformers(quantization: str, no_page: None, tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="needs pip install 'gpt2-tvm[reference]'")
    device(f16=quantization == "q0f16")
    from reference import Reference

    from gpt2_tvm.data import bundled_model
    from gpt2_tvm.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(bundled_model())
    assert tokenizer is not None
    ids = tokenizer.encode("It is a truth universally acknowledged, that a single man")
    share = FLOAT16 if quantization == "q0f16" else FLOAT32
    engine, reference = (
        Engine(compile_model("bundled", "webgpu", quantization, tmp_path / "a", verify_widths=())),
        Reference(bundled_model()),
    )
    (expected,) = reference.logits([ids])
    assert_close(engine.prefill(ids), expected[-1:], share, "prefill")
    assert engine.decode_greedy(32)[0].tolist() == reference.greedy(ids, 32)
    scores = engine.score(ids)[0]
    log_probs = expected - np.log(np.exp(expected - expected.max(-1, keepdims=True)).sum(-1, keepdims=True))
    log_probs -= expected.max(-1, keepdims=True)
    wanted = log_probs[np.arange(len(ids) - 1), ids[1:]]
    assert np.abs(scores - wanted).max() <= share * np.abs(expected).max()
