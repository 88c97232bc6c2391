"""Speculative streaming: streams inside a model that draft for it. What a folder of stream weights holds.

After Bhendawade et al. 2024, "Speculative Streaming: Fast LLM Inference without Auxiliary Models". Beside the row of
the last token t, G more rows run through the last layers: stream j starts from the same hidden state plus a learned
embedding, attends to the text up to t and to the streams up to j, and says what token t + 2 + j will be, where the
model's own row says what t + 1 is. The base weights stay as they are, and adapters of low rank (Hu et al. 2021, "LoRA")
act on the rows of streams alone, so that the text is the model's own.

A folder of streams: `streams.json` (the fields of `StreamConfig`) and `streams.safetensors`, whose tensors
`tensor_shapes` lists. It names the base model's weights by their sha256 and goes with no other model.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from gpt2_tvm.errors import UserError

if TYPE_CHECKING:
    from gpt2_tvm.checkpoint import ModelSource
    from gpt2_tvm.config import GPT2Config

FORMAT = 1
LINEARS = ("c_attn", "attn_proj", "c_fc", "mlp_proj")  # of a block, in the order of the module's attributes
MOST_STREAMS = 15
MOST_ROWS = 16  # of a tree: its masks are int32, and a CPU multiplies up to 16 rows with one pass over a weight


@dataclass(frozen=True)
class StreamConfig:
    """streams: G of them · layers: the last ones, through which they run · rank: of the adapters · base: sha256 of each
    file of the base model's weights."""

    streams: int
    layers: int
    rank: int
    base: tuple[str, ...]
    format: int = FORMAT


@dataclass(frozen=True)
class StreamPlan:
    """Streams in an artifact. rows: of a tree of candidates that one pass takes, the last token's included · kept: of
    these, how many go on from the layers below the streams', the likeliest by their early exit; equal to rows: all ·
    folder: where the weights are."""

    config: StreamConfig
    rows: int
    kept: int
    folder: Path

    def to_json(self) -> dict[str, object]:
        """For the manifest."""
        return {**asdict(self.config), "rows": self.rows, "kept": self.kept}


def tensor_shapes(config: StreamConfig, base: GPT2Config) -> dict[str, tuple[int, ...]]:
    """Name to shape of every tensor, in order: `streams.embedding` [G, E], and of each linear layer of the last blocks
    `streams.h.<i>.<layer>.down.weight` [rank, in] and `.up.weight` [out, rank], i counting from the first of them."""
    e, inner = base.n_embd, base.n_inner
    sizes = {"c_attn": (e, 3 * e), "attn_proj": (e, e), "c_fc": (e, inner), "mlp_proj": (inner, e)}
    shapes: dict[str, tuple[int, ...]] = {"streams.embedding": (config.streams, e)}
    for i in range(config.layers):
        for name in LINEARS:
            into, out = sizes[name]
            shapes[f"streams.h.{i}.{name}.down.weight"] = (config.rank, into)
            shapes[f"streams.h.{i}.{name}.up.weight"] = (out, config.rank)
    return shapes


def count_parameters(config: StreamConfig, base: GPT2Config) -> int:
    """How many numbers the streams add to the model."""
    return sum(prod(shape) for shape in tensor_shapes(config, base).values())


def base_digests(source: ModelSource) -> tuple[str, ...]:
    """sha256 of the files of a checkpoint's weights; of random weights, their seed."""
    from gpt2_tvm.checkpoint import weight_files
    from gpt2_tvm.files import sha256

    if source.folder is None:
        return (f"random {source.seed}",)
    return tuple(sha256(file) for file in weight_files(source.folder))


def check_shape(config: StreamConfig, base: GPT2Config) -> StreamConfig:
    """`config`, if a model of this shape can have such streams; UserError otherwise."""
    for name, value, most in (
        ("--streams", config.streams, MOST_STREAMS),
        ("--layers", config.layers, base.n_layer),
        ("--rank", config.rank, base.n_embd),
    ):
        if not 1 <= value <= most:
            raise UserError(f"{name} {value}: streams of this model take 1 to {most}")
    if base.pruned:
        raise UserError("streams go with whole models: this one has been pruned; train streams before, or do without")
    return config


def write_streams(
    folder: Path, config: StreamConfig, tensors: Mapping[str, np.ndarray], told: Mapping[str, object] | None = None
) -> None:
    """Write a folder of streams, float16. told: what training has to say, for people."""
    from safetensors.numpy import save

    from gpt2_tvm.files import replacing_file, write_atomically

    folder.mkdir(parents=True, exist_ok=True)
    with replacing_file(folder / "streams.safetensors") as file:
        file.write(save({name: np.ascontiguousarray(a, np.float16) for name, a in tensors.items()}))
    text = json.dumps({**asdict(config), **({"training": dict(told)} if told else {})}, indent=1)
    write_atomically(folder / "streams.json", text + "\n")


def read_plan(folder: Path, source: ModelSource, rows: str) -> StreamPlan:
    """What a folder of streams adds to `source`.

    Args:
        rows: as --stream-rows says it: "5", or "8,4" for a tree of 8 rows of which 4 go on past the early exit.

    Raises UserError for a folder that holds no streams, or those of another model.
    """
    path = folder / "streams.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        known = {field.name: values[field.name] for field in fields(StreamConfig)}
        config = StreamConfig(**{**known, "base": tuple(known["base"])})
    except FileNotFoundError:
        raise UserError(f"there is no {path}; make streams with python -m gpt2_tvm.train_streams") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} is damaged; make the streams again with python -m gpt2_tvm.train_streams") from None
    if config.format != FORMAT:
        raise UserError(
            f"{folder} has streams of format {config.format}, this program reads {FORMAT}; train them again"
        )
    check_shape(config, source.config)
    if config.base != base_digests(source):
        raise UserError(f"{folder} holds streams of another model than {source.name}; train them for this one")
    try:
        numbers = [int(part) for part in rows.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) not in (1, 2) or not 2 <= numbers[-1] <= numbers[0] <= MOST_ROWS:
        raise UserError(f"--stream-rows {rows}: give 2 to {MOST_ROWS} rows, such as 5, or 8,4 to keep 4 of 8")
    return StreamPlan(config, numbers[0], numbers[-1], folder)


def read_tensors(plan: StreamPlan, base: GPT2Config) -> Iterator[tuple[str, np.ndarray]]:
    """(name, float32 array) of every tensor, in order. UserError where the file does not fit."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    path = plan.folder / "streams.safetensors"
    try:
        held = load_file(path)
    except (OSError, SafetensorError):
        raise UserError(f"{path} is missing or damaged; train the streams again") from None
    for name, shape in tensor_shapes(plan.config, base).items():
        if name not in held or held[name].shape != shape or not np.isfinite(held[name]).all():
            raise UserError(f"{path} has no sound {name} of shape {list(shape)}; train the streams again")
        yield name, held[name].astype(np.float32)
