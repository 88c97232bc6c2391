"""The page without a browser: the bundle that ships is what the sources build to; its parts agree with Python's."""

from __future__ import annotations

import hashlib
import json
import math
import random
import subprocess
from pathlib import Path
from statistics import median, stdev

import numpy as np
import page_tools
import pytest

from gpt2_tvm import serve_web
from gpt2_tvm.data import bundled_model, prompt_for, prompt_text
from gpt2_tvm.decoding.sampling import distribution, sample
from gpt2_tvm.tokenizer import Tokenizer, load_tokenizer

ROOT = page_tools.WEB.parent
AGAIN = "build it again: npm ci --prefix web && npm run build --prefix web"
PIECES = (
    *(
        "a",
        "the",
        "I'll",
        "'s",
        "'VE",
        "’re",
        " ",
        "  ",
        "\t",
        "\n",
        "\r\n",
        "_",
        "-",
        "—",
        "...",
        "123",
        "½",
        "٣",
        "Ⅷ",
    ),
    *("é", "e\u0301", "東京", "🫖", "👩‍👩‍👧", "हिन्दी", "ſ", "<|endoftext|>", "<|end", "\x00", "\x1c", "\x7f"),
    *("\u0085", "\u00a0", "\u180e", "\u200b", "\u2028", "\u3000", "\ufeff"),  # spaces, and what looks like one
)


def texts() -> list[str]:
    """200 texts: prose, and runs of what byte-level BPE splits in different ways."""
    rng = random.Random(0)
    made = ["".join(rng.choice(PIECES) for _ in range(rng.randint(1, 25))) for _ in range(190)]
    prose = prompt_text()
    return ["", " ", prose, *(prose[i * 150 : (i + 2) * 150] for i in range(7)), *made]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(bundled_model())


# The bundle ----------------------------------------------------------------------------------------------------------


def test_the_bundle_is_of_these_sources() -> None:
    """Without node: the recorded digests are those of the files, and the packages those of the lock file."""
    record = json.loads((serve_web.PAGE / "sources.json").read_text(encoding="utf-8"))
    for name, digest in record["files"].items():
        assert hashlib.sha256((ROOT / name).read_bytes()).hexdigest() == digest, f"{name} has changed; {AGAIN}"
    locked = json.loads((page_tools.WEB / "package-lock.json").read_text(encoding="utf-8"))["packages"]
    assert {name: locked[name]["integrity"] for name in record["packages"]} == record["packages"], AGAIN
    assert {"web/index.html", "web/src/main.ts", "web/src/page.css", "web/lib/model.mjs"} <= set(record["files"])


def test_the_bundle_is_small_and_asks_nobody() -> None:
    assert {path.name for path in serve_web.PAGE.iterdir()} == {*serve_web.PAGE_FILES, "sources.json"}
    assert sum(path.stat().st_size for path in serve_web.PAGE.iterdir()) < 500_000
    page = (serve_web.PAGE / "index.html").read_text(encoding="utf-8")
    styles = (serve_web.PAGE / "page.css").read_text(encoding="utf-8")
    assert "http" not in page and "<style" not in page and " style=" not in page and "url(" not in styles


def test_the_sources_build_to_the_bundle(tmp_path: Path) -> None:
    page_tools.packages()
    build = ["node", str(page_tools.WEB / "build.mjs"), str(tmp_path)]
    subprocess.run(build, check=True, stdin=subprocess.DEVNULL, timeout=120)
    for name in (*serve_web.PAGE_FILES, "sources.json"):
        assert (tmp_path / name).read_bytes() == (serve_web.PAGE / name).read_bytes(), f"{name} differs; {AGAIN}"


def test_types() -> None:
    page_tools.packages()
    command = ["npx", "--no-install", "tsc", "--project", str(page_tools.WEB)]
    done = subprocess.run(
        command, cwd=page_tools.WEB, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=120
    )
    assert done.returncode == 0, done.stdout


# Parts ---------------------------------------------------------------------------------------------------------------


def _as_artifact(tmp_path: Path) -> Path:
    """A folder with the bundled model's tokenizer where an artifact has it."""
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        (folder / name).write_bytes((bundled_model() / name).read_bytes())
    return tmp_path


def test_tokens_equal_pythons(tokenizer: Tokenizer, tmp_path: Path) -> None:
    given = texts()
    assert len(given) == 200
    answer = page_tools.part("tokens", folder=str(_as_artifact(tmp_path)), texts=given)
    assert answer["end"] == tokenizer.eos_id
    for text, found in zip(given, answer["texts"], strict=True):
        assert found["ids"] == tokenizer.encode(text), ascii(text)
        assert "".join(found["pieces"]) == tokenizer.decode(found["ids"], skip_special=True), ascii(text)


def test_a_tokenizer_json_is_read_too(tokenizer: Tokenizer, tmp_path: Path) -> None:
    folder = _as_artifact(tmp_path) / "tokenizer"
    tokenizer._backend.save(str(folder / "tokenizer.json"))
    for name in ("vocab.json", "merges.txt"):
        (folder / name).unlink()
    given = texts()[:60]
    answer = page_tools.part("tokens", folder=str(tmp_path), texts=given)
    assert [found["ids"] for found in answer["texts"]] == [tokenizer.encode(text) for text in given]


def test_streams_show_whole_characters(tokenizer: Tokenizer, tmp_path: Path) -> None:
    rng = random.Random(1)
    ids = [rng.randrange(tokenizer.vocab_size + 5) for _ in range(3000)]  # half characters, special and unknown ids
    stream = tokenizer.stream(skip_special=True)
    expected = [*(stream.push(i) for i in ids), stream.finish()]
    found = page_tools.part("pieces", folder=str(_as_artifact(tmp_path)), ids=ids)
    assert "".join(found) == "".join(expected)
    assert found == expected


def test_a_seed_draws_numpys_numbers() -> None:
    seeds = [0, 1, 7, 12345, 2**32 - 1, 2**32, 2**53 - 1]
    found = page_tools.part("random", seeds=seeds, count=50)
    assert found == [np.random.default_rng(seed).random(50).tolist() for seed in seeds]


def test_distributions_equal_pythons() -> None:
    rng = np.random.default_rng(0)
    cases = []
    for i in range(60):
        logits = np.round(rng.normal(0, 3, 200), 1).astype(np.float32).astype(float).tolist()  # with ties
        if i % 5 == 0:
            logits[3] = logits[17] = -math.inf
        cases.append(
            {
                "logits": logits,
                "temperature": [0.0, 0.3, 1.0, 1.7][i % 4],
                "topK": [0, 1, 5, 40, 1000][i % 5],
                "topP": [1.0, 0.9, 0.5, 0.05, 0.0, 0.999][i % 6],
            }
        )
    given = [{**c, "logits": ["-inf" if x == -math.inf else x for x in c["logits"]]} for c in cases]
    for case, found in zip(cases, page_tools.part("distribution", cases=given), strict=True):
        ids, shares = distribution(np.array(case["logits"]), case["temperature"], case["topK"], case["topP"])
        assert found["ids"] == ids.tolist(), case
        np.testing.assert_allclose(found["shares"], shares, rtol=1e-12)


def test_samples_equal_pythons() -> None:
    logits = np.random.default_rng(3).normal(0, 2, 500).astype(np.float32)
    options = {"temperature": 0.8, "topK": 50, "topP": 0.95}
    rng = np.random.default_rng(11)
    expected = [sample(logits, 0.8, 50, 0.95, rng) for _ in range(300)]
    assert page_tools.part("sample", logits=logits.tolist(), seed=11, count=300, **options) == expected
    assert len(set(expected)) > 10


def test_the_benchmarks_prompt_is_pythons(tokenizer: Tokenizer, tmp_path: Path) -> None:
    folder = str(_as_artifact(tmp_path))
    for n in (1, 322, 1000):
        assert page_tools.part("prompt", folder=folder, vocabulary=2048, n=n) == prompt_for(tokenizer, 2048, n)
        assert page_tools.part("prompt", folder=None, vocabulary=97, n=n) == prompt_for(None, 97, n)


def test_medians_and_spreads() -> None:
    for values in ([3.0], [1.0, 4.0], [5.0, 1.0, 2.5, 9.0, 2.0]):
        found = page_tools.part("summary", values=values)
        assert found["median"] == median(values)
        assert found["sd"] == pytest.approx(stdev(values) if len(values) > 1 else 0.0)
