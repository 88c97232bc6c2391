"""A block's tensors made narrower, and back to full width with zeros; names and layouts as in `weights`.

Both directions give the same function: a unit, head or input whose weights are all zero adds exactly nothing (every
activation we have maps 0 to 0).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from gpt2_tvm.config import GPT2Config

Tensors = dict[str, np.ndarray]  # of one block, by what follows "transformer.h.3."
_BLOCK = re.compile(r"transformer\.h\.(\d+)\.(.+)")


@dataclass(frozen=True)
class Keep:
    """What stays of one block: booleans over its heads, its MLP's units, and the inputs that attn.c_attn, attn.c_proj
    and mlp.c_fc take now (of attn.c_proj none that comes from a head that goes)."""

    heads: np.ndarray
    inner: np.ndarray
    attn: np.ndarray
    proj: np.ndarray
    fc: np.ndarray


def keep_all(config: GPT2Config, layer: int) -> Keep:
    """Everything that block `layer` has."""
    sizes = (config.heads(layer), config.inner(layer), *config.inputs(layer))
    return Keep(*(np.ones(size, bool) for size in sizes))


def blocks(weights: Iterable[tuple[str, np.ndarray]]) -> Iterator[tuple[int | None, Tensors]]:
    """(layer, its tensors) for each block in turn, and (None, {name: tensor}) for what belongs to none."""
    layer, held = -1, Tensors()
    for name, array in weights:
        match = _BLOCK.fullmatch(name)
        if held and (match is None or int(match[1]) != layer):
            yield layer, held
            held = {}
        if match is None:
            yield None, {name: array}
        else:
            layer, held[match[2]] = int(match[1]), array
    if held:
        yield layer, held


def named(layer: int | None, tensors: Tensors) -> Iterator[tuple[str, np.ndarray]]:
    """The inverse of `blocks`."""
    for name, array in tensors.items():
        yield name if layer is None else f"transformer.h.{layer}.{name}", array


def cut_config(config: GPT2Config, keeps: Sequence[Keep]) -> GPT2Config:
    """The shape that is left. MLPs that all have one width need no list: then n_inner says it, and where nothing else
    was cut transformers can load the checkpoint."""
    heads = tuple(int(keep.heads.sum()) for keep in keeps)
    inner = tuple(int(keep.inner.sum()) for keep in keeps)
    inputs = [(int(keep.attn.sum()), int(keep.proj.sum()), int(keep.fc.sum())) for keep in keeps]
    same = len(set(inner)) == 1
    made = replace(
        config,
        n_inner=inner[0] if same else config.n_inner,
        layer_inner=None if same else inner,
        layer_heads=None if set(heads) == {config.n_head} else heads,
        layer_inputs=None,
    )
    whole = [made.widths(layer) for layer in range(config.n_layer)]
    return made if inputs == whole else replace(made, layer_inputs=tuple(inputs))


def cut_block(tensors: Tensors, config: GPT2Config, layer: int, keep: Keep) -> Tensors:
    """The block's tensors without what `keep` leaves out; config: the shape that it has now."""
    D, heads = config.head_dim, config.heads(layer)
    width = heads * D
    channels = np.repeat(keep.heads, D)  # of the heads that stay
    place = np.cumsum(channels) - 1  # a channel's place among those that stay
    kept_proj = place[taken_channels(tensors, width)[keep.proj]].astype(np.int32)
    qkv = np.tile(channels, 3)
    out: Tensors = {}
    for norm, mask in (("ln_1", keep.attn), ("ln_2", keep.fc)):
        out[f"{norm}.weight"], out[f"{norm}.bias"] = tensors[f"{norm}.weight"][mask], tensors[f"{norm}.bias"][mask]
        inputs = tensors.get(f"{norm}.kept", np.arange(config.n_embd, dtype=np.int32))[mask]
        if len(inputs) < config.n_embd:
            out[f"{norm}.kept"] = inputs.astype(np.int32)
    out["attn.c_attn.weight"] = tensors["attn.c_attn.weight"][qkv][:, keep.attn]
    out["attn.c_attn.bias"] = tensors["attn.c_attn.bias"][qkv]
    out["attn.c_proj.weight"] = tensors["attn.c_proj.weight"][:, keep.proj]
    out["attn.c_proj.bias"] = tensors["attn.c_proj.bias"]
    if len(kept_proj) < channels.sum():
        out["attn.kept"] = kept_proj
    out["mlp.c_fc.weight"] = tensors["mlp.c_fc.weight"][keep.inner][:, keep.fc]
    out["mlp.c_fc.bias"] = tensors["mlp.c_fc.bias"][keep.inner]
    out["mlp.c_proj.weight"] = tensors["mlp.c_proj.weight"][:, keep.inner]
    out["mlp.c_proj.bias"] = tensors["mlp.c_proj.bias"]
    return out


def taken_channels(tensors: Tensors, width: int) -> np.ndarray:
    """Which of the heads' `width` channels each input of attn.c_proj is."""
    return tensors.get("attn.kept", np.arange(width))


def whole_config(config: GPT2Config) -> GPT2Config:
    """The configuration at full width, which transformers loads."""
    return replace(config, layer_heads=None, layer_inner=None, layer_inputs=None)


def expand_block(tensors: Tensors, config: GPT2Config, layer: int) -> Tensors:
    """The block at full width (`whole_config`): zeros where something was cut, lists of inputs gone."""
    E, I, D = config.n_embd, config.n_inner, config.head_dim
    width, inner = config.heads(layer) * D, config.inner(layer)
    attn = tensors.get("ln_1.kept", np.arange(E))
    fc = tensors.get("ln_2.kept", np.arange(E))
    proj = taken_channels(tensors, width)
    rows = np.concatenate([part * E + np.arange(width) for part in range(3)])  # queries, keys, values

    def placed(name: str, shape: tuple[int, ...], *at: np.ndarray) -> np.ndarray:
        out = np.zeros(shape, tensors[name].dtype)
        out[np.ix_(*at)] = tensors[name]
        return out

    units, full = np.arange(inner), np.arange(E)
    return {
        "ln_1.weight": placed("ln_1.weight", (E,), attn),
        "ln_1.bias": placed("ln_1.bias", (E,), attn),
        "attn.c_attn.weight": placed("attn.c_attn.weight", (3 * E, E), rows, attn),
        "attn.c_attn.bias": placed("attn.c_attn.bias", (3 * E,), rows),
        "attn.c_proj.weight": placed("attn.c_proj.weight", (E, E), full, proj),
        "attn.c_proj.bias": tensors["attn.c_proj.bias"],
        "ln_2.weight": placed("ln_2.weight", (E,), fc),
        "ln_2.bias": placed("ln_2.bias", (E,), fc),
        "mlp.c_fc.weight": placed("mlp.c_fc.weight", (I, E), units, fc),
        "mlp.c_fc.bias": placed("mlp.c_fc.bias", (I,), units),
        "mlp.c_proj.weight": placed("mlp.c_proj.weight", (E, I), full, units),
        "mlp.c_proj.bias": tensors["mlp.c_proj.bias"],
    }


def expanded(config: GPT2Config, weights: Iterable[tuple[str, np.ndarray]]) -> Iterator[tuple[str, np.ndarray]]:
    """Every parameter of `whole_config(config)`, a block at a time."""
    for layer, tensors in blocks(weights):
        yield from named(layer, tensors if layer is None else expand_block(tensors, config, layer))


def narrowed(
    config: GPT2Config, kept: dict[str, np.ndarray], weights: Iterable[tuple[str, np.ndarray]]
) -> Iterator[tuple[str, np.ndarray]]:
    """The inverse of `expanded`: full-width parameters as the pruned `config` has them. kept: its lists of inputs, by
    their full names; what lies outside them is dropped."""
    whole = whole_config(config)
    for layer, tensors in blocks(weights):
        if layer is None:
            yield from named(None, tensors)
            continue
        E, D = config.n_embd, config.head_dim
        lists = {of: kept.get(f"transformer.h.{layer}.{of}.kept") for of in ("ln_1", "attn", "ln_2")}
        keep = Keep(
            np.arange(config.n_head) < config.heads(layer),
            np.arange(config.n_inner) < config.inner(layer),
            _mask(lists["ln_1"], E, E),
            _mask(lists["attn"], E, config.heads(layer) * D),
            _mask(lists["ln_2"], E, E),
        )
        yield from named(layer, cut_block(tensors, whole, layer, keep))


def _mask(kept: np.ndarray | None, size: int, width: int) -> np.ndarray:
    """Booleans [size]: those of the list, or the first `width`."""
    mask = np.zeros(size, bool)
    mask[kept if kept is not None else np.arange(width)] = True
    return mask
