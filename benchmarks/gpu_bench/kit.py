"""The kit: cross-compiled artifacts and what runs them, for a GPU machine without compiler and network.

    gpu-kit/
        gpu.py, gpu_bench/     this benchmark
        lib/                   TVM's runtime, this package, typer and rich
        artifacts/NAME/        code and manifest; weights only of the bundled model
        kit.json               the Python it is for

The weights of GPT-2's sizes are seeded random numbers, which the machine makes for itself (`fill`): gigabytes need not
travel. numpy and torch must be there.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from gpt2_tvm import pack
from gpt2_tvm.artifact import read_manifest, write_manifest
from gpt2_tvm.build import compile_model
from gpt2_tvm.errors import UserError
from gpt2_tvm.files import replacing_file
from gpt2_tvm.kernels.persistent.shape import suits
from gpu_bench.weights import SEED
from targets import load_target, specialise

HERE = Path(__file__).resolve().parent
COMMAND_LINE = ("typer", "click", "rich", "pygments", "markdown_it", "mdurl", "shellingham", "annotated_doc")
STOCK = "matmul,gemv,reduction,general-reduction"
# Of one model, (rules, attention): none of our steps, each of them alone, the last four together with what they need.
# One graph a token is a step too: every variant is launched both ways when it runs, so `stock` as a graph is it alone.
VARIANTS = {
    "stock": ("stock", "materialized"),
    "attention": ("stock", "flash"),
    "wide": (f"wide-gemv,{STOCK}", "materialized"),
    "norm": (f"norm-gemv,{STOCK}", "materialized"),
    "tensor": (f"tensor-matmul,{STOCK}", "materialized"),
    "persistent": ("with-persistent", "flash"),
    "late": ("with-late-norm-gemv", "flash"),  # all of them, but weights wait for their vector
    "wgmma": ("with-wgmma-matmul", "flash"),  # all of them, and Hopper's warpgroup instructions where rows are many
    "full": ("full", "flash"),
}
Say = Callable[[str, float], None]


def build(
    output: Path,
    models: Sequence[str],
    quantizations: Sequence[str],
    target: str,
    batch_sizes: Sequence[int],
    ablated: str | None,
    bundled: bool,
    wheels: Path | None,
    say: Say,
) -> Path:
    """Compile every artifact and write the kit.

    Args:
        output: a .tar.xz.
        ablated: the model that also comes in every one of `VARIANTS`, or None.
        bundled: also the bundled trained model, with its weights: for `correctness`.
        wheels: a folder with wheels of apache-tvm, apache-tvm-ffi and ml_dtypes for the machine's Python; None
            takes this Python's own.
        say: called with (what, share done).

    Returns `output`. Raises UserError for what the user can mend.
    """
    if not output.name.endswith(".tar.xz"):
        raise UserError(f"--output {output}: give a file name that ends in .tar.xz")
    jobs = jobs_of(models, quantizations, target, ablated, bundled)
    with tempfile.TemporaryDirectory(prefix="gpt2-tvm-kit-") as scratch:
        folder = Path(scratch)
        for i, (model, q, variant) in enumerate(jobs):
            say(f"compiling {model} {q} {variant} for {target}", 0.9 * i / len(jobs))
            name = f"{Path(model).name}-{q}-{variant}"
            compile_one(folder / name, model, q, target, variant, batch_sizes if model != "bundled" else (1, 4))
        members = [*_programs(), *_libraries(wheels), pack.Member("kit.json", _about(wheels))]
        members += [
            pack.Member(f"artifacts/{file.relative_to(folder).as_posix()}", file)
            for file in sorted(folder.rglob("*"))
            if file.is_file()
        ]
        with replacing_file(output) as stream:
            pack._write(stream, output.name.removesuffix(".tar.xz"), members, lambda what, done: say("packing", 0.95))
    return output


def jobs_of(
    models: Sequence[str], quantizations: Sequence[str], target: str, ablated: str | None, bundled: bool
) -> list[tuple[str, str, str]]:
    """(model, precision, variant) of every artifact; see `build`. The bundled model comes in the variants whose
    steps share no kernel."""
    device = specialise(load_target(target))
    alone, warpgroups = suits(device), device.arch() in ("sm_90", "sm_90a")

    def of(model: str, q: str) -> Iterator[tuple[str, str, str]]:
        others = ("wgmma", "full") if model == "gpt2-xl" else ("full",)  # of many columns
        wanted = ("persistent", "full") if model == "bundled" else VARIANTS if model == ablated else others
        for variant in wanted:
            if variant in ("tensor", "wgmma") and q != "q0f16":  # in float32 those rules take nothing
                continue
            if variant == "wgmma" and not warpgroups:
                continue
            if variant in ("persistent", "late") and q not in ("q0f16", "q0f32"):  # packed weights: neither is for them
                continue
            if variant == "persistent" and not alone:
                continue
            yield model, q, variant

    return [job for m in (*models, *(["bundled"] if bundled else [])) for q in quantizations for job in of(m, q)]


def compile_one(
    folder: Path, model: str, quantization: str, target: str, variant: str, batch_sizes: Sequence[int]
) -> None:
    """One artifact, without its weights unless it is the bundled model's."""
    keep = model == "bundled"
    rules, attention = VARIANTS[variant]
    compile_model(
        model,
        target,
        quantization,
        folder,
        rules,
        attention,
        batch_sizes=batch_sizes,
        verify_widths=(),
        weights=keep,
    )
    if not keep:
        shutil.rmtree(folder / "params")
        manifest = read_manifest(folder)
        for key in ("format", "digest", "files"):
            del manifest[key]
        write_manifest(folder, {**manifest, "random_weights": True, "seed": SEED})


def _programs() -> Iterator[pack.Member]:
    yield pack.Member("gpu.py", HERE.parent / "gpu.py")
    for file in sorted(HERE.glob("*.py")):
        yield pack.Member(f"gpu_bench/{file.name}", file)


def _libraries(wheels: Path | None) -> Iterator[pack.Member]:
    given = {} if wheels is None else {_distribution(w): w for w in sorted(wheels.glob("*.whl"))}
    needed = {"apache_tvm", "apache_tvm_ffi", "ml_dtypes"}
    if wheels is not None and (missing := needed - set(given)):
        raise UserError(
            f"--wheels {wheels} lacks {' and '.join(sorted(missing))}; pip download --no-deps --only-binary=:all: "
            "--python-version 3.12 apache-tvm==VERSION apache-tvm-ffi==VERSION ml-dtypes -d FOLDER"
        )
    for wheel in given.values():
        yield from _unpacked(wheel)
    if wheels is None:
        for name in ("tvm", "tvm_ffi", "ml_dtypes"):
            yield from pack._package(name, pack.COMPILER_PARTS)
        for name in pack.DISTRIBUTIONS:
            yield from pack._licence_and_version(name)
    for name in (*pack.OURS, *COMMAND_LINE, "typing_extensions"):
        if importlib.util.find_spec(name) is not None:  # what typer imports differs between its versions
            yield from pack._package(name, pack.OUR_DATA)


def _distribution(wheel: Path) -> str:
    return wheel.name.split("-")[0].lower()


def _unpacked(wheel: Path) -> Iterator[pack.Member]:
    with zipfile.ZipFile(wheel) as archive:
        for name in sorted(archive.namelist()):
            path = PurePosixPath(name)
            if not name.endswith("/") and not pack._tops(path, pack.COMPILER_PARTS):
                yield pack.Member(f"lib/{name}", archive.read(name))


def _about(wheels: Path | None) -> bytes:
    python = "{}.{}".format(*sys.version_info)
    if wheels is not None:
        tags = [w.name.split("-")[2] for w in wheels.glob("*.whl") if w.name.split("-")[2].startswith("cp")]
        python = f"3.{tags[0].removeprefix('cp3')}" if tags else python
    about: dict[str, Any] = {"python": python}
    return (json.dumps(about, indent=1) + "\n").encode()
