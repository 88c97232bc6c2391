"""Training further: what goes on after a stop is what would have been, zeros stay, and the loss is transformers'."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from reference import checkpoint

pytest.importorskip("torch", reason="needs pip install 'gpt2-tvm[reference]'")
pytest.importorskip("transformers")

from gpt2_tvm.checkpoint import ModelSource, random_model, resolve_model
from gpt2_tvm.config import GPT2Config
from gpt2_tvm.data import bundled_model
from gpt2_tvm.errors import UserError
from gpt2_tvm.finetuning.corpus import Corpus, load_corpus
from gpt2_tvm.finetuning.run import RESULT, STATE, finetune, training_speed
from gpt2_tvm.finetuning.trainer import Settings, Trainer
from gpt2_tvm.pruning.cut import prune
from gpt2_tvm.pruning.gradual import Course, gradual
from gpt2_tvm.weights import iter_weights

CONFIG = GPT2Config(vocab_size=97, n_positions=32, n_embd=32, n_layer=2, n_head=4)
SETTINGS = Settings(steps=6, batch=2, accumulate=2, context=16, rate=3e-3, warmup=1, windows=4)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    return resolve_model(str(checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny", CONFIG, seed=3)))


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    """Counting upwards by 3: learnt at once."""
    ids = (np.arange(2000) * 3 % 97).astype(np.int32)
    return Corpus(ids[:1800], ids[1800:])


def weights_of(folder: Path) -> dict[str, np.ndarray]:
    return dict(iter_weights(resolve_model(str(folder))))


class Killed(BaseException):
    """What ends a run in the middle."""


def test_training_lowers_the_loss(source: ModelSource, corpus: Corpus, tmp_path: Path) -> None:
    result = finetune(source, tmp_path / "out", corpus, replace(SETTINGS, steps=30))
    assert result["loss_before"] == pytest.approx(math.log(97), abs=0.3)
    assert result["loss"] < result["loss_before"] - 0.5
    assert result["perplexity"] == pytest.approx(math.exp(result["loss"]))
    assert (result["steps"], result["tokens"]) == (30, 30 * 2 * 2 * 16)
    assert not (tmp_path / "out" / STATE).exists()
    again = Trainer(resolve_model(str(tmp_path / "out")), corpus, SETTINGS)
    assert again.validate() == pytest.approx(result["loss"], rel=1e-5)  # what was written is what was judged


def test_the_loss_is_of_every_window(source: ModelSource, corpus: Corpus) -> None:
    """By hand: log-softmax of the logits, windows of 16 tokens, each without its first."""
    import torch

    trainer = Trainer(source, corpus, replace(SETTINGS, windows=1000))
    ids = corpus.validation.astype(np.int64)
    losses = []
    for at in range(0, len(ids) - 1, 16):
        window = torch.from_numpy(ids[at : at + 16])
        with torch.no_grad():
            logits = trainer.model.eval()(window[None]).logits[0].double()
        losses += [-float(torch.log_softmax(logits[i], -1)[window[i + 1]]) for i in range(len(window) - 1)]
    assert trainer.validate() == pytest.approx(np.mean(losses), rel=1e-5)


def test_a_killed_run_ends_with_the_same_weights(source: ModelSource, corpus: Corpus, tmp_path: Path) -> None:
    def kill(what: str, done: int) -> None:
        if done == 4:
            raise Killed

    whole = finetune(source, tmp_path / "whole", corpus, SETTINGS)
    with pytest.raises(Killed):
        finetune(source, tmp_path / "cut", corpus, SETTINGS, save_seconds=0, say=kill)
    assert (tmp_path / "cut" / STATE).is_file() and not (tmp_path / "cut" / "model.safetensors").exists()
    steps: list[int] = []
    resumed = finetune(source, tmp_path / "cut", corpus, SETTINGS, say=lambda what, done: steps.append(done))
    assert steps[1:] == [4, 5, 6, 6]  # three were on the disk: the fourth was killed before its state was written
    assert (resumed["loss"], resumed["train_loss"]) == (whole["loss"], whole["train_loss"])
    for name, array in weights_of(tmp_path / "whole").items():
        np.testing.assert_array_equal(weights_of(tmp_path / "cut")[name], array, err_msg=name)


def test_a_finished_run_is_not_repeated(source: ModelSource, corpus: Corpus, tmp_path: Path) -> None:
    first = finetune(source, tmp_path / "out", corpus, SETTINGS)
    told: list[str] = []
    assert finetune(source, tmp_path / "out", corpus, SETTINGS, say=lambda what, done: told.append(what)) == first
    assert told == []
    other = finetune(source, tmp_path / "out", corpus, replace(SETTINGS, seed=1))
    assert other["loss"] != first["loss"]


def test_another_runs_state_is_refused(source: ModelSource, corpus: Corpus, tmp_path: Path) -> None:
    def kill(what: str, done: int) -> None:
        if done == 2:
            raise Killed

    out = tmp_path / "out"
    with pytest.raises(Killed):
        finetune(source, out, corpus, SETTINGS, save_seconds=0, say=kill)
    with pytest.raises(UserError, match="another --output"):
        finetune(source, out, corpus, replace(SETTINGS, rate=1e-3))
    data = bytearray((out / STATE).read_bytes())
    (out / STATE).write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match="is damaged"):
        finetune(source, out, corpus, SETTINGS)


def test_accumulation_is_a_larger_batch(source: ModelSource, corpus: Corpus) -> None:
    made = []
    for batch, accumulate in ((4, 1), (1, 4)):
        trainer = Trainer(source, corpus, replace(SETTINGS, batch=batch, accumulate=accumulate, dropout=0.0))
        losses = [trainer.train_step() for _ in range(3)]
        made.append((losses, dict(trainer.weights())))
    assert made[0][0] == pytest.approx(made[1][0], rel=1e-5)
    for name, array in made[0][1].items():
        np.testing.assert_allclose(made[1][1][name], array, atol=2e-5, err_msg=name)


@pytest.mark.parametrize("methods", [["magnitude"], ["mlp"], ["inputs", "heads"]], ids="+".join)
def test_a_pruned_model_stays_pruned(source: ModelSource, corpus: Corpus, methods: list[str], tmp_path: Path) -> None:
    prune(source, tmp_path / "cut", methods, 0.5, "global", multiple=2)
    cut = resolve_model(str(tmp_path / "cut"))
    before = dict(iter_weights(cut))
    finetune(cut, tmp_path / "out", corpus, SETTINGS)
    after = resolve_model(str(tmp_path / "out"))
    assert after.config == cut.config
    for name, array in iter_weights(after):
        if name.endswith(".kept"):
            np.testing.assert_array_equal(array, before[name])
        elif array.ndim == 2 and ".h." in name:
            np.testing.assert_array_equal(array == 0, before[name] == 0, err_msg=name)
            assert not np.array_equal(array, before[name])


def test_zeros_may_grow_when_asked(source: ModelSource, corpus: Corpus, tmp_path: Path) -> None:
    prune(source, tmp_path / "cut", ["magnitude"], 0.5)
    finetune(resolve_model(str(tmp_path / "cut")), tmp_path / "out", corpus, replace(SETTINGS, keep_zeros=False))
    assert all((a != 0).all() for n, a in weights_of(tmp_path / "out").items() if a.ndim == 2 and ".h." in n)


def test_speed_is_told_for_each_batch(source: ModelSource, corpus: Corpus) -> None:
    rows = training_speed(Trainer(source, corpus, SETTINGS), (1, 3), repeats=2)["speed"]
    assert [(row["batch"], row["context"], row["repeats"]) for row in rows] == [(1, 16, 2), (3, 16, 2)]
    assert all(row["train_tok_s"] > 0 and row["train_tok_s_sd"] >= 0 for row in rows)


def test_text_is_read_and_held_out(tmp_path: Path) -> None:
    bundled = resolve_model("bundled")
    (tmp_path / "text").write_text("It is a truth universally acknowledged. " * 50)
    (tmp_path / "wiki").write_text(" = A truth = \n\n" + "It is a truth , universally <unk> . " * 50)
    corpus = load_corpus(bundled, tmp_path / "text", None, "plain", 16)
    assert len(corpus.validation) == len(corpus.train) // 9
    other = load_corpus(bundled, tmp_path / "wiki", tmp_path / "wiki", "wikitext-tokens", 16)
    np.testing.assert_array_equal(other.train, other.validation)
    assert corpus.digest() != other.digest()
    batch = corpus.batch(3, 0, 5, 16)
    np.testing.assert_array_equal(batch, corpus.batch(3, 0, 5, 16))
    assert batch.shape == (5, 16) and not np.array_equal(batch, corpus.batch(4, 0, 5, 16))
    with pytest.raises(UserError, match="fewer than --context"):
        load_corpus(bundled, tmp_path / "text", None, "plain", 200)
    with pytest.raises(UserError, match="there is no file"):
        load_corpus(bundled, tmp_path / "none", None, "plain", 16)
    with pytest.raises(UserError, match="no tokenizer"):
        load_corpus(random_model(CONFIG), tmp_path / "text", None, "plain", 16)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"steps": -1}, "--steps -1"),
        ({"batch": 0}, "--batch 0"),
        ({"accumulate": 0}, "--accumulate 0"),
        ({"context": 33}, "2 to 32"),
        ({"context": 1}, "2 to 32"),
        ({"rate": 0.0}, "--rate 0"),
        ({"rate": float("nan")}, "--rate nan"),
        ({"dropout": 1.0}, "--dropout 1"),
    ],
)
def test_bad_settings_are_one_line(
    source: ModelSource, corpus: Corpus, change: dict[str, float], says: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=says):
        finetune(source, tmp_path / "out", corpus, replace(SETTINGS, **change))  # type: ignore[arg-type]
    with pytest.raises(UserError, match="is the model itself"):
        assert source.folder is not None
        finetune(source, source.folder, corpus, SETTINGS)


def test_a_diverging_loss_is_one_line(source: ModelSource, corpus: Corpus, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="smaller --rate"):
        finetune(source, tmp_path / "out", corpus, replace(SETTINGS, rate=1e30, warmup=0))


# ---- prune, fine-tune, repeat


def test_gradual_goes_until_little_is_left(source: ModelSource, corpus: Corpus, tmp_path: Path) -> None:
    course = Course(["mlp", "heads"], multiple=4, step=0.25, until_loss=99, least=0.25)
    told = gradual(source, tmp_path / "out", course, corpus, SETTINGS)
    assert [row["share"] for row in told["rounds"]] == [0.25, 0.5, 0.75] and told["best"] == 3
    made = resolve_model(str(tmp_path / "out"))
    assert [made.config.heads(i) for i in range(2)] == [1, 1] and made.config.n_inner == 32
    kept = [row["kept"] for row in told["rounds"]]
    assert kept == sorted(kept, reverse=True)
    assert kept[-1] == pytest.approx(made.config.num_parameters() / CONFIG.num_parameters())
    last = weights_of(tmp_path / "out" / "rounds" / "03")
    for name, array in iter_weights(made):
        np.testing.assert_array_equal(array, last[name])


def test_gradual_stops_at_the_limit_and_can_go_on(
    source: ModelSource, corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    course = Course(["magnitude"], step=0.3, until_loss=99, least=0.1)
    whole = gradual(source, tmp_path / "a", course, corpus, SETTINGS)
    losses = [row["loss"] for row in whole["rounds"]]
    limit = max(whole["loss_before"], losses[0]) + 1e-6
    # a limit that the second round's own loss is put beyond
    import gpt2_tvm.pruning.gradual as module

    real = module.finetune

    def worse(source: ModelSource, folder: Path, *rest: object, **options: object) -> dict[str, float]:
        result = real(source, folder, *rest, **options)  # type: ignore[arg-type]
        return {**result, "loss": limit + 1} if folder.name == "02" else result

    monkeypatch.setattr(module, "finetune", worse)
    told = gradual(source, tmp_path / "b", replace(course, until_loss=limit), corpus, SETTINGS)
    assert [row["good"] for row in told["rounds"]] == [True, False] and told["best"] == 1
    best, first = weights_of(tmp_path / "b"), weights_of(tmp_path / "b" / "rounds" / "01")
    assert all(np.array_equal(best[name], first[name]) for name in first)
    assert json.loads((tmp_path / "b" / "rounds.json").read_text()) == told

    # what is there is not trained again
    monkeypatch.setattr(module, "finetune", real)
    shutil.rmtree(tmp_path / "a" / "rounds" / "03")
    steps: list[str] = []
    again = gradual(source, tmp_path / "a", course, corpus, SETTINGS, say=lambda what, done: steps.append(what))
    assert again == whole and all(what.startswith("round 3") for what in steps)
    assert (tmp_path / "a" / "rounds" / "01" / RESULT).is_file()


def test_gradual_refuses_what_cannot_end_well(source: ModelSource, corpus: Corpus, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="before any cut"):
        gradual(source, tmp_path / "out", Course(["mlp"], until_loss=0.5), corpus, SETTINGS)
    for course, says in (
        (Course(["mlp"], step=0.95), "--step 0.95"),
        (Course(["mlp"], least=float("nan")), "--least nan"),
        (Course(["mlp"], until_loss=-1), "--until-loss -1"),
        (Course(["width"]), "--method"),
    ):
        with pytest.raises(UserError, match=says):
            gradual(source, tmp_path / "out", course, corpus, SETTINGS)
    assert Course(["mlp"], step=0.1).shares() == [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]


def test_the_bundled_model_loses_little_by_a_small_cut(tmp_path: Path) -> None:
    """Real weights: more goes, more is lost, and training brings some of it back."""
    bundled, text = resolve_model("bundled"), bundled_model() / "README.md"
    assert text.is_file()
    corpus = load_corpus(bundled, text, text, "plain", 64)
    settings = Settings(steps=0, context=64, windows=8)
    losses = [Trainer(bundled, corpus, settings).validate()]
    for share in (0.1, 0.6):
        prune(bundled, tmp_path / f"{share}", ["mlp"], share)
        losses.append(Trainer(resolve_model(str(tmp_path / f"{share}")), corpus, settings).validate())
    assert losses[0] < losses[1] + 0.05 and losses[1] < losses[2]
    trained = finetune(
        resolve_model(str(tmp_path / "0.6")), tmp_path / "out", corpus, replace(settings, steps=8, batch=2, rate=1e-3)
    )
    assert trained["loss"] < trained["loss_before"] == pytest.approx(losses[2], rel=1e-5)
