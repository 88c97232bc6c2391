"""The logits that every variant must give before it is timed.

A sequence of tokens goes through the model in the three ways that an artifact has: a prompt at once, some tokens one by
one, some as a chain to verify. The reference for all of them is one forward pass in float32: transformers', where it is
installed; else our CPU engine, without any schedule rule where the CPU's own rules are on trial.
"""

from __future__ import annotations

import importlib.util
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gpt2_tvm.errors import UserError
from gpt2_tvm.quantization import get_scheme
from tuning.children import Announce, Failure

if TYPE_CHECKING:
    from gpt2_tvm.checkpoint import ModelSource
    from gpt2_tvm.engine import Engine
    from gpt2_tvm.mlc.lockstep import Lockstep
    from tuning.ablation_work import Job

STEPS, WIDTH, GREEDY = 4, 4, 6  # tokens decoded one by one, verified at once, and chosen on the device
# Largest difference as a share of the reference's largest logit, by the coarser of the dtypes that a variant stores its
# weights and computes in: what the parity tests allow (tests/reference.py); bfloat16 has 3 bits less than float16.
TOLERANCE = {"float32": 1e-3, "float16": 2e-2, "bfloat16": 1e-1}
TOKENIZERS = ("vocab.json", "tokenizer.json")  # either makes a checkpoint's own tokenizer
CHOICES = ("auto", "transformers", "cpu")


@dataclass(frozen=True)
class Reference:
    """Tokens and the logits after them, float32.

    prompt: [n] ids · steps: [STEPS] · chain: [WIDTH] · logits: [1 + STEPS + WIDTH, vocab], after the prompt and after
    each token that follows it.
    """

    prompt: np.ndarray
    steps: np.ndarray
    chain: np.ndarray
    logits: np.ndarray

    def save(self, file: Path) -> None:
        from gpt2_tvm.files import replacing_file

        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing_file(file) as out:
            np.savez(out, prompt=self.prompt, steps=self.steps, chain=self.chain, logits=self.logits)

    @staticmethod
    def load(file: Path) -> Reference:
        with np.load(file) as data:
            return Reference(data["prompt"], data["steps"], data["chain"], data["logits"])


def tokens_needed(prompt_tokens: int, generate_tokens: int) -> int:
    """The context that checking and timing take."""
    return prompt_tokens + max(generate_tokens, STEPS + WIDTH, GREEDY + 1)


def tolerance(quantization: str) -> float:
    """The largest difference that is allowed to a variant in this scheme; integer weights are the reference's too."""
    scheme = get_scheme(quantization)
    return max(TOLERANCE[scheme.compute_dtype], TOLERANCE.get(scheme.weight_dtype, 0.0))


def choose(wanted: str, quantization: str, kind: str) -> str:
    """Which reference: "transformers", or "cpu RULES SCHEME" for our engine. UserError for what cannot be had."""
    if wanted not in CHOICES:
        raise UserError(f"unknown --reference {wanted!r}; choose {', '.join(CHOICES)}")
    there = all(importlib.util.find_spec(package) for package in ("torch", "transformers"))
    plain = get_scheme(quantization).weight_dtype in TOLERANCE  # else the float32 original is another model
    if wanted == "transformers" and not (there and plain):
        why = "it is not installed: pip install 'gpt2-tvm[reference]'" if plain else f"it has no {quantization}"
        raise UserError(f"--reference transformers: {why}; or take --reference cpu")
    if wanted != "cpu" and there and plain:
        return "transformers"
    return f"cpu {'baseline' if kind == 'cpu' else 'full'} {'q0f32' if plain else quantization}"


def describe(how: str) -> str:
    """`choose`'s answer for people."""
    if how == "transformers":
        return "transformers in float32"
    _, rules, scheme = how.split()
    return f"our engine on the CPU, {scheme}, rules {rules}"


def prompt_of(source: ModelSource, tokens: int) -> np.ndarray:
    """The first ids of the benchmark's prompt for a model -> int32 [tokens]."""
    from gpt2_tvm.data import prompt_for
    from gpt2_tvm.tokenizer import load_tokenizer

    own = source.folder is not None and any((source.folder / name).is_file() for name in TOKENIZERS)
    tokenizer = load_tokenizer(source.folder) if own and source.folder else None
    return np.asarray(prompt_for(tokenizer, source.config.vocab_size, tokens), np.int32)


def make(announce: Announce, job: Job, how: str, file: str) -> None:
    """Compute the reference of `job` and save it; runs in a child."""
    from gpt2_tvm.checkpoint import resolve_model

    announce("reference: weights")
    source = resolve_model(job.model, seed=job.seed)
    ids = prompt_of(source, job.prompt_tokens + STEPS + WIDTH)
    prompt, steps, chain = np.split(ids, [job.prompt_tokens, job.prompt_tokens + STEPS])
    announce(f"reference: {describe(how)}")
    logits = _transformers(source, ids) if how == "transformers" else _cpu(job, how, prompt, steps, chain)
    Reference(prompt, steps, chain, logits).save(Path(file))


def _transformers(source: Any, ids: np.ndarray) -> np.ndarray:
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    from gpt2_tvm.weights import iter_weights, write_hf_checkpoint

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    with tempfile.TemporaryDirectory(prefix="gpt2-tvm-reference-") as scratch:
        folder = source.folder or write_hf_checkpoint(Path(scratch) / "model", source.config, iter_weights(source))
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        with torch.inference_mode():
            rows = torch.from_numpy(ids.astype(np.int64))[None]
            return model(rows, use_cache=False, logits_to_keep=1 + STEPS + WIDTH).logits[0].numpy().copy()


def _cpu(job: Job, how: str, prompt: np.ndarray, steps: np.ndarray, chain: np.ndarray) -> np.ndarray:
    from gpt2_tvm.build import compile_model
    from gpt2_tvm.engine import Engine

    _, rules, scheme = how.split()
    with tempfile.TemporaryDirectory(prefix="gpt2-tvm-reference-") as scratch:
        folder = compile_model(
            job.model, "cpu", scheme, Path(scratch) / "cpu", rules, verify_widths=(WIDTH,), seed=job.seed
        )
        engine = Engine(folder)
        rows = [engine.prefill(prompt)[0], *(engine.decode(int(token))[0] for token in steps)]
        return np.stack([*rows, *engine.verify(chain)[0]])


def check(engine: Engine | Lockstep, quantization: str, reference: Reference, announce: Announce) -> float:
    """Compare every way through the engine with the reference, and the greedy choice on the device with `decode`'s.

    Returns the largest difference, as a share of the reference's largest logit. Raises Failure("wrong-result").
    Afterwards everything that a turn calls has been called once with the same shapes.
    """
    share = tolerance(quantization)
    scale = float(np.abs(reference.logits).max())
    worst = 0.0

    def same(what: str, ours: np.ndarray, expected: np.ndarray) -> None:
        nonlocal worst
        difference = float(np.abs(ours - expected).max()) / scale if ours.shape == expected.shape else float("inf")
        if not difference <= share:  # NaN is not
            raise Failure(
                "wrong-result", f"{what}: logits differ by {difference:.2g} of the largest, allowed {share:g}"
            )
        worst = max(worst, difference)

    n = len(reference.prompt)
    engine.reset()
    announce("check: prefill")
    same("prefill", engine.prefill(reference.prompt)[0], reference.logits[0])
    announce("check: decode")
    for i, token in enumerate(reference.steps):
        same(f"decode, step {i + 1}", engine.decode(int(token))[0], reference.logits[1 + i])
    announce("check: verify")
    same("verify", engine.verify(reference.chain)[0], reference.logits[1 + STEPS :])
    engine.rewind(n)
    announce("check: greedy decode")
    engine.decode(int(reference.steps[0]))
    tokens = engine.decode_greedy(GREEDY)[0]
    engine.rewind(n)
    logits = engine.decode(int(reference.steps[0]))[0]
    for i, token in enumerate(tokens):
        best = int(logits.argmax())
        if int(token) != best and logits[best] - logits[token] > share * scale:  # else a tie within the tolerance
            raise Failure("wrong-result", f"greedy decode, step {i + 1}: token {token}, decode's logits say {best}")
        logits = engine.decode(int(token))[0]
    engine.reset()
    return worst
