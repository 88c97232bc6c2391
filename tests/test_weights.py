"""Weights from every kind of checkpoint, every way in which one can be wrong, and the memory it takes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from gpt2_tvm.checkpoint import ModelSource, random_model, resolve_model
from gpt2_tvm.config import PRESETS, GPT2Config
from gpt2_tvm.errors import UserError
from gpt2_tvm.weights import expected_tensors, iter_weights, random_tensor, write_hf_checkpoint

CONFIG = GPT2Config(vocab_size=61, n_positions=16, n_embd=24, n_layer=2, n_head=3, n_inner=40)
UNTIED = replace(CONFIG, tie_word_embeddings=False)
Tensors = dict[str, np.ndarray]


def checkpoint(folder: Path, config: GPT2Config = CONFIG, edit: Callable[[Tensors], None] | None = None) -> ModelSource:
    """A checkpoint with random weights; `edit` may change its tensors (Hugging Face's names and layout)."""
    write_hf_checkpoint(folder, CONFIG, random_model(CONFIG, seed=3))
    if edit is not None:
        tensors = load_file(folder / "model.safetensors")
        edit(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return ModelSource("test", CONFIG, folder)


def weights(source: ModelSource, dtype: str | None = None) -> Tensors:
    return dict(iter_weights(source, dtype))


def assert_same(a: Tensors, b: Tensors) -> None:
    assert list(a) == list(b)
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def refusal(source: ModelSource, dtype: str | None = None) -> str:
    with pytest.raises(UserError) as caught:
        weights(source, dtype)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- what a model consists of


@pytest.mark.parametrize("config", [CONFIG, UNTIED, *PRESETS.values()], ids=["tied", "untied", *PRESETS])
def test_the_expected_tensors_are_the_whole_model(config: GPT2Config) -> None:
    shapes = expected_tensors(config)
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == config.num_parameters()
    assert ("lm_head.weight" in shapes) is not config.tie_word_embeddings


# ---- against transformers


@pytest.mark.parametrize("config", [CONFIG, UNTIED], ids=["tied", "untied"])
def test_transformers_loads_what_is_written(tmp_path: Path, config: GPT2Config) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    source = random_model(config, seed=1)
    write_hf_checkpoint(tmp_path, config, source)
    model, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert model.dtype == torch.float32
    state = model.state_dict()
    for name, array in iter_weights(source):
        stored = state[name].numpy()
        conv1d = array.ndim == 2 and ".h." in name
        np.testing.assert_array_equal(stored.T if conv1d else stored, array, err_msg=name)


@pytest.mark.parametrize("config", [CONFIG, UNTIED], ids=["tied", "untied"])
@pytest.mark.parametrize("shard_size", ["1GB", "20KB"], ids=["whole", "sharded"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_what_transformers_writes_is_read(tmp_path: Path, config: GPT2Config, shard_size: str, dtype: str) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    write_hf_checkpoint(tmp_path / "a", config, random_model(config))
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "a", dtype=getattr(torch, dtype))
    model.save_pretrained(tmp_path / "b", max_shard_size=shard_size)
    assert (tmp_path / "b" / "model.safetensors.index.json").exists() is (shard_size == "20KB")

    read = weights(resolve_model(str(tmp_path / "b")))
    stored = weights(random_model(config), dtype)
    assert {array.dtype.name for array in read.values()} == {dtype}
    assert_same(read, stored)
    # and widened, or narrowed, on the way
    assert_same(
        weights(resolve_model(str(tmp_path / "b")), "float32"),
        {k: v.astype("float32") for k, v in stored.items()},
    )


def test_a_gpt2_model_without_prefix_is_read(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    write_hf_checkpoint(tmp_path / "a", CONFIG, random_model(CONFIG))
    transformers.GPT2Model.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")
    assert "wte.weight" in load_file(tmp_path / "b" / "model.safetensors")
    assert_same(weights(resolve_model(str(tmp_path / "b"))), weights(random_model(CONFIG)))


# ---- variations of a checkpoint


def test_masks_saved_by_old_versions_are_passed_over(tmp_path: Path) -> None:
    def edit(tensors: Tensors) -> None:
        tensors["transformer.h.0.attn.bias"] = np.tril(np.ones((1, 1, 16, 16), np.uint8))
        tensors["transformer.h.1.attn.masked_bias"] = np.array(-1e4, np.float32)

    assert_same(weights(checkpoint(tmp_path, edit=edit)), weights(random_model(CONFIG, seed=3)))


def test_a_tied_head_may_be_stored_as_well_or_instead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpt2_tvm.weights._COMPARED_AT_ONCE", 100)  # 4 of 61 rows: the last part is a short one

    def both(tensors: Tensors) -> None:
        tensors["lm_head.weight"] = tensors["transformer.wte.weight"].copy()

    def instead(tensors: Tensors) -> None:
        tensors["lm_head.weight"] = tensors.pop("transformer.wte.weight")

    for i, edit in enumerate((both, instead)):
        assert_same(weights(checkpoint(tmp_path / str(i), edit=edit)), weights(random_model(CONFIG, seed=3)))


def test_a_tied_head_that_differs_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpt2_tvm.weights._COMPARED_AT_ONCE", 100)

    def edit(tensors: Tensors) -> None:
        tensors["lm_head.weight"] = tensors["transformer.wte.weight"].copy()
        tensors["lm_head.weight"][-1, -1] += 1

    assert "tie_word_embeddings" in refusal(checkpoint(tmp_path, edit=edit))


def test_every_fault_is_named_in_one_line(tmp_path: Path) -> None:
    def edit(tensors: Tensors) -> None:
        del tensors["transformer.ln_f.bias"]
        tensors["score.weight"] = np.zeros((2, 24), np.float32)
        tensors["transformer.h.1.attn.c_attn.weight"] = np.zeros((72, 24), np.float32)  # not transposed
        tensors["transformer.wpe.weight"] = tensors["transformer.wpe.weight"].astype(np.float64)

    message = refusal(checkpoint(tmp_path, edit=edit))
    assert "missing transformer.ln_f.bias" in message
    assert "unexpected score.weight" in message
    assert "transformer.h.1.attn.c_attn.weight has shape [72, 24] instead of [24, 72]" in message
    assert "transformer.wpe.weight is F64" in message
    assert " more" not in message


def test_many_faults_are_counted(tmp_path: Path) -> None:
    source = checkpoint(tmp_path)
    message = refusal(replace(source, config=replace(CONFIG, n_layer=3)))  # 12 tensors too few
    assert message.count("missing ") == 8 and "and 4 more" in message


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_weight_that_is_no_number_is_refused(tmp_path: Path, value: float, dtype: str) -> None:
    def spoil() -> Iterator[tuple[str, np.ndarray]]:
        for name, array in iter_weights(random_model(CONFIG), dtype):
            if name == "transformer.h.1.mlp.c_fc.weight":
                array[3, 5] = value
            yield name, array

    folder = write_hf_checkpoint(tmp_path, CONFIG, spoil(), dtype)
    message = refusal(ModelSource("test", CONFIG, folder))
    assert "transformer.h.1.mlp.c_fc.weight" in message and "NaN or infinity" in message


def test_a_weight_too_large_for_float16_is_refused(tmp_path: Path) -> None:
    def edit(tensors: Tensors) -> None:
        tensors["transformer.ln_f.weight"][0] = -65536
        tensors["transformer.ln_f.bias"][0] = 65504  # the largest that fits

    source = checkpoint(tmp_path, edit=edit)
    message = refusal(source, "float16")
    assert "transformer.ln_f.weight holds 65536" in message and "q0f32" in message
    assert weights(source, "bfloat16")["transformer.ln_f.weight"].dtype == ml_dtypes.bfloat16


@pytest.mark.parametrize("keep", [0, 7, 100, 5000, -1])
def test_a_truncated_file_is_refused(tmp_path: Path, keep: int) -> None:
    source = checkpoint(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    assert str(file) in refusal(source)


def test_a_damaged_header_is_refused(tmp_path: Path) -> None:
    source = checkpoint(tmp_path)
    data = bytearray((tmp_path / "model.safetensors").read_bytes())
    data[8:12] = b"\xff\xff\xff\xff"
    (tmp_path / "model.safetensors").write_bytes(data)
    assert "model.safetensors" in refusal(source)


def test_faults_between_shards_and_index(tmp_path: Path) -> None:
    source = checkpoint(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    index = tmp_path / "model.safetensors.index.json"
    names = sorted(tensors)
    shards = {"model-1-of-2.safetensors": names[:9], "model-2-of-2.safetensors": names[9:]}
    for file, held in shards.items():
        save_file({name: tensors[name] for name in held}, tmp_path / file)
    weight_map = {name: file for file, held in shards.items() for name in held}
    index.write_text(json.dumps({"weight_map": weight_map}))
    assert_same(weights(source), weights(random_model(CONFIG, seed=3)))

    index.write_text(json.dumps({"weight_map": {**weight_map, names[0]: "model-2-of-2.safetensors"}}))
    assert f"{names[0]} is not in model-2-of-2.safetensors" in refusal(source)
    index.write_text(json.dumps({"weight_map": {**weight_map, names[0]: "../elsewhere.safetensors"}}))
    assert str(index) in refusal(source)
    index.write_text(json.dumps({"weight_map": {**weight_map, names[0]: "model-3.safetensors"}}))
    assert "model-3.safetensors is missing" in refusal(source)
    save_file({names[0]: tensors[names[0]]}, tmp_path / "model-3.safetensors")
    assert f"{names[0]} occurs twice" in refusal(source)
    for damaged in ("{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": 1}}'):
        index.write_text(damaged)
        assert str(index) in refusal(source)


# ---- random weights


def test_random_weights_depend_on_seed_and_name_only() -> None:
    first, again = weights(random_model(CONFIG, seed=5)), weights(random_model(CONFIG, seed=5))
    assert_same(first, again)
    name, shape = "transformer.h.1.mlp.c_fc.weight", (40, 24)
    np.testing.assert_array_equal(random_tensor(CONFIG, name, shape, 5), first[name])
    other = weights(random_model(CONFIG, seed=6))
    assert all(not np.array_equal(first[name], other[name]) for name in first)
    assert len({array.tobytes() for array in first.values()}) == len(first)


def test_random_weights_have_gpt2s_spread() -> None:
    config = GPT2Config(vocab_size=2000, n_embd=256, n_head=4, n_layer=3)
    expected = {"wte": 0.02, "wpe": 0.01, "c_attn": 0.02, "c_proj": 0.02 / 6**0.5, "c_fc": 0.02}
    for name, array in iter_weights(random_model(config)):
        if array.ndim == 2:
            assert array.std() == pytest.approx(expected[name.split(".")[-2]], rel=0.02), name
        mean = 1 if ".ln_" in name and name.endswith("weight") else 0
        assert array.mean() == pytest.approx(mean, abs=0.01), name
        assert array.std() > 0.005, name  # a bias that is dropped shows in a test


# ---- writing


def test_weights_that_do_not_fit_are_not_written(tmp_path: Path) -> None:
    checkpoint(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    tensors = weights(random_model(CONFIG, seed=9))
    dropped = dict(list(tensors.items())[:-1])
    with pytest.raises(ValueError, match=r"missing: transformer\.ln_f\.bias"):
        write_hf_checkpoint(tmp_path, CONFIG, dropped.items())
    with pytest.raises(ValueError, match="came twice"):
        write_hf_checkpoint(tmp_path, CONFIG, [*tensors.items(), next(iter(tensors.items()))])
    with pytest.raises(ValueError, match="does not fit"):
        write_hf_checkpoint(tmp_path, CONFIG, {**tensors, "transformer.ln_f.bias": np.zeros(3, np.float32)}.items())
    assert (tmp_path / "model.safetensors").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


# ---- memory

_CONVERT = """
import json, sys
from pathlib import Path
from gpt2_tvm.checkpoint import resolve_model
from gpt2_tvm.tensor_cache import TensorCacheWriter
from gpt2_tvm.weights import iter_weights
import safetensors  # imported before the measurement

def status(key):
    return next(int(l.split()[1]) << 10 for l in open("/proc/self/status") if l.startswith(key))

source = resolve_model(sys.argv[1])
before = status("VmRSS")
with TensorCacheWriter(sys.argv[2]) as writer:
    for name, array in iter_weights(source, sys.argv[3]):
        writer.add(name, array)
print(status("VmHWM") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_conversion_holds_one_tensor_at_a_time(tmp_path: Path, dtype: str) -> None:
    config = GPT2Config(vocab_size=16000, n_positions=256, n_embd=512, n_layer=6, n_head=8)
    write_hf_checkpoint(tmp_path / "model", config, random_model(config))
    stored = config.num_parameters() * 4
    assert stored > 100e6
    largest = max(int(np.prod(shape)) * 4 for shape in expected_tensors(config).values())  # 33 MB
    run = subprocess.run(
        [sys.executable, "-c", _CONVERT, str(tmp_path / "model"), str(tmp_path / "cache"), dtype],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    growth = int(run.stdout)
    assert growth < 1.5 * stored  # what is promised
    assert growth < 2 * largest + (16 << 20), f"{growth / 1e6:.0f} MB"  # what streaming means
