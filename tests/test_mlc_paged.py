"""The paged engine of MLC's interface against our contiguous one, on the CPU, through TVM's runtime functions."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from gpt2_tvm import Engine, compile_model
from gpt2_tvm.artifact import open_artifact, read_manifest
from gpt2_tvm.errors import UserError
from gpt2_tvm.mlc.engine import PagedEngine

BATCH = 8
CLOSE = 1e-4


@pytest.fixture(scope="module")
def contiguous(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    path = tmp_path_factory.mktemp("contiguous") / "artifact"
    return Engine(compile_model("bundled", output=path, batch_sizes=(1, 3, BATCH), verify_widths=(4,)))


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("paged") / "artifact"
    return compile_model("bundled", output=path, batch_sizes=(1, BATCH), interface="mlc")


@pytest.fixture(scope="module")
def loaded(artifact: Path) -> PagedEngine:
    engine = PagedEngine.open(artifact)
    assert engine.metadata == read_manifest(artifact)["mlc"]
    return engine


@pytest.fixture
def paged(loaded: PagedEngine) -> Iterator[PagedEngine]:
    loaded.reset()
    yield loaded


def prompts(batch: int, lengths: tuple[int, ...] = (37, 1, 16, 17, 90, 15, 64, 5)) -> list[list[int]]:
    """Ragged ones; 16 tokens are just a page."""
    random = np.random.default_rng(batch)
    return [random.integers(0, 2048, lengths[i]).tolist() for i in range(batch)]


def difference(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.abs(np.asarray(ours).ravel() - np.asarray(theirs).ravel()).max())


@pytest.mark.parametrize("batch", [1, 3, BATCH])
def test_logits_are_the_contiguous_engines(paged: PagedEngine, contiguous: Engine, batch: int) -> None:
    ids = prompts(batch)
    contiguous.reset()
    for sequence in range(batch):
        paged.add(sequence)
    ours, theirs = paged.prefill(dict(enumerate(ids))), contiguous.prefill(ids)
    assert difference(ours, theirs) < CLOSE
    for _ in range(20):  # over the ends of pages
        tokens = np.asarray(theirs).reshape(batch, -1).argmax(1).astype(np.int32)
        ours, theirs = paged.decode(dict(enumerate(tokens.tolist()))), contiguous.decode(tokens)
        assert difference(ours, theirs) < CLOSE


@pytest.mark.parametrize("batch", [1, 3])
def test_candidates_and_taking_them_back(paged: PagedEngine, contiguous: Engine, batch: int) -> None:
    ids, random = prompts(batch), np.random.default_rng(7)
    contiguous.reset()
    contiguous.prefill(ids)
    for sequence in range(batch):
        paged.add(sequence)
    paged.prefill(dict(enumerate(ids)))
    candidates = random.integers(0, 2048, (batch, 4)).tolist()
    ours, theirs = paged.verify(dict(enumerate(candidates))), contiguous.verify(candidates)
    assert difference(np.stack(ours), theirs) < CLOSE
    for sequence in range(batch):
        paged.popn(sequence, 3)
    contiguous.rewind(contiguous.positions - 3)
    tokens = random.integers(0, 2048, batch).astype(np.int32)
    assert difference(paged.decode(dict(enumerate(tokens.tolist()))), contiguous.decode(tokens)) < CLOSE


def test_a_fork_goes_its_own_way(paged: PagedEngine, contiguous: Engine) -> None:
    ids = prompts(1)[0]
    paged.add(0)
    paged.prefill({0: ids})
    paged.fork(0, 1)
    ours = paged.decode({0: 11, 1: 12})
    ours = paged.decode({0: 13, 1: 14})
    for row, more in enumerate(([11, 13], [12, 14])):
        contiguous.reset()
        assert difference(ours[row], contiguous.prefill([ids + more])) < CLOSE
    paged.remove(0)
    contiguous.reset()
    assert difference(paged.decode({1: 15}), contiguous.prefill([[*ids, 12, 14, 15]])) < CLOSE


def test_a_prompt_longer_than_a_chunk(paged: PagedEngine, contiguous: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paged, "chunk", 30)
    ids = np.random.default_rng(3).integers(0, 2048, 100).tolist()
    paged.add(5)
    contiguous.reset()
    assert difference(paged.prefill({5: ids}), contiguous.prefill([ids])) < CLOSE


def test_a_full_context_and_bad_input(paged: PagedEngine, contiguous: Engine) -> None:
    ids = np.random.default_rng(4).integers(0, 2048, paged.context).tolist()
    paged.add(0)
    contiguous.reset()
    assert difference(paged.prefill({0: ids}), contiguous.prefill([ids])) < CLOSE
    for wrong, word in (
        (lambda: paged.decode({0: 1}), "context"),
        (lambda: paged.decode({3: 1}), "no sequence 3"),
        (lambda: paged.add(0), "there already"),
        (lambda: paged.popn(0, paged.context + 1), "taken back"),
        (lambda: paged.prefill({}), "at least one"),
        (lambda: paged.prefill({0: []}), "at least one"),
    ):
        with pytest.raises(UserError, match=word):
            wrong()
    paged.add(1)
    for token in (-1, 2048):
        with pytest.raises(UserError, match="not in the vocabulary"):
            paged.decode({1: token})
    assert paged.lengths == {0: paged.context, 1: 0}


def test_nothing_leaks_between_requests(paged: PagedEngine, tmp_path: Path) -> None:
    ids = prompts(3)
    first = []
    for _ in range(2):
        for sequence in range(3):
            paged.add(sequence)
        first.append(paged.prefill(dict(enumerate(ids))))
        paged.reset()
    assert np.array_equal(first[0], first[1])


def test_memory_and_rules_of_the_manifest(artifact: Path) -> None:
    manifest = read_manifest(artifact)
    told = manifest["mlc"]
    vocabulary, width = manifest["config"]["vocab_size"], manifest["config"]["n_embd"]
    usage = told["memory_usage"]
    assert usage["embed"] == told["prefill_chunk_size"] * width * 4  # its result, and nothing else
    assert usage["softmax_with_temperature"] >= BATCH * vocabulary * 4
    assert usage["batch_verify"] > told["prefill_chunk_size"] * vocabulary * 4 > usage["decode"] > vocabulary * 4
    rules = {row["name"]: row["rule"] for row in manifest["functions"] if "decode" in row["calls"]}
    assert "cpu-gemv" in rules.values() or "cpu-matmul" in rules.values()
    assert manifest["interface"] == "mlc" and manifest["cuda_graph"] is None


def test_interfaces_are_not_mixed_up(artifact: Path, contiguous: Engine, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"export_mlc, or compile again without --interface mlc"):
        Engine(artifact)
    with pytest.raises(UserError, match=r"--interface mlc --output ANOTHER_FOLDER"):
        PagedEngine.open(contiguous.artifact.path)
    assert open_artifact(artifact, interface="mlc").manifest["interface"] == "mlc"
    for options, word in (
        ({"interface": "tvm"}, "own or mlc"),
        ({"interface": "mlc", "attention": "materialized"}, "paged cache"),
        ({"interface": "mlc", "prefill_chunk": 0}, "--prefill-chunk 0"),
        ({"prefill_chunk": 64}, "--interface mlc"),
    ):
        with pytest.raises(UserError, match=word):
            compile_model("bundled", output=tmp_path / "none", **options)
    assert not (tmp_path / "none").exists()
