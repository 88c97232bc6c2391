"""benchmarks/paged_decode.py: the figures of a short run hang together, and a wrong token is noticed."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gpt2_tvm.errors import UserError
from gpt2_tvm.measure.cases import Case, Sample

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
import paged_decode


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """For `measure`, which compiles into it: what the first test compiled, for batches 1 and 2, serves both."""
    from gpt2_tvm import build

    compiled = build.compile_model

    def once(*arguments: Any, **options: Any) -> Path:
        if arguments[3].exists():
            return arguments[3]
        return compiled(*arguments, **options | {"batch_sizes": (1, 2)})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "compile_model", once)
        yield tmp_path_factory.mktemp("paged")


@pytest.mark.heavy
def test_a_short_run(folder: Path) -> None:
    cases = [Case(1, 9, 6), Case(2, 9, 6)]
    made = paged_decode.measure("bundled", "q0f32", cases, 2, None, folder)
    rows = made["results"]
    names = ["paged", "contiguous", "contiguous, greedy"]
    assert [(row["batch"], row["engine"]) for row in rows] == [(batch, name) for batch in (1, 2) for name in names]
    for row in rows:
        assert row["decode_tok_s"] > 0 and row["decode_tok_s_sd"] >= 0 and row["prefill_tok_s"] > 0
        assert (row["of_contiguous"] == 1) == (row["engine"] == "contiguous")


def test_different_tokens_are_no_result(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    true = paged_decode.Paged.turn

    def turn(self: paged_decode.Paged, case: Case) -> Sample:
        sample = true(self, case)
        (first, *rest), *others = sample.tokens
        return Sample(sample.prefill_s, sample.decode_s, ((first ^ 1, *rest), *others))

    monkeypatch.setattr(paged_decode.Paged, "turn", turn)
    with pytest.raises(UserError, match="different tokens at batch 1"):
        paged_decode.measure("bundled", "q0f32", [Case(1, 5, 3)], 1, None, folder)
