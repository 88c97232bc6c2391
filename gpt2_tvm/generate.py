"""`python -m gpt2_tvm.generate`: text from an artifact, written as it comes."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

from gpt2_tvm.cli import integers, run, write_json
from gpt2_tvm.errors import UserError

if TYPE_CHECKING:
    from gpt2_tvm.decoding.tokens import Generation
    from gpt2_tvm.tokenizer import Tokenizer

app = typer.Typer(add_completion=False, rich_markup_mode=None)

ENDED = {
    "length": "--max-tokens is reached",
    "eos": "the model ended the text",
    "stop": "a stop string came",
    "context": "the context is full",
}


@dataclass
class Text:
    """What was generated: the text shown (None for a model without a tokenizer), its tokens, and why it ended."""

    text: str | None
    tokens: list[int] = field(default_factory=list)
    finish: str = ""


@app.command()
def main(
    artifact: Annotated[Path, typer.Argument(help="An artifact's folder, made by python -m gpt2_tvm.compile.")],
    prompt: Annotated[
        str | None, typer.Argument(help="The text to go on from. Left out, it comes from --prompt-file or stdin.")
    ] = None,
    prompt_file: Annotated[
        Path | None, typer.Option(help="Read the prompt from this UTF-8 file (one newline at its end is dropped).")
    ] = None,
    prompt_ids: Annotated[
        str | None, typer.Option(help="The prompt as token ids with commas between, for a model without a tokenizer.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="Write at most this many tokens.")] = 128,
    temperature: Annotated[
        float, typer.Option(help="0: always the most likely token. Up to 1 and above: more and more chance.")
    ] = 0.0,
    top_k: Annotated[int, typer.Option(help="Choose from the k most likely tokens; 0 for all.")] = 0,
    top_p: Annotated[
        float, typer.Option(help="Choose from the fewest most likely tokens that hold this share of the probability.")
    ] = 1.0,
    seed: Annotated[
        int | None, typer.Option(help="Of the sampling: the same seed writes the same text. Left out: a new one.")
    ] = None,
    stop: Annotated[list[str] | None, typer.Option(help="End before this text; may be given several times.")] = None,
    device: Annotated[
        str | None, typer.Option(help="Where to run, such as cuda:1. Default: the artifact's kind.")
    ] = None,
    threads: Annotated[
        int | None, typer.Option(help="Threads of the CPU. Default: one a physical core that this process may use.")
    ] = None,
    strategy: Annotated[
        str | None,
        typer.Option(help="naive, greedy, sample, speculative, lookup or early. Default: greedy, or sample."),
    ] = None,
    draft: Annotated[Path | None, typer.Option(help="The artifact that drafts, for speculative and early.")] = None,
    draft_length: Annotated[
        str, typer.Option(help="Tokens to draft in a round; adaptive: what pays by what was measured.")
    ] = "adaptive",
    stats: Annotated[
        bool, typer.Option("--stats", help="More figures at the end: loading, first token, why it ended.")
    ] = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write text, tokens and figures as JSON into this file.")
    ] = None,
) -> None:
    """Continue a text, streamed to stdout as it comes; speed and remarks go to stderr.

    \b
    python -m gpt2_tvm.generate artifacts/austen-target-q0f32-cpu "It is a truth"
    python -m gpt2_tvm.generate ARTIFACT "Dear Jane," --temperature 0.8 --top-p 0.9 --seed 7 --stop "Yours"
    echo "Once upon a time" | python -m gpt2_tvm.generate ARTIFACT --max-tokens 50
    """
    from gpt2_tvm.decoding.sampling import check_options
    from gpt2_tvm.decoding.stop import StopStrings

    check_options(temperature, top_k, top_p)
    stops = StopStrings(stop or [])
    start = time.perf_counter()
    tokenizer = _tokenizer(artifact)
    text = None if prompt_ids is not None else _prompt(prompt, prompt_file)
    ids = _ids(artifact, tokenizer, text, prompt_ids)

    from gpt2_tvm.decoding.tokens import Generation
    from gpt2_tvm.engine import Engine

    engine = Engine(artifact, device, threads=threads)
    load_s = time.perf_counter() - start
    eos = tokenizer.eos_id if tokenizer else None
    generation: Any
    if strategy is None and draft is None:
        generation = Generation(engine, ids, max_tokens, temperature, top_k, top_p, seed, eos)
    else:
        from gpt2_tvm.decoding.single import make_generation

        wanted = (strategy or "speculative", draft, draft_length, (temperature, top_k, top_p))
        generation = make_generation(engine, ids, max_tokens, wanted, seed, eos, device, threads)
    result = stream(generation, tokenizer, stops, sys.stdout)
    made = {
        "artifact": str(artifact),
        "model": engine.artifact.manifest["model"],
        "target": engine.artifact.manifest["target"]["name"],
        "device": engine.runner.device_name,
        "threads": engine.threads,
        "prompt": text,
        "prompt_tokens": len(ids),
        "text": result.text,
        "tokens": result.tokens,
        "generate_tokens": len(result.tokens),
        "finish": result.finish,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "seed": generation.seed if temperature else None,
        **figures(generation, load_s),
        "versions": engine.artifact.manifest["versions"],
    }
    _report(made, stats)
    if json_file:
        write_json(json_file, made)


def stream(generation: Generation, tokenizer: Tokenizer | None, stops: Any, out: TextIO) -> Text:
    """Write the text to `out` as it comes (ids with spaces between, where there is no tokenizer); ends with a newline.

    Only whole characters are written, and nothing that may turn out to be a stop string's beginning.
    """
    text = tokenizer.stream(skip_special=True) if tokenizer else None
    result = Text("" if tokenizer else None)

    def show(piece: str) -> None:
        if tokenizer:
            result.text = (result.text or "") + piece
        out.write(piece)
        out.flush()

    for token in generation:
        result.tokens.append(token)
        show(stops.push(text.push(token)) if text else f"{token} ")
        if stops.found is not None:
            break
    if text:
        show(stops.push(text.finish()) + stops.finish())
    result.finish = "stop" if stops.found is not None else generation.finish
    out.write("\n")
    out.flush()
    return result


def figures(generation: Generation, load_s: float) -> dict[str, float | None]:
    """Speed of a finished generation, sampling and text outside; a rate is None where there was nothing to time."""
    steps, seconds = generation.steps, generation.decode_s
    return {
        "load_time_us": round(load_s * 1e6),
        "first_token_time_us": round(generation.prefill_s * 1e6),
        "prefill_tok_s": round(len(generation.prompt) / generation.prefill_s, 2) if generation.prefill_s else None,
        "decode_tok_s": round(steps / seconds, 2) if steps and seconds else None,
    }


def _report(made: dict[str, Any], stats: bool) -> None:
    def rate(value: float | None) -> str:
        return "-" if value is None else f"{value:.1f}"

    if made["finish"] == "context":
        print("the context is full: stopped there", file=sys.stderr)
    speed = f"decode {rate(made['decode_tok_s'])} tokens/s, prefill {rate(made['prefill_tok_s'])} tokens/s"
    print(f"{made['generate_tokens']} tokens, {speed}", file=sys.stderr)
    if stats:
        seed = "" if made["seed"] is None else f", seed {made['seed']}"
        print(
            f"{made['model']} on {made['device']}; prompt {made['prompt_tokens']} tokens{seed}; "
            f"loaded in {made['load_time_us'] / 1e6:.2f} s, first token {made['first_token_time_us'] / 1e3:.1f} ms; "
            f"ended because {ENDED[made['finish']]}",
            file=sys.stderr,
        )


def _tokenizer(artifact: Path) -> Tokenizer | None:
    from gpt2_tvm.artifact import read_manifest
    from gpt2_tvm.tokenizer import load_tokenizer

    read_manifest(artifact)
    folder = artifact / "tokenizer"
    return load_tokenizer(folder) if folder.is_dir() else None


def _prompt(argument: str | None, file: Path | None) -> str:
    """The prompt from wherever it was given; UserError if from nowhere, twice, or not as UTF-8."""
    if argument is not None and file is not None:
        raise UserError("the prompt is given twice, as an argument and with --prompt-file; leave one out")
    if argument is not None:
        raw = argument.encode("utf-8", "surrogateescape")
    else:
        if file is None and sys.stdin.isatty():
            raise UserError("there is no prompt; give one as an argument, with --prompt-file or through stdin")
        raw = (file.read_bytes() if file is not None else sys.stdin.buffer.read()).removesuffix(b"\n")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"the prompt is not UTF-8 (byte {error.start}); convert it first, with iconv say") from None


def _ids(artifact: Path, tokenizer: Tokenizer | None, text: str | None, given: str | None) -> list[int]:
    if given is not None:
        return list(integers(given, "--prompt-ids"))
    if tokenizer is None:
        raise UserError(f"{artifact} has no tokenizer (its weights are random); give token ids with --prompt-ids 1,2,3")
    ids = tokenizer.encode(text or "")
    if not ids:
        raise UserError("the prompt is empty; give at least one character")
    return ids


if __name__ == "__main__":
    run(app)
