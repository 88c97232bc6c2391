"""`python -m gpt2_tvm.bench_decoding`: decoding strategies on real prompts, beside the theory of speculation."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from gpt2_tvm import cli
from gpt2_tvm.errors import UserError

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command()
def main(
    dataset: Annotated[
        str,
        typer.Option(help="spider:FILE, e2e:FILE, dialogsum:FILE, text:FILE, or gettysburg; several with commas."),
    ],
    model: Annotated[str, typer.Option(help="Artifacts of targets, with commas between.")],
    strategy: Annotated[
        str,
        typer.Option(help="naive, greedy, sample, speculative, lookup, mixed, early, streaming; several with commas."),
    ] = "greedy,speculative,lookup",
    draft: Annotated[
        str,
        typer.Option(
            help="Artifacts that draft, with commas. Those that are a model's first layers (decoding.early makes "
            "them) are for early, others for speculative and mixed (lookup first, a draft where that finds nothing)."
        ),
    ] = "",
    draft_length: Annotated[
        str, typer.Option(help="Tokens to draft in a round, a comma list; adaptive: what pays by what was measured.")
    ] = "adaptive",
    planted_acceptance: Annotated[
        str,
        typer.Option(
            help="Probabilities, a comma list: speculative proposes the target's own token this often, at the cost of "
            "--draft if one is given. For checking the theory."
        ),
    ] = "",
    prompts: Annotated[int, typer.Option(help="Prompts of each data set, evenly over the file; 0 for all.")] = 20,
    prompt_tokens: Annotated[
        int, typer.Option(help="Tokens of a prompt of text or gettysburg; the others have their own length.")
    ] = 128,
    max_tokens: Annotated[int, typer.Option(help="Tokens to write after each prompt, at most.")] = 64,
    batch: Annotated[int, typer.Option(help="Prompts at a time; rates count the tokens of all of them.")] = 1,
    temperature: Annotated[
        float, typer.Option(help="0: greedy; above: sampled, with strategy sample as the base.")
    ] = 0,
    top_k: Annotated[int, typer.Option(help="As for generate.")] = 0,
    top_p: Annotated[float, typer.Option(help="As for generate.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of sampling and of planted acceptance.")] = 0,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Write on past an end-of-text token.")] = False,
    repeats: Annotated[int, typer.Option(help="Times each prompt is run by each.")] = 1,
    device: Annotated[str | None, typer.Option(help="Default: the first of the artifacts' kind.")] = None,
    threads: Annotated[int | None, typer.Option(help="Threads of the CPU. Default: one a physical core.")] = None,
    format_: Annotated[str, typer.Option("--format", help="What to print: md, csv or json.")] = "md",
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Also write JSON here.")] = None,
    figure: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Draw the time by step, and speed-up against acceptance (PNG, SVG, PDF)."),
    ] = None,
    records: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Keep every turn here; the same command then goes on where it was stopped."),
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Begin --records anew.")] = False,
) -> None:
    """Time decoding strategies on the prompts of data sets.

    Every prompt is run by every strategy on every model in turn. Tokens/s are of decoding: the tokens after the first,
    over the time after it, sampling and checking included. Half precision, int8 and materialized attention are other
    artifacts of the same model, and so further rows.

    \b
    python -m gpt2_tvm.bench_decoding --model artifacts/austen --draft artifacts/draft --dataset text:persuasion.txt
    python -m gpt2_tvm.bench_decoding --model A,B --strategy naive,greedy --dataset gettysburg --prompt-tokens 322
    python -m gpt2_tvm.bench_decoding --model A --draft D --planted-acceptance 0.25,0.5,0.75,0.9 --draft-length 3 \\
        --strategy greedy,speculative --dataset gettysburg --figure curve.png
    """
    from gpt2_tvm.decoding.report import FORMATS, render
    from gpt2_tvm.decoding.sampling import Sampling
    from gpt2_tvm.decoding.subjects import expand
    from gpt2_tvm.theory.figures import check_figure

    if format_ not in FORMATS:
        raise UserError(f"unknown --format {format_!r}; choose {', '.join(FORMATS)}")
    for name, value, least in (
        ("--prompts", prompts, 0),
        ("--prompt-tokens", prompt_tokens, 1),
        ("--max-tokens", max_tokens, 2),
        ("--batch", batch, 1),
        ("--repeats", repeats, 1),
        ("--seed", seed, 0),
    ):
        if value < least:
            raise UserError(f"{name} {value}: give at least {least}")
    if figure is not None:
        check_figure(figure)
    options = {
        **{"prompts": prompts, "prompt_tokens": prompt_tokens, "max_tokens": max_tokens, "batch": batch},
        **{"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed, "ignore_eos": ignore_eos},
        "threads": threads,
    }
    sampling = Sampling(temperature, top_k, top_p)
    models = [Path(part) for part in _list(model, "--model")]
    subjects = expand(
        models,
        _list(strategy, "--strategy"),
        [Path(part) for part in _list(draft)],
        _list(draft_length, "--draft-length"),
        _rates(planted_acceptance),
    )
    if sampling.greedy != all(subject.strategy != "sample" for subject in subjects):
        raise UserError("--strategy sample and a --temperature above 0 go together; greedy is for temperature 0")
    result = _measure(subjects, _list(dataset, "--dataset"), sampling, options, repeats, device, records, fresh)

    def draw() -> None:
        from gpt2_tvm.decoding import figures

        assert figure is not None
        figures.draw(result["rows"], figure)

    cli.conclude(render(result, format_), result, json_file, None if figure is None else draw)


def _list(text: str, option: str = "") -> list[str]:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if option and not parts:
        raise UserError(f"{option} '': name at least one")
    return parts


def _rates(text: str) -> list[float]:
    try:
        rates = [float(part) for part in _list(text)]
    except ValueError:
        rates = [-1.0]
    if not all(0 <= rate <= 1 for rate in rates):
        raise UserError(f"--planted-acceptance {text}: give probabilities from 0 to 1, with commas between")
    return rates


def _measure(
    subjects: list[Any],
    specs: list[str],
    sampling: Any,
    options: dict[str, Any],
    repeats: int,
    device: str | None,
    records: Path | None,
    fresh: bool,
) -> dict[str, Any]:
    """Run what is missing -> the result, as --json writes it."""
    import tempfile

    from gpt2_tvm.build import versions
    from gpt2_tvm.datasets import load
    from gpt2_tvm.decoding.cached import add_cache_gain
    from gpt2_tvm.decoding.measuring import Bench, Journal
    from gpt2_tvm.decoding.prompts import make_units
    from gpt2_tvm.decoding.report import make_rows
    from gpt2_tvm.engine import Engine
    from gpt2_tvm.measure.machine import MachineBounds, MachineSubject
    from gpt2_tvm.measure.noise import BUSY_CORES, OtherLoad
    from gpt2_tvm.tokenizer import load_tokenizer

    datasets = [load(spec) for spec in specs]
    engines, drafts = (
        {path: Engine(path, device, threads=options["threads"]) for path in dict.fromkeys(paths)}
        for paths in ([s.model for s in subjects], [s.draft for s in subjects if s.draft is not None])
    )
    models = {s.model: engines[s.model].artifact for s in subjects}
    units, notes = make_units(
        datasets,
        models,
        options["prompts"],
        options["prompt_tokens"],
        options["max_tokens"],
        options["batch"],
    )
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    eos = {
        path: load_tokenizer(a.tokenizer).eos_id if a.tokenizer and not options["ignore_eos"] else None
        for path, a in models.items()
    }
    bench = Bench(subjects, units, engines, drafts, eos, options["max_tokens"], sampling, int(options["seed"]), repeats)
    header = {
        "artifacts": {str(path): engine.artifact.manifest["digest"] for path, engine in (engines | drafts).items()},
        "datasets": specs,
        "options": options,
    }
    first = next(iter(engines.values()))
    naive = any(subject.strategy == "naive" for subject in subjects)
    machine = MachineSubject(first.threads) if naive and first.threads else None
    probes = MachineBounds(machine.facts) if machine is not None else None
    with tempfile.TemporaryDirectory() as scratch:
        load_meanwhile = OtherLoad([])
        with Journal(records or Path(scratch) / "turns.jsonl") as journal:
            journal.open(header, fresh)
            with cli.progress(bench.turns) as say:

                def told(what: str, done: int) -> None:
                    say(what, done)
                    if machine is not None and probes is not None:  # its memory is not as fast in every minute
                        probes.probes.append(machine.turn())

                bench.run(journal, told)
        others = load_meanwhile.cores()
    baseline = "greedy" if sampling.greedy else "sample"
    if others is not None and others > BUSY_CORES:
        notes.append(f"other programs kept {others:.1f} cores busy meanwhile: measure again on a quiet machine")
    rows = make_rows(journal.turns, subjects, units, {p: e.artifact for p, e in (engines | drafts).items()}, baseline)
    if naive:
        notes += add_cache_gain(
            rows, {str(p): e.artifact for p, e in engines.items()}, probes.bounds() if probes else None
        )
    return {
        "device": first.runner.device_name,
        "threads": first.threads,
        "baseline": baseline,
        "options": options,
        "datasets": specs,
        "other_cores": others,
        "notes": notes,
        "versions": versions(),
        "rows": rows,
    }


if __name__ == "__main__":
    cli.run(app)
