"""A text from a file, in one of the formats that are evaluated on.

plain: UTF-8, taken as it is (a byte-order mark is dropped).

wikitext-raw, wikitext-tokens: the published files of WikiText-2 and -103 (Merity et al. 2016, "Pointer Sentinel Mixture
Models"): a paragraph a line, headings as " = Title = ", words and punctuation apart. The raw files hold every word, the
tokenised ones `<unk>` for rare words. A model of written text is not meant to be scored on that spacing, so both are
turned back by default (`detokenize`).
"""

from __future__ import annotations

import sys
from pathlib import Path

from gpt2_tvm.errors import UserError
from gpt2_tvm.evaluation.detokenize import detokenize

FORMATS = ("plain", "wikitext-raw", "wikitext-tokens")
UNKNOWN = "<unk>"


def load_text(path: str | Path, format_: str = "plain", restore: bool = True, unknown: str = UNKNOWN) -> str:
    """The text to score.

    Args:
        path: a file, or "-" for standard input.
        format_: one of `FORMATS`.
        restore: turn WikiText's spacing back (`detokenize`); no effect on plain text.
        unknown: what each `<unk>` of wikitext-tokens becomes, `<unk>` itself by default.

    Raises UserError where there is no such file, it is not UTF-8, it holds no text, or the format is not what it is.
    """
    if format_ not in FORMATS:
        raise UserError(f"unknown --format {format_!r}; choose {', '.join(FORMATS)}")
    text = _decoded(path)
    if not text.strip():
        raise UserError(f"{_name(path)} holds no text; give a file with at least two tokens")
    if format_ == "plain":
        return text
    if format_ == "wikitext-raw" and UNKNOWN in text:
        raise UserError(f"{_name(path)} holds {UNKNOWN}, so it is a tokenised WikiText; use --format wikitext-tokens")
    text = text.replace("\r\n", "\n")
    if restore:
        text = detokenize(text)
    return text.replace(UNKNOWN, unknown)


def _decoded(path: str | Path) -> str:
    try:
        data = sys.stdin.buffer.read() if str(path) == "-" else Path(path).read_bytes()
    except FileNotFoundError:
        raise UserError(f"there is no file {path}; give a text file, or - for standard input") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder; give a text file in it") from None
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{_name(path)} is not UTF-8 (byte {error.start}); convert it, such as with iconv -f latin1 -t utf-8"
        ) from None


def _name(path: str | Path) -> str:
    return "standard input" if str(path) == "-" else str(path)
