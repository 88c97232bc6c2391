"""Text that a model writes, with what it thought of each next token: what its drafts learn from.

A draft is asked to continue the model's own greedy text, so that is what it is shown: pieces sampled at temperature 1
(or given, real text), each followed by a piece of greedy text, so that greedy text stands at every position and after
every kind of prompt. The engine writes it, a batch at a time; each batch is a file, so that writing can be interrupted
and gone on with.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from gpt2_tvm.errors import UserError
from gpt2_tvm.files import replacing_file, sha256, write_atomically

if TYPE_CHECKING:
    from gpt2_tvm.engine import Engine

BATCH = 64  # texts that are written together
KEPT = 16  # most likely next tokens that are remembered at each place
GIVEN = (64, 384)  # tokens of real text that a text begins with, from and to
LOOSE, STRICT = (24, 128), (32, 128)  # tokens of a sampled piece and of a greedy piece, from and to
Say = Callable[[str, float], None]


@dataclass(frozen=True)
class Texts:
    """n texts of T tokens.

    ids: int32 [n, T]. greedy: bool [n, T], whether the token was the most likely one, chosen as such. top: int32
    [n, T, KEPT], the most likely tokens after ids[:, :t + 1], the likeliest first; shares: float32 [n, T, KEPT], their
    probabilities.
    """

    ids: np.ndarray
    greedy: np.ndarray
    top: np.ndarray
    shares: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)

    def split(self, last: int) -> tuple[Texts, Texts]:
        """All but the last texts, and these."""
        arrays = (self.ids, self.greedy, self.top, self.shares)
        return Texts(*(a[: len(self) - last] for a in arrays)), Texts(*(a[len(self) - last :] for a in arrays))


def read_tokens(files: Sequence[Path], model: Path) -> np.ndarray:
    """The tokens of text files, one after the other, int32 [n]. A paragraph is a line: empty lines are left out."""
    from gpt2_tvm.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(model)
    parts = [np.zeros(0, np.int32)]
    for file in files:
        try:
            lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--text {file} cannot be read as UTF-8 text ({error}); give plain text files") from None
        parts.append(np.asarray(tokenizer.encode("\n".join(filter(None, lines))), np.int32))
    return np.concatenate(parts)


def load_or_write(
    folder: Path,
    model: str,
    batches: int,
    files: Sequence[Path] = (),
    seed: int = 0,
    say: Say = lambda what, done: None,
) -> Texts:
    """The texts in `folder`; those that are missing are written first.

    Args:
        model: as `compile` takes it; it needs a tokenizer only for `files`.
        batches: of `BATCH` texts each.
        files: real text; half of the texts then begin with a piece of it.
        seed: of all chance.

    Raises UserError where the folder holds texts of another model, or of other options.
    """
    from gpt2_tvm.build import compile_model
    from gpt2_tvm.checkpoint import resolve_model
    from gpt2_tvm.engine import Engine

    source = resolve_model(model)
    made = {
        "model": source.name,
        "seed": seed,
        "weights": sha256(source.folder / "model.safetensors") if source.folder else source.seed,
        "files": [sha256(file) for file in files],
    }
    folder.mkdir(parents=True, exist_ok=True)
    note = folder / "texts.json"
    if note.is_file() and json.loads(note.read_text(encoding="utf-8")) != made:
        raise UserError(f"{folder} holds texts of another model or of other options; name another folder")
    write_atomically(note, json.dumps(made, indent=1) + "\n")
    missing = [i for i in range(batches) if not _file(folder, i).is_file()]
    if missing:
        real = read_tokens(files, source.folder) if files and source.folder else np.zeros(0, np.int32)
        with tempfile.TemporaryDirectory() as scratch:
            artifact = compile_model(
                model, "cpu", output=Path(scratch) / "writer", batch_sizes=(BATCH,), verify_widths=(), seed=source.seed
            )
            engine = Engine(artifact, verify=False)
            for done, i in enumerate(missing):
                say(f"writing texts {i * BATCH} to {(i + 1) * BATCH}", done / len(missing))
                texts = write_batch(engine, real, np.random.default_rng([seed, i]), BATCH)
                with replacing_file(_file(folder, i)) as file:
                    np.savez(
                        file,
                        ids=texts.ids.astype(np.uint16),
                        greedy=texts.greedy,
                        top=texts.top.astype(np.uint16),
                        shares=texts.shares.astype(np.float16),
                    )
    return _read([_file(folder, i) for i in range(batches)])


def write_batch(engine: Engine, real: np.ndarray, rng: np.random.Generator, rows: int) -> Texts:
    """`rows` texts that fill the engine's context. real: int32 tokens that half of them begin with a piece of, if it
    is long enough."""
    capacity, vocab = engine.max_seq_len, engine.config.vocab_size
    ids, greedy = np.zeros((rows, capacity), np.int32), np.zeros((rows, capacity), bool)
    strict, given = _plan(rows, capacity, real, rng)
    kept = min(KEPT, vocab)
    top, shares = np.zeros((rows, capacity, kept), np.int32), np.zeros((rows, capacity, kept), np.float32)
    ids[:, 0] = np.where(given[:, 0] >= 0, given[:, 0], rng.integers(0, vocab, rows))
    engine.reset()
    for t in range(capacity):
        logits = engine.prefill(ids[:, :1]) if t == 0 else engine.decode(ids[:, t])
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        p = weights / weights.sum(-1, keepdims=True)
        best = np.argpartition(-p, kept - 1, axis=-1)[:, :kept]
        values = np.take_along_axis(p, best, -1)
        order = np.argsort(-values, axis=-1, kind="stable")
        top[:, t], shares[:, t] = np.take_along_axis(best, order, -1), np.take_along_axis(values, order, -1)
        if t + 1 < capacity:
            drawn = (logits + rng.gumbel(size=logits.shape)).argmax(-1)  # Gumbel's trick: a draw from the softmax
            free = np.where(strict[:, t + 1], logits.argmax(-1), drawn)
            ids[:, t + 1] = np.where(given[:, t + 1] >= 0, given[:, t + 1], free)
            greedy[:, t + 1] = strict[:, t + 1] & (given[:, t + 1] < 0)
    return Texts(ids, greedy, top, shares)


def _plan(rows: int, capacity: int, real: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Which places are greedy, bool [rows, capacity]; and which are given, int32 [rows, capacity], -1 elsewhere."""
    strict, given = np.zeros((rows, capacity), bool), np.full((rows, capacity), -1, np.int32)
    longest = min(GIVEN[1], capacity - 1, len(real) - 1)
    for b in range(rows):
        at = 0
        if b % 2 and longest >= GIVEN[0]:
            at = int(rng.integers(GIVEN[0], longest + 1))
            first = int(rng.integers(0, len(real) - at))
            given[b, :at] = real[first : first + at]
        while at < capacity:
            if not (at and given[b, at - 1] >= 0):  # what follows real text is greedy at once
                at += int(rng.integers(*LOOSE))
            end = at + int(rng.integers(*STRICT))
            strict[b, at:end] = True
            at = end
    return strict, given


def _file(folder: Path, i: int) -> Path:
    return folder / f"texts-{i:04d}.npz"


def _read(files: Sequence[Path]) -> Texts:
    parts = []
    for file in files:
        with np.load(file) as held:
            parts.append((held["ids"], held["greedy"], held["top"], held["shares"]))
    ids, greedy, top, shares = (np.concatenate(columns) for columns in zip(*parts, strict=True))
    return Texts(ids.astype(np.int32), greedy, top, shares)
