"""The ladder of the whole model: each rule set, kind of attention and kind of weights, compiled and timed."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from gpt2_tvm.artifact import Artifact
from gpt2_tvm.engine import Engine
from gpt2_tvm.expressions import evaluate
from gpt2_tvm.measure.bounds import artifact_param_bytes, decode_step_bytes
from gpt2_tvm.measure.cases import Case
from gpt2_tvm.measure.loops import fma_loop, read_loop
from ladder.kernels import Say, ratios, seconds, summarise
from ladder.steps import MODEL_STEPS, ModelStep

SLOW_S = 4.0  # a prefill that takes longer runs once; decoding stops at the step that reaches it
CHECK_TOKENS = 24
# Largest difference of logits to the first step's allowed, as a share of the largest
TOLERANCE = {"q0f32": 1e-3, "q16f32": 2e-2, "q8f32": 2e-1}


@dataclass
class Compiled:
    """One step, loaded. times in seconds: of a prefill, of a decode step."""

    step: ModelStep
    engine: Engine
    compile_s: float
    error: float = 0.0
    prefill: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)


def compile_steps(
    model: str, folder: Path, steps: Sequence[ModelStep], target: str, threads: int, say: Say
) -> list[Compiled]:
    """Artifacts of all steps in `folder`, loaded and compared with the first."""
    from gpt2_tvm.build import compile_model

    made: list[Compiled] = []
    for i, step in enumerate(steps):
        say(f"model: compiling {step.title}")
        start = time.perf_counter()
        path = compile_model(
            model,
            target,
            step.quantization,
            folder / str(i),
            step.rules,
            step.attention,
            verify_widths=(),
        )
        compile_s = time.perf_counter() - start
        for other in made:
            _share_params(path, other.engine.artifact)
        made.append(Compiled(step, Engine(path, verify=False, threads=threads), compile_s))
    say("model: comparing logits")
    reference = None
    for compiled in made:
        logits = _logits(compiled.engine)
        reference = logits if reference is None else reference
        compiled.error = float(np.abs(logits - reference).max() / np.abs(reference).max())
        if not compiled.error <= TOLERANCE[compiled.step.quantization]:
            raise RuntimeError(f"{compiled.step.title}: logits differ by {compiled.error:.1e} of the largest")
    return made


def _share_params(path: Path, other: Artifact) -> None:
    """Weights that two artifacts store alike become one file, and so one piece of memory when both are mapped."""
    for file in sorted((path / "params").iterdir()):
        twin = other.params / file.name
        same_size = twin.is_file() and twin.stat().st_size == file.stat().st_size
        if same_size and not twin.samefile(file) and twin.read_bytes() == file.read_bytes():
            file.unlink()
            try:
                os.link(twin, file)
            except OSError:  # a file system without hard links
                shutil.copyfile(twin, file)


def _prompt(engine: Engine, tokens: int) -> list[int]:
    from gpt2_tvm.data import prompt_for

    return prompt_for(None, engine.config.vocab_size, tokens)


def _logits(engine: Engine) -> np.ndarray:
    """Of a short prompt and one token after it -> float32 [2, vocab]."""
    engine.reset()
    ids = _prompt(engine, min(CHECK_TOKENS, engine.max_seq_len - 1) + 1)
    return np.concatenate([engine.prefill(ids[:-1]), engine.decode(ids[-1])])


def measure(
    made: Sequence[Compiled], case: Case, repeats: int, threads: int, target: Any, say: Say
) -> dict[str, list[float]]:
    """Fill in times, in rounds; returns the bounds' rates by round. Slow steps run once, without a warm-up."""
    read, fma = read_loop(threads, target=target), fma_loop(threads, target=target)
    rates: dict[str, list[float]] = {"read_gb_s": [], "fma_gflop_s": []}
    fast = []
    for compiled in made:
        say(f"model: warm-up, {compiled.step.title}")
        _turn(compiled, case)
        if compiled.prefill[0] <= SLOW_S:
            compiled.prefill.clear()
            compiled.decode.clear()
            fast.append(compiled)
    for round_ in range(repeats):
        say(f"model: round {round_ + 1} of {repeats}")
        for compiled in fast:
            _turn(compiled, case)
        rates["read_gb_s"].append(read.rate())
        rates["fma_gflop_s"].append(fma.rate())
    return rates


def _turn(compiled: Compiled, case: Case) -> None:
    engine = compiled.engine
    ids = _prompt(engine, case.prompt_tokens)
    engine.reset()
    compiled.prefill.append(seconds(lambda: engine.prefill(ids)))
    one = seconds(lambda: engine.decode_greedy(1))
    count = max(1, min(case.generate_tokens - 1, int(SLOW_S / one)))
    compiled.decode.append(seconds(lambda: engine.decode_greedy(count)) / count)


def prefill_flops(artifact: Artifact, tokens: int) -> int:
    """Of a prefill of `tokens` from an empty cache: those that the manifest counts for the functions it calls."""
    sizes = {"b": 1, "n": tokens, "p": 0}
    rows = artifact.manifest["functions"]
    return sum(evaluate(f["flops"], sizes) * f["calls"].get("prefill", 0) for f in rows)


def model_record(made: Sequence[Compiled], rates: dict[str, list[float]], case: Case) -> dict[str, Any]:
    """The model's part of the record. `gain` is over the step before, `total_gain` over the first; a share is of the
    bound measured in the same run: decode of the read rate, prefill of the multiply-add rate."""
    medians = {k: v for name, values in rates.items() for k, v in summarise(name, values).items()}
    rows: list[dict[str, Any]] = []
    for at, compiled in enumerate(made):
        row: dict[str, Any] = {"step": MODEL_STEPS.index(compiled.step), **compiled.step.__dict__}
        artifact = compiled.engine.artifact
        nbytes = decode_step_bytes(
            artifact.config, artifact_param_bytes(artifact), artifact.manifest["compute_dtype"], case
        )
        flops = prefill_flops(artifact, case.prompt_tokens)
        row |= {"error": compiled.error, "rounds": len(compiled.prefill), "compile_s": compiled.compile_s}
        row |= summarise("prefill_tok_s", [case.prompt_tokens / t for t in compiled.prefill])
        row |= summarise("prefill_gflop_s", [flops / t / 1e9 for t in compiled.prefill])
        row |= summarise("decode_tok_s", [1 / t for t in compiled.decode])
        row |= summarise("decode_gb_s", [nbytes / t / 1e9 for t in compiled.decode])
        row["prefill_share"] = row["prefill_gflop_s"] / medians["fma_gflop_s"]
        row["decode_share"] = row["decode_gb_s"] / medians["read_gb_s"]
        for what in ("prefill", "decode"):
            times, first = getattr(compiled, what), getattr(made[0], what)
            before = getattr(made[max(0, at - 1)], what)
            row |= summarise(f"{what}_gain", ratios(before, times))
            row |= summarise(f"{what}_total_gain", ratios(first, times))
        rows.append(row)
    sizes = {"prompt_tokens": case.prompt_tokens, "generate_tokens": case.generate_tokens}
    return {**sizes, **medians, "steps": rows}


def run_models(model: str, case: Case, repeats: int, threads: int, target: Any, say: Say) -> dict[str, Any]:
    """Compile into a temporary folder, check, time; the model's part of the record."""
    with tempfile.TemporaryDirectory(prefix="gpt2-tvm-ladder-") as folder:
        made = compile_steps(model, Path(folder), MODEL_STEPS, target.name, threads, say)
        rates = measure(made, case, repeats, threads, target, say)
        return model_record(made, rates, case)
