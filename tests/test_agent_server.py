"""Orders and answers between Python and an agent, the agent played by Python; the program that ends with its owner."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from gpt2_tvm.artifact import open_artifact
from gpt2_tvm.errors import UserError
from gpt2_tvm.runners import agent_server, chromium, guard, make_runner, node, web
from gpt2_tvm.runners.agent_server import AgentServer, pack, unpack
from gpt2_tvm.toolchains import web as toolchain
from gpt2_tvm.toolchains.webruntime import emscripten


@pytest.fixture
def server(tmp_path: Path) -> Iterator[AgentServer]:
    (tmp_path / "page.html").write_text("a page")
    made = AgentServer({"": tmp_path / "page.html", "artifact/gone": tmp_path / "gone"})
    yield made
    made.close()


def work(server: AgentServer, message: dict[str, Any], payload: bytes = b"") -> tuple[int, bytes]:
    request = urllib.request.Request(server.address + "work", pack(message, payload), method="POST")
    with urllib.request.urlopen(request, timeout=30) as reply:
        return reply.status, reply.read()


def status(url: str) -> int:
    try:
        with urllib.request.urlopen(url, timeout=10) as reply:
            return int(reply.status)
    except urllib.error.HTTPError as error:
        return error.code


def play(server: AgentServer, answers: list[tuple[dict[str, Any], bytes]]) -> tuple[threading.Thread, list[Any]]:
    """An agent that gives these answers, and the orders that it gets."""
    orders: list[Any] = []

    def run() -> None:
        message, payload = {"hello": "a player"}, b""
        for answer in [*answers, ({}, b"")]:
            code, body = work(server, message, payload)
            if code == 200:
                orders.append(unpack(body))
            message, payload = answer

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread, orders


def test_an_order_goes_out_and_its_answer_comes_back(server: AgentServer) -> None:
    _, orders = play(server, [({"n": 1}, b"\0bytes"), ({"failed": "it is Monday", "kind": "Error"}, b"")])
    server.wait(10, "the player")
    assert server.where == "a player"
    assert server.ask({"do": "this"}, b"\xff\xfe") == ({"n": 1}, b"\0bytes")
    with pytest.raises(UserError, match=r"^in a player: it is Monday$"):
        server.ask({"do": "that"})
    assert orders == [({"do": "this"}, b"\xff\xfe"), ({"do": "that"}, b"")]


def test_files_and_orders_are_behind_a_secret(server: AgentServer) -> None:
    assert status(server.address) == 200
    assert status(server.address + "artifact/gone") == 404 and status(server.address + "work") == 404
    assert status(server.address + "../page.html") == 404 and status(server.address + "page.html") == 404
    plain = server.address.rsplit("/", 2)[0]
    assert status(plain + "/") == 404 and status(plain + "/guessed/") == 404
    with urllib.request.urlopen(server.address, timeout=10) as reply:
        assert reply.read() == b"a page" and reply.headers["Content-Type"] == "text/html"
        assert reply.headers["Cross-Origin-Opener-Policy"] == "same-origin"


def test_nonsense_is_refused(server: AgentServer) -> None:
    for body in (b"", b"\xff\xff\xff\xff", pack({})[:-1]):
        with pytest.raises(urllib.error.HTTPError, match="400"):
            urllib.request.urlopen(urllib.request.Request(server.address + "work", body, method="POST"), timeout=10)


def test_an_agent_that_ends_is_noticed(server: AgentServer) -> None:
    play(server, [])
    server.wait(10, "the player")
    server.alive = lambda: "the player ended: tired"
    with pytest.raises(UserError, match="the player ended: tired"):
        server.ask({"do": "this"})


def test_a_page_loaded_again_forgets_its_order(server: AgentServer) -> None:
    thread = threading.Thread(target=lambda: work(server, {"hello": "a page"}), daemon=True)
    thread.start()
    server.wait(10, "a page")
    told: list[str] = []

    def ask() -> None:
        try:
            server.ask({"do": "this"})
        except UserError as error:
            told.append(str(error))

    asking = threading.Thread(target=ask)
    asking.start()
    thread.join(10)  # the order is with the first page
    threading.Thread(target=lambda: work(server, {"hello": "a page"}), daemon=True).start()
    asking.join(10)
    assert told == ["in a page: the page was loaded again: run the command again"]


def test_silence_has_an_end(server: AgentServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent_server, "ANSWER_S", 0.0)
    with pytest.raises(UserError, match="nobody does not start"):
        server.wait(0.0, "nobody")
    with pytest.raises(UserError, match="is the page still open and in front"):
        server.ask({"do": "this"})


def test_a_port_that_is_taken_is_one_line(server: AgentServer) -> None:
    port = int(server.address.split(":")[2].split("/")[0])
    with pytest.raises(UserError, match=f"cannot listen on port {port}: .*choose another"):
        AgentServer({}, port)


# The guard -----------------------------------------------------------------------------------------------------------


def gone(pid: int) -> bool:
    for _ in range(100):
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.1)
    return False


SLEEP = [sys.executable, "-c", "import os, time; print(os.getpid(), flush=True); time.sleep(600)"]


def pid_in(log: Path) -> int:
    for _ in range(100):
        if log.is_file() and log.read_text().strip():
            return int(log.read_text())
        time.sleep(0.1)
    raise AssertionError("the program did not start")


def test_a_program_ends_when_it_is_stopped(tmp_path: Path) -> None:
    folder, log = tmp_path / "folder", tmp_path / "log"
    folder.mkdir()
    process = guard.start(SLEEP, folder, log)
    pid = pid_in(log)
    guard.stop(process)
    assert gone(pid) and not folder.exists()


def test_a_program_ends_with_a_killed_owner(tmp_path: Path) -> None:
    log = tmp_path / "log"
    code = (
        "import sys; from pathlib import Path; from gpt2_tvm.runners import guard; "
        f"guard.start({SLEEP!r}, Path({str(tmp_path / 'none')!r}), Path({str(log)!r})); print(1, flush=True); input()"
    )
    owner = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert owner.stdout is not None and owner.stdout.readline()
    pid = pid_in(log)
    owner.kill()
    owner.wait()
    assert gone(pid)


# What is missing -----------------------------------------------------------------------------------------------------


def artifact(tmp_path: Path, kind: str = "webgpu", files: tuple[str, ...] = (toolchain.MODULE,)) -> Any:
    return SimpleNamespace(path=tmp_path, kind=kind, manifest={"files": dict.fromkeys(files)})


def test_what_cannot_run_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_artifact: Path) -> None:
    with pytest.raises(UserError, match="is for cpu, and node runs webgpu: compile it with --target webgpu"):
        make_runner(open_artifact(tiny_artifact), "node")
    with pytest.raises(UserError, match="no device node:3; there are node, chromium and browser:PORT"):
        web.Agent(artifact(tmp_path), "node:3")
    with pytest.raises(UserError, match=r"has no model\.wasm: install emscripten .*then compile again"):
        web.Agent(artifact(tmp_path, files=()), "node")
    monkeypatch.setattr(toolchain, "WEB", tmp_path)
    with pytest.raises(UserError, match="npm ci --prefix web"):
        web.Agent(artifact(tmp_path), "node")
    (tmp_path / toolchain.JS_RUNTIME).parent.mkdir(parents=True)
    (tmp_path / toolchain.JS_RUNTIME).write_text("")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CHROMIUM", raising=False)
    with pytest.raises(UserError, match="node is missing: install node 20"):
        web.Agent(artifact(tmp_path), "node")
    with pytest.raises(UserError, match="no Chromium on PATH: install it"):
        web.Agent(artifact(tmp_path), "chromium")
    fake = tmp_path / "node"
    fake.write_text("#!/bin/sh\necho v18.4.0\n")
    fake.chmod(0o755)
    with pytest.raises(UserError, match=r"node is 18\.4\.0, too old: install node 20"):
        node.check()


def test_a_vulkan_driver_of_the_users_stays(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    icd = tmp_path / "icd.json"
    icd.write_text("{}")
    monkeypatch.setattr(chromium, "SOFTWARE_ICDS", (tmp_path / "none.json", icd))
    for name in ("VK_ICD_FILENAMES", "VK_DRIVER_FILES", "DAWN_OPTIONS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(chromium, "no_gpu", lambda: True)
    assert node.environment() == {"VK_ICD_FILENAMES": str(icd), "DAWN_OPTIONS": node.DAWN}
    monkeypatch.setenv("DAWN_OPTIONS", "backend=metal")
    monkeypatch.setenv("VK_DRIVER_FILES", "mine")
    assert node.environment() == {"DAWN_OPTIONS": "backend=metal"}
    monkeypatch.delenv("VK_DRIVER_FILES")
    monkeypatch.setattr(chromium, "no_gpu", lambda: False)
    assert node.environment() == {"DAWN_OPTIONS": "backend=metal"}


# What an artifact asks of a device, and compiling without emcc --------------------------------------------------------


def test_compile_without_emcc_says_one_line_and_the_artifact_runs(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gpt2_tvm.build import compile_model

    monkeypatch.setenv("EMCC", str(tmp_path / "no-emcc"))
    notes: list[str] = []

    def note(what: str, share: float) -> None:
        if share == 0.0:
            notes.append(what)

    made = compile_model(
        str(tiny_model), "webgpu", output=tmp_path / "a", rules="baseline", verify_widths=(), progress=note
    )
    (said,) = [n for n in notes if "model.wasm" in n]
    assert "through wgpu" in said and emscripten.HOW_TO_GET_IT in said and "\n" not in said
    opened = open_artifact(made, verify=True)
    assert toolchain.MODULE not in opened.manifest["files"] and opened.manifest["libraries"] == [
        "lib.so",
        "kernels.wgsl",
    ]
    needs = opened.manifest["webgpu"]
    assert needs["features"] == []
    shards = json.loads((made / "params/tensor-cache.json").read_text())["records"]
    largest = max(record["nbytes"] for shard in shards for record in shard["records"])
    assert needs["limits"]["maxStorageBufferBindingSize"] >= largest
    assert 1 <= needs["limits"]["maxComputeInvocationsPerWorkgroup"] <= 256
    assert needs["limits"]["maxComputeWorkgroupStorageSize"] <= 32768


def test_workgroup_memory_is_added_up() -> None:
    from gpt2_tvm.runners.wgsl import Shader
    from gpt2_tvm.toolchains.web_needs import shared_bytes

    source = """
var<workgroup> a : array<f32, 3>;
var<workgroup> b : array<vec4<f32>, 2>;
var<workgroup> c:array<f16, 5>;
var<private> d : array<f32, 100>;
"""
    assert shared_bytes(Shader("k", source, (), (), (1, 1, 1))) == 16 + 32 + 16
