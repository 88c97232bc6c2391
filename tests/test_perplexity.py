"""Perplexity on the engine: equal to transformers on the same windows; the command and its faults."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from commands import run_here

from gpt2_tvm import Engine, compile_model
from gpt2_tvm.data import bundled_model, prompt_text
from gpt2_tvm.errors import UserError
from gpt2_tvm.evaluation.scoring import Scorer
from gpt2_tvm.tokenizer import load_tokenizer

COMMAND = [sys.executable, "-m", "gpt2_tvm.perplexity"]
PERSUASION = Path(__file__).parents[2] / "shared" / "data" / "persuasion.txt"  # where a checkout has it beside it

# Jane Austen, Persuasion (1818), chapters 1, 4 and 23: the model that ships was not trained on it. Public domain.
EXCERPT = """Sir Walter Elliot, of Kellynch Hall, in Somersetshire, was a man who, for his own amusement, never took \
up any book but the Baronetage; there he found occupation for an idle hour, and consolation in a distressed one.

She had been forced into prudence in her youth, she learned romance as she grew older: the natural sequel of an \
unnatural beginning.

I can listen no longer in silence. I must speak to you by such means as are within my reach. You pierce my soul. I am \
half agony, half hope. Tell me not that I am too late, that such precious feelings are gone for ever.
"""


def perplexity(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *map(str, arguments)], capture_output=True, text=True, timeout=300)


def of_transformers(folder: Path, ids: Sequence[int], context: int, stride: int) -> float:
    """The recipe of transformers' guide, "Perplexity of fixed-length models": labels of what an earlier window scored
    are -100, the model's own loss is the mean over the others that have a token before them.
    """
    torch = pytest.importorskip("torch", reason="needs pip install 'gpt2-tvm[reference]'")
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    total, count, previous = 0.0, 0, 0
    for begin in range(0, len(ids), stride):
        end = min(begin + context, len(ids))
        window = torch.tensor([list(ids[begin:end])])
        labels = window.clone()
        labels[:, : -(end - previous)] = -100
        scored = int((labels[:, 1:] != -100).sum())
        if scored:
            with torch.no_grad():
                total += float(model(window, labels=labels).loss) * scored
        count, previous = count + scored, end
        if end == len(ids):
            break
    return math.exp(total / count)


@pytest.fixture(scope="module")
def engine(bundled_artifact: Path) -> Engine:
    return Engine(bundled_artifact, verify=False)


@pytest.mark.parametrize(("context", "stride"), [(64, 32), (64, 64), (50, 7), (512, 512)])
def test_transformers_gives_the_same(engine: Engine, context: int, stride: int) -> None:
    tokenizer = load_tokenizer(bundled_model())
    ids = tokenizer.encode(EXCERPT)
    score = Scorer(engine, ids, tokenizer, context, stride).run()
    reference = of_transformers(bundled_model(), ids, context, stride)
    assert score.perplexity == pytest.approx(reference, rel=2e-5)
    assert 15 < score.perplexity < 120 and score.complete


def test_batches_change_nothing(tiny_artifact: Path) -> None:
    """A last, shorter window and an odd number of full ones, one and two at a time."""
    ids = np.random.default_rng(0).integers(0, 97, 48 + 24 * 4 + 5)
    engine = Engine(tiny_artifact, verify=False)
    alone, pairs = (Scorer(engine, ids, context=48, stride=24, batch=b).run() for b in (1, 2))
    assert alone.scored_tokens == pairs.scored_tokens == len(ids) - 1 and alone.windows == pairs.windows == 6
    assert pairs.nll == pytest.approx(alone.nll, rel=1e-6)
    assert Scorer(engine, ids).batch == 2 and Scorer(engine, ids).stride == 48  # the defaults fit the artifact
    # a random model knows nothing: each of 97 ids is about as likely
    assert alone.perplexity == pytest.approx(97, rel=0.05) and math.isnan(alone.bits_per_byte)


def test_more_context_predicts_better(engine: Engine) -> None:
    tokenizer = load_tokenizer(bundled_model())
    ids = tokenizer.encode(EXCERPT)
    short, long = (Scorer(engine, ids, tokenizer, c, s).run() for c, s in ((2, 1), (64, 16)))
    assert long.scored_tokens == short.scored_tokens and long.perplexity < 0.8 * short.perplexity


def test_bits_a_byte_are_of_the_scored_text(engine: Engine) -> None:
    tokenizer = load_tokenizer(bundled_model())
    text = EXCERPT + "“Naïve”, she said — 🙂.\n"
    ids = tokenizer.encode(text)
    assert sum(len(tokenizer.token_bytes(i)) for i in ids) == len(text.encode())
    assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode() and tokenizer.token_bytes(10**6) == b""
    score = Scorer(engine, ids, tokenizer, 64, 32).run()
    first = len(tokenizer.token_bytes(ids[0]))
    assert score.scored_bytes == len(text.encode()) - first and score.scored_tokens == len(ids) - 1
    assert score.bits_per_byte == pytest.approx(score.bits_per_token * score.scored_tokens / score.scored_bytes)
    assert score.perplexity == pytest.approx(2**score.bits_per_token)
    assert 1 < score.bits_per_byte < 4


def test_an_evaluation_can_be_taken_up_again(engine: Engine) -> None:
    tokenizer = load_tokenizer(bundled_model())
    ids = tokenizer.encode(EXCERPT)
    whole = Scorer(engine, ids, tokenizer, 32, 16).run()
    broken = Scorer(engine, ids, tokenizer, 32, 16)
    seen: list[int] = []

    def stop(done: int, value: float) -> None:
        seen.append(done)
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        broken.run(stop)
    part = broken.result()
    assert seen == [1, 2, 3] and part.windows == 3 and not part.complete and part.scored_tokens == 31 + 16 + 16
    assert broken.run() == whole
    fresh = Scorer(engine, ids, tokenizer, 32, 16).result()
    assert (fresh.windows, fresh.scored_tokens) == (0, 0) and math.isnan(fresh.perplexity)


def test_a_score_that_is_not_finite_is_refused(tiny_artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(tiny_artifact, verify=False)

    def spoilt(ids: np.ndarray) -> np.ndarray:
        out = np.full((len(ids), ids.shape[1] - 1), -1.0, np.float32)
        out[0, 4] = np.nan
        return out

    monkeypatch.setattr(engine, "score", spoilt)
    with pytest.raises(UserError, match="token 5 got a log-probability of nan"):
        Scorer(engine, list(range(20)), context=10, stride=10).run()


def test_a_hopeless_model_has_infinite_perplexity_and_no_traceback(tiny_artifact: Path) -> None:
    engine = Engine(tiny_artifact, verify=False)
    engine.score = lambda ids: np.full((len(ids), ids.shape[1] - 1), -1e4, np.float32)  # type: ignore[method-assign]
    assert Scorer(engine, list(range(20))).run().perplexity == math.inf


# The command ------------------------------------------------------------------------------------------------------


def test_help_is_told_without_the_heavy_imports() -> None:
    code = "import sys, gpt2_tvm.perplexity; print({'tvm', 'torch', 'numpy', 'transformers'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"
    told = perplexity("--help")
    assert told.returncode == 0 and "--stride" in told.stdout and "--limit-tokens" in told.stdout


def test_the_command_prints_and_writes(bundled_artifact: Path, engine: Engine, tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text(EXCERPT)
    options = ("--stride", 16, "--context", 64, "--limit-tokens", 150, "--json", tmp_path / "r.json")
    done = perplexity(bundled_artifact, tmp_path / "t.txt", *options)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "r.json").read_text())
    tokenizer = load_tokenizer(bundled_model())
    score = Scorer(engine, tokenizer.encode(EXCERPT)[:150], tokenizer, 64, 16).run()
    assert result["perplexity"] == pytest.approx(score.perplexity, rel=1e-6)
    assert result["bits_per_byte"] == pytest.approx(score.bits_per_byte, rel=1e-6)
    assert (result["tokens"], result["scored_tokens"], result["complete"]) == (150, 149, True)
    assert (result["context"], result["stride"], result["batch"], result["model"]) == (64, 16, 1, "austen-target")
    assert f"perplexity {score.perplexity:.4f} a token, {score.bits_per_byte:.4f} bits a byte" in done.stdout
    assert "window" in done.stderr and len(done.stderr.splitlines()) <= 10
    piped = run_here("gpt2_tvm.perplexity", bundled_artifact, "-", *options[:6], stdin=EXCERPT.encode())
    assert piped.stdout.splitlines()[1] == done.stdout.splitlines()[1]


def test_the_command_reads_wikitext(bundled_artifact: Path, tmp_path: Path) -> None:
    from gpt2_tvm.perplexity import app

    (tmp_path / "w.txt").write_text(" \n = Anne = \n \n Anne , the <unk> of Kellynch , wasn 't asked . \n" * 3)
    command = [str(bundled_artifact), str(tmp_path / "w.txt"), "--format", "wikitext-tokens", "--context", "64"]
    sizes = {}
    for options in ((), ("--unk", "daughter"), ("--no-detokenize",)):
        app([*command, "--json", str(tmp_path / "r.json"), *options], standalone_mode=False)
        result = json.loads((tmp_path / "r.json").read_text())
        sizes[options] = result["scored_bytes"]
        assert result["detokenized"] == ("--no-detokenize" not in options)
    assert sizes["--unk", "daughter"] == sizes[()] + 3 * (len("daughter") - len("<unk>"))
    assert sizes["--no-detokenize",] > sizes[()]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--stride", 600), "--stride 600: it must be from 1 to the context, 512"),
        (("--stride", 65, "--context", 64), "--stride 65"),
        (("--stride", 0), "--stride 0"),
        (("--context", 513), "--context 513: the artifact holds 512 tokens"),
        (("--context", 1), "--context 1"),
        (("--batch", 2), "--batch 2"),
        (("--batch", 0), "--batch 0"),
        (("--limit-tokens", 1), "--limit-tokens 1"),
        (("--format", "html"), "unknown --format 'html'"),
    ],
)
def test_what_cannot_be_scored_is_refused(
    bundled_artifact: Path, tmp_path: Path, arguments: tuple[object, ...], said: str
) -> None:
    (tmp_path / "t.txt").write_text(EXCERPT)
    assert refusal(bundled_artifact, tmp_path / "t.txt", *arguments).startswith(said)


def refusal(*arguments: object) -> str:
    """The command's UserError, in this process; it is one line."""
    from gpt2_tvm.perplexity import app

    with pytest.raises(UserError) as found:
        app([str(a) for a in arguments], standalone_mode=False)
    assert "\n" not in str(found.value)
    return str(found.value)


def test_texts_and_artifacts_that_will_not_do(bundled_artifact: Path, tiny_artifact: Path, tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text(EXCERPT)
    (tmp_path / "one.txt").write_text("a")
    (tmp_path / "latin.txt").write_bytes(b"Br\xfcder")
    wrong = [
        ((tiny_artifact, tmp_path / "t.txt"), "has no tokenizer"),
        ((bundled_artifact, tmp_path / "one.txt"), "the text has 1 token;"),
        ((bundled_artifact, tmp_path / "latin.txt"), "is not UTF-8 (byte 2)"),
        ((bundled_artifact, os.devnull), "holds no text"),
        ((tmp_path / "none", tmp_path / "t.txt"), "no artifact at"),
    ]
    for arguments, said in wrong:
        assert said in refusal(*arguments)
    done = run_here("gpt2_tvm.perplexity", bundled_artifact, tmp_path / "none.txt")
    assert done.returncode == 1 and done.stdout == "" and done.stderr.startswith("error: there is no file")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGINT")
def test_an_interrupted_run_prints_what_it_has(bundled_artifact: Path, tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text(prompt_text() * 100)
    options = ["--context", "64", "--stride", "8", "--json", str(tmp_path / "r.json")]
    process = subprocess.Popen(
        [*COMMAND, str(bundled_artifact), str(tmp_path / "t.txt"), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stderr is not None and "window" in process.stderr.readline()
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, stderr
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["complete"] is False and 0 < result["windows"] < result["of_windows"]
    assert f"interrupted after {result['windows']} of {result['of_windows']} windows" in stdout
    assert "perplexity" in stdout and "Traceback" not in stderr


# A whole novel ----------------------------------------------------------------------------------------------------


@pytest.mark.heavy
@pytest.mark.skipif(not PERSUASION.is_file(), reason="needs persuasion.txt in ../shared/data")
def test_persuasion(bundled_artifact: Path, tmp_path: Path) -> None:
    """The trained model on the novel that it never saw: transformers' figure to 4 digits in float32; float16 on its
    first quarter, a thousandth off float32 there.
    """
    text, tokenizer = PERSUASION.read_text(encoding="utf-8"), load_tokenizer(bundled_model())
    ids = tokenizer.encode(text)
    scorer, quarter = Scorer(Engine(bundled_artifact, verify=False), ids, tokenizer), len(ids) // 2048
    parts = {}

    def keep(done: int, value: float) -> None:
        parts[done] = scorer.result()

    score = scorer.run(keep)
    assert scorer.batch == 1 and scorer.stride == 512 and sorted(parts) == list(range(1, score.windows + 1))
    reference = of_transformers(bundled_model(), ids, 512, 512)
    assert f"{score.perplexity:.4g}" == f"{reference:.4g}"
    assert score.perplexity == pytest.approx(reference, rel=2e-5) and 49 < reference < 52
    compile_model("bundled", "cpu", "q0f16", tmp_path / "half", verify_widths=())
    half = Scorer(Engine(tmp_path / "half", verify=False), ids[: 512 * quarter], tokenizer).run()
    assert half.complete and half.windows == quarter and half.scored_tokens == parts[quarter].scored_tokens
    assert half.perplexity == pytest.approx(parts[quarter].perplexity, rel=1e-3)
    assert half.bits_per_byte == pytest.approx(parts[quarter].bits_per_byte, rel=1e-3)
