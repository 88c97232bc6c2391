"""The bundled trained model on held-out style prompts: 200 of them, every strategy, every draft length."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from gpt2_tvm import Engine, compile_model
from gpt2_tvm.checkpoint import resolve_model
from gpt2_tvm.data import bundled_model, prompt_text
from gpt2_tvm.decoding.early import truncate
from gpt2_tvm.decoding.registry import make_strategy
from gpt2_tvm.decoding.strategy import Decoding
from gpt2_tvm.tokenizer import load_tokenizer

PROMPTS, TOKENS = 200, 32


@pytest.mark.heavy
def test_200_prompts_give_the_greedy_text_by_every_strategy(tmp_path: Path) -> None:
    """Prompts are pieces of the benchmark's address, which no Austen novel holds, and text that the model wrote."""
    model = truncate(resolve_model("bundled"), 2, tmp_path / "first2")
    sizes, widths = (1, 4), (2, 4, 8)
    target = Engine(compile_model("bundled", output=tmp_path / "a", batch_sizes=sizes, verify_widths=widths))
    first = Engine(compile_model(str(model), output=tmp_path / "b", batch_sizes=sizes, verify_widths=(2,)))
    tokenizer = load_tokenizer(bundled_model())
    ids, rng = tokenizer.encode(prompt_text()), np.random.default_rng(0)
    starts = rng.integers(0, len(ids) - 60, PROMPTS)
    prompts = [ids[a : a + int(n)] for a, n in zip(starts, rng.integers(4, 60, PROMPTS), strict=True)]
    accepted = 0
    for i, prompt in enumerate(prompts):
        batch = [prompt, *prompts[i - 2 : i]] if i % 4 == 3 else [prompt]
        expected = Decoding(make_strategy("greedy", target), batch, TOKENS, tokenizer.eos_id).run()
        for name, draft in (("speculative", first), ("early", first), ("lookup", None)):
            # every length has its turn with every strategy; all eight with some of the prompts
            for m in range(1, 9) if i % 20 == 0 else (1 + i % 8,):
                decoding = Decoding(make_strategy(name, target, draft, str(m)), batch, TOKENS, tokenizer.eos_id)
                assert decoding.run() == expected, (name, m, i)
                accepted += sum(row.accepted for row in decoding.rows)
    assert accepted > PROMPTS  # else nothing was speculated at all
