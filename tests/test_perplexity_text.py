"""Loaders and windows of the perplexity command, without a model."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest

from gpt2_tvm.errors import UserError
from gpt2_tvm.evaluation.detokenize import detokenize
from gpt2_tvm.evaluation.text import load_text
from gpt2_tvm.evaluation.windows import Window, sliding_windows

WIKITEXT = Path(__file__).parents[2] / "shared" / "data" / "wikitext2-valid.txt"  # where a checkout has it beside it

# Windows ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "context", "stride", "expected"),
    [
        (10, 4, 2, [(0, 4, 1), (2, 6, 4), (4, 8, 6), (6, 10, 8)]),
        (10, 4, 4, [(0, 4, 1), (4, 8, 5), (8, 10, 9)]),
        (9, 4, 4, [(0, 4, 1), (4, 8, 5)]),  # a last window of one token has nothing to predict
        (9, 4, 3, [(0, 4, 1), (3, 7, 4), (6, 9, 7)]),
        (3, 100, 50, [(0, 3, 1)]),
        (2, 2, 1, [(0, 2, 1)]),
        (4, 2, 1, [(0, 2, 1), (1, 3, 2), (2, 4, 3)]),
    ],
)
def test_windows(tokens: int, context: int, stride: int, expected: list[tuple[int, int, int]]) -> None:
    assert sliding_windows(tokens, context, stride) == [Window(*w) for w in expected]


def test_every_token_is_scored_once_with_enough_before_it() -> None:
    for tokens in range(2, 40):
        for context in (2, 3, 7, 16):
            for stride in range(1, context + 1):
                windows = sliding_windows(tokens, context, stride)
                scored = [i for w in windows for i in range(w.first, w.end)]
                assert len(scored) == len(set(scored)) == sum(w.scored for w in windows)
                missing = set(range(tokens)) - set(scored)
                assert missing == ({0} if stride < context else set(range(0, tokens, context)))
                assert all(w.begin < w.first < w.end <= tokens and w.end - w.begin <= context for w in windows)
                assert all(w.first - w.begin >= context - stride for w in windows[1:])


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ((10, 1, 1), "--context 1: a window needs at least 2 tokens"),
        ((10, 4, 5), "--stride 5: it must be from 1 to the context, 4"),
        ((10, 4, 0), "--stride 0"),
        ((1, 4, 2), "the text has 1 token; at least 2"),
        ((0, 4, 2), "the text has 0 tokens"),
    ],
)
def test_windows_that_mean_nothing_are_refused(sizes: tuple[int, int, int], said: str) -> None:
    with pytest.raises(UserError, match=re.escape(said)):
        sliding_windows(*sizes)


# Text -------------------------------------------------------------------------------------------------------------


def test_plain_text_is_taken_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = ' A " line " with @-@ and <unk> ,\r\n\n= = x = =\n – “ü” 🙂\n'
    (tmp_path / "t.txt").write_bytes(text.encode())
    assert load_text(tmp_path / "t.txt") == text
    (tmp_path / "bom.txt").write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert load_text(tmp_path / "bom.txt") == text
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    assert load_text("-") == text


@pytest.mark.parametrize(
    ("content", "format_", "said"),
    [
        (b"", "plain", "t.txt holds no text"),
        (b" \n\n\t ", "wikitext-raw", "t.txt holds no text"),
        (b"gr\xfc\xdfe", "plain", "t.txt is not UTF-8 (byte 2)"),
        (b"\xff\xfeh\x00i\x00", "plain", "t.txt is not UTF-8 (byte 0)"),
        (b" a <unk> b \n", "wikitext-raw", "use --format wikitext-tokens"),
        (b"text", "wikitext", "unknown --format 'wikitext'; choose plain, wikitext-raw, wikitext-tokens"),
    ],
)
def test_what_is_no_such_text_is_one_line(tmp_path: Path, content: bytes, format_: str, said: str) -> None:
    (tmp_path / "t.txt").write_bytes(content)
    with pytest.raises(UserError, match=re.escape(said)) as found:
        load_text(tmp_path / "t.txt", format_)
    assert "\n" not in str(found.value)


def test_a_missing_file_and_a_folder_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no file .*nowhere"):
        load_text(tmp_path / "nowhere")
    with pytest.raises(UserError, match="is a folder"):
        load_text(tmp_path)


# Lines in WikiText's spacing, written for this test, and as people would have them.
LINES = [
    (" = A river = ", "= A river ="),
    (" = = Its course = = ", "== Its course =="),
    (" = = = Upper part = = = ", "=== Upper part ==="),
    (" It is 1 @,@ 234 @.@ 5 km long , well @-@ known and deep . ", "It is 1,234.5 km long, well-known and deep."),
    (" They didn 't , he 's , we 'll ; I 'd say so . ", "They didn't, he's, we'll; I'd say so."),
    (" The boys ' boat and Ann 's oar ", "The boys' boat and Ann's oar"),
    (' She said : " Come back ! " and " now " . ', 'She said: "Come back!" and "now".'),
    (' " One " " Two " ', '"One" "Two"'),
    (" ( see [ 2 ] , p . 3 ) , of $ 5 and £ 6 , 7 % of 8 ° ", "(see [2], p. 3), of $5 and £6, 7% of 8°"),
    (" It cost ( $ 12 ) ; why ? ", "It cost ($12); why?"),
    (' He wrote : " ( See above . ) " ', 'He wrote: "(See above.)"'),
    (" The <unk> , a <unk> 's nest ", "The <unk>, a <unk>'s nest"),
    (" A – B — C / D ' E ' ", "A – B — C / D ' E '"),  # nothing says what stood there
    (' An unclosed " quote . ', 'An unclosed " quote.'),
    (" ", ""),
    ("", ""),
]


@pytest.mark.parametrize(("line", "written"), LINES)
def test_a_line_of_wikitext_as_people_write_it(line: str, written: str) -> None:
    assert detokenize(line) == written
    assert detokenize(written) == written  # text that is already so stays


def test_the_formats_of_wikitext(tmp_path: Path) -> None:
    content = " \n = A river = \n \n The <unk> is 1 @,@ 200 m wide . \r\n"
    (tmp_path / "t.txt").write_bytes(content.encode())
    assert load_text(tmp_path / "t.txt", "wikitext-tokens") == "\n= A river =\n\nThe <unk> is 1,200 m wide.\n"
    kept = load_text(tmp_path / "t.txt", "wikitext-tokens", restore=False, unknown="something")
    assert kept == " \n = A river = \n \n The something is 1 @,@ 200 m wide . \n"
    (tmp_path / "t.txt").write_text(content.replace("<unk>", "ford"))
    assert load_text(tmp_path / "t.txt", "wikitext-raw").splitlines()[3] == "The ford is 1,200 m wide."


@pytest.mark.skipif(not WIKITEXT.is_file(), reason="needs WikiText-2's validation file in ../shared/data")
def test_the_validation_split_of_wikitext_2() -> None:
    """Merity et al. 2016, table 1: 60 articles and 217,646 tokens, of which each line's end is one."""
    plain = load_text(WIKITEXT, "wikitext-tokens", restore=False)
    lines = plain.splitlines()
    assert len(plain.split()) + len(lines) == 217_646
    assert sum(bool(re.fullmatch(r" = [^=].* = ", line)) for line in lines) == 60
    text = load_text(WIKITEXT, "wikitext-tokens")
    assert text.count("\n") == plain.count("\n") and text.count("<unk>") == plain.count("<unk>") > 10_000
    assert not re.search(r" @[-,.]@ | [,;] |\( | \)(?!\S)", text)
    assert len(text) < 0.97 * len(plain)
    letters = [re.sub(r"[^\w]", "", t.replace("<unk>", "")) for t in (plain, text)]
    assert letters[0] == letters[1]  # no word is lost or made
    assert "= Homarus gammarus =" in text and '"lobster red"' in text
