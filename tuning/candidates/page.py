"""A browser page that takes part in a sweep: TVM's RPC proxy, the page that it serves, and a browser that shows it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

from gpt2_tvm.errors import UserError
from gpt2_tvm.runners import chromium
from gpt2_tvm.runners.guard import STOP_S
from gpt2_tvm.toolchains import web

KEY = "page"  # of web/rpc/page.js
PAGE_S = 30.0  # a browser starts, or a page loads again
ELSE = ", or give --page-port and open the page in a browser of yours"


class Page:
    """A page with TVM's RPC server in it, reached through TVM's RPC proxy.

    port: where the page is served; None for a free one. browser: the program that shows it, headless; None to wait for
    one that somebody else opens. log: the browser's messages go there.
    """

    def __init__(self, port: int | None = None, browser: str | None = None) -> None:
        root = web.WEB / "rpc"
        self.port = port or web.free_port()
        self.address = f"http://127.0.0.1:{self.port}/"
        self.folder = Path(tempfile.mkdtemp(prefix="gpt2-tvm-page-"))
        self.log = self.folder / "browser.log"
        self._rpc_port = web.free_port()
        self._seen = 0  # bytes of the log that are of earlier loads of the page
        asked = {
            "port": self._rpc_port,
            "web_port": self.port,
            "wait_s": PAGE_S,
            "index": str(root / "index.html"),
            "files": [("/", str(web.js_runtime())), ("/", str(root / "page.js"))],
            "browser": chromium.command(browser, self.folder / "profile", self.address) if browser else None,
            "log": str(self.log),
            "folder": str(self.folder),
        }
        self.server = subprocess.Popen(
            [sys.executable, "-m", "tuning.candidates.page_server"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert self.server.stdin is not None and self.server.stdout is not None
        self.server.stdin.write(json.dumps(asked).encode() + b"\n")
        self.server.stdin.flush()
        if self.server.stdout.readline().strip() != b"ready":
            self.close()
            raise UserError(f"TVM's RPC proxy did not start; is port {self.port} taken? Choose another --page-port")

    def connect(self, module: bytes) -> Any:
        """A TVM RPC session in a fresh load of the page, which instantiates `module`.

        Raises what TVM raises where no page is there in `PAGE_S`.
        """
        from tvm import rpc

        self._seen = self.log.stat().st_size if self.log.is_file() else 0
        return rpc.connect("127.0.0.1", self._rpc_port, key=KEY, session_constructor_args=["rpc.WasmSession", module])

    def complaint(self) -> str:
        """The last error on the browser's console since `connect`; "" if none, or in a browser not ours."""
        try:
            lines = self.log.read_bytes()[self._seen :].decode(errors="replace").splitlines()
        except OSError:
            return ""
        found = [m[1] for line in lines if (m := re.search(r'CONSOLE[^"]*"(.*)", source', line))]
        errors = [text for text in found if re.search(r"error|failed|abort|no WebGPU", text, re.I)]
        return errors[-1] if errors else ""

    def close(self) -> None:
        """End the browser and the proxy. They also end with this process."""
        with suppress(OSError):
            if self.server.stdin is not None:
                self.server.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            self.server.wait(2 * STOP_S)
        if self.server.poll() is None:
            self.server.kill()


def leave(session: Any) -> None:
    """End a session while objects of it are still held, an exception's traceback among them."""
    with suppress(RuntimeError, AttributeError):  # it has ended already
        session.get_function("gpt2_tvm.leave")()


def page_facts(session: Any) -> dict[str, Any]:
    """What the page says of itself: vendor, architecture, device, description, agent, fallback, faults."""
    return dict(json.loads(str(session.get_function("gpt2_tvm.page")())))


def browser_arguments(port: int | None, say: Any) -> tuple[int | None, str | None]:
    """(port, browser) for `browser.BrowserCandidates`, with everything that a page needs checked and built first.

    port: where a browser of the user's is to open the page; None to start a headless one. say: told of long work, and
    of the address. UserError for what is missing: emcc, the JavaScript packages, tornado, a browser.
    """
    from importlib.util import find_spec

    from gpt2_tvm.toolchains.webruntime.build import runtime_objects

    if find_spec("tornado") is None:
        raise UserError("TVM's RPC proxy needs tornado; run: pip install tornado")
    web.js_runtime()
    browser = chromium.require_browser(ELSE) if port is None else None
    runtime_objects(say)
    if port is not None:
        say(f"open http://127.0.0.1:{port}/ in the browser that is to measure, and leave the page in front")
    return port, browser
