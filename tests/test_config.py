"""GPT2Config: the true shapes, transformers' own arithmetic, and what is refused, by name."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gpt2_tvm.config import ACTIVATION_ALIASES, ACTIVATIONS, PRESETS, GPT2Config
from gpt2_tvm.errors import UserError

MINIMAL = {
    "model_type": "gpt2",
    "vocab_size": 100,
    "n_positions": 32,
    "n_embd": 24,
    "n_layer": 2,
    "n_head": 3,
}


# As published with the models; 124M, 355M, 774M, 1.56B and 82M.
@pytest.mark.parametrize(
    ("preset", "parameters", "head_dim"),
    [
        ("gpt2", 124_439_808, 64),
        ("gpt2-medium", 354_823_168, 64),
        ("gpt2-large", 774_030_080, 64),
        ("gpt2-xl", 1_557_611_200, 64),
        ("distilgpt2", 81_912_576, 64),
    ],
)
def test_presets_have_the_published_sizes(preset: str, parameters: int, head_dim: int) -> None:
    config = PRESETS[preset]
    assert config.num_parameters() == parameters
    assert config.head_dim == head_dim
    assert (config.vocab_size, config.n_positions, config.eos_token_id) == (50257, 1024, 50256)


@pytest.mark.parametrize("tied", [True, False])
def test_parameter_count_equals_transformers(tied: bool) -> None:
    transformers = pytest.importorskip("transformers")
    config = GPT2Config.from_json({**MINIMAL, "n_inner": 40, "tie_word_embeddings": tied})
    reference = transformers.GPT2LMHeadModel(transformers.GPT2Config(**json.loads(config.to_json())))
    assert config.num_parameters() == sum(p.numel() for p in reference.parameters())


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("by_layer", [True, False])
def test_attention_scale_is_transformers_own(scaled: bool, by_layer: bool) -> None:
    transformers = pytest.importorskip("transformers")
    flags = {"scale_attn_weights": scaled, "scale_attn_by_inverse_layer_idx": by_layer}
    config = GPT2Config.from_json({**MINIMAL, "n_layer": 5, **flags})
    reference = transformers.GPT2LMHeadModel(transformers.GPT2Config(**json.loads(config.to_json())))
    scales = [config.attention_scale(layer) for layer in range(5)]
    assert scales == [block.attn.scaling for block in reference.transformer.h]
    with pytest.raises(ValueError, match="outside"):
        config.attention_scale(5)


@pytest.mark.parametrize("name", [*ACTIVATIONS, *ACTIVATION_ALIASES])
def test_activation_names_mean_the_same_function(name: str) -> None:
    torch = pytest.importorskip("torch")
    activations = pytest.importorskip("transformers.activations")
    ours = GPT2Config(activation_function=name).activation_function
    assert ours in ACTIVATIONS
    if name not in activations.ACT2FN:
        pytest.skip(f"this transformers has no {name}")
    x = torch.linspace(-8, 8, 4001)
    torch.testing.assert_close(activations.ACT2FN[name](x), activations.ACT2FN[ours](x), rtol=0, atol=2e-6)


def test_no_alias_hides_a_different_function() -> None:
    """The tolerance above tells neighbours apart: gelu and gelu_new differ by far more."""
    torch = pytest.importorskip("torch")
    act2fn = pytest.importorskip("transformers.activations").ACT2FN
    x = torch.linspace(-8, 8, 4001)
    assert (act2fn["gelu"](x) - act2fn["gelu_new"](x)).abs().max() > 1e-4


def test_defaults_are_hugging_faces() -> None:
    config = GPT2Config.from_json(MINIMAL)
    assert config.n_inner == 4 * 24
    assert config.activation_function == "gelu_new"
    assert config.layer_norm_epsilon == 1e-5
    assert config.scale_attn_weights and config.tie_word_embeddings
    assert not config.scale_attn_by_inverse_layer_idx
    assert GPT2Config.from_json({**MINIMAL, "n_inner": None}).n_inner == 96
    assert GPT2Config.from_json({**MINIMAL, "n_inner": 7}).n_inner == 7


def test_what_does_not_change_inference_is_ignored() -> None:
    noise = {"reorder_and_upcast_attn": True, "attn_pdrop": 0.1, "summary_type": "cls_index", "n_ctx": 32}
    assert GPT2Config.from_json({**MINIMAL, **noise}) == GPT2Config.from_json(MINIMAL)


def test_one_end_of_text_in_a_list_is_one() -> None:
    assert GPT2Config.from_json({**MINIMAL, "eos_token_id": [5]}).eos_token_id == 5
    assert GPT2Config.from_json({**MINIMAL, "eos_token_id": None}).eos_token_id is None


def test_json_round_trip_through_file_folder_and_transformers(tmp_path: Path) -> None:
    config = replace(
        GPT2Config.from_json(MINIMAL),
        activation_function="relu",
        tie_word_embeddings=False,
        layer_norm_epsilon=1e-3,
    )
    file = tmp_path / "config.json"
    file.write_text(config.to_json())
    assert GPT2Config.from_json(file) == GPT2Config.from_json(tmp_path) == config
    transformers = pytest.importorskip("transformers")
    transformers.AutoConfig.from_pretrained(tmp_path).save_pretrained(tmp_path / "again")
    assert GPT2Config.from_json(tmp_path / "again") == config


@pytest.mark.parametrize("head_dim", [1, 3, 17, 256])
def test_unusual_head_sizes_are_supported(head_dim: int) -> None:
    config = GPT2Config.from_json({**MINIMAL, "n_head": 2, "n_embd": 2 * head_dim})
    assert config.head_dim == head_dim


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"add_cross_attention": True}, "cross attention"),
        ({"model_type": "llama"}, "'llama'"),
        ({"activation_function": "quick_gelu"}, "quick_gelu"),
        ({"activation_function": 3}, "activation_function is 3"),
        ({"n_embd": 25}, "n_embd 25 is not a multiple of n_head 3"),
        ({"n_head": 1, "n_embd": 257}, "head size 257"),
        ({"n_layer": 0}, "n_layer is 0"),
        ({"vocab_size": -1}, "vocab_size is -1"),
        ({"n_inner": 0}, "n_inner is 0"),
        ({"n_embd": 24.0}, "n_embd is 24.0"),
        ({"n_embd": "24"}, "n_embd is '24'"),
        ({"n_head": True}, "n_head is True"),
        ({"n_positions": None}, "n_positions is None"),
        ({"layer_norm_epsilon": 0}, "layer_norm_epsilon is 0"),
        ({"layer_norm_epsilon": float("nan")}, "layer_norm_epsilon is nan"),
        ({"layer_norm_epsilon": "small"}, "layer_norm_epsilon is 'small'"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings is 1"),
        ({"scale_attn_weights": None}, "scale_attn_weights is None"),
        ({"eos_token_id": -1}, "eos_token_id is -1"),
        ({"eos_token_id": [1, 2]}, "eos_token_id"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ],
)
def test_refused_by_name(change: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError) as caught:
        GPT2Config.from_json({**MINIMAL, **change})
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_keys_are_all_named() -> None:
    with pytest.raises(UserError, match=r"has no n_positions, n_head"):
        GPT2Config.from_json({k: v for k, v in MINIMAL.items() if k not in ("n_head", "n_positions")})


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe{}", b"[" * 100_000], ids=lambda c: repr(c[:4]))
def test_a_damaged_file_is_named(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "config.json"
    file.write_bytes(content)
    with pytest.raises(UserError) as caught:
        GPT2Config.from_json(tmp_path)
    assert str(file) in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"config\.json"):
        GPT2Config.from_json(tmp_path)
