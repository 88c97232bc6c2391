"""The page's server: what it serves, how, to whom, and what it says about artifacts that no page can load."""

from __future__ import annotations

import http.client
import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from gpt2_tvm import serve_web
from gpt2_tvm.artifact import write_manifest
from gpt2_tvm.errors import UserError
from gpt2_tvm.serve_web import Server, open_for_pages


def make_artifact(folder: Path, module: bool = True, kind: str = "webgpu") -> Path:
    """A folder that has an artifact's files, with nothing sensible in them."""
    files = {
        "lib.so": b"elf",
        "kernels.json": b"{}",
        "kernels.x.wgsl": b"fn",
        "params/params_shard_0.bin": bytes(range(256)) * 9000,
    }
    files |= {"params/tensor-cache.json": b"{}", "tokenizer/vocab.json": b"{}"} | (
        {"model.wasm": b"\0asm"} if module else {}
    )
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    facts = {"model": "m", "quantization": "q0f32", "rules": ["gemv"], "max_seq_len": 64, "random_weights": False}
    write_manifest(folder, {**facts, "target": {"kind": kind}})
    return folder


@contextmanager
def serving(*folders: Path, page: Path = serve_web.PAGE) -> Iterator[Server]:
    with Server(open_for_pages(list(folders)), 0, page) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_artifact(tmp_path_factory.mktemp("served") / "my model")


@pytest.fixture(scope="module")
def server(artifact: Path) -> Iterator[Server]:
    with serving(artifact) as server:
        yield server


def get(
    server: Server, path: str, method: str = "GET", host: str | None = None
) -> tuple[int, http.client.HTTPMessage, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=10)
    connection.request(method, path, headers={} if host is None else {"Host": host})
    response = connection.getresponse()
    body = response.read()
    connection.close()
    return response.status, response.headers, body


def test_the_page_and_its_headers(server: Server) -> None:
    kinds = {"/": "text/html; charset=utf-8", "/page.js": "text/javascript; charset=utf-8"}
    kinds |= {"/page.css": "text/css; charset=utf-8", "/icon.svg": "image/svg+xml"}
    for path, kind in kinds.items():
        status, headers, body = get(server, path)
        assert (status, headers["Content-Type"], int(headers["Content-Length"])) == (200, kind, len(body))
        assert body == (serve_web.PAGE / (path[1:] or "index.html")).read_bytes()
        policy = headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy and "connect-src 'self'" in policy and "http" not in policy
        assert headers["Cross-Origin-Opener-Policy"] == "same-origin"
        assert headers["Cross-Origin-Embedder-Policy"] == "require-corp"
        assert headers["X-Content-Type-Options"] == "nosniff"


def test_the_list_and_an_artifact(server: Server, artifact: Path) -> None:
    (listed,) = json.loads(get(server, "/artifacts.json")[2])
    assert listed["name"] == "my model" and listed["url"] == "/artifacts/my%20model/"
    manifest = json.loads((artifact / "manifest.json").read_text())
    wanted = [name for name in manifest["files"] if name != "lib.so"]
    loaded = [name for name in wanted if not name.startswith("kernels")]
    assert listed["bytes"] == sum(manifest["files"][name]["bytes"] for name in loaded)
    for name in [*wanted, "manifest.json"]:
        status, headers, body = get(server, listed["url"] + name)
        assert status == 200 and body == (artifact / name).read_bytes(), name
        assert headers["Cache-Control"] == "no-store"
    assert get(server, listed["url"] + "model.wasm")[1]["Content-Type"] == "application/wasm"
    status, headers, body = get(server, listed["url"] + "params/params_shard_0.bin", "HEAD")
    assert (status, body, headers["Content-Length"]) == (200, b"", str(256 * 9000))


@pytest.mark.parametrize(
    "path",
    [
        *("/artifacts/my%20model/lib.so", "/artifacts/my%20model/", "/artifacts/my%20model/../../pyproject.toml"),
        *("/artifacts/my%20model/%2e%2e/x", "/sources.json", "/../serve_web.py", "//etc/passwd", "/nothing"),
    ],
)
def test_nothing_else_is_served(server: Server, path: str) -> None:
    status, headers, _ = get(server, path)
    assert status == 404 and "Content-Security-Policy" in headers


def test_other_sites_are_turned_away(server: Server) -> None:
    assert get(server, "/artifacts.json", host="evil.example:8324")[0] == 421
    assert get(server, "/artifacts.json", host=f"localhost:{server.server_port}")[0] == 200
    assert server.server_address[0] == "127.0.0.1"


def test_a_file_that_goes_away_is_a_404(tmp_path: Path) -> None:
    folder = make_artifact(tmp_path / "a")
    with serving(folder) as server:
        (folder / "model.wasm").unlink()
        status, _, body = get(server, "/artifacts/a/model.wasm")
        assert status == 404 and b"model.wasm" in body
        assert get(server, "/artifacts/a/kernels.json")[0] == 200


def test_folders_of_one_name(tmp_path: Path) -> None:
    found = open_for_pages([make_artifact(tmp_path / "x/a"), make_artifact(tmp_path / "y/a")])
    assert [artifact.url for artifact in found] == ["/artifacts/a/", "/artifacts/a-2/"]


def test_one_line_for_what_no_page_can_load(tmp_path: Path) -> None:
    def complaint(folder: Path) -> str:
        with pytest.raises(UserError) as caught:
            open_for_pages([folder])
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "has no model.wasm: it was compiled without emcc" in complaint(make_artifact(tmp_path / "a", module=False))
    assert "it is for cpu; compile it again with --target webgpu" in complaint(
        make_artifact(tmp_path / "b", module=False, kind="cpu")
    )
    assert "no artifact at" in complaint(tmp_path / "nowhere")
    short = make_artifact(tmp_path / "c")
    (short / "model.wasm").write_bytes(b"")
    assert "truncated" in complaint(short)


def test_a_taken_port_and_a_page_that_is_not_there(server: Server, artifact: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"port {server.server_port} cannot be listened on.*--port"):
        Server([], server.server_port)
    with pytest.raises(UserError, match="port 70000"):
        Server([], 70000)
    shutil.copytree(serve_web.PAGE, tmp_path / "page")
    (tmp_path / "page/page.js").unlink()
    with pytest.raises(UserError, match=r"page\.js is missing.*npm run build"):
        Server([], 0, tmp_path / "page")


def test_the_command(artifact: Path) -> None:
    command = [sys.executable, "-m", "gpt2_tvm.serve_web", str(artifact), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("open http://127.0.0.1:")
        port = int(line.split(":")[2].split("/")[0])
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        connection.request("GET", "/")
        assert connection.getresponse().status == 200
        connection.close()
        process.terminate()
        assert process.wait(10) != 0
    done = subprocess.run([*command[:3], "nowhere"], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("error: no artifact at nowhere")
    assert done.stderr.count("\n") == 1
