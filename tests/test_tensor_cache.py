"""The tensor cache: TVM's own readers read ours, loading copies nothing, and a damaged one is named."""

from __future__ import annotations

import gc
import hashlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import tvm

from gpt2_tvm.errors import UserError
from gpt2_tvm.tensor_cache import TensorCacheWriter, load_arrays, load_tensors

DTYPES = [
    "int8",
    "uint8",
    "int32",
    "uint32",
    "int64",
    "bool",
    "float16",
    "float32",
    "bfloat16",
    "float8_e4m3fn",
]
Tensors = dict[str, np.ndarray]


def some_tensors() -> Tensors:
    """Odd sizes, so that what follows needs padding; every dtype; a scalar's shape; a transposed view."""
    random = np.random.default_rng(0)
    tensors = {
        f"t.{dtype}": (random.standard_normal((3, 7)) * 40).astype(np.dtype(getattr(ml_dtypes, dtype, dtype)))
        for dtype in DTYPES
    }
    tensors["scalar"] = np.array(3.5, np.float32)
    tensors["view"] = random.standard_normal((5, 9)).astype(np.float32).T
    return tensors


def write(folder: Path, tensors: Tensors, **options: Any) -> TensorCacheWriter:
    with TensorCacheWriter(folder, **options) as writer:
        for name, array in tensors.items():
            writer.add(name, array)
    return writer


def bits(array: np.ndarray) -> bytes:
    return np.ascontiguousarray(array).tobytes()


def assert_same(loaded: dict[str, tvm.runtime.Tensor], tensors: Tensors) -> None:
    assert list(loaded) == list(tensors)
    for name, tensor in loaded.items():
        assert (tensor.dtype, tuple(tensor.shape)) == (tensors[name].dtype.name, tensors[name].shape), name
        assert bits(tensor.numpy()) == bits(tensors[name]), name


def index_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "tensor-cache.json").read_text())


@pytest.mark.parametrize("shard_bytes", [1, 200, 32 << 20])
def test_round_trip(tmp_path: Path, shard_bytes: int) -> None:
    write(tmp_path, some_tensors(), shard_bytes=shard_bytes)
    assert_same(load_tensors(tmp_path), some_tensors())


@pytest.mark.parametrize("shard_bytes", [1, 32 << 20])
def test_arrays_are_the_same_and_read_only(tmp_path: Path, shard_bytes: int) -> None:
    tensors = some_tensors()
    write(tmp_path, tensors, shard_bytes=shard_bytes)
    arrays = load_arrays(tmp_path)
    assert list(arrays) == list(tensors)
    for name, array in arrays.items():
        assert (array.dtype, array.shape) == (tensors[name].dtype, tensors[name].shape), name
        assert bits(array) == bits(tensors[name]) and not array.flags.writeable, name


def test_tvms_python_reader_reads_ours(tmp_path: Path) -> None:
    from tvm.contrib import tvmjs

    write(tmp_path, some_tensors(), shard_bytes=200, metadata={"model": "toy"})
    loaded, metadata = tvmjs.load_tensor_cache(str(tmp_path), tvm.cpu())
    assert_same(loaded, some_tensors())
    assert metadata == {
        "ParamSize": len(some_tensors()),
        "ParamBytes": sum(a.nbytes for a in some_tensors().values()),
        "model": "toy",
    }


def test_tvms_runtime_reads_ours(tmp_path: Path) -> None:
    write(tmp_path, some_tensors(), shard_bytes=200)
    tvm.get_global_func("vm.builtin.tensor_cache.load")(str(tmp_path), 1, 0)
    try:
        get = tvm.get_global_func("vm.builtin.tensor_cache.get")
        assert_same({name: get(name) for name in some_tensors()}, some_tensors())
    finally:
        tvm.get_global_func("vm.builtin.tensor_cache.clear")()


def test_we_read_what_tvmjs_writes(tmp_path: Path) -> None:
    """Packed without gaps, so most of it is copied and still right."""
    from tvm.contrib import tvmjs

    tensors = {name: a for name, a in some_tensors().items() if "float8" not in name}
    tvmjs.dump_tensor_cache(tensors, str(tmp_path), encode_format="raw", show_progress=False)
    assert any(r["byteOffset"] % 64 for r in index_of(tmp_path)["records"][0]["records"])
    assert_same(load_tensors(tmp_path), tensors)


def test_shards_are_packed_aligned_and_hashed(tmp_path: Path) -> None:
    tensors = {f"small.{i}": np.full(10, i, np.float32) for i in range(7)}  # 40 bytes, 64 with the gap
    tensors["large"] = np.arange(100, dtype=np.float32)
    tensors["after"] = np.ones(3, np.float32)
    writer = write(tmp_path, tensors, shard_bytes=170)  # room for three small ones: 2 * 64 + 40
    records = index_of(tmp_path)["records"]
    held = [[r["name"] for r in shard["records"]] for shard in records]
    small = [f"small.{i}" for i in range(7)]
    assert held == [small[:3], small[3:6], small[6:], ["large"], ["after"]]
    assert all(r["byteOffset"] % 64 == 0 for shard in records for r in shard["records"])

    assert sorted(writer.files) == sorted(p.name for p in tmp_path.iterdir())
    for name, (nbytes, sha256) in writer.files.items():
        content = (tmp_path / name).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (nbytes, sha256)
    for shard in records:
        content = (tmp_path / shard["dataPath"]).read_bytes()
        assert (shard["nbytes"], shard["md5sum"]) == (len(content), hashlib.md5(content).hexdigest())


def test_a_device_that_is_not_the_cpu_gets_copies(tmp_path: Path) -> None:
    """RPC's local session stands in for an accelerator: its memory is not this process's to map."""
    from tvm import rpc

    device = rpc.LocalSession().cpu()
    tensors = {name: a for name, a in some_tensors().items() if a.dtype.name not in ("bool", "float8_e4m3fn")}
    write(tmp_path, tensors, shard_bytes=200)
    loaded = load_tensors(tmp_path, device)
    assert all(tensor.device == device for tensor in loaded.values())
    shutil.rmtree(tmp_path)
    gc.collect()
    assert {name: bits(t.numpy()) for name, t in loaded.items()} == {n: bits(a) for n, a in tensors.items()}


def _anonymous_bytes() -> int:
    """Memory of this process that no file stands behind."""
    line = next(l for l in Path("/proc/self/status").read_text().splitlines() if l.startswith("RssAnon"))
    return int(line.split()[1]) << 10


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_loading_on_the_cpu_copies_nothing(tmp_path: Path) -> None:
    tensors = {f"t{i}": np.full((1 << 20, 4), i + 1, np.float32) for i in range(4)}  # 4 x 16 MB
    write(tmp_path, tensors)
    del tensors
    gc.collect()
    before = _anonymous_bytes()
    loaded = load_tensors(tmp_path)
    assert [int(np.from_dlpack(t).sum()) for t in loaded.values()] == [i << 22 for i in (1, 2, 3, 4)]
    assert _anonymous_bytes() - before < 4 << 20
    # Each points into its shard: an address that the kernel maps to that file.
    maps = Path("/proc/self/maps").read_text().splitlines()
    for tensor in loaded.values():
        address = tensor.data_ptr()
        owner = [l for l in maps if int(l.split("-")[0], 16) <= address < int(l.split("-")[1].split()[0], 16)]
        assert len(owner) == 1 and str(tmp_path) in owner[0]


def test_tensors_outlive_the_dictionary_and_the_files(tmp_path: Path) -> None:
    write(tmp_path, some_tensors())
    tensors = load_tensors(tmp_path)
    kept = {name: tensors[name] for name in ("t.bfloat16", "t.float32", "view")}
    del tensors
    shutil.rmtree(tmp_path)
    gc.collect()
    junk = [np.ones(1 << 16) for _ in range(200)]  # reuses whatever was given back
    assert_same(kept, {name: some_tensors()[name] for name in kept})
    del junk


def test_writing_again_leaves_what_is_mapped(tmp_path: Path) -> None:
    write(tmp_path, {"a": np.full(50_000, 1, np.float32)})
    old = load_tensors(tmp_path)["a"]
    write(tmp_path, {"a": np.full(10, 2, np.float32)})
    assert (old.numpy() == 1).all()
    assert (load_tensors(tmp_path)["a"].numpy() == 2).all()


def test_a_write_to_a_tensor_does_not_reach_the_file(tmp_path: Path) -> None:
    write(tmp_path, {"a": np.zeros(100, np.float32)})
    load_tensors(tmp_path)["a"].copyfrom(np.ones(100, np.float32))
    assert (load_tensors(tmp_path)["a"].numpy() == 0).all()


def test_an_interrupted_write_does_not_read_as_a_cache(tmp_path: Path) -> None:
    write(tmp_path, {"a": np.zeros(100, np.float32)})
    with pytest.raises(KeyboardInterrupt), TensorCacheWriter(tmp_path) as writer:
        writer.add("a", np.ones(100, np.float32))
        raise KeyboardInterrupt
    with pytest.raises(UserError, match=r"tensor-cache\.json is damaged: it is missing"):
        load_tensors(tmp_path)


def test_what_the_format_cannot_hold(tmp_path: Path) -> None:
    with TensorCacheWriter(tmp_path) as writer:
        writer.add("a", np.zeros(3, np.int8))
        with pytest.raises(ValueError, match="already"):
            writer.add("a", np.zeros(3, np.int8))
        with pytest.raises(ValueError, match="complex64"):
            writer.add("b", np.zeros(3, np.complex64))
        with pytest.raises(ValueError, match="empty"):
            writer.add("c", np.zeros((3, 0), np.int8))
    assert list(load_tensors(tmp_path)) == ["a"]


def _edit(folder: Path, *path: str | int, value: Any) -> None:
    index = index_of(folder)
    place: Any = index
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    (folder / "tensor-cache.json").write_text(json.dumps(index))


SHARD, RECORD = ("records", 0), ("records", 0, "records", 1)


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ((*SHARD, "format"), "zip", "'zip'"),
        ((*SHARD, "nbytes"), 64, "past the end of its shard"),
        ((*SHARD, "nbytes"), "64", "'64'"),
        ((*SHARD, "dataPath"), "../a.bin", "not a file beside it"),
        ((*SHARD, "records"), None, "NoneType"),
        ((*RECORD, "dtype"), "float4", "'float4', which is not supported"),
        ((*RECORD, "dtype"), "float16", "which is not float16"),
        ((*RECORD, "format"), "f32-to-bf16", "only 'raw'"),
        ((*RECORD, "byteOffset"), -64, "past the end"),
        ((*RECORD, "byteOffset"), 1 << 40, "past the end"),
        ((*RECORD, "nbytes"), 4, "4 bytes"),
        ((*RECORD, "shape"), [-1, -10], "shape"),
        ((*RECORD, "shape"), "10", "shape"),
        ((*RECORD, "name"), "a", "occurs twice"),
        (RECORD, {"name": "b"}, "a record has no"),
        (("records",), {"a": 1}, "tensor-cache.json is damaged"),
    ],
)
def test_a_damaged_index_is_named(tmp_path: Path, path: tuple[str | int, ...], value: Any, said: str) -> None:
    write(tmp_path, {"a": np.zeros(10, np.float32), "b": np.ones(10, np.float32)})
    _edit(tmp_path, *path, value=value)
    with pytest.raises(UserError) as caught:
        load_tensors(tmp_path)
    message = str(caught.value)
    assert str(tmp_path / "tensor-cache.json") in message and said in message and "\n" not in message


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"3", b"{}", b"\xff"])
def test_an_index_that_is_not_json_is_named(tmp_path: Path, content: bytes) -> None:
    write(tmp_path, {"a": np.zeros(10, np.float32)})
    (tmp_path / "tensor-cache.json").write_bytes(content)
    with pytest.raises(UserError, match=r"tensor-cache\.json is damaged"):
        load_tensors(tmp_path)


def test_a_shard_that_is_cut_grown_or_gone_is_named(tmp_path: Path) -> None:
    write(tmp_path, {f"t{i}": np.zeros(10, np.float32) for i in range(3)}, shard_bytes=64)
    shard = tmp_path / "params_shard_1.bin"
    content = shard.read_bytes()
    for changed in (content[:-1], content + b"\0", b""):
        shard.write_bytes(changed)
        with pytest.raises(UserError, match=f"params_shard_1.bin is damaged: it has {len(changed)} bytes"):
            load_tensors(tmp_path)
    shard.unlink()
    with pytest.raises(UserError, match=r"params_shard_1\.bin is damaged: it is missing"):
        load_tensors(tmp_path)
