"""Everything that can go wrong is one clear line and a status, never a crash, and what was there before stays whole."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import os
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from safetensors.numpy import load_file, save_file

from gpt2_tvm import cli, files
from gpt2_tvm.artifact import open_artifact, read_manifest, write_manifest
from gpt2_tvm.build import compile_model
from gpt2_tvm.engine import Engine
from gpt2_tvm.errors import UserError

VOCAB, CONTEXT = 97, 48
OPTIONS = ("--rules", "baseline", "--verify-widths", "4")


@pytest.fixture(scope="module")
def engine(tiny_artifact: Path) -> Engine:
    return Engine(tiny_artifact)


@pytest.fixture
def copy(tiny_artifact: Path, tmp_path: Path) -> Path:
    """An artifact to damage."""
    return shutil.copytree(tiny_artifact, tmp_path / "artifact")


def refusal(action: Callable[[], object]) -> str:
    """The message of the UserError that `action` raises; it must be one line that says something."""
    with pytest.raises(UserError) as caught:
        action()
    message = str(caught.value)
    assert "\n" not in message and len(message.split()) >= 4
    return message


def contents(folder: Path) -> dict[str, str]:
    """Every file of a folder and its digest."""
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in folder.rglob("*")
        if file.is_file()
    }


def seal(folder: Path, **changes: Any) -> Path:
    """Give the manifest other values, and right digests for them and for what the files now are."""
    manifest = {key: value for key, value in read_manifest(folder).items() if key not in ("format", "digest", "files")}
    (folder / "manifest.json").unlink()
    write_manifest(folder, {**manifest, **changes})
    return folder


def generate(folder: Path) -> subprocess.CompletedProcess[str]:
    """The command on a model without a tokenizer."""
    command = [sys.executable, "-m", "gpt2_tvm.generate", str(folder), "--prompt-ids", "1,2", "--max-tokens", "2"]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def assert_one_line(done: subprocess.CompletedProcess[str], *parts: str) -> None:
    assert done.returncode == 1, (done.returncode, done.stderr)
    line = done.stderr.splitlines()[-1]
    assert line.startswith("error: ") and "unexpected" not in line and "Traceback" not in done.stderr
    for part in parts:
        assert part in line


# ---- calls


def test_ten_thousand_decodes_do_not_grow_memory(engine: Engine) -> None:
    process = psutil.Process()

    def run(calls: int) -> None:
        engine.reset()
        engine.prefill([1, 2, 3])
        for i in range(calls):
            if engine.positions[0] == CONTEXT:
                engine.rewind(3)
            engine.decode(i % VOCAB)

    run(1000)  # what is allocated once
    before = process.memory_info().rss
    run(10_000)
    assert process.memory_info().rss - before < 1 << 20  # 100 bytes a call would show


def test_prefills_of_every_length_and_batch_do_not_grow_memory(engine: Engine) -> None:
    process = psutil.Process()

    def run(rounds: int) -> None:
        for i in range(rounds):
            engine.reset()
            engine.prefill([[1] * (1 + i % 40)] * (1 + i % 2))
            engine.decode_greedy(5)

    run(160)
    before = process.memory_info().rss
    run(1600)
    assert process.memory_info().rss - before < 2 << 20


@pytest.mark.parametrize("batch", [1, 2])
def test_a_position_past_the_context(engine: Engine, batch: int) -> None:
    engine.reset()
    engine.prefill([[1] * (CONTEXT - 1)] * batch)
    engine.decode([5] * batch)
    actions: list[Callable[[], object]] = [
        lambda: engine.decode([5] * batch),
        lambda: engine.prefill([[1]] * batch),
        lambda: engine.verify([[1]] * batch),
        lambda: engine.decode_greedy(1),
    ]
    for action in actions:
        assert f"the context holds {CONTEXT}" in refusal(action)
    engine.rewind(CONTEXT - 1)  # and the engine goes on
    engine.decode([5] * batch)
    engine.reset()
    assert str(CONTEXT) in refusal(lambda: engine.prefill([1] * (CONTEXT + 1)))
    assert str(CONTEXT) in refusal(lambda: engine.score([1] * (CONTEXT + 1)))


@pytest.mark.parametrize("bad", [-1, VOCAB, 2**31, 2**40, -(2**33)])
def test_an_id_outside_the_vocabulary(engine: Engine, bad: int) -> None:
    engine.reset()
    engine.prefill([1, 2])
    actions: list[Callable[[], object]] = [
        lambda: engine.prefill([1, bad]),
        lambda: engine.decode(bad),
        lambda: engine.verify([1, bad]),
        lambda: engine.verify([1, bad], parents=[-1, 0]),
        lambda: engine.score([1, bad]),
    ]
    for action in actions:
        assert f"token id {bad} is outside the vocabulary (0..{VOCAB - 1})" in refusal(action)
    assert engine.positions.tolist() == [2]


@pytest.mark.parametrize("ids", [[], [[]], [[1], []], np.zeros((1, 0), np.int64), np.zeros(0, np.int32)])
def test_an_empty_prompt(engine: Engine, ids: Any) -> None:
    engine.reset()
    for call in (engine.prefill, engine.score, engine.verify):
        assert "empty" in refusal(lambda call=call: call(ids))


@pytest.mark.parametrize("ids", [[1.5, 2.0], ["a"], [[[1]]], [None], "text", [1, "a"], [[1, 2], [3, 2.5]]])
def test_what_is_no_token_id(engine: Engine, ids: Any) -> None:
    engine.reset()
    assert "token ids" in refusal(lambda: engine.prefill(ids))


# ---- weights


@pytest.mark.parametrize(("value", "quantization"), [(np.nan, "q0f32"), (np.inf, "q0f32"), (1e6, "q0f16")])
def test_weights_that_are_not_numbers(
    tiny_model: Path, tiny_artifact: Path, tmp_path: Path, value: float, quantization: str
) -> None:
    model = shutil.copytree(tiny_model, tmp_path / "model")
    tensors = {key: array.copy() for key, array in load_file(model / "model.safetensors").items()}
    name = next(key for key in tensors if key.endswith("h.1.mlp.c_fc.weight"))
    tensors[name][3, 5] = value
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    earlier = shutil.copytree(tiny_artifact, tmp_path / "out")
    before = contents(earlier)
    message = refusal(
        lambda: compile_model(
            str(model), "cpu", quantization, earlier, rules="baseline", verify_widths=(), max_seq_len=16
        )
    )
    assert "h.1.mlp.c_fc.weight" in message
    assert contents(earlier) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out"]


# ---- artifacts


def test_any_byte_of_the_manifest_flipped(copy: Path) -> None:
    """Every byte, a random bit each."""
    path = copy / "manifest.json"
    sound = path.read_bytes()
    bits = np.random.default_rng(0).integers(8, size=len(sound))
    for at, bit in enumerate(bits.tolist()):
        damaged = bytearray(sound)
        damaged[at] ^= 1 << bit
        path.write_bytes(damaged)
        message = refusal(lambda: read_manifest(copy))
        assert "damaged" in message and "manifest.json" in message, (at, bit)
    path.write_bytes(sound)
    read_manifest(copy)
    path.write_bytes(sound[:-9])
    assert_one_line(generate(copy), "damaged", "compile it again")


@pytest.mark.parametrize(
    "damage", [b"", b"{}", b"[]", b"null", b'{"digest": 3}', b'{"digest": ""}', b"\xff\xfe\x00", b"["]
)
def test_a_manifest_that_is_none(copy: Path, damage: bytes) -> None:
    (copy / "manifest.json").write_bytes(damage)
    assert "damaged" in refusal(lambda: Engine(copy))


@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.999])
def test_a_truncated_library(copy: Path, share: float) -> None:
    library = copy / "lib.so"
    data = library.read_bytes()
    library.write_bytes(data[: int(len(data) * share)])
    for verify in (True, False):  # the size is looked at in any case: mapping a short library would kill the process
        assert "lib.so is truncated" in refusal(lambda verify=verify: Engine(copy, verify=verify))
    if share == 0.5:
        assert_one_line(generate(copy), "lib.so is truncated")


def test_damaged_and_missing_files(copy: Path) -> None:
    rng = np.random.default_rng(1)
    for name in ("lib.so", "params/params_shard_0.bin", "params/tensor-cache.json"):
        file = copy / name
        sound = file.read_bytes()
        for at in rng.integers(len(sound), size=5).tolist():
            damaged = bytearray(sound)
            damaged[at] ^= 0x10
            file.write_bytes(damaged)
            assert f"{name} is damaged" in refusal(lambda: open_artifact(copy))
        file.write_bytes(sound[:-1])
        assert f"{name} is truncated" in refusal(lambda: open_artifact(copy))
        file.write_bytes(sound + b"\0")
        assert "changed" in refusal(lambda: open_artifact(copy))
        file.unlink()
        assert f"{name} is missing" in refusal(lambda: open_artifact(copy))
        file.write_bytes(sound)
    open_artifact(copy)
    (copy / "lib.so").unlink()
    shutil.rmtree(copy / "params")
    assert "and 2 more files" in refusal(lambda: open_artifact(copy))


@pytest.mark.parametrize("package", ["apache-tvm", "apache-tvm-ffi"])
def test_another_version_of_tvm(copy: Path, package: str) -> None:
    seal(copy, versions={**read_manifest(copy)["versions"], package: "0.26.0"})
    assert_one_line(generate(copy), f"compiled with {package} 0.26.0", "compile it again")


def test_another_format(copy: Path) -> None:
    path = copy / "manifest.json"
    manifest = json.loads(path.read_text())
    text = path.read_text().replace('"format": 1', '"format": 2').replace(manifest["digest"], "0" * 64)
    path.write_text(text.replace("0" * 64, hashlib.sha256(text.encode()).hexdigest(), 1))
    assert "format 2, this program reads 1" in refusal(lambda: Engine(copy))


def test_code_for_another_processor(copy: Path) -> None:
    target = read_manifest(copy)["target"]
    seal(copy, target={**target, "requires": [*target["requires"], "avx9000"]})
    assert_one_line(generate(copy), "needs a CPU with avx9000", "--target cpu")


def test_a_library_of_another_platform(copy: Path) -> None:
    library = bytearray((copy / "lib.so").read_bytes())
    library[18] ^= 0xFF  # ELF's e_machine
    (copy / "lib.so").write_bytes(library)
    seal(copy)
    assert_one_line(generate(copy), "lib.so does not load here", "compile it again")


@pytest.mark.parametrize("kind", ["metal", "rocm"])
def test_an_artifact_for_a_device_that_is_not_here(copy: Path, kind: str) -> None:
    seal(copy, target={**read_manifest(copy)["target"], "kind": kind})
    assert_one_line(generate(copy), f"no {kind} device")


def test_another_device_than_compiled_for(tiny_artifact: Path) -> None:
    assert "compiled for cpu, not for cuda" in refusal(lambda: Engine(tiny_artifact, "cuda"))


def test_no_artifact(tmp_path: Path) -> None:
    assert "no artifact at" in refusal(lambda: Engine(tmp_path / "none"))
    assert "not an artifact" in refusal(lambda: Engine(tmp_path))


# ---- output


def compile_command(model: Path, output: Path) -> list[str]:
    return [sys.executable, "-m", "gpt2_tvm.compile", "--model", str(model), "--output", str(output), *OPTIONS]


def test_an_output_under_a_file(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    done = subprocess.run(compile_command(tiny_model, tmp_path / "file" / "out"), capture_output=True, text=True)
    assert_one_line(done, "cannot write to", "--output")


def without_privileges() -> None:
    """For a child: permissions bind it as they bind an ordinary user, root or not."""
    if os.getuid() == 0:
        libc = ctypes.CDLL(None)
        for capability in (1, 2):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
            libc.prctl(24, capability, 0, 0, 0)  # PR_CAPBSET_DROP


def test_a_read_only_output_folder(tiny_model: Path, tiny_artifact: Path, tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    earlier = shutil.copytree(tiny_artifact, closed / "out")
    before = contents(earlier)
    closed.chmod(0o555)
    command = compile_command(tiny_model, earlier)
    done = subprocess.run(command, preexec_fn=without_privileges, capture_output=True, text=True, timeout=120)
    closed.chmod(0o755)
    assert_one_line(done, "cannot write to", "Permission denied")
    assert contents(earlier) == before


def test_an_output_that_is_not_ours(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "one.jpg").write_text("x")
    for output in (tmp_path / "photos", tmp_path / "photos" / "one.jpg"):
        assert "not an artifact of ours" in refusal(lambda output=output: compile_model(str(tiny_model), output=output))
    assert (tmp_path / "photos" / "one.jpg").read_text() == "x"
    assert [path.name for path in tmp_path.rglob("*")] == ["photos", "one.jpg"]


def test_a_full_disk(
    tiny_model: Path,
    tiny_artifact: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The system says so at the latest when a file is synced."""
    earlier = shutil.copytree(tiny_artifact, tmp_path / "out")
    before = contents(earlier)

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SystemExit) as caught:
        cli.run(lambda: compile_model(str(tiny_model), output=earlier, rules="baseline", verify_widths=()))
    assert caught.value.code == 1
    assert capsys.readouterr().err.startswith("error: the disk is full")
    assert contents(earlier) == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("limit", [100_000, 20 << 20])
def test_a_file_that_may_not_grow(tiny_artifact: Path, tmp_path: Path, limit: int) -> None:
    """Writing really fails: of the objects, in LLVM, which ends the process when it cannot write; of the weights."""
    earlier = shutil.copytree(tiny_artifact, tmp_path / "out")
    before = contents(earlier)
    done = subprocess.run(
        compile_command(Path("bundled"), earlier),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert_one_line(done, "ulimit -f")
    assert ("converting weights" in done.stderr) == (limit > 1 << 20)
    assert contents(earlier) == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("size", ["8m", "20m"])
def test_a_disk_that_is_really_full(tmp_path: Path, size: str) -> None:
    """A small tmpfs in a mount namespace of its own, where the system lets us make one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = f"mount -t tmpfs -o size={size} none {shlex.quote(str(disk))}"
    inside = ["unshare", "--map-root-user", "--mount", "sh", "-c"]
    if shutil.which("unshare") is None or subprocess.run([*inside, mount], capture_output=True).returncode:
        pytest.skip("no mount namespaces here")
    command = shlex.join(compile_command(Path("bundled"), disk / "out"))
    script = f"{mount} && {command}; status=$?; ls -A {shlex.quote(str(disk))}; exit $status"
    done = subprocess.run([*inside, script], capture_output=True, text=True, timeout=120)
    assert_one_line(done, "the disk is full")
    assert done.stdout == ""  # nothing was left


# ---- interruption


def interrupt(model: Path, output: Path, stage: str, number: signal.Signals) -> subprocess.CompletedProcess[str]:
    """Compile, and send a signal once the command says that `stage` begins."""
    process = subprocess.Popen(
        compile_command(model, output), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=1
    )
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith(stage):
            break
    time.sleep(0.1)  # into the stage
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    return subprocess.CompletedProcess([], process.returncode, out, err)


@pytest.mark.parametrize(
    ("stage", "number"),
    [
        ("importing", signal.SIGINT),
        ("lowering", signal.SIGINT),
        ("building", signal.SIGINT),
        ("building", signal.SIGTERM),
    ],
)
def test_an_interrupted_compile(
    tiny_model: Path, tiny_artifact: Path, tmp_path: Path, stage: str, number: signal.Signals
) -> None:
    earlier = shutil.copytree(tiny_artifact, tmp_path / "out")
    before = contents(earlier)
    done = interrupt(tiny_model, earlier, stage, number)
    assert done.returncode == 128 + number
    assert "nothing half-written was left behind" in done.stderr and "Traceback" not in done.stderr
    assert done.stdout == ""
    assert contents(earlier) == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_killed_compile_is_cleaned_up_by_the_next(tiny_model: Path, tiny_artifact: Path, tmp_path: Path) -> None:
    earlier = shutil.copytree(tiny_artifact, tmp_path / "out")
    before = contents(earlier)
    done = interrupt(tiny_model, earlier, "building", signal.SIGKILL)
    assert done.returncode == -signal.SIGKILL
    assert contents(earlier) == before
    assert len(list(tmp_path.glob(".out.*.partial"))) == 1
    again = subprocess.run(compile_command(tiny_model, earlier), capture_output=True, text=True, timeout=120)
    assert again.returncode == 0, again.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert contents(earlier) != before
    Engine(earlier).prefill([1, 2])


def fill(folder: Path, text: str) -> None:
    (folder / files.MARKER).write_text(text)


def test_two_writers_do_not_touch_each_other(tmp_path: Path) -> None:
    final = tmp_path / "out"
    with files.replacing_folder(final) as first:
        fill(first, "first")
        with files.replacing_folder(final) as second:
            assert first.exists() and first != second
            fill(second, "second")
        assert (final / files.MARKER).read_text() == "second"
    assert (final / files.MARKER).read_text() == "first"
    assert list(tmp_path.iterdir()) == [final]


@pytest.mark.parametrize("exchanges", [True, False])
def test_replacing_with_and_without_an_exchange_of_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchanges: bool
) -> None:
    if not exchanges:
        monkeypatch.setattr(files, "_exchange", lambda a, b: False)
    final = tmp_path / "out"
    for text in ("one", "two", "three"):
        with files.replacing_folder(final) as work:
            fill(work, text)
        assert (final / files.MARKER).read_text() == text
        assert list(tmp_path.iterdir()) == [final]


def test_names_are_exchanged_in_one_step(tmp_path: Path) -> None:
    """Else a kill between two renames would leave no artifact. Linux and macOS have the call."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        fill(tmp_path / name, name)
    assert files._exchange(tmp_path / "a", tmp_path / "b")
    assert [(tmp_path / name / files.MARKER).read_text() for name in "ab"] == ["b", "a"]


@pytest.mark.parametrize("error", [OSError(errno.EIO, "I/O error"), KeyboardInterrupt()])
def test_an_error_between_two_renames_puts_the_old_one_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    monkeypatch.setattr(files, "_exchange", lambda a, b: False)
    final = tmp_path / "out"
    with files.replacing_folder(final) as work:
        fill(work, "old")
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if self.suffix == ".partial":
            raise error
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(type(error)), files.replacing_folder(final) as work:
        fill(work, "new")
    assert (final / files.MARKER).read_text() == "old"
    assert list(tmp_path.iterdir()) == [final]


def test_an_artifact_moved_aside_by_a_killed_writer_comes_back(tmp_path: Path) -> None:
    aside = tmp_path / ".out.abc.old"
    aside.mkdir()
    fill(aside, "old")
    with pytest.raises(RuntimeError), files.replacing_folder(tmp_path / "out"):
        assert (tmp_path / "out" / files.MARKER).read_text() == "old"
        raise RuntimeError
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
