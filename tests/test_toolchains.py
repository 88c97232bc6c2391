"""Building and linking for CPUs, and what all toolchains share: linker, images, tensor intrinsics."""

from __future__ import annotations

import inspect
import struct
import subprocess
import sys
import tarfile
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tvm
from checkers.build import K, N, build

from gpt2_tvm import toolchains
from gpt2_tvm.errors import UserError
from gpt2_tvm.toolchains import images, linker, tensor_intrin
from targets import load_target

needs_zig = pytest.mark.skipif(linker.zig() is None, reason="needs ziglang from PyPI")


# --- cpu ---


@pytest.mark.parametrize("export", ["so", "tar"])
def test_cpu_library_computes(tmp_path: Path, export: str) -> None:
    _, names = build(replace(load_target("cpu"), export=export), tmp_path, "float32")
    assert names == (["lib.tar"] if export == "tar" else [f"lib{linker.this_platform().library_suffix}"])
    library = tvm.runtime.load_module(str(tmp_path / names[0]))
    rng = np.random.default_rng(0)
    w = rng.standard_normal((N, K), "float32")
    for name, rows in (("gemv", 1), ("matmul", 5)):
        x = rng.standard_normal((rows, K), "float32")
        out = tvm.runtime.tensor(np.zeros((rows, N), "float32"))
        library[name](tvm.runtime.tensor(x), tvm.runtime.tensor(w), out)
        np.testing.assert_allclose(out.numpy(), x @ w.T, rtol=1e-4, atol=1e-4)


def test_objects_for_another_machine_without_zig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linker, "zig", lambda: None)
    for name, magic, machine_at, machine in (
        ("arm64", b"\x7fELF\x02\x01", 18, 183),  # EM_AARCH64
        ("apple-m", b"\xcf\xfa\xed\xfe", 4, 12),  # low half of CPU_TYPE_ARM64
    ):
        if linker.platform_of(load_target(name).tvm["mtriple"]) == linker.this_platform():
            continue
        _, names = build(load_target(name), tmp_path / name)
        assert names == ["lib.tar"]
        with tarfile.open(tmp_path / name / "lib.tar") as archive:
            objects = [archive.extractfile(member).read() for member in archive.getmembers()]
        assert objects
        assert all(
            data.startswith(magic) and struct.unpack_from("<H", data, machine_at)[0] == machine for data in objects
        )


def test_tar_is_reproducible(tmp_path: Path) -> None:
    for name in ("a", "b"):
        build(replace(load_target("cpu"), export="tar"), tmp_path / name)
    assert (tmp_path / "a" / "lib.tar").read_bytes() == (tmp_path / "b" / "lib.tar").read_bytes()


@pytest.mark.heavy  # the first link for a platform builds zig's own libraries for it
@needs_zig
def test_zig_links_for_other_machines(tmp_path: Path) -> None:
    if linker.this_platform() != linker.Platform("arm64", "linux"):
        _, names = build(load_target("arm64"), tmp_path / "arm")
        assert (
            names == ["lib.so"] and struct.unpack_from("<H", (tmp_path / "arm" / "lib.so").read_bytes(), 18)[0] == 183
        )
    _, names = build(load_target("m1"), tmp_path / "metal")
    assert names == ["lib.dylib", "lib.tar"]
    library = (tmp_path / "metal" / "lib.dylib").read_bytes()
    assert 0x1D in _load_commands(library), "unsigned (no LC_CODE_SIGNATURE): Apple silicon refuses to load it"


def _load_commands(macho: bytes) -> set[int]:
    assert macho.startswith(b"\xcf\xfa\xed\xfe")
    (count,) = struct.unpack_from("<I", macho, 16)
    found, offset = set(), 32
    for _ in range(count):
        command, size = struct.unpack_from("<II", macho, offset)
        found.add(command)
        offset += size
    return found


# --- linking ---


def test_linker_prefers_the_system_and_falls_back_to_zig(monkeypatch: pytest.MonkeyPatch) -> None:
    here = linker.this_platform()
    monkeypatch.setattr(linker, "system_compiler", lambda: "/usr/bin/c++")
    monkeypatch.setattr(linker, "zig", lambda: ("zig",))
    assert linker.find_linker() == linker.Linker(("/usr/bin/c++",), here)
    other = linker.Platform("arm64", "macos" if here.system == "linux" else "linux")
    assert linker.find_linker(other).command[:3] == ("zig", "cc", "-target")
    monkeypatch.setattr(linker, "system_compiler", lambda: None)
    assert linker.find_linker().command[0] == "zig"
    monkeypatch.setattr(linker, "zig", lambda: None)
    assert linker.find_linker() is None
    with pytest.raises(UserError, match="pip install ziglang") as error:
        toolchains.prepare(load_target("cpu"))
    assert "\n" not in str(error.value)


def test_compiler_from_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    mine = tmp_path / "my-compiler"
    mine.write_text("#!/bin/sh\nexit 0\n")
    mine.chmod(0o755)
    monkeypatch.setenv("CXX", str(mine))
    assert linker.system_compiler() == str(mine)
    monkeypatch.setenv("CXX", str(tmp_path / "absent"))
    monkeypatch.setenv("CC", str(mine))
    assert linker.system_compiler() == str(mine)


def test_a_failing_link_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "bad.o").write_bytes(b"not an object")
    with pytest.raises(UserError, match="cannot link lib") as error:
        linker.require_linker().link(tmp_path / "lib.so", [tmp_path / "bad.o"])
    assert "bad.o" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("triple", "arch", "system"),
    [
        ("x86_64-unknown-linux-gnu", "x86_64", "linux"),
        ("aarch64-linux-gnu", "arm64", "linux"),
        ("arm64-apple-macos13.0", "arm64", "macos"),
        ("x86_64-apple-darwin22", "x86_64", "macos"),
        ("wasm32-unknown-unknown-wasm", "wasm32", "other"),
    ],
)
def test_platform_of(triple: str, arch: str, system: str) -> None:
    assert linker.platform_of(triple) == linker.Platform(arch, system)


# --- images ---


def test_images_are_not_fooled() -> None:
    assert images.cuda_images(b"") == images.amd_images(b"") == []
    assert images.cuda_images(b"\x7fELF\x02\x01" * 9 + struct.pack("<I", 0xBA55ED50) * 9) == []
    header = bytearray(64)
    header[:6] = b"\x7fELF\x02\x01"
    struct.pack_into("<H", header, 18, 190)
    struct.pack_into("<QQ", header, 32, 0, 1 << 40)  # says that it is longer than the file
    struct.pack_into("<HHHH", header, 54, 56, 1, 64, 1)
    assert images.cuda_images(bytes(header)) == []


# --- tensor intrinsics ---


def test_light_stack_is_the_same_stack() -> None:
    true_frames = inspect.getouterframes

    def both() -> tuple[list[inspect.FrameInfo], list[inspect.FrameInfo]]:
        return inspect.stack(), true_frames(sys._getframe())

    with tensor_intrin.light_stack():
        assert inspect.getouterframes is not true_frames
        light, true = both()
    assert inspect.getouterframes is true_frames
    assert len(light) == len(true) > 10

    def seen(info: inspect.FrameInfo) -> tuple[object, ...]:
        return info.frame, info.lineno, info.function, info.code_context, info.index

    for ours, theirs in zip(light, true, strict=True):
        assert seen(ours) == seen(theirs), ours.filename


def test_a_kernel_is_parsed_without_looking_through_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same kernel: each `T.inline` that it calls asks for every frame around, each frame's module is looked for."""
    import tvm_ffi

    from gpt2_tvm.kernels.cpu_attention import attention
    from gpt2_tvm.kernels.spec import AttentionSpec

    searches, getmodule = 0, inspect.getmodule

    def counted(*given: Any) -> Any:
        nonlocal searches
        searches += 1
        return getmodule(*given)

    monkeypatch.setattr(inspect, "getmodule", counted)
    spec = AttentionSpec(n_head=2, head_dim=8, capacity=16, dtype="float32", scale=0.25)
    usual = attention.__wrapped__(spec, 128)
    before, searches = searches, 0
    with tensor_intrin.light_stack():
        light = attention.__wrapped__(spec, 128)
    assert searches < before / 20
    assert tvm_ffi.structural_equal(light, usual, map_free_vars=True)


def test_light_stack_goes_when_an_import_fails_and_serves_threads() -> None:
    true_frames = inspect.getouterframes
    with pytest.raises(ZeroDivisionError), tensor_intrin.light_stack():
        1 / 0  # noqa: B018
    assert inspect.getouterframes is true_frames

    def enter() -> None:
        for _ in range(50):
            with tensor_intrin.light_stack():
                inspect.stack()

    threads = [threading.Thread(target=enter) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert inspect.getouterframes is true_frames


@pytest.mark.parametrize("kind", ["cuda", "metal"])
def test_intrinsics_are_registered(kind: str) -> None:
    tensor_intrin.load(kind)
    module = sys.modules[f"tvm.s_tir.tensor_intrin.{kind}"]
    if kind == "metal":
        group = module.get_simdgroup_intrin_group("shared", "shared", "float16", trans_b=True)
    else:
        group = module.get_wmma_intrin_group("shared.dyn", "shared.dyn", "float16", "float32", trans_b=True)
    for name in group.values():
        assert tvm.s_tir.TensorIntrin.get(name).impl is not None


@pytest.mark.heavy
def test_intrinsics_load_fast() -> None:
    """With torch loaded, as where a checkpoint is converted: 2 s, and 20 s or more without `light_stack`."""
    code = (
        "import time, torch, tvm; from gpt2_tvm.toolchains import tensor_intrin; start = time.perf_counter()\n"
        "tensor_intrin.load('metal'); print(time.perf_counter() - start)"
    )
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=True)
    assert float(done.stdout) < 10
