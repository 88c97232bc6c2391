"""`benchmarks/web_pipelines.py` on a small model, and what the software variants are for: little memory to clear."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import web_tools
from web_models import compile_for_the_web

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
from web_pipelines import measure, table

from gpt2_tvm.runners import chromium

pytestmark = pytest.mark.heavy


def test_every_pipeline_compiles_and_is_told(tiny_model: Path, tmp_path: Path) -> None:
    web_tools.dawn_device()
    artifact = compile_for_the_web(str(tiny_model), tmp_path / "tiny", (4,))
    found = measure(artifact, 1)
    listed = json.loads((artifact / "kernels.json").read_text())
    launched = {launch["kernel"] for f in listed["functions"].values() for launch in f["launches"]}
    assert launched <= {one["kernel"] for one in found["kernels"]}
    assert 0 < found["pipelines_text"] < found["pipelines"]
    assert 0 < found["cpu_s_text"] < found["cpu_s"]
    assert artifact.name in str(found) and f"| {found['pipelines']} |" in " ".join(table([found]).split())
    if chromium.no_gpu():  # SwiftShader clears shared memory with a store for every element
        staged = {one["kernel"]: one["shared_bytes"] for one in found["kernels"]}
        assert max(bytes_ for kernel, bytes_ in staged.items() if "attention" in kernel) < 8 << 10
