"""An engine over MLC's interface, as mlc-llm's own would drive it: embed, tell the cache whose tokens come, forward."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gpt2_tvm.errors import UserError
from gpt2_tvm.runners.threads import use_threads

PAGE = 16  # tokens of a page, as in web-llm


class PagedEngine:
    """Sequences by number over one paged cache.

    Args:
        vm: a virtual machine (`tvm.relax.VirtualMachine`) with the functions of `paged.PagedGPT2`.
        device: its device.
        parameters: TVM's tuple of the tensors, in the order of the metadata.
        metadata: what `_metadata` answers.
        max_total_tokens: of all sequences together; default: the context for each.
        threads: of a CPU's pool that each call is to find; None leaves it as it is.

    Raises UserError for an unknown or known sequence, an id outside the vocabulary, and a context that overflows.
    """

    def __init__(
        self,
        vm: Any,
        device: Any,
        parameters: Any,
        metadata: Mapping[str, Any],
        max_total_tokens: int | None = None,
        threads: int | None = None,
    ) -> None:
        import tvm

        self._tvm, self._vm, self._device, self.metadata = tvm, vm, device, dict(metadata)
        self._parameters, self.threads = parameters, threads
        self.context = int(metadata["context_window_size"])
        self.chunk = int(metadata["prefill_chunk_size"])
        batch = int(metadata["max_batch_size"])
        total = max_total_tokens or batch * self.context
        sizes = (batch, total, self.chunk, PAGE, 0)
        self._cache = vm["create_tir_paged_kv_cache"](*(self._shape(size) for size in sizes))
        self.lengths: dict[int, int] = {}

    @classmethod
    def open(cls, path: str | Path, threads: int | None = None, max_total_tokens: int | None = None) -> PagedEngine:
        """An artifact made with --interface mlc, on the device that it was compiled for.

        threads: of the CPU, as for `Engine`. Raises UserError for an artifact that is damaged, has another interface,
        or is not for this machine, and for one for pages: those are web-llm's to run.
        """
        from gpt2_tvm.artifact import MLC, open_artifact
        from gpt2_tvm.runners.vm import VmRunner

        artifact = open_artifact(path, interface=MLC)
        if artifact.kind == "webgpu":
            raise UserError(f"{artifact.path} is for pages; run it with python -m gpt2_tvm.export_mlc and web-llm")
        runner = VmRunner(artifact, threads=threads)
        metadata = json.loads(str(runner.vm["_metadata"]()))
        return cls(runner.vm, runner.device, runner.params, metadata, max_total_tokens, runner.threads)

    def add(self, sequence: int) -> None:
        """Begin an empty sequence."""
        if sequence in self.lengths:
            raise UserError(f"sequence {sequence} is there already; remove it first, or choose another number")
        if len(self.lengths) >= int(self.metadata["max_batch_size"]):
            raise UserError(
                f"{len(self.lengths)} sequences are what this module was compiled for; remove one, or compile with a "
                "larger --batch-sizes"
            )
        self._call("kv_state_add_sequence", sequence)
        self.lengths[sequence] = 0

    def fork(self, parent: int, child: int) -> None:
        """`child` begins with all of `parent`'s tokens; full pages are shared."""
        self._known(parent)
        if child in self.lengths:
            raise UserError(f"sequence {child} is there already; remove it first, or choose another number")
        self._call("kv_state_fork_sequence", parent, child, -1)
        self.lengths[child] = self.lengths[parent]

    def remove(self, sequence: int) -> None:
        """Forget a sequence and free its pages."""
        self._known(sequence)
        self._call("kv_state_remove_sequence", sequence)
        del self.lengths[sequence]

    def popn(self, sequence: int, count: int) -> None:
        """Take the last `count` tokens back."""
        self._known(sequence)
        if not 0 <= count <= self.lengths[sequence]:
            raise UserError(f"sequence {sequence} has {self.lengths[sequence]} tokens; {count} cannot be taken back")
        self._call("kv_state_popn", sequence, count)
        self.lengths[sequence] -= count

    def reset(self) -> None:
        """Forget all sequences."""
        self._call("kv_state_clear")
        self.lengths.clear()

    def prefill(self, prompts: Mapping[int, Sequence[int]]) -> np.ndarray:
        """Tokens for each of these sequences -> float32 [b, V], logits after each one's last. One call of
        `batch_prefill` where they fit one chunk together, else one sequence after the other, in chunks."""
        self._check(prompts)
        if sum(map(len, prompts.values())) <= self.chunk:
            ends = np.cumsum([len(ids) for ids in prompts.values()]) - 1
            return self._forward("batch_prefill", prompts, ends.astype(np.int32))[0]
        rows = []
        for sequence, ids in prompts.items():
            for start in range(0, len(ids), self.chunk):
                part = {sequence: ids[start : start + self.chunk]}
                last = np.array([len(part[sequence]) - 1], np.int32)
                logits = self._forward("batch_prefill", part, last)[0]  # [1, V]
            rows.append(logits[0])
        return np.stack(rows)

    def decode(self, tokens: Mapping[int, int]) -> np.ndarray:
        """One token for each of these sequences -> float32 [b, V]."""
        one = {sequence: [token] for sequence, token in tokens.items()}
        self._check(one)
        return self._forward("batch_decode" if len(one) > 1 else "decode", one)[:, 0]

    def verify(self, candidates: Mapping[int, Sequence[int]]) -> list[np.ndarray]:
        """Candidates for each of these sequences -> float32 [m, V] a sequence, logits after each of them."""
        self._check(candidates)
        logits = self._forward("batch_verify", candidates)[0]  # [sum of m, V]
        return np.split(logits, np.cumsum([len(ids) for ids in candidates.values()])[:-1])

    # -- one call ----------------------------------------------------------------------------------------------

    def _forward(self, name: str, parts: Mapping[int, Sequence[int]], *more: np.ndarray) -> np.ndarray:
        if self.threads is not None:  # pools are a calling thread's own, and another engine may have set this one
            use_threads(self.threads)
        ids = np.concatenate([np.asarray(part, np.int32) for part in parts.values()])
        embeds = self._vm["embed"](self._tensor(ids), self._parameters)  # [t, E]
        shape = (len(parts), 1, -1) if name.endswith("decode") else (1, len(ids), -1)
        width = int(embeds.shape[1])
        view = embeds._create_view((*shape[:2], width))
        self._call("kv_state_begin_forward", self._shape(*parts), self._shape(*map(len, parts.values())))
        result = self._vm[name](view, *(self._tensor(array) for array in more), self._cache, self._parameters)
        self._call("kv_state_end_forward")
        for sequence, part in parts.items():
            self.lengths[sequence] += len(part)
        logits: np.ndarray = result[0].numpy()
        return logits

    def _check(self, parts: Mapping[int, Sequence[int]]) -> None:
        vocabulary = int(self.metadata["active_vocab_size"])
        if not parts:
            raise UserError("no sequence was given; give at least one")
        for sequence, ids in parts.items():
            self._known(sequence)
            if not len(ids):
                raise UserError(f"sequence {sequence}: give at least one token")
            if wrong := next((token for token in ids if not 0 <= token < vocabulary), None):
                raise UserError(f"token {wrong} is not in the vocabulary, whose ids go from 0 to {vocabulary - 1}")
            if self.lengths[sequence] + len(ids) > self.context:
                raise UserError(
                    f"sequence {sequence}: {self.lengths[sequence]} + {len(ids)} tokens are more than the context of "
                    f"{self.context} holds"
                )

    def _known(self, sequence: int) -> None:
        if sequence not in self.lengths:
            raise UserError(f"there is no sequence {sequence}; add it first")

    def _call(self, name: str, *arguments: Any) -> Any:
        return self._tvm.get_global_func(f"vm.builtin.{name}")(self._cache, *arguments)

    def _shape(self, *sizes: int) -> Any:
        return self._tvm.runtime.ShapeTuple(list(sizes))

    def _tensor(self, array: Any) -> Any:
        return self._tvm.runtime.tensor(np.ascontiguousarray(array), self._device)
