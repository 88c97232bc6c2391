"""The shape of a GPT-2: everything that its definition and its kernels need to know, read from a
`config.json`.

Names are Hugging Face's (`transformers.GPT2Config`), so that a checkpoint's own file is the only source. What
this project cannot run faithfully is refused here, by name, before anything is compiled.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from gpt2_tvm.errors import UserError

ACTIVATIONS = ("gelu_new", "gelu", "relu", "silu", "tanh")

# Other names in transformers' ACT2FN for the same function. `gelu_fast` writes sqrt(2/pi) as 0.7978845608,
# which is the same float32; tests/test_config.py compares every pair.
ACTIVATION_ALIASES = {
    "gelu_pytorch_tanh": "gelu_new",
    "gelu_python_tanh": "gelu_new",
    "gelu_accurate": "gelu_new",
    "gelu_fast": "gelu_new",
    "gelu_python": "gelu",
    "swish": "silu",
}

MAX_HEAD_DIM = 256  # the attention kernels keep a head's row in registers or shared memory

_SIZES = ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "n_inner")
_FLAGS = ("scale_attn_weights", "scale_attn_by_inverse_layer_idx", "tie_word_embeddings")
_LAYERS = ("layer_heads", "layer_inner", "layer_inputs")
_REQUIRED = ("model_type", "vocab_size", "n_positions", "n_embd", "n_layer", "n_head")


@dataclass(frozen=True)
class GPT2Config:
    """The configuration of one GPT-2. Checked on construction; any value that cannot be run raises
    `UserError`.

    Attributes (sizes are counts of elements):
        vocab_size: V, rows of the token embedding and width of the logits.
        n_positions: P, the longest context.
        n_embd: E, width of the residual stream.
        n_layer, n_head: number of blocks, and of heads in each; E must be a multiple of n_head.
        n_inner: width of the MLP; None means 4 * E and is replaced by that number.
        activation_function: one of `ACTIVATIONS`; Hugging Face's other names for these are translated.
        layer_norm_epsilon: added to the variance in every LayerNorm.
        scale_attn_weights, scale_attn_by_inverse_layer_idx: see `attention_scale`.
        tie_word_embeddings: the head is the token embedding; otherwise `lm_head.weight` [V, E] is its own.
        bos_token_id, eos_token_id: None where the model has none.
        layer_heads, layer_inner, layer_inputs: what a pruned model keeps, an entry a layer; None where nothing was cut
            (keys of ours, which transformers does not know). Heads, at most n_head; width of the MLP, at most n_inner;
            and inputs of attn.c_attn, of attn.c_proj and of mlp.c_fc, a triple of numbers, at most E, heads * head_dim
            and E. Read them with `heads`, `inner` and `inputs`: n_head and n_inner stay those of the whole model, and
            so does head_dim.
    """

    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int = None  # type: ignore[assignment]  # None only until __post_init__, so that readers see an int
    activation_function: str = "gelu_new"
    layer_norm_epsilon: float = 1e-5
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False
    tie_word_embeddings: bool = True
    bos_token_id: int | None = 50256
    eos_token_id: int | None = 50256
    layer_heads: tuple[int, ...] | None = None
    layer_inner: tuple[int, ...] | None = None
    layer_inputs: tuple[tuple[int, int, int], ...] | None = None

    def __post_init__(self) -> None:
        _check_sizes(self)
        _check_layers(self)
        for name in _FLAGS:
            if not isinstance(getattr(self, name), bool):
                raise _wrong(name, getattr(self, name), "true or false")
        for name in ("bos_token_id", "eos_token_id"):
            value = getattr(self, name)
            if value is not None and (not _is_int(value) or value < 0):
                raise _wrong(name, value, "a token id (0 or more) or null")

        epsilon = self.layer_norm_epsilon
        if isinstance(epsilon, bool) or not isinstance(epsilon, int | float):
            raise _wrong("layer_norm_epsilon", epsilon, "a number")
        if not (math.isfinite(epsilon) and epsilon > 0):
            raise _wrong("layer_norm_epsilon", epsilon, "a positive, finite number")

        activation = self.activation_function
        if not isinstance(activation, str):
            raise _wrong("activation_function", activation, f"one of {', '.join(ACTIVATIONS)}")
        activation = ACTIVATION_ALIASES.get(activation, activation)
        if activation not in ACTIVATIONS:
            raise UserError(
                f"activation_function {activation!r} is not supported; supported are {', '.join(ACTIVATIONS)}"
            )
        object.__setattr__(self, "activation_function", activation)

    @property
    def head_dim(self) -> int:
        """Size of one head, E / n_head; 1 to 256."""
        return self.n_embd // self.n_head

    @property
    def pruned(self) -> bool:
        """Whether a layer is smaller than the configuration's plain sizes say."""
        return any(getattr(self, name) is not None for name in _LAYERS)

    def heads(self, layer: int) -> int:
        """Heads of block `layer` (from 0)."""
        return self.n_head if self.layer_heads is None else self.layer_heads[layer]

    def inner(self, layer: int) -> int:
        """Width of the MLP of block `layer`."""
        return self.n_inner if self.layer_inner is None else self.layer_inner[layer]

    def widths(self, layer: int) -> tuple[int, int, int]:
        """What the producers of the inputs of attn.c_attn, attn.c_proj and mlp.c_fc make in block `layer`."""
        return self.n_embd, self.heads(layer) * self.head_dim, self.n_embd

    def inputs(self, layer: int) -> tuple[int, int, int]:
        """How many of `widths` the three layers take in block `layer`."""
        return self.widths(layer) if self.layer_inputs is None else self.layer_inputs[layer]

    def first_layers(self, layers: int) -> GPT2Config:
        """The configuration of the first `layers` blocks."""
        cut = {name: value[:layers] for name in _LAYERS if (value := getattr(self, name)) is not None}
        return replace(self, n_layer=layers, **cut)

    def attention_scale(self, layer: int) -> float:
        """The factor on query·key in block `layer` (from 0), in transformers' own order of operations:
        1/sqrt(head_dim) if `scale_attn_weights`, then divided by layer + 1 if
        `scale_attn_by_inverse_layer_idx`.
        """
        if not 0 <= layer < self.n_layer:
            raise ValueError(f"layer {layer} is outside 0..{self.n_layer - 1}")
        scale = self.head_dim**-0.5 if self.scale_attn_weights else 1.0
        return scale / float(layer + 1) if self.scale_attn_by_inverse_layer_idx else scale

    def num_parameters(self) -> int:
        """How many numbers the model holds; a tied head counts once."""
        e, blocks = self.n_embd, 0
        for layer in range(self.n_layer):
            inner, qkv = self.inner(layer), 3 * self.heads(layer) * self.head_dim
            attn, proj, fc = self.inputs(layer)
            blocks += (
                2 * (attn + fc)  # two LayerNorms, weight and bias
                + (attn * qkv + qkv)  # attn.c_attn
                + (proj * e + e)  # attn.c_proj
                + (fc * inner + inner)  # mlp.c_fc
                + (inner * e + e)  # mlp.c_proj
            )
        heads = 1 if self.tie_word_embeddings else 2
        return heads * self.vocab_size * e + self.n_positions * e + blocks + 2 * e

    def to_json(self) -> str:
        """This configuration as the text of a `config.json`, which transformers loads as a GPT-2 (not a pruned one)."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        values = {name: value for name, value in values.items() if name not in _LAYERS or value is not None}
        return json.dumps(
            {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", **values}, indent=2, sort_keys=True
        )

    @staticmethod
    def from_json(source: str | Path | Mapping[str, Any]) -> GPT2Config:
        """Read a `config.json`: its path, the folder that holds it, or its content already parsed.

        Keys that do not change what the model computes at inference (dropout, summary_*, use_cache, …) are
        ignored; so is `reorder_and_upcast_attn`, which changes nothing in float32 and which our float32
        softmax already does. Raises UserError for a file that is missing or not JSON, and for whatever is not
        supported.
        """
        if isinstance(source, Mapping):
            return _from_mapping(source, "the configuration")
        path = Path(source)
        path = path / "config.json" if path.is_dir() else path
        return _from_mapping(_read_object(path), str(path))


def _from_mapping(values: Mapping[str, Any], where: str) -> GPT2Config:
    missing = [name for name in _REQUIRED if name not in values]
    if missing:
        raise UserError(f"{where} has no {', '.join(missing)}; a GPT-2 config.json names all of them")
    if values["model_type"] != "gpt2":
        raise UserError(
            f"{where} is for a model of type {values['model_type']!r}; only 'gpt2' is supported"
            " (convert the checkpoint, or choose a GPT-2)"
        )
    if values.get("add_cross_attention", False) is not False:
        raise UserError(f"{where} sets add_cross_attention; cross attention is not supported, only decoder-only GPT-2")
    if values.get("quantization_config") is not None:
        raise UserError(
            f"{where} has a quantization_config; give the unquantised checkpoint and choose a scheme"
            " with --quantization"
        )
    known = {field.name: values[field.name] for field in fields(GPT2Config) if field.name in values}
    eos = known.get("eos_token_id")
    if isinstance(eos, list):  # transformers 5 allows several
        if len(eos) != 1:
            raise UserError(f"eos_token_id in {where} is a list of {len(eos)}; one id is supported, keep one")
        known["eos_token_id"] = eos[0]
    try:
        return GPT2Config(**known)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _read_object(path: Path) -> Mapping[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"there is no {path}; give a folder in Hugging Face layout, which holds config.json") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        reason = (str(error).splitlines() or ["too deeply nested"])[0]
        raise UserError(f"{path} is not valid JSON ({reason}); fetch the file again") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} holds a {type(values).__name__}, not a JSON object; fetch the file again")
    return values


def _check_sizes(config: GPT2Config) -> None:
    if config.n_inner is None and _is_int(config.n_embd):
        object.__setattr__(config, "n_inner", 4 * config.n_embd)
    for name in _SIZES:
        value = getattr(config, name)
        if not _is_int(value):
            raise _wrong(name, value, "a whole number")
        if value <= 0:
            raise _wrong(name, value, "at least 1")
    if config.n_embd % config.n_head:
        raise UserError(f"n_embd {config.n_embd} is not a multiple of n_head {config.n_head}; correct one of the two")
    if config.head_dim > MAX_HEAD_DIM:
        raise UserError(
            f"head size {config.head_dim} (n_embd {config.n_embd} / n_head {config.n_head}) is not supported;"
            f" 1 to {MAX_HEAD_DIM} are"
        )


def _check_layers(config: GPT2Config) -> None:
    """Lists become tuples; every number is checked against the whole model's."""
    for name in ("layer_heads", "layer_inner"):
        given = getattr(config, name)
        if given is not None:
            most = config.n_head if name == "layer_heads" else config.n_inner
            object.__setattr__(config, name, _entries(config, name, given, [most] * config.n_layer))
    given = config.layer_inputs
    if given is not None:
        if not isinstance(given, list | tuple) or len(given) != config.n_layer:
            raise _wrong("layer_inputs", given, f"a list of {config.n_layer} triples, one a layer")
        found = (
            _entries(config, f"layer_inputs[{i}]", kept, config.widths(i), "numbers of inputs")
            for i, kept in enumerate(given)
        )
        object.__setattr__(config, "layer_inputs", tuple(found))


def _entries(
    config: GPT2Config, name: str, given: object, most: Sequence[int], what: str = "numbers, one a layer"
) -> tuple[int, ...]:
    valid = isinstance(given, list | tuple) and len(given) == len(most)
    if not valid or not all(_is_int(n) and 1 <= n <= m for n, m in zip(given, most, strict=True)):  # type: ignore
        limits = f"1 to {most[0]}" if len(set(most)) == 1 else f"at most {list(most)}"
        raise _wrong(name, given, f"a list of {len(most)} {what}, each {limits}")
    return tuple(given)  # type: ignore[arg-type]


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)  # JSON's true is an int to Python


def _wrong(name: str, value: object, wanted: str) -> UserError:
    return UserError(f"{name} is {value!r}; it must be {wanted}")


# Shapes as published: openai-community/gpt2*, distilbert/distilgpt2.
PRESETS: dict[str, GPT2Config] = {
    "gpt2": GPT2Config(),
    "gpt2-medium": GPT2Config(n_embd=1024, n_layer=24, n_head=16),
    "gpt2-large": GPT2Config(n_embd=1280, n_layer=36, n_head=20),
    "gpt2-xl": GPT2Config(n_embd=1600, n_layer=48, n_head=25),
    "distilgpt2": GPT2Config(n_layer=6),
}
