"""A small random model in node and in a headless Chromium: the engine's interface, and what goes wrong.

No test asserts a timing.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import web_tools
from web_models import compile_for_the_web

from gpt2_tvm.artifact import Artifact, open_artifact
from gpt2_tvm.engine import Engine
from gpt2_tvm.errors import UserError
from gpt2_tvm.runners.web import Agent, WebRunner
from targets import load_target

pytestmark = pytest.mark.heavy

PROMPT = [5, 1, 4, 1, 5, 9, 2, 6]
TOKENS = 12


@pytest.fixture(scope="module")
def small(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    # plain kernels: their shaders are compiled in a second, and this file loads them a dozen times
    folder = tmp_path_factory.mktemp("web") / "tiny"
    return compile_for_the_web(str(tiny_model), folder, (4,), rules="baseline", attention="materialized")


@pytest.fixture(scope="module")
def expected(tiny_artifact: Path) -> list[int]:
    engine = Engine(tiny_artifact)
    engine.prefill(PROMPT)
    return [int(i) for i in engine.decode_greedy(TOKENS)[0]]


@pytest.fixture(scope="module")
def agent(small: Path) -> Iterator[Agent]:
    web_tools.dawn_device()
    made = Agent(open_artifact(small), "node")
    yield made
    made.close()


@pytest.fixture(scope="module")
def windowed(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Compiled for a device that binds less than the table of tokens: kernels take it in windows."""
    folder = tmp_path_factory.mktemp("windows")
    text = load_target("webgpu").path.read_text(encoding="utf-8")
    target = folder / "small.toml"
    target.write_text(text.replace("134217728", "12300").replace('name = "webgpu"', 'name = "small"'))
    return compile_for_the_web(str(tiny_model), folder / "tiny", target=str(target), max_seq_len=24)


def tokens(agent: Agent, do: str = "turn") -> list[int]:
    return agent.ask({"do": do, "ids": PROMPT, "count": TOKENS})[0]["tokens"]


def loaded(artifact: Path) -> Callable[[], Agent]:
    """Loading without looking at the files first, as a page does."""

    def load() -> Agent:
        web_tools.dawn_device()
        return Agent(Artifact(artifact, json.loads((artifact / "manifest.json").read_text())), "node")

    return load


def test_a_table_larger_than_a_binding(windowed: Path, tiny_artifact: Path) -> None:
    """TVM's runtime binds whole buffers; the page's device binds the parts that the kernels take."""
    web_tools.dawn_device()
    here, agent = Engine(tiny_artifact), Agent(open_artifact(windowed), "node")
    here.prefill(PROMPT)
    expected = [int(i) for i in here.decode_greedy(TOKENS)[0]]
    streamed = agent.ask({"do": "stream", "ids": PROMPT, "count": TOKENS})[0]
    agent.close()
    assert streamed["tokens"] == expected
    # two windows each for embedding, head, and two layers' products in and out of the MLP; in the prefill, in each step
    assert streamed["windows"] == 2 * (2 + 2 * 2) * (TOKENS + 1)
    limits = open_artifact(windowed).manifest["webgpu"]["limits"]
    assert limits["maxStorageBufferBindingSize"] <= 12300 < 97 * 32 * 4 < limits["maxBufferSize"] == 128 * 32 * 4


def test_the_engine_does_all_of_its_calls_in_node(small: Path, tiny_artifact: Path) -> None:
    web_tools.dawn_device()
    there, here = Engine(small, "node"), Engine(tiny_artifact)
    both = (there, here)

    def same(call: Callable[[Engine], Any]) -> None:
        got, want = (call(engine) for engine in both)
        assert np.allclose(got, want, atol=1e-4, rtol=1e-3) and np.ptp(want) > 0

    assert "Dawn" in there.runner.device_name and there.threads is None
    same(lambda e: e.prefill(PROMPT))
    same(lambda e: e.decode(7))
    same(lambda e: e.verify([3, 1, 2]))
    for engine in both:
        engine.rewind(4)
    same(lambda e: e.verify([3, 1, 2], [-1, 0, 0]))
    for engine in both:
        engine.keep([0, 2])
    same(lambda e: e.decode(11))
    same(lambda e: e.decode_greedy(5))
    same(lambda e: e.score([1, 2, 3, 4, 5]))
    assert isinstance(there.runner, WebRunner)
    there.runner.agent.close()


def test_a_page_in_chromium_says_what_node_says(small: Path, expected: list[int]) -> None:
    web_tools.packages()
    web_tools.browser()
    page = Agent(open_artifact(small), "chromium")
    try:
        assert "Chrom" in page.where and page.facts["limits"]["maxComputeInvocationsPerWorkgroup"] >= 256
        assert tokens(page) == expected and tokens(page, "stream") == expected
        assert page.peak_rss_mb() > 50
    finally:
        page.close()


def test_kernels_are_counted_and_timed(agent: Agent, small: Path) -> None:
    listed = json.loads((small / "kernels.json").read_text())["functions"]
    found, _ = agent.ask({"do": "profile", "ids": PROMPT, "count": 3})
    assert agent.facts["timestamps"], "SwiftShader has timestamps; without them this test shows nothing"
    assert len(found["step"]) == found["kernels"] == len(listed["decode_b1"]["launches"])
    assert len(found["prefill"]) == len(listed["prefill"]["launches"])
    assert min(found["step"]) >= 0 and sum(found["step"]) > 0
    assert len({round(us, 3) for us in found["step"]}) > 2  # not rounded to a tenth of a millisecond


def test_a_lost_device_is_told_and_a_model_loaded_anew_works(agent: Agent, expected: list[int]) -> None:
    assert tokens(agent) == expected
    agent.ask({"do": "lose"})
    for _ in range(2):
        with pytest.raises(UserError, match=r"the graphics device was lost.*load the model again"):
            tokens(agent)
    agent.ask({"do": "load"})
    assert tokens(agent) == expected and tokens(agent, "stream") == expected


def test_a_device_lost_in_the_middle_of_a_text(agent: Agent, expected: list[int]) -> None:
    with pytest.raises(UserError, match="the graphics device was lost"):
        agent.ask({"do": "stream", "ids": PROMPT, "count": TOKENS, "lose_after": 3})
    agent.ask({"do": "load"})
    assert tokens(agent, "stream") == expected


def test_text_beyond_the_context_is_refused_and_the_model_stays_usable(agent: Agent, expected: list[int]) -> None:
    with pytest.raises(UserError, match="this model holds 48"):
        agent.ask({"do": "turn", "ids": PROMPT, "count": 41})
    with pytest.raises(UserError, match="token 97 is outside the vocabulary of 97"):
        agent.ask({"do": "turn", "ids": [97], "count": 1})
    assert tokens(agent) == expected


@pytest.mark.parametrize(
    "name", ["params/params_shard_0.bin", "params/tensor-cache.json", "model.wasm", "manifest.json"]
)
def test_one_changed_byte_is_found_and_named(small: Path, tmp_path: Path, agent: Agent, name: str) -> None:
    copy = Path(shutil.copytree(small, tmp_path / "copy"))
    data = bytearray((copy / name).read_bytes())
    at = data.index(b'"seed"') + 1 if name == "manifest.json" else len(data) // 2
    data[at] ^= 1
    (copy / name).write_bytes(data)
    with pytest.raises(UserError, match=f"{name} is damaged"):
        loaded(copy)()


def test_a_missing_file_is_named(small: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(small, tmp_path / "copy"))
    (copy / "params/params_shard_0.bin").unlink()
    with pytest.raises(UserError, match=r"params/params_shard_0.bin is missing from the artifact \(HTTP 404\)"):
        loaded(copy)()


def test_a_bad_file_mended_loads(small: Path, tmp_path: Path, agent: Agent, expected: list[int]) -> None:
    """The page's way back: the same program, once the file is right again."""
    copy = Path(shutil.copytree(small, tmp_path / "copy"))
    shard = copy / "params/params_shard_0.bin"
    made = loaded(copy)()
    try:
        good = shard.read_bytes()
        shard.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
        with pytest.raises(UserError, match=r"params_shard_0.bin is damaged"):
            made.ask({"do": "load"})
        shard.write_bytes(good)
        made.ask({"do": "load"})
        assert tokens(made) == expected
    finally:
        made.close()


def test_a_variant_for_this_adapter_stands_in_for_its_kernel(
    small: Path, tmp_path: Path, agent: Agent, expected: list[int]
) -> None:
    """A kernel that this adapter has a version of its own for is that one; planted here, whose logits are all zero."""
    from gpt2_tvm.artifact import write_manifest

    copy = Path(shutil.copytree(small, tmp_path / "copy"))
    listed = json.loads((copy / "kernels.json").read_text())
    last = listed["functions"]["prefill"]["launches"][-1]["kernel"]
    parts = ("// Function: " + part for part in (copy / "kernels.wgsl").read_text().split("// Function: ")[1:])
    own = next(part for part in parts if f"fn {last}(" in part)
    planted = own.replace("ax2 < 32i", "ax2 < 0i")  # a product of nothing
    assert planted != own
    (copy / "kernels.own.wgsl").write_text("// Function: " + planted.removeprefix("// Function: "))
    fits = {"requires": ["software"], "file": "kernels.own.wgsl", "kernels": [last]}
    listed["variants"] = [fits, {"requires": ["shader-f16", "no-such"], "file": "none.wgsl", "kernels": [last]}]
    (copy / "kernels.json").write_text(json.dumps(listed))
    manifest = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").unlink()
    write_manifest(copy, {k: v for k, v in manifest.items() if k not in ("format", "digest", "files")})
    made = loaded(copy)()
    try:
        found = tokens(made)
    finally:
        made.close()
    assert tokens(agent) == expected and found[0] == 0  # argmax of zeros
