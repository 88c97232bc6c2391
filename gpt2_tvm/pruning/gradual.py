"""The seed's second protocol: prune a little, fine-tune, and again, until the text is predicted too badly or little is
left."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpt2_tvm.checkpoint import ModelSource, resolve_model
from gpt2_tvm.errors import UserError
from gpt2_tvm.finetuning.corpus import Corpus
from gpt2_tvm.finetuning.run import finetune, identity_of
from gpt2_tvm.finetuning.trainer import Settings, Trainer
from gpt2_tvm.pruning.cut import MULTIPLE, check_choice, copy_tokenizer, prune

if TYPE_CHECKING:
    from gpt2_tvm.measure.timing import Say

ROUNDS = "rounds"  # the folder in the output that holds every round's checkpoint
Json = dict[str, Any]


@dataclass(frozen=True)
class Course:
    """How to go on: each round prunes `step` more of the whole model's weights or dimensions, and fine-tunes; the last
    is the one before the validation loss passes `until_loss` (nats a token), or when `least` of the size is left."""

    methods: Sequence[str]
    scope: str = "layer"
    multiple: int = MULTIPLE
    step: float = 0.1
    until_loss: float = 3.2
    least: float = 0.1

    def check(self) -> None:
        """UserError, in one line, for what cannot be meant."""
        check_choice(self.methods, self.step, self.scope, self.multiple)
        if not 0 < self.least < 1:
            raise UserError(f"--least {self.least:g}: give a share between 0 and 1, such as 0.1")
        if not self.until_loss > 0:
            raise UserError(f"--until-loss {self.until_loss:g}: give a positive loss in nats a token")
        if not self.shares():
            raise UserError(f"--step {self.step:g} --least {self.least:g}: the first step would leave less than that")

    def shares(self) -> list[float]:
        """What is cut after each round, of the whole model."""
        return [round(k * self.step, 9) for k in range(1, 1 + int((1 - self.least) / self.step + 1e-9))]


def gradual(
    source: ModelSource,
    output: Path,
    course: Course,
    corpus: Corpus,
    settings: Settings,
    device: str = "cpu",
    dtype: str = "float32",
    save_seconds: float = 60.0,
    say: Say = lambda what, done: None,
) -> Json:
    """Prune and fine-tune `source` round by round; the checkpoint of the last good round is written to `output`.

    Every round's checkpoint stays in `output`/rounds/NN: `compile` takes each. What is there is not made again, so a
    run that was stopped goes on. say: called with (what, steps of training done in all).

    Returns {"loss_before", "rounds": [{"round", "share", "parameters", "kept" (share of the parameters, zeros left
    out), "loss_pruned", "loss", "good"}], "best": the last good round, or None}. Raises UserError where the loss is
    beyond the limit before anything is cut.
    """
    from gpt2_tvm.cli import write_json

    course.check()
    settings.check(source)
    if source.folder is not None and output.resolve() == source.folder.resolve():
        raise UserError(f"--output {output} is the model itself; choose another folder")
    before = _loss_before(source, output, corpus, settings, device, say)
    if before > course.until_loss:
        raise UserError(
            f"--until-loss {course.until_loss:g}: {source.name} has a validation loss of {before:.3f} before any cut; "
            "give a larger limit, or fine-tune it first"
        )
    rounds: list[Json] = []
    current = source
    for number, share in enumerate(course.shares(), 1):
        row, current = _round(
            number, share, source, current, output, course, corpus, settings, device, say, save_seconds
        )
        rounds.append(row)
        write_json(output / "rounds.json", _told(before, rounds))
        if not row["good"]:
            break
    best = next((row for row in reversed(rounds) if row["good"]), None)
    if best is None:
        raise UserError(
            f"the first round gave a loss of {rounds[0]['loss']:.3f}, past --until-loss {course.until_loss:g}; "
            "cut less with --step, train longer with --steps, or allow more"
        )
    _publish(_folder(output, best["round"]), output, dtype)
    return _told(before, rounds)


def _told(before: float, rounds: list[Json]) -> Json:
    return {
        "loss_before": before,
        "rounds": rounds,
        "best": next((row["round"] for row in reversed(rounds) if row["good"]), None),
    }


def _folder(output: Path, number: int) -> Path:
    return output / ROUNDS / f"{number:02d}"


def _loss_before(source: ModelSource, output: Path, corpus: Corpus, settings: Settings, device: str, say: Say) -> float:
    """The validation loss of the whole model, kept beside the rounds."""
    from gpt2_tvm.cli import write_json

    file, identity = output / ROUNDS / "whole.json", identity_of(source, corpus, settings)
    try:
        known = json.loads(file.read_text(encoding="utf-8"))
        if known["identity"] == identity:
            return float(known["loss"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    say("validation", 0)
    loss = Trainer(source, corpus, settings, device).validate()
    write_json(file, {"identity": identity, "loss": loss})
    return loss


def _round(
    number: int,
    share: float,
    whole: ModelSource,
    current: ModelSource,
    output: Path,
    course: Course,
    corpus: Corpus,
    settings: Settings,
    device: str,
    say: Say,
    save_seconds: float,
) -> tuple[Json, ModelSource]:
    """Cut `current` to `share` and train it -> the round's row, and its checkpoint."""
    folder = _folder(output, number)
    cut = folder.with_name(f"{folder.name}-cut")  # the same bytes each time that the same round is begun again
    told = prune(current, cut, course.methods, share, course.scope, course.multiple, whole=whole.config)
    result = finetune(
        resolve_model(str(cut)),
        folder,
        corpus,
        settings,
        device,
        save_seconds=save_seconds,
        say=lambda what, done: say(f"round {number}, {share:.0%} cut, {what}", (number - 1) * settings.steps + done),
    )
    shutil.rmtree(cut)
    kept = (told["parameters"] - told["zeros"]) / whole.config.num_parameters()
    row = {
        "round": number,
        "share": share,
        "parameters": told["parameters"],
        "kept": kept,
        "loss_pruned": result["loss_before"],
        "loss": result["loss"],
        "good": result["loss"] <= course.until_loss,
    }
    return row, resolve_model(str(folder))


def _publish(folder: Path, output: Path, dtype: str) -> None:
    """Write the checkpoint of a round as the output's own."""
    from gpt2_tvm.weights import iter_weights, write_hf_checkpoint

    best = resolve_model(str(folder))
    write_hf_checkpoint(output, best.config, iter_weights(best, "float32"), dtype)
    copy_tokenizer(best, output)
