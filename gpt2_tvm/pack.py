"""`python -m gpt2_tvm.pack`: artifact, TVM's runtime and a runner in one file, for a machine with neither compiler nor
network.

A bundle is a .tar.xz with one folder::

    run.py         gpt2_tvm/runners/standalone.py
    bundle.json    the Python and the platform it is for
    artifact/      as it was compiled
    lib/           TVM's runtime without its compiler, this package, and the wheels they import (numpy excepted)

TVM's runtime is 4 MB of that, packed. The same artifact gives the same bytes.
"""

from __future__ import annotations

import importlib.util
import io
import json
import lzma
import sys
import sysconfig
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO

import typer

from gpt2_tvm.cli import run, write_json
from gpt2_tvm.errors import UserError

if TYPE_CHECKING:
    from gpt2_tvm.artifact import Artifact

app = typer.Typer(add_completion=False, rich_markup_mode=None)

# What is left out of TVM's packages: what compiles, what is built against, and the larger parts that only a compiler
# imports. (Patterns of paths, `tvm/...`.)
COMPILER_PARTS = (
    *("tvm/lib/libtvm_compiler.*", "tvm/3rdparty", "tvm/src", "tvm/web", "tvm/include", "tvm/cmake", "tvm/licenses"),
    *("tvm/lib64", "tvm/testing", "tvm/relax", "tvm/s_tir", "tvm/topi"),
    *("tvm_ffi/include", "tvm_ffi/3rdparty", "tvm_ffi/src", "tvm_ffi/cython", "tvm_ffi/lib/*.a"),
)
OURS = ("gpt2_tvm", "targets")
# models and a page that no artifact needs
OUR_DATA = tuple(f"gpt2_tvm/{name}" for name in ("data/austen", "data/austen-draft", "data/austen-streams", "web_page"))
DISTRIBUTIONS = ("apache-tvm", "apache-tvm-ffi")  # whose versions artifact.check_versions asks for
IMPORTED = ("tvm", "tvm_ffi", "ml_dtypes", "typing_extensions", *(() if sys.version_info >= (3, 11) else ("tomli",)))

# xz's filter for x86 code makes branches compress better and does no harm to the rest. Weights hardly compress: fast.
_CODE = [{"id": lzma.FILTER_X86}, {"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME}]
_WEIGHTS = [{"id": lzma.FILTER_LZMA2, "preset": 0}]


@dataclass(frozen=True)
class Member:
    """One file of a bundle: its path in there, and the file or bytes to take it from."""

    path: str
    source: Path | bytes

    @property
    def is_weights(self) -> bool:
        return self.path.startswith("artifact/params/") and self.path.endswith(".bin")


@app.command()
def main(
    artifact: Annotated[Path, typer.Argument(help="An artifact's folder, made by python -m gpt2_tvm.compile.")],
    output: Annotated[Path | None, typer.Option(help="The bundle. Default: the artifact's name with .tar.xz.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write what was packed as JSON.")] = None,
) -> None:
    """Bundle an artifact with TVM's runtime and a runner, for a machine with neither compiler nor network.

    There it needs CPython of this version, numpy, and for a GPU its driver (for CUDA also libcudart 13):

    \b
    tar xf gpt2-q0f16-h100.tar.xz
    python gpt2-q0f16-h100/run.py "It is a truth universally acknowledged" --max-tokens 64
    python gpt2-q0f16-h100/run.py --benchmark
    """
    from gpt2_tvm.compile import progress_on_stderr

    with progress_on_stderr() as say:
        made = pack(artifact, output, say)
    if json_file:
        write_json(json_file, made)
    print(f"{made['bundle']}: {made['size_mb']:.1f} MB, {made['unpacked_mb']:.1f} MB unpacked in {made['files']} files")
    print(f"  needs  CPython {made['python']} on {made['platform']} with numpy; {made['needs']}")
    print(f"  there  tar xf {Path(made['bundle']).name} && python {made['folder']}/run.py {made['example']}")


def pack(
    artifact: str | Path, output: str | Path | None = None, progress: Callable[[str, float], None] | None = None
) -> dict[str, Any]:
    """Write the bundle of an artifact.

    Args:
        artifact: its folder; every file of it is checked first.
        output: the .tar.xz; default the artifact's name in the current folder. Written beside and renamed.
        progress: called with (what, share done).

    Returns a summary: `bundle`, `folder` (its name inside), `size_mb`, `unpacked_mb`, `files`, `python`, `platform`,
    `needs`, `example`. Raises UserError for an artifact that is damaged or that this machine's runtime cannot run.
    """
    from gpt2_tvm.artifact import open_artifact
    from gpt2_tvm.compile import needs
    from gpt2_tvm.files import replacing_file

    say = progress or (lambda what, share: None)
    opened = open_artifact(artifact)
    _check_packable(opened)
    name = opened.path.resolve().name
    bundle = Path(output) if output else Path(f"{name}.tar.xz")
    if bundle.is_dir() or not bundle.name.endswith(".tar.xz"):
        raise UserError(f"--output {bundle}: give a file name that ends in .tar.xz")
    python, platform = "{}.{}".format(*sys.version_info), sysconfig.get_platform()
    found = list(_members(opened, {"python": python, "platform": platform, "artifact": opened.manifest["digest"]}))
    total = sum(_size(member) for member in found)
    with replacing_file(bundle) as file:
        _write(file, name, found, lambda what, done: say(f"packing {what}", 0.01 + 0.98 * done / total))
    return {
        "bundle": str(bundle),
        "folder": name,
        "size_mb": round(bundle.stat().st_size / 1e6, 2),
        "unpacked_mb": round(total / 1e6, 2),
        "files": len(found),
        "python": python,
        "platform": platform,
        "needs": needs(opened.manifest).replace(" and apache-tvm", "").replace("; no compiler", ""),
        "example": '"It is a truth" --max-tokens 64' if opened.tokenizer else "--prompt-ids 1,2,3",
    }


def _check_packable(artifact: Artifact) -> None:
    if artifact.kind == "rocm":
        raise UserError(
            f"{artifact.path} is for rocm, and apache-tvm's wheel has no ROCm runtime to pack; "
            "copy the folder to a machine with a TVM built with USE_ROCM"
        )
    if artifact.kind == "webgpu":
        raise UserError(
            f"{artifact.path} is for webgpu, which does not run on TVM's runtime; "
            "copy the folder to a machine with gpt2-tvm[webgpu]"
        )
    if artifact.library.suffix == ".tar":
        raise UserError(
            f"{artifact.path} holds unlinked objects ({artifact.library.name}), which need a compiler where they are "
            "loaded; pip install ziglang, and compile it again"
        )
    magic = artifact.library.read_bytes()[:20]
    if _platform_of(magic) != _platform_of(Path(_native_module()).read_bytes()[:20]):
        raise UserError(
            f"{artifact.library} is for another platform than this Python ({sysconfig.get_platform()}), whose TVM "
            "runtime would be packed; copy the folder there and pack it there"
        )


def _native_module() -> str:
    """A compiled module of this Python's TVM, to compare platforms with."""
    spec = importlib.util.find_spec("tvm_ffi.core")
    if spec is None or spec.origin is None:
        raise UserError("the package apache-tvm-ffi is not complete; install it again")
    return spec.origin


def _platform_of(head: bytes) -> tuple[str, bytes]:
    """Format and machine in a shared library's first 20 bytes: ELF's e_machine, or Mach-O's cputype."""
    return ("elf", head[18:20]) if head[:4] == b"\x7fELF" else ("mach-o", head[4:8])


def _members(artifact: Artifact, bundle: dict[str, Any]) -> Iterator[Member]:
    """Every file of the bundle. Weights last: what comes before them is small and soon unpacked."""
    runner = _package_folder("gpt2_tvm") / "runners" / "standalone.py"
    yield Member("run.py", runner)
    yield Member("bundle.json", (json.dumps(bundle, indent=1) + "\n").encode())
    for name in (*IMPORTED, *(("tokenizers",) if artifact.tokenizer else ())):
        yield from _package(name, COMPILER_PARTS)
    for name in OURS:
        yield from _package(name, OUR_DATA)
    for name in DISTRIBUTIONS:
        yield from _licence_and_version(name)
    inside = [
        Member(f"artifact/{name}", artifact.path / name) for name in ("manifest.json", *artifact.manifest["files"])
    ]
    yield from sorted(inside, key=lambda member: (member.is_weights, member.path))


def _package_folder(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise UserError(f"the package {name} is not installed here, so it cannot be packed; pip install gpt2-tvm")
    return Path(spec.origin).parent


def _package(name: str, without: tuple[str, ...]) -> Iterator[Member]:
    """The files of an installed package (or of a module of one file), but for byte code and what `without` matches."""
    folder = _package_folder(name)
    if folder.name != name:
        yield Member(f"lib/{name}.py", folder / f"{name}.py")
        return
    for file in sorted(folder.rglob("*")):
        relative = PurePosixPath(name, *file.relative_to(folder).parts)
        hidden = any(relative.is_relative_to(top) for top in _tops(relative, without))
        if file.is_file() and "__pycache__" not in relative.parts and not hidden:
            yield Member(f"lib/{relative}", file)


def _tops(path: PurePosixPath, patterns: tuple[str, ...]) -> list[PurePosixPath]:
    """`path` and the folders above it that match one of the patterns."""
    return [p for p in (path, *path.parents) if any(p.match(pattern) for pattern in patterns)]


def _licence_and_version(distribution: str) -> Iterator[Member]:
    """The .dist-info of a distribution: its version (which artifacts are checked against) and its licence."""
    found = metadata.distribution(distribution)
    for file in sorted(found.files or (), key=str):
        if ".dist-info" in str(file) and file.name != "RECORD" and Path(str(found.locate_file(file))).is_file():
            yield Member(f"lib/{PurePosixPath(*file.parts)}", Path(str(found.locate_file(file))))


def _size(member: Member) -> int:
    return len(member.source) if isinstance(member.source, bytes) else member.source.stat().st_size


class _Xz(io.RawIOBase):
    """A file that compresses what is written to it, with filters that may change on the way.

    An .xz file may be several streams one after another, which every reader takes for one: so each stretch of a tar
    gets the compression that suits it.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._filters: list[dict[str, Any]] | None = None
        self._compressor: lzma.LZMACompressor | None = None

    def use(self, filters: list[dict[str, Any]] | None) -> None:
        """What comes from here on is compressed with these; None ends the file."""
        if filters is self._filters:
            return
        if self._compressor is not None:
            self._file.write(self._compressor.flush())
        self._filters = filters
        self._compressor = lzma.LZMACompressor(filters=filters) if filters is not None else None

    def write(self, data: Any) -> int:
        assert self._compressor is not None, "use() comes first"
        self._file.write(self._compressor.compress(data))
        return len(data)

    def writable(self) -> bool:
        return True


def _write(file: BinaryIO, folder: str, members: list[Member], say: Callable[[str, int], None]) -> None:
    done = 0
    packed = _Xz(file)
    packed.use(_CODE)
    with tarfile.open(fileobj=packed, mode="w|", format=tarfile.PAX_FORMAT) as tar:  # type: ignore[call-overload]
        for member in members:
            info = tarfile.TarInfo(f"{folder}/{member.path}")
            info.size, info.mode = _size(member), 0o644
            packed.use(_WEIGHTS if member.is_weights else _CODE)
            say(member.path.split("/")[0] + ": " + member.path, done)
            if isinstance(member.source, bytes):
                tar.addfile(info, io.BytesIO(member.source))
            else:
                with member.source.open("rb") as source:
                    tar.addfile(info, source)
            done += info.size
    packed.use(None)


if __name__ == "__main__":
    run(app)
