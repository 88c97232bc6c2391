"""`python -m gpt2_tvm.compile`: a model and a target in, an artifact out. The work is `build.compile_model`'s."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gpt2_tvm.artifact import MLC, OWN
from gpt2_tvm.cli import integers, run, write_json
from gpt2_tvm.errors import UserError
from gpt2_tvm.passes.registry import FUSIONS

if TYPE_CHECKING:
    from gpt2_tvm.build import Progress

app = typer.Typer(add_completion=False, rich_markup_mode=None)

NEEDS = {
    "cpu": "{processor} and apache-tvm",
    "cuda": "an NVIDIA GPU ({archs}) with a driver for CUDA 13; no compiler",
    "metal": "a Mac with Apple silicon and apache-tvm's wheel there, whose runtime has Metal",
    "rocm": "an AMD GPU ({arch}) and a TVM built with USE_ROCM: apache-tvm's wheel has no ROCm runtime",
    "webgpu": "Python with wgpu (pip install 'gpt2-tvm[webgpu]') and a GPU or a software Vulkan device",
}
PIPELINES = ("gpt2_tvm", "mlc_llm")
TOLD = (  # what the summary takes from the manifest as it is
    *("model", "random_weights", "seed", "quantization", "rules", "passes", "attention", "batch_sizes"),
    *("verify_widths", "max_seq_len", "library", "compile_seconds", "total_seconds", "versions"),
)


def _list_targets(wanted: bool) -> None:
    if wanted:
        from targets.report import print_table

        print_table()
        raise typer.Exit


@app.command()
def main(
    model: Annotated[
        str,
        typer.Option(
            help="A folder in Hugging Face layout, a hub id, 'bundled' (a small model that ships with the package), or "
            "one of gpt2, gpt2-medium, gpt2-large, gpt2-xl, distilgpt2. Without a network these five get seeded "
            "random weights of their true shape."
        ),
    ] = "gpt2",
    target: Annotated[
        str, typer.Option(help="A name from --list-targets, or a TOML file that describes a device.")
    ] = "cpu",
    quantization: Annotated[
        str, typer.Option(help="How weights are stored and computed with, such as q0f32 or q0f16.")
    ] = "q0f32",
    output: Annotated[
        Path | None,
        typer.Option(
            help="The artifact's folder; an artifact that is there is replaced once the new one is whole. "
            "Default: artifacts/MODEL-QUANTIZATION-TARGET."
        ),
    ] = None,
    rules: Annotated[
        str,
        typer.Option(
            help="Schedule rules: full (the target's), stock (DLight's), baseline (none, or Fallback on GPUs), "
            "only-RULE, without-RULE, or a comma list in order. First match wins; the manifest says which rule took "
            "which function."
        ),
    ] = "full",
    passes: Annotated[
        str,
        typer.Option(
            help="Fusions of the graph: all (that target and rules can have), none, only-PASS, without-PASS, or a "
            f"comma list of {', '.join(FUSIONS)}."
        ),
    ] = "all",
    attention: Annotated[
        str,
        typer.Option(help="flash: our own kernels. materialized: matmul and softmax, which the rules schedule."),
    ] = "flash",
    batch_sizes: Annotated[
        str, typer.Option(help="Batch sizes to compile decode and verify for, with commas between.")
    ] = "1",
    verify_widths: Annotated[
        str,
        typer.Option(help="How many candidate tokens one verify call takes, with commas between; '' for none."),
    ] = "4,8",
    max_seq_len: Annotated[
        int | None,
        typer.Option(help="Capacity of the KV cache in tokens. Default: the model's n_positions."),
    ] = None,
    tuned: Annotated[Path | None, typer.Option(help="A schedule file made by tuning.apply.")] = None,
    cuda_graph: Annotated[
        bool | None,
        typer.Option(
            help="Every decode, greedy and verify step as one CUDA graph, captured once and replayed. Default: on for "
            "CUDA targets."
        ),
    ] = None,
    streams: Annotated[
        Path | None,
        typer.Option(
            help="A folder made by train_streams, or 'bundled' for the bundled model's: the model then drafts for "
            "itself, with --strategy streaming."
        ),
    ] = None,
    stream_rows: Annotated[
        str,
        typer.Option(help="Rows of the tree that a pass of streams takes; 8,4: of 8 rows an early exit keeps 4."),
    ] = "4",
    interface: Annotated[
        str,
        typer.Option(
            help="own: for this project's engine. mlc: the functions that mlc-llm and web-llm call, over TVM's paged "
            "KV cache; python -m gpt2_tvm.export_mlc then makes the folder that they load."
        ),
    ] = OWN,
    prefill_chunk: Annotated[
        int | None,
        typer.Option(
            help="With --interface mlc: tokens of one prefill call; longer prompts go in several. Default 512."
        ),
    ] = None,
    pipeline: Annotated[
        str,
        typer.Option(
            help="gpt2_tvm, or mlc_llm: the same checkpoint built by an mlc_llm that is installed here, for comparison."
        ),
    ] = PIPELINES[0],
    dump_ir: Annotated[Path | None, typer.Option(help="Write the IR after each phase into this folder.")] = None,
    seed: Annotated[int, typer.Option(help="Of the random weights.")] = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write what is printed at the end as JSON.")] = None,
    list_targets: Annotated[
        bool,
        typer.Option(
            "--list-targets",
            callback=_list_targets,
            is_eager=True,
            help="List the targets, with what this machine can do with each, and exit.",
        ),
    ] = False,
) -> None:
    """Compile a GPT-2 for a device into an artifact: a folder with machine code, weights, tokenizer and manifest.

    \b
    python -m gpt2_tvm.compile --model bundled                    for this CPU, in a few seconds
    python -m gpt2_tvm.compile --target rtx-4090 --quantization q0f16
    python -m gpt2_tvm.compile --model ./my-gpt2 --batch-sizes 1,4 --output ./my-artifact

    Compiling for a GPU needs no GPU. The artifact then runs with python -m gpt2_tvm.generate or gpt2_tvm.benchmark,
    in Python with gpt2_tvm.Engine, and after python -m gpt2_tvm.pack on a machine with neither compiler nor network.
    """
    from gpt2_tvm.artifact import read_manifest
    from gpt2_tvm.build import compile_model

    if pipeline not in PIPELINES:
        raise UserError(f"unknown --pipeline {pipeline!r}; choose {' or '.join(PIPELINES)}")
    if pipeline == "mlc_llm":
        from gpt2_tvm.mlc.peer import compile_with_mlc_llm

        print(compile_with_mlc_llm(model, target, quantization, output, max_seq_len))
        return
    widths = integers(verify_widths, "--verify-widths")
    sizes = integers(batch_sizes, "--batch-sizes")
    with progress_on_stderr() as progress:
        folder = compile_model(
            model,
            target,
            quantization,
            output,
            rules,
            attention,
            sizes,
            max_seq_len,
            tuned,
            verify_widths=widths,
            dump_ir=dump_ir,
            seed=seed,
            cuda_graph=cuda_graph,
            passes=passes,
            interface=interface,
            prefill_chunk=prefill_chunk,
            streams=streams,
            stream_rows=stream_rows,
            progress=progress,
        )
    made = summary(folder, read_manifest(folder))
    print_summary(made)
    if json_file:
        write_json(json_file, made)


@contextmanager
def progress_on_stderr() -> Iterator[Progress]:
    """A `build.Progress`: a bar where stderr is a terminal, else a line for each stage. Notes (share 0) stay."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True, soft_wrap=True)
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=1.0)
        stages: list[str] = []

        def say(what: str, share: float) -> None:
            stage = what.split(":")[0]
            if share == 0:
                console.print(f"note: {what}", markup=False, highlight=False)
            elif not console.is_terminal and stage not in stages and share < 1:
                console.print(stage, markup=False, highlight=False)
            stages.append(stage)
            bar.update(task, description=what[:60].ljust(60), completed=share)

        yield say


def summary(folder: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """What was made, as --json writes it. Sizes in MB (10^6 bytes), times in seconds."""
    sizes: Counter[str] = Counter()
    for name, file in manifest["files"].items():
        kind = "params" if name.startswith("params/") else "library" if name in manifest["libraries"] else "other"
        sizes[kind] += file["bytes"]
    return {
        "artifact": str(folder),
        "target": manifest["target"]["name"],
        "kind": manifest["target"]["kind"],
        **{key: manifest[key] for key in TOLD},
        "size_mb": round(sizes.total() / 1e6, 2),
        "library_mb": round(sizes["library"] / 1e6, 2),
        "params_mb": round(sizes["params"] / 1e6, 2),
        "rule_hits": dict(Counter(f["rule"] for f in manifest["functions"]).most_common()),
        "needs": needs(manifest),
        "runs_here": _runs_here(manifest),
        "interface": manifest["interface"],
        "tokenizer": any(name.startswith("tokenizer/") for name in manifest["files"]),
    }


def needs(manifest: dict[str, Any]) -> str:
    """What a machine must have to run the artifact, in one line."""
    target = manifest["target"]
    arch = target["tvm"].get("mcpu", "")
    processor = f"a processor like this one ({arch})" if target["native"] else target["description"].rstrip(".")
    later = "" if any(name[-1].isalpha() for name in target["archs"]) else ", or a later one"
    archs = ", ".join(target["archs"]) + later
    text = NEEDS[target["kind"]].format(processor=processor, archs=archs, arch=arch)
    if manifest["library"].endswith(".tar"):
        text += f"; {manifest['library']} holds objects, linked where it is loaded, by that machine's C++ compiler"
    return text


def _runs_here(manifest: dict[str, Any]) -> bool:
    from targets.load import load_target
    from targets.report import runs_here

    try:
        target = load_target(manifest["target"]["name"])
    except Exception:  # a user's own TOML: its name alone does not find it
        return bool(manifest["target"]["kind"] == "cpu" and not manifest["library"].endswith(".tar"))
    return runs_here(target).startswith(("yes", "runs"))


def print_summary(made: dict[str, Any]) -> None:
    """The same for people, on stdout."""
    hits = ", ".join(f"{rule} {count}" for rule, count in made["rule_hits"].items())
    weights = f"random, seed {made['seed']}" if made["random_weights"] else "trained"
    print(f"{made['artifact']}: {made['model']} ({weights} weights), {made['quantization']}, for {made['target']}")
    print(f"  size   {made['size_mb']:.1f} MB: code {made['library_mb']:.1f}, weights {made['params_mb']:.1f}")
    print(f"  rules  {hits or 'none'}")
    print(f"  passes {', '.join(made['passes']) or 'none'}")
    print(f"  time   {made['total_seconds']:.1f} s, of which compiling {made['compile_seconds']:.1f} s")
    print(f"  needs  {made['needs']}")
    if made["interface"] == MLC:
        print(f"  next   python -m gpt2_tvm.export_mlc {made['artifact']} --output FOLDER")
    elif made["runs_here"]:
        prompt = '"It is a truth universally acknowledged"' if made["tokenizer"] else "--prompt-ids 1,2,3"
        print(f"  next   python -m gpt2_tvm.generate {made['artifact']} {prompt}")
    else:
        print("  next   copy the folder to such a machine, and there python -m gpt2_tvm.generate FOLDER PROMPT")
    sys.stdout.flush()


if __name__ == "__main__":
    run(app)
