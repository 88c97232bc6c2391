"""What is timed: sizes and their cross product, one turn's result, and the checks made before anything runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

from gpt2_tvm.artifact import Artifact
from gpt2_tvm.errors import UserError


@dataclass(frozen=True)
class Case:
    """One configuration of sizes: `batch` sequences, each of `prompt_tokens` and then `generate_tokens`."""

    batch: int
    prompt_tokens: int
    generate_tokens: int


@dataclass(frozen=True)
class Sample:
    """One turn: seconds for the whole prefill and for all decode steps, and the greedy tokens that it gave.

    `tokens[b]` are the generate_tokens ids appended to sequence b. `peak_rss_mb` (10^6 bytes) is the peak of
    the process so far.
    """

    prefill_s: float
    decode_s: float
    tokens: tuple[tuple[int, ...], ...]
    peak_rss_mb: float = 0.0


def parse_sizes(option: str, text: str) -> tuple[int, ...]:
    """A comma list of sizes, each at least 1, without repeats: "16,322" -> (16, 322).

    Raises UserError, naming the option, for anything else.
    """
    sizes: dict[int, None] = {}
    for part in text.split(","):
        part = part.strip()
        if not part.isascii() or not part.isdigit() or int(part) < 1:
            raise UserError(f"{option} {text!r}: give whole numbers from 1 up, separated by commas")
        sizes[int(part)] = None
    return tuple(sizes)


def cross(batches: Sequence[int], prompts: Sequence[int], generates: Sequence[int]) -> list[Case]:
    """Every combination, the last list running fastest."""
    return [Case(*sizes) for sizes in product(batches, prompts, generates)]


def check_runners(runners: Sequence[str], artifacts: Sequence[Artifact], cases: Sequence[Case]) -> None:
    """Refuse ways to run webgpu artifacts that there are not, or that have nothing to run (UserError, one line)."""
    known = {"wgpu": False, "node": False, "chromium": False, "browser": True}  # whether a port belongs to it
    for runner in runners:
        name, colon, port = runner.partition(":")
        if name not in known or (bool(colon) and not (known[name] and port.isdigit())):
            raise UserError(f"unknown --runner {runner!r}; choose wgpu, node, chromium or browser:PORT")
        if name == "wgpu":
            continue
        if not any(artifact.kind == "webgpu" for artifact in artifacts):
            raise UserError(f"--runner {runner} runs webgpu artifacts, and there is none here: compile --target webgpu")
        if any(case.batch > 1 for case in cases):
            raise UserError(f"--runner {runner} decodes one sequence at a time; leave out --batch")


def check_fits(artifact: Artifact, cases: Sequence[Case]) -> None:
    """Refuse a case that this artifact's context or compiled batch sizes cannot hold (UserError, one line)."""
    capacity, most = artifact.max_seq_len, max(artifact.batch_sizes)
    for case in cases:
        total = case.prompt_tokens + case.generate_tokens
        if total > capacity:
            raise UserError(
                f"--prompt-tokens {case.prompt_tokens} and --generate {case.generate_tokens} make {total} tokens, "
                f"the context of {artifact.path} holds {capacity}; choose smaller ones"
            )
        if case.batch > most:
            raise UserError(
                f"--batch {case.batch}: {artifact.path} was compiled for up to {most} sequences; "
                f"compile it with --batch-sizes {','.join(map(str, (*artifact.batch_sizes, case.batch)))}"
            )
