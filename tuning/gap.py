"""`python -m tuning.gap --native T1 --web webgpu`: how far WebGPU is from native code on one device."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gpt2_tvm import cli
from gpt2_tvm.errors import UserError

if TYPE_CHECKING:
    from gpt2_tvm.artifact import Artifact
    from gpt2_tvm.measure.cases import Case

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command()
def main(
    native: Annotated[
        str, typer.Option(metavar="TARGET|ARTIFACT", help="Native code: a target to compile for, or an artifact.")
    ] = "cpu",
    web: Annotated[
        str, typer.Option(metavar="TARGET|ARTIFACT", help="WebGPU: a target to compile for, or an artifact.")
    ] = "webgpu",
    runner: Annotated[
        str, typer.Option(help="What runs WebGPU, a comma list: wgpu, node, chromium, browser:PORT.")
    ] = "chromium",
    model: Annotated[str, typer.Option(help="As for compile: a folder, a hub id, 'bundled', or a preset.")] = "gpt2",
    quantization: Annotated[str, typer.Option(help="How weights are stored and computed with.")] = "q0f32",
    prompt_tokens: Annotated[int, typer.Option(help="Tokens of the prompt.")] = 322,
    generate: Annotated[int, typer.Option(help="Tokens to decode after it.")] = 64,
    repeats: Annotated[int, typer.Option(help="Rounds that count; in each everyone has one turn.")] = 5,
    warmup: Annotated[int, typer.Option(help="Rounds before them that do not.")] = 1,
    device: Annotated[str | None, typer.Option(help='Of the native code, such as "cuda:1".')] = None,
    format_: Annotated[str, typer.Option("--format", help="What to print: md, csv or json.")] = "md",
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Also write the result here, as JSON.")
    ] = None,
) -> None:
    """Set the same model side by side in native code and in WebGPU, on this machine.

    Each way runs in a process of its own, and all take turns: a prefill, a decode with one read-back at its end, the
    same decode with every token read back, and the kernels of one step by themselves. What a step takes beyond its
    kernels is dispatch, what a token read back takes beyond that is synchronisation.

    \b
    Examples:
      python -m tuning.gap --native cuda --web webgpu
      python -m tuning.gap --native artifacts/gpt2-q0f32-metal --web artifacts/gpt2-q0f32-webgpu --runner wgpu,chromium
      python -m tuning.gap --model bundled --native cpu --runner wgpu,node --json gap.json
    """
    from tuning.gap_table import FORMATS, render

    if format_ not in FORMATS:
        raise UserError(f"unknown --format {format_!r}; choose {', '.join(FORMATS)}")
    if repeats < 1 or warmup < 0:
        raise UserError(f"--repeats {repeats} --warmup {warmup}: at least 1 round counts, and 0 or more do not")
    if json_file is not None:
        cli.check_writable("--json", json_file)
    from gpt2_tvm.measure.cases import Case, check_fits, check_runners

    case = Case(1, prompt_tokens, generate)
    runners = tuple(dict.fromkeys(part.strip() for part in runner.split(",")))
    with tempfile.TemporaryDirectory(prefix="gpt2-tvm-gap-") as folder:
        artifacts = [_artifact(name, model, quantization, Path(folder)) for name in (native, web)]
        if artifacts[1].kind != "webgpu" or artifacts[0].kind == "webgpu":
            raise UserError(f"--native {native} --web {web}: the first is native code, the second WebGPU")
        check_runners(runners, artifacts, [case])
        check_fits(artifacts[0], [case])
        check_fits(artifacts[1], [case])
        result = measure(artifacts[0], artifacts[1], runners, case, repeats, warmup, device)
    sys.stdout.write(render(result, format_))
    sys.stdout.flush()
    if json_file is not None:
        cli.write_json(json_file, result)
    if result["failures"]:
        raise UserError("; ".join(result["failures"]))


def _artifact(name: str, model: str, quantization: str, folder: Path) -> Artifact:
    """The artifact at a path, or compiled for a target of that name."""
    from gpt2_tvm.artifact import open_artifact
    from gpt2_tvm.build import compile_model
    from gpt2_tvm.compile import progress_on_stderr
    from gpt2_tvm.files import MARKER

    if (Path(name) / MARKER).is_file():
        return open_artifact(name, verify=False)
    output = folder / f"{len(list(folder.iterdir()))}"
    with progress_on_stderr() as progress:
        compile_model(model, name, quantization, output, verify_widths=(), progress=progress)
    return open_artifact(output, verify=False)


def measure(
    native: Artifact,
    web: Artifact,
    runners: Sequence[str],
    case: Case,
    repeats: int,
    warmups: int,
    device: str | None = None,
) -> dict[str, Any]:
    """{"complete", "date", "rows", "failures"}: one `gap_table.ROW_KEYS` row for each way."""
    from gpt2_tvm.measure.results import now
    from gpt2_tvm.measure.timing import run_rounds
    from gpt2_tvm.measure.web_subject import WGPU
    from gpt2_tvm.measure.workers import Worker
    from tuning.gap_subjects import EngineAnatomy, WebAnatomy
    from tuning.gap_table import NATIVE, make_row

    ways = [(native, NATIVE), *((web, runner) for runner in runners)]
    workers: list[Worker] = []
    samples: dict[tuple[int, Case], list[Any]] = {}
    date = now()
    try:
        with cli.progress((repeats + warmups) * len(ways)) as say:
            for artifact, runner in ways:
                say(f"loading {runner}", 0)
                here = runner in (NATIVE, WGPU)
                made: tuple[Callable[..., Any], str | None] = (
                    (EngineAnatomy, device if runner == NATIVE else None) if here else (WebAnatomy, runner)
                )
                workers.append(Worker(runner, made[0], str(artifact.path), made[1]))
                workers[-1].ready()
            failures = run_rounds(workers, [case], repeats, warmups, samples, say)
    except BaseException:
        for worker in workers:
            worker.kill()
        raise
    for worker in workers:
        worker.close()
    reference = samples.get((0, case), [])
    rows = [
        make_row(artifact, runner, workers[i].facts["device"], case, samples[i, case], reference)
        for i, (artifact, runner) in enumerate(ways)
        if samples.get((i, case))
    ]
    return {"complete": not failures, "date": date, "rows": rows, "failures": failures}


if __name__ == "__main__":
    cli.run(app)
