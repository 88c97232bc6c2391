"""`python -m gpt2_tvm.roofline`: what a forward pass costs on paper, in the compiled module, and on a device."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gpt2_tvm import cli
from gpt2_tvm.errors import UserError

if TYPE_CHECKING:
    from gpt2_tvm.checkpoint import ModelSource
    from gpt2_tvm.theory.closed import Model
    from gpt2_tvm.theory.report import Drafting, Question
    from targets import DeviceTarget

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
FORMATS = ("md", "json")
DRAFTS = ("gpt2", "distilgpt2")  # the first that is smaller than the model


@app.command()
def main(
    model: Annotated[
        str, typer.Option(help="A folder in Hugging Face layout, a hub id, 'bundled', or a preset's name.")
    ] = "gpt2",
    device: Annotated[str, typer.Option(help="A target's name or TOML file: its [peak] is the roof.")] = "cpu",
    batch: Annotated[str, typer.Option(help="Sequences at a time, a comma list.")] = "1",
    seq: Annotated[str, typer.Option(help="Tokens of the context, a comma list.")] = "1024",
    attention: Annotated[
        str, typer.Option(help="What is compiled, beside the textbook's: flash or materialized.")
    ] = "flash",
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Of weights, activations and cache, unless named below. Default: float16 where the device has a rate "
            "for it, else float32."
        ),
    ] = None,
    quantization: Annotated[
        str | None,
        typer.Option(help="As for compile, in place of the dtypes: those of a scheme, q8f32-float-head say."),
    ] = None,
    weights: Annotated[str | None, typer.Option(help="float32, float16, bfloat16, int8 or int4.")] = None,
    activations: Annotated[str | None, typer.Option(help="The dtype between kernels, and of the arithmetic.")] = None,
    cache: Annotated[str | None, typer.Option(help="Of keys and values.")] = None,
    accumulation: Annotated[
        str | None, typer.Option(help="Of sums: logits, and scores where they are in memory. Default: float32.")
    ] = None,
    bandwidth_gb_s: Annotated[float | None, typer.Option(help="10^9 bytes a second, in place of the target's.")] = None,
    tflops: Annotated[float | None, typer.Option(help="10^12 operations a second, in place of the target's.")] = None,
    draft: Annotated[
        str | None, typer.Option(help="The model that drafts, as --model; default: gpt2 or distilgpt2, if smaller.")
    ] = None,
    cost_ratio: Annotated[
        float | None, typer.Option(help="A draft step's time over the target's, in place of the roofline's.")
    ] = None,
    agreement: Annotated[
        float, typer.Option(help="Share of draft tokens that the target agrees with, greedily.")
    ] = 0.75,
    sampled_agreement: Annotated[
        float | None,
        typer.Option(help="The same with temperature: the mean of sum(min(p, q)). Default: --agreement."),
    ] = None,
    measured: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="Results of gpt2_tvm.benchmark --json, or times by function; repeatable."),
    ] = None,
    count: Annotated[bool, typer.Option(help="Also count over the functions of the real module.")] = True,
    format_: Annotated[str, typer.Option("--format", help="What to print: md or json.")] = "md",
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Also write the report here, as JSON.")
    ] = None,
    figure: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw rooflines and speculation (PNG, SVG, PDF).")
    ] = None,
) -> None:
    """Inference maths: FLOPs, bytes, what bounds them, and the latency that follows; naive and with the KV cache.

    In closed form, with its coefficients, and counted over the functions of the module that compile would build
    (lowered only: no compiler for the device is needed, nothing is built); where they differ, why. Then what the cache
    gains and how many tokens are worth speculating.

    \b
    Examples:
      python -m gpt2_tvm.roofline --model gpt2-xl --device t4 --batch 1,64 --seq 32,1024
      python -m gpt2_tvm.roofline --model gpt2-xl --device t4 --bandwidth-gb-s 300 --figure t4.png
      python -m gpt2_tvm.roofline --model gpt2 --device cpu --seq 386 --measured benchmark.json
    """
    from gpt2_tvm.measure.cases import parse_sizes
    from gpt2_tvm.theory import tables
    from gpt2_tvm.theory.measured import read_points
    from gpt2_tvm.theory.report import make_report

    if format_ not in FORMATS:
        raise UserError(f"unknown --format {format_!r}; choose {' or '.join(FORMATS)}")
    if figure is not None:
        from gpt2_tvm.theory.figures import check_figure

        check_figure(figure)
    kinds = {"weights": weights, "activations": activations, "cache": cache, "accumulation": accumulation}
    if quantization is not None and (given := [k for k, v in {"dtype": dtype, **kinds}.items() if v is not None]):
        raise UserError(f"--quantization names every dtype; leave out --{' and --'.join(given)}, or it")
    sizes = parse_sizes("--batch", batch), parse_sizes("--seq", seq)
    files = measured or []
    rates = (bandwidth_gb_s, tflops)
    stored = (quantization, dtype, kinds)
    source, target, question = _question(model, device, attention, stored, sizes, rates, files)
    drafting = _drafting(draft, cost_ratio, agreement, sampled_agreement, source, question)
    name = scheme_of(question.model)
    points, notes = read_points(files, source.name, question.model, name, question.machine)
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    if count:
        question = _counted(question, source, target)
    report = make_report(question, drafting, points)
    sys.stdout.write(json.dumps(report, indent=1) + "\n" if format_ == "json" else tables.render(report))
    sys.stdout.flush()
    if json_file is not None:
        cli.write_json(json_file, report)
    if figure is not None:
        from gpt2_tvm.theory.figures import draw

        draw(report, figure)
        print(f"wrote {figure}", file=sys.stderr)


def _source(model: str) -> ModelSource:
    """The model's shape; a preset needs no download for that."""
    from gpt2_tvm.checkpoint import random_model, resolve_model
    from gpt2_tvm.config import PRESETS

    return random_model(model) if model in PRESETS else resolve_model(model)


def _question(
    model: str,
    device: str,
    attention: str,
    stored: tuple[str | None, str | None, dict[str, str | None]],
    sizes: tuple[tuple[int, ...], tuple[int, ...]],
    rates: tuple[float | None, float | None],
    measured: list[Path],
) -> tuple[ModelSource, DeviceTarget, Question]:
    from gpt2_tvm.build import ATTENTION
    from gpt2_tvm.quantization import scheme_for
    from gpt2_tvm.theory.closed import Model
    from gpt2_tvm.theory.dtypes import Dtypes, stored_as
    from gpt2_tvm.theory.machine import machine_of
    from gpt2_tvm.theory.report import Question
    from targets import load_target, specialise

    if attention not in ATTENTION:
        raise UserError(f"unknown --attention {attention!r}; choose {' or '.join(ATTENTION)}")
    target = specialise(load_target(device))
    quantization, dtype, kinds = stored
    tables: tuple[str, ...] = ()
    if quantization is not None:
        scheme = scheme_for(quantization, target.name, target.kind)
        dtypes, tables = stored_as(scheme)
    else:
        dtype = dtype or ("float16" if target.peak is not None and target.peak.fp16_tflops else "float32")
        dtypes = Dtypes(**{kind: name or dtype for kind, name in {**kinds, "accumulation": None}.items()})
        dtypes = replace(dtypes, accumulation=kinds["accumulation"] or "float32")
    source = _source(model)
    batches, seqs = sizes
    if max(seqs) > source.config.n_positions:
        raise UserError(f"--seq {max(seqs)}: {source.name} has positions for {source.config.n_positions} tokens")
    machine = machine_of(target, dtypes.arithmetic, *rates, measured)
    form = Model(source.config, dtypes, attention, fast_math=target.kind == "cpu", float_tables=tables)
    capacity = max(seqs) if attention == "materialized" else source.config.n_positions
    question = Question(source.name, form, machine, batches, seqs, capacity, why_not="--no-count")
    return source, target, question


def scheme_of(form: Model) -> str | None:
    """The quantization scheme that stores and computes as `form` says; None where there is none."""
    from gpt2_tvm.quantization import SCHEMES

    dtypes = form.dtypes
    if dtypes.cache != dtypes.activations or dtypes.accumulation != "float32":
        return None
    wanted = (dtypes.weights, dtypes.activations)
    found = next((name for name, s in SCHEMES.items() if (s.weight_dtype, s.compute_dtype) == wanted), None)
    return found and "-float-".join((found, *form.float_tables))


def _counted(question: Question, source: ModelSource, target: DeviceTarget) -> Question:
    """The question with the module's count, or with the reason why there is none."""
    from gpt2_tvm.build import MAX_BATCH, make_plan, weight_layout
    from gpt2_tvm.theory.counted import count_module

    form = question.model
    scheme = scheme_of(form)
    if scheme is None:
        return replace(question, why_not=f"no scheme of this version computes with {form.dtypes.describe()}")
    static = tuple(b for b in question.batches if b <= MAX_BATCH)
    left_out = f"decode of batches above {MAX_BATCH}, for which nothing is compiled"
    plan = make_plan(source.config, target, scheme, "full", form.attention, static or (1,), question.capacity, ())
    print(f"lowering {source.name} {scheme} for {target.name}", file=sys.stderr, flush=True)
    return replace(
        question,
        counted=count_module(plan),
        why_not="" if static == question.batches else left_out,
        panel_rows=int(weight_layout(target).panel_rows),
    )


def _drafting(
    draft: str | None,
    cost_ratio: float | None,
    agreement: float,
    sampled: float | None,
    source: ModelSource,
    question: Question,
) -> Drafting | None:
    """Who drafts; None where no draft is named and the usual ones are no smaller than the model."""
    from gpt2_tvm.config import PRESETS
    from gpt2_tvm.theory.report import Drafting

    rates = {"agreement": agreement, "sampled_agreement": agreement if sampled is None else sampled}
    for option, value in rates.items():
        if not 0 <= value <= 1:
            raise UserError(f"--{option.replace('_', '-')} {value}: a share goes from 0 to 1")
    if cost_ratio is not None and not 0 <= cost_ratio < float("inf"):
        raise UserError(f"--cost-ratio {cost_ratio}: give a draft step's time over the target's, 0 or more")
    if draft is None:
        size = source.config.num_parameters()
        draft = next((name for name in DRAFTS if PRESETS[name].num_parameters() < size), None)
    if draft is None:
        return Drafting("any", None, cost_ratio, **rates) if cost_ratio is not None else None
    drafter = _source(draft)
    form = replace(question.model, config=drafter.config)
    arguments: dict[str, Any] = {"name": drafter.name, "model": form, "cost_ratio": cost_ratio, **rates}
    return Drafting(**arguments)


if __name__ == "__main__":
    cli.run(app)
