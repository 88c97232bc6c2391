"""Calls, weights and artifacts that are wrong: each is one clear line and a status, never a crash of the process."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from commands import run_here
from faults import assert_one_line, contents, refusal, seal
from safetensors.numpy import load_file, save_file

from gpt2_tvm.artifact import open_artifact, read_manifest
from gpt2_tvm.build import compile_model
from gpt2_tvm.engine import Engine

VOCAB, CONTEXT = 97, 48
OPTIONS = ("--prompt-ids", "1,2", "--max-tokens", "2")


@pytest.fixture(scope="module")
def engine(tiny_artifact: Path) -> Engine:
    return Engine(tiny_artifact)


@pytest.fixture
def copy(tiny_artifact: Path, tmp_path: Path) -> Path:
    """An artifact to damage."""
    return shutil.copytree(tiny_artifact, tmp_path / "artifact")


def generate(folder: Path) -> subprocess.CompletedProcess[str]:
    """The command on a model without a tokenizer."""
    return run_here("gpt2_tvm.generate", folder, *OPTIONS)


def generate_apart(folder: Path) -> subprocess.CompletedProcess[str]:
    """The same in a process of its own, which a library that is none must not kill."""
    command = [sys.executable, "-m", "gpt2_tvm.generate", str(folder), *OPTIONS]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


# ---- calls


def test_ten_thousand_decodes_do_not_grow_memory(engine: Engine) -> None:
    process = psutil.Process()

    def run(calls: int) -> None:
        engine.reset()
        engine.prefill([1, 2, 3])
        for i in range(calls):
            if engine.positions[0] == CONTEXT:
                engine.rewind(3)
            engine.decode(i % VOCAB)

    run(1000)  # what is allocated once
    before = process.memory_info().rss
    run(10_000)
    assert process.memory_info().rss - before < 1 << 20  # 100 bytes a call would show


def test_prefills_of_every_length_and_batch_do_not_grow_memory(engine: Engine) -> None:
    process = psutil.Process()

    def run(rounds: int) -> None:
        for i in range(rounds):
            engine.reset()
            engine.prefill([[1] * (1 + i % 40)] * (1 + i % 2))
            engine.decode_greedy(5)

    run(160)
    before = process.memory_info().rss
    run(1600)
    assert process.memory_info().rss - before < 2 << 20


@pytest.mark.parametrize("batch", [1, 2])
def test_a_position_past_the_context(engine: Engine, batch: int) -> None:
    engine.reset()
    engine.prefill([[1] * (CONTEXT - 1)] * batch)
    engine.decode([5] * batch)
    actions: list[Callable[[], object]] = [
        lambda: engine.decode([5] * batch),
        lambda: engine.prefill([[1]] * batch),
        lambda: engine.verify([[1]] * batch),
        lambda: engine.decode_greedy(1),
    ]
    for action in actions:
        assert f"the context holds {CONTEXT}" in refusal(action)
    engine.rewind(CONTEXT - 1)  # and the engine goes on
    engine.decode([5] * batch)
    engine.reset()
    assert str(CONTEXT) in refusal(lambda: engine.prefill([1] * (CONTEXT + 1)))
    assert str(CONTEXT) in refusal(lambda: engine.score([1] * (CONTEXT + 1)))


@pytest.mark.parametrize("bad", [-1, VOCAB, 2**31, 2**40, -(2**33)])
def test_an_id_outside_the_vocabulary(engine: Engine, bad: int) -> None:
    engine.reset()
    engine.prefill([1, 2])
    actions: list[Callable[[], object]] = [
        lambda: engine.prefill([1, bad]),
        lambda: engine.decode(bad),
        lambda: engine.verify([1, bad]),
        lambda: engine.verify([1, bad], parents=[-1, 0]),
        lambda: engine.score([1, bad]),
    ]
    for action in actions:
        assert f"token id {bad} is outside the vocabulary (0..{VOCAB - 1})" in refusal(action)
    assert engine.positions.tolist() == [2]


@pytest.mark.parametrize("ids", [[], [[]], [[1], []], np.zeros((1, 0), np.int64), np.zeros(0, np.int32)])
def test_an_empty_prompt(engine: Engine, ids: Any) -> None:
    engine.reset()
    for call in (engine.prefill, engine.score, engine.verify):
        assert "empty" in refusal(lambda call=call: call(ids))


@pytest.mark.parametrize("ids", [[1.5, 2.0], ["a"], [[[1]]], [None], "text", [1, "a"], [[1, 2], [3, 2.5]]])
def test_what_is_no_token_id(engine: Engine, ids: Any) -> None:
    engine.reset()
    assert "token ids" in refusal(lambda: engine.prefill(ids))


# ---- weights


@pytest.mark.parametrize(("value", "quantization"), [(np.nan, "q0f32"), (np.inf, "q0f32"), (1e6, "q0f16")])
def test_weights_that_are_not_numbers(
    tiny_model: Path, tiny_artifact: Path, tmp_path: Path, value: float, quantization: str
) -> None:
    model = shutil.copytree(tiny_model, tmp_path / "model")
    tensors = {key: array.copy() for key, array in load_file(model / "model.safetensors").items()}
    name = next(key for key in tensors if key.endswith("h.1.mlp.c_fc.weight"))
    tensors[name][3, 5] = value
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    earlier = shutil.copytree(tiny_artifact, tmp_path / "out")
    before = contents(earlier)
    message = refusal(
        lambda: compile_model(
            str(model), "cpu", quantization, earlier, rules="baseline", verify_widths=(), max_seq_len=16
        )
    )
    assert "h.1.mlp.c_fc.weight" in message
    assert contents(earlier) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out"]


# ---- artifacts


def test_any_byte_of_the_manifest_flipped(copy: Path) -> None:
    """The first 300 bytes (format, digest) and 1000 others, a random bit each."""
    path = copy / "manifest.json"
    sound = path.read_bytes()
    rng = np.random.default_rng(0)
    for at in [*range(300), *rng.integers(len(sound), size=1000).tolist(), len(sound) - 1]:
        bit = int(rng.integers(8))
        damaged = bytearray(sound)
        damaged[at] ^= 1 << bit
        path.write_bytes(damaged)
        message = refusal(lambda: read_manifest(copy))
        assert "damaged" in message and "manifest.json" in message, (at, bit)
    path.write_bytes(sound)
    read_manifest(copy)
    path.write_bytes(sound[:-9])
    assert_one_line(generate(copy), "damaged", "compile it again")


@pytest.mark.parametrize(
    "damage", [b"", b"{}", b"[]", b"null", b'{"digest": 3}', b'{"digest": ""}', b"\xff\xfe\x00", b"["]
)
def test_a_manifest_that_is_none(copy: Path, damage: bytes) -> None:
    (copy / "manifest.json").write_bytes(damage)
    assert "damaged" in refusal(lambda: Engine(copy))


@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.999])
def test_a_truncated_library(copy: Path, share: float) -> None:
    library = copy / "lib.so"
    data = library.read_bytes()
    library.write_bytes(data[: int(len(data) * share)])
    for verify in (True, False):  # the size is looked at in any case: mapping a short library would kill the process
        assert "lib.so is truncated" in refusal(lambda verify=verify: Engine(copy, verify=verify))
    if share == 0.5:
        assert_one_line(generate_apart(copy), "lib.so is truncated")


def test_damaged_and_missing_files(copy: Path) -> None:
    rng = np.random.default_rng(1)
    for name in ("lib.so", "params/params_shard_0.bin", "params/tensor-cache.json"):
        file = copy / name
        sound = file.read_bytes()
        for at in rng.integers(len(sound), size=5).tolist():
            damaged = bytearray(sound)
            damaged[at] ^= 0x10
            file.write_bytes(damaged)
            assert f"{name} is damaged" in refusal(lambda: open_artifact(copy))
        file.write_bytes(sound[:-1])
        assert f"{name} is truncated" in refusal(lambda: open_artifact(copy))
        file.write_bytes(sound + b"\0")
        assert "changed" in refusal(lambda: open_artifact(copy))
        file.unlink()
        assert f"{name} is missing" in refusal(lambda: open_artifact(copy))
        file.write_bytes(sound)
    open_artifact(copy)
    (copy / "lib.so").unlink()
    shutil.rmtree(copy / "params")
    assert "and 2 more files" in refusal(lambda: open_artifact(copy))


@pytest.mark.parametrize("package", ["apache-tvm", "apache-tvm-ffi"])
def test_another_version_of_tvm(copy: Path, package: str) -> None:
    seal(copy, versions={**read_manifest(copy)["versions"], package: "0.26.0"})
    assert_one_line(generate(copy), f"compiled with {package} 0.26.0", "compile it again")


def test_another_format(copy: Path) -> None:
    path = copy / "manifest.json"
    manifest = json.loads(path.read_text())
    text = path.read_text().replace('"format": 1', '"format": 2').replace(manifest["digest"], "0" * 64)
    path.write_text(text.replace("0" * 64, hashlib.sha256(text.encode()).hexdigest(), 1))
    assert "format 2, this program reads 1" in refusal(lambda: Engine(copy))


def test_code_for_another_processor(copy: Path) -> None:
    target = read_manifest(copy)["target"]
    seal(copy, target={**target, "requires": [*target["requires"], "avx9000"]})
    assert_one_line(generate(copy), "needs a CPU with avx9000", "--target cpu")


def test_a_library_of_another_platform(copy: Path) -> None:
    library = bytearray((copy / "lib.so").read_bytes())
    library[18] ^= 0xFF  # ELF's e_machine
    (copy / "lib.so").write_bytes(library)
    seal(copy)
    assert_one_line(generate_apart(copy), "lib.so does not load here", "compile it again")


@pytest.mark.parametrize("kind", ["metal", "rocm"])
def test_an_artifact_for_a_device_that_is_not_here(copy: Path, kind: str) -> None:
    seal(copy, target={**read_manifest(copy)["target"], "kind": kind})
    assert_one_line(generate(copy), f"no {kind} device")


def test_another_device_than_compiled_for(tiny_artifact: Path) -> None:
    assert "compiled for cpu, not for cuda" in refusal(lambda: Engine(tiny_artifact, "cuda"))


def test_no_artifact(tmp_path: Path) -> None:
    assert "no artifact at" in refusal(lambda: Engine(tmp_path / "none"))
    assert "not an artifact" in refusal(lambda: Engine(tmp_path))
