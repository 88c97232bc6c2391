"""One fine-tuning: from a checkpoint to a checkpoint, taken up again where it was stopped; and how fast it is."""

from __future__ import annotations

import importlib.util
import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from gpt2_tvm.checkpoint import ModelSource
from gpt2_tvm.errors import UserError
from gpt2_tvm.finetuning.corpus import Corpus
from gpt2_tvm.finetuning.trainer import Settings, Trainer
from gpt2_tvm.measure.cases import Case, Sample
from gpt2_tvm.measure.results import spread
from gpt2_tvm.measure.timing import Samples, Say, run_rounds
from gpt2_tvm.weights import write_hf_checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable

STATE, RESULT = "training_state.pt", "training.json"
Json = dict[str, Any]


def require_torch(command: str) -> None:
    """UserError where torch or transformers are missing."""
    missing = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"{command} needs {' and '.join(missing)}: pip install 'gpt2-tvm[reference]'")


def choose_device(device: str | None, threads: int | None) -> str:
    """torch's device: the one asked for, else a GPU where there is one. Sets torch's threads. UserError for none."""
    import torch

    from gpt2_tvm.runners.threads import check_threads

    torch.set_num_threads(check_threads(threads))
    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = (str(error).splitlines() or [""])[0]
        raise UserError(f"--device {device}: this torch cannot use it ({reason}); choose cpu") from None
    return device


def identity_of(source: ModelSource, corpus: Corpus, settings: Settings) -> Json:
    """What must be the same for a run to be gone on with."""
    from tuning.ablation_cache import weights_identity

    return {"weights": weights_identity(source), "corpus": corpus.digest(), "settings": asdict(settings)}


def finished(output: Path, identity: Json) -> Json | None:
    """The result of a run that is complete in `output`, if it is this one."""
    try:
        result = json.loads((output / RESULT).read_text(encoding="utf-8"))
        whole = (output / "model.safetensors").is_file()
        return dict(result) if whole and result["identity"] == identity else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def finetune(
    source: ModelSource,
    output: Path,
    corpus: Corpus,
    settings: Settings,
    device: str = "cpu",
    dtype: str = "float32",
    save_seconds: float = 60.0,
    say: Say = lambda what, done: None,
    after: Callable[[Trainer, Say], Json] | None = None,
) -> Json:
    """Train `source` and write the checkpoint to `output`, with the tokenizer's files.

    Args:
        dtype: what the checkpoint stores.
        save_seconds: how often the state (weights, optimizer, random numbers) is put on the disk; a run that was killed
            loses that much. It goes when the checkpoint is written.
        say: called with what is done, and the steps done.
        after: called with the trainer and `say` at the end; what it returns is added to the result.

    Returns {"loss_before", "loss", "perplexity_before", "perplexity" (of the validation text), "train_loss" (mean of
    the last tenth of steps), "steps", "tokens", "seconds", "identity"}. A run that is complete in `output` already is
    not repeated. Raises UserError as `Trainer` does.
    """
    from gpt2_tvm.cli import write_json
    from gpt2_tvm.pruning.cut import copy_tokenizer

    settings.check(source)
    if source.folder is not None and output.resolve() == source.folder.resolve():
        raise UserError(f"--output {output} is the model itself; choose another folder")
    identity = identity_of(source, corpus, settings)
    known = finished(output, identity)
    if known is not None and after is None:
        return known
    output.mkdir(parents=True, exist_ok=True)
    state, progress_file = output / STATE, output / "progress.json"
    trainer = Trainer(source, corpus, settings, device)
    if known is not None and after is not None:
        return {**known, **after(trainer, say)}
    say("validation", 0)
    losses: list[float] = []
    if trainer.load_state(state, identity):
        past = json.loads(progress_file.read_text(encoding="utf-8"))
        before, seconds, losses = (
            float(past["loss_before"]),
            float(past["seconds"]),
            list(past["losses"])[: trainer.step],
        )
    else:
        before, seconds = trainer.validate(), 0.0

    start = saved = time.monotonic()
    while trainer.step < settings.steps:
        losses.append(trainer.train_step())
        say(f"training, {10 * trainer.step // settings.steps}0 %: loss {losses[-1]:.4f}", trainer.step)
        now = time.monotonic()
        if now - saved >= save_seconds and trainer.step < settings.steps:
            # the list first: of what it has more than the state, nothing is read
            write_json(progress_file, {"loss_before": before, "seconds": seconds + now - start, "losses": losses})
            trainer.save_state(state, identity)
            saved = time.monotonic()
    seconds += time.monotonic() - start
    say("validation", trainer.step)
    loss = trainer.validate()
    tail = losses[-max(1, len(losses) // 10) :]
    result: Json = {
        "loss_before": before,
        "loss": loss,
        "perplexity_before": math.exp(before),
        "perplexity": math.exp(loss),
        "train_loss": sum(tail) / len(tail) if tail else None,
        "steps": trainer.step,
        "tokens": trainer.step * settings.batch * settings.accumulate * settings.context,
        "seconds": round(seconds, 2),
        "identity": identity,
    }
    write_hf_checkpoint(output, source.config, trainer.weights(), dtype)
    copy_tokenizer(source, output)
    write_json(output / RESULT, result)
    state.unlink(missing_ok=True)
    progress_file.unlink(missing_ok=True)
    return {**result, **after(trainer, say)} if after is not None else result


class _Steps:
    """Training steps as what `measure.timing.run_rounds` times: a turn is one step of the case's batch."""

    label = "training"

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer

    def turn(self, case: Case) -> Sample:
        trainer = self._trainer
        trainer.settings = replace(trainer.settings, batch=case.batch, accumulate=1, context=case.prompt_tokens)
        start = time.perf_counter()
        trainer.train_step()
        if trainer.device.type == "cuda":
            trainer.torch.cuda.synchronize()
        return Sample(time.perf_counter() - start, 0.0, ())


def training_speed(
    trainer: Trainer, batches: Sequence[int], repeats: int = 3, say: Say = lambda what, done: None
) -> Json:
    """How fast whole steps (forward, backward, optimizer) are: {"speed": [{"batch", "context", "repeats",
    "train_tok_s", "train_tok_s_sd"}]}, batches in turn in each round. The trainer's weights change."""
    settings = trainer.settings
    cases = [Case(batch, settings.context, 0) for batch in batches]
    samples: Samples = {}
    failures = run_rounds([_Steps(trainer)], cases, repeats, 1, samples, say)
    if failures:
        raise UserError("; ".join(failures))
    rows = []
    for case in cases:
        rates = [case.batch * case.prompt_tokens / sample.prefill_s for sample in samples[0, case]]
        rows.append(
            {
                "batch": case.batch,
                "context": case.prompt_tokens,
                "repeats": len(rates),
                "train_tok_s": median(rates),
                "train_tok_s_sd": spread(rates),
            }
        )
    return {"speed": rows}
