"""Distillation and the training of streams, on a tiny model: they learn, resume, and write what compiles."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reference import checkpoint
from typer.testing import CliRunner

from gpt2_tvm import Engine, UserError, compile_model
from gpt2_tvm.config import GPT2Config
from gpt2_tvm.training import texts as texts_module
from gpt2_tvm.training.texts import Texts, load_or_write, read_tokens, write_batch

CONFIG = GPT2Config(vocab_size=23, n_positions=48, n_embd=32, n_layer=3, n_head=2, bos_token_id=None, eos_token_id=None)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("training") / "model", CONFIG, spread=6.0)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts and pieces of texts that a tiny context can hold."""
    for name, value in (("BATCH", 8), ("KEPT", 5), ("GIVEN", (4, 12)), ("LOOSE", (3, 6)), ("STRICT", (8, 16))):
        monkeypatch.setattr(texts_module, name, value)


def test_texts_say_what_the_model_thought(model: Path, tmp_path: Path, small: None) -> None:
    engine = Engine(compile_model(str(model), "cpu", output=tmp_path / "a", batch_sizes=(8,), verify_widths=()))
    real = np.arange(40, dtype=np.int32) % CONFIG.vocab_size
    made = write_batch(engine, real, np.random.default_rng(0), rows=8)
    assert made.ids.shape == (8, 48) and made.top.shape == made.shares.shape == (8, 48, 5)
    assert (np.diff(made.ids[1, :4]) % CONFIG.vocab_size == 1).all()  # every second text begins with real text
    assert 0.4 < made.greedy.mean() < 0.9
    following = made.top[:, :-1, 0][made.greedy[:, 1:]]
    assert (following == made.ids[:, 1:][made.greedy[:, 1:]]).all()
    free = ~made.greedy[::2, 1:]  # drawn by chance: often another than the likeliest
    assert (made.top[::2, :-1, 0][free] != made.ids[::2, 1:][free]).mean() > 0.1
    engine.reset()
    logits = engine.prefill(made.ids[:, :20])
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    np.testing.assert_allclose(np.take_along_axis(p, made.top[:, 19], -1), made.shares[:, 19], atol=1e-4)
    a, b = made.split(3)
    assert (len(a), len(b)) == (5, 3)


@pytest.mark.heavy
def test_texts_are_written_once(model: Path, tmp_path: Path, small: None) -> None:
    folder = tmp_path / "texts"
    first = load_or_write(folder, str(model), 2)
    files = {f.name: f.stat().st_mtime_ns for f in folder.iterdir()}
    again = load_or_write(folder, str(model), 2)
    assert (first.ids == again.ids).all() and len(again) == 16
    assert {n: t for n, t in files.items() if n != "texts.json"} == {
        f.name: f.stat().st_mtime_ns for f in folder.iterdir() if f.name != "texts.json"
    }
    assert len(load_or_write(folder, str(model), 3)) == 24
    with pytest.raises(UserError, match="other options"):
        load_or_write(folder, str(model), 2, seed=1)
    with pytest.raises(UserError, match="UTF-8"):
        read_tokens([tmp_path / "nowhere"], Path(__file__).parent.parent / "gpt2_tvm/data/austen")


def command(app: Any, *arguments: str) -> Any:
    return CliRunner().invoke(app, arguments)


@pytest.mark.heavy
def test_a_draft_learns_and_goes_on_where_it_was(model: Path, tmp_path: Path, small: None) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from gpt2_tvm import distill
    from gpt2_tvm.training import student

    out = tmp_path / "draft"
    options = ["--model", str(model), "--width", "32", "--heads", "2", "--batches", "6", "--output", str(out)]
    done = command(distill.app, *options, "--steps", "120", "--texts", str(tmp_path / "texts"))
    assert done.exit_code == 0, done.output
    told = json.loads((out / "training.json").read_text())
    assert told["agreement"] > 0.3 and told["texts"] == 40  # chance is 1 in 23
    draft = Engine(compile_model(str(out), "cpu", output=tmp_path / "a", verify_widths=(2,)))
    assert draft.config.n_layer == 1 and not (tmp_path / "draft.state.pt").exists()
    again = command(distill.app, *options)
    assert isinstance(again.exception, UserError) and "exists" in str(again.exception)

    texts = load_or_write(tmp_path / "texts", str(model), 6)
    config = GPT2Config(vocab_size=23, n_positions=48, n_embd=32, n_layer=1, n_head=2)
    saved: list[int] = []
    course = student.Course(6, rows=2)
    state = tmp_path / "state.pt"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(student, "STATE_EVERY", 3)
        patch.setattr(student, "REPORT_EVERY", 1)
        whole, _ = student.train(config, texts, texts, course, tmp_path / "other.pt", lambda w, d: saved.append(1))

        def stop(what: str, share: float) -> None:
            if "step 4" in what:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            student.train(config, texts, texts, course, state, stop)
        rest, _ = student.train(config, texts, texts, course, state, lambda w, d: None)
    assert len(saved) == 6
    for (name, a), (_, b) in zip(whole.state_dict().items(), rest.state_dict().items(), strict=True):
        np.testing.assert_allclose(a.numpy(), b.numpy(), atol=1e-6, err_msg=name)


@pytest.mark.heavy
def test_streams_learn_and_compile(model: Path, tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    from gpt2_tvm import train_streams
    from gpt2_tvm.decoding.registry import make_strategy
    from gpt2_tvm.decoding.strategy import Decoding
    from gpt2_tvm.training import stream_student

    monkeypatch.setattr(stream_student, "PLACES", 16)
    monkeypatch.setattr(train_streams, "MOST_SHARE", 0.25)
    out = tmp_path / "streams"
    options = ["--model", str(model), "--output", str(out), "--texts", str(tmp_path / "texts"), "--batches", "6"]
    done = command(train_streams.app, *options, "--rank", "8", "--streams", "2", "--steps", "80", "--rate", "0.005")
    assert done.exit_code == 0, done.output
    told = json.loads((out / "streams.json").read_text())["training"]
    assert told["found"][0] > 2 / CONFIG.vocab_size and told["found"][0] >= told["found"][1]
    engine = Engine(compile_model(str(model), "cpu", output=tmp_path / "a", streams=out, stream_rows="3"))
    expected = Decoding(make_strategy("greedy", engine), [[1, 2, 3]], 30).run()
    decoding = Decoding(make_strategy("streaming", engine, length="2"), [[1, 2, 3]], 30)
    assert decoding.run() == expected and decoding.rows[0].accepted > 0
    monkeypatch.setattr(train_streams, "MOST_SHARE", 0.05)
    refused = command(train_streams.app, *options, "--rank", "8")
    assert isinstance(refused.exception, UserError) and "more than 5%" in str(refused.exception)


def test_agreement_counts_greedy_places_alone() -> None:
    torch = pytest.importorskip("torch")
    from gpt2_tvm.training.student import agreement

    class Parrot:
        """Says that the next token is the last one again."""

        def __call__(self, ids: Any) -> Any:
            return type("Out", (), {"logits": torch.nn.functional.one_hot(ids, 4).float()})

    ids = np.array([[1, 1, 2, 2]], np.int32)
    texts = Texts(ids, np.array([[False, True, True, False]]), np.zeros((1, 4, 1), np.int32), np.ones((1, 4, 1)))
    assert agreement(Parrot(), texts) == 0.5
