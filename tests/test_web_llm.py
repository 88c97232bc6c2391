"""web-llm, as npm has it, with the exported model in headless Chromium; and what the choice of its release rests on."""

from __future__ import annotations

import json
import os
import re
import subprocess
import threading
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import page_tools
import pytest

from gpt2_tvm import compile_model, export_mlc
from gpt2_tvm.data import bundled_model
from gpt2_tvm.decoding.tokens import Generation
from gpt2_tvm.engine import Engine
from gpt2_tvm.errors import UserError
from gpt2_tvm.mlc.page import WEB_LLM, page_server
from gpt2_tvm.tokenizer import load_tokenizer
from gpt2_tvm.toolchains import web
from gpt2_tvm.toolchains.webruntime import emscripten

PROMPT = "It is a truth universally acknowledged, that"
ANOTHER = "Elizabeth looked at him, and"
LONG = (  # of several chunks
    "My dear Mr. Bennet, said his lady to him one day, have you heard that Netherfield Park is let at last? Mr. Bennet "
    "replied that he had not. But it is, returned she; for Mrs. Long has just been here, and she told me all about it."
)
TOKENS, CHUNK = 32, 24
RUNTIME = re.compile(r"TVMFFI[A-Za-z]+")


def pinned() -> dict[str, Any]:
    package = page_tools.WEB / "node_modules/@mlc-ai/web-llm/package.json"
    found: dict[str, Any] = json.loads(package.read_text(encoding="utf-8"))
    return found


def minor(text: str) -> list[str]:
    return re.findall(r"\d+", text)[:2]


def test_the_pinned_release_has_the_runtime_of_this_tvm() -> None:
    """0.2.83 has a runtime of 0.24, with which the page did not load our library; 0.2.86 has one of 0.28."""
    page_tools.packages()
    package = json.loads((page_tools.WEB / "package.json").read_text(encoding="utf-8"))
    assert package["devDependencies"]["@mlc-ai/web-llm"] == pinned()["version"]
    runtime = pinned()["devDependencies"]["@mlc-ai/web-runtime"]
    ours = package["dependencies"]["@mlc-ai/web-runtime"]
    assert minor(runtime) == minor(ours) == minor(version("apache-tvm"))
    bundled, alone = ((page_tools.WEB / name).read_text(encoding="utf-8") for name in (WEB_LLM, web.JS_RUNTIME))
    assert set(RUNTIME.findall(bundled)) == set(RUNTIME.findall(alone))  # it calls the same C functions


def test_folders_that_no_page_can_load(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--target webgpu --interface mlc"):
        page_server(tmp_path, 0)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    page_tools.packages()
    page_tools.browser()
    if emscripten.find() is None:
        pytest.skip(f"emcc is missing: {emscripten.HOW_TO_GET_IT}")
    folder = tmp_path_factory.mktemp("web-llm")
    artifact = compile_model("bundled", "webgpu", output=folder / "a", interface="mlc", prefill_chunk=CHUNK)
    export_mlc.export(artifact, folder / "austen")
    return folder / "austen"


@pytest.fixture(scope="module")
def address(exported: Path) -> Iterator[str]:
    with page_server(exported, 0) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        yield server.address
        server.shutdown()


def drive(address: str, steps: list[list[Any]], plain: bool = False) -> dict[str, Any]:
    """The answers of web-llm on the page to `steps`, see web/test/mlc.mjs."""
    given = json.dumps({"plain": plain, "steps": steps})
    command = ["node", str(page_tools.WEB / "test/mlc.mjs"), address, given]
    environment = {**os.environ, "CHROMIUM": page_tools.browser()}
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, timeout=1800, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 0, done.stderr[-3000:]
    seen: dict[str, Any] = json.loads(done.stdout)
    assert seen["problem"] is None and seen["errors"] == []
    assert {urlsplit(url).netloc for url in seen["requests"]} == {urlsplit(address).netloc}
    return seen


@pytest.mark.heavy
def test_its_greedy_completions_are_our_engines(address: str, bundled_artifact: Path) -> None:
    engine, tokenizer = Engine(bundled_artifact), load_tokenizer(bundled_model())

    def ours(prompt: str, tokens: int) -> list[int]:
        engine.reset()
        return list(Generation(engine, tokenizer.encode(prompt), tokens))

    expected, another = ours(PROMPT, TOKENS), ours(ANOTHER, 16)
    text = tokenizer.decode(expected)
    stop = text[len(text) // 2 :].split()[1]  # a word in the middle
    steps = [
        ["complete", PROMPT, {"tokens": TOKENS}],
        ["complete", ANOTHER, {"tokens": 16}],  # a second request
        ["reset"],
        ["complete", PROMPT, {"tokens": TOKENS, "stop": stop}],
        ["press", PROMPT, 8],
    ]
    first, second, _, stopped, pressed = drive(address, steps)["answers"]
    assert first["ids"] == expected and first["text"] == text and first["finish"] == "length"
    assert first["usage"]["prompt_tokens"] == len(tokenizer.encode(PROMPT))
    assert second["ids"] == another
    assert stopped["finish"] == "stop" and stopped["text"] == text[: text.index(stop)]
    assert stopped["ids"] == expected[: len(stopped["ids"])] and len(stopped["ids"]) < TOKENS
    assert pressed["text"] == PROMPT + tokenizer.decode(expected[:8])


@pytest.mark.heavy
def test_nothing_depends_on_the_recorder_of_ids(address: str, bundled_artifact: Path) -> None:
    engine, tokenizer = Engine(bundled_artifact), load_tokenizer(bundled_model())
    expected = tokenizer.decode(list(Generation(engine, tokenizer.encode(PROMPT), 16)))
    (made,) = drive(address, [["complete", PROMPT, {"tokens": 16}]], plain=True)["answers"]
    assert made["ids"] is None and made["text"] == expected


@pytest.mark.heavy
def test_a_prompt_in_chunks(address: str, bundled_artifact: Path) -> None:
    engine, tokenizer = Engine(bundled_artifact), load_tokenizer(bundled_model())
    prompt = tokenizer.encode(LONG)
    assert len(prompt) > 2 * CHUNK
    # a last chunk of one token, a full one, one that ends with a page, and one in the middle of one
    prompts = [prompt[:length] for length in (2 * CHUNK + 1, 2 * CHUNK, CHUNK + 8, len(prompt))]
    texts = [tokenizer.decode(ids) for ids in prompts]
    assert [tokenizer.encode(text) for text in texts] == prompts
    made = drive(address, [["complete", text, {"tokens": 8}] for text in texts])["answers"]
    for ids, answer in zip(prompts, made, strict=True):
        assert answer["usage"]["prompt_tokens"] == len(ids)
        engine.reset()
        assert answer["ids"] == list(Generation(engine, ids, 8)), len(ids)
