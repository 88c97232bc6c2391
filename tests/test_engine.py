"""What each method of the engine means, each against another way to the same numbers; and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reference import RULES, checkpoint, random_rows

from gpt2_tvm import Engine, UserError, compile_model
from gpt2_tvm.config import GPT2Config

CONFIG = GPT2Config(vocab_size=101, n_positions=160, n_embd=48, n_layer=2, n_head=3)
TREE = [-1, 0, 0, 1, 1, 2]  # 0 has children 1 and 2; 1 has 3 and 4; 2 has 5
CLOSE = 2e-5  # between two of our functions, as a share of the largest logit: only the order of sums differs


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("engine")
    checkpoint(folder / "model", CONFIG, spread=8.0)
    return compile_model(str(folder / "model"), "cpu", output=folder / "artifact", rules=RULES, batch_sizes=(1, 4))


@pytest.fixture(scope="module")
def loaded(artifact: Path) -> Engine:
    return Engine(artifact)


@pytest.fixture
def engine(loaded: Engine) -> Engine:
    loaded.reset()
    return loaded


def rows(*lengths: int, seed: int = 0) -> list[list[int]]:
    return random_rows(CONFIG, lengths, seed)


def row(length: int, seed: int = 0) -> list[int]:
    return rows(length, seed=seed)[0]


def fresh(engine: Engine, ids: Any) -> np.ndarray:
    """Logits after `ids` from an empty context."""
    engine.reset()
    return engine.prefill(ids)


def same(a: np.ndarray, b: np.ndarray) -> None:
    assert a.shape == b.shape and a.dtype == b.dtype == np.float32
    assert float(np.abs(b).max()) > 0.1  # else anything would be close
    np.testing.assert_allclose(a, b, rtol=0, atol=CLOSE * float(np.abs(b).max()))


# ---- input


def test_every_form_of_ids_means_the_same(engine: Engine) -> None:
    ids = row(9)
    expected = fresh(engine, ids)
    assert expected.shape == (1, CONFIG.vocab_size)
    for form in (np.array(ids), np.array([ids]), [ids], np.array(ids, np.uint16), tuple(ids)):
        np.testing.assert_array_equal(fresh(engine, form), expected)
    steps = [engine.decode(form) for form in (5, [5], [[5]], np.array([5]), np.array([[5]], np.int64))]
    assert len({s.tobytes() for s in steps}) == len(steps)  # the context grew each time
    assert engine.positions.tolist() == [14]


# ---- prefill, decode


def test_prefill_goes_on_where_the_last_call_stopped(engine: Engine) -> None:
    ids = row(40)
    expected = fresh(engine, ids)
    engine.reset()
    engine.prefill(ids[:13])
    engine.prefill(ids[13:14])
    engine.decode(ids[14])
    same(engine.prefill(ids[15:]), expected)
    assert engine.positions.tolist() == [40]


def test_decode_one_by_one_is_prefill_at_once(engine: Engine) -> None:
    ids = row(24)
    expected = fresh(engine, ids)
    engine.reset()
    engine.prefill(ids[:1])
    for token in ids[1:]:
        logits = engine.decode(token)
    same(logits, expected)


def test_a_batch_is_its_sequences_apart(engine: Engine) -> None:
    prompts = rows(3, 31, 12)  # three sequences in the variant for four
    apart, stepped = [], []
    for prompt in prompts:
        apart.append(fresh(engine, prompt)[0])
        stepped.append(engine.decode(7)[0])
    same(fresh(engine, prompts), np.stack(apart))
    assert engine.positions.tolist() == [3, 31, 12] and engine.batch == 3
    logits = engine.decode([7, 7, 7])
    assert logits.shape == (3, CONFIG.vocab_size)
    same(logits, np.stack(stepped))


def test_a_spare_slot_leaves_nothing_behind(engine: Engine) -> None:
    """Four sequences, then three in the same caches, then four again: nobody reads another's keys."""
    four, three = rows(20, 20, 20, 20, seed=1), rows(5, 6, 7, seed=2)
    expected = fresh(engine, four)
    fresh(engine, three)
    engine.decode_greedy(3)
    same(fresh(engine, four), expected)


def test_reset_allows_another_batch_size(engine: Engine) -> None:
    alone = fresh(engine, row(8))
    fresh(engine, rows(8, 8, 8))
    engine.reset()
    assert engine.positions.size == 0 and engine.batch == 0
    same(engine.prefill(row(8)), alone)


def test_what_came_back_stays_as_it_was(engine: Engine) -> None:
    first = fresh(engine, row(8))
    copy = first.copy()
    engine.decode(1)
    engine.verify([2, 3])
    np.testing.assert_array_equal(first, copy)


# ---- decode_greedy


def test_greedy_on_the_device_is_argmax_step_by_step(engine: Engine) -> None:
    prompts = rows(4, 17, 9, seed=3)
    logits = fresh(engine, prompts)
    steps = []
    for _ in range(12):
        token = logits.argmax(-1).astype(np.int32)
        steps.append(token)
        logits = engine.decode(token)
    expected, after = np.stack(steps, axis=1), logits

    fresh(engine, prompts)
    tokens = engine.decode_greedy(12)
    assert tokens.dtype == np.int32 and tokens.shape == (3, 12)
    np.testing.assert_array_equal(tokens, expected)
    assert engine.positions.tolist() == [16, 29, 21]
    # and the engine stands as if decode had been called with each of them
    engine.rewind(engine.positions - 1)
    same(engine.decode(expected[:, -1]), after)


def test_greedy_in_two_parts_is_greedy_in_one(engine: Engine) -> None:
    fresh(engine, row(6))
    whole = engine.decode_greedy(20)
    fresh(engine, row(6))
    assert engine.decode_greedy(0).shape == (1, 0)
    parts = np.concatenate([engine.decode_greedy(7), engine.decode_greedy(13)], axis=1)
    np.testing.assert_array_equal(parts, whole)
    assert len(set(whole[0].tolist())) > 1


def test_greedy_may_fill_the_context_to_the_last_token(engine: Engine) -> None:
    fresh(engine, row(CONFIG.n_positions - 5))
    assert engine.decode_greedy(4).shape == (1, 4)
    last = engine.best
    fresh(engine, row(CONFIG.n_positions - 5))
    assert engine.decode_greedy(5)[0, 4] == last
    after = engine.best  # has no slot of its own
    engine.rewind(CONFIG.n_positions - 1)
    np.testing.assert_array_equal(engine.decode(last).argmax(-1), after)
    with pytest.raises(UserError, match="context holds 160"):
        engine.decode_greedy(1)


# ---- verify, rewind, keep


def test_a_chain_is_decode_step_by_step(engine: Engine) -> None:
    prompts, chains = rows(10, 2, 25, seed=4), rows(5, 5, 5, seed=5)
    fresh(engine, prompts)
    expected = np.stack([engine.decode([c[j] for c in chains]) for j in range(5)], axis=1)
    fresh(engine, prompts)
    same(engine.verify(chains), expected)
    assert engine.positions.tolist() == [15, 7, 30]


def test_a_chain_may_be_wider_than_the_widest_variant(engine: Engine) -> None:
    ids = row(40)
    wide = engine.verify(ids)  # from an empty context
    engine.reset()
    engine.prefill(ids[:1])
    steps = [engine.decode(t) for t in ids[1:]]
    same(wide[:, 1:], np.stack(steps, axis=1))


def test_ragged_chains_end_in_zeros(engine: Engine) -> None:
    prompts, chains = rows(10, 2, seed=4), rows(2, 4, seed=5)
    fresh(engine, [prompts[0]])
    alone = engine.verify(chains[0])
    fresh(engine, prompts)
    both = engine.verify(chains)
    same(both[0, :2], alone[0])
    assert not both[0, 2:].any() and both[1].any(axis=-1).all()
    assert engine.positions.tolist() == [12, 6]


def test_rewind_takes_tokens_back(engine: Engine) -> None:
    ids, other = row(20), row(6, seed=9)
    expected = fresh(engine, ids[:11] + other)
    fresh(engine, ids)
    engine.rewind(11)
    assert engine.positions.tolist() == [11]
    same(engine.prefill(other), expected)


def test_rewind_of_each_sequence_by_itself(engine: Engine) -> None:
    prompts = rows(9, 20, seed=6)
    expected = fresh(engine, [[*prompts[0][:4], 1], [*prompts[1], 1]])
    fresh(engine, prompts)
    engine.rewind([4, 20])
    same(engine.decode([1, 1]), expected)
    engine.rewind(0)  # the batch stays; its sequences are empty
    assert engine.positions.tolist() == [0, 0]
    same(engine.prefill(prompts), fresh(engine, prompts))


@pytest.mark.parametrize("branch", [[], [0], [0, 1], [0, 2, 5], [0, 1, 4]])
def test_keep_goes_on_after_one_branch(engine: Engine, branch: list[int]) -> None:
    prompt, tokens = row(12), row(6, seed=7)
    expected = fresh(engine, [*prompt, *[tokens[j] for j in branch], 3])
    fresh(engine, prompt)
    engine.verify(tokens, TREE)
    assert engine.positions.tolist() == [12]
    engine.keep(branch)
    assert engine.positions.tolist() == [12 + len(branch)]
    same(engine.decode(3), expected)


def test_keep_another_branch_of_each_sequence(engine: Engine) -> None:
    prompts, tokens = rows(5, 30, 11, seed=8), rows(6, 6, 6, seed=9)
    trees = [TREE, [-1, -1, 1, 2, 3, 4], [-1, 0, 1, 2, 3, 4]]
    paths = [[0, 2, 5], [1, 2, 3, 4, 5], [0]]
    longer = [p + [t[j] for j in path] + [3] for p, t, path in zip(prompts, tokens, paths, strict=True)]
    expected = np.stack([fresh(engine, ids)[0] for ids in longer])
    fresh(engine, prompts)
    engine.verify(tokens, trees)
    engine.keep(paths)
    assert engine.positions.tolist() == [8, 35, 12]
    same(engine.decode([3, 3, 3]), expected)


def test_a_tree_that_is_not_kept_leaves_no_trace(engine: Engine) -> None:
    prompt = row(12)
    expected = fresh(engine, [*prompt, 3])
    fresh(engine, prompt)
    engine.verify(row(6, seed=7), TREE)
    same(engine.decode(3), expected)
    with pytest.raises(UserError, match="keep needs a tree"):
        engine.keep([0])


# ---- score


@pytest.mark.parametrize("n", [2, 30, 150])  # 150: more than one piece of rows
def test_score_is_log_softmax_at_the_next_token(engine: Engine, n: int) -> None:
    prompts = rows(n, n, n, seed=n)
    logits = engine.verify([p[:-1] for p in prompts]).astype(np.float64)
    shifted = logits - logits.max(-1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    expected = np.take_along_axis(log_p, np.array(prompts)[:, 1:, None], axis=-1)[..., 0]
    scores = engine.score(prompts)
    assert scores.shape == (3, n - 1) and scores.dtype == np.float32
    np.testing.assert_allclose(scores, expected, rtol=0, atol=2e-4)
    assert engine.batch == 0  # score ends with a reset


# ---- what is refused, in one line, and leaves the engine as it was

REFUSED: dict[str, tuple[Callable[[Engine], Any], str]] = {
    "id-too-large": (lambda e: e.prefill([1, 101]), "token id 101 is outside the vocabulary"),
    "id-negative": (lambda e: e.decode(-1), "token id -1 is outside"),
    "id-too-large-in-verify": (lambda e: e.verify([1, 999]), "token id 999"),
    "no-ids": (lambda e: e.prefill([]), "empty"),
    "one-row-empty": (lambda e: e.prefill([[]]), "prompt of sequence 0 is empty"),
    "floats": (lambda e: e.prefill(np.ones(3)), "must be integers"),
    "text": (lambda e: e.prefill(["a"]), "must be integers"),
    "too-long": (lambda e: e.prefill(row(151)), "would be 161 tokens long, the context holds 160"),
    "verify-too-long": (lambda e: e.verify(row(151)), "context holds 160"),
    "greedy-too-long": (lambda e: e.decode_greedy(151), "context holds 160"),
    "other-batch": (lambda e: e.prefill(rows(2, 2)), "reset()"),
    "two-tokens": (lambda e: e.decode([[1, 2]]), "decode takes 1 token"),
    "rewind-forward": (lambda e: e.rewind(11), "outside what is cached"),
    "rewind-below-zero": (lambda e: e.rewind(-1), "outside what is cached"),
    "keep-without-tree": (lambda e: e.keep([0]), "keep needs a tree"),
    "tree-too-wide": (lambda e: e.verify(row(9), [-1] * 9), "--verify-widths 9"),
    "parents-too-few": (lambda e: e.verify([1, 2, 3], [-1, 0]), "parents"),
    "parent-after-child": (lambda e: e.verify([1, 2], [1, -1]), "must stand before"),
    "parent-below-minus-1": (lambda e: e.verify([1, 2], [-1, -2]), "must stand before"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refusals(engine: Engine, what: str) -> None:
    call, words = REFUSED[what]
    engine.prefill(row(10))
    with pytest.raises(UserError) as caught:
        call(engine)
    assert words in str(caught.value) and "\n" not in str(caught.value)
    assert engine.positions.tolist() == [10]
    ours = engine.decode(3)
    same(ours, fresh(engine, [*row(10), 3]))


def test_keep_refuses_what_is_no_branch(engine: Engine) -> None:
    for path in ([1], [0, 5], [0, 1, 3, 0], [6], [-1]):
        fresh(engine, row(4))
        engine.verify(row(6, seed=1), TREE)
        with pytest.raises(UserError, match="keep: "):
            engine.keep(path)
    with pytest.raises(UserError, match="2 paths for 1 sequences"):
        engine.keep([[0], [0]])
    engine.keep([0, 1])  # a refusal does not spoil the tree
    assert engine.positions.tolist() == [6]


def test_calls_that_need_a_context(engine: Engine) -> None:
    with pytest.raises(UserError, match="call prefill first"):
        engine.decode(1)
    with pytest.raises(UserError, match="call prefill or decode first"):
        engine.decode_greedy(1)
    engine.verify([1, 2])
    with pytest.raises(UserError, match="call prefill or decode first"):
        engine.decode_greedy(1)


def test_a_batch_larger_than_compiled(engine: Engine) -> None:
    with pytest.raises(UserError, match=r"compiled for up to 4; compile with --batch-sizes 1,4,5"):
        engine.prefill(rows(2, 2, 2, 2, 2))
    assert engine.batch == 0


def test_score_refuses_ragged_and_single_tokens(engine: Engine) -> None:
    for ids in (rows(4, 5), [3]):
        with pytest.raises(UserError, match="one length, at least 2"):
            engine.score(ids)


def test_a_device_of_another_kind(artifact: Path) -> None:
    with pytest.raises(UserError, match="compiled for cpu, not for cuda:0; compile it with --target cuda"):
        Engine(artifact, "cuda:0")


def test_an_artifact_without_verify(artifact: Path, tmp_path: Path) -> None:
    model = artifact.parent / "model"
    engine = Engine(compile_model(str(model), "cpu", output=tmp_path / "a", rules=RULES, verify_widths=()))
    with pytest.raises(UserError, match="compiled without verify"):
        engine.verify([1, 2])


@pytest.mark.heavy
def test_ten_thousand_decode_calls_do_not_grow_memory(engine: Engine) -> None:
    import psutil

    process = psutil.Process()
    engine.prefill(row(10))

    def steps(n: int) -> int:
        for _ in range(n // 100):
            for _ in range(100):
                engine.decode(5)
            engine.rewind(10)
        return int(process.memory_info().rss)

    before = steps(2_000)
    after = steps(10_000)
    assert after - before < 2 << 20, f"grew by {(after - before) / 1e6:.1f} MB"
