"""Our engine and torch's best on an NVIDIA GPU, beside what the GPU can do. Each part ends within 8 minutes.

Here, with a compiler and perhaps no GPU:

    python benchmarks/gpu.py pack-kit --output gpu-kit.tar.xz

There, with a GPU, torch and no network:

    tar xf gpu-kit.tar.xz && cd gpu-kit
    python gpu.py machine        copy bandwidth, launches, arithmetic
    python gpu.py correctness    logits beside torch's, graphs beside plain launches
    python gpu.py ours           each step of ours alone and together
    python gpu.py peers          torch eager, by CUDA graph, compiled
    python gpu.py sizes          every model, precision and batch of the kit
    python gpu.py report         the tables; --figures FOLDER for the figures

A part that ran out of time goes on where it ended when it is called again.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

HERE = Path(__file__).resolve().parent


def _enter_kit() -> None:
    """In a kit: check the Python, and put the kit's packages in front of this machine's. Children come through here
    too, since they import this file."""
    sys.path.insert(0, str(HERE))
    if not (HERE / "kit.json").is_file():
        return
    made_for, python = json.loads((HERE / "kit.json").read_text())["python"], "{}.{}".format(*sys.version_info)
    if made_for != python:
        sys.exit(f"error: this kit is for Python {made_for}, and this is {python}; make one with --wheels")
    os.environ["TVM_USE_RUNTIME_LIB"] = "1"
    os.environ.setdefault("TVM_FFI_DISABLE_TORCH_C_DLPACK", "1")  # it would compile an exchange that we do not make
    sys.path.insert(0, str(HERE / "lib"))


_enter_kit()

import typer  # noqa: E402 - from the kit, if this is one

from gpt2_tvm import cli  # noqa: E402
from gpt2_tvm.errors import UserError  # noqa: E402

if TYPE_CHECKING:
    from gpu_bench.runs import Entry

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None, no_args_is_help=True)

LIMIT_S = 450.0
Kit = Annotated[Path, typer.Option(help="The kit's folder, or one with artifacts.")]
Results = Annotated[Path, typer.Option(help="Where the parts write their results.")]
Model = Annotated[str, typer.Option(help="The model, as in the artifact's manifest.")]
Quantization = Annotated[str, typer.Option(help="The precisions, a comma list.")]
Repeats = Annotated[int, typer.Option(min=1, help="Rounds that count.")]
Limit = Annotated[float, typer.Option(min=1, help="Seconds after which the part stops by itself.")]
Batch = Annotated[str, typer.Option(help="Sequences at a time, a comma list.")]
Prompt = Annotated[int, typer.Option(min=1, help="Tokens of the prompt.")]
Generate = Annotated[str, typer.Option(help="Tokens to decode after it, a comma list.")]
Device = Annotated[str, typer.Option(help="cuda; cpu to try the parts out where there is no GPU.")]
DEFAULT_KIT, DEFAULT_RESULTS = HERE, Path("gpu-results")


@app.command()
def machine(
    results: Results = DEFAULT_RESULTS,
    repeats: Repeats = 20,
    device: Device = "cuda",
    copy_mb: Annotated[int, typer.Option(min=1, help="10^6 bytes to copy.")] = 4000,
    edge: Annotated[int, typer.Option(min=1, help="Rows of the square matrices.")] = 8192,
) -> None:
    """Copy bandwidth, the time of an empty kernel in a graph and outside, matrix products."""
    from gpu_bench.machine import measure
    from gpu_bench.runs import save

    save(results / "machine.json", measure(device, repeats, copy_mb * 10**6 // 4 * 4, edge))
    _print(results)


@app.command()
def correctness(
    kit: Kit = DEFAULT_KIT, results: Results = DEFAULT_RESULTS, limit: Limit = LIMIT_S, model: Model | None = None
) -> None:
    """Logits of every artifact against torch in float32; ids of the graphs against plain launches."""
    import time

    from gpu_bench.correctness import check, code_of
    from gpu_bench.machine import require_torch
    from gpu_bench.runs import find_artifacts, read, save
    from gpu_bench.weights import fill

    require_torch("cpu")
    file = results / "correctness.json"
    rows: list[dict[str, Any]] = [row for row in (read(file) or {}).get("rows", ()) if row["ok"]]
    done = {(row["artifact"], row["code"]) for row in rows}  # what was wrong is tried again
    start, longest = time.monotonic(), 0.0
    left: list[str] = []
    for path in find_artifacts(kit, model):
        code = code_of(path)
        if (path.name, code) in done:
            continue
        rows = [row for row in rows if row["artifact"] != path.name]  # of another build
        begun = time.monotonic()
        if begun - start + longest > limit:
            left.append(path.name)
            continue
        print(path.name, file=sys.stderr, flush=True)
        fill(path)
        try:
            rows.append({**check(path, None), "code": code})
        except UserError as error:
            rows.append(
                {**dict.fromkeys(("error", "largest", "share", "allowed"), float("nan")), "same_ids": None}
                | {"artifact": path.name, "code": code, "refused": str(error), "ok": False}
            )
        longest = max(longest, time.monotonic() - begun)
        save(file, {"rows": rows, "complete": False})
    save(file, {"rows": rows, "complete": not left and all(row["ok"] for row in rows)})
    _print(results)
    wrong = [row["artifact"] for row in rows if not row["ok"]]
    if wrong or left:
        raise UserError(
            "; ".join(
                filter(
                    None,
                    (
                        wrong and f"wrong: {', '.join(wrong)}",
                        left and f"no time for: {', '.join(left)}; the same command goes on from here",
                    ),
                )
            )
        )


@app.command()
def ours(
    kit: Kit = DEFAULT_KIT,
    results: Results = DEFAULT_RESULTS,
    model: Model = "gpt2",
    quantization: Quantization = "q0f16,q0f32",
    batch: Batch = "1",
    prompt_tokens: Prompt = 322,
    generate: Generate = "64,512",
    repeats: Repeats = 7,
    limit: Limit = LIMIT_S,
    device: Device = "cuda",
) -> None:
    """One model with stock rules, with each step alone and with all, launched one by one and as a graph."""
    from gpu_bench.runs import ablation, find_artifacts

    entries = [e for q in quantization.split(",") for e in ablation(find_artifacts(kit, model, q))]
    _run("ours", entries, batch, prompt_tokens, generate, repeats, limit, device, results)


@app.command()
def peers(
    kit: Kit = DEFAULT_KIT,
    results: Results = DEFAULT_RESULTS,
    model: Model = "gpt2",
    quantization: Quantization = "q0f16",
    modes: Annotated[
        str, typer.Option(help="Of torch, a comma list.")
    ] = "eager,cuda-graph,reduce-overhead,max-autotune",
    batch: Batch = "1",
    prompt_tokens: Prompt = 322,
    generate: Generate = "64",
    repeats: Repeats = 7,
    limit: Limit = LIMIT_S,
    device: Device = "cuda",
) -> None:
    """The same weights in torch: eager, one CUDA graph a token, torch.compile with a static cache."""
    from gpu_bench.machine import require_torch
    from gpu_bench.runs import beside_torch

    require_torch(device)
    entries = [e for q in quantization.split(",") for e in beside_torch(_full(kit, model, q), modes.split(","))]
    _run("peers", entries, batch, prompt_tokens, generate, repeats, limit, device, results)


@app.command()
def sizes(
    kit: Kit = DEFAULT_KIT,
    results: Results = DEFAULT_RESULTS,
    models: Annotated[str, typer.Option(help="A comma list.")] = "gpt2,gpt2-medium,gpt2-large,gpt2-xl",
    quantization: Quantization = "q0f16,q0f32",
    modes: Annotated[str, typer.Option(help="Of torch, a comma list; '' for none.")] = "cuda-graph",
    batch: Batch = "1,4,12,64",
    prompt_tokens: Prompt = 322,
    generate: Generate = "64,512",
    repeats: Repeats = 3,
    limit: Limit = LIMIT_S,
    device: Device = "cuda",
) -> None:
    """Every model, precision, batch and length: ours at its best beside torch's CUDA graph."""
    import time

    from gpu_bench.runs import beside_torch

    end = time.monotonic() + limit
    chosen = [mode for mode in modes.split(",") if mode]
    for model in models.split(","):
        for q in quantization.split(","):
            entries = beside_torch(_full(kit, model, q), chosen)
            part = f"sizes-{model}-{q}"
            left = end - time.monotonic()
            if left > 0:
                _run(part, entries, batch, prompt_tokens, generate, repeats, left, device, results, quiet=True)
    _print(results)


@app.command()
def report(
    results: Results = DEFAULT_RESULTS,
    figures: Annotated[Path | None, typer.Option(help="A folder for figures.")] = None,
    output: Annotated[Path | None, typer.Option(help="Write the tables here instead of printing them.")] = None,
) -> None:
    """The tables of everything that was measured."""
    from gpu_bench.report import draw, render

    from gpt2_tvm.files import write_atomically

    text = render(results)
    if output is not None:
        write_atomically(output, text)
    else:
        print(text, end="")
    for path in draw(results, figures) if figures is not None else ():
        print(f"wrote {path}", file=sys.stderr)


@app.command("pack-kit")
def pack_kit(
    output: Annotated[Path, typer.Option(help="The kit, a .tar.xz.")] = Path("gpu-kit.tar.xz"),
    models: Annotated[str, typer.Option(help="A comma list.")] = "gpt2,gpt2-medium,gpt2-large,gpt2-xl",
    quantization: Quantization = "q0f16,q0f32",
    target: Annotated[str, typer.Option(help="What the machine has, as compile takes it.")] = "h200",
    batch: Batch = "1,4,12,64",
    ablated: Annotated[str, typer.Option(help="The model for the part `ours`; '' for none.")] = "gpt2",
    bundled: Annotated[bool, typer.Option(help="Also the bundled trained model, with weights.")] = True,
    wheels: Annotated[
        Path | None, typer.Option(help="Wheels of apache-tvm and apache-tvm-ffi for the machine's Python.")
    ] = None,
) -> None:
    """Compile for a GPU that is not here, and bundle what runs it. Half a minute to two for each artifact."""
    from gpu_bench.kit import build

    from gpt2_tvm.compile import progress_on_stderr

    cli.check_writable("--output", output)
    with progress_on_stderr() as say:
        build(
            output,
            [m for m in models.split(",") if m],
            quantization.split(","),
            target,
            cli.integers(batch, "--batch"),
            ablated or None,
            bundled,
            wheels,
            say,
        )
    print(f"{output}: {output.stat().st_size / 1e6:.1f} MB")
    print(f"  there  tar xf {output.name} && cd {output.name.removesuffix('.tar.xz')} && python gpu.py machine")


def _full(kit: Path, model: str, quantization: str) -> Path:
    """The artifact of a model with all steps: named ...-full, or the only one."""
    from gpu_bench.runs import find_artifacts

    found = find_artifacts(kit, model, quantization)
    full = [path for path in found if path.name.endswith("-full")] or found
    if len(full) > 1:
        raise UserError(
            f"several artifacts of {model} {quantization}: {', '.join(p.name for p in full)}; give one as --kit"
        )
    return full[0]


def _run(
    part: str,
    entries: list[Entry],
    batch: str,
    prompt_tokens: int,
    generate: str,
    repeats: int,
    limit: float,
    device: str,
    results: Path,
    quiet: bool = False,
) -> None:
    import time

    from gpu_bench.runs import run_part
    from gpu_bench.weights import fill

    from gpt2_tvm.measure.cases import cross, parse_sizes

    end = time.monotonic() + limit  # weights are made within it
    cases = cross(parse_sizes("--batch", batch), (prompt_tokens,), parse_sizes("--generate", generate))
    for path in dict.fromkeys(entry.path for entry in entries):
        fill(path, lambda what: print(what, file=sys.stderr, flush=True))
    result = run_part(part, entries, cases, repeats, max(0.0, end - time.monotonic()), device, results)
    if not quiet:
        _print(results)
    if not result["rows"]:
        raise UserError("; ".join(result["failures"]) or f"{part}: nothing was measured within {limit:.0f} s")


def _print(results: Path) -> None:
    from gpu_bench.report import render

    print(render(results), end="")


if __name__ == "__main__":
    cli.run(app)
