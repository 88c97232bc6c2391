"""The web runtime's sources, headers and cache; nothing here calls emcc."""

from __future__ import annotations

import base64
import struct
import subprocess
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest

from gpt2_tvm.errors import UserError
from gpt2_tvm.toolchains import linker, web
from gpt2_tvm.toolchains.webruntime import build, emscripten, sources
from gpt2_tvm.toolchains.webruntime.patches import PATCHES, Patch

FIXTURE = Path(__file__).parent / "web_headers.cc"


@pytest.fixture
def no_tree(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(sources.TVM_SOURCE_DIR, raising=False)


def test_sources_are_complete_and_patched(tmp_path: Path, no_tree: None) -> None:
    sources.assemble(tmp_path)
    for name in (*sources.UNITS, *sources.MISSING_HEADERS):
        assert (tmp_path / name).is_file(), name
    for patch in PATCHES:
        assert patch.new in (tmp_path / patch.file).read_text()


def test_patches_fit_the_installed_sources_once() -> None:
    tvm = sources.package_folder("apache-tvm", "tvm")
    for patch in PATCHES:
        text = (tvm / patch.file).read_text()
        assert text.count(patch.old) == 1
        mended = patch.apply(text)
        assert mended != text
        with pytest.raises(ValueError, match=patch.name):
            patch.apply(mended.replace(patch.old, ""))


def test_other_sources_are_refused_in_one_line(tmp_path: Path, no_tree: None) -> None:
    strange = Patch("strange", PATCHES[0].file, "no such text", "", "")
    with pytest.raises(UserError, match="strange expects it: install apache-tvm") as caught:
        sources.assemble(tmp_path, [strange])
    assert "\n" not in str(caught.value)


def test_headers_come_from_a_source_tree_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(sources.TVM_SOURCE_DIR, str(tmp_path))
    with pytest.raises(UserError, match="no TVM source tree"):
        sources.headers()
    (tmp_path / "include/tvm/support").mkdir(parents=True)
    (tmp_path / "include/tvm/support/io.h").write_text("// theirs")
    found = sources.headers()
    assert found["include/tvm/support/io.h"].read_text() == "// theirs"
    assert "GPT2_TVM" in found["src/support/arena.h"].read_text()  # ours, where the tree has none


def test_our_headers_do_what_the_runtime_asks_of_them(tmp_path: Path, no_tree: None) -> None:
    compiler = linker.system_compiler()
    if compiler is None:
        pytest.skip(f"no C++ compiler: {linker.HOW_TO_GET_ONE}")
    tree, program = tmp_path / "tree", tmp_path / "headers"
    sources.assemble(tree)
    includes = [f"-I{tree / part}" for part in sources.INCLUDES]
    library = sources.package_folder("apache-tvm-ffi", "tvm_ffi") / "lib"
    command = [compiler, "-std=c++17", "-O1", *includes, str(FIXTURE), "-o", str(program)]
    subprocess.run([*command, f"-L{library}", "-ltvm_ffi", f"-Wl,-rpath,{library}"], check=True)

    def ask(what: str, given: bytes = b"") -> bytes:
        return subprocess.run([str(program), what], input=given, capture_output=True, check=True).stdout

    for size in (0, 1, 2, 3, 4, 57, 1000):
        data = bytes(np.random.default_rng(size).integers(0, 256, size, np.uint8))
        assert ask("base64", data) == base64.b64encode(data)
        assert ask("from-base64", base64.b64encode(data)) == data
    halves = np.arange(65536, dtype=np.uint16)
    widened = np.frombuffer(ask("half", halves.tobytes()), np.float32)
    expected = halves.view(np.float16).astype(np.float32)
    assert np.array_equal(np.isnan(widened), np.isnan(expected))
    assert np.array_equal(widened[~np.isnan(expected)], expected[~np.isnan(expected)])
    assert np.array_equal(np.signbit(widened), np.signbit(expected))

    text = b"name"
    wanted = struct.pack("<i", 7) + struct.pack("<Q", 4) + text  # plain data, a string with its 64-bit length
    wanted += struct.pack("<Qqq", 2, -1, 5)  # a vector with its count
    wanted += struct.pack("<QQ", 1, 1) + b"k" + struct.pack("<Q", 1) + b"v"  # a map: count, then key and value
    wanted += struct.pack("<QBBHBBH", 2, 2, 32, 1, 0, 8, 4)  # an ffi array of dtypes
    assert ask("write") == wanted
    assert ask("read", wanted) == b"ok"
    assert ask("read", wanted[:-1]) == b"short"
    assert ask("ring") == b"ok"


def test_runtime_is_built_once_a_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_tree: None) -> None:
    calls: list[str] = []

    class Fake:
        version = "9.9.9"

        def run(self, arguments: list[str], what: str) -> None:
            calls.append(what)
            Path(arguments[arguments.index("-o") + 1]).write_bytes(b"object")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(emscripten, "require", Fake)
    said: list[str] = []
    first = build.runtime_objects(said.append)
    assert sorted(calls) == sorted(f"compile {Path(unit).name}" for unit in sources.UNITS)
    assert len(said) == 1 and "once" in said[0]
    assert all(path.parent == tmp_path / "gpt2-tvm" / "web-runtime" for path in first)
    assert not list(first[0].parent.glob(".build-*")), "the build folder is left behind"
    assert build.runtime_objects(said.append) == first and len(calls) == 3 and len(said) == 1

    without = build.runtime_objects(patches=[PATCHES[0]])  # only the file that the other patch is for is compiled
    assert [a == b for a, b in zip(without, first, strict=True)] == [True, True, False]
    assert calls[3:] == [f"compile {Path(PATCHES[1].file).name}"]
    Fake.version = "10.0.0"
    assert not set(build.runtime_objects()) & set(first)


def test_a_cache_that_cannot_be_written_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_tree: None
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(emscripten, "require", lambda: emscripten.Emscripten("emcc", "1.2.3"))
    with pytest.raises(UserError, match="set XDG_CACHE_HOME"):
        build.runtime_objects()


def test_without_emcc_compile_goes_on_and_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("EMCC", raising=False)
    with pytest.raises(UserError, match=r"^emcc is missing: install emscripten") as caught:
        emscripten.require()
    assert "\n" not in str(caught.value)
    notes: list[str] = []
    assert web.write_module(None, None, tmp_path, notes.append) == []  # type: ignore[arg-type]
    assert len(notes) == 1 and "emcc is missing" in notes[0] and "wgpu" in notes[0]


def test_emcc_errors_are_one_line(tmp_path: Path) -> None:
    fake = tmp_path / "emcc"
    fake.write_text("#!/bin/sh\necho 'note: something' >&2\necho 'x.cc:1: error: no such thing' >&2\nexit 1\n")
    fake.chmod(0o755)
    with pytest.raises(UserError, match=r"emcc 1\.2\.3 cannot link model\.wasm: x\.cc:1: error: no such thing$"):
        emscripten.Emscripten(str(fake), "1.2.3").run([], "link model.wasm")


def test_headers_are_in_the_package() -> None:
    """setuptools takes along what package-data names: the headers must lie inside the package."""
    ours = Path(sources.__file__).parent / "headers"
    assert {p.relative_to(ours).as_posix() for p in ours.rglob("*.h")} == set(sources.MISSING_HEADERS)
    assert metadata.version("apache-tvm").startswith("0.27")
