"""An artifact on a worker behind TVM's RPC: the same logits as here, one session for all engines, and one line for
whatever can go wrong with a worker."""

from __future__ import annotations

import gc
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import rpc_workers
from rpc_workers import HOST

from gpt2_tvm import Engine
from gpt2_tvm.artifact import read_manifest, write_manifest
from gpt2_tvm.errors import UserError
from gpt2_tvm.runners import rpc_session
from gpt2_tvm.runners.rpc import RpcRunner
from gpt2_tvm.runners.rpc_session import Address, parse_address
from tuning.measure.session import turn

IDS = [[5, 17, 3, 96, 44, 0, 8], [1, 2]]  # ragged; the tiny model knows 97 ids
KEY = "laptop"


@pytest.fixture(scope="module")
def worker() -> Iterator[str]:
    """The address of a server."""
    with rpc_workers.server() as (port, _):
        yield f"rpc://{HOST}:{port}"
        gc.collect()


@pytest.fixture(scope="module")
def own() -> Iterator[tuple[int, Any]]:
    """A server with the key "own": its port and its process. The last test that uses it kills it."""
    with rpc_workers.server("own") as found:
        yield found


@pytest.fixture(scope="module")
def tracked() -> Iterator[int]:
    """The port of a tracker with one worker, whose key is KEY."""
    with rpc_workers.tracker() as port, rpc_workers.server(KEY, port):
        yield port


def one_line(error: pytest.ExceptionInfo[UserError]) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


# Addresses ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("rpc://host:9190/jetson", Address("host", 9190, "jetson", True, rpc_session.WAIT_S)),
        ("rpc://host:9090", Address("host", 9090, "", False, rpc_session.WAIT_S)),
        ("rpc://k1@10.0.0.3:9090", Address("10.0.0.3", 9090, "k1", False, rpc_session.WAIT_S)),
        ("rpc://[::1]:9190/a?wait=2.5", Address("::1", 9190, "a", True, 2.5)),
    ],
)
def test_addresses(text: str, address: Address) -> None:
    assert parse_address(text) == address
    assert parse_address(f"rpc://{address}") == parse_address(text.split("?")[0])


@pytest.mark.parametrize(
    "text",
    [
        *("rpc://", "rpc://host", "rpc://host/key", "rpc://host:port/key", "rpc://host:9190/a/b", "rpc://host:99999/a"),
        *("rpc://me@host:9190/key", "rpc://host:9190/key?wait=soon", "rpc://host:9190/key?timeout=3", "tcp://host:1"),
    ],
)
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(UserError, match="rpc://HOST:PORT/KEY") as error:
        parse_address(text)
    one_line(error)


# The same results -----------------------------------------------------------------------------------------------------


def test_every_function_gives_what_it_gives_here(tiny_artifact: Path, worker: str) -> None:
    here, there = Engine(tiny_artifact), Engine(tiny_artifact, worker)
    assert worker.removeprefix("rpc://") in there.runner.device_name and there.threads

    def same(what: str, *arguments: Any) -> None:
        ours, theirs = (getattr(engine, what)(*arguments) for engine in (here, there))
        np.testing.assert_allclose(theirs, ours, rtol=1e-5, atol=1e-6, err_msg=what)

    same("prefill", IDS)
    same("decode", [7, 8])
    same("decode_greedy", 5)
    same("prefill", [[3, 4], [5, 6, 7]])
    same("verify", [[11, 12, 13], [14]])
    same("verify", [[3, 4, 5, 6]] * 2, [-1, 0, 0, 2])
    for engine in (here, there):
        engine.keep([[0, 2, 3], [0, 1]])
        engine.rewind(6)
    same("decode", [9, 9])
    assert there.positions.tolist() == here.positions.tolist() == [7, 7]
    same("score", IDS[0])
    for engine in (here, there):  # another batch: caches of another shape
        engine.reset()
    same("prefill", IDS[0])


def test_engines_share_a_session_and_its_uploads(
    tiny_artifact: Path, worker: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tvm.rpc import RPCSession

    sent: list[str] = []
    original = RPCSession.upload

    def upload(self: Any, data: Any, target: str | None = None) -> None:
        sent.append(str(target))
        original(self, data, target)

    gc.collect()  # the session of the test before
    monkeypatch.setattr(RPCSession, "upload", upload)
    first = Engine(tiny_artifact, worker)
    files = read_manifest(tiny_artifact)["files"]
    expected = 2 + sum(name.startswith("params/params_shard") for name in files)  # library, index, shards
    assert len(sent) == expected
    second = Engine(tiny_artifact, worker)
    assert len(sent) == expected and second.runner._session is first.runner._session
    np.testing.assert_array_equal(first.prefill(IDS[0]), second.prefill(IDS[0]))
    first.decode(1)  # each has caches of its own
    np.testing.assert_array_equal(second.decode(1), Engine(tiny_artifact, worker).prefill([*IDS[0], 1]))


def test_tensors_are_let_go_of(tiny_artifact: Path, worker: str) -> None:
    engine = Engine(tiny_artifact, worker)
    session = engine.runner._session
    tensor = engine.runner.empty((3, 2), "float32")
    assert not engine.runner.download(tensor).any()
    name = tensor.name
    assert session.function("vm.builtin.tensor_cache.get")(name) is not None
    del tensor
    gc.collect()
    assert session.function("vm.builtin.tensor_cache.get")(name) is None


def test_threads_of_the_worker(tiny_artifact: Path, worker: str) -> None:
    gc.collect()  # a session of its own: its pool starts with its first use
    engine = Engine(tiny_artifact, worker, threads=1)
    assert engine.threads == 1
    engine.prefill(IDS)


# Timing ---------------------------------------------------------------------------------------------------------------


def test_the_worker_times_itself(tiny_artifact: Path, worker: str) -> None:
    here, there = Engine(tiny_artifact), Engine(tiny_artifact, worker)
    prompt = np.asarray([IDS[0]], np.int32)
    ours, theirs = turn(here, prompt, 6), turn(there, prompt, 6)
    assert (ours.clock, theirs.clock) == ("here", "worker")
    np.testing.assert_array_equal(theirs.tokens, ours.tokens)
    assert there.positions.tolist() == [len(IDS[0]) + 6]
    for found in (ours, theirs):
        assert found.prefill_s > 0 and found.decode_s > 0
    full = turn(there, np.zeros((1, 40), np.int32), there.max_seq_len - 40)  # the evaluator's own step must fit as well
    assert full.tokens.shape == (1, 8) and full.decode_s > 0


def test_timing_leaves_the_inputs_as_they_were(tiny_artifact: Path, worker: str) -> None:
    engine = Engine(tiny_artifact, worker)
    engine.prefill(IDS[0])
    runner = engine.runner
    token, history = runner.empty((1, 1), "int32"), runner.empty((1, engine.max_seq_len), "int32")
    at, active = engine._where(np.ones(1, np.int32))
    inputs = [token, at, history, active, engine._caches]
    times = runner.seconds("greedy_b1", inputs, number=3, repeat=2)
    assert len(times) == 2 and all(time > 0 for time in times)
    assert runner.download(at).tolist() == [len(IDS[0])] and not runner.download(history).any()
    runner.call("greedy_b1", inputs)  # which does move on
    assert runner.download(at).tolist() == [len(IDS[0]) + 1]


# What can go wrong ----------------------------------------------------------------------------------------------------


@pytest.mark.heavy
def test_through_a_tracker_and_busy(tiny_artifact: Path, tracked: int) -> None:
    from tvm import rpc

    address = f"rpc://{HOST}:{tracked}/{KEY}"
    engine = Engine(tiny_artifact, address)
    expected = Engine(tiny_artifact).prefill(IDS[0])
    np.testing.assert_allclose(engine.prefill(IDS[0]), expected, rtol=1e-5, atol=1e-6)
    del engine
    gc.collect()
    rpc_workers.wait_for(lambda: rpc_workers.free_workers(tracked, KEY) == 1, "the worker, free again")
    held = rpc.connect_tracker(HOST, tracked).request(KEY)
    with pytest.raises(UserError, match="busy") as error:
        Engine(tiny_artifact, f"{address}?wait=0.5")
    assert "?wait=" in one_line(error)
    del held


def test_no_worker_with_the_key(tiny_artifact: Path, tracked: int) -> None:
    with pytest.raises(UserError, match=f"no worker with key 'phone' \\(it has {KEY}\\)") as error:
        Engine(tiny_artifact, f"rpc://{HOST}:{tracked}/phone?wait=0")
    assert "--key phone" in one_line(error)


@pytest.mark.parametrize("key", ["/gpu", ""])
def test_nothing_answers(tiny_artifact: Path, key: str) -> None:
    what = "tracker" if key else "server"
    with pytest.raises(UserError, match=f"no RPC {what} answers") as error:
        Engine(tiny_artifact, f"rpc://{HOST}:{rpc_workers.free_port()}{key}")
    one_line(error)


def test_a_server_is_no_tracker_and_has_another_key(tiny_artifact: Path, own: tuple[int, Any]) -> None:
    port, _ = own
    with pytest.raises(UserError, match="no TVM RPC tracker") as error:
        Engine(tiny_artifact, f"rpc://{HOST}:{port}/own?wait=1")
    one_line(error)
    with pytest.raises(UserError, match="another key") as error:
        Engine(tiny_artifact, f"rpc://{HOST}:{port}")
    one_line(error)


def test_a_server_that_does_not_answer(tiny_artifact: Path) -> None:
    with socket.create_server((HOST, 0)) as silent, pytest.raises(UserError, match="serves another client") as error:
        Engine(tiny_artifact, f"rpc://{HOST}:{silent.getsockname()[1]}?wait=0.5")
    one_line(error)


def test_another_version_of_tvm(tiny_artifact: Path, worker: str) -> None:
    """The version of the protocol, as the client says it, changed on its way."""
    gc.collect()  # the server serves one session at a time
    port = parse_address(worker).port
    with rpc_workers.rewriting(port, b"0.8.0", b"0.7.9") as between:
        with pytest.raises(UserError, match="another version of TVM") as error:
            Engine(tiny_artifact, f"rpc://{HOST}:{between}?wait=60")
        assert "0.8.0 there" in one_line(error)


def test_a_library_that_the_worker_does_not_take(tiny_artifact: Path, tmp_path: Path, worker: str) -> None:
    folder = shutil.copytree(tiny_artifact, tmp_path / "foreign")
    manifest = read_manifest(folder)
    (folder / manifest["library"]).write_bytes(b"\x7fELF of some other machine")
    for key in ("format", "digest", "files"):
        del manifest[key]
    write_manifest(folder, manifest)
    with pytest.raises(UserError, match="does not take") as error:
        Engine(folder, worker)
    assert manifest["versions"]["apache-tvm"] in one_line(error)
    Engine(tiny_artifact, worker).prefill(IDS)  # and the session goes on


def test_a_worker_whose_cpu_lacks_something(tiny_artifact: Path, worker: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if not read_manifest(tiny_artifact)["target"]["requires"]:
        pytest.skip("the artifact needs no feature of the CPU")
    monkeypatch.setattr(rpc_session.Session, "cpu_features", lambda self: lambda name: False)
    with pytest.raises(UserError, match="needs a CPU with") as error:
        Engine(tiny_artifact, worker)
    assert "compile it for that machine" in one_line(error)


def test_webgpu_has_no_worker() -> None:
    artifact: Any = SimpleNamespace(kind="webgpu", path="some/artifact")
    with pytest.raises(UserError, match="webgpu"):
        RpcRunner(artifact, "rpc://host:9190/key")


def test_a_worker_lost_in_the_middle(tiny_artifact: Path, own: tuple[int, Any]) -> None:
    port, process = own
    engine = Engine(tiny_artifact, f"rpc://own@{HOST}:{port}?wait=60")
    engine.prefill(IDS[0])
    for child in rpc_workers.serving_children(process):
        child.kill()
    with pytest.raises(UserError, match="was lost while") as error:
        for _ in range(3):  # what is on its way may still arrive
            engine.decode(1)
    assert f"{HOST}:{port}" in one_line(error)
    with pytest.raises(UserError, match="was lost before"):
        engine.decode(1)
    with pytest.raises(UserError, match="answer"):  # TVM's server ends with its session's process
        Engine(tiny_artifact, f"rpc://own@{HOST}:{port}?wait=1")
