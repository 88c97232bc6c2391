"""The trained model's model.wasm in node, on Dawn (npm's webgpu) and a software device."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import web_tools

from gpt2_tvm.artifact import open_artifact
from gpt2_tvm.build import compile_model
from gpt2_tvm.engine import Engine
from gpt2_tvm.toolchains import web
from gpt2_tvm.toolchains.webruntime.build import runtime_objects
from gpt2_tvm.toolchains.webruntime.patches import PATCHES, Patch
from targets import load_target

pytestmark = pytest.mark.heavy

TOKENS = 16


@pytest.fixture(scope="module")
def web_artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    web_tools.emcc()
    notes: list[str] = []

    def note(what: str, share: float) -> None:
        if share == 0.0:
            notes.append(what)

    folder = tmp_path_factory.mktemp("web") / "bundled"
    # Not DLight's matmul: a software device takes minutes to compile its shaders, and the page loads all of them.
    compile_model("bundled", "webgpu", output=folder, rules="without-matmul", verify_widths=(), progress=note)
    assert not [n for n in notes if web.MODULE in n], notes
    return folder


def test_the_module_is_part_of_the_artifact(web_artifact: Path) -> None:
    manifest = open_artifact(web_artifact, verify=True).manifest
    assert web.MODULE in manifest["libraries"] and manifest["library"] != web.MODULE
    assert manifest["files"][web.MODULE]["bytes"] == (web_artifact / web.MODULE).stat().st_size
    assert (web_artifact / web.MODULE).read_bytes()[:4] == b"\0asm"
    assert not list(web_artifact.glob("*.js"))


def test_greedy_ids_equal_the_cpu_engine(web_artifact: Path, bundled_artifact: Path) -> None:
    engine = Engine(bundled_artifact)
    prompt = [int(i) for i in np.random.default_rng(0).integers(0, engine.config.vocab_size, 12)]
    engine.prefill(prompt)
    expected = engine.decode_greedy(TOKENS)[0].tolist()
    said = web_tools.node("greedy.mjs", str(web_artifact), ",".join(map(str, prompt)), str(TOKENS))
    assert json.loads(said)["ids"] == expected
    assert len(set(expected)) > 1  # one token for ever would be equal by chance


def test_a_damaged_shard_is_named(web_artifact: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(web_artifact, copy)
    shard = next((copy / "params").glob("*.bin"))
    damaged = bytearray(shard.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    shard.write_bytes(damaged)
    done = web_tools.run_node("greedy.mjs", str(copy), "1,2", "2")
    assert done.returncode != 0
    assert f"params/{shard.name} is damaged" in done.stderr.decode()


def wide_grid(path: Path, blocks: int, patches: Sequence[Patch]) -> Path:
    """A module whose kernel writes i + 1 to element i from a grid of `blocks` blocks along x."""
    import tvm
    from tvm.script import tirx as T

    @T.prim_func(s_tir=True)
    def kernel(data: T.Buffer((blocks,), "float32")) -> None:
        T.func_attr({"global_symbol": "kernel", "tirx.is_scheduled": True})
        for block in T.thread_binding(blocks, thread="blockIdx.x"):
            for _ in T.thread_binding(1, thread="threadIdx.x"):
                with T.sblock("write"):
                    i = T.axis.spatial(blocks, block)
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
    expected = np.arange(1, blocks + 1, dtype=np.float32)

    def run(name: str, patches: Sequence[Patch]) -> np.ndarray:
        path = wide_grid(tmp_path / f"{name}.wasm", blocks, patches)
        return np.frombuffer(web_tools.node("kernel.mjs", str(path), str(blocks)), np.float32)

    assert np.array_equal(run("mended", PATCHES), expected)
    stock = run("stock", [p for p in PATCHES if p.name != "launch-guard"])
    assert not np.array_equal(stock, expected), "TVM's guard is right by now: drop the patch"
