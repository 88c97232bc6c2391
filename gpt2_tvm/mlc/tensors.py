"""Reading what mlc-llm wrote: a tensor cache as tvmjs packs it, one tensor at a time as numpy arrays.

`tensor_cache.py` reads our own caches for TVM to compute with. This one also decodes "f32-to-bf16", tvmjs's default
for float32, takes the index's older name, and copies: it serves a conversion.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from gpt2_tvm.errors import UserError

INDEXES = ("tensor-cache.json", "ndarray-cache.json")  # tvmjs's name of today, and until 2025
RAW, HALVED = "raw", "f32-to-bf16"
AGAIN = "convert the model again with mlc_llm, or copy the whole folder again"


def index_of(folder: Path) -> Path:
    """The cache's index; UserError where there is none."""
    for name in INDEXES:
        if (folder / name).is_file():
            return folder / name
    raise UserError(f"{folder} has no {INDEXES[0]}: it holds no weights; {AGAIN}")


def stored_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor by its name, from the index alone. UserError where it is damaged."""
    return {one["name"]: tuple(one["shape"]) for _, _, records in _shards(folder) for one in records}


def read_tensors(folder: Path) -> Iterator[tuple[str, np.ndarray]]:
    """(name, array) of every tensor, in the order of the shards, each of which is checked against its MD5.

    Raises UserError, with the file's name, for one that is missing or damaged and for a format or a dtype that nobody
    here knows.
    """
    for path, shard, records in _shards(folder):
        try:
            data = path.read_bytes()
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}; {AGAIN}") from None
        digest = shard.get("md5sum")
        if len(data) != shard["nbytes"] or (digest and hashlib.md5(data, usedforsecurity=False).hexdigest() != digest):
            raise UserError(f"{path} is damaged (its size or its MD5 is not what the index says); {AGAIN}")
        for record in records:
            yield record["name"], _decode(data, record)


def _shards(folder: Path) -> list[tuple[Path, dict[str, Any], list[dict[str, Any]]]]:
    """(file, its entry, its records) of each shard."""
    index = index_of(folder)
    try:
        shards = json.loads(index.read_text(encoding="utf-8"))["records"]
        return [
            (folder / Path(one["dataPath"]).name, one, [_checked(r, int(one["nbytes"])) for r in one["records"]])
            for one in shards
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        said = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{index} is damaged ({said}); {AGAIN}") from None


def _checked(record: dict[str, Any], shard_bytes: int) -> dict[str, Any]:
    name, start, nbytes = str(record["name"]), int(record["byteOffset"]), int(record["nbytes"])
    if record["format"] not in (RAW, HALVED):
        raise ValueError(f"{name} is stored as {record['format']!r} of {record['dtype']!r}")
    wanted = prod(record["shape"]) * _dtype(record).itemsize
    if nbytes != wanted or start < 0 or start + nbytes > shard_bytes:
        raise ValueError(f"{name} has {nbytes} bytes at {start} of {shard_bytes}, and needs {wanted}")
    return record


def _dtype(record: dict[str, Any]) -> np.dtype:
    """Of the bytes in the shard."""
    if _halved(record) or record["dtype"] == "bfloat16":
        return np.dtype(ml_dtypes.bfloat16)
    if record["dtype"] not in ("float32", "float16", "uint32", "int32"):
        raise ValueError(f"{record['name']} has dtype {record['dtype']!r}")
    return np.dtype(record["dtype"])


def _decode(data: bytes, record: dict[str, Any]) -> np.ndarray:
    part = data[record["byteOffset"] : record["byteOffset"] + record["nbytes"]]
    array = np.frombuffer(part, _dtype(record)).reshape(record["shape"])
    return array.astype(np.float32) if _halved(record) else array


def _halved(record: dict[str, Any]) -> bool:
    """Whether float32 lies there as bfloat16; tvmjs writes the format's name on tensors of other dtypes too."""
    return bool(record["format"] == HALVED and record["dtype"] == "float32")
