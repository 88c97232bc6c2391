"""Decode over TVM's paged KV cache beside our contiguous one, on this CPU, in one run.

    python benchmarks/paged_decode.py [--model bundled] [--quantization q0f32] [--batch 1,3,8] [--prompt-tokens 64]
        [--generate 128] [--repeats 9] [--threads N] [--json FILE]

Three engines with the same weights and rules take turns within a repeat: "paged" (compile --interface mlc, embed and
decode through the functions that mlc-llm calls), "contiguous" (our engine's `decode`), both with the logits read back
and their argmax taken by the host after each token, as MLC's engines do; and "contiguous, greedy", where the choice
stays on the device. All three must choose the same tokens, or nothing is reported. Figures are medians of tokens a
second over all sequences, and their standard deviations.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer

from gpt2_tvm.cli import run, write_json
from gpt2_tvm.errors import UserError

if TYPE_CHECKING:
    from gpt2_tvm.engine import Engine
    from gpt2_tvm.measure.cases import Case, Sample
    from gpt2_tvm.mlc.engine import PagedEngine

app = typer.Typer(add_completion=False, rich_markup_mode=None)

HEADINGS = ("engine", "batch", "prefill tokens/s", "decode tokens/s", "of contiguous")


class Paged:
    """`PagedEngine` as a worker of `measure.timing.run_rounds`. prompt: int32 ids, taken from the front."""

    label = "paged"

    def __init__(self, engine: PagedEngine, prompt: Sequence[int]) -> None:
        from gpt2_tvm.mlc.lockstep import Lockstep

        self.engine, self.prompt = Lockstep(engine), prompt

    def turn(self, case: Case) -> Sample:
        from gpt2_tvm.measure.cases import Sample

        engine = self.engine
        ids = np.tile(np.asarray(self.prompt[: case.prompt_tokens], np.int32), (case.batch, 1))
        engine.reset()
        engine.prefill(ids[:, :1])  # untimed: threads wake up
        engine.reset()
        start = time.perf_counter()
        engine.prefill(ids)
        middle = time.perf_counter()
        made = engine.decode_greedy(case.generate_tokens)
        end = time.perf_counter()
        return Sample(middle - start, end - middle, tuple(map(tuple, made.tolist())))


class Contiguous:
    """`Engine` in the same way; greedy: with the loop on the device."""

    def __init__(self, engine: Engine, prompt: Sequence[int], greedy: bool) -> None:
        self.engine, self.prompt, self.greedy = engine, prompt, greedy
        self.label = "contiguous, greedy" if greedy else "contiguous"

    def turn(self, case: Case) -> Sample:
        from gpt2_tvm.measure.cases import Sample

        engine = self.engine
        ids = np.tile(np.asarray(self.prompt[: case.prompt_tokens], np.int32), (case.batch, 1))
        engine.reset()
        engine.prefill(ids[:, :1])
        engine.reset()
        start = time.perf_counter()
        best = engine.prefill(ids).argmax(1)
        middle = time.perf_counter()
        if self.greedy:
            made = engine.decode_greedy(case.generate_tokens)
        else:
            tokens = [best]
            for _ in range(case.generate_tokens - 1):
                best = engine.decode(best.astype(np.int32)).argmax(1)
                tokens.append(best)
            engine.decode(best.astype(np.int32))
            made = np.stack(tokens, 1)
        end = time.perf_counter()
        return Sample(middle - start, end - middle, tuple(map(tuple, made.tolist())))


def measure(
    model: str, quantization: str, cases: Sequence[Case], repeats: int, threads: int | None, folder: Path
) -> dict[str, Any]:
    """Compile both into `folder`, take turns -> what --json writes. Raises UserError where the engines disagree on a
    token."""
    from gpt2_tvm.build import compile_model, versions
    from gpt2_tvm.data import prompt_for
    from gpt2_tvm.engine import Engine
    from gpt2_tvm.measure.noise import OtherLoad
    from gpt2_tvm.measure.results import now, rates, spread
    from gpt2_tvm.measure.timing import Samples, run_rounds
    from gpt2_tvm.mlc.engine import PagedEngine
    from gpt2_tvm.runners.vm import processor_name
    from gpt2_tvm.tokenizer import load_tokenizer

    sizes = sorted({1, *(case.batch for case in cases)})
    paths = {
        interface: compile_model(
            model, "cpu", quantization, folder / interface, batch_sizes=sizes, verify_widths=(), interface=interface
        )
        for interface in ("own", "mlc")
    }
    ours, paged = Engine(paths["own"], threads=threads), PagedEngine.open(paths["mlc"], threads)
    tokenizer = load_tokenizer(ours.artifact.tokenizer) if ours.artifact.tokenizer else None
    prompt = prompt_for(tokenizer, ours.config.vocab_size, max(case.prompt_tokens for case in cases))
    workers = [Paged(paged, prompt), Contiguous(ours, prompt, False), Contiguous(ours, prompt, True)]
    samples: Samples = {}
    load = OtherLoad(())
    failures = run_rounds(workers, cases, repeats, 1, samples)
    others = load.cores()
    if failures:
        raise UserError(failures[0])
    rows = []
    for case in cases:
        reference = samples[1, case][0].tokens
        beside = median(rates(case, samples[1, case])[1])
        for index, worker in enumerate(workers):
            found = samples[index, case]
            if any(sample.tokens != reference for sample in found):
                raise UserError(f"{worker.label} and contiguous choose different tokens at batch {case.batch}")
            prefill, decode = rates(case, found)
            rows.append(
                {
                    "engine": worker.label,
                    "batch": case.batch,
                    "prompt_tokens": case.prompt_tokens,
                    "generate_tokens": case.generate_tokens,
                    "prefill_tok_s": median(prefill),
                    "prefill_tok_s_sd": spread(prefill),
                    "decode_tok_s": median(decode),
                    "decode_tok_s_sd": spread(decode),
                    "of_contiguous": median(decode) / beside,
                }
            )
    return {
        "date": now(),
        "model": ours.artifact.manifest["model"],
        "quantization": quantization,
        "device": processor_name(),
        "threads": ours.threads,
        "repeats": repeats,
        "other_load_cores": others,
        "versions": versions(),
        "results": rows,
    }


@app.command()
def main(
    model: Annotated[str, typer.Option(help="As for compile.")] = "bundled",
    quantization: Annotated[str, typer.Option(help="As for compile.")] = "q0f32",
    batch: Annotated[str, typer.Option(help="Sequences at a time, with commas between.")] = "1,3,8",
    prompt_tokens: Annotated[int, typer.Option(help="Tokens of the prompt.")] = 64,
    generate: Annotated[int, typer.Option(help="Tokens to decode.")] = 128,
    repeats: Annotated[int, typer.Option(help="Rounds that count.")] = 9,
    threads: Annotated[int | None, typer.Option(help="Of the CPU, the caller's included.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures here.")] = None,
) -> None:
    """Decode over TVM's paged KV cache beside our contiguous one, on this CPU."""
    from gpt2_tvm.measure.cases import Case, parse_sizes
    from gpt2_tvm.measure.tables import markdown_table, number, with_spread

    cases = [Case(size, prompt_tokens, generate) for size in parse_sizes("--batch", batch)]
    with tempfile.TemporaryDirectory() as folder:
        made = measure(model, quantization, cases, repeats, threads, Path(folder))
    rows = [
        (
            row["engine"],
            str(row["batch"]),
            with_spread(row, "prefill_tok_s"),
            with_spread(row, "decode_tok_s"),
            f"{number(row['of_contiguous'])}x",
        )
        for row in made["results"]
    ]
    typer.echo(markdown_table(HEADINGS, rows, left=1), nl=False)
    others = made["other_load_cores"]
    typer.echo(
        f"\n{made['model']} {made['quantization']}, medians ± standard deviation of {repeats} rounds, "
        f"{made['threads']} threads of {made['device']}, {made['date']}"
        + ("." if others is None else f"; other programs kept {others:.1f} cores busy.")
    )
    if json_file:
        write_json(json_file, made)


if __name__ == "__main__":
    run(app)
