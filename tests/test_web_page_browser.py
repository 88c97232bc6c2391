"""The page in headless Chromium: a person's hands on it, files and devices that fail, and what it looks like."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import page_tools
import pytest

from gpt2_tvm.artifact import read_manifest, write_manifest
from gpt2_tvm.build import compile_model
from gpt2_tvm.checkpoint import random_model
from gpt2_tvm.config import GPT2Config
from gpt2_tvm.data import bundled_model
from gpt2_tvm.decoding.tokens import Generation
from gpt2_tvm.engine import Engine
from gpt2_tvm.serve_web import Server, open_for_pages
from gpt2_tvm.tokenizer import load_tokenizer
from gpt2_tvm.toolchains import web
from gpt2_tvm.toolchains.webruntime import emscripten
from gpt2_tvm.weights import write_hf_checkpoint

pytestmark = pytest.mark.heavy

PROMPT = "It is a truth universally acknowledged, that"
TOKENS = 128


def compiled(model: str, folder: Path) -> Path:
    """An artifact with a model.wasm, or a skip."""
    page_tools.packages()
    page_tools.browser()
    if emscripten.find() is None:
        pytest.skip(f"emcc is missing: {emscripten.HOW_TO_GET_IT}")
    compile_model(model, "webgpu", output=folder, verify_widths=())
    assert web.MODULE in read_manifest(folder)["files"]
    return folder


def changed(artifact: Path, folder: Path, facts: dict[str, Any] | None = None, without: str | None = None) -> Path:
    """A copy with other facts in its manifest, or without a folder of files."""
    shutil.copytree(artifact, folder)
    if without:
        shutil.rmtree(folder / without)
    manifest = {k: v for k, v in read_manifest(artifact).items() if k not in ("format", "digest", "files")}
    write_manifest(folder, {**manifest, **(facts or {})})
    return folder


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of one layer with the bundled model's tokenizer."""
    folder = tmp_path_factory.mktemp("page")
    config = GPT2Config(vocab_size=2048, n_positions=512, n_embd=64, n_layer=1, n_head=2)
    checkpoint = write_hf_checkpoint(folder / "checkpoint", config, random_model(config, seed=5))
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        shutil.copyfile(bundled_model() / name, checkpoint / name)
    return compiled(str(checkpoint), folder / "small")


@pytest.fixture(scope="module")
def address(small: Path) -> Iterator[str]:
    """A server of the small model and of what can be wrong with it."""
    parts = {"plain": changed(small, small.parent / "plain", without="tokenizer")}
    needs = read_manifest(small).get("webgpu", {})
    parts["f16"] = changed(small, small.parent / "f16", {"webgpu": {**needs, "features": ["shader-f16"]}})
    for name in ("damaged", "missing"):
        parts[name] = changed(small, small.parent / name)
    with Server(open_for_pages([small, *parts.values()]), 0) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        shard = parts["damaged"] / "params/params_shard_0.bin"
        content = bytearray(shard.read_bytes())
        content[len(content) // 2] ^= 1
        shard.write_bytes(content)
        (parts["missing"] / "params/params_shard_0.bin").unlink()
        yield server.address
        server.shutdown()


def check_seen(seen: dict[str, Any], address: str) -> None:
    """No complaint on the console, and nothing asked of anybody else."""
    assert seen["errors"] == []
    assert {urlsplit(url).netloc for url in seen["requests"]} == {urlsplit(address).netloc}


def check_looks(looks: list[dict[str, list[str]]], folder: Path) -> None:
    """Nothing that axe-core finds (labels, contrast …), nothing wider than the window, four screenshots each."""
    for look in looks:
        assert look["violations"] == [] and look["tooWide"] == []
    shots = sorted(folder.glob("*.png"))
    assert len(shots) == 4 * len(looks) and all(shot.stat().st_size > 20_000 for shot in shots)


def test_the_trained_model_writes_what_the_cpu_writes(
    bundled_artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    artifact = compiled("bundled", tmp_path / "austen")
    engine = Engine(bundled_artifact)
    tokenizer = load_tokenizer(bundled_model())
    ids = tokenizer.encode(PROMPT)
    expected = list(Generation(engine, ids, TOKENS))
    by_chance = {"tokens": 24, "seed": 7, "topK": 40}  # the page's sliders stand at 0.7 and 0.9
    sampled = list(Generation(engine, ids, 24, 0.7, 40, 0.9, 7))
    probes = [[5], ids, ids + expected[:40]]
    with Server(open_for_pages([artifact]), 0) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        given = {"artifact": "austen", "prompt": PROMPT, "tokens": TOKENS, "probes": probes, "sampled": by_chance}
        seen = page_tools.act("story", server.address, tmp_path / "shots", timeout_s=1800, **given)
        server.shutdown()

        greedy = seen["greedy"]
        assert greedy["prompt_ids"] == ids and greedy["ids"] == expected
        assert greedy["text"] == PROMPT + tokenizer.decode(expected) and greedy["finish"] == "length"
        assert seen["chance"]["ids"] == sampled  # the same seed, the same text
        assert greedy["dispatches_per_token"] == read_manifest(artifact)["launches_per_decode"]
        for probe, logits in zip(probes, seen["logits"], strict=True):
            engine.reset()
            reference = engine.prefill(probe)[0]
            error = np.abs(np.array(logits) - reference).max() / np.abs(reference).max()
            assert error < 1e-3, error
        check_seen(seen, server.address)
    check_looks(seen["looks"], tmp_path / "shots")
    warm = seen["warm"]
    assert "kept in this browser" in warm["stage"]
    assert not [path for path in warm["requests"] if "params_shard" in path or path.endswith(".wasm")]
    first, prefill = warm["first_token_ms"], median(warm["prefill_ms"])
    with capsys.disabled():  # on a quiet machine at most 1.2 times; not asserted, since it is a time
        print(
            f"\n{seen['stage']} Prefill of {len(ids)} tokens {prefill:.0f} ms (later ones, median of 3), "
            f"first token after a warm load {first:.0f} ms: {first / prefill:.2f} times; "
            f"decode {greedy['decode_tok_s']:.1f} tokens/s"
        )


def test_hands_on_it(address: str, tmp_path: Path) -> None:
    seen = page_tools.act("hands", address, tmp_path, artifact="small", plain="plain")
    assert 3 < seen["stopped"]["tokens"] < 400 and "stopped" in seen["stopped"]["status"]
    further = seen["further"]
    assert further["after"].startswith(further["before"]) and len(further["after"]) > len(further["before"])
    prompt = len(load_tokenizer(bundled_model()).encode("Dear Jane,"))
    assert int(further["prompt"]) == prompt + seen["stopped"]["tokens"]
    copied = seen["copied"]
    assert copied["text"] == copied["shown"] and len(copied["run"]["ids"]) == 5
    result = seen["benchmark"]["json"]
    assert (result["prompt_tokens"], result["generate_tokens"], result["repeats"]) == (322, 64, 5)
    assert result["prefill_tok_s"] > 0 and result["decode_tok_s_sd"] >= 0 and result["dispatches_per_token"] > 0
    assert seen["benchmark"]["shown"] and "medians of 5 rounds" in seen["benchmark"]["status"]
    problems = seen["problems"]
    assert "stays" not in problems
    assert "Tokens at most" in problems["max-tokens 0"] and "prompt is empty" in problems["prompt "]
    assert "shorten the prompt" in problems["prompt word"]
    assert seen["ids"]["prompt_ids"] == [1, 2, 3] and len(seen["ids"]["ids"]) == 4
    assert seen["ids"]["text"] == ", ".join(map(str, [1, 2, 3, *seen["ids"]["ids"]])) + ","
    check_seen(seen, address)
    check_looks(seen["looks"], tmp_path)


def test_bad_and_missing_files(address: str, small: Path, tmp_path: Path) -> None:
    seen = page_tools.act("files", address, tmp_path, good="small", damaged="damaged", missing="missing", f16="f16")
    said = seen["said"]
    assert "params/params_shard_0.bin is damaged" in said["damaged"] and said["damaged again"]
    assert "params/params_shard_0.bin is missing" in said["missing"] and said["missing again"]
    assert "shader-f16" in said["f16"] and not said["f16 again"]
    assert "manifest.json is missing" in said["gone"]
    assert f"artifacts of this server ({address.rstrip('/')})" in said["elsewhere"]
    assert "params/params_shard_0.bin is damaged" in said["onTheWay"]
    for tried in (seen["again"], seen["kept"]):  # what had arrived whole is not loaded again
        assert tried["tokens"] == seen["tokens"]
        names = [path.rpartition("/")[2] for path in tried["requests"]]
        assert names[:2] == ["manifest.json", "params_shard_0.bin"] and not {"model.wasm", "kernels.json"} & {*names}
    assert all("404" in error for error in seen["errors"])  # the browser itself notes these two
    assert {urlsplit(url).netloc for url in seen["requests"]} == {urlsplit(address).netloc}
    check_looks([said["look"]], tmp_path)


def test_what_a_browser_lacks(address: str, tmp_path: Path) -> None:
    seen = page_tools.act("lacks", address, tmp_path, artifact="small")
    said = seen["said"]
    assert "has no WebGPU: use Chrome or Edge 113" in said["nothing"]
    assert "no graphics device" in said["adapter"]
    assert "model needs" in said["binding"] and "in one binding" in said["binding"]
    assert not said["nothing again"] and not said["binding again"]
    assert seen["errors"] == []
    check_looks(said["looks"], tmp_path)


def test_a_lost_device(address: str, tmp_path: Path) -> None:
    seen = page_tools.act("lost", address, tmp_path, artifact="small")
    for found in seen["rounds"]:
        assert "The graphics device was lost" in found["said"] and found["disabled"] and found["gone"]
        assert found["ids"] == seen["expected"]


def test_a_reload_in_the_middle_and_two_tabs(address: str, small: Path, tmp_path: Path) -> None:
    seen = page_tools.act("tabs", address, tmp_path, artifact="small")
    resumed = seen["resumed"]
    names = [path.rpartition("/")[2] for path in resumed["after"]]
    assert any(path.endswith("model.wasm") for path in resumed["before"])
    assert "model.wasm" not in names and "params_shard_0.bin" in names
    assert "kept here" in resumed["stage"]
    together = [path.rpartition("/")[2] for path in seen["together"]]
    assert together.count("params_shard_0.bin") == 1 and together.count("model.wasm") == 1
    assert seen["ids"][0] == seen["ids"][1] and len(seen["ids"][0]) == 12 and len(set(seen["ids"][0])) > 1
    assert {urlsplit(url).netloc for url in seen["requests"]} == {urlsplit(address).netloc}
    assert json.dumps(seen["errors"]).count("ERR_") == len(seen["errors"])  # the request that was cut off
