"""One cut: a checkpoint in, a smaller one out."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from gpt2_tvm.checkpoint import ModelSource
from gpt2_tvm.config import GPT2Config
from gpt2_tvm.errors import UserError
from gpt2_tvm.pruning import METHODS, SCOPES, magnitude
from gpt2_tvm.pruning.blocks import Keep, blocks, cut_block, cut_config, keep_all, named, taken_channels
from gpt2_tvm.pruning.scores import block_scores, choose
from gpt2_tvm.weights import KEPT, iter_weights, write_hf_checkpoint

FIELDS = tuple(field.name for field in fields(Keep))
MULTIPLE = 32  # counts are rounded up to it: whole vectors, and whole groups of 4-bit weights


def check_choice(methods: Sequence[str], share: float, scope: str, multiple: int = MULTIPLE) -> None:
    """UserError, in one line, for what cannot be meant."""
    unknown = [name for name in methods if name not in METHODS]
    if unknown or not methods:
        raise UserError(f"--method {','.join(unknown)!r}: choose of {', '.join(METHODS)}")
    if scope not in SCOPES:
        raise UserError(f"--scope {scope!r}: choose {' or '.join(SCOPES)}")
    if not 0 < share < 1:  # NaN too
        raise UserError(f"--share {share:g}: give a share between 0 and 1, such as 0.5 for half")
    if multiple < 1:
        raise UserError(f"--multiple {multiple}: give at least 1")


def make_keeps(
    source: ModelSource, methods: Sequence[str], share: float, scope: str, multiple: int, whole: GPT2Config
) -> list[Keep]:
    """What stays of each block by the structured ones among `methods`. whole: the model that the share is of."""
    config, layers = source.config, range(source.config.n_layer)
    scores: list[dict[str, np.ndarray]] = []
    taken: list[np.ndarray] = []  # which channel of the heads each input of attn.c_proj is
    for layer, tensors in blocks(iter_weights(source, "float32")):
        if layer is not None:
            scores.append(block_scores(tensors, config, layer))
            taken.append(taken_channels(tensors, config.heads(layer) * config.head_dim))

    def chosen(name: str, of: int, multiple: int, alive: Sequence[np.ndarray] | None = None) -> list[np.ndarray]:
        """Booleans a layer; those that are not `alive` go in any case."""
        alive = [np.ones(len(found[name]), bool) for found in scores] if alive is None else alive
        left = [found[name][mask] for found, mask in zip(scores, alive, strict=True)]
        for mask, stays in zip(alive, choose(left, [of] * len(left), share, scope, multiple), strict=True):
            mask[mask] = stays
        return list(alive)

    masks = {field: [getattr(keep_all(config, layer), field) for layer in layers] for field in FIELDS}
    if "heads" in methods:
        masks["heads"] = chosen("heads", whole.n_head, 1)
        masks["proj"] = [heads[t // config.head_dim] for heads, t in zip(masks["heads"], taken, strict=True)]
    if "inputs" in methods:
        masks["attn"], masks["fc"] = (chosen(name, whole.n_embd, multiple) for name in ("attn", "fc"))
        masks["proj"] = chosen("proj", whole.n_embd, multiple, masks["proj"])
        masks["inner"] = chosen("units", whole.n_inner, multiple)
    if "mlp" in methods:
        masks["inner"] = chosen("inner", whole.n_inner, multiple)
    return [Keep(**{field: masks[field][layer] for field in FIELDS}) for layer in layers]


def prune(
    source: ModelSource,
    output: Path,
    methods: Sequence[str],
    share: float,
    scope: str = "layer",
    multiple: int = MULTIPLE,
    dtype: str = "float32",
    whole: GPT2Config | None = None,
) -> dict[str, Any]:
    """Write the pruned checkpoint to `output`, with the tokenizer's files; returns what was cut.

    Args:
        methods: of `METHODS`; several are cut one after the other by the same share.
        share: of the weights, or of the dimensions of `whole`.
        scope: "layer" or "global" (`scores.choose`).
        multiple: what numbers of units and inputs are rounded up to; heads are not.
        dtype: what the checkpoint stores.
        whole: the model before the first cut, where `source` has been cut already; default `source`'s.

    Returns {"methods", "share", "scope", "parameters", "parameters_before", "zeros" (weights of the blocks' matrices),
    "matrix_weights", "heads", "inner", "inputs" (a list a layer)}. Raises UserError as `check_choice` and
    `iter_weights` do.
    """
    check_choice(methods, share, scope, multiple)
    if source.folder is not None and output.resolve() == source.folder.resolve():
        raise UserError(f"--output {output} is the model itself; choose another folder")
    structured = [name for name in methods if name != "magnitude"]
    config = source.config
    keeps: list[Keep] | None = None
    if structured:
        keeps = make_keeps(source, structured, share, scope, multiple, whole or source.config)
        config = cut_config(source.config, keeps)
    counted = {"zeros": 0, "matrix_weights": 0}

    def smaller() -> Iterator[tuple[str, np.ndarray]]:
        weights = iter_weights(source, "float32")
        if keeps is None:
            yield from weights
            return
        for layer, tensors in blocks(weights):
            held = tensors if layer is None else cut_block(tensors, source.config, layer, keeps[layer])
            yield from named(layer, held)

    def made() -> Iterator[tuple[str, np.ndarray]]:
        final = magnitude.zeroed(smaller, share, scope) if "magnitude" in methods else smaller()
        for name, array in final:
            if magnitude.is_matrix(name, array):
                counted["zeros"] += int(array.size - np.count_nonzero(array))
                counted["matrix_weights"] += array.size
            yield name, array

    write_hf_checkpoint(output, config, made(), dtype)
    copy_tokenizer(source, output)
    layers = range(config.n_layer)
    return {
        "methods": list(methods),
        "share": share,
        "scope": scope,
        "parameters": config.num_parameters(),
        "parameters_before": source.config.num_parameters(),
        **counted,
        "heads": [config.heads(layer) for layer in layers],
        "inner": [config.inner(layer) for layer in layers],
        "inputs": [list(config.inputs(layer)) for layer in layers],
    }


def copy_tokenizer(source: ModelSource, folder: Path) -> None:
    """Copy the tokenizer's files of a checkpoint, where it has any."""
    from gpt2_tvm.artifact_writer import TOKENIZER_FILES

    for name in TOKENIZER_FILES if source.folder is not None else ():
        if source.folder is not None and (source.folder / name).is_file():
            shutil.copyfile(source.folder / name, folder / name)


def kept_lists(source: ModelSource) -> dict[str, np.ndarray]:
    """A pruned checkpoint's lists of inputs, by name."""
    if source.config.layer_inputs is None:
        return {}
    return {name: array for name, array in iter_weights(source) if name.endswith(KEPT)}
