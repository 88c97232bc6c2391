"""`python -m gpt2_tvm.serve_web ARTIFACT…`: the browser page, with artifacts for it, on this machine alone."""

from __future__ import annotations

import json
import sys
import threading
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote, unquote, urlsplit

import typer

from gpt2_tvm.cli import run
from gpt2_tvm.errors import UserError

app = typer.Typer(add_completion=False, rich_markup_mode=None)

PAGE = Path(__file__).with_name("web_page")  # built by `npm run build --prefix web`
PAGE_FILES = ("index.html", "page.js", "page.css", "icon.svg")
NATIVE = (".so", ".dylib", ".dll", ".tar")
MODULE = "model.wasm"  # toolchains.web.MODULE, which takes longer to import
PORT = 8324  # one and the same every time: a browser keeps files by address and port
LOOPBACK = "127.0.0.1"
NAMES = ("127.0.0.1", "localhost")  # asked for by another name, it is another site that was pointed at this machine
PIECE = 1 << 20

TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
    ".json": "application/json",
    ".txt": "text/plain; charset=utf-8",
    ".wgsl": "text/plain; charset=utf-8",
    ".wasm": "application/wasm",
}
HEADERS = {
    # The page may ask this server and nobody else; WebAssembly needs its own word.
    "Content-Security-Policy": "default-src 'none'; script-src 'self' 'wasm-unsafe-eval'; style-src 'self'; "
    "img-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    # An isolated page has clocks of 5 microseconds instead of 100.
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Embedder-Policy": "require-corp",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",  # the page keeps files itself, by their sha256
}


@dataclass(frozen=True)
class Served:
    """One artifact as the page's list shows it; "bytes" there is what a browser loads, a few kilobytes aside."""

    folder: Path
    name: str
    manifest: dict[str, Any]

    @property
    def url(self) -> str:
        return f"/artifacts/{quote(self.name)}/"

    @property
    def files(self) -> list[str]:
        """What a page may ask for: all but machine code for programs outside a browser."""
        return ["manifest.json", *(name for name in self.manifest["files"] if Path(name).suffix not in NATIVE)]

    def to_json(self) -> dict[str, Any]:
        files = self.manifest["files"]
        size = sum(files[name]["bytes"] for name in files if name.startswith(("params/", "tokenizer/", MODULE)))
        facts = {key: self.manifest[key] for key in ("model", "quantization", "rules", "max_seq_len", "random_weights")}
        return {"name": self.name, "url": self.url, "bytes": size, **facts}


def open_for_pages(folders: list[Path]) -> list[Served]:
    """The artifacts, each with a name of its own; UserError for one that is damaged, or that no page can load.

    Sizes are compared with the manifest, contents are not: the page does that as it loads them.
    """
    from gpt2_tvm.artifact import open_artifact

    served: dict[str, Served] = {}
    for folder in folders:
        manifest = open_artifact(folder, verify=False, versions=False).manifest
        if MODULE not in manifest["files"]:
            kind = manifest["target"]["kind"]
            how = "it was compiled without emcc (Debian: emscripten)" if kind == "webgpu" else f"it is for {kind}"
            raise UserError(
                f"{folder} has no {MODULE}: {how}; compile it again with --target webgpu where emcc is installed"
            )
        base = folder.resolve().name
        names = (base, *(f"{base}-{i}" for i in range(2, len(folders) + 1)))
        name = next(name for name in names if name not in served)
        served[name] = Served(folder.resolve(), name, manifest)
    return list(served.values())


class LoopbackServer(ThreadingHTTPServer):
    """Serves `files`, {path in the address: file}, and `answers`, {path: JSON}, to this machine alone until `shutdown`.

    port: 0 for any that is free; `address` says which it became. Raises UserError where the port is taken.
    """

    daemon_threads = True

    def __init__(self, files: dict[str, Path], answers: dict[str, bytes], port: int) -> None:
        self.files, self.answers = files, answers
        try:
            super().__init__((LOOPBACK, port), _Handler)
        except (OSError, OverflowError):
            raise UserError(f"port {port} cannot be listened on; is it taken? Choose another with --port") from None

    @property
    def address(self) -> str:
        return f"http://{LOOPBACK}:{self.server_port}/"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that hangs up in the middle (a reload, a closed tab) is no error."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class Server(LoopbackServer):
    """Serves the page and `artifacts`. page: the folder of another bundle. Raises UserError where it is not in the
    installation."""

    def __init__(self, artifacts: list[Served], port: int = PORT, page: Path = PAGE) -> None:
        missing = [name for name in PAGE_FILES if not (page / name).is_file()]
        if missing:
            raise UserError(
                f"the page is not in this installation ({page / missing[0]} is missing); "
                "install the package again, or build it: npm ci --prefix web && npm run build --prefix web"
            )
        files = {f"/{name}": page / name for name in PAGE_FILES}
        files["/"] = page / "index.html"
        for artifact in artifacts:
            for name in artifact.files:
                files[unquote(artifact.url) + name] = artifact.folder / name
        listed = json.dumps([artifact.to_json() for artifact in artifacts]).encode()
        super().__init__(files, {"/artifacts.json": listed}, port)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "gpt2-tvm", ""
    timeout = 60  # seconds that an idle connection is kept
    server: LoopbackServer

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def _answer(self, body: bool) -> None:
        host = self.headers.get("Host", "").rsplit(":", 1)[0]
        path = unquote(urlsplit(self.path).path)
        if host not in NAMES:
            self._say(HTTPStatus.MISDIRECTED_REQUEST, f"open http://{LOOPBACK}:{self.server.server_port}/", body)
        elif path in self.server.answers:
            self._begin(HTTPStatus.OK, TYPES[".json"], len(self.server.answers[path]))
            if body:
                self.wfile.write(self.server.answers[path])
        elif path in self.server.files:
            self._file(self.server.files[path], body)
        else:
            self._say(HTTPStatus.NOT_FOUND, f"there is no {path} here", body)

    def _file(self, file: Path, body: bool) -> None:
        try:
            stream = file.open("rb")
        except OSError as error:
            self._say(HTTPStatus.NOT_FOUND, f"{file.name}: {error.strerror}", body)
            return
        with stream:
            left = stream.seek(0, 2)
            stream.seek(0)
            self._begin(HTTPStatus.OK, TYPES.get(file.suffix, "application/octet-stream"), left)
            while body and left > 0:
                piece = stream.read(min(PIECE, left))
                if not piece:  # it became shorter meanwhile: the browser sees a connection that ends too early
                    self.close_connection = True
                    return
                self.wfile.write(piece)
                left -= len(piece)

    def _say(self, status: HTTPStatus, text: str, body: bool) -> None:
        line = (text + "\n").encode()
        self._begin(status, TYPES[".txt"], len(line))
        if body:
            self.wfile.write(line)

    def _begin(self, status: HTTPStatus, kind: str, size: int) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(size))
        for name, value in HEADERS.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet: what goes wrong, the page says."""


@app.command()
def main(
    artifacts: Annotated[
        list[Path], typer.Argument(metavar="ARTIFACT...", help="Folders made by compile with --target webgpu.")
    ],
    port: Annotated[
        int, typer.Option(help="Where to listen; 0 for any free port. Browsers keep loaded models by port.")
    ] = PORT,
    open_: Annotated[bool, typer.Option("--open/--no-open", help="Also open the page in the default browser.")] = False,
) -> None:
    """Serve a page that runs compiled models in the browser, on its graphics device through WebGPU.

    Only programs on this machine can reach it. It needs no network and no npm; end it with Ctrl+C.

    \b
    python -m gpt2_tvm.compile --model bundled --target webgpu --output artifacts/austen-webgpu
    python -m gpt2_tvm.serve_web artifacts/austen-webgpu
    """
    with Server(open_for_pages(artifacts), port) as server:
        print(f"open {server.address} in Chrome, Edge, Safari or Firefox; Ctrl+C ends it", flush=True)
        if open_:
            import webbrowser

            threading.Thread(target=webbrowser.open, args=(server.address,), daemon=True).start()
        server.serve_forever(poll_interval=0.2)


if __name__ == "__main__":
    run(app)
