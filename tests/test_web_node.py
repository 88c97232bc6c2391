"""model.wasm in node, on Dawn (npm's webgpu): the trained model's numbers, and TVM's launch guard.

Shaders take most of the minutes, so one loaded model serves all tests of a file.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import web_tools
from web_models import compile_for_the_web

from gpt2_tvm.artifact import open_artifact
from gpt2_tvm.engine import Engine
from gpt2_tvm.toolchains import web
from gpt2_tvm.toolchains.webruntime.build import runtime_objects
from gpt2_tvm.toolchains.webruntime.patches import PATCHES, Patch
from targets import load_target

pytestmark = pytest.mark.heavy

TOKENS = 48  # the page writes 128 (test_web_page_browser)
PROMPT = 12
SPARE = 8


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_for_the_web("bundled", tmp_path_factory.mktemp("web") / "bundled")


@pytest.fixture(scope="module")
def engines(trained: Path, bundled_artifact: Path) -> Iterator[tuple[Engine, Engine, list[int]]]:
    """The trained model in node and on the CPU, and a prompt."""
    web_tools.dawn_device()
    here, there = Engine(bundled_artifact), Engine(trained, "node")
    prompt = [int(i) for i in np.random.default_rng(0).integers(0, here.config.vocab_size, PROMPT)]
    yield there, here, prompt
    there.runner.agent.close()  # type: ignore[attr-defined]


def test_the_module_is_part_of_the_artifact(trained: Path) -> None:
    manifest = open_artifact(trained, verify=True).manifest
    assert web.MODULE in manifest["libraries"] and manifest["library"] != web.MODULE
    assert manifest["files"][web.MODULE]["bytes"] == (trained / web.MODULE).stat().st_size
    assert (trained / web.MODULE).read_bytes()[:4] == b"\0asm"
    assert not list(trained.glob("*.js"))


def test_logits_are_those_of_the_cpu_engine(engines: tuple[Engine, Engine, list[int]]) -> None:
    there, here, prompt = engines
    for engine in (there, here):
        engine.reset()
    pairs = [(there.prefill(prompt), here.prefill(prompt)), (there.decode(3), here.decode(3))]
    for got, expected in pairs:
        assert got.shape == expected.shape and got.dtype == np.float32
        assert np.abs(got - expected).max() <= 1e-3 * np.abs(expected).max()
        assert np.ptp(expected) > 1  # not all alike


def test_greedy_ids_are_those_of_the_cpu_engine(engines: tuple[Engine, Engine, list[int]]) -> None:
    """The engine's calls, the page's own loop with a token at a time, and the benchmark's turn: all say the same."""
    there, here, prompt = engines
    for engine in (there, here):
        engine.reset()
        engine.prefill(prompt)
    expected = here.decode_greedy(TOKENS)[0].tolist()
    assert len(set(expected)) > 8  # a few tokens for ever would be equal by chance
    assert there.decode_greedy(TOKENS)[0].tolist() == expected
    agent = there.runner.agent  # type: ignore[attr-defined]
    streamed, _ = agent.ask({"do": "stream", "ids": prompt, "count": TOKENS})
    turn, _ = agent.ask({"do": "turn", "ids": prompt, "count": TOKENS})
    assert streamed["tokens"] == expected and turn["tokens"] == expected
    assert streamed["submissions"] < 3  # a step's kernels go to the device together; its read-back is the other one


def wide_grid(path: Path, blocks: int, patches: Sequence[Patch]) -> Path:
    """A module whose kernel writes i + 1 to element i from a grid of `blocks` blocks along x; `SPARE` elements stay."""
    import tvm
    from tvm.script import tirx as T

    @T.prim_func(s_tir=True)
    def kernel(data: T.Buffer((blocks + SPARE,), "float32")) -> None:
        T.func_attr({"global_symbol": "kernel", "tirx.is_scheduled": True})
        for block in T.thread_binding(blocks, thread="blockIdx.x"):
            for _ in T.thread_binding(1, thread="threadIdx.x"):
                with T.sblock("write"):
                    i = T.axis.spatial(blocks + SPARE, block)
                    T.writes(data[i])
                    data[i] = T.cast(i, "float32") + T.float32(1)

    target = web.wasm_target(load_target("webgpu"))
    module = tvm.IRModule({"kernel": kernel}).with_attr("system_lib_prefix", "")
    web.export(tvm.compile(module, target=target), path, runtime=runtime_objects(patches=patches))
    return path


def test_a_grid_beyond_65535_blocks(tmp_path: Path) -> None:
    """Folding 65537 blocks makes one too many, which the guard must turn away: with the patch it does, without not."""
    web_tools.emcc()
    blocks = 65537
    expected = np.append(np.arange(1, blocks + 1, dtype=np.float32), np.zeros(SPARE, np.float32))

    def run(name: str, patches: Sequence[Patch]) -> np.ndarray:
        path = wide_grid(tmp_path / f"{name}.wasm", blocks, patches)
        return np.frombuffer(web_tools.node("kernel.mjs", str(path), str(len(expected))), np.float32)

    assert np.array_equal(run("mended", PATCHES), expected)
    stock = run("stock", [p for p in PATCHES if p.name != "launch-guard"])
    assert not np.array_equal(stock, expected), "TVM's guard is right by now: drop the patch"
