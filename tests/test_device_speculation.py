"""Rounds of speculation that stay on the device: what the kernels decide, that the text is greedy's, and that the host
is asked once a round. On this CPU, through the TIR that GPUs have; theirs is in test_device_speculation_gpus.py."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tvm
from device_pairs import (
    WEBGPU,
    counting,
    decoding,
    greedy,
    make_models,
    opened,
    pair,
    prompts,
    read_backs,
)
from wgsl_harness import run

from gpt2_tvm import Engine, UserError, compile_model
from gpt2_tvm.decoding import rejection
from gpt2_tvm.decoding.device_rounds import usable
from gpt2_tvm.decoding.device_speculative import DeviceSpeculative
from gpt2_tvm.decoding.draft import ModelDraft
from gpt2_tvm.decoding.registry import make_strategy
from gpt2_tvm.decoding.rejection import accept_greedy, near_tie
from gpt2_tvm.decoding.sampling import Sampling
from gpt2_tvm.decoding.speculative import Speculative
from gpt2_tvm.decoding.strategy import Decoding
from gpt2_tvm.kernels.accept_draft import TOLD, accept_draft, cpu_near_ties, gpu_near_ties

# ---- kernels


def on_cpu(func: Any, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
    built = tvm.compile(tvm.IRModule({"main": func.with_attr("global_symbol", "main")}), "llvm")
    tensors = [tvm.runtime.tensor(array) for array in arrays]
    built["main"](*tensors)
    return [tensor.numpy() for tensor in tensors]


def accepted(best: np.ndarray, lengths: np.ndarray, positions: np.ndarray, history: np.ndarray) -> list[np.ndarray]:
    """`accept_draft` by the host's own rule: told, token, positions, history."""
    batch, rows = best.shape
    told, token = np.zeros((batch, rows + TOLD), np.int32), np.zeros((batch, 1), np.int32)
    positions, history = positions.copy(), history.copy()
    for b in range(batch):
        if lengths[b]:
            at = positions[b]
            drafted = history[b, at + 1 : at + lengths[b]].tolist()
            stand = accept_greedy(best[b].tolist(), drafted)
            said = int(best[b, stand])
            token[b, 0] = said if said >= 0 else -1 - said
            told[b, :TOLD] = stand + 1, said < 0
            told[b, TOLD : TOLD + stand + 1] = [*drafted[:stand], token[b, 0]]
            positions[b] = at + stand + 1
            if positions[b] < history.shape[1]:
                history[b, positions[b]] = token[b, 0]
    return [told, token, positions, history]


@pytest.mark.parametrize("where", ["cpu", "webgpu"])
def test_what_stands_is_what_the_host_would_take(where: str) -> None:
    rng, batch, rows, capacity = np.random.default_rng(1), 512, 5, 12
    history = rng.integers(0, 2, (batch, capacity)).astype(np.int32)  # two tokens only: drafts agree often
    best = rng.integers(0, 2, (batch, rows)).astype(np.int32)
    best = np.where(rng.random(best.shape) < 0.2, -1 - best, best).astype(np.int32)
    lengths = rng.integers(0, rows + 1, batch).astype(np.int32)
    positions = np.minimum(rng.integers(0, capacity, batch), capacity - np.maximum(lengths, 1)).astype(np.int32)
    token, drafting = np.zeros((batch, 1), np.int32), np.full(batch, 99, np.int32)
    arrays = [best, lengths, token, positions, drafting, history, np.full((batch, rows + TOLD), 77, np.int32)]
    func = accept_draft(batch, rows, capacity, where != "cpu")
    _, _, new_token, new_positions, new_drafting, new_history, told = (run if where != "cpu" else on_cpu)(func, arrays)
    wanted = accepted(best, lengths, positions, history)
    for ours, theirs in zip((told, new_token, new_positions, new_history), wanted, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(new_drafting, new_positions)
    assert {*range(6)} == set(told[:, 0].tolist()) and told[:, 1].any()


@pytest.mark.parametrize("where", ["cpu", "webgpu"])
@pytest.mark.parametrize("vocab", [11, 300, 2048])
def test_near_ties_are_the_hosts(where: str, vocab: int) -> None:
    rng = np.random.default_rng(vocab)
    logits = rng.normal(0, 3, (6, vocab)).astype(np.float32)
    logits[1, [2, 9]] = logits[1].max() + 1
    logits[2, vocab - 1] = logits[2].max() * (1 - 1e-5)
    logits[3, 0] = -1e6  # a large magnitude widens what is near
    logits[4] -= 50  # all negative
    logits[5, 5] = logits[5].max() * (1 - 1e-4)
    best = logits.argmax(-1).astype(np.int32)
    ties = np.array([near_tie(row[None], rejection.TIE) is not None for row in logits])
    assert ties.tolist()[:4] == [False, True, True, True] and not ties[5]
    if where == "cpu":
        func, shape = cpu_near_ties(2, 3, vocab, rejection.TIE), (2, 3)
        marked = on_cpu(func, [logits.reshape(*shape, vocab), best.reshape(shape)])[1].reshape(-1)
    else:
        marked = run(gpu_near_ties(6, vocab, rejection.TIE, WEBGPU), [logits, best])[1]
    np.testing.assert_array_equal(marked, np.where(ties, -1 - best, best))


# ---- a pair on this CPU, compiled as for a GPU


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def engines(models: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Engine, Engine]:
    return opened(pair(models, tmp_path_factory.mktemp("cpu")))


@pytest.mark.parametrize("m", [*range(1, 9), "adaptive"])
@pytest.mark.parametrize("batch", [1, 3])
def test_the_text_is_greedys(engines: tuple[Engine, Engine], m: object, batch: int) -> None:
    for seed in range(4):
        given = prompts(batch, 10 * seed + batch)
        made = decoding(engines, given, 30, m)
        assert made.run() == greedy(engines, given, 30)
        assert m == "adaptive" or all(0 < row.accepted <= row.examined <= row.drafted for row in made.rows)


def test_each_sequence_has_its_own_acceptance(engines: tuple[Engine, Engine]) -> None:
    given = prompts(3, 13)
    made = decoding(engines, given, 30, 4)
    made.run()
    alone = [decoding(engines, [prompt], 30, 4) for prompt in given]
    for one in alone:
        one.run()
    counted = [(row.steps, row.drafted, row.examined, row.accepted) for row in made.rows]
    assert counted == [(r.steps, r.drafted, r.examined, r.accepted) for one in alone for r in one.rows]
    assert len({row.accepted / row.examined for row in made.rows}) > 1


def test_a_full_context_and_an_end_of_text_end_it_alike(engines: tuple[Engine, Engine]) -> None:
    given = [[1] * 60, prompts(1, 8)[0], [2] * 63]
    expected = greedy(engines, given, 100)
    for m in (1, 3, 7):
        made = decoding(engines, given, 100, m)
        assert made.run() == expected
        assert [row.finish for row in made.rows] == ["context"] * 3
        eos = expected[1][4]
        cut = [tokens[: tokens.index(eos)] if eos in tokens else tokens for tokens in expected]
        ended = decoding(engines, given, 100, m, eos)
        assert ended.run() == cut and ended.rows[1].finish == "eos"


def test_a_draft_that_fell_behind_catches_up(engines: tuple[Engine, Engine]) -> None:
    """Rounds without drafts in between, of all sequences or of some: nothing stands less often for it."""
    given = prompts(3, 21, longest=8)
    expected = greedy(engines, given, 40)
    made = decoding(engines, given, 40, 3)
    rng = np.random.default_rng(4)
    made.strategy.length.choose = lambda b, costs, behind=0: int(rng.integers(0, 4)) * int(rng.integers(0, 2))
    assert made.run() == expected
    steady = decoding(engines, given, 40, 3)
    steady.run()
    rates = [sum(r.accepted for r in d.rows) / sum(r.examined for r in d.rows) for d in (made, steady)]
    assert rates[0] == pytest.approx(rates[1], abs=0.12)


@pytest.mark.heavy
def test_a_near_tie_is_left_to_decode(models: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rejection, "TIE", 0.1)  # so wide that ties come often
        wide = opened(pair(models, tmp_path, widths=(4,)))
    for batch in (1, 3):
        given, calls = prompts(batch, 12), 0
        expected = greedy(wide, given, 30)
        decode = wide[0].decode

        def counted(ids: Any, decode: Callable[[Any], Any] = decode) -> Any:
            nonlocal calls
            calls += 1
            return decode(ids)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(wide[0], "decode", counted)
            made = decoding(wide, given, 30, 3)
            assert made.run() == expected
        assert calls > 2 and sum(row.accepted for row in made.rows) > 0


@pytest.mark.parametrize("m", [1, 3, 7, 9, "adaptive"])
@pytest.mark.parametrize("batch", [1, 3])
def test_what_the_host_drafts_is_checked_on_the_device(engines: tuple[Engine, Engine], m: object, batch: int) -> None:
    """Lookup: as many read-backs as steps; a draft that is wider than any check goes through verify, in pieces."""
    given, accepted = [*prompts(batch - 1, 17), [1, 2, 3, 4] * 5], 0
    expected = greedy(engines, given, 60)
    made = Decoding(make_strategy("lookup", engines[0], length=str(m)), given, 60)
    patch, counted = read_backs(engines)
    steps = iter(made)
    next(steps)
    patch.setattr(engines[0], "decode", counting(engines[0].decode, "decode", counted))
    patch.setattr(engines[0], "verify", counting(engines[0].verify, "verify", counted))
    before, taken = counted["target"], sum(1 for _ in steps)
    patch.undo()
    accepted = sum(row.accepted for row in made.rows)
    assert [row.tokens for row in made.rows] == expected and (accepted > 0 or m == "adaptive")
    assert (counted["verify"] > 0) == (m == 9)
    ties = max(row.steps for row in made.rows) - taken
    assert m == 9 or taken <= counted["target"] - before <= taken + max(0, ties) + 2


@pytest.mark.parametrize("m", [1, 5])
@pytest.mark.parametrize("batch", [1, 3])
def test_one_read_back_a_round(engines: tuple[Engine, Engine], m: int, batch: int) -> None:
    made = decoding(engines, prompts(batch, 31, longest=8), 30, m)
    steps = iter(made)
    next(steps)
    before = made.strategy.rounds.read_backs
    patch, counted = read_backs(engines)
    patch.setattr(engines[0], "decode", counting(engines[0].decode, "decode", counted))
    taken = sum(1 for _ in steps)
    patch.undo()
    rounds = made.strategy.rounds.read_backs - before
    assert counted["draft"] == 0
    # decode steps are for a last token, and for near ties
    assert counted["target"] == rounds + counted["decode"]
    assert taken - 1 <= rounds <= taken and counted["decode"] <= taken - rounds + 2


def test_which_pairs_can(engines: tuple[Engine, Engine], models: tuple[Path, Path], tmp_path: Path) -> None:
    target, draft = engines
    assert usable(target, draft)
    options: dict[str, Any] = {"rules": "baseline", "batch_sizes": (1, 4)}
    plain = Engine(compile_model(str(models[0]), "cpu", output=tmp_path / "a", verify_widths=(2,), **options))
    assert not usable(plain, draft)
    assert type(make_strategy("speculative", plain, draft=draft, length="3")) is Speculative
    short = Engine(
        compile_model(str(models[1]), "cpu", output=tmp_path / "b", verify_widths=(), max_seq_len=32, **options)
    )
    assert not usable(target, short)
    cut = make_strategy("speculative", target, draft=draft, length="3", sampling=Sampling(1.0, top_k=4))
    assert type(cut) is Speculative and isinstance(cut.draft, ModelDraft)
    with pytest.raises(UserError, match="whole vocabulary"):
        DeviceSpeculative(target, draft, cut.length, Sampling(1.0, top_k=4))
