"""WikiText's spaced-out text back to text as people write it.

What is undone, line by line, in this order: ``@-@ @,@ @.@`` inside words and numbers; headings (``= = X = =`` to
``== X ==``); contractions and possessives (``don 't``, ``Bob 's``, ``boys '``); double quotes, by pairs within a line;
spaces before closing and after opening punctuation; currency before and per cent, degree, prime after a number; spaces
at both ends of a line.

What is left, because the spacing no longer says what stood there: single quotes around words, dashes and slashes with
spaces, `<unk>`. Line breaks stay, so an empty line stays empty.
"""

from __future__ import annotations

import re

_RULES: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r" @([-,.])@ ", r"\1"),
        (r"(?<==) (?==)", ""),
        (r" '(s|t|m|d|re|ve|ll|S|T|M|D|RE|VE|LL)(?!\w)", r"'\1"),
        (r"(?<=s) '(?= |$)", "'"),
        (r'(?<!\S)" ([^"]*?) "(?!\S)', r'"\1"'),
        (r" ([,.;:!?%)\]}”°′″])(?!\S)", r"\1"),
        (r"(?<![^\s\"'(\[{“])([(\[{“$£€¥₤#]) (?=\S)", r"\1"),
        (r" ([,.;:!?)\]}”])(?=[\"'])", r"\1"),
    )
)


def detokenize(text: str) -> str:
    """`text`, any number of lines in WikiText's spacing, as written text with the same line breaks."""
    return "\n".join(_line(line) for line in text.split("\n"))


def _line(line: str) -> str:
    line = line.strip(" ")
    for pattern, replacement in _RULES:
        before = None
        while before != line:  # neighbours share a space, and one pass takes every second of them
            before, line = line, pattern.sub(replacement, line)
    return line
