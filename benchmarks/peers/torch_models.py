"""transformers in PyTorch: eager, as its users run it, and through torch.compile.

torch.compile is given what makes it fastest here: static shapes, a `StaticCache` of the run's capacity, and inductor's
freezing, which packs the weights for MKL. Both of its graphs, prefill and decode, are compiled before a case begins.
"""

from __future__ import annotations

import time
from importlib.metadata import version
from typing import Any

from gpt2_tvm.measure.cases import Case, Sample

from .setup import CaseSubject, Setup


class EagerSubject(CaseSubject):
    """transformers, float32: its default attention (scaled_dot_product_attention), its own growing KV cache, logits for
    the last position alone."""

    def __init__(self, setup: Setup, path: str) -> None:
        import torch
        import transformers

        super().__init__(setup)
        self._torch = torch
        torch.set_num_threads(setup.threads)
        transformers.utils.logging.disable_progress_bar()
        transformers.utils.logging.set_verbosity_error()
        self._model = transformers.GPT2LMHeadModel.from_pretrained(path).float().eval()
        self._call: Any = self._model
        self.facts["versions"] = {p: version(p) for p in ("torch", "transformers")}
        self.facts["settings"] = f"attention {self._model.config._attn_implementation}, cache grows"

    def _cache(self) -> Any:
        """An empty cache, or None for the model's own."""
        return None

    def run(self, case: Case) -> Sample:
        ids = self._torch.from_numpy(self.setup.ids(case))
        with self._torch.no_grad():  # freezing does not take inference_mode's tensors
            self._step(ids[:, :1], self._cache())[0].tolist()  # untimed: wakes the threads
            cache = self._cache()
            start = time.perf_counter()
            token, cache = self._step(ids, cache)
            token.tolist()
            middle = time.perf_counter()
            steps = []
            for _ in range(case.generate_tokens):
                steps.append(token)
                token, cache = self._step(token, cache)
            token.tolist()
            end = time.perf_counter()
        tokens = self._torch.cat(steps, dim=1).tolist()
        return Sample(middle - start, end - middle, tuple(tuple(row) for row in tokens))

    def _step(self, ids: Any, cache: Any) -> tuple[Any, Any]:
        """ids [batch, n] appended to the cache -> (most likely next [batch, 1], cache)."""
        out = self._call(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1].argmax(-1, keepdim=True), out.past_key_values


class CompiledSubject(EagerSubject):
    """The same through torch.compile."""

    def __init__(self, setup: Setup, path: str) -> None:
        super().__init__(setup, path)
        import torch._inductor.config as inductor

        inductor.freezing = True
        self._static: Any = None
        self.facts["settings"] = f"static cache for {setup.capacity} tokens, frozen weights"

    def _cache(self) -> Any:
        self._static.reset()
        return self._static

    def begin(self, case: Case) -> None:
        """Compile for this batch size; what was compiled for another goes, with its copy of the weights."""
        import transformers

        torch, config = self._torch, self._model.config
        torch._dynamo.reset()
        self._call = torch.compile(self._model, dynamic=False)
        self._static = transformers.StaticCache(config=config, max_cache_len=self.setup.capacity)
        heads, size = config.n_head, config.n_embd // config.n_head
        self._static.early_initialization(case.batch, heads, size, torch.float32, torch.device("cpu"))
        self.run(Case(case.batch, case.prompt_tokens, 2))
