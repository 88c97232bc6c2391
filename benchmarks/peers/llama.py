"""llama.cpp through llama-cpp-python's low-level interface: batches of tokens with a sequence each, one context a case.

A llama.cpp user chooses flash attention or not, and on CPUs neither wins everywhere: both are tried on one sequence
when the model is loaded, and the faster stays. Sequences have a cache each (`kv_unified` off), logits are asked for the
last token of a prompt alone, and micro-batches keep llama.cpp's default of 512 tokens.
"""

from __future__ import annotations

import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from gpt2_tvm.errors import UserError
from gpt2_tvm.measure.cases import Case, Sample

from .setup import CaseSubject, Setup, require_plain

TRIAL_STEPS = 16  # decode steps of the trial that chooses flash attention
TRIALS = 3
ERROR_LEVEL = 4  # GGML_LOG_LEVEL_ERROR


def write_model(setup: Setup, folder: Path, kind: str) -> str:
    """The checkpoint as a GGUF file of that kind (`gguf_file.KINDS`) -> its path."""
    from gpt2_tvm.checkpoint import resolve_model
    from gpt2_tvm.weights import iter_weights

    from .gguf_file import write_gguf

    source = resolve_model(str(setup.checkpoint))
    require_plain(source.config, "llama.cpp")
    return str(write_gguf(folder / f"{kind}.gguf", source.config, iter_weights(source, "float32"), kind))


class Batch:
    """A `llama_batch` in which token t of sequence s stands at place s * tokens + t.

    `token` and `pos` are int32 views [sequences, tokens] of its memory; logits are asked for the last token of each.
    """

    def __init__(self, lib: Any, sequences: int, tokens: int) -> None:
        self._lib, count = lib, sequences * tokens
        self.raw = lib.llama_batch_init(count, 0, 1)
        self.raw.n_tokens = count
        as_array = np.ctypeslib.as_array
        self.token = as_array(self.raw.token, (count,)).reshape(sequences, tokens)
        self.pos = as_array(self.raw.pos, (count,)).reshape(sequences, tokens)
        self.pos[:] = np.arange(tokens)
        as_array(self.raw.n_seq_id, (count,))[:] = 1
        as_array(self.raw.logits, (count,)).reshape(sequences, tokens)[:] = np.arange(tokens) == tokens - 1
        for place in range(count):
            self.raw.seq_id[place][0] = place // tokens

    def close(self) -> None:
        """Free its memory; the views are dead then."""
        self._lib.llama_batch_free(self.raw)


class LlamaSubject(CaseSubject):
    """A GGUF file in llama.cpp. cache: "float16", its default, or "float32"."""

    def __init__(self, setup: Setup, path: str, cache: str) -> None:
        import llama_cpp

        super().__init__(setup)
        self._lib: Any = llama_cpp
        self._log = llama_cpp.llama_log_callback(_print_errors)  # kept: C holds the pointer only
        llama_cpp.llama_log_set(self._log, None)
        params = llama_cpp.llama_model_default_params()
        params.n_gpu_layers = 0
        self._model = llama_cpp.llama_model_load_from_file(path.encode(), params)
        if not self._model:
            raise UserError(f"llama.cpp does not load {path}; its message is above")
        self._vocab_size = setup.config().vocab_size
        self._cache = {"float16": llama_cpp.GGML_TYPE_F16, "float32": llama_cpp.GGML_TYPE_F32}[cache]
        self._context: Any = None
        self._batches: list[Batch] = []
        self._flash = self._choose_flash()
        self.facts["versions"] = {"llama-cpp-python": version("llama-cpp-python")}
        self.facts["settings"] = f"{cache} KV cache, flash attention {'on' if self._flash else 'off'}"

    def begin(self, case: Case) -> None:
        """A context for this case."""
        self._open(case, self._flash)

    def _choose_flash(self) -> bool:
        case = Case(1, len(self.setup.prompt), min(TRIAL_STEPS, self.setup.capacity - len(self.setup.prompt)))
        best = {}
        for flash in (False, True):
            self._open(case, flash)
            times = [self.run(case) for _ in range(TRIALS)]
            best[flash] = min(t.prefill_s for t in times) + min(t.decode_s for t in times)
        self._close()
        return best[True] < best[False]

    def _open(self, case: Case, flash: bool) -> None:
        self._close()
        lib, p = self._lib, self._lib.llama_context_default_params()
        tokens = case.prompt_tokens + case.generate_tokens
        p.n_ctx = case.batch * (-(-tokens // 256) * 256)  # llama.cpp rounds each sequence up to 256
        p.n_batch = max(case.batch * case.prompt_tokens, p.n_ubatch)
        p.n_seq_max = case.batch
        p.n_outputs_max = case.batch
        p.n_threads = p.n_threads_batch = self.setup.threads
        p.type_k = p.type_v = self._cache
        p.flash_attn_type = lib.LLAMA_FLASH_ATTN_TYPE_ENABLED if flash else lib.LLAMA_FLASH_ATTN_TYPE_DISABLED
        p.kv_unified = False
        p.no_perf = True
        self._context = lib.llama_init_from_model(self._model, p)
        if not self._context:
            raise UserError("llama.cpp makes no context for this case; is there enough memory for its cache?")
        self._batches = [Batch(lib, case.batch, n) for n in (case.prompt_tokens, 1)]

    def _close(self) -> None:
        for batch in self._batches:
            batch.close()
        if self._context:
            self._lib.llama_free(self._context)
        self._batches, self._context = [], None

    def run(self, case: Case) -> Sample:
        prompt, step = self._batches
        prompt.token[:] = self.setup.ids(case)
        tokens = np.empty((case.batch, case.generate_tokens), np.int32)
        step.token[:], step.pos[:] = prompt.token[:, :1], 0
        self._clear()
        self._decode(step)  # untimed: wakes the threads
        self._clear()
        start = time.perf_counter()
        token = self._decode(prompt)
        middle = time.perf_counter()
        for i in range(case.generate_tokens):
            tokens[:, i] = token
            step.token[:, 0] = token
            step.pos[:] = case.prompt_tokens + i
            token = self._decode(step)
        end = time.perf_counter()
        return Sample(middle - start, end - middle, tuple(tuple(row) for row in tokens.tolist()))

    def _clear(self) -> None:
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), False)

    def _decode(self, batch: Batch) -> np.ndarray:
        """Run a batch -> the most likely next id of each sequence, int64 [batch]."""
        status = self._lib.llama_decode(self._context, batch.raw)
        if status != 0:
            raise UserError(f"llama.cpp refuses a batch (llama_decode gives {status})")
        logits = self._lib.llama_get_logits(self._context)
        return np.ctypeslib.as_array(logits, (len(batch.token), self._vocab_size)).argmax(-1)


def _print_errors(level: int, text: bytes, _: Any) -> None:
    if level == ERROR_LEVEL:
        print(text.decode(errors="replace"), end="", flush=True)
