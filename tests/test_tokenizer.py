"""The tokenizer equals transformers', a stream shows whole characters only, the data that ships is there."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest

from gpt2_tvm.data import bundled_model, prompt_for, prompt_ids, prompt_text
from gpt2_tvm.errors import UserError
from gpt2_tvm.tokenizer import Tokenizer, load_tokenizer

TEXTS = {
    "plain": "It is a truth universally acknowledged, that a single man must be in want of a wife.",
    "contractions": "I'll say he'd've gone; we're sure they'VE not, and it's 'tis'nt don’t.",
    "spaces": "  two  before,\ttab, trailing   ",
    "newlines": "a\n\nb\r\n\n\n c\n",
    "emoji": "tea 🫖 for 👩‍👩‍👧 and 👍🏽!",
    "scripts": "naïve café — 東京 Ελλάδα العربية हिन्दी ﬁ",
    "digits": "In 1811, £3.50 (or 12,345.678e-9)",
    "end of text": "one<|endoftext|>two <|endoftext|>\n<|endoftext|>",
    "almost end of text": "<|endoftext|<|endof text|>",
    "controls": "nul \x00 bell \x07 del \x7f nbsp \xa0 zwsp \u200b bom \ufeff end",
    "replacement": "a real � and a private \ue000",
    "combining": "e\u0301 vs \u00e9",
    "empty": "",
    "gettysburg": prompt_text(),
}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(bundled_model())


def stream(tokenizer: Tokenizer, ids: list[int], skip_special: bool = False) -> list[str]:
    decoder = tokenizer.stream(skip_special)
    return [*(decoder.push(i) for i in ids), decoder.finish()]


def test_what_it_knows(tokenizer: Tokenizer) -> None:
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (2048, 0)


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_equals_transformers(tokenizer: Tokenizer, text: str) -> None:
    transformers = pytest.importorskip("transformers")
    reference = transformers.GPT2Tokenizer.from_pretrained(bundled_model())
    ids = tokenizer.encode(text)
    assert ids == reference.encode(text)
    assert tokenizer.decode(ids) == reference.decode(ids, clean_up_tokenization_spaces=False) == text
    skipped = reference.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert tokenizer.decode(ids, skip_special=True) == skipped == text.replace("<|endoftext|>", "")


def test_tokenizer_json_equals_vocab_and_merges(tokenizer: Tokenizer, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    transformers.GPT2TokenizerFast.from_pretrained(bundled_model()).save_pretrained(tmp_path)
    (tmp_path / "vocab.json").unlink(missing_ok=True)
    (tmp_path / "merges.txt").unlink(missing_ok=True)
    fast = load_tokenizer(tmp_path)
    assert (fast.eos_id, fast.vocab_size) == (tokenizer.eos_id, tokenizer.vocab_size)
    for text in TEXTS.values():
        assert fast.encode(text) == tokenizer.encode(text)
        assert "".join(stream(fast, fast.encode(text))) == text


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_a_stream_shows_whole_characters_as_early_as_it_can(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    shown = ""
    decoder = tokenizer.stream()
    for n, token in enumerate(ids, 1):
        shown += decoder.push(token)
        assert text.startswith(shown)
        if not tokenizer.decode(ids[:n]).endswith("�"):  # nothing is left open: all of it must be out
            assert shown == tokenizer.decode(ids[:n])
    assert shown + decoder.finish() == text


def test_a_character_split_across_tokens_comes_with_its_last_byte(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("🫖")
    assert len(ids) == 4
    assert stream(tokenizer, ids) == ["", "", "", "🫖", ""]


@pytest.mark.parametrize("skip_special", [False, True])
def test_any_ids_stream_to_what_decode_gives(tokenizer: Tokenizer, skip_special: bool) -> None:
    """Random weights write bytes that are no UTF-8; a padded model, ids that the tokenizer lacks."""
    rng = random.Random(0)
    bytes_only = [i for i in range(2048) if len(tokenizer.decode([i])) == 1]
    for choice in (range(2048), bytes_only, [0, *range(2040, 2060)]):
        for _ in range(200):
            ids = rng.choices(list(choice), k=30)
            assert "".join(stream(tokenizer, ids, skip_special)) == tokenizer.decode(ids, skip_special)


def test_a_character_that_never_ends(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a🫖")[:-1]
    decoder = tokenizer.stream()
    assert "".join(decoder.push(i) for i in ids) == "a"
    assert decoder.finish() == "�"
    assert decoder.push(tokenizer.encode("b")[0]) == "b"  # nothing of the old text is left


def test_the_configuration_may_name_another_end_of_text(tmp_path: Path, tokenizer: Tokenizer) -> None:
    folder = shutil.copytree(bundled_model(), tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    for eos in ("Ġthe", {"content": "Ġthe", "special": True}):
        (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos}))
        assert load_tokenizer(folder).eos_id == tokenizer.encode(" the")[0]
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "not in the vocabulary"}))
    assert load_tokenizer(folder).eos_id is None
    (folder / "tokenizer_config.json").unlink()
    assert load_tokenizer(folder).eos_id == 0


def test_a_vocabulary_without_end_of_text_does_not_grow(tmp_path: Path) -> None:
    vocab = json.loads((bundled_model() / "vocab.json").read_text())
    del vocab["<|endoftext|>"]
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    shutil.copy(bundled_model() / "merges.txt", tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.eos_id is None and tokenizer.vocab_size == 2047
    assert max(tokenizer.encode("<|endoftext|>")) < 2048


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("vocab.json", None),
        ("vocab.json", "{"),
        ("vocab.json", '{"a": "b"}'),
        ("merges.txt", None),
        ("merges.txt", "#version: 0.2\nnot in the vocabulary\n"),
        ("merges.txt", "#version: 0.2\nzz qq\n"),
        ("tokenizer.json", "{}"),
        ("tokenizer.json", "no JSON"),
        ("tokenizer_config.json", "{"),
        ("tokenizer_config.json", "[]"),
    ],
)
def test_a_file_that_is_missing_or_damaged_is_named(tmp_path: Path, file: str, content: str | None) -> None:
    folder = shutil.copytree(bundled_model(), tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    (folder / file).unlink(missing_ok=True)
    if content is not None:
        (folder / file).write_text(content)
    with pytest.raises(UserError) as caught:
        load_tokenizer(folder)
    assert "\n" not in str(caught.value)
    assert str(folder / file) in str(caught.value)


def test_no_folder_and_another_kind_of_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no folder"):
        load_tokenizer(tmp_path / "nowhere")
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models

    backend = Backend(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    backend.decoder = decoders.WordPiece()
    backend.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match="not a byte-level tokenizer"):
        load_tokenizer(tmp_path)


# ---- the data that ships


def test_the_bundled_prompt() -> None:
    ids = prompt_ids()
    assert len(ids) == 322 and ids[0] == 50256 and max(ids) == 50256
    ids.clear()  # a caller's list is its own
    assert len(prompt_ids()) == 322
    assert prompt_text().startswith("<|endoftext|>Four score") and prompt_text().endswith("earth.\n")


@pytest.mark.parametrize("n", [1, 17, 322, 1000])
def test_a_prompt_for_any_model(tokenizer: Tokenizer, n: int) -> None:
    ours = tokenizer.encode(prompt_text())
    for ids, source in ((prompt_for(tokenizer, 2048, n), ours), (prompt_for(None, 50257, n), prompt_ids())):
        assert ids == (source * 4)[:n]
    small = prompt_for(None, 61, n)
    assert len(small) == n and all(0 <= i < 61 for i in small)
    assert n < 17 or len(set(small)) > 5


def test_a_prompt_of_nothing_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        prompt_for(tokenizer, 2048, 0)
