"""Weights, one tensor at a time: from a Hugging Face checkpoint (or a seed) to our parameters, and back to a
checkpoint.

Hugging Face stores GPT-2's linear layers as Conv1D, [in, out]; ours are [out, in], as `nn.Linear` and every
matrix-vector kernel want them. Nothing here holds more than one tensor and its converted copy.
"""

from __future__ import annotations

import json
import os
import re
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from gpt2_tvm.checkpoint import ModelSource, read_index, weight_files
from gpt2_tvm.config import GPT2Config
from gpt2_tvm.errors import UserError

PREFIX = "transformer."
HEAD, EMBEDDING = "lm_head.weight", "transformer.wte.weight"
DTYPES: dict[str, np.dtype] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}

_SAFETENSORS_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
KEPT = ".kept"  # ends the name of the list of inputs that a pruned layer takes: int32, ascending
_CONV1D = (".attn.c_attn.weight", ".attn.c_proj.weight", ".mlp.c_fc.weight", ".mlp.c_proj.weight")
# Causal masks that older transformers saved with the weights; they hold nothing learnt.
_BUFFER = re.compile(r"h\.\d+\.attn\.(masked_)?bias")
_NAMED_AT_MOST = 8  # faults in one message
_COMPARED_AT_ONCE = 4 << 20  # elements


def expected_tensors(config: GPT2Config) -> dict[str, tuple[int, ...]]:
    """Every parameter of the model: its name (ours) to its shape (ours), in the order of the model.

    With V, P, E and I for vocab_size, n_positions, n_embd and n_inner, the linear layers are `attn.c_attn`
    [3E, E], `attn.c_proj` [E, E], `mlp.c_fc` [I, E] and `mlp.c_proj` [E, I]. `lm_head.weight` [V, E] exists
    only when untied.

    A pruned layer has fewer of them: 3HD for H heads of D, its own I, and as many columns as it takes inputs. Which
    inputs these are, where it does not take all, is an int32 list in what produces them: `ln_1.kept` for c_attn,
    `attn.kept` for attn.c_proj, `ln_2.kept` for c_fc; ln_1 and ln_2 then hold the weights of these alone.
    """
    e = config.n_embd
    shapes: dict[str, tuple[int, ...]] = {
        EMBEDDING: (config.vocab_size, e),
        "transformer.wpe.weight": (config.n_positions, e),
    }

    def norm(name: str, kept: int = e) -> None:
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (kept,)
        if kept < e:
            shapes[f"{name}{KEPT}"] = (kept,)

    def linear(name: str, out: int, into: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (out, into), (out,)

    for i in range(config.n_layer):
        block = f"transformer.h.{i}"
        width, inner = config.heads(i) * config.head_dim, config.inner(i)
        attn, proj, fc = config.inputs(i)
        norm(f"{block}.ln_1", attn)
        linear(f"{block}.attn.c_attn", 3 * width, attn)
        linear(f"{block}.attn.c_proj", e, proj)
        if proj < width:
            shapes[f"{block}.attn{KEPT}"] = (proj,)
        norm(f"{block}.ln_2", fc)
        linear(f"{block}.mlp.c_fc", inner, fc)
        linear(f"{block}.mlp.c_proj", e, inner)
    norm("transformer.ln_f")
    if not config.tie_word_embeddings:
        shapes[HEAD] = (config.vocab_size, e)
    return shapes


def iter_weights(source: ModelSource, dtype: str | None = None) -> Iterator[tuple[str, np.ndarray]]:
    """Yield every parameter as (name, array), in the order of `expected_tensors` and of its shapes,
    C-contiguous.

    Args:
        source: a checkpoint folder (float32, float16 or bfloat16 safetensors, whole or sharded, names with or
            without `transformer.`), or random weights.
        dtype: "float32", "float16" or "bfloat16" to convert to; None keeps what is stored (random: float32).

    Random weights depend on the seed and the tensor's name alone, not on the order or on the other shapes.

    Raises UserError, before the first tensor, for files that are missing or damaged and for tensors that are
    missing, unexpected, misshapen or of another dtype, each by name; and, when its turn comes, for a tensor
    that holds NaN or infinity or does not fit into float16.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    if source.random:
        for name, shape in expected_tensors(source.config).items():
            yield name, convert(name, random_tensor(source.config, name, shape, source.seed), dtype)
        return
    if source.folder is None:
        raise ValueError(f"model source {source.name!r} has neither a folder nor random weights")
    stored = _match(source.folder, source.config)
    for name in expected_tensors(source.config):
        array = _read(stored[name])
        _check_finite(name, array, stored[name].file)
        if name.endswith(KEPT):
            _check_kept(name, array, source.config, stored[name].file)
        yield name, convert(name, array.T if name.endswith(_CONV1D) else array, dtype)


def random_tensor(config: GPT2Config, name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """One float32 parameter with GPT-2's initial spread: normal, deviation 0.02 (positions 0.01, projections
    into the residual stream 0.02 / sqrt(2 n_layer)).

    Biases and LayerNorms, which training starts at 0 and 1, get the same 0.02 around these: a test with
    random weights would not notice a bias or a scale that was dropped otherwise.
    """
    generator = np.random.Generator(np.random.PCG64([seed, zlib.crc32(name.encode())]))
    if name.endswith(KEPT):
        return np.sort(generator.permutation(_width(config, name))[: shape[0]]).astype(np.int32)
    array = generator.standard_normal(shape, dtype=np.float32)
    if name.endswith(".c_proj.weight"):
        array *= np.float32(0.02 / (2 * config.n_layer) ** 0.5)
    else:
        array *= np.float32(0.01 if name.endswith("wpe.weight") else 0.02)
    if re.search(r"\.ln_\w+\.weight$", name):
        array += np.float32(1)
    return array


@dataclass(frozen=True)
class _Stored:
    """Where one tensor lies, as its file's header says."""

    file: Path
    key: str
    shape: tuple[int, ...]
    dtype: str  # safetensors' name


def _match(folder: Path, config: GPT2Config) -> dict[str, _Stored]:
    """Our names to what the checkpoint holds for them; all that does not fit is named in one error."""
    stored, faults = _scan(folder)
    expected = expected_tensors(config)
    if config.tie_word_embeddings and HEAD in stored:
        head = stored.pop(HEAD)
        if EMBEDDING not in stored:  # tied either way round
            stored[EMBEDDING] = head
        elif not _equal(stored[EMBEDDING], head):
            # transformers 5 then runs with two different matrices, whatever the config says; older ones drop
            # one.
            raise UserError(
                f"{folder}: config.json ties lm_head.weight to wte.weight, but the checkpoint holds two"
                " different ones;"
                ' set "tie_word_embeddings": false in config.json if both are meant'
            )
    for name, shape in expected.items():
        if name not in stored:
            faults.append(f"missing {name}")
            continue
        found = stored[name]
        want = shape[::-1] if name.endswith(_CONV1D) else shape
        if found.shape != want:
            faults.append(f"{found.key} has shape {list(found.shape)} instead of {list(want)}")
        dtypes = ("I32",) if name.endswith(KEPT) else tuple(_SAFETENSORS_DTYPES)
        if found.dtype not in dtypes:
            faults.append(f"{found.key} is {found.dtype}, not one of {', '.join(dtypes)}")
    faults += [f"unexpected {found.key}" for name, found in stored.items() if name not in expected]
    if faults:
        more = f" and {len(faults) - _NAMED_AT_MOST} more" if len(faults) > _NAMED_AT_MOST else ""
        raise UserError(
            f"the weights in {folder} do not fit its config.json: {'; '.join(faults[:_NAMED_AT_MOST])}{more}"
            " (is the checkpoint complete, and a GPT2LMHeadModel?)"
        )
    return stored


def _scan(folder: Path) -> tuple[dict[str, _Stored], list[str]]:
    """What all headers hold, under our names and without buffers; and the faults of the files themselves."""
    stored: dict[str, _Stored] = {}
    faults: list[str] = []
    files = weight_files(folder)
    for file in files:
        with _open(file) as checkpoint:
            for key in checkpoint.keys():  # noqa: SIM118 - safe_open is not a dict
                bare = key.removeprefix(PREFIX)
                if _BUFFER.fullmatch(bare):
                    continue
                name = HEAD if bare == HEAD else PREFIX + bare
                part = checkpoint.get_slice(key)
                if name in stored:
                    faults.append(f"{key} occurs twice")
                stored[name] = _Stored(file, key, tuple(part.get_shape()), part.get_dtype())
    if files[0].name != "model.safetensors":
        held = {(found.key, found.file.name) for found in stored.values()}
        for key, file_name in read_index(folder / "model.safetensors.index.json").items():
            if (key, file_name) not in held and not _BUFFER.fullmatch(key.removeprefix(PREFIX)):
                faults.append(f"{key} is not in {file_name}, where the index puts it")
    return stored, faults


@contextmanager
def _open(file: Path) -> Iterator[Any]:
    """`safetensors.safe_open`, whose errors become a user's."""
    from safetensors import SafetensorError, safe_open

    try:
        handle = safe_open(str(file), framework="np")
    except FileNotFoundError:
        raise UserError(f"{file} is missing; fetch the checkpoint again") from None
    except SafetensorError as error:
        reason = (str(error).splitlines() or ["no reason given"])[0]
        raise UserError(f"{file} is truncated or damaged ({reason}); fetch it again") from None
    with handle as checkpoint:
        yield checkpoint


def _read(stored: _Stored) -> np.ndarray:
    # Opened anew for each tensor: closing unmaps the file, so that pages already read do not add up in this
    # process.
    with _open(stored.file) as checkpoint:
        return checkpoint.get_tensor(stored.key)


def _equal(a: _Stored, b: _Stored) -> bool:
    """Whether two stored matrices hold the same, read a few rows at a time."""
    if a.shape != b.shape or a.dtype != b.dtype or len(a.shape) != 2:
        return False
    end, rows = a.shape[0], max(1, _COMPARED_AT_ONCE // max(1, a.shape[1]))
    with _open(a.file) as file_a, _open(b.file) as file_b:
        slice_a, slice_b = file_a.get_slice(a.key), file_b.get_slice(b.key)
        return all(
            np.array_equal(slice_a[i : min(i + rows, end)], slice_b[i : min(i + rows, end)])
            for i in range(0, end, rows)
        )


def _bounds(array: np.ndarray) -> tuple[float, float]:
    """Smallest and largest value, NaN if there is one; without np.isfinite's array of booleans."""
    with np.errstate(invalid="ignore"):
        return float(array.min()), float(array.max())


def _check_finite(name: str, array: np.ndarray, file: Path) -> None:
    if not np.isfinite(_bounds(array)).all():
        raise UserError(f"{name} in {file} holds NaN or infinity; the checkpoint is damaged or its training diverged")


def _width(config: GPT2Config, kept: str) -> int:
    """How many inputs the list of that name chooses from."""
    layer, of = re.fullmatch(r"transformer\.h\.(\d+)\.(\w+)\.kept", kept).groups()  # type: ignore[union-attr]
    return config.widths(int(layer))[1] if of == "attn" else config.n_embd


def _check_kept(name: str, array: np.ndarray, config: GPT2Config, file: Path) -> None:
    if array[0] < 0 or array[-1] >= _width(config, name) or (np.diff(array) <= 0).any():
        raise UserError(f"{name} in {file} does not list inputs in ascending order; the checkpoint is damaged")


def convert(name: str, array: np.ndarray, dtype: str | None) -> np.ndarray:
    """`array` as `dtype` ("float32", "float16", "bfloat16"; None: as it is), C-contiguous, a copy only where needed.

    A list of inputs stays int32. Raises UserError, with the tensor's name, for values that the dtype cannot hold.
    """
    if name.endswith(KEPT):
        return np.ascontiguousarray(array, np.int32)
    target = array.dtype if dtype is None else DTYPES[dtype]
    if dtype is not None and target != array.dtype:
        check_range(name, array, dtype)
    return np.ascontiguousarray(array.astype(target, order="C", copy=False))


def check_range(name: str, array: np.ndarray, dtype: str) -> None:
    """UserError, with the tensor's name, where `array` holds values beyond those of `dtype`."""
    most = float(ml_dtypes.finfo(DTYPES[dtype]).max)
    low, high = _bounds(array)
    if max(-low, high) > most:
        raise UserError(
            f"{name} holds {max(-low, high):g}, more than {dtype}'s {most:g};"
            " choose a scheme with float32 weights (--quantization q0f32)"
        )


def write_hf_checkpoint(
    folder: str | Path,
    config: GPT2Config,
    weights: ModelSource | Iterable[tuple[str, np.ndarray]],
    dtype: str = "float32",
) -> Path:
    """Write `config.json` and `model.safetensors` (Conv1D layout) that transformers loads as a
    GPT2LMHeadModel.

    Args:
        folder: made if need be; a checkpoint in it is replaced once the new one is complete.
        config: the shape; `weights` must fit it.
        weights: a source, or every parameter once, in our names and shapes and in any order. Each is written
            as it comes, so a generator keeps the peak at one tensor.
        dtype: what is stored, "float32", "float16" or "bfloat16".

    Returns the folder. Raises ValueError for weights that do not fit; UserError as `iter_weights` does.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    header, offsets = _header(config, dtype)
    expected = expected_tensors(config)
    missing = set(expected)
    part = folder / "model.safetensors.part"
    try:
        with part.open("wb") as file:
            file.write(header)
            for name, array in iter_weights(weights, dtype) if isinstance(weights, ModelSource) else weights:
                if name not in missing or array.shape != expected[name]:
                    raise ValueError(f"{name} of shape {array.shape} does not fit the configuration, or came twice")
                missing.remove(name)
                file.seek(len(header) + offsets[name])
                stored = convert(name, array.T if name.endswith(_CONV1D) else array, dtype)
                file.write(stored.reshape(-1).view(np.uint8).data)
            file.flush()
            os.fsync(file.fileno())
        if missing:
            raise ValueError(f"weights are missing: {', '.join(sorted(missing))}")
        values = {**json.loads(config.to_json()), "dtype": dtype}
        (folder / "config.json").write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        part.replace(folder / "model.safetensors")
    finally:
        part.unlink(missing_ok=True)
    return folder


def _header(config: GPT2Config, dtype: str) -> tuple[bytes, dict[str, int]]:
    """The head of a safetensors file, and where after it each tensor starts. Shapes alone decide both, so
    that the tensors can follow one by one (the library's own writer wants all of them at once)."""
    code = {name: code for code, name in _SAFETENSORS_DTYPES.items()}[dtype]
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}  # transformers asks for this key
    offsets: dict[str, int] = {}
    end = 0
    for name, shape in expected_tensors(config).items():
        kept = name.endswith(KEPT)
        offsets[name], end = end, end + prod(shape) * (4 if kept else DTYPES[dtype].itemsize)
        stored_shape = shape[::-1] if name.endswith(_CONV1D) else shape
        entries[name] = {"dtype": "I32" if kept else code, "shape": stored_shape, "data_offsets": [offsets[name], end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data starts at a multiple of 8
    return len(text).to_bytes(8, "little") + text, offsets
