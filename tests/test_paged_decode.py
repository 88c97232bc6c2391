"""benchmarks/paged_decode.py: the figures of a short run hang together, and a wrong token is noticed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from gpt2_tvm.errors import UserError
from gpt2_tvm.measure.cases import Case, Sample

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
import paged_decode


def test_a_short_run(tmp_path: Path) -> None:
    cases = [Case(1, 9, 6), Case(2, 9, 6)]
    made = paged_decode.measure("bundled", "q0f32", cases, 2, None, tmp_path)
    rows = made["results"]
    names = ["paged", "contiguous", "contiguous, greedy"]
    assert [(row["batch"], row["engine"]) for row in rows] == [(batch, name) for batch in (1, 2) for name in names]
    for row in rows:
        assert row["decode_tok_s"] > 0 and row["decode_tok_s_sd"] >= 0 and row["prefill_tok_s"] > 0
        assert (row["of_contiguous"] == 1) == (row["engine"] == "contiguous")


def test_different_tokens_are_no_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    true = paged_decode.Paged.turn

    def turn(self: paged_decode.Paged, case: Case) -> Sample:
        sample = true(self, case)
        (first, *rest), *others = sample.tokens
        return Sample(sample.prefill_s, sample.decode_s, ((first ^ 1, *rest), *others))

    monkeypatch.setattr(paged_decode.Paged, "turn", turn)
    with pytest.raises(UserError, match="different tokens at batch 1"):
        paged_decode.measure("bundled", "q0f32", [Case(1, 5, 3)], 1, None, tmp_path)
