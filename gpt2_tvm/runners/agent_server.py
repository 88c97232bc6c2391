"""The loopback server that an agent (`web/lib/agent.mjs`, in a page or in node) gets its files and orders from.

The agent asks for work with a POST that carries its last answer; the reply is the next order, or 204 to ask again.
Nothing but this is needed of a browser, so any one will do. The address holds a secret: other pages of the browser
cannot guess it.
"""

from __future__ import annotations

import json
import secrets
import shutil
import struct
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from gpt2_tvm.errors import UserError

POLL_S = 20.0  # how long an agent's question for work stays open
LOOK_S = 0.25  # how often the agent's program is looked after
ANSWER_S = 900.0  # for one order
TYPES = {".html": "text/html", ".mjs": "text/javascript", ".js": "text/javascript", ".json": "application/json"}
HEADERS = {
    "Cache-Control": "no-store",
    # alone in its process group: a page's clock is rounded to 5 us then, else to 100
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Embedder-Policy": "require-corp",
}


def pack(message: Mapping[str, Any], payload: bytes = b"") -> bytes:
    """The length of a JSON text (4 bytes, little-endian), the text, and raw bytes."""
    head = json.dumps(message).encode()
    return struct.pack("<I", len(head)) + head + payload


def unpack(body: bytes) -> tuple[dict[str, Any], bytes]:
    """The inverse of `pack`; ValueError for anything else."""
    if len(body) < 4 or len(body) < 4 + (length := struct.unpack_from("<I", body)[0]):
        raise ValueError("a message that is cut off")
    return dict(json.loads(body[4 : 4 + length])), body[4 + length :]


class AgentServer:
    """Serves files and orders to one agent, on a thread of its own.

    Args:
        files: what may be fetched, by its name beneath the address ("" is the page).
        port: of the loopback device; 0 for a free one.
        alive: looked at while an answer is awaited; returns None, or what happened to the agent's program.

    address: what the agent is to open. where: its runtime, in words, once it has spoken.
    """

    def __init__(
        self, files: Mapping[str, Path], port: int = 0, alive: Callable[[], str | None] = lambda: None
    ) -> None:
        self.where = ""
        self.alive = alive
        self._files = files
        self._secret = secrets.token_urlsafe(12)
        self._changed = threading.Condition()
        self._polls = 0  # counts the agent's questions: only the last one is still answered
        self._order: bytes | None = None
        self._waiting = False  # an order is with the agent
        self._answer: tuple[dict[str, Any], bytes] | None = None
        self._closed = False
        try:
            self._http = _Http(("127.0.0.1", port), _handler(self))
        except OSError as error:
            raise UserError(f"cannot listen on port {port}: {error.strerror}; choose another") from error
        threading.Thread(target=self._http.serve_forever, daemon=True).start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self._http.server_address[1]}/{self._secret}/"

    def wait(self, seconds: float, who: str) -> None:
        """Return once the agent has spoken. UserError where it ends or `seconds` pass."""
        with self._changed:
            self._until(lambda: bool(self.where), seconds, f"{who} does not start")

    def ask(self, order: Mapping[str, Any], payload: bytes = b"") -> tuple[dict[str, Any], bytes]:
        """Have the agent obey -> its answer. UserError where it fails, its program ends, or nothing comes."""
        with self._changed:
            self._answer, self._order, self._waiting = None, pack(order, payload), True
            self._changed.notify_all()
            try:
                self._until(lambda: self._answer is not None, ANSWER_S, f"{self.where} does not answer")
            finally:
                self._order, self._waiting = None, False
            assert self._answer is not None
            message, received = self._answer
        if "failed" in message:
            raise UserError(f"in {self.where}: {message['failed']}")
        return message, received

    def _until(self, done: Callable[[], bool], seconds: float, otherwise: str) -> None:
        deadline = time.monotonic() + seconds
        while not done():
            if (end := self.alive()) is not None:
                raise UserError(end)
            if time.monotonic() > deadline:
                raise UserError(f"{otherwise}, after {seconds:.0f} s; is the page still open and in front?")
            self._changed.wait(LOOK_S)

    def close(self) -> None:
        """End the server; an agent that asks for work afterwards ends too."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._http.shutdown()
        self._http.server_close()

    # Called by the handler, on its threads ----------------------------------------------------------------------------

    def find(self, path: str) -> tuple[str, Path | None]:
        """(name, file) of a request's path; the file is None for what is not there."""
        parts = path.partition("?")[0].split("/", 2)
        if len(parts) < 3 or not secrets.compare_digest(parts[1].encode(), self._secret.encode()):
            return "", None
        return parts[2], self._files.get(parts[2])

    def exchange(self, body: bytes) -> bytes | None:
        """Take the agent's answer -> its next order, or None for none yet."""
        message, payload = unpack(body)
        with self._changed:
            self._polls += 1
            mine = self._polls
            if "hello" in message:
                self.where = str(message["hello"])
                if self._waiting and self._order is None:
                    self._answer = {"failed": "the page was loaded again: run the command again"}, b""
            elif "again" not in message:
                self._answer = message, payload
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._order is not None or self._polls != mine or self._closed, POLL_S)
            if self._polls != mine or self._closed:
                return None
            order, self._order = self._order, None
            return order


class _Http(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """An agent that ends cuts its connections: nothing to report."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


def _handler(server: AgentServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: Any) -> None:
            pass

        def do_GET(self) -> None:
            _, file = server.find(self.path)
            if file is None or not file.is_file():
                self._reply(404)
                return
            with file.open("rb") as stream, suppress(ConnectionError):
                self._head(200, file.stat().st_size, TYPES.get(file.suffix, "application/octet-stream"))
                shutil.copyfileobj(stream, self.wfile)

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if server.find(self.path)[0] != "work":
                self._reply(404)
                return
            try:
                order = server.exchange(body)
            except ValueError:
                self._reply(400)
                return
            with suppress(ConnectionError):
                self._reply(204 if order is None else 200, order or b"")

        def _head(self, status: int, size: int, kind: str = "application/octet-stream") -> None:
            self.send_response(status)
            for name, value in HEADERS.items():
                self.send_header(name, value)
            if status != 204:
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(size))
            self.end_headers()

        def _reply(self, status: int, body: bytes = b"") -> None:
            self._head(status, len(body))
            if body:
                self.wfile.write(body)

    return Handler
