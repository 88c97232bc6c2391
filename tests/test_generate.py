"""Sampling as a distribution, stop strings, and the command that writes text."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from commands import run_here

from gpt2_tvm.decoding.sampling import check_options, distribution, sample
from gpt2_tvm.decoding.stop import StopStrings
from gpt2_tvm.decoding.tokens import Generation
from gpt2_tvm.engine import Engine
from gpt2_tvm.errors import UserError
from gpt2_tvm.generate import stream
from gpt2_tvm.tokenizer import load_tokenizer

# The 0.9999 quantiles of chi-square for 1..12 degrees of freedom: with fixed seeds a right sampler passes always, and a
# wrong one is off by hundreds.
CHI2_9999 = (15.14, 18.42, 21.11, 23.51, 25.74, 27.86, 29.88, 31.83, 33.72, 35.56, 37.37, 39.13)


def reference(logits: np.ndarray, temperature: float, top_k: int, top_p: float) -> np.ndarray:
    """Probabilities [vocab] by the definition: sort everything, cut, normalise."""
    p = np.exp((logits.astype(np.float64) - logits.max()) / temperature)
    p /= p.sum()
    order = sorted(range(len(p)), key=lambda i: (-logits[i], i))
    kept = order[: top_k or len(order)]
    p[[i for i in order if i not in set(kept)]] = 0
    p /= p.sum()
    held, nucleus = 0.0, []
    for i in kept:
        if nucleus and held >= top_p - 1e-12:
            break
        nucleus.append(i)
        held += p[i]
    p[[i for i in range(len(p)) if i not in set(nucleus)]] = 0
    return p / p.sum()


def full(logits: np.ndarray, *options: float) -> np.ndarray:
    """`distribution` as probabilities [vocab]."""
    ids, shares = distribution(logits, *options)
    p = np.zeros(len(logits))
    p[ids] = shares
    return p


# ---- sampling


@pytest.mark.parametrize("seed", range(40))
def test_distribution_is_the_definition(seed: int) -> None:
    rng = np.random.default_rng(seed)
    logits = rng.normal(scale=rng.choice([0.1, 2, 20]), size=int(rng.integers(2, 200))).astype(np.float32)
    if seed % 4 == 0:
        logits = logits.round()  # many ties
    temperature = float(rng.choice([0.2, 1, 5]))
    top_k, top_p = int(rng.integers(0, len(logits) + 3)), float(rng.choice([0.05, 0.5, 0.9, 0.999, 1]))
    np.testing.assert_allclose(
        full(logits, temperature, top_k, top_p), reference(logits, temperature, top_k, top_p), atol=1e-12
    )


@pytest.mark.parametrize("options", [(1.0, 0, 1.0), (0.5, 0, 1.0), (2.0, 5, 1.0), (1.0, 0, 0.7), (1.3, 8, 0.9)])
def test_draws_have_the_expected_frequencies(options: tuple[float, int, float]) -> None:
    logits = np.random.default_rng(5).normal(size=12)
    expected = reference(logits, *options)
    rng = np.random.default_rng(11)
    draws = 20_000
    counts = np.bincount([sample(logits, *options, rng) for _ in range(draws)], minlength=12)
    assert (counts[expected == 0] == 0).all()
    possible = expected > 0
    expectation = draws * expected[possible]
    chi2 = float(((counts[possible] - expectation) ** 2 / expectation).sum())
    assert chi2 < CHI2_9999[int(possible.sum()) - 2]


@pytest.mark.parametrize("options", [(0.0, 0, 1.0), (1.0, 1, 1.0), (1.0, 0, 0.0), (1.0, 0, 1e-12), (1e-300, 0, 1.0)])
def test_the_limits_are_argmax(options: tuple[float, int, float]) -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        logits = rng.normal(size=50).astype(np.float32)
        assert sample(logits, *options, rng) == logits.argmax()


def test_ties_go_to_the_lower_id() -> None:
    logits = np.array([1, 3, 3, 2, 3], np.float32)
    assert sample(logits, 0.0) == sample(logits, 1.0, 1) == 1
    assert distribution(logits, 1.0, 2)[0].tolist() == [1, 2]  # exactly k, though three are equal
    np.testing.assert_allclose(distribution(logits, 1.0, 2)[1], [0.5, 0.5])


def test_excluded_tokens_never_come() -> None:
    logits = np.array([0, -np.inf, 0, -np.inf], np.float32)
    rng = np.random.default_rng(2)
    assert {sample(logits, 100.0, 0, 1.0, rng) for _ in range(200)} == {0, 2}
    assert distribution(logits, 1.0, 3)[0].tolist() == [0, 2]


def test_infinite_logits_take_all() -> None:
    assert distribution(np.array([0, np.inf, np.inf]), 1.0)[0].tolist() == [1, 2]
    assert sample(np.array([0, np.inf, 9e9]), 0.7) == 1


def test_a_huge_temperature_is_uniform() -> None:
    p = full(np.array([-1e4, 0, 1e4]), 1e30)
    np.testing.assert_allclose(p, 1 / 3, rtol=1e-9)


def test_extreme_logits_do_not_overflow() -> None:
    with np.errstate(all="raise", under="ignore"):
        np.testing.assert_allclose(full(np.array([1e30, 1e30, -1e30])), [0.5, 0.5, 0])
    assert full(np.float16([6e4, -6e4]), 1e-4).tolist() == [1, 0]


def test_the_seed_decides() -> None:
    logits = np.random.default_rng(1).normal(size=1000)

    def draws(seed: int) -> list[int]:
        rng = np.random.default_rng(seed)
        return [sample(logits, 1.0, 0, 0.95, rng) for _ in range(20)]

    assert draws(4) == draws(4) != draws(5)


@pytest.mark.parametrize("logits", [[0, np.nan, 1], [-np.inf, -np.inf]])
def test_logits_that_mean_nothing_are_refused(logits: list[float]) -> None:
    with pytest.raises(UserError, match=r"NaN|-inf"):
        sample(np.array(logits))


@pytest.mark.parametrize(
    "options", [(-0.1, 0, 1.0), (np.nan, 0, 1.0), (np.inf, 0, 1.0), (1.0, -1, 1.0), (1.0, 0, 1.01), (1.0, 0, -0.1)]
)
def test_options_out_of_range_are_refused(options: tuple[float, int, float]) -> None:
    with pytest.raises(UserError, match="--"):
        check_options(*options)


# ---- stop strings


@pytest.mark.parametrize("seed", range(30))
def test_stop_strings_cut_as_if_the_text_were_whole(seed: int) -> None:
    rng = np.random.default_rng(seed)
    text = "".join(rng.choice(list("abc"), 40))
    stops = ["".join(rng.choice(list("abc"), int(n))) for n in rng.integers(2, 6, size=2)]
    filtered, shown, at = StopStrings(stops), "", 0
    while at < len(text) and filtered.found is None:
        size = int(rng.integers(1, 5))
        shown += filtered.push(text[at : at + size])
        at += size
        assert text.startswith(shown)
    shown += filtered.finish()
    cuts = [text.find(stop) for stop in stops if stop in text[:at]]
    assert shown == (text[: min(cuts)] if cuts else text)


def test_nothing_is_held_back_without_need() -> None:
    stops = StopStrings(["\n\n"])
    assert [stops.push(piece) for piece in ("a", "\n", "b\n", "\nc")] == ["a", "", "\nb", ""]
    assert stops.found == "\n\n"


# ---- tokens


@pytest.fixture(scope="module")
def tiny(tiny_artifact: Path) -> Engine:
    return Engine(tiny_artifact)


def test_greedy_on_the_device_is_greedy_on_the_host(tiny: Engine) -> None:
    on_device = Generation(tiny, [5, 6, 7], 20)
    on_host = Generation(tiny, [5, 6, 7], 20, temperature=1.0, top_k=1)
    assert list(on_device) == list(on_host)
    assert on_device.finish == on_host.finish == "length"
    assert (on_device.steps, on_host.steps) == (20, 19)


def test_a_seed_repeats_and_a_new_one_is_told(tiny: Engine) -> None:
    first = Generation(tiny, [1], 30, temperature=2.0)
    tokens = list(first)
    assert list(Generation(tiny, [1], 30, temperature=2.0, seed=first.seed)) == tokens
    assert list(Generation(tiny, [1], 30, temperature=2.0, seed=first.seed + 1)) != tokens


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_it_stops_where_the_context_is_full(tiny: Engine, temperature: float) -> None:
    generation = Generation(tiny, list(range(40)), 100, temperature, seed=0)
    assert len(list(generation)) == 8
    assert generation.finish == "context"


def test_it_stops_at_the_end_of_text(tiny: Engine) -> None:
    tokens = list(Generation(tiny, [5], 30, temperature=1.5, seed=3))
    eos = tokens[10]
    generation = Generation(tiny, [5], 30, temperature=1.5, seed=3, eos_id=eos)
    assert list(generation) == tokens[: tokens.index(eos)]
    assert generation.finish == "eos"


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        (list(range(48)), {}, "nothing can follow"),
        ([], {}, "empty"),
        ([1], {"max_tokens": 0}, "--max-tokens"),
        ([1], {"seed": -1}, "--seed"),
        ([1], {"top_p": 2.0}, "--top-p"),
    ],
)
def test_what_cannot_run_is_refused(tiny: Engine, prompt: list[int], options: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Generation(tiny, prompt, **{"max_tokens": 5, **options})  # type: ignore[arg-type]


# ---- text


class Fixed:
    """Stands in for a Generation: gives known tokens, so that the text is known."""

    finish = "length"

    def __init__(self, tokens: list[int]) -> None:
        self.tokens = tokens

    def __iter__(self) -> object:
        return iter(self.tokens)


def test_streamed_text_has_whole_characters_only(bundled_artifact: Path) -> None:
    tokenizer = load_tokenizer(bundled_artifact / "tokenizer")
    text = "naïve 🙂 “quoted” — 東京"
    ids = tokenizer.encode(text)
    assert len(ids) > len(text)  # characters are spread over tokens

    class Watched(io.StringIO):
        def write(self, piece: str) -> int:
            assert "\ufffd" not in piece
            return super().write(piece)

    out = Watched()
    result = stream(Fixed(ids), tokenizer, StopStrings([]), out)  # type: ignore[arg-type]
    assert out.getvalue() == text + "\n"
    assert (result.text, result.tokens, result.finish) == (text, ids, "length")


def test_a_stop_string_across_tokens_ends_the_text(bundled_artifact: Path) -> None:
    tokenizer = load_tokenizer(bundled_artifact / "tokenizer")
    ids = tokenizer.encode("It was a truth 🙂 universally")
    result = stream(Fixed(ids), tokenizer, StopStrings(["th 🙂"]), io.StringIO())  # type: ignore[arg-type]
    assert (result.text, result.finish) == ("It was a tru", "stop")
    assert len(result.tokens) < len(ids)


def generate(*arguments: str | Path) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "gpt2_tvm.generate", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, timeout=120)


def test_the_command_writes_what_the_engine_gives(bundled_artifact: Path, tmp_path: Path) -> None:
    prompt = "It is a truth universally acknowledged"
    (tmp_path / "prompt.txt").write_text(prompt + "\n", encoding="utf-8")
    told = tmp_path / "told.json"
    done = generate(bundled_artifact, "--prompt-file", tmp_path / "prompt.txt", "--max-tokens", 24, "--json", told)
    assert done.returncode == 0, done.stderr
    assert b"tokens/s" in done.stderr

    tokenizer = load_tokenizer(bundled_artifact / "tokenizer")
    engine = Engine(bundled_artifact)
    engine.prefill(tokenizer.encode(prompt))
    expected = engine.decode_greedy(24)[0].tolist()
    made = json.loads(told.read_text())
    assert made["tokens"] == expected
    assert made["prompt"] == prompt
    assert done.stdout.decode() == tokenizer.decode(expected) + "\n"
    assert made["text"] == tokenizer.decode(expected)
    assert made["finish"] == "length" and made["decode_tok_s"] > 0


@pytest.mark.parametrize(
    ("arguments", "stdin", "message"),
    [
        (["", "--max-tokens", "4"], None, "prompt is empty"),
        ([], b"", "prompt is empty"),
        ([], b"\xff\xfe", "not UTF-8"),
        (["x", "--prompt-file", "y"], None, "given twice"),
        (["--prompt-file", "/nonexistent/prompt"], None, "No such file"),
        (["x", "--temperature", "-1"], None, "--temperature"),
        (["x", "--top-p", "1.5"], None, "--top-p"),
        (["x", "--stop", ""], None, "--stop"),
        (["x", "--device", "cuda"], None, "compiled for cpu"),
        (["--prompt-ids", "1,two"], None, "--prompt-ids"),
        (["--prompt-ids", "1,99999"], None, "outside the vocabulary"),
    ],
)
def test_what_a_user_gets_wrong_is_one_line(
    bundled_artifact: Path, arguments: list[str], stdin: bytes | None, message: str
) -> None:
    done = run_here("gpt2_tvm.generate", bundled_artifact, *arguments, stdin=stdin or b"")
    assert done.returncode == 1
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0]


def test_without_a_tokenizer_ids_are_asked_for(tiny_artifact: Path) -> None:
    done = run_here("gpt2_tvm.generate", tiny_artifact, "Hello")
    assert done.returncode == 1 and "--prompt-ids" in done.stderr
    done = run_here("gpt2_tvm.generate", tiny_artifact, "--prompt-ids", "5,6", "--max-tokens", 100, "--temperature", 1)
    assert done.returncode == 0
    assert len(done.stdout.split()) == 46
    assert "context is full" in done.stderr
