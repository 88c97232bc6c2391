"""Processes that start fast: TVM without torch, a WebGPU engine's weights without TVM."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np

from gpt2_tvm.tensor_cache import TensorCacheWriter


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_tvm_comes_without_torch_which_can_come_later() -> None:
    said = run(
        "import sys; from gpt2_tvm.tvm_alone import import_tvm; import_tvm(); print('torch' in sys.modules)\n"
        "import torch, tvm; print(tvm.runtime.from_dlpack(torch.arange(3)).numpy().tolist())\n"
        "print(torch.from_dlpack(tvm.runtime.tensor(__import__('numpy').ones(2, 'float32'))).tolist())"
    )
    assert said.splitlines() == ["False", "[0, 1, 2]", "[1.0, 1.0]"]


def test_torch_that_is_there_stays() -> None:
    said = run(
        "import sys, torch; from gpt2_tvm.tvm_alone import import_tvm; import_tvm()\n"
        "print(sys.modules['torch'] is torch, 'tvm' in sys.modules)"
    )
    assert said == "True True"


def test_weights_are_read_without_tvm(tmp_path: Path) -> None:
    with TensorCacheWriter(tmp_path / "params") as writer:
        writer.add("w", np.arange(6, dtype=np.float16).reshape(2, 3))
    said = run(
        "import sys; from gpt2_tvm.tensor_cache import load_arrays\n"
        f"print(load_arrays({str(tmp_path / 'params')!r})['w'].tolist())\n"
        "print('tvm' in sys.modules, 'torch' in sys.modules)"
    )
    assert said.splitlines() == ["[[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]", "False False"]
