"""`model.wasm`: a module's host code and WGSL, linked with TVM's web runtime into one file that a page loads.

npm's @mlc-ai/web-runtime instantiates it; parameters are fetched apart, as tensor-cache shards. The same link makes
the small modules that the tuner sends to a page.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpt2_tvm.errors import UserError
from gpt2_tvm.toolchains.webruntime import emscripten
from gpt2_tvm.toolchains.webruntime.build import runtime_objects

if TYPE_CHECKING:
    from targets import DeviceTarget

MODULE = "model.wasm"
HOST = {"kind": "llvm", "mtriple": "wasm32-unknown-unknown-wasm", "vector-width": 128}
# -O1: a link takes two seconds and gives 6 MB; -O3 takes 80 s and gives 4 MB. What is compiled is optimised either way.
LINK = (
    "-O1",
    "--no-entry",
    *("-s", "WASM_BIGINT=1"),
    *("-s", "STANDALONE_WASM=1"),
    *("-s", "ALLOW_MEMORY_GROWTH=1"),
    *("-s", "INITIAL_MEMORY=160MB"),
    *("-s", "ERROR_ON_UNDEFINED_SYMBOLS=0"),  # what the page provides is undefined here
)
WEB = Path(__file__).resolve().parents[2] / "web"  # the JavaScript of this project
JS_RUNTIME = "node_modules/@mlc-ai/web-runtime/lib/index.js"

Say = Callable[[str], None]


def wasm_target(target: DeviceTarget) -> Any:
    """`target`, a webgpu one, with WebAssembly as the host. Imports TVM."""
    from tvm.target import Target

    return Target(target.tvm_attributes(), host=Target(HOST))


def fcompile(runtime: Sequence[Path]) -> Callable[..., None]:
    """A link with the runtime's objects as the `fcompile` argument of TVM's `export_library`."""

    def link(output: str, objects: Sequence[str], options: Sequence[str] | None = None, **_: object) -> None:
        files = [str(path) for path in runtime] + [str(path) for path in objects]
        emscripten.require().run([*LINK, "-o", str(output), *files, *(options or ())], f"link {Path(output).name}")

    link.object_format = "o"  # type: ignore[attr-defined]  # bitcode of TVM's LLVM is too new for most emcc
    return link


def export(executable: Any, path: Path, say: Say | None = None, runtime: Sequence[Path] | None = None) -> None:
    """Link what was compiled for `wasm_target` to `path`, which must end in .wasm.

    say: told when the runtime has to be built first. runtime: objects of another build of it. UserError where emcc is
    missing or fails.
    """
    objects = list(runtime) if runtime is not None else runtime_objects(say)
    executable.export_library(str(path), fcompile=fcompile(objects))
    path.with_suffix(".js").unlink(missing_ok=True)


def write_module(module: Any, target: DeviceTarget, folder: Path, note: Say) -> list[str]:
    """Compile a scheduled Relax module for a page, into `folder`; returns the names of the files.

    Where that cannot be done (no emcc) nothing is written and `note` is told why: wgpu runs the artifact without.
    """
    try:
        link_module(module, target, folder, note)
    except UserError as error:
        note(f"no {MODULE}, so this artifact runs through wgpu and not in a page: {error}")
        return []
    return [MODULE]


def link_module(module: Any, target: DeviceTarget, folder: Path, note: Say) -> None:
    """The same for an artifact that is nothing without: UserError where emcc is missing or fails."""
    from gpt2_tvm import toolchains

    runtime = runtime_objects(note)
    where = wasm_target(target)
    with where:
        executable = toolchains.build(module, where)
    export(executable, folder / MODULE, runtime=runtime)


def manifest(target: DeviceTarget, folder: Path, capacity: int) -> dict[str, Any]:
    """What a webgpu artifact's manifest says besides: "webgpu", see `web_needs.device_needs`. Empty for other kinds."""
    if target.kind != "webgpu":
        return {}
    from gpt2_tvm.toolchains.web_needs import device_needs

    return {"webgpu": device_needs(folder, capacity)}


def js_runtime() -> Path:
    """TVM's JavaScript for pages and node; UserError that says how to get it."""
    path = WEB / JS_RUNTIME
    if not path.is_file():
        where = "web" if WEB.is_dir() else "the folder web of this project's source"
        raise UserError(
            f"the JavaScript packages are not installed; run: npm ci --prefix {where} (needs node 20 or later)"
        )
    return path


def free_port() -> int:
    """A TCP port of the loopback device that nobody listens on now."""
    import socket

    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def node_version(node: str = "node") -> tuple[int, ...] | None:
    """node's version, or None where it is missing."""
    try:
        said = subprocess.run([node, "--version"], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    except OSError:
        return None
    numbers = said.stdout.strip().removeprefix("v").split(".")
    return tuple(int(n) for n in numbers if n.isdigit()) or None
