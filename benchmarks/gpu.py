"""Our engine and torch's best on an NVIDIA GPU, beside what the GPU can do. Each part ends within 8 minutes.

Here, with a compiler and perhaps no GPU:

    python benchmarks/gpu.py pack-kit --output gpu-kit.tar.xz

There, with a GPU, torch, numpy and no network, from the folder with gpu-kit.tar.xz (which is unpacked beside
itself; or `tar xf` it and run the gpu.py in it):

    python benchmarks/gpu.py machine        copy bandwidth, launches, arithmetic
    python benchmarks/gpu.py correctness    logits beside torch's, graphs beside plain launches
    python benchmarks/gpu.py ours           each step of ours alone and together
    python benchmarks/gpu.py peers          torch eager, by CUDA graph, compiled
    python benchmarks/gpu.py sizes          every model, precision and batch of the kit
    python benchmarks/gpu.py kernels        the LM head beside the copy, each product of a prefill beside cuBLAS
    python benchmarks/gpu.py replays        50,000 replays: memory, and the ids of plain launches
    python benchmarks/gpu.py sanitizer      compute-sanitizer on the bundled model
    python benchmarks/gpu.py report         the tables; --figures FOLDER for the figures

A part that ran out of time goes on where it ended when it is called again.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

HERE = Path(__file__).resolve().parent


def _enter_kit() -> None:
    """In a kit: check the Python, and put the kit's packages in front of this machine's. Children come through here
    too, since they import this file."""
    sys.path.insert(0, str(HERE))
    if not (HERE / "kit.json").is_file():
        if __name__ == "__main__" and not all(map(find_spec, ("typer", "tvm", "gpt2_tvm"))):
            from gpu_bench.unpacking import hand_over

            hand_over(PACKED)
        return
    made_for, python = json.loads((HERE / "kit.json").read_text())["python"], "{}.{}".format(*sys.version_info)
    if made_for != python:
        sys.exit(f"error: this kit is for Python {made_for}, and this is {python}; make one with --wheels")
    os.environ["TVM_USE_RUNTIME_LIB"] = "1"
    os.environ.setdefault("TVM_FFI_DISABLE_TORCH_C_DLPACK", "1")  # it would compile an exchange that we do not make
    sys.path.insert(0, str(HERE / "lib"))


PACKED = Path("gpu-kit.tar.xz")
_enter_kit()

import typer  # noqa: E402 - from the kit, if this is one

from gpt2_tvm import cli  # noqa: E402
from gpt2_tvm.errors import UserError  # noqa: E402

if TYPE_CHECKING:
    from gpu_bench.crew import Clock
    from gpu_bench.runs import Entry

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None, no_args_is_help=True)

LIMIT_S = 450.0
Kit = Annotated[Path, typer.Option(help="The kit, packed or a folder, or a folder with artifacts.")]
Results = Annotated[Path, typer.Option(help="Where the parts write their results.")]
Model = Annotated[str, typer.Option(help="The model, as in the artifact's manifest.")]
Quantization = Annotated[str, typer.Option(help="The precisions, a comma list.")]
Repeats = Annotated[int, typer.Option(min=1, help="Rounds that count.")]
Limit = Annotated[float, typer.Option(min=1, help="Seconds after which the part stops by itself.")]
Batch = Annotated[str, typer.Option(help="Sequences at a time, a comma list.")]
Prompt = Annotated[int, typer.Option(min=1, help="Tokens of the prompt.")]
Generate = Annotated[str, typer.Option(help="Tokens to decode after it, a comma list.")]
Modes = Annotated[str, typer.Option(help="Of torch, a comma list.")]
Device = Annotated[str, typer.Option(help="cuda; cpu to try the parts out where there is no GPU.")]
DEFAULT_KIT = HERE if (HERE / "kit.json").is_file() else PACKED
DEFAULT_RESULTS = Path("gpu-results")


@app.command()
def machine(
    results: Results = DEFAULT_RESULTS,
    repeats: Repeats = 20,
    device: Device = "cuda",
    copy_mb: Annotated[int, typer.Option(min=1, help="10^6 bytes to copy.")] = 4000,
    edge: Annotated[int, typer.Option(min=1, help="Rows of the square matrices.")] = 8192,
    limit: Limit = LIMIT_S,
) -> None:
    """Copy bandwidth, the time of an empty kernel in a graph and outside, matrix products."""
    from gpu_bench.crew import alone
    from gpu_bench.machine import measure, require_torch
    from gpu_bench.runs import save

    require_torch(device)
    measured, failed = alone("machine", limit, measure, device, repeats, copy_mb * 10**6 // 4 * 4, edge)
    if failed:
        raise UserError(failed["message"])
    save(results / "machine.json", measured)
    _print(results)


@app.command()
def correctness(
    kit: Kit = DEFAULT_KIT,
    results: Results = DEFAULT_RESULTS,
    limit: Limit = LIMIT_S,
    model: Model | None = None,
    each: Annotated[float, typer.Option(min=1, help="Seconds for one artifact.")] = 150.0,
) -> None:
    """Logits of every artifact against torch in float32; ids of the graphs against plain launches."""
    from gpu_bench.correctness import check_all
    from gpu_bench.crew import Clock
    from gpu_bench.machine import require_torch

    require_torch("cpu")
    _finish(results, check_all(kit, results, model, Clock(limit), each))


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

    groups = [ablation(find_artifacts(kit, model, q)) for q in quantization.split(",")]
    Timing(batch, prompt_tokens, generate, repeats, device, results).run("ours", groups, limit)


@app.command()
def peers(
    kit: Kit = DEFAULT_KIT,
    results: Results = DEFAULT_RESULTS,
    model: Model = "gpt2",
    quantization: Quantization = "q0f16,q0f32",
    modes: Modes = "cuda-graph,reduce-overhead,max-autotune,eager",
    batch: Batch = "1",
    prompt_tokens: Prompt = 322,
    generate: Generate = "64,512",
    repeats: Repeats = 7,
    limit: Limit = LIMIT_S,
    device: Device = "cuda",
) -> None:
    """The same weights in torch: eager, one CUDA graph a token, torch.compile with a static cache."""
    from gpu_bench.machine import require_torch
    from gpu_bench.runs import beside_torch

    require_torch(device)
    groups = [beside_torch(_full(kit, model, q), modes.split(",")) for q in quantization.split(",")]
    Timing(batch, prompt_tokens, generate, repeats, device, results).run("peers", groups, limit)


@app.command()
def sizes(
    kit: Kit = DEFAULT_KIT,
    results: Results = DEFAULT_RESULTS,
    models: Annotated[str, typer.Option(help="A comma list.")] = "gpt2,gpt2-medium,gpt2-large,gpt2-xl",
    quantization: Quantization = "q0f16,q0f32",
    modes: Annotated[str, typer.Option(help="Of torch, beside ours at every size first; '' for none.")] = "cuda-graph",
    then: Annotated[
        str, typer.Option(help="Of torch, in a second pass over every size, as time allows; '' for none.")
    ] = "reduce-overhead,max-autotune,eager",
    batch: Batch = "1,4,12,64",
    prompt_tokens: Prompt = 322,
    generate: Generate = "64,512",
    repeats: Repeats = 3,
    limit: Limit = LIMIT_S,
    device: Device = "cuda",
) -> None:
    """Every model, precision, batch and length: ours at its best beside torch."""
    from gpu_bench.crew import Clock
    from gpu_bench.runs import beside_torch, sizes_parts

    timing = Timing(batch, prompt_tokens, generate, repeats, device, results)
    failed, incomplete = [], []
    clock = Clock(limit)
    for part, model, q, chosen in sizes_parts(models, quantization, modes, then):
        try:
            result = timing.measure(part, [beside_torch(_full(kit, model, q), chosen)], clock)
            failed += [f"{model} {q}: {row['message']}" for row in result["failures"]]
            incomplete += [] if result["complete"] else [f"{model} {q}"]
        except UserError as error:  # the others go on
            failed.append(f"{model} {q}: {error}")
    _print(results)
    if failed:
        raise UserError("; ".join(dict.fromkeys(failed)))
    if incomplete:
        print(f"not complete: {', '.join(dict.fromkeys(incomplete))}; the same command goes on", file=sys.stderr)


@app.command()
def kernels(
    kit: Kit = DEFAULT_KIT,
    results: Results = DEFAULT_RESULTS,
    model: Model = "gpt2",
    quantization: Quantization = "q0f16,q0f32",
    batch: Batch = "1,64",
    prompt_tokens: Prompt = 322,
    repeats: Repeats = 20,
    limit: Limit = LIMIT_S,
    device: Device = "cuda",
) -> None:
    """The LM head beside the copy bandwidth, and each product of a prefill beside torch's (cuBLAS)."""
    from gpu_bench.kernels import kernels_part
    from gpu_bench.machine import require_torch
    from gpu_bench.runs import find_artifacts

    from gpt2_tvm.measure.cases import parse_sizes

    require_torch(device)
    batches = parse_sizes("--batch", batch)
    wanted = quantization.split(",")
    paths = [_full(kit, model, q) for q in wanted]
    paths += [p for q in wanted for p in find_artifacts(kit, model, q) if p.name.endswith("-wgmma") and p not in paths]
    _finish(results, kernels_part(paths, batches, prompt_tokens, repeats, device, limit, results))


@app.command()
def replays(
    kit: Kit = DEFAULT_KIT,
    results: Results = DEFAULT_RESULTS,
    model: Model = "gpt2",
    quantization: Quantization = "q0f16",
    count: Annotated[int, typer.Option(min=1, help="Tokens to decode by graph.")] = 50_000,
    limit: Limit = LIMIT_S,
    device: Device = "cuda",
) -> None:
    """Many replays of the decode graph: memory must not grow, and the ids must be those of plain launches."""
    from gpu_bench.replays import replays_part

    paths = [_full(kit, model, q) for q in quantization.split(",")]
    _finish(results, replays_part(paths, count, device, limit, results))


@app.command()
def sanitizer(
    kit: Kit = DEFAULT_KIT,
    results: Results = DEFAULT_RESULTS,
    model: Model = "bundled",
    tool: Annotated[str, typer.Option(help="Of compute-sanitizer, a comma list.")] = "memcheck,racecheck",
    limit: Limit = LIMIT_S,
) -> None:
    """compute-sanitizer on a small model, and on what has kernels for many rows alone, where it is on PATH."""
    from gpu_bench.runs import find_artifacts
    from gpu_bench.sanitizer import sanitizer_part

    paths = find_artifacts(kit, model)
    many = [path for path in find_artifacts(kit) if path.name == "gpt2-q0f16-wgmma" and path not in paths]
    _finish(results, sanitizer_part([*paths, *many], tool.split(","), limit, results))


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
        Path | None, typer.Option(help="Wheels of apache-tvm, apache-tvm-ffi and ml_dtypes for the machine's Python.")
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
    print(f"  there  python benchmarks/gpu.py machine, beside it; or tar xf {output.name} and run the gpu.py in it")


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


@dataclass(frozen=True)
class Timing:
    """What the timed parts are asked for."""

    batch: str
    prompt_tokens: int
    generate: str
    repeats: int
    device: str
    results: Path

    def measure(self, part: str, groups: list[list[Entry]], clock: Clock) -> dict[str, Any]:
        from gpu_bench.runs import run_part

        from gpt2_tvm.measure.cases import cross, parse_sizes

        sizes = parse_sizes("--batch", self.batch), (self.prompt_tokens,), parse_sizes("--generate", self.generate)
        return run_part(part, groups, cross(*sizes), self.repeats, clock, self.device, self.results)

    def run(self, part: str, groups: list[list[Entry]], limit: float) -> None:
        """Measure, print and judge one part."""
        from gpu_bench.crew import Clock

        found = self.measure(part, groups, Clock(limit))
        if found["rows"]:
            _print(self.results)
        _check(part, found, limit)


def _check(part: str, found: dict[str, Any], limit: float) -> None:
    """Status 1 where something failed, or nothing was measured."""
    if found["failures"]:
        raise UserError("; ".join(dict.fromkeys(row["message"] for row in found["failures"])))
    if not found["rows"]:
        raise UserError(f"{part}: nothing was measured within {limit:.0f} s")


def _finish(results: Path, failures: list[str]) -> None:
    _print(results)
    if failures:
        raise UserError("; ".join(failures))


def _print(results: Path) -> None:
    from gpu_bench.report import render

    print(render(results), end="")


if __name__ == "__main__":
    cli.run(app)
