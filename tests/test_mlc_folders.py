"""Folders of mlc-llm: what export_mlc writes, and what import_mlc makes of what mlc-llm converted.

mlc-llm itself cannot be had here. Its converter is played by `converted`: the names of its GPT-2 loader, its group
quantisation in the arithmetic of the model's dtype, and TVM's own writer, which it calls with the same options.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from gpt2_tvm import compile_model, export_mlc, import_mlc
from gpt2_tvm.artifact import read_manifest
from gpt2_tvm.checkpoint import ModelSource, random_model, resolve_model
from gpt2_tvm.config import GPT2Config
from gpt2_tvm.data import bundled_model
from gpt2_tvm.errors import UserError
from gpt2_tvm.mlc.chat_config import CHAT_CONFIG
from gpt2_tvm.quantization.groups import quantise_groups
from gpt2_tvm.tensor_cache import load_tensors
from gpt2_tvm.tokenizer import load_tokenizer
from gpt2_tvm.weights import expected_tensors, iter_weights, write_hf_checkpoint

SMALL = GPT2Config(vocab_size=300, n_positions=48, n_embd=96, n_layer=2, n_head=3, bos_token_id=0, eos_token_id=0)
MATRICES = ("wte.weight", "wpe.weight", "c_attn.weight", "c_proj.weight", "c_fc.weight", "lm_head.weight")


def groups_of_32(weight: np.ndarray, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """mlc-llm's GroupQuantize._quantize: every step rounded to the model's dtype."""
    w = weight.astype(dtype)
    n, k = w.shape
    padded = np.zeros((n, -(-k // 32) * 32), dtype)
    padded[:, :k] = w
    grouped = padded.reshape(n, -1, 32)
    scale = (np.abs(grouped).max(axis=2) / np.asarray(7, dtype)).astype(dtype)
    q = np.rint((grouped / scale[:, :, None]).astype(dtype) + np.asarray(7, dtype))
    q = np.clip(q, 0, 14).astype(np.uint32).reshape(n, -1, 8)
    words = np.zeros(q.shape[:2], np.uint32)
    for nibble in range(8):
        words |= q[:, :, nibble] << np.uint32(4 * nibble)
    return words, scale


def converted(source: ModelSource, folder: Path, quantization: str) -> Path:
    """The folder that mlc_llm convert_weight and gen_config make of a checkpoint."""
    from tvm.contrib import tvmjs

    dtype = "float32" if "f32" in quantization else "float16"
    weights = dict(iter_weights(source, "float32"))
    weights["lm_head.weight"] = weights["transformer.wte.weight"]  # its loader reads the table twice
    stored: dict[str, np.ndarray] = {}
    for name, array in weights.items():
        if quantization.startswith("q4") and name.endswith(MATRICES):
            words, scales = groups_of_32(array, dtype)
            base = name.removesuffix(".weight")
            stored |= {f"{base}.q_weight": words, f"{base}.q_scale": scales}
        else:
            stored[name] = array.astype(dtype)
    tvmjs.dump_tensor_cache(stored, str(folder), meta_data={"ParamSize": len(stored)}, show_progress=False)
    config = source.config
    inner = {name: getattr(config, name) for name in import_mlc.FIELDS}
    chat = {
        "version": "0.1.0",
        "model_type": "gpt2",
        "quantization": quantization,
        "model_config": {**inner, "context_window_size": config.n_positions // 2, "head_dim": config.head_dim},
        "context_window_size": config.n_positions // 2,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
    }
    (folder / CHAT_CONFIG).write_text(json.dumps(chat))
    return folder


@pytest.fixture(scope="module")
def small() -> ModelSource:
    return random_model(SMALL, seed=3)


def change(folder: Path, **values: Any) -> None:
    path = folder / CHAT_CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize("quantization", ["q0f16", "q0f32", "q4f16_1", "q4f32_1"])
def test_an_imported_checkpoint_has_the_converted_numbers(
    small: ModelSource, tmp_path: Path, quantization: str
) -> None:
    folder = converted(small, tmp_path / "mlc", quantization)
    made = import_mlc.import_folder(folder, tmp_path / "checkpoint")
    assert made["tied"] and made["quantization"] == quantization
    assert made["parameters"] == SMALL.num_parameters()
    source = resolve_model(str(tmp_path / "checkpoint"))
    assert source.config == SMALL  # positions too, though the context window is half of them
    original = dict(iter_weights(small, "float32"))
    bfloat = quantization.endswith("f32") or quantization == "q4f32_1"  # tvmjs halves float32 unless told otherwise
    dtype = "float32" if "f32" in quantization else "float16"
    for name, array in iter_weights(source, "float32"):
        if quantization.startswith("q4") and name.endswith(MATRICES):
            words, scales = groups_of_32(original[name], dtype)
            shifts = np.arange(0, 32, 4, dtype=np.uint32)
            q = ((words[:, :, None] >> shifts) & np.uint32(15)).reshape(len(words), -1, 32).astype(np.float32)
            if dtype == "float32":  # the scales were halved on their way
                assert np.abs(array - original[name]).max() < 0.6 * np.abs(scales).max()
                continue
            expected = ((q - 7) * scales.astype(np.float32)[:, :, None]).reshape(len(words), -1)
            assert np.array_equal(array, expected[:, : array.shape[1]]), name
            if not name.endswith("wpe.weight"):  # compiled again, the same bits
                again = quantise_groups(name, array, dtype)
                assert np.array_equal(again[0], words) and np.array_equal(again[1], scales), name
        else:
            assert np.allclose(array, original[name], rtol=2**-7 if bfloat else 2**-10, atol=1e-7), name


def test_a_head_of_its_own_stays_one(small: ModelSource, tmp_path: Path) -> None:
    from dataclasses import replace

    untied = random_model(replace(SMALL, tie_word_embeddings=False), seed=4)
    config = {name: array for name, array in iter_weights(untied, "float32")}
    folder = converted(small, tmp_path / "mlc", "q0f16")
    from tvm.contrib import tvmjs

    stored = {name: array.astype("float16") for name, array in config.items()}
    tvmjs.dump_tensor_cache(stored, str(folder), meta_data={}, show_progress=False)
    made = import_mlc.import_folder(folder, tmp_path / "checkpoint")
    assert not made["tied"]
    found = dict(iter_weights(resolve_model(str(tmp_path / "checkpoint")), "float32"))
    assert np.array_equal(found["lm_head.weight"], stored["lm_head.weight"].astype(np.float32))


def test_the_older_name_of_the_index(small: ModelSource, tmp_path: Path) -> None:
    folder = converted(small, tmp_path / "mlc", "q0f16")
    (folder / "tensor-cache.json").rename(folder / "ndarray-cache.json")
    assert import_mlc.import_folder(folder, tmp_path / "checkpoint")["tied"]


def test_bad_folders_are_named_in_one_line(small: ModelSource, tmp_path: Path) -> None:
    folder = converted(small, tmp_path / "mlc", "q4f16_1")
    checkpoint = tmp_path / "checkpoint"
    chat, index = (folder / name for name in (CHAT_CONFIG, "tensor-cache.json"))
    good = {path: path.read_bytes() for path in folder.iterdir()}

    def refused(word: str) -> None:
        with pytest.raises(UserError, match=word) as caught:
            import_mlc.import_folder(folder, checkpoint)
        assert "\n" not in str(caught.value) and not checkpoint.exists()
        for path, content in good.items():
            path.write_bytes(content)

    change(folder, model_type="llama")
    refused("is a llama")
    change(folder, quantization="q3f16_1")
    refused("q3f16_1; those that can be imported")
    change(folder, model_config={**json.loads(good[chat])["model_config"], "n_layer": 3})
    refused(r"missing transformer\.h\.2\.ln_1\.weight")
    change(folder, model_config={**json.loads(good[chat])["model_config"], "n_embd": 48})
    refused(r"in groups of 32|instead of|must be|multiple")
    chat.write_text("{")
    refused(f"{CHAT_CONFIG} is damaged")
    chat.unlink()
    refused(f"has no {CHAT_CONFIG}")
    index.unlink()
    refused("it holds no weights")
    index.write_text(index.read_text().replace('"f32-to-bf16"', '"zip"'))
    refused("is stored as 'zip'")
    index.write_text('{"records": [{}]}')
    refused("is damaged")
    shard = next(folder.glob("params_shard_*.bin"))
    content = bytearray(good[shard])
    content[100] ^= 1
    shard.write_bytes(content)
    refused("its size or its MD5")
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "mine.txt").write_text("x")
    with pytest.raises(UserError, match="exists and is not"):
        import_mlc.import_folder(folder, checkpoint)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("export") / "artifact"
    return compile_model("bundled", "cpu", "q4f32_1", path, interface="mlc", prefill_chunk=64)


def test_an_export_has_what_the_library_asks_for(artifact: Path, tmp_path: Path) -> None:
    out = tmp_path / "austen"
    result = CliRunner().invoke(export_mlc.app, [str(artifact), "--output", str(out)])
    assert result.exit_code == 0, result.output
    told = read_manifest(artifact)["mlc"]
    chat = json.loads((out / CHAT_CONFIG).read_text())
    for key in ("quantization", "context_window_size", "prefill_chunk_size", "sliding_window_size"):
        assert chat[key] == told[key]
    assert told["prefill_chunk_size"] == 64
    tensors = load_tensors(out)
    for one in told["params"]:
        tensor = tensors.pop(one["name"])
        assert list(tensor.shape) == one["shape"] and str(tensor.dtype) == one["dtype"]
    assert not tensors
    assert {"transformer.wte.q_weight", "transformer.h.0.mlp.c_fc.q_scale"} <= {one["name"] for one in told["params"]}
    for shard in json.loads((out / "tensor-cache.json").read_text())["records"]:
        content = (out / shard["dataPath"]).read_bytes()
        assert hashlib.md5(content).hexdigest() == shard["md5sum"]
    text = "It is a truth, that Jane’s café…"
    ours = load_tokenizer(bundled_model())
    assert load_tokenizer(out).encode(text) == ours.encode(text)
    merges = json.loads((out / "tokenizer.json").read_text())["model"]["merges"]
    assert all(isinstance(pair, str) and len(pair.split(" ")) == 2 for pair in merges)
    assert chat["conv_template"]["stop_token_ids"] == [ours.eos_id] and set(chat["tokenizer_files"]) <= {
        file.name for file in out.iterdir()
    }
    (out / "stale").write_text("x")
    export_mlc.export(artifact, out)  # an export may be replaced
    assert not (out / "stale").exists()


def test_an_export_comes_back(artifact: Path, tmp_path: Path) -> None:
    export_mlc.export(artifact, tmp_path / "austen")
    import_mlc.import_folder(tmp_path / "austen", tmp_path / "checkpoint")  # from panels of a CPU
    back = resolve_model(str(tmp_path / "checkpoint"))
    bundled = resolve_model("bundled")
    assert back.config == bundled.config
    original = dict(iter_weights(bundled, "float32"))
    for name, array in iter_weights(back, "float32"):
        error = np.abs(array - original[name]).max()
        assert error <= np.abs(original[name]).max() / 13, name
        if not name.endswith(MATRICES) or name.endswith("wpe.weight"):
            assert np.array_equal(array, original[name])
    assert (tmp_path / "checkpoint" / "tokenizer.json").is_file()


def test_what_cannot_be_exported(artifact: Path, tiny_artifact: Path, tmp_path: Path, small: ModelSource) -> None:
    checkpoint = write_hf_checkpoint(tmp_path / "checkpoint", SMALL, small)
    bare = compile_model(str(checkpoint), output=tmp_path / "bare", interface="mlc")
    with pytest.raises(UserError, match="has no tokenizer"):
        export_mlc.export(bare, tmp_path / "out")
    with pytest.raises(UserError, match="--interface mlc"):
        export_mlc.export(tiny_artifact, tmp_path / "out")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("x")
    with pytest.raises(UserError, match="exists and is not"):
        export_mlc.export(artifact, tmp_path / "mine")
    assert (tmp_path / "mine" / "notes.txt").exists() and not (tmp_path / "out").exists()
    assert len(expected_tensors(SMALL)) == len(read_manifest(bare)["mlc"]["params"])


@pytest.mark.heavy
def test_perplexity_after_a_round_trip(tmp_path: Path) -> None:
    from gpt2_tvm import Engine
    from gpt2_tvm.data import prompt_for
    from gpt2_tvm.evaluation.scoring import Scorer

    folder = converted(resolve_model("bundled"), tmp_path / "mlc", "q4f16_1")
    import_mlc.import_folder(folder, tmp_path / "checkpoint")
    found = {}
    for name, model, quantization in (
        ("float", "bundled", "q0f32"),
        ("ours", "bundled", "q4f16_1"),
        ("theirs", str(tmp_path / "checkpoint"), "q4f16_1"),
    ):
        engine = Engine(compile_model(model, quantization=quantization, output=tmp_path / name, verify_widths=()))
        ids = prompt_for(load_tokenizer(bundled_model()), engine.config.vocab_size, 800)
        found[name] = Scorer(engine, ids).run().perplexity
    assert abs(found["theirs"] / found["ours"] - 1) < 0.01  # the same scheme, but for their rounded positions
    assert 1 < found["theirs"] / found["float"] < 1.15
