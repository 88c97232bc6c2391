"""The bundled model and its draft: 200 prompts, every strategy, every draft length; and that the pair is a good one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from gpt2_tvm import Engine, compile_model
from gpt2_tvm.checkpoint import resolve_model
from gpt2_tvm.data import bundled_draft, bundled_model, prompt_text
from gpt2_tvm.decoding.draft import check_pair
from gpt2_tvm.decoding.early import truncate
from gpt2_tvm.decoding.registry import make_strategy
from gpt2_tvm.decoding.strategy import Decoding
from gpt2_tvm.streams import StreamConfig, base_digests, tensor_shapes, write_streams
from gpt2_tvm.theory.speculation import expected_tokens
from gpt2_tvm.tokenizer import load_tokenizer

PROMPTS, TOKENS = 200, 24
ALONE = 40  # of them one by one, the others four at a time
MOST_BYTES = 3_000_000


def address(count: int, most: int = 60) -> list[list[int]]:
    """Pieces of the benchmark's address, which no Austen novel holds, of 4 to `most` tokens."""
    ids, rng = load_tokenizer(bundled_model()).encode(prompt_text()), np.random.default_rng(0)
    starts = rng.integers(0, len(ids) - most, count)
    return [ids[a : a + int(n)] for a, n in zip(starts, rng.integers(4, most, count), strict=True)]


def test_the_draft_is_small_and_drafts_well(tmp_path: Path, bundled_artifact: Path) -> None:
    """On an address that neither has seen, half of its tokens stand at least: more than an undistilled draft's."""
    assert sum(file.stat().st_size for file in bundled_draft().iterdir()) < MOST_BYTES
    assert (
        resolve_model("bundled-draft").config.num_parameters() < 0.2 * resolve_model("bundled").config.num_parameters()
    )
    target = Engine(bundled_artifact)
    draft = Engine(compile_model("bundled-draft", output=tmp_path / "draft", verify_widths=(2,)))
    check_pair(target.artifact, draft.artifact)
    accepted = examined = passes = made = 0
    for prompt in address(8):
        expected = Decoding(make_strategy("greedy", target), [prompt], 48).run()
        decoding = Decoding(make_strategy("speculative", target, draft, "5"), [prompt], 48)
        assert decoding.run() == expected
        row = decoding.rows[0]
        accepted, examined = accepted + row.accepted, examined + row.examined
        passes, made = passes + row.steps, made + len(row.tokens) - 1
    assert accepted / examined > 0.6
    # acceptance is not independent from token to token, but the theory's tokens a step are near
    assert made / passes == pytest.approx(expected_tokens(accepted / examined, 5), rel=0.15)


@pytest.mark.heavy
def test_200_prompts_give_the_greedy_text_by_every_strategy(tmp_path: Path) -> None:
    """Every length has its turn with every strategy; all eight with some of the prompts."""
    source = resolve_model("bundled")
    model = truncate(source, 2, tmp_path / "first2")
    config, rng = StreamConfig(7, 2, 8, base_digests(source)), np.random.default_rng(0)
    write_streams(
        tmp_path / "streams",
        config,
        {n: rng.normal(0, 0.02, s) for n, s in tensor_shapes(config, source.config).items()},
    )
    sizes, widths = (1, 4), (2, 4, 8)
    target = Engine(
        compile_model(
            "bundled",
            output=tmp_path / "a",
            batch_sizes=sizes,
            verify_widths=widths,
            streams=tmp_path / "streams",
            stream_rows="8,6",
        )
    )
    first = Engine(compile_model(str(model), output=tmp_path / "b", batch_sizes=sizes, verify_widths=(2,)))
    draft = Engine(compile_model("bundled-draft", output=tmp_path / "c", batch_sizes=sizes, verify_widths=(2,)))
    eos = load_tokenizer(bundled_model()).eos_id
    prompts, accepted = address(PROMPTS), 0
    batches = [[p] for p in prompts[:ALONE]] + [prompts[i : i + 4] for i in range(ALONE, PROMPTS, 4)]
    drafts = (("speculative", draft), ("mixed", draft), ("early", first), ("lookup", None), ("streaming", None))
    for i, batch in enumerate(batches):
        expected = Decoding(make_strategy("greedy", target), batch, TOKENS, eos).run()
        for name, mate in drafts:
            for m in range(1, 9) if i % 16 == 0 else (1 + i % 8,):
                decoding = Decoding(make_strategy(name, target, mate, str(m)), batch, TOKENS, eos)
                assert decoding.run() == expected, (name, m, i)
                accepted += sum(row.accepted for row in decoding.rows)
    assert accepted > 20 * PROMPTS  # else little was speculated at all


@pytest.mark.heavy
def test_a_prompt_that_leaves_room_for_50_tokens(tmp_path: Path, bundled_artifact: Path) -> None:
    """The seed's setting: target alone, with its draft, and with itself in int8; steps counted, the context full."""
    target = Engine(bundled_artifact)
    draft = Engine(compile_model("bundled-draft", output=tmp_path / "draft", verify_widths=(2,)))
    int8 = Engine(compile_model("bundled", quantization="q8f32", output=tmp_path / "int8", verify_widths=(2,)))
    ids = load_tokenizer(bundled_model()).encode(prompt_text())
    prompt = (ids * 3)[: target.max_seq_len - 50]
    alone = Decoding(make_strategy("greedy", target), [prompt], 64)
    expected = alone.run()
    assert (len(expected[0]), alone.rows[0].finish, alone.rows[0].steps) == (50, "context", 49)
    for mate in (draft, int8):
        decoding = Decoding(make_strategy("speculative", target, mate, "4"), [prompt], 64)
        assert decoding.run() == expected and decoding.rows[0].finish == "context"
        assert decoding.rows[0].steps < 30
