"""Running a webgpu artifact in TVM's web runtime: in node on Dawn, in a headless Chromium, or in any browser.

`--device` chooses:

    node            node with npm's package webgpu
    chromium        a Chromium of its own, without a window
    browser:PORT    whatever browser opens the address that is printed

The model's own page does the same with the same files (`web/lib/model.mjs`). Calls are collected here and sent when
something is to be read back, so that a loop of decode steps is one message.
"""

from __future__ import annotations

import json
import sys
import tempfile
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from gpt2_tvm.artifact import Artifact
from gpt2_tvm.errors import UserError
from gpt2_tvm.runners import chromium, guard, node
from gpt2_tvm.runners.agent_server import AgentServer
from gpt2_tvm.toolchains import web
from gpt2_tvm.toolchains.webruntime import emscripten

KINDS = ("node", "chromium", "browser")
START_S = 60.0  # for a program that starts
OPEN_S = 600.0  # for a person who opens a page
MOST_CALLS, MOST_BYTES = 1000, 64 << 20  # in one message


class Agent:
    """An artifact in a web runtime (`AgentServer`), loaded; without an artifact the runtime alone.

    device: one of `KINDS`; "browser" takes a port after a colon. facts: of the device (adapter, features, limits; of a
    loaded model also timestamps, load_ms). where: the runtime, in words. Raises UserError, in one line, for what is
    missing here and for what the runtime refuses.
    """

    def __init__(self, artifact: Artifact | None, device: str) -> None:
        kind, _, port = device.partition(":")
        _check(artifact, kind, port)
        self._folder = Path(tempfile.mkdtemp(prefix="gpt2-tvm-web-"))
        self._log = self._folder / "log"
        self._program: Any = None
        self._server = AgentServer(_files(artifact), int(port or 0), self._ended)
        self._kind = kind
        address = self._server.address
        if kind == "node":
            command: list[str] = node.command(address)
            self._program = guard.start(command, self._folder, self._log, node.environment())
        elif kind == "chromium":
            command = chromium.command(chromium.require_browser(), self._folder / "profile", address)
            self._program = guard.start(command, self._folder, self._log)
        else:
            print(f"open {address} in the browser that is to run the model", file=sys.stderr, flush=True)
        try:
            self._server.wait(START_S if self._program else OPEN_S, kind)
            self.facts = self.ask({"do": "adapter" if artifact is None else "load"})[0]
        except BaseException:
            self.close()
            raise
        self.where = self._server.where

    def ask(self, order: dict[str, Any], payload: bytes = b"") -> tuple[dict[str, Any], bytes]:
        """See `AgentServer.ask`."""
        return self._server.ask(order, payload)

    def peak_rss_mb(self) -> float:
        """Peak resident memory of the program's processes together, in 10^6 bytes; 0 for a browser of the user's."""
        if self._program is None:
            return 0.0
        import psutil

        total = 0
        for process in psutil.Process(self._program.pid).children(recursive=True):
            try:
                status = Path(f"/proc/{process.pid}/status").read_text()
                peak = next((line for line in status.splitlines() if line.startswith("VmHWM:")), None)
                total += int(peak.split()[1]) * 1024 if peak else 0
            except OSError:
                try:
                    total += process.memory_info().rss
                except psutil.Error:  # it has just ended
                    continue
        return total / 1e6

    def close(self) -> None:
        """End the program."""
        self._server.close()
        if self._program is not None:
            guard.stop(self._program)

    def _ended(self) -> str | None:
        if self._program is None or self._program.poll() is None:
            return None
        try:
            said = [line for line in self._log.read_text(errors="replace").splitlines() if line.strip()]
        except OSError:  # its folder went with it
            said = []
        return f"{self._kind} ended{': ' + said[-1].strip()[:300] if said else ''}; run the command again"


def _check(artifact: Artifact | None, kind: str, port: str) -> None:
    if artifact is not None and artifact.kind != "webgpu":
        raise UserError(
            f"{artifact.path} is for {artifact.kind}, and {kind} runs webgpu: compile it with --target webgpu"
        )
    if kind not in KINDS or (port and (kind != "browser" or not port.isdigit())):
        raise UserError(f"no device {kind}{':' + port if port else ''}; there are node, chromium and browser:PORT")
    if artifact is not None and web.MODULE not in artifact.manifest["files"]:
        raise UserError(f"{artifact.path} has no {web.MODULE}: {emscripten.HOW_TO_GET_IT}, then compile again")
    web.js_runtime()
    if kind == "node":
        node.check()
    if kind == "chromium":
        chromium.require_browser()


def _files(artifact: Artifact | None) -> dict[str, Path]:
    """What the agent may fetch."""
    files = {"": web.WEB / "agent" / "index.html", "tvmjs.js": web.js_runtime()}
    files |= {f"lib/{path.name}": path for path in (web.WEB / "lib").glob("*.mjs")}
    if artifact is None:
        return files
    names = ("manifest.json", *artifact.manifest["files"])
    return files | {f"artifact/{name}": artifact.path / name for name in names}


@dataclass(frozen=True, eq=False)
class WebTensor:
    """A tensor over there, by its number."""

    number: int


class WebRunner:
    """See `runners.base.Runner`. device: as above."""

    def __init__(self, artifact: Artifact, device: str) -> None:
        self.agent = Agent(artifact, device)
        weakref.finalize(self, self.agent.close)
        self.device_name = f"{self.agent.facts['adapter']} in {self.agent.where}"
        self.threads: int | None = None
        listed = json.loads((artifact.path / "kernels.json").read_text(encoding="utf-8"))
        self._programs: dict[str, Any] = listed["functions"]
        self._numbers = count()
        self._calls: list[dict[str, Any]] = []
        self._bytes = bytearray()
        self._dead: list[int] = []  # tensors that nobody holds any more; freed after the calls before

    # runners.base.Runner ---------------------------------------------------------------------------------------------

    def empty(self, shape: Sequence[int], dtype: str) -> WebTensor:
        made = self._new()
        self._add({"do": "empty", "id": made.number, "shape": [int(n) for n in shape], "dtype": str(dtype)})
        return made

    def upload(self, tensor: WebTensor, array: np.ndarray) -> None:
        data = np.ascontiguousarray(array).tobytes()
        self._add({"do": "upload", "id": tensor.number, "at": len(self._bytes), "size": len(data)}, data)

    def download(self, tensor: WebTensor) -> np.ndarray:
        self._calls.append({"do": "download", "id": tensor.number})
        (found,), payload = self._send()
        return np.frombuffer(payload, found["dtype"]).reshape(found["shape"]).copy()

    def call(self, function: str, inputs: Sequence[Any], with_params: bool = True) -> WebTensor:
        made = self._new()
        numbers = [[t.number for t in x] if isinstance(x, list) else x.number for x in inputs]
        self._add({"do": "call", "id": made.number, "function": function, "inputs": numbers, "params": with_params})
        return made

    def sync(self) -> None:
        self._send()

    # For the laboratory ----------------------------------------------------------------------------------------------

    def turn(self, ids: Sequence[int], count: int) -> tuple[float, float, list[int]]:
        """A prefill from an empty cache, then `count` greedy tokens: seconds of each by the page's clock, and the ids.

        The page's own model does it, with caches of its own: the engine stands as before.
        """
        answer, _ = self.agent.ask({"do": "turn", "ids": [int(i) for i in ids], "count": count})
        return answer["prefill_ms"] / 1e3, answer["decode_ms"] / 1e3, answer["tokens"]

    def kernels(self, function: str, inputs: Sequence[Any]) -> tuple[list[tuple[str, float]], float]:
        """A call's kernels in order, with microseconds by the device's timestamps, and those of the call as a whole.

        The call is made twice. UserError where the device has no timestamps.
        """
        self._send()
        self.call(function, inputs)
        call, self._calls = self._calls, []
        answer, _ = self.agent.ask({"do": "timed", "calls": call})
        names = [launch["kernel"] for launch in self._programs[function]["launches"]]
        return list(zip(names, answer["kernels"], strict=True)), 1e3 * answer["whole_ms"]

    # Helpers ---------------------------------------------------------------------------------------------------------

    def _new(self) -> WebTensor:
        made = WebTensor(next(self._numbers))
        weakref.finalize(made, self._dead.append, made.number).atexit = False
        return made

    def _add(self, call: dict[str, Any], data: bytes = b"") -> None:
        self._calls.append(call)
        self._bytes += data
        if len(self._calls) >= MOST_CALLS or len(self._bytes) >= MOST_BYTES:
            self._send()

    def _send(self) -> tuple[list[dict[str, Any]], bytes]:
        """Have everything done that was collected -> (what each download is, their bytes)."""
        dead = [self._dead.pop() for _ in range(len(self._dead))]
        order = {"do": "calls", "calls": [*self._calls, *({"do": "free", "id": number} for number in dead)]}
        data, self._calls, self._bytes = bytes(self._bytes), [], bytearray()
        answer, payload = self.agent.ask(order, data)
        return answer["made"], payload
