"""A session with one TVM RPC worker: finding it, what was uploaded to it, and tensors that live there.

Engines of one process that name the same address share a session, so that several artifacts with the same weights
send and load them once.
"""

from __future__ import annotations

import itertools
import json
import re
import socket
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import numpy as np

from gpt2_tvm.artifact import Artifact
from gpt2_tvm.errors import UserError
from gpt2_tvm.tensor_cache import INDEX

WAIT_S = 15.0  # for a worker that is free
CONNECT_S = 5.0  # for a machine that answers
POLL_S = 0.2
SPELLING = "write rpc://HOST:PORT/KEY for a tracker, or rpc://HOST:PORT for a server"


@dataclass(frozen=True)
class Address:
    """Where a worker is found. key: the worker's; tracker: whether a tracker hands it out."""

    host: str
    port: int
    key: str
    tracker: bool
    wait_s: float

    def __str__(self) -> str:
        where = f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"
        if self.tracker:
            return f"{where}/{self.key}"
        return f"{self.key}@{where}" if self.key else where


def parse_address(text: str) -> Address:
    """The parts of "rpc://HOST:PORT/KEY" or "rpc://[KEY@]HOST:PORT"; UserError for anything else."""
    wrong = UserError(f"{text} is no address of an RPC worker; {SPELLING}")
    try:
        parts = urlsplit(text)
        port = parts.port
        wait = parse_qs(parts.query, strict_parsing=bool(parts.query))
        wait_s = float(wait.pop("wait", [str(WAIT_S)])[0])
    except ValueError:
        raise wrong from None
    key = parts.path.strip("/")
    if parts.scheme != "rpc" or not parts.hostname or not port or wait or parts.fragment or wait_s < 0 or "/" in key:
        raise wrong
    if key and parts.username:
        raise wrong
    return Address(parts.hostname, port, key or parts.username or "", bool(key), wait_s)


class Session:
    """One worker, ours until this object goes. See `open_session`.

    Attributes:
        address: where it was found. lost: set once the connection has failed; nothing is asked of it any more.
    """

    def __init__(self, address: Address, remote: Any) -> None:
        self.address, self.lost = address, False
        self._remote = remote
        self._files: set[str] = set()
        self._known: dict[str, Any] = {}
        self._loaded: tuple[str, Any] | None = None
        self._zeros: tuple[tuple[Any, ...], Any] | None = None
        self._names = itertools.count()

    def device(self, kind: str) -> Any:
        """The worker's first device of `kind`."""
        return self._remote.device(kind, 0)

    def function(self, name: str) -> Any:
        """A function that is registered with the worker's TVM, by name. AttributeError if it is not."""
        if name not in self._known:
            self._known[name] = self._remote.get_function(name)
        return self._known[name]

    def upload(self, path: Path, digest: str) -> str:
        """Send a file unless one of its content (sha256 `digest`) was sent before; returns its name there."""
        name = f"{digest[:24]}{path.suffix}"
        if name not in self._files:
            self._remote.upload(bytearray(path.read_bytes()), name)
            self._files.add(name)
        return name

    def load(self, library: str) -> Any:
        """A library that was uploaded, as a module there."""
        return self._remote.load_module(library)

    def parameters(self, artifact: Artifact, device: Any) -> Any:
        """The artifact's parameters as the tuple that its functions take, loaded there from its uploaded shards.

        Kept until others are loaded, so that a second artifact with the same weights costs nothing.
        """
        files = artifact.manifest["files"]
        folder = artifact.params
        digests = {name: files[f"{folder.name}/{name}"]["sha256"] for name in _names(folder)}
        identity = json.dumps([digests, artifact.manifest["params"]], sort_keys=True)
        if self._loaded is not None and self._loaded[0] == identity:
            return self._loaded[1]
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        for shard in index["records"]:
            shard["dataPath"] = self.upload(folder / shard["dataPath"], digests[shard["dataPath"]])
        self._remote.upload(bytearray(json.dumps(index).encode()), INDEX)
        where = str(self.function("tvm.rpc.server.workpath")("")).rstrip("/")
        kind = int(device.dlpack_device_type()) % RPC_SESS_MASK
        self.function("vm.builtin.tensor_cache.load")(where, kind, int(device.index))
        params = self.array(artifact.manifest["params"])
        self._loaded = identity, params
        return params

    def array(self, names: Sequence[str]) -> Any:
        """The tensors with these names in the worker's cache, as one tuple."""
        return self.function("vm.builtin.param_array_from_cache_by_name_unpacked")(*names)

    def zeros(self, shape: tuple[int, ...], dtype: str, device: Any) -> tuple[str, Any]:
        """(name, handle) of a new tensor full of zeros, which the worker's cache owns until `release`.

        What TVM's RPC allocates by itself is a bare pointer; a tuple of caches can be made of owned tensors alone.
        """
        import tvm

        kind = (shape, dtype, str(device))
        if self._zeros is None or self._zeros[0] != kind:  # sent once for the caches of all layers
            source = tvm.runtime.empty(shape, dtype, device)
            source.copyfrom(np.zeros(shape, dtype))
            self._zeros = kind, source
        name = f"gpt2-tvm.{next(self._names)}"
        self.function("vm.builtin.tensor_cache.update")(name, self._zeros[1], True)
        return name, self.function("vm.builtin.tensor_cache.get")(name)

    def release(self, name: str) -> None:
        """Let the worker's cache forget a tensor."""
        if not self.lost:
            with suppress(Exception):  # it is gone with the worker
                self.function("vm.builtin.tensor_cache.remove")(name)

    def cpu_name(self) -> str | None:
        """LLVM's name for the worker's CPU, None where it has no LLVM."""
        try:
            return str(self.function("tvm.codegen.llvm.GetHostCPUName")())
        except AttributeError:
            return None

    def cpu_features(self) -> Callable[[str], bool] | None:
        """Whether the worker's CPU has a feature, by LLVM's name for it; None where it has no LLVM."""
        try:
            there, count = self.function("tvm.codegen.llvm.GetHostCPUFeatures")(), self.function("ffi.MapCount")
        except AttributeError:
            return None
        return lambda name: bool(count(there, name))


RPC_SESS_MASK = 128  # TVM's tvm.rpc.base.RPC_SESS_MASK: from here on a device's type carries its session

_open: weakref.WeakValueDictionary[Address, Session] = weakref.WeakValueDictionary()


def open_session(address: Address) -> Session:
    """The session of this process with `address`, made if there is none (or the one before was lost).

    Raises UserError where nothing answers, no worker is free within `address.wait_s`, or what answers is no TVM worker
    of this version of the protocol.
    """
    session = _open.get(address)
    if session is None or session.lost:
        session = Session(address, _from_tracker(address) if address.tracker else _direct(address))
        _open[address] = session
    return session


def _names(folder: Path) -> list[str]:
    index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    return [shard["dataPath"] for shard in index["records"]]


def _reachable(address: Address, what: str) -> None:
    try:
        socket.create_connection((address.host, address.port), CONNECT_S).close()
    except OSError as error:
        reason = error.strerror or str(error) or type(error).__name__
        raise UserError(
            f"no {what} answers at {address.host}:{address.port} ({reason}); is it started, and reachable from here?"
        ) from error


def _direct(address: Address) -> Any:
    _reachable(address, "RPC server")
    return _connect(address, address.host, address.port, address.key)


def _connect(address: Address, host: str, port: int, key: str) -> Any:
    """A session; in a thread, because a server that serves someone else does not answer until he goes."""
    from tvm import rpc

    made: list[Any] = []

    def connect() -> None:
        try:
            made.append(rpc.connect(host, port, key))
        except Exception as error:
            made.append(error)

    thread = threading.Thread(target=connect, name=f"connecting to {address}", daemon=True)
    thread.start()
    thread.join(address.wait_s)
    if not made:
        raise UserError(
            f"{address} has not answered for {address.wait_s:g} s: it serves another client, or is no TVM RPC server; "
            "wait until it is free (?wait=SECONDS at the end of the address), or start another"
        )
    if isinstance(made[0], Exception):
        raise _refusal(address, made[0])
    return made[0]


def _refusal(address: Address, error: Exception) -> UserError:
    text = str(error)
    if "version mismatch" in text:
        found = re.search(r"server protocol=(\S+?),?\s+client protocol=(\S+)", text)
        which = f" (RPC protocol {found[1].rstrip(',')} there, {found[2]} here)" if found else ""
        return UserError(f"{address} runs another version of TVM{which}; install the one of this machine there")
    if "matches key" in text or "mismatch" in text.lower():
        return UserError(f"the server at {address} has another key than {address.key!r}; {SPELLING}, KEY@ before HOST")
    line = next((line.strip() for line in text.splitlines() if line.strip()), type(error).__name__)
    return UserError(f"cannot open a session with {address} ({line}); is a TVM RPC server running there?")


def _from_tracker(address: Address) -> Any:
    """A worker with the key, from the tracker, waiting for one that is free."""
    from tvm import rpc

    _reachable(address, "RPC tracker")
    try:
        tracker = rpc.connect_tracker(address.host, address.port)
        _wait_for_worker(address, tracker)
        # A request waits for a worker as long as it takes, and someone may have been quicker than we are.
        tracker._sock.settimeout(max(address.wait_s, CONNECT_S))
        found = tracker.request(address.key, max_retry=1)
    except UserError:
        raise
    except Exception as error:
        text = str(error)
        if "timed out" in text:
            raise _none_free(address) from error
        if "not RPC Tracker" in text or "connection reset" in text:
            raise UserError(
                f"what answers at {address.host}:{address.port} is no TVM RPC tracker; {SPELLING}"
            ) from error
        raise _refusal(address, error) from error
    return found


def _wait_for_worker(address: Address, tracker: Any) -> None:
    end = time.monotonic() + address.wait_s
    where = f"{address.host}:{address.port}"
    while True:
        summary = tracker.summary()
        workers = [str(server.get("key", "")).partition(":")[2] for server in summary["server_info"]]
        if address.key in workers:
            if summary["queue_info"].get(address.key, {}).get("free", 0) > 0:
                return
        elif time.monotonic() >= end:
            there = ", ".join(sorted(set(filter(None, workers)))) or "none at all"
            raise UserError(
                f"the tracker at {where} has no worker with key {address.key!r} (it has {there}); "
                f"start one: python -m tvm.exec.rpc_server --tracker {where} --key {address.key}"
            )
        if time.monotonic() >= end:
            raise _none_free(address)
        time.sleep(POLL_S)


def _none_free(address: Address) -> UserError:
    return UserError(
        f"all workers {address} are busy (waited {address.wait_s:g} s); wait longer (?wait=SECONDS at the end of the "
        "address), or start another"
    )
