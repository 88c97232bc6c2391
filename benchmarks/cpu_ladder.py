"""The ladder from naive loops to what ships: docs/cpu-ladder.md tells it, this prints every number of it.

    python benchmarks/cpu_ladder.py [--model gpt2] [--json FILE] [--figure FILE]    build, check, time, print
    python benchmarks/cpu_ladder.py --record      the same, into the committed record, then the page and the figure
    python benchmarks/cpu_ladder.py --render      the page and the figure from the committed record

Three matrix products of the model (decode's c_fc and LM head, prefill's c_fc) climb the same steps, each one idea
more than the one before, each compared with numpy before it is timed; then the whole model is compiled with more and
more of the rules. Steps take turns, and the machine's bounds (reading memory, multiply-adds on registers) have turns
among them. Figures are medians over rounds.
"""

from __future__ import annotations

import json as json_module
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(Path(__file__).resolve().parent))

from gpt2_tvm.cli import run, write_json  # noqa: E402
from gpt2_tvm.errors import UserError  # noqa: E402

RECORD = ROOT / "artifacts" / "records" / "cpu-ladder.json"
FIGURE = ROOT / "artifacts" / "figures" / "cpu-ladder.png"  # and .svg beside it
PAGE = ROOT / "docs" / "cpu-ladder.md"
PARTS = ("kernels", "model")

app = typer.Typer(add_completion=False, rich_markup_mode=None)


def read_record(path: Path) -> dict[str, Any]:
    """A record that a run wrote. UserError where there is none."""
    if not path.is_file():
        raise UserError(f"{path} is not there; make it with: python benchmarks/cpu_ladder.py --record")
    record: dict[str, Any] = json_module.loads(path.read_text(encoding="utf-8"))
    return record


def page_record(folder: Path) -> dict[str, Any]:
    """All that the page shows, of the records that are in `folder`."""
    record = read_record(folder / RECORD.name) if (folder / RECORD.name).is_file() else {}
    for name, file in (("profile", "cpu-bounds.json"), ("counted", "cpu-bounds-callgrind.json")):
        if (folder / file).is_file():
            record[name] = read_record(folder / file)
    return record


def write_figure(path: Path, record: dict[str, Any]) -> None:
    """PNG and SVG, under the path's name."""
    from ladder.figure import draw

    from gpt2_tvm.files import replacing_file

    for kind, content in draw(record).items():
        with replacing_file(path.with_suffix(f".{kind}")) as file:
            file.write(content)


def write_page(path: Path, record: dict[str, Any]) -> None:
    """The page's tables from the record; its text stays."""
    from ladder.report import render

    from gpt2_tvm.files import write_atomically

    write_atomically(path, render(path.read_text(encoding="utf-8"), record))


@contextmanager
def _status() -> Iterator[Any]:
    """Tells on stderr what is going on."""
    from rich.console import Console

    console = Console(stderr=True, soft_wrap=True)
    with console.status("") as status:

        def say(what: str) -> None:
            if console.is_terminal:
                status.update(what)
            else:
                console.print(what, markup=False, highlight=False)

        yield say


def problems(model: str, target_name: str, prompt_tokens: int) -> list[Any]:
    """The three matrix products of a model."""
    from ladder.problem import Problem

    from gpt2_tvm.checkpoint import resolve_model
    from targets import load_target

    target = load_target(target_name)
    if target.kind != "cpu" or target.layout.weight != "packed":
        raise UserError(f"--target {target_name}: the ladder is for CPU targets with packed weights")
    config = resolve_model(model).config
    e, inner = config.n_embd, config.n_inner
    return [
        Problem("decode c_fc", 1, e, inner, True, target),
        Problem("decode lm_head", 1, e, config.vocab_size, False, target),
        Problem("prefill c_fc", prompt_tokens, e, inner, True, target),
    ]


def measure(
    model: str, target_name: str, prompt_tokens: int, generate: int, repeats: int, threads: int, parts: tuple[str, ...]
) -> Iterator[dict[str, Any]]:
    """The record after each part: an interrupt leaves what there is."""
    import psutil
    from ladder import kernels, models

    from gpt2_tvm.build import versions
    from gpt2_tvm.checkpoint import resolve_model
    from gpt2_tvm.measure.cases import Case as Sizes
    from gpt2_tvm.measure.noise import OtherLoad
    from gpt2_tvm.measure.results import now
    from gpt2_tvm.runners.threads import prepare_pools, use_threads
    from gpt2_tvm.runners.vm import processor_name

    cases_of = problems(model, target_name, prompt_tokens)
    target = cases_of[0].target
    record: dict[str, Any] = {
        "model": resolve_model(model).name,
        "target": target.name,
        "processor": processor_name(),
        "cores": psutil.cpu_count(logical=False),
        "threads": threads,
        "versions": versions(),
    }
    prepare_pools()
    if use_threads(threads) != threads:
        raise UserError(f"--threads {threads}: TVM's pool has {use_threads(threads)}; leave TVM_NUM_THREADS unset")
    with _status() as say:
        if "kernels" in parts:
            load, date = OtherLoad([]), now()
            cases = [kernels.build_case(p, say) for p in cases_of]
            kernels.measure(cases, repeats, threads, say)
            made = [kernels.case_record(case) for case in cases]
            del cases
            record["kernels"] = {"date": date, "other_cores": load.cores(), "cases": made}
            yield record
        if "model" in parts:
            load, date = OtherLoad([]), now()
            sizes = Sizes(1, prompt_tokens, generate)
            part = models.run_models(model, sizes, repeats, threads, target, say)
            record["model_ladder"] = {"date": date, "other_cores": load.cores(), **part}
            yield record


def print_tables(record: dict[str, Any]) -> None:
    """The page's tables on stdout."""
    from ladder.report import blocks

    for name, block in blocks(record).items():
        if not name.startswith(("step-", "figure")):
            print(f"{name}\n\n{block}\n")


def warn_if_busy(record: dict[str, Any]) -> None:
    """Say on stderr that the machine was not quiet."""
    from gpt2_tvm.measure.noise import BUSY_CORES

    busy = max((record.get(part) or {}).get("other_cores") or 0.0 for part in ("kernels", "model_ladder"))
    if busy > BUSY_CORES:
        print(f"note: other programs kept {busy:.1f} cores busy; measure again on a quiet machine", file=sys.stderr)


def print_assembly(model: str, target: str, prompt_tokens: int, key: str) -> None:
    """The hottest loop of one step in every case, as LLVM wrote it."""
    from ladder import kernels
    from ladder.report import loop_text
    from ladder.steps import KERNEL_STEPS

    if key not in {step.key for step in KERNEL_STEPS}:
        raise UserError(f"--assembly {key}: choose {', '.join(step.key for step in KERNEL_STEPS)}")
    for problem in problems(model, target, prompt_tokens):
        (built,) = kernels.build_case(problem, lambda _: None, keys=[key]).steps
        print(f"{problem.name}: {loop_text(built.loop.to_json())}", *built.code, "", sep="\n")


@app.command()
def main(
    model: Annotated[str, typer.Option(help="As for gpt2_tvm.compile: gpt2, bundled, a folder.")] = "gpt2",
    target: Annotated[str, typer.Option(help="A CPU target that this machine runs.")] = "cpu",
    prompt_tokens: Annotated[int, typer.Option(min=9, help="Rows of prefill.")] = 322,
    generate: Annotated[int, typer.Option(min=2, help="Tokens decoded by the whole model.")] = 64,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds.")] = 7,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads [physical cores].")] = None,
    part: Annotated[str, typer.Option(help="kernels, model, or all.")] = "all",
    json: Annotated[Path | None, typer.Option(help="Write the record to this file.")] = None,
    figure: Annotated[Path | None, typer.Option(help="Draw it: PNG and SVG under this name.")] = None,
    record: Annotated[bool, typer.Option("--record", help="Write the committed record, page and figure.")] = False,
    assembly: Annotated[str, typer.Option(help="Print the inner loops of a step, such as registers; no timing.")] = "",
    render: Annotated[bool, typer.Option("--render", help="Page and figure from the record; times nothing.")] = False,
) -> None:
    """Time the ladder, or show the recorded one."""
    if render:
        write_figure(figure or FIGURE, read_record(RECORD))
        write_page(PAGE, page_record(RECORD.parent))
        return
    if assembly:
        print_assembly(model, target, prompt_tokens, assembly)
        return
    if part not in (*PARTS, "all"):
        raise UserError(f"--part {part}: choose kernels, model or all")

    from gpt2_tvm.runners.threads import check_threads

    threads = check_threads(threads)
    json = RECORD if record else json
    parts = PARTS if part == "all" else (part,)
    known = read_record(json) if json is not None and part != "all" and json.is_file() else {}
    for made in measure(model, target, prompt_tokens, generate, repeats, threads, parts):
        known = {**known, **made}  # the other part stays; its bounds are its own
        if json is not None:
            write_json(json, known)
    print_tables(known)
    warn_if_busy(known)
    if record:
        write_page(PAGE, page_record(RECORD.parent))
    if record or figure is not None:
        write_figure(figure or FIGURE, known)


if __name__ == "__main__":
    run(app)
