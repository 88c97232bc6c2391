"""Where a model's name leads: a folder, the bundled model, the hub (one is served here), random weights."""

from __future__ import annotations

import http.server
import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from gpt2_tvm.checkpoint import _can_connect, random_model, resolve_model
from gpt2_tvm.config import PRESETS, GPT2Config
from gpt2_tvm.errors import UserError
from gpt2_tvm.weights import iter_weights, write_hf_checkpoint

CONFIG = GPT2Config(vocab_size=61, n_positions=16, n_embd=24, n_layer=2, n_head=3)


def checkpoint(folder: Path) -> Path:
    return write_hf_checkpoint(folder, CONFIG, random_model(CONFIG))


def test_a_folder_is_taken_before_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    checkpoint(tmp_path / "gpt2")
    source = resolve_model("gpt2")
    assert (source.name, source.config, source.random) == ("gpt2", CONFIG, False)
    assert resolve_model("./gpt2").name == resolve_model(str(tmp_path / "gpt2")).name == "gpt2"


def test_random_models_by_name_and_by_shape() -> None:
    assert random_model("distilgpt2", seed=2).config == PRESETS["distilgpt2"]
    assert random_model(CONFIG).note is not None and random_model(CONFIG, name="toy").name == "toy"
    with pytest.raises(UserError, match="no preset is called 'gpt3'"):
        random_model("gpt3")


def test_names_of_the_bundled_model() -> None:
    for name in ("bundled", "austen-target"):
        source = resolve_model(name)
        assert source.folder is not None and not source.random and source.note is None
        assert source.config.num_parameters() == 5_394_432 == sum(w.size for _, w in iter_weights(source))


def test_a_preset_without_a_network_is_random_and_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    source = resolve_model("gpt2-medium", seed=4)
    assert (source.random, source.seed, source.config) == (True, 4, PRESETS["gpt2-medium"])
    assert source.note is not None and "random" in source.note and "HF_HUB_OFFLINE" in source.note
    assert "\n" not in source.note
    with pytest.raises(UserError, match="HF_HUB_OFFLINE"):
        resolve_model("somebody/some-gpt2")


@pytest.mark.parametrize("endpoint", ["http://127.0.0.1:9", "http://192.0.2.1", "http://no-such-host.invalid"])
def test_a_hub_out_of_reach_is_noticed_within_ten_seconds(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, endpoint: str
) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("HF_ENDPOINT", endpoint)  # refuses; swallows packets (TEST-NET-1); does not resolve
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    start = time.monotonic()
    source = resolve_model("gpt2")
    assert time.monotonic() - start < 10
    assert source.random and source.note is not None and "cannot be reached" in source.note


def test_a_resolver_that_hangs_does_not_hold_us_up(monkeypatch: pytest.MonkeyPatch) -> None:
    released = threading.Event()

    def stuck(*_: object, **__: object) -> list[object]:
        released.wait(30)
        raise OSError("no answer")

    monkeypatch.setattr(socket, "getaddrinfo", stuck)
    start = time.monotonic()
    try:
        assert not _can_connect(timeout_s=0.2)
    finally:
        released.set()
    assert time.monotonic() - start < 5


def test_what_is_no_model_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    checkpoint(tmp_path / "pickled")
    (tmp_path / "pickled" / "model.safetensors").rename(tmp_path / "pickled" / "pytorch_model.bin")
    checkpoint(tmp_path / "bare")
    (tmp_path / "bare" / "model.safetensors").unlink()
    (tmp_path / "empty").mkdir()
    refused = {
        "pickled": "save_pretrained",
        "pickled/pytorch_model.bin": "save_pretrained",
        "bare": "has neither",
        "bare/config.json": "give the folder",
        "empty": "has no config.json",
        "nowhere/at/all": "there is no folder",
    }
    for name, said in refused.items():
        with pytest.raises(UserError, match=said):
            resolve_model(str(tmp_path / name))


class _Hub(http.server.BaseHTTPRequestHandler):
    """As much of the hub's interface as a download of one repository needs."""

    repository, sha, folder = "someone/tiny", "0" * 40, Path()
    requested: tuple[str, ...] = ()

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        files = {p.name: p for p in self.folder.iterdir()}
        type(self).requested += (path,)
        sizes = {name: p.stat().st_size for name, p in files.items()}
        entries = [{"type": "file", "path": name, "size": size, "oid": name} for name, size in sizes.items()]
        if path == f"/api/models/{self.repository}/revision/main":
            siblings = [{"rfilename": name} for name in files]
            return self._send(json.dumps({"id": self.repository, "sha": self.sha, "siblings": siblings}).encode())
        if path == f"/api/models/{self.repository}/tree/{self.sha}":
            return self._send(json.dumps(entries).encode())
        if path.startswith(f"/{self.repository}/resolve/"):
            return self._send(files[path.split("/")[-1]].read_bytes())
        return self._send(b'{"error": "not found"}', 404, {"X-Error-Code": "RepoNotFound"})

    do_HEAD = do_GET

    def _send(self, body: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        etag = {
            "ETag": f'"{abs(hash(self.path)):x}"',
            "X-Repo-Commit": self.sha,
            "Content-Length": str(len(body)),
        }
        for key, value in {**etag, **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def test_a_hub_model_is_downloaded_then_served_from_the_cache(tmp_path: Path) -> None:
    served = tmp_path / "served"
    checkpoint(served)
    (served / "pytorch_model.bin").write_bytes(b"never asked for")
    handler = type("Hub", (_Hub,), {"folder": served})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = {
        **os.environ,
        "HF_HOME": str(tmp_path / "cache"),
        "NO_PROXY": "*",
        "HF_HUB_DISABLE_XET": "1",
    }
    environment["HF_ENDPOINT"] = f"http://127.0.0.1:{server.server_port}"
    environment.pop("HF_HUB_OFFLINE", None)
    script = (
        "import sys\n"
        "from gpt2_tvm.checkpoint import resolve_model\n"
        "from gpt2_tvm.weights import iter_weights\n"
        "s = resolve_model(sys.argv[1]); print(s.name, s.random, sum(w.size for _, w in iter_weights(s)))"
    )

    def resolve(name: str, **more: str) -> subprocess.CompletedProcess[str]:
        command, env = [sys.executable, "-c", script, name], {**environment, **more}
        return subprocess.run(command, capture_output=True, text=True, env=env, cwd=tmp_path)

    expected = f"tiny False {CONFIG.num_parameters()}\n"
    first = resolve("someone/tiny")
    assert first.stdout == expected, first.stderr
    assert not any(path.endswith(".bin") for path in handler.requested)
    unknown = resolve("someone/else").stderr
    assert "UserError" in unknown and "no public model someone/else" in unknown
    server.shutdown()
    server.server_close()
    assert resolve("someone/tiny").stdout == expected  # out of reach
    assert resolve("someone/tiny", HF_HUB_OFFLINE="1").stdout == expected
