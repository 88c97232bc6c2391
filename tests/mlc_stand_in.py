"""A package called mlc_llm for tests, because the true one is on no index that they could ask.

Its three commands do with our own code what the true ones do: tensors in MLC's layout, a configuration, and a library
with MLC's functions, without our schedule rules. So what measures a peer has real code and real numbers to measure.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

COMMANDS = """
import hashlib, json, pathlib, shutil, sys
command, given = sys.argv[1], pathlib.Path(sys.argv[2])
output = pathlib.Path(sys.argv[sys.argv.index("--output") + 1])
if command == "convert_weight":
    scheme = sys.argv[sys.argv.index("--quantization") + 1]
    weights = hashlib.sha256(b"".join(file.read_bytes() for file in sorted(given.glob("*.safetensors")))).hexdigest()
    made = pathlib.Path(__file__).parents[1] / f"{weights}-{scheme}"  # compiled once for all tests of a session
    if not made.is_dir():
        from gpt2_tvm import compile_model
        compile_model(str(given), "cpu", scheme, made, rules="baseline", interface="mlc", batch_sizes=(1, 2))
    (output / "stand-in").write_text(str(made))
    for file in (made / "params").iterdir():
        shutil.copyfile(file, output / file.name)
elif command == "gen_config":
    config = json.loads((given / "config.json").read_text())
    (output / "mlc-chat-config.json").write_text(json.dumps({"vocab_size": config["vocab_size"]}))
elif command == "compile":
    assert sys.argv[sys.argv.index("--device") + 1] == "cpu"
    shutil.copyfile(pathlib.Path((given.parent / "stand-in").read_text()) / "lib.so", output)
    WRONG
"""
# of a library that computes something else: weights that are another model's
SPOILED = """
    shard = next(given.parent.glob("params_shard_*.bin"))
    content = bytearray(shard.read_bytes())
    content[3::64] = bytes([64] * len(content[3::64]))
    shard.write_bytes(content)
    index = given.parent / "tensor-cache.json"
    told = json.loads(index.read_text())
    for one in told["records"]:
        one["md5sum"] = hashlib.md5((given.parent / one["dataPath"]).read_bytes()).hexdigest()
    index.write_text(json.dumps(told))
"""


def install(folder: Path, wrong: bool = False) -> Path:
    """Make the package -> the folder for PYTHONPATH. wrong: what it compiles computes nonsense."""
    package = folder / "packages" / "mlc_llm"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "__main__.py").write_text(COMMANDS.replace("WRONG", SPOILED if wrong else ""))
    return package.parent


def environment(packages: Path, **more: str) -> dict[str, str]:
    """Of a child process that finds the stand-in."""
    path = os.pathsep.join(filter(None, [str(packages), os.environ.get("PYTHONPATH", "")]))
    return {**os.environ, "PYTHONPATH": path, **more}


def use(packages: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have this process and its children find the stand-in."""
    monkeypatch.syspath_prepend(str(packages))
    monkeypatch.setenv("PYTHONPATH", environment(packages)["PYTHONPATH"])
