"""TVM's tensor cache: named tensors in `params_shard_<k>.bin` files, described by `tensor-cache.json`.

The format is that of `tvm.contrib.tvmjs`, so `tvmjs.load_tensor_cache`, `vm.builtin.tensor_cache.load` and
the web runtime's `fetchTensorCache` read what is written here. Ours differ from tvmjs's own in two ways, both
within the format: every record is "raw" (tvmjs turns float32 into bfloat16 unless told otherwise), and every
tensor starts at a multiple of 64 bytes, so that on the CPU a mapped file *is* the parameters: nothing is
copied, processes that load one artifact share its pages, and the system may drop them and read them again.

The reader needs numpy and TVM's runtime alone: it is what a packed artifact runs with.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from gpt2_tvm.errors import UserError

if TYPE_CHECKING:
    import tvm

INDEX = "tensor-cache.json"
ALIGNMENT = 64  # TVM's kernels assume it of every tensor (tvm.runtime.from_dlpack demands it)
SHARD_BYTES = 32 << 20  # a browser fetches, and caches, a shard at a time

_ITEM_BYTES = {
    **dict.fromkeys(("int8", "uint8", "bool", "float8_e4m3fn", "float8_e5m2"), 1),
    **dict.fromkeys(("int16", "uint16", "float16", "bfloat16"), 2),
    **dict.fromkeys(("int32", "uint32", "float32"), 4),
    **dict.fromkeys(("int64", "uint64", "float64"), 8),
}


class TensorCacheWriter:
    """Writes a tensor cache, one tensor at a time and in the order given; a context manager.

    Args:
        folder: made if need be. Nothing in it reads as a tensor cache until the `with` block has ended
        without an
            error: `tensor-cache.json` is written last.
        shard_bytes: a shard is closed before it would grow past this; a larger tensor gets a shard alone.
        metadata: JSON for the index, beside the "ParamSize" (tensors) and "ParamBytes" that mlc-llm puts
        there too.

    Attributes:
        files: after the block, file name to (bytes, sha256 in hex), of the shards and of the index.

    Every file is synced to the disk. OSError (a full disk, no permission) passes through.
    """

    def __init__(
        self, folder: str | Path, shard_bytes: int = SHARD_BYTES, metadata: dict[str, Any] | None = None
    ) -> None:
        if shard_bytes < 1:
            raise ValueError(f"shard_bytes is {shard_bytes}; it must be at least 1")
        self.folder = Path(folder)
        self.files: dict[str, tuple[int, str]] = {}
        self._shard_bytes = shard_bytes
        self._metadata = metadata or {}
        self._shards: list[dict[str, Any]] = []
        self._names: set[str] = set()
        self._shard: _Shard | None = None

    def __enter__(self) -> TensorCacheWriter:
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / INDEX).unlink(missing_ok=True)  # an older index would describe shards that we overwrite
        return self

    def add(self, name: str, array: np.ndarray) -> None:
        """Append one tensor of any shape without a zero; bfloat16 and float8 are those of ml_dtypes."""
        dtype = array.dtype.name
        if dtype not in _ITEM_BYTES:
            raise ValueError(f"{name}: a tensor cache cannot hold dtype {dtype}")
        if name in self._names:
            raise ValueError(f"{name} is in the tensor cache already")
        if array.size == 0:
            raise ValueError(f"{name} is empty (shape {array.shape})")
        self._names.add(name)

        if self._shard and self._shard.end_of(array.nbytes) > self._shard_bytes:
            self._finish_shard()
        if not self._shard:
            self._shard = _Shard(self.folder / f"params_shard_{len(self._shards)}.bin")
        offset = self._shard.write(array)
        record = {"name": name, "shape": list(array.shape), "dtype": dtype, "format": "raw"}
        self._shard.records.append({**record, "nbytes": array.nbytes, "byteOffset": offset})

    def __exit__(self, error_type: type[BaseException] | None, *_: object) -> None:
        if error_type is not None:
            if self._shard:
                self._shard.file.close()
            return
        self._finish_shard()
        total = sum(record["nbytes"] for shard in self._shards for record in shard["records"])
        metadata = {"ParamSize": len(self._names), "ParamBytes": total, **self._metadata}
        index = json.dumps({"metadata": metadata, "records": self._shards}, indent=1).encode()
        with (self.folder / INDEX).open("wb") as file:
            file.write(index)
            _sync(file)
        self.files[INDEX] = (len(index), hashlib.sha256(index).hexdigest())

    def _finish_shard(self) -> None:
        if not self._shard:
            return
        shard, self._shard = self._shard, None
        _sync(shard.file)
        shard.file.close()
        name = shard.path.name
        self.files[name] = (shard.size, shard.sha256.hexdigest())
        self._shards.append(
            {
                "dataPath": name,
                "format": "raw-shard",
                "nbytes": shard.size,
                "records": shard.records,
                "md5sum": shard.md5.hexdigest(),
            }
        )


class _Shard:
    """One open file, hashed as it grows."""

    def __init__(self, path: Path) -> None:
        self.path, self.size = path, 0
        self.records: list[dict[str, Any]] = []
        self.sha256 = hashlib.sha256()
        self.md5 = hashlib.md5(usedforsecurity=False)  # the format's own field
        path.unlink(missing_ok=True)  # another process may have mapped the old file: leave it what it maps
        self.file: BinaryIO = path.open("xb")

    def end_of(self, nbytes: int) -> int:
        """How long the shard would be with `nbytes` more."""
        return self.size + -self.size % ALIGNMENT + nbytes

    def write(self, array: np.ndarray) -> int:
        """Append the padding and `array`; returns where it starts."""
        self._append(bytes(-self.size % ALIGNMENT))
        offset = self.size
        self._append(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        return offset

    def _append(self, data: bytes | memoryview) -> None:
        self.file.write(data)
        self.sha256.update(data)
        self.md5.update(data)
        self.size += len(data)


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def load_tensors(folder: str | Path, device: tvm.runtime.Device | None = None) -> dict[str, tvm.runtime.Tensor]:
    """Load a tensor cache that this module wrote, or tvmjs with `encode_format="raw"`.

    Args:
        folder: holds `tensor-cache.json` and the shards that it names.
        device: None or the CPU: the tensors are the mapped files themselves (see the module's text). A write
            to one changes this process's memory and never the file. Any other device: copied there, one
            tensor at a time.

    A tensor keeps its mapping alive, so the tensors may outlive this call, the dictionary and the file's
    name. They do not survive the file being cut short in place, which `TensorCacheWriter` never does.

    Raises UserError, naming the file, for a file that is missing, truncated or longer than it should be, and
    an index that is damaged or asks for what is not supported. Contents are not hashed here: `artifact.py`
    does.
    """
    import tvm

    if device is not None and device.dlpack_device_type() == tvm.runtime.cpu().dlpack_device_type():
        device = None
    tensors: dict[str, tvm.runtime.Tensor] = {}
    for mapped, records in _mapped_shards(Path(folder)):
        for record in records:
            tensor = _view(mapped, record)
            tensors[record["name"]] = tensor if device is None else tensor.copyto(device)
        if device is not None:
            device.sync()  # a copy may still be reading from the mapping, which goes with `mapped`
    return tensors


def _view(mapped: np.ndarray, record: dict[str, Any]) -> tvm.runtime.Tensor:
    """One tensor inside a mapped shard; it holds a reference to the mapping."""
    import tvm

    start, nbytes = record["byteOffset"], record["nbytes"]
    data = mapped[start : start + nbytes]
    if start % ALIGNMENT:  # tvmjs packs tensors without gaps; then there is no way round a copy
        raw = tvm.runtime.empty((nbytes,), "uint8").copyfrom(data)
    else:
        raw = tvm.runtime.from_dlpack(data)
    # Through bytes, because DLPack from numpy knows neither bfloat16 nor float8.
    return raw._create_view(tuple(record["shape"]), record["dtype"])


def load_arrays(folder: str | Path) -> dict[str, np.ndarray]:
    """`load_tensors` on the host as numpy's arrays, without importing TVM (seconds of a program's start). Read-only.

    Raises UserError as `load_tensors` does.
    """
    import ml_dtypes

    arrays: dict[str, np.ndarray] = {}
    for mapped, records in _mapped_shards(Path(folder)):
        for record in records:
            name = record["dtype"]  # of those that numpy lacks, bfloat16 and float8 are among ml_dtypes'
            dtype = np.dtype(getattr(ml_dtypes, name, name))
            data = mapped[record["byteOffset"] : record["byteOffset"] + record["nbytes"]]
            array = data.view(dtype).reshape(record["shape"])
            array.flags.writeable = False
            arrays[record["name"]] = array
    return arrays


def _mapped_shards(folder: Path) -> Iterator[tuple[np.ndarray, list[dict[str, Any]]]]:
    """Each shard as bytes, with the records of the tensors in it."""
    for shard in _read_index(folder / INDEX):
        yield _map(folder / shard["dataPath"], shard["nbytes"]), shard["records"]


def _map(path: Path, nbytes: int) -> np.ndarray:
    """The shard as bytes: pages of the file, writable (from_dlpack insists) but private to this process."""
    try:
        found = path.stat().st_size
        if found != nbytes:
            raise _damaged(path, f"it has {found} bytes instead of {nbytes}")
        return np.memmap(path, dtype=np.uint8, mode="c")
    except FileNotFoundError:
        raise _damaged(path, "it is missing") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None


def _read_index(path: Path) -> list[dict[str, Any]]:
    """The shard records, with every field that is used here checked for its type, and no name twice."""
    names: set[str] = set()
    try:
        shards = json.loads(path.read_text(encoding="utf-8"))["records"]
        for shard in shards:
            if shard["format"] != "raw-shard" or not _is_size(shard["nbytes"]):
                raise ValueError(f"a shard of format {shard['format']!r} and size {shard['nbytes']!r}")
            if Path(shard["dataPath"]).name != shard["dataPath"]:
                raise ValueError(f"{shard['dataPath']!r} is not a file beside it")
            for record in shard["records"]:
                _check_record(record, shard["nbytes"])
                if record["name"] in names:
                    raise ValueError(f"{record['name']} occurs twice")
                names.add(record["name"])
    except FileNotFoundError:
        raise _damaged(path, "it is missing") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except KeyError as error:
        raise _damaged(path, f"a record has no {error}") from None
    except (ValueError, TypeError, RecursionError) as error:
        raise _damaged(path, (str(error).splitlines() or ["not JSON"])[0]) from None
    return shards


def _check_record(record: dict[str, Any], shard_bytes: int) -> None:
    name, shape, dtype = record["name"], record["shape"], record["dtype"]
    if not isinstance(name, str) or not isinstance(shape, list) or not all(_is_size(n) for n in shape):
        raise ValueError(f"tensor {name!r} has shape {shape!r}")
    if dtype not in _ITEM_BYTES:
        raise ValueError(f"{name} has dtype {dtype!r}, which is not supported")
    if record["format"] != "raw":
        raise ValueError(f"{name} is stored as {record['format']!r}; only 'raw' is supported")
    start, nbytes = record["byteOffset"], record["nbytes"]
    if nbytes != prod(shape) * _ITEM_BYTES[dtype]:
        raise ValueError(f"{name} has {nbytes!r} bytes, which is not {dtype} of shape {shape}")
    if not (start == 0 or _is_size(start)) or start + nbytes > shard_bytes:
        raise ValueError(f"{name} at byte {start!r} reaches past the end of its shard")


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _damaged(path: Path, reason: str) -> UserError:
    return UserError(f"{path} is damaged: {reason}; compile the model again, or copy the whole folder again")
