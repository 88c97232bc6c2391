"""CTranslate2: the checkpoint through its own converter, greedy generation of a fixed length.

Prefill ends when the callback of the first token comes, decode when the last token is there: one `generate_batch` gives
both. It is asked for one token more than the others decode, since its first token comes out of the prefill.
"""

from __future__ import annotations

import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from gpt2_tvm.errors import UserError
from gpt2_tvm.measure.cases import Case, Sample

from .setup import CaseSubject, Setup, require_plain


def convert(setup: Setup, folder: Path, quantization: str) -> str:
    """A CTranslate2 model of the checkpoint, "float32" or "int8" -> its folder.

    Its vocabulary is the ids themselves, written out: a checkpoint need not bring a tokenizer.
    """
    import transformers
    from ctranslate2.converters import TransformersConverter

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    config = setup.config()
    require_plain(config, "CTranslate2")

    class Ids:
        """Stands for a tokenizer."""

        bos_token = eos_token = unk_token = "0"

        def get_vocab(self) -> dict[str, int]:
            return {str(i): i for i in range(config.vocab_size)}

    class Converter(TransformersConverter):  # type: ignore[misc]
        def load_tokenizer(self, *_: Any, **__: Any) -> Ids:
            return Ids()

    made = folder / f"ct2-{quantization}"
    converter = Converter(str(setup.checkpoint))
    converter.convert(str(made), quantization=None if quantization == "float32" else quantization, force=True)
    return str(made)


class Ct2Subject(CaseSubject):
    """A converted model in CTranslate2. compute: its compute_type."""

    def __init__(self, setup: Setup, path: str, compute: str) -> None:
        import ctranslate2

        super().__init__(setup)
        self._generator = ctranslate2.Generator(
            path, device="cpu", compute_type=compute, inter_threads=1, intra_threads=setup.threads
        )
        self.facts["versions"] = {"ctranslate2": version("ctranslate2")}
        self.facts["settings"] = f"computes in {self._generator.compute_type}, cache grows"

    def run(self, case: Case) -> Sample:
        prompts = [[str(i) for i in row] for row in self.setup.ids(case).tolist()]
        self._generate([row[:1] for row in prompts], 1)  # untimed: wakes the threads
        first: list[float] = []

        def note(_: Any) -> bool:
            if not first:
                first.append(time.perf_counter())
            return False  # go on

        start = time.perf_counter()
        results = self._generate(prompts, case.generate_tokens + 1, note)
        end = time.perf_counter()
        rows = tuple(tuple(result.sequences_ids[0]) for result in results)
        if any(len(row) != case.generate_tokens + 1 for row in rows):
            raise UserError("CTranslate2 ended a sequence before it was asked to")
        return Sample(first[0] - start, end - first[0], tuple(row[:-1] for row in rows))

    def _generate(self, prompts: list[list[str]], tokens: int, callback: Any = None) -> list[Any]:
        return self._generator.generate_batch(
            prompts,
            max_length=tokens,
            end_token=[],  # none: every sequence has its full length
            include_prompt_in_result=False,  # the prompt goes through the model at once
            callback=callback,
        )
