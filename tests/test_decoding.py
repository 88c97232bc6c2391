"""Every strategy writes what greedy writes, or draws from what `sample` draws from; and the edges of a context."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from reference import checkpoint

from gpt2_tvm import Engine, UserError, compile_model
from gpt2_tvm.checkpoint import ModelSource
from gpt2_tvm.config import GPT2Config
from gpt2_tvm.decoding.costs import Costs, at_rows
from gpt2_tvm.decoding.draft import Draft, ModelDraft, Proposal, check_pair
from gpt2_tvm.decoding.early import is_early, truncate
from gpt2_tvm.decoding.lengths import Adaptive, DraftLength, draft_length
from gpt2_tvm.decoding.lookup import Index
from gpt2_tvm.decoding.planted import Plan
from gpt2_tvm.decoding.registry import NAMES, make_strategy
from gpt2_tvm.decoding.sampling import Sampling
from gpt2_tvm.decoding.single import StrategyGeneration
from gpt2_tvm.decoding.speculative import Speculative
from gpt2_tvm.decoding.strategy import Decoding, TextRow
from gpt2_tvm.theory.speculation import expected_tokens

CONFIG = GPT2Config(vocab_size=11, n_positions=64, n_embd=32, n_layer=3, n_head=2, bos_token_id=None, eos_token_id=None)
SPREAD = 6.0  # of the weights: text that varies, and drafts that agree now and then
CHI2_99_120 = 158.95  # the 0.99 quantile of chi-square with 11^2 - 1 degrees of freedom


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    folder = tmp_path_factory.mktemp("target")
    model = checkpoint(folder / "model", CONFIG, spread=SPREAD)
    made = compile_model(str(model), "cpu", output=folder / "artifact", batch_sizes=(1, 4, 64), verify_widths=(4, 8))
    return Engine(made)


@pytest.fixture(scope="module")
def first(target: Engine, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """The first layers of `target`, with a context that is half as long."""
    folder = tmp_path_factory.mktemp("first")
    source = ModelSource("target", CONFIG, folder=target.artifact.path.parent / "model")
    model = truncate(source, 2, folder / "model")
    made = compile_model(str(model), "cpu", output=folder / "artifact", batch_sizes=(1, 4, 64), verify_widths=(2,))
    return Engine(made)


def prompts(count: int, seed: int = 0, longest: int = 30) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, CONFIG.vocab_size, int(rng.integers(1, longest))).tolist() for _ in range(count)]


def text(engine: Engine, name: str, given: Sequence[Sequence[int]], n: int = 24, **options: object) -> list[list[int]]:
    eos = options.pop("eos", None)
    return Decoding(make_strategy(name, engine, **options), given, n, eos).run()  # type: ignore[arg-type]


@pytest.mark.parametrize("m", [*range(1, 9), "adaptive"])
@pytest.mark.parametrize("batch", [1, 3])
def test_every_strategy_writes_greedys_text(target: Engine, first: Engine, m: int | str, batch: int) -> None:
    for i in range(4 if batch == 1 else 2):
        given = prompts(batch, seed=10 * i + batch)
        expected = text(target, "greedy", given)
        assert [len(tokens) for tokens in expected] == [24] * batch
        for name, draft in (("speculative", first), ("early", first), ("lookup", None), ("mixed", first)):
            assert text(target, name, given, draft=draft, length=str(m)) == expected, name


def test_naive_recomputes_to_the_same_text(target: Engine) -> None:
    given = prompts(3, seed=4)
    assert text(target, "naive", given) == text(target, "greedy", given)


def test_greedy_is_the_engines_own(target: Engine) -> None:
    prompt = prompts(1, seed=5)[0]
    made = text(target, "greedy", [prompt])[0]
    target.reset()
    target.prefill(prompt)
    assert made == target.decode_greedy(24)[0].tolist()


def test_a_perfect_draft_gives_all_it_can_and_a_wrong_one_costs_only_time(target: Engine) -> None:
    given = prompts(3, seed=6)
    expected = text(target, "greedy", given)
    for rate in (0.0, 0.6, 1.0):
        strategy = make_strategy("speculative", target, length="4", plan=Plan(rate, expected, CONFIG.vocab_size))
        decoding = Decoding(strategy, given, 24)
        assert decoding.run() == expected
        accepted, examined = (sum(getattr(row, key) for row in decoding.rows) for key in ("accepted", "examined"))
        if rate == 1.0:
            assert accepted == examined and len(decoding.steps) == -(-23 // 5)
        if rate == 0.0:
            assert accepted == 0 and len(decoding.steps) == 23


def test_planted_acceptance_gives_the_expected_tokens_a_step(target: Engine, first: Engine) -> None:
    given = prompts(48, seed=7, longest=8)
    expected = text(target, "greedy", given, n=50)
    for draft in (None, first):
        plan = Plan(0.7, expected, CONFIG.vocab_size)
        strategy = make_strategy("speculative", target, draft=draft, length="3", plan=plan)
        decoding = Decoding(strategy, given, 50)
        assert decoding.run() == expected
        steps = sum(row.steps for row in decoding.rows)
        # the last round of each text drafts less; 48 texts of 20 rounds leave about 2% of chance
        assert sum(len(row.tokens) - 1 for row in decoding.rows) / steps == pytest.approx(
            expected_tokens(0.7, 3), rel=0.07
        )
        assert sum(r.accepted for r in decoding.rows) / sum(r.examined for r in decoding.rows) == pytest.approx(
            0.7, abs=0.04
        )


def test_each_sequence_of_a_batch_has_its_own_acceptance(target: Engine, first: Engine) -> None:
    given = prompts(4, seed=13)
    for name, draft in (("speculative", first), ("lookup", None)):

        def counted(some: list[list[int]], name: str = name, draft: Engine | None = draft) -> list[tuple[int, ...]]:
            decoding = Decoding(make_strategy(name, target, draft=draft, length="3"), some, 24)
            assert decoding.run() == text(target, "greedy", some)
            return [(row.drafted, row.examined, row.accepted) for row in decoding.rows]

        together = counted(given)
        assert together == [counts for prompt in given for counts in counted([prompt])]
        assert len({accepted for _, _, accepted in together}) > 1


class Liar(Draft):
    """A draft that proposes what it was told, whatever the text."""

    def __init__(self, tokens: list[int]) -> None:
        self.tokens = tokens

    def propose(self, rows: Sequence[TextRow], counts: Sequence[int]) -> list[Proposal]:
        return [Proposal(self.tokens[:n], [None] * min(n, len(self.tokens))) for n in counts]


# ---- sampled


def pairs(engine: Engine, draft: Engine, sampling: Sampling, texts: int) -> np.ndarray:
    """How often the second and third token after one prompt were what: [vocab, vocab]."""
    seen = np.zeros((CONFIG.vocab_size, CONFIG.vocab_size))
    strategy = make_strategy("speculative", engine, draft=draft, length="3", sampling=sampling)
    for i in range(texts // 64):
        for tokens in Decoding(strategy, [[1, 2, 3]] * 64, 3, seed=i).run():
            seen[tokens[1], tokens[2]] += 1
    return seen


def exact_pairs(engine: Engine, sampling: Sampling) -> np.ndarray:
    """Their probabilities, from the target's logits after every text of up to two tokens."""
    V = CONFIG.vocab_size

    def after(ids: list[int]) -> np.ndarray:
        engine.reset()
        return sampling.probabilities(engine.prefill([1, 2, 3, *ids])[0])

    joint = np.zeros((V, V))
    for a, p in enumerate(after([])):
        for b, q in enumerate(after([a])):
            joint[b] += p * q * after([a, b])
    return joint


def test_sampled_speculation_has_the_targets_distribution(target: Engine, first: Engine) -> None:
    sampling = Sampling(1.5)
    expected = exact_pairs(target, sampling)
    seen = pairs(target, first, sampling, 6400)
    likely = expected * seen.sum() >= 5  # the rest together are one cell

    def statistic(p: np.ndarray) -> float:
        a, b = np.append(seen[likely], seen[~likely].sum()), np.append(p[likely], p[~likely].sum()) * seen.sum()
        return float(((a - b) ** 2 / np.maximum(b, 1e-9)).sum())

    assert likely.sum() > 20
    assert statistic(expected) < CHI2_99_120  # fewer cells than 121 make the bound looser, by less than a bias would be
    assert statistic(exact_pairs(target, Sampling(1.3))) > CHI2_99_120


def test_samplings_seed_decides_the_text(target: Engine, first: Engine) -> None:
    options = {"draft": first, "length": "3", "sampling": Sampling(1.0, top_k=5, top_p=0.9)}
    made = [
        Decoding(make_strategy("speculative", target, **options), prompts(3), 20, seed=s).run()  # type: ignore[arg-type]
        for s in (1, 1, 2)
    ]
    assert made[0] == made[1] != made[2]
    lone = [
        Decoding(make_strategy("sample", target, sampling=Sampling(1.0)), prompts(3), 20, seed=s).run() for s in (1, 2)
    ]
    assert lone[0] != lone[1]


# ---- edges


def test_a_context_that_fills_up_ends_every_strategy_alike(target: Engine, first: Engine) -> None:
    given = [[1] * 60, prompts(1, seed=8)[0], [2] * 63]
    expected = text(target, "greedy", given, n=100)
    assert [len(tokens) for tokens in expected] == [4, 64 - len(given[1]), 1]
    perfect = {"plan": Plan(1.0, expected, CONFIG.vocab_size)}
    for name, options in (
        *(("speculative", {"draft": first}), ("mixed", {"draft": first}), ("early", {"draft": first})),
        *(("lookup", {}), ("naive", {}), ("speculative", perfect)),
    ):
        strategy = make_strategy(name, target, length="7", **options)  # type: ignore[arg-type]
        decoding = Decoding(strategy, given, 100)
        assert decoding.run() == expected, name
        assert [row.finish for row in decoding.rows] == ["context"] * 3
    # of a perfect draft's seven tokens only those were asked for that there was room for
    assert all(row.drafted == row.accepted for row in decoding.rows)


def test_a_draft_with_a_shorter_context_stops_drafting(target: Engine, tmp_path: Path) -> None:
    short = GPT2Config(
        vocab_size=11, n_positions=24, n_embd=16, n_layer=1, n_head=1, bos_token_id=None, eos_token_id=None
    )
    model = checkpoint(tmp_path / "model", short, spread=SPREAD)
    draft = Engine(
        compile_model(str(model), "cpu", output=tmp_path / "a", rules="baseline", batch_sizes=(4,), verify_widths=())
    )
    given = [[1, 2, 3], [4] * 30, [5] * 22]  # fits, does not, only just
    expected = text(target, "greedy", given, n=40)
    for m in range(1, 9):
        decoding = Decoding(make_strategy("speculative", target, draft=draft, length=str(m)), given, 40)
        assert decoding.run() == expected
        assert decoding.rows[1].drafted == 0 < decoding.rows[0].drafted


def test_an_end_of_text_inside_a_draft_ends_the_text_there(target: Engine) -> None:
    given = prompts(3, seed=9)
    expected = text(target, "greedy", given, n=30)
    eos = expected[0][5]
    cut = [tokens[: tokens.index(eos)] if eos in tokens else tokens for tokens in expected]
    assert text(target, "greedy", given, n=30, eos=eos) == cut
    for name, options in (("lookup", {}), ("speculative", {"plan": Plan(1.0, expected, CONFIG.vocab_size)})):
        assert text(target, name, given, n=30, eos=eos, length="8", **options) == cut
    rows = Decoding(make_strategy("greedy", target), given, 30, eos)
    rows.run()
    assert rows.rows[0].finish == "eos"


def test_a_near_tie_is_left_to_decode(target: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    given = prompts(3, seed=12)
    expected = text(target, "greedy", given, n=30)
    decode, calls = target.decode, 0

    def counted(ids: list[int]) -> np.ndarray:
        nonlocal calls
        calls += 1
        return decode(ids)

    monkeypatch.setattr(target, "decode", counted)
    made = {}
    for tie in (0.0, 0.15):  # so wide that ties come often
        monkeypatch.setattr("gpt2_tvm.decoding.speculative.TIE", tie)
        calls = 0
        plan = Plan(0.8, expected, CONFIG.vocab_size)
        assert Decoding(make_strategy("speculative", target, length="4", plan=plan), given, 30).run() == expected
        made[tie] = calls
    assert made[0.15] > made[0.0] + 5


@pytest.mark.parametrize("tokens", [[], [3], [3, 3, 3, 3, 3, 3, 3, 3]])
def test_drafts_of_any_length_are_taken(target: Engine, tokens: list[int]) -> None:
    given = prompts(2, seed=13)
    made = Decoding(Speculative(target, Liar(tokens), DraftLength(8)), given, 15).run()
    assert made == text(target, "greedy", given, n=15)


def test_what_cannot_be_is_refused_in_one_line(target: Engine, first: Engine, tiny_artifact: Path) -> None:
    def refused(match: str, call: object) -> None:
        with pytest.raises(UserError, match=match) as error:
            call()  # type: ignore[operator]
        assert "\n" not in str(error.value)

    greedy = make_strategy("greedy", target)
    refused("64 tokens and the context holds 64", lambda: Decoding(greedy, [[1] * 64], 5))
    refused("prompt is empty", lambda: Decoding(greedy, [[1], []], 5))
    refused("no prompt", lambda: Decoding(greedy, [], 5))
    refused("--max-tokens 0", lambda: Decoding(greedy, [[1]], 0))
    refused("--seed -1", lambda: Decoding(greedy, [[1]], 5, seed=-1))
    refused("97 ids, not 11", lambda: make_strategy("speculative", target, draft=Engine(tiny_artifact)))
    with pytest.raises(ValueError, match="engine of its own"):
        make_strategy("speculative", target, draft=target)
    refused("not the first layers", lambda: make_strategy("early", first, draft=target))
    refused("needs --draft", lambda: make_strategy("speculative", target))
    refused("takes no --draft", lambda: make_strategy("greedy", target, draft=first))
    refused("unknown --strategy", lambda: make_strategy("warp", target))
    refused("--strategy sample", lambda: make_strategy("greedy", target, sampling=Sampling(0.5)))
    refused("temperature above 0", lambda: make_strategy("sample", target))
    refused("--draft-length many", lambda: make_strategy("lookup", target, length="many"))
    refused("--planted-acceptance 2", lambda: Plan(2.0, [], 11))
    refused("--layers 3", lambda: truncate(ModelSource("m", CONFIG, random=True), 3, Path("unused")))
    assert set(NAMES) == {"naive", "greedy", "sample", "speculative", "lookup", "mixed", "early", "streaming"}
    assert is_early(target.artifact, first.artifact) and not is_early(first.artifact, target.artifact)


def test_another_tokenizer_is_refused(bundled_artifact: Path, tmp_path: Path) -> None:
    import json
    import shutil

    from gpt2_tvm.artifact import open_artifact, read_manifest, write_manifest

    other = tmp_path / "other"
    shutil.copytree(bundled_artifact, other)
    vocab = json.loads((other / "tokenizer/vocab.json").read_text())
    a, b = sorted(vocab, key=vocab.__getitem__)[500:502]
    vocab[a], vocab[b] = vocab[b], vocab[a]
    (other / "tokenizer/vocab.json").write_text(json.dumps(vocab))
    manifest = {k: v for k, v in read_manifest(other).items() if k not in ("format", "digest", "files")}
    write_manifest(other, manifest)
    with pytest.raises(UserError, match="id 500 is"):
        check_pair(open_artifact(bundled_artifact), open_artifact(other))
    check_pair(open_artifact(other), open_artifact(other))


# ---- parts


def test_lookup_finds_the_last_time_and_goes_round_a_loop() -> None:
    index = Index()
    index.extend([1, 2, 3, 4, 9, 1, 2, 3, 5, 7, 2, 3])
    assert index.following(2) == [5, 7]  # 2 3 was last followed by 5, not by 4
    index.extend([8])
    assert index.following(3) == []  # 3 8 never was before
    loop = Index()
    loop.extend([1, 2, 1, 2, 1, 2])
    assert loop.following(5) == [1, 2, 1, 2, 1]


def test_costs_between_and_beyond_what_was_measured() -> None:
    assert at_rows({1: 1.0, 4: 4.0}, 2) == pytest.approx(2.0)
    assert at_rows({1: 1.0, 4: 4.0}, 8) == 4.0
    assert at_rows({4: 4.0}, 1) == 4.0


@pytest.mark.parametrize(
    ("rate", "draft_s", "pass_s", "wanted"),
    [(0.9, 0.05, 1.05, 7), (0.3, 0.05, 1.05, 2), (0.05, 0.5, 1.5, 0), (0.9, 0.05, 9.0, 0)],
)
def test_adaptive_length_is_the_optimum_of_what_it_saw(rate: float, draft_s: float, pass_s: float, wanted: int) -> None:
    costs = Costs(lambda rows: 1 if rows <= 1 else 8)
    adaptive = draft_length("adaptive", 7)
    assert isinstance(adaptive, Adaptive)
    adaptive.start(1)
    assert adaptive.choose(0, costs) == 0  # what a plain step takes comes first
    costs.checked(1, 1.0)
    assert adaptive.choose(0, costs) > 0  # then a try
    rng = np.random.default_rng(0)
    for _ in range(400):
        costs.checked(8, pass_s)
        costs.drafted(draft_s, 1)
        stood = int(rng.random() < rate)
        adaptive.saw(0, 1, stood)
    chosen = [adaptive.choose(0, costs) for _ in range(100)]
    assert abs(np.median(chosen) - wanted) <= 1
    if wanted == 0:
        assert 0 < sum(chosen) < 8  # tried again now and then, if only because a cost may have been measured badly


def test_the_draft_keeps_its_cache_in_step_with_the_text(target: Engine, first: Engine) -> None:
    """What the draft says after any history of acceptance is what it says to the same text from scratch."""
    draft, rng = ModelDraft(first), np.random.default_rng(2)
    rows = [TextRow([1, 2, 3], 3, 60), TextRow([4, 5], 2, 60), TextRow([6], 1, 60)]
    draft.begin(rows, [])
    for row in rows:
        row.ids.append(7)
    for _ in range(8):
        counts = rng.integers(0, 5, 3).tolist()
        made = draft.propose(rows, counts)
        for row, proposal, count in zip(rows, made, counts, strict=True):
            assert len(proposal.tokens) == count
            first_tokens = text(first, "greedy", [row.ids], n=count)[0] if count else []
            assert proposal.tokens == first_tokens
            stand = int(rng.integers(0, count + 1))
            row.ids += [*proposal.tokens[:stand], int(rng.integers(0, CONFIG.vocab_size))]
        fresh = ModelDraft(first)  # the loop above has used the engine for other texts
        fresh.begin([TextRow(row.ids[:1], 1, 60) for row in rows], [])
        draft = fresh


def test_one_text_as_generate_wants_it(target: Engine, first: Engine) -> None:
    prompt = prompts(1, seed=3)[0]
    generation = StrategyGeneration(make_strategy("speculative", target, draft=first, length="3"), prompt, 20)
    assert list(generation) == text(target, "greedy", [prompt], n=20)[0]
    assert (generation.finish, generation.steps) == ("length", 19)
    assert generation.prefill_s > 0 and generation.decode_s > 0
    assert 0 < generation.passes <= 19 and 0 <= (generation.acceptance or 0) <= 1


def test_the_clock_counts_each_moment_once(target: Engine, first: Engine) -> None:
    decoding = Decoding(make_strategy("speculative", target, draft=first, length="3"), prompts(2), 20)
    decoding.run()
    parts = decoding.strategy.clock.split(decoding.decode_s)
    assert min(parts["draft"], parts["verify"], parts["sample"]) > 0
    assert sum(parts.values()) == pytest.approx(decoding.decode_s, rel=1e-6)
