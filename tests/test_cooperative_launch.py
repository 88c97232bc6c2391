"""How TVM's runtime launches the persistent step: read from what it asks of the driver, which a library of ours stands
in for."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from gpt2_tvm import toolchains
from gpt2_tvm.toolchains import cuda_toolkit
from targets import load_target

HERE = Path(__file__).parent


@pytest.mark.heavy
@pytest.mark.skipif(
    (what := toolchains.missing(load_target("h200"))) is not None, reason=f"cannot compile for CUDA: needs {what}"
)
@pytest.mark.skipif(shutil.which("gcc") is None or sys.platform != "linux", reason="needs gcc, on Linux")
def test_all_blocks_at_once(tmp_path: Path) -> None:
    toolkit = cuda_toolkit.find()
    assert toolkit is not None
    headers = toolkit.root / "include"
    if not (headers / "cuda.h").is_file():
        pytest.skip("needs cuda.h")
    library = tmp_path / "fake.so"
    subprocess.run(
        ["gcc", "-shared", "-fPIC", f"-I{headers}", str(HERE / "fake_cuda.c"), "-o", str(library)], check=True
    )
    folders = os.pathsep.join([str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, str(HERE / "persistent_launch.py")],
        env={**os.environ, "LD_PRELOAD": str(library), "PYTHONPATH": folders},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    allowed, *launches, wanted = [line for line in done.stdout.splitlines() if line]
    sizes = wanted.removeprefix("wanted ")
    shared = sizes.rpartition(" ")[2]
    assert allowed == f"allow step_kernel {shared}" and int(shared.removeprefix("shared=")) > 48 << 10
    assert launches == [f"launch step_kernel {sizes} cooperative=1 arguments=1"] * 2
