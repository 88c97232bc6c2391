"""Text to token ids and back, over the `tokenizers` library; it equals transformers' GPT2Tokenizer.

Streaming is the part worth a reader's time. A byte-level token is a few bytes, not a few characters: an emoji
is four bytes and often three tokens, so the text of a prefix of the ids is not a prefix of the text.
`TextStream` therefore works on bytes and lets a character out when its last byte has come.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpt2_tvm.errors import UserError

if TYPE_CHECKING:
    import tokenizers

END_OF_TEXT = "<|endoftext|>"


class Tokenizer:
    """A model's tokenizer. Made by `load_tokenizer`.

    Attributes:
        eos_id: the id that ends a text (<|endoftext|> unless `tokenizer_config.json` names another), or None.
        vocab_size: how many ids it knows; a model's own vocabulary may be padded to more.
    """

    def __init__(self, backend: tokenizers.Tokenizer, eos_token: str = END_OF_TEXT) -> None:
        self._backend = backend
        self.eos_id: int | None = backend.token_to_id(eos_token)
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, with nothing added around it; a special token written out becomes its one id."""
        return self._backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int], skip_special: bool = False) -> str:
        """The text of `ids`; bytes that are not UTF-8 become U+FFFD, ids outside the vocabulary nothing."""
        return self._backend.decode([int(i) for i in ids], skip_special_tokens=skip_special)

    def to_json(self) -> str:
        """The content of a `tokenizer.json`."""
        return str(self._backend.to_str())

    def stream(self, skip_special: bool = False) -> TextStream:
        """A decoder that takes one id at a time; what it gives adds up to `decode` of all of them."""
        return TextStream(self, skip_special)

    def token_bytes(self, token_id: int) -> bytes:
        """What one id adds to the UTF-8 bytes of a decoded text; b"" for an id outside the vocabulary."""
        return self._bytes(int(token_id), skip_special=False)

    @cached_property
    def _added(self) -> dict[int, tokenizers.AddedToken]:
        return self._backend.get_added_tokens_decoder()

    def _bytes(self, token_id: int, skip_special: bool) -> bytes:
        """What one id stands for, as `decode` sees it."""
        added = self._added.get(token_id)
        if added is not None and added.special and skip_special:
            return b""
        token = self._backend.id_to_token(token_id)
        if token is None:
            return b""
        alphabet = _byte_of_character()
        if all(character in alphabet for character in token):
            return bytes(alphabet[character] for character in token)
        return token.encode()  # an added token written in plain text, with a space say


class TextStream:
    """Ids in, complete characters out.

    >>> stream = tokenizer.stream()
    >>> for token in ids:
    ...     print(stream.push(token), end="", flush=True)
    >>> print(stream.finish())
    """

    def __init__(self, tokenizer: Tokenizer, skip_special: bool) -> None:
        self._tokenizer, self._skip_special = tokenizer, skip_special
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """The text that has become complete with `token_id`: "" while a character still lacks bytes."""
        return self._utf8.decode(self._tokenizer._bytes(int(token_id), self._skip_special))

    def finish(self) -> str:
        """What is left: "", or U+FFFD for a character that lacks bytes. The stream can start anew."""
        return self._utf8.decode(b"", final=True)


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """Read `tokenizer.json`, or `vocab.json` and `merges.txt` (byte-level BPE, no space put in front), from
    `folder`.

    Raises UserError, naming the file, where they are missing or damaged, or the tokenizer is not byte-level.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}; give one with tokenizer.json, or vocab.json and merges.txt")
    if (folder / "tokenizer.json").is_file():
        backend = _from_tokenizer_json(folder / "tokenizer.json")
    else:
        backend = _from_vocab_and_merges(folder)
    return Tokenizer(backend, _eos_token(folder))


def _from_tokenizer_json(path: Path) -> tokenizers.Tokenizer:
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders

    try:
        backend = Backend.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise _damaged(path, error) from None
    if not isinstance(backend.decoder, decoders.ByteLevel):
        raise UserError(f"{path} is not a byte-level tokenizer, which GPT-2's is; use a checkpoint that has its own")
    backend.no_truncation()  # a file saved during training may still hold these two
    backend.no_padding()
    return backend


def _from_vocab_and_merges(folder: Path) -> tokenizers.Tokenizer:
    from tokenizers import AddedToken, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Backend

    vocab, merges = folder / "vocab.json", folder / "merges.txt"
    for path in (vocab, merges):
        if not path.is_file():
            raise UserError(f"{path} is missing, and there is no tokenizer.json; copy the tokenizer's files there")
    try:
        backend = Backend(models.BPE.from_file(str(vocab), str(merges)))
    except Exception as error:  # as above; it does not say which of the two files is meant
        words = _read_json(vocab)
        sound = isinstance(words, dict) and all(isinstance(i, int) and i >= 0 for i in words.values())
        raise _damaged(merges if sound else vocab, error) from None
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    if backend.token_to_id(END_OF_TEXT) is not None:  # a new id would lie outside the model's vocabulary
        backend.add_special_tokens([AddedToken(END_OF_TEXT, normalized=False, special=True)])
    return backend


def _eos_token(folder: Path) -> str:
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        return END_OF_TEXT
    values = _read_json(path)
    if not isinstance(values, dict):
        raise UserError(f"{path} is damaged: not a JSON object; copy the tokenizer's files again")
    token = values.get("eos_token") or END_OF_TEXT
    return str(token["content"]) if isinstance(token, dict) and "content" in token else str(token)


def _read_json(path: Path) -> Any:
    """The content, or None where it is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return None


def _damaged(path: Path, error: Exception) -> UserError:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return UserError(f"{path} is damaged ({reason}); copy the tokenizer's files again")


@cache
def _byte_of_character() -> dict[str, int]:
    """GPT-2's alphabet: each byte has a printable character, Latin-1's own or else the next from 256 on."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    others = [byte for byte in range(256) if byte not in printable]
    return {**{chr(b): b for b in printable}, **{chr(256 + i): b for i, b in enumerate(others)}}
