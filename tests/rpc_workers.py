"""TVM's RPC tracker and workers on loopback, for tests; each ends with the block that started it."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import psutil
import pytest

HOST = "127.0.0.1"
START_S = 120.0  # a machine at work takes its time to import TVM


def free_port() -> int:
    """A port that nobody has at the moment."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


@contextmanager
def tracker() -> Iterator[int]:
    """A tracker; the value is its port."""
    pytest.importorskip("tornado", reason="TVM's RPC tracker needs tornado: pip install 'gpt2-tvm[rpc]'")
    with _listening("tvm.exec.rpc_tracker") as (port, _):
        yield port


@contextmanager
def server(key: str = "", tracker_port: int | None = None) -> Iterator[tuple[int, subprocess.Popen[bytes]]]:
    """A worker, by itself or registered with a tracker: its port and its process."""
    pytest.importorskip("cloudpickle", reason="TVM's RPC server needs cloudpickle: pip install 'gpt2-tvm[rpc]'")
    options = ["--key", key] if key else []
    if tracker_port is not None:
        options += ["--tracker", f"{HOST}:{tracker_port}"]
    with _listening("tvm.exec.rpc_server", *options) as found:
        if tracker_port is not None:
            wait_for(lambda: free_workers(tracker_port, key) > 0, "the worker at the tracker")
        yield found


@contextmanager
def _listening(module: str, *options: str) -> Iterator[tuple[int, subprocess.Popen[bytes]]]:
    port = free_port()
    command = [sys.executable, "-m", module, "--host", HOST, "--port", str(port), "--port-end", str(port + 1)]
    process = subprocess.Popen([*command, *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for(lambda: _answers(port), module)
        yield port, process
    finally:
        end(process)


def end(process: subprocess.Popen[bytes]) -> None:
    """End a process of ours and those that it started."""
    with suppress(psutil.Error):
        for child in psutil.Process(process.pid).children(recursive=True):
            with suppress(psutil.Error):
                child.kill()
    process.kill()
    process.wait()


def serving_children(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """The processes beneath a worker: its listener, and the one that serves a session."""
    return psutil.Process(process.pid).children(recursive=True)


def wait_for(ready: Callable[[], bool], what: str) -> None:
    """Return once `ready`; fail the test when it is not within START_S."""
    begin = time.monotonic()
    while not ready():
        if time.monotonic() - begin > START_S:
            pytest.fail(f"{what} did not get ready")
        time.sleep(0.1)


def _answers(port: int) -> bool:
    try:
        socket.create_connection((HOST, port), 1).close()
    except OSError:
        return False
    return True


def free_workers(tracker_port: int, key: str) -> int:
    """How many workers with `key` the tracker could hand out."""
    from tvm import rpc

    summary: dict[str, Any] = rpc.connect_tracker(HOST, tracker_port).summary()
    return int(summary["queue_info"].get(key, {}).get("free", 0))


@contextmanager
def rewriting(port: int, old: bytes, new: bytes) -> Iterator[int]:
    """A port that passes bytes on to `port` and back, with `old` replaced in what the client says."""
    assert len(old) == len(new)
    listener = socket.create_server((HOST, 0))
    sockets: list[socket.socket] = [listener]

    def pump(source: socket.socket, sink: socket.socket, change: bool) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data.replace(old, new) if change else data)
            sink.shutdown(socket.SHUT_WR)

    def accept() -> None:
        with suppress(OSError):
            while True:
                client, _ = listener.accept()
                behind = socket.create_connection((HOST, port))
                sockets.extend((client, behind))
                threading.Thread(target=pump, args=(client, behind, True), daemon=True).start()
                threading.Thread(target=pump, args=(behind, client, False), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield int(listener.getsockname()[1])
    finally:
        for one in sockets:
            one.close()
