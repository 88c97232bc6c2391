"""`Engine`: an artifact on a device, with the KV caches and positions of a batch of sequences.

Tokens in, logits out; sampling and text are other modules' business. A batch that the artifact has no static variant
for runs in the next larger one: the sequences that fill it up have length 0 and touch nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gpt2_tvm.artifact import SCORE_ROWS, open_artifact
from gpt2_tvm.errors import UserError
from gpt2_tvm.runners import make_runner
from gpt2_tvm.runners.base import Handle

Ids = int | Sequence[int] | Sequence[Sequence[int]] | np.ndarray
Paths = Sequence[int] | Sequence[Sequence[int]] | np.ndarray


class Engine:
    """Loads an artifact on a device.

    Args:
        path: the artifact's folder.
        device: "cpu", "cuda", "cuda:1" …; default the kind that the artifact was compiled for.
        verify: check the sha256 of every file first (a damaged file is refused in one line).
        threads: of the CPU, the caller's included; default one a physical core that this process may use, or what
            TVM_NUM_THREADS says (`runners.threads`). UserError for an artifact of another device.

    Attributes:
        artifact, config: what was loaded.
        positions: int32 [batch], tokens in the cache of each sequence.
        threads: how many run; None on another device than the CPU.
    """

    def __init__(
        self, path: str | Path, device: str | None = None, verify: bool = True, threads: int | None = None
    ) -> None:
        self.artifact = open_artifact(path, verify)
        self.config = self.artifact.config
        self.max_seq_len = self.artifact.max_seq_len
        self.runner = make_runner(self.artifact, device, threads)
        self.threads = self.runner.threads
        self.batch = 0
        self.positions = np.zeros(0, np.int32)
        self._slots = 0  # the static batch that runs: self.batch or the next compiled size above it
        self._caches: list[Handle] = []
        self._tensors: dict[tuple[str, tuple[int, ...]], Handle] = {}
        self._next: np.ndarray | None = None  # most likely next token of each sequence, after logits were made
        self._tree: np.ndarray | None = None  # parents of the last tree, until keep() or another call

    # Input -----------------------------------------------------------------------------------------------------------

    def prefill(self, ids: Ids) -> np.ndarray:
        """Append a prompt to each sequence -> float32 [batch, vocab], the logits after its last token.

        ids: a list (one sequence), an int array [n] or [batch, n], or a list of lists of any lengths. After `reset` or
        at first the batch is taken from ids; later calls go on with the same sequences (another turn of a
        conversation).
        """
        rows = self._rows(ids)
        if self.batch == 0:
            self._start(len(rows))
        padded, lengths = self._pad(rows, max(len(r) for r in rows))
        logits = self.runner.call("prefill", [self._int("ids", padded), *self._where(lengths), self._caches])
        self.positions = self.positions + lengths[: self.batch]
        return self._done(logits)[:, 0]

    def decode(self, ids: Ids) -> np.ndarray:
        """Append one token to each sequence -> float32 [batch, vocab]. ids: an int, or one a sequence ([batch] or
        [batch, 1])."""
        array = np.asarray(ids)
        rows = self._rows(array.reshape(-1, 1) if array.ndim <= 1 else array, exactly=1)
        padded, lengths = self._pad(rows, 1)
        inputs = [self._int("token", padded), *self._where(lengths), self._caches]
        logits = self.runner.call(f"decode_b{self._slots}", inputs)
        self.positions = self.positions + 1
        return self._done(logits)[:, 0]

    def decode_greedy(self, n: int, first: Ids | None = None) -> np.ndarray:
        """n times: the most likely next token, appended -> int32 [batch, n]. The loop stays on the device; one
        read-back at the end.

        Goes on from the last prefill or decode, whose logits give the first token, or from `first` (an int, or one a
        sequence); afterwards the engine stands as if `decode` had been called with each of these tokens, and `best`
        says what would come next.
        """
        if first is not None:
            self._next = np.concatenate(self._rows(np.asarray(first).reshape(-1, 1), exactly=1))
        if self._next is None:
            raise UserError("decode_greedy needs logits to start from: call prefill or decode first")
        return self._advance("greedy", n, [])

    def _advance(self, step: str, n: int, settings: list[Handle]) -> np.ndarray:
        """n calls of a step that hands its token to itself, from `best` on; also for `decoding.on_device`."""
        assert self._next is not None
        self._check_room([n] * self.batch)
        if n <= 0:
            return np.zeros((self.batch, 0), np.int32)
        slots, first = self._slots, self.positions
        token = np.zeros((slots, 1), np.int32)
        token[: self.batch, 0] = self._next
        history = self._tensor("history", (slots, self.max_seq_len))
        at, active = self._where(np.ones(self.batch, np.int32))
        inputs = [self._int("greedy_token", token), at, history, active, *settings, self._caches]
        for _ in range(n):
            self.runner.call(f"{step}_b{slots}", inputs)
        # step k appended token k at slot first + k and remembered its successor at the slot after it
        seen = self.runner.download(history)
        rows = np.arange(self.batch)
        if first.max() + n < self.max_seq_len:
            following = seen[rows, first + n]
        else:  # a sequence that fills the context has no slot for it
            following = self.runner.download(inputs[0])[: self.batch, 0].copy()
        tokens = np.empty((self.batch, n), np.int32)
        for b in rows:
            tokens[b, 0] = self._next[b]
            tokens[b, 1:] = seen[b, first[b] + 1 : first[b] + n]
        self._next = following
        self._tree = None
        self.positions = self.positions + np.int32(n)
        return tokens

    @property
    def best(self) -> np.ndarray | None:
        """The most likely next token of each sequence, int32 [batch]; None where the last call was not a prefill, a
        decode or a decode_greedy."""
        return self._next

    def verify(self, ids: Ids, parents: Sequence[Any] | np.ndarray | None = None) -> np.ndarray:
        """Candidate tokens -> float32 [batch, m, vocab], the logits after each.

        Without `parents` they are a chain: appended, as decode would one by one (take some back with `rewind`). With
        `parents` they are a tree: parents[j] is the index of token j's parent among ids, below j, or -1 for a child of
        the last cached token; the same list for every sequence, or one a sequence. A tree does not move the positions
        until `keep` says which branch is meant. Rows past a sequence's own length (ragged) are zero.
        """
        rows = self._rows(ids)
        if self.batch == 0:
            self._start(len(rows))
        m = max(len(r) for r in rows)
        widths = self.artifact.verify_widths
        if not widths:
            raise UserError(f"{self.artifact.path} was compiled without verify; compile with --verify-widths 4,8")
        if parents is None:
            pieces = [self._verify([r[i : i + widths[-1]] for r in rows], None) for i in range(0, m, widths[-1])]
            return np.concatenate(pieces, axis=1)
        if m > widths[-1]:
            raise UserError(
                f"a tree of {m} tokens is wider than this artifact's {widths[-1]}; compile with --verify-widths {m}"
            )
        tree = np.asarray([list(p) for p in parents] if np.ndim(parents[0]) else [list(parents)] * self.batch, np.int32)
        if tree.shape != (self.batch, m) or any(len(r) != m for r in rows):
            raise UserError(
                f"parents has shape {list(tree.shape)}, expected one parent for each of {m} ids of {self.batch} "
                "sequences"
            )
        if (tree >= np.arange(m)).any() or (tree < -1).any():
            raise UserError("parents: each token's parent must stand before it among ids, or be -1")
        return self._verify(rows, tree)

    def _verify(self, rows: list[np.ndarray], tree: np.ndarray | None) -> np.ndarray:
        m = max(len(r) for r in rows)
        width = next(w for w in self.artifact.verify_widths if w >= m)
        padded, lengths = self._pad(rows, width)
        inputs = [self._int("candidates", padded), *self._where(lengths), *self._branches(width, tree), self._caches]
        logits = self.runner.call(f"verify_b{self._slots}_m{width}", inputs)
        if tree is None:
            self.positions = self.positions + lengths[: self.batch]
        out = self.runner.download(logits)[: self.batch, :m].copy()
        for b in range(self.batch):
            out[b, len(rows[b]) :] = 0
        self._next, self._tree = None, tree
        return out

    def _branches(self, width: int, tree: np.ndarray | None) -> list[Handle]:
        """Masks and depths of `width` rows on the device; those of a chain are uploaded once."""
        kind, shape = "chain" if tree is None else "tree", (self._slots, width)
        names = [f"{kind}_masks_{width}", f"{kind}_depths_{width}"]
        if tree is None and (names[0], shape) in self._tensors:
            return [self._tensors[name, shape] for name in names]
        masks, depths = np.zeros(shape, np.uint32), np.zeros(shape, np.int32)
        for b in range(self._slots if tree is None else self.batch):
            for j in range(width if tree is None else tree.shape[1]):
                parent = j - 1 if tree is None else int(tree[b, j])
                masks[b, j] = (masks[b, parent] if parent >= 0 else 0) | np.uint32(1 << j)
                depths[b, j] = depths[b, parent] + 1 if parent >= 0 else 0
        return [self._int(names[0], masks.view(np.int32)), self._int(names[1], depths)]

    def stream(self, ids: Ids, parents: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """A tree of candidates, and what may follow it -> (logits, rows, streams).

        ids, parents: as for `verify`; the first of each sequence is the last token of its text (parent -1), and the
        others follow it. As many as the artifact's streams take, or fewer.

        logits: float32 [batch, K, vocab], after K of the tokens; rows: int32 [batch, K], which of the ids these are (K
        is smaller than the tree where an early exit prunes it; rows past a sequence's own are without meaning).
        streams: float32 [batch, G, vocab], what comes 2, 3, … tokens after the last token that stood. The branch that
        stood greedily is appended, and the positions move past it (take some back with `rewind`).
        """
        from gpt2_tvm.streams.running import TreePass

        tree_pass, rows = TreePass(self), self._rows(ids)
        if max(len(r) for r in rows) > tree_pass.width:
            longest = max(len(r) for r in rows)
            raise UserError(f"a tree of {longest} tokens, but this artifact's streams take {tree_pass.width}")
        logits, kept, streams = tree_pass.look(rows, parents)
        return logits, kept, streams

    def keep(self, path: Paths) -> None:
        """After a tree: keep one branch. path: the indices of its tokens among the tree's ids, from the root down (one
        list, or one a sequence; empty: keep nothing). Their keys and values move to the front and the positions move
        past them."""
        if self._tree is None:
            raise UserError("keep needs a tree: call verify(ids, parents) first")
        given: Any = path
        paths: list[list[int]] = (
            [list(p) for p in given] if len(given) and np.ndim(given[0]) else [list(given)] * self.batch
        )
        if len(paths) != self.batch:
            raise UserError(f"keep got {len(paths)} paths for {self.batch} sequences")
        for b, p in enumerate(paths):
            for above, j in zip([-1, *p], p, strict=False):  # each token and the one above it
                if not 0 <= j < self._tree.shape[1] or self._tree[b, j] != above:
                    raise UserError(
                        f"keep: {p} is not a branch of sequence {b}'s tree (token {j} is no child of {above})"
                    )
        width = next(w for w in self.artifact.verify_widths if w >= self._tree.shape[1])
        table = np.zeros((self._slots, width), np.int32)
        lengths = np.zeros(self.batch, np.int32)
        for b, p in enumerate(paths):
            table[b, : len(p)] = p
            lengths[b] = len(p)
        at, count = self._where(lengths)
        self.runner.call(
            f"keep_b{self._slots}_m{width}",
            [at, self._int("path", table), count, self._caches],
            with_params=False,
        )
        self.positions = self.positions + lengths
        self._next, self._tree = None, None

    def score(self, ids: Ids) -> np.ndarray:
        """Log-probability of each next token, from an empty context -> float32 [batch, n-1]; the logits never leave the
        device.

        Sequences must have the same length n >= 2. Starts with a `reset` and ends with one.
        """
        rows = self._rows(ids, fresh=True)
        n = len(rows[0])
        if any(len(r) != n for r in rows) or n < 2:
            raise UserError("score needs sequences of one length, at least 2 tokens each")
        self._start(len(rows))
        array = np.stack(rows)
        parts = []
        for begin in range(0, n - 1, SCORE_ROWS):
            piece = list(array[:, begin : min(begin + SCORE_ROWS, n - 1)])
            targets = list(array[:, begin + 1 : min(begin + SCORE_ROWS, n - 1) + 1])
            padded, lengths = self._pad(piece, len(piece[0]))
            expected, _ = self._pad(targets, len(piece[0]))
            inputs = [
                self._int("ids", padded),
                self._int("targets", expected),
                *self._where(lengths),
                self._caches,
            ]
            parts.append(self.runner.download(self.runner.call("score", inputs))[: self.batch].copy())
            self.positions = self.positions + lengths[: self.batch]
        self.reset()
        return np.concatenate(parts, axis=1)

    # State -----------------------------------------------------------------------------------------------------------

    def rewind(self, positions: int | Sequence[int] | np.ndarray) -> None:
        """Forget all but the first `positions` tokens of each sequence (one number, or one a sequence). Costs
        nothing."""
        single = isinstance(positions, (int, np.integer))
        wanted = [int(positions)] * self.batch if single else [int(at) for at in positions]  # type: ignore[arg-type,union-attr]
        cached = self.positions.tolist()
        if len(wanted) != self.batch or any(not 0 <= at <= most for at, most in zip(wanted, cached, strict=False)):
            raise UserError(f"rewind to {wanted} is outside what is cached, {cached} tokens")
        self.positions = np.array(wanted, np.int32)
        self._next, self._tree = None, None

    def reset(self) -> None:
        """Forget everything; the next prefill may have another batch size."""
        self.batch, self.positions = 0, np.zeros(0, np.int32)
        self._next, self._tree = None, None

    # Helpers ---------------------------------------------------------------------------------------------------------

    def _start(self, batch: int) -> None:
        """Begin with `batch` empty sequences; caches are kept when they fit (their contents cannot be seen past the
        positions)."""
        sizes = [size for size in self.artifact.batch_sizes if size >= batch]
        if not sizes:
            raise UserError(
                f"a batch of {batch} sequences, but {self.artifact.path} was compiled for up to "
                f"{self.artifact.batch_sizes[-1]}; "
                f"compile with --batch-sizes {','.join(map(str, (*self.artifact.batch_sizes, batch)))}"
            )
        if self._slots != sizes[0]:
            self._caches, self._tensors = [], {}
            c, dtype = self.config, self.artifact.manifest["compute_dtype"]
            shapes = [(2, sizes[0], c.heads(i), self.max_seq_len, c.head_dim) for i in range(c.n_layer)]
            self._caches = [self.runner.empty(shape, dtype) for shape in shapes]
            self._slots = sizes[0]
        self.batch, self.positions = batch, np.zeros(batch, np.int32)
        self._next, self._tree = None, None

    def _rows(self, ids: Ids, exactly: int | None = None, fresh: bool = False) -> list[np.ndarray]:
        """Token ids as a list of int32 arrays, one a sequence, every id and length checked."""
        given: Any = [[ids]] if isinstance(ids, (int, np.integer)) else ids
        if len(given) == 0:
            raise UserError("the prompt is empty: give at least one token id")
        nested = given if np.ndim(given[0]) else [given]
        rows = []
        for b, row in enumerate(nested):
            array = np.asarray(row)
            if array.size == 0:
                raise UserError(f"the prompt of sequence {b} is empty: give at least one token id")
            if array.ndim != 1 or array.dtype.kind not in "iu":
                raise UserError(
                    f"token ids of sequence {b} must be integers in one list, not {array.dtype} of shape "
                    f"{list(array.shape)}"
                )
            bad = array[(array < 0) | (array >= self.config.vocab_size)]
            if bad.size:
                raise UserError(
                    f"token id {int(bad[0])} is outside the vocabulary (0..{self.config.vocab_size - 1}); "
                    "is it another model's tokenizer?"
                )
            rows.append(array.astype(np.int32))
        if exactly is not None and any(len(r) != exactly for r in rows):
            raise UserError(f"decode takes {exactly} token a sequence")
        batch = len(rows) if fresh or self.batch == 0 else self.batch
        if len(rows) != batch:
            raise UserError(
                f"{len(rows)} sequences given, {self.batch} in the cache; call reset() before another batch size"
            )
        if exactly is not None and self.batch == 0:
            raise UserError("decode needs a context: call prefill first")
        self._check_room(
            [len(r) for r in rows], np.zeros(batch, np.int32) if fresh or self.batch == 0 else self.positions
        )
        return rows

    def _check_room(self, counts: Sequence[int], positions: np.ndarray | None = None) -> None:
        for b, (have, more) in enumerate(zip(self.positions if positions is None else positions, counts, strict=True)):
            if have + more > self.max_seq_len:
                raise UserError(
                    f"sequence {b} would be {have + more} tokens long, the context holds {self.max_seq_len}; "
                    "shorten the prompt, generate less, or rewind() first"
                )

    def _pad(self, rows: list[np.ndarray], width: int) -> tuple[np.ndarray, np.ndarray]:
        """Right-padded ids [slots, width] and the true lengths [batch]."""
        padded = np.zeros((self._slots, width), np.int32)
        for b, row in enumerate(rows):
            padded[b, : len(row)] = row
        return padded, np.asarray([len(r) for r in rows], np.int32)

    def _where(self, lengths: np.ndarray) -> tuple[Handle, Handle]:
        """Positions and lengths on the device; sequences that only fill up the static batch stand at 0 with length
        0."""
        where = np.zeros((2, self._slots), np.int32)
        where[0, : self.batch], where[1, : self.batch] = self.positions, lengths
        return self._int("positions", where[0]), self._int("lengths", where[1])

    def _tensor(self, name: str, shape: tuple[int, ...]) -> Handle:
        """An int32 tensor on the device, kept and reused. Long-lived ones only: prompts of every length would pile
        up."""
        key = (name, shape)
        if key not in self._tensors:
            for old in [k for k in self._tensors if k[0] == name]:
                del self._tensors[old]
            self._tensors[key] = self.runner.empty(shape, "int32")
        return self._tensors[key]

    def _int(self, name: str, array: np.ndarray) -> Handle:
        tensor = self._tensor(name, array.shape)
        self.runner.upload(tensor, np.ascontiguousarray(array, dtype=np.int32))
        return tensor

    def _done(self, logits: Handle) -> np.ndarray:
        out = self.runner.download(logits)[: self.batch]
        self._next, self._tree = out[:, -1].argmax(-1).astype(np.int32), None
        return out
