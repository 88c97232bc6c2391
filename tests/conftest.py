"""Artifacts that several test files use, compiled once a session; and the order of the tests."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    # Workers share the cores. Where there are more threads than cores OpenMP's wait for each other in loops, and a
    # reference's forward in torch takes ten times as long as on one thread. Read when torch is loaded.
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Heavy tests after all quick ones, so that a plain mistake shows within the first minutes."""
    items.sort(key=lambda item: item.get_closest_marker("heavy") is not None)  # stable: the rest stays in place


@pytest.fixture(scope="module")
def no_page() -> Iterator[None]:
    """Artifacts for webgpu without model.wasm, as where emcc is missing, and without the kernels for Chromium's device:
    a third of their compilation, and nothing that wgpu needs."""
    from gpt2_tvm.schedules.webgpu_variants import SWIFTSHADER, VARIANTS

    native = tuple(variant for variant in VARIANTS if SWIFTSHADER not in variant.requires)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gpt2_tvm.kernel_list.VARIANTS", native)
        patch.setattr("gpt2_tvm.toolchains.web.write_module", lambda *given: [])
        yield


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in Hugging Face layout, random: 2 layers, width 32, 2 heads, 97 ids, 48 positions, no tokenizer."""
    from gpt2_tvm.checkpoint import random_model
    from gpt2_tvm.config import GPT2Config
    from gpt2_tvm.weights import write_hf_checkpoint

    config = GPT2Config(vocab_size=97, n_positions=48, n_embd=32, n_layer=2, n_head=2)
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    return write_hf_checkpoint(folder, config, random_model(config, seed=1))


@pytest.fixture(scope="session")
def tiny_artifact(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny_model` for this CPU: batch sizes 1 and 2, verify widths 4 and 8, no rules. Read only: copy to change."""
    from gpt2_tvm.build import compile_model

    folder = tmp_path_factory.mktemp("artifacts") / "tiny"
    return compile_model(str(tiny_model), "cpu", output=folder, rules="baseline", batch_sizes=(1, 2))


@pytest.fixture(scope="module")
def gpu_bench() -> Iterator[Path]:
    """The folder of benchmarks/gpu.py, from which its package can be imported."""
    folder = Path(__file__).parent.parent / "benchmarks"
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        yield folder


@pytest.fixture(scope="module")
def gpu_kit(tiny_artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A kit's folder, with `tiny_artifact` as artifacts/tiny-q0f32-full; the module's own."""
    folder = tmp_path_factory.mktemp("kit")
    shutil.copytree(tiny_artifact, folder / "artifacts" / "tiny-q0f32-full")
    return folder


@pytest.fixture(scope="session")
def bundled_artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled trained model, with its tokenizer, for this CPU, as a user gets it. Read only."""
    from gpt2_tvm.build import compile_model

    return compile_model("bundled", "cpu", output=tmp_path_factory.mktemp("artifacts") / "austen")
