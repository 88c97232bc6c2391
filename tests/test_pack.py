"""A bundle runs where there is no compiler and no TVM, and gives what the engine gives here."""

from __future__ import annotations

import json
import lzma
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from faults import seal

from gpt2_tvm.artifact import read_manifest
from gpt2_tvm.engine import Engine
from gpt2_tvm.errors import UserError
from gpt2_tvm.pack import pack
from gpt2_tvm.tokenizer import load_tokenizer

PROMPT = "It is a truth universally acknowledged"


@contextmanager
def quick_compression() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gpt2_tvm.pack._CODE", [{"id": lzma.FILTER_X86}, {"id": lzma.FILTER_LZMA2, "preset": 0}])
        yield


@pytest.fixture(scope="module")
def bundle(bundled_artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model's bundle."""
    file = tmp_path_factory.mktemp("bundle") / "austen.tar.xz"
    with quick_compression():
        made = pack(bundled_artifact, file)
    assert made["size_mb"] == pytest.approx(file.stat().st_size / 1e6, abs=0.01)
    return file


@pytest.fixture(scope="module")
def unpacked(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("elsewhere")
    with tarfile.open(bundle) as tar:
        names = tar.getnames()
        assert {name.split("/")[0] for name in names} == {"austen"}  # unpacks into one folder
        tar.extractall(folder)
    return folder / "austen"


@pytest.fixture(scope="module")
def only_numpy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with this machine's numpy in it and nothing else."""
    folder = tmp_path_factory.mktemp("numpy")
    installed = Path(np.__file__).parent
    for package in (installed, installed.with_name("numpy.libs")):
        if package.is_dir():
            (folder / package.name).symlink_to(package)
    return folder


def elsewhere(folder: Path, only_numpy: Path | None, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the bundle with the standard library and (unless None) numpy: no site-packages, no environment."""
    command = [sys.executable, "-S", "-s", str(folder / "run.py"), *arguments]
    environment = {"PYTHONPATH": str(only_numpy)} if only_numpy else {}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, cwd=folder.parent)


def test_the_bundle_holds_no_compiler(bundle: Path, unpacked: Path) -> None:
    assert not list(unpacked.rglob("*tvm_compiler*"))
    assert not list(unpacked.rglob("__pycache__"))
    weights = sum(file.stat().st_size for file in (unpacked / "artifact" / "params").iterdir())
    assert bundle.stat().st_size < weights + 12e6


def test_it_writes_what_the_engine_writes(unpacked: Path, only_numpy: Path, bundled_artifact: Path) -> None:
    tokenizer = load_tokenizer(bundled_artifact / "tokenizer")
    engine = Engine(bundled_artifact)
    engine.prefill(tokenizer.encode(PROMPT))
    expected = engine.decode_greedy(40)[0].tolist()

    ids = elsewhere(unpacked, only_numpy, PROMPT, "--max-tokens", "40", "--ids")
    assert ids.returncode == 0, ids.stderr
    assert [int(word) for word in ids.stdout.split()] == expected
    text = elsewhere(unpacked, only_numpy, PROMPT, "--max-tokens", "40")
    assert text.stdout == tokenizer.decode(expected) + "\n"


def test_it_measures(unpacked: Path, only_numpy: Path, tmp_path: Path) -> None:
    options = ("--prompt-tokens", "16", "--max-tokens", "4", "--repeats", "2", "--json", str(tmp_path / "row.json"))
    done = elsewhere(unpacked, only_numpy, "--benchmark", *options)
    assert done.returncode == 0, done.stderr
    row = json.loads((tmp_path / "row.json").read_text())
    assert row["prefill_tok_s"] > 0 and row["decode_tok_s"] > 0
    assert (row["prompt_tokens"], row["generate_tokens"], row["repeats"]) == (16, 4, 2)


def test_only_the_bundle_was_imported(unpacked: Path, only_numpy: Path) -> None:
    """The proof that the other tests prove something: tvm comes from the bundle, runtime only."""
    code = (
        "import sys, runpy; sys.argv = ['run.py', 'It', '--max-tokens', '1'];"
        f"runpy.run_path({str(unpacked / 'run.py')!r}, run_name='__main__');"
        "import tvm, gpt2_tvm; print(tvm.__file__, gpt2_tvm.__file__, tvm.base._RUNTIME_ONLY, sep='\\n')"
    )
    command = [sys.executable, "-S", "-s", "-c", code]
    done = subprocess.run(command, env={"PYTHONPATH": str(only_numpy)}, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    tvm_file, our_file, runtime_only = done.stdout.splitlines()[-3:]
    assert Path(tvm_file).is_relative_to(unpacked) and Path(our_file).is_relative_to(unpacked)
    assert runtime_only == "True"


def test_what_is_wrong_elsewhere_is_one_line(unpacked: Path, only_numpy: Path, tmp_path: Path) -> None:
    def refusal(folder: Path, numpy: Path | None, *arguments: str) -> str:
        done = elsewhere(folder, numpy, *arguments)
        assert done.returncode == 1
        (line,) = done.stderr.splitlines()
        return line

    assert "needs numpy" in refusal(unpacked, None, PROMPT)
    assert "there is no prompt" in refusal(unpacked, only_numpy)
    assert "--prompt-ids" in refusal(unpacked, only_numpy, "--prompt-ids", "1,x")
    assert "--temperature" in refusal(unpacked, only_numpy, PROMPT, "--temperature", "-1")

    other = shutil.copytree(unpacked, tmp_path / "other", symlinks=True)
    shard = other / "artifact" / "params" / "params_shard_0.bin"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    assert "damaged" in refusal(other, only_numpy, PROMPT)
    made_for = json.loads((other / "bundle.json").read_text())
    (other / "bundle.json").write_text(json.dumps({**made_for, "python": "3.1"}))
    assert "Python 3.1 " in refusal(other, only_numpy, PROMPT)


@pytest.mark.heavy
def test_the_same_artifact_gives_the_same_bytes(tiny_artifact: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "1.tar.xz", tmp_path / "2.tar.xz"
    made = pack(tiny_artifact, first)  # with the compression that users get
    with tarfile.open(first) as tar:
        assert tar.getmember("tiny/run.py").mtime == 0
    assert first.stat().st_size < 5e6  # TVM's runtime without its compiler is 4 MB
    with quick_compression():
        pack(tiny_artifact, first)
        pack(tiny_artifact, second)
    assert first.read_bytes() == second.read_bytes()
    assert made["example"] == "--prompt-ids 1,2,3"
    with tarfile.open(first) as tar:
        assert not [name for name in tar.getnames() if "tokenizers" in name]  # the model has none


@pytest.mark.parametrize(("kind", "reason"), [("rocm", "no ROCm runtime"), ("webgpu", "webgpu]")])
def test_what_the_runtime_cannot_run_is_refused(tiny_artifact: Path, tmp_path: Path, kind: str, reason: str) -> None:
    target = {**read_manifest(tiny_artifact)["target"], "kind": kind}
    with pytest.raises(UserError, match=reason):
        pack(seal(shutil.copytree(tiny_artifact, tmp_path / kind), target=target), tmp_path / "x.tar.xz")
    assert not list(tmp_path.glob("*x.tar.xz*"))


def test_another_platform_is_refused(tiny_artifact: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(tiny_artifact, tmp_path / "arm")
    library = bytearray((copy / "lib.so").read_bytes())
    library[18:20] = (183 if library[18] != 183 else 62).to_bytes(2, "little")  # ELF's e_machine: AArch64, x86-64
    (copy / "lib.so").write_bytes(library)
    with pytest.raises(UserError, match="another platform"):
        pack(seal(copy), tmp_path / "x.tar.xz")


def test_the_output_must_be_a_tar_xz(tiny_artifact: Path, tmp_path: Path) -> None:
    for output in (tmp_path, tmp_path / "bundle.zip"):
        with pytest.raises(UserError, match=r"\.tar\.xz"):
            pack(tiny_artifact, output)
