"""The benchmark: arithmetic, rounds, worker processes, output formats, faults. No test asserts a timing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from statistics import stdev
from typing import Any

import numpy as np
import pytest

from gpt2_tvm.artifact import open_artifact
from gpt2_tvm.config import GPT2Config
from gpt2_tvm.errors import UserError
from gpt2_tvm.measure import bounds, noise, peers, results, workers
from gpt2_tvm.measure.cases import Case, Sample, check_fits, cross, parse_sizes
from gpt2_tvm.measure.subjects import EngineSubject, prompt_of
from gpt2_tvm.measure.timing import run_rounds

KEYS = {
    *("model", "target", "quantization", "rules", "attention", "batch", "prompt_tokens", "generate_tokens", "repeats"),
    *("prefill_tok_s", "decode_tok_s", "prefill_tok_s_sd", "decode_tok_s_sd", "prefill_tok_s_mean"),
    *("decode_tok_s_mean", "ttft_ms", "decode_gb_s", "bound_gb_s", "bound_share", "peak_rss_mb", "device", "date"),
    *("versions", "threads", "load_seconds", "prefill_gflop_s", "bound_gflop_s", "bound_gflop_share", "runner"),
}

# Sizes -----------------------------------------------------------------------------------------------------------


def test_comma_lists_make_a_cross_product() -> None:
    cases = cross(parse_sizes("--batch", "1,4"), parse_sizes("--prompt-tokens", "16, 322"), (32, 64))
    assert len(cases) == len(set(cases)) == 8
    assert cases[0] == Case(1, 16, 32) and cases[1] == Case(1, 16, 64) and cases[-1] == Case(4, 322, 64)
    assert parse_sizes("--batch", "4,1,4") == (4, 1)


@pytest.mark.parametrize("text", ["", "0", "-1", "16,", "1.5", "a", "1;2", "²"])
def test_sizes_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="--generate"):
        parse_sizes("--generate", text)


def test_a_case_may_fill_the_context_but_not_pass_it(tiny_artifact: Path) -> None:
    artifact = open_artifact(tiny_artifact)
    check_fits(artifact, [Case(2, 40, 8)])
    with pytest.raises(UserError, match=r"49 tokens.*holds 48"):
        check_fits(artifact, [Case(1, 4, 4), Case(1, 40, 9)])
    with pytest.raises(UserError, match="--batch-sizes 1,2,3"):
        check_fits(artifact, [Case(3, 4, 4)])


# The weights of a peer -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "k", "rows"), [(64, 24, 16), (97, 32, 32), (5, 3, 8), (7, 1, 1)])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_unpacking_inverts_packing(n: int, k: int, rows: int, dtype: type) -> None:
    from gpt2_tvm.kernels.packed_linear import pack

    weight = np.random.default_rng(0).standard_normal((n, k)).astype(dtype)
    unpacked = peers.unpack(pack(weight, rows), (n, k))
    assert unpacked.dtype == dtype and np.array_equal(unpacked, weight)


@pytest.mark.parametrize("shape", [(3, 24, 16), (4, 23, 16), (64, 23), (64,)])
def test_a_foreign_layout_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="no layout of"):
        peers.unpack(np.zeros(shape, np.float32), (64, 24))


def test_weights_out_of_an_artifact_are_those_of_its_checkpoint(tiny_artifact: Path, tiny_model: Path) -> None:
    from gpt2_tvm.checkpoint import resolve_model
    from gpt2_tvm.weights import iter_weights

    artifact = open_artifact(tiny_artifact)
    assert artifact.manifest["layout"]["panel_rows"] > 0  # else nothing is unpacked here
    found = dict(peers.artifact_weights(artifact))
    expected = dict(iter_weights(resolve_model(str(tiny_model))))
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert np.array_equal(found[name], array), name


# Bounds and rows -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_bytes_of_a_decode_step(tied: bool) -> None:
    config = GPT2Config(vocab_size=50, n_positions=64, n_embd=8, n_layer=3, n_head=2, tie_word_embeddings=tied)
    block = 2 * 2 * 8 + (24 * 8 + 24) + (8 * 8 + 8) + (32 * 8 + 32) + (8 * 32 + 8)
    weights = 4 * (3 * block + 2 * 8 + 50 * 8)  # the head once: the token table itself, or the untied one
    # steps at positions 10, 11, 12 and 13 read 11, 12, 13 and 14 tokens: keys and values, 3 layers, 2 sequences
    cache = 2 * (11 + 12 + 13 + 14) / 4 * 3 * 2 * 8 * 2
    sizes = bounds.plain_param_bytes(config)
    assert bounds.decode_step_bytes(config, sizes, "float16", Case(2, 10, 4)) == weights + cache


def test_stored_bytes_count_the_padding_of_the_layout(tiny_artifact: Path) -> None:
    artifact = open_artifact(tiny_artifact)
    rows = artifact.manifest["layout"]["panel_rows"]
    sizes = bounds.artifact_param_bytes(artifact)
    assert sizes["transformer.wte.weight"] == -(-97 // rows) * rows * 32 * 4
    assert sizes["transformer.wpe.weight"] == 48 * 32 * 4


def test_bandwidth_is_the_target_s_or_measured(tiny_artifact: Path) -> None:
    artifact = open_artifact(tiny_artifact)
    assert bounds.target_bounds(artifact) == bounds.Bounds()  # targets/cpu.toml states none
    artifact.manifest["target"]["peak"] = {"bandwidth_gb_s": 800.0, "fp32_tflops": 2.5, "fp16_tflops": 5}
    stated = bounds.target_bounds(artifact)
    assert stated.bandwidth == bounds.Bandwidth(800, "peak of target cpu")
    assert stated.arithmetic == bounds.Arithmetic(2500, "peak of target cpu")
    artifact.manifest["compute_dtype"] = "float16"
    assert bounds.target_bounds(artifact).arithmetic == bounds.Arithmetic(5000, "peak of target cpu")


def samples(*seconds: tuple[float, float], tokens: tuple[tuple[int, ...], ...] = ((1, 2, 3, 4),)) -> list[Sample]:
    return [Sample(prefill, decode, tokens, peak_rss_mb=100.0 + i) for i, (prefill, decode) in enumerate(seconds)]


FACTS = {"device": "a device", "versions": {"apache-tvm": "1"}}


def test_a_row_s_keys_and_arithmetic(tiny_artifact: Path) -> None:
    artifact, case = open_artifact(tiny_artifact), Case(2, 10, 4)
    measured = samples((1.0, 0.5), (2.0, 1.0), (4.0, 0.25))
    limits = bounds.Bounds(bounds.Bandwidth(50.0, "x"), bounds.Arithmetic(0.5, "y"))
    row = results.make_row(artifact, case, measured, FACTS, limits, "2026-01-01")
    assert set(row) == KEYS and len(results.ROW_KEYS) + len(results.LATER_KEYS) == len(KEYS)
    assert (row["prefill_tok_s"], row["decode_tok_s"]) == (10, 16)  # 20 tokens / 2 s, 8 tokens / 0.5 s
    assert row["prefill_tok_s_mean"] == pytest.approx((20 + 10 + 5) / 3)
    assert row["prefill_tok_s_sd"] == pytest.approx(stdev([20, 10, 5]))
    assert row["decode_tok_s_sd"] == pytest.approx(stdev([16, 8, 32]))
    assert (row["ttft_ms"], row["repeats"], row["peak_rss_mb"]) == (2000, 3, 102)
    step = bounds.decode_step_bytes(artifact.config, bounds.artifact_param_bytes(artifact), "float32", case)
    assert row["decode_gb_s"] == pytest.approx(step * 8 / 1e9)  # 8 steps a second, of two sequences each
    assert row["bound_share"] == pytest.approx(row["decode_gb_s"] / 50)
    assert row["prefill_gflop_s"] == pytest.approx(bounds.prefill_flops(artifact.config, case) / 2e9)  # median 2 s
    assert row["bound_gflop_share"] == pytest.approx(row["prefill_gflop_s"] / 0.5)
    assert (row["model"], row["rules"], row["attention"], row["target"]) == ("tiny", "none", "flash", "cpu")


def test_without_a_bound_or_a_second_repeat(tiny_artifact: Path) -> None:
    row = results.make_row(
        open_artifact(tiny_artifact), Case(1, 4, 4), samples((1.0, 1.0)), FACTS, bounds.Bounds(), "d", "other"
    )
    assert row["bound_gb_s"] is None and row["bound_share"] is None and row["prefill_tok_s_sd"] == 0
    assert row["bound_gflop_s"] is None and row["bound_gflop_share"] is None
    assert set(row) == {*KEYS, "peer"} and row["peer"] == "other" and row["quantization"] == "q0f32"
    json.loads(json.dumps(row, allow_nan=False))


def test_ratios_are_taken_round_by_round() -> None:
    row: dict[str, Any] = dict.fromkeys(KEYS, "x")
    ours = samples((1.0, 1.0), (2.0, 2.0), (9.0, 9.0), tokens=((1, 2, 3, 4), (1, 2, 3, 4)))
    theirs = samples((3.0, 0.5), (2.0, 1.0), tokens=((1, 2, 9, 4), (1, 2, 3, 4)))
    found = results.make_comparison(row, "other", Case(2, 10, 4), ours, theirs)
    assert found["prefill_ratio"] == pytest.approx((3 + 1) / 2) and found["decode_ratio"] == pytest.approx(0.5)
    assert found["prefill_ratio_sd"] == pytest.approx(stdev([3, 1])) and found["decode_ratio_sd"] == 0
    assert (found["same_tokens"], found["of_tokens"]) == (2 + 4, 8)  # up to the first difference


# Rounds and processes --------------------------------------------------------------------------------------------


class Fake:
    """A worker in this process that logs its turns, and fails at one of them."""

    def __init__(self, label: str, log: list[tuple[str, int]], fails_at: int = -1, error: type = UserError) -> None:
        self.label, self._log, self._fails_at, self._error, self._turns = label, log, fails_at, error, 0

    def turn(self, case: Case) -> Sample:
        self._log.append((self.label, case.prompt_tokens))
        self._turns += 1
        if self._turns == self._fails_at:
            raise self._error(f"{self.label} fell over")
        return Sample(float(self._turns), 1.0, ())


def test_rounds_interleave_all_and_drop_the_warm_up() -> None:
    log: list[tuple[str, int]] = []
    told: list[tuple[str, int]] = []
    kept: dict[Any, list[Sample]] = {}
    cases = cross((1,), (5, 6), (2,))
    ran = run_rounds([Fake("a", log), Fake("b", log)], cases, 2, 1, kept, lambda *said: told.append(said), settle_s=0)
    assert ran == [] and log == [("a", 5), ("b", 5), ("a", 6), ("b", 6)] * 3
    assert [turns for _, turns in told] == list(range(12)) and told[0][0].startswith("warm-up: a, 1 x 5 + 2")
    assert {key: len(found) for key, found in kept.items()} == {(i, case): 2 for i in (0, 1) for case in cases}
    assert min(sample.prefill_s for found in kept.values() for sample in found) == 3  # turns 1 and 2 were warm-up


def test_one_that_fails_does_not_end_the_run() -> None:
    log: list[tuple[str, int]] = []
    kept: dict[Any, list[Sample]] = {}
    case = Case(1, 5, 2)
    failed = run_rounds([Fake("a", log, fails_at=2), Fake("b", log)], [case], 3, 0, kept, settle_s=0)
    assert failed == ["a fell over"]
    assert len(kept[0, case]) == 1 and len(kept[1, case]) == 3 and log.count(("a", 5)) == 2


def test_an_interrupt_leaves_what_was_measured() -> None:
    kept: dict[Any, list[Sample]] = {}
    with pytest.raises(KeyboardInterrupt):
        run_rounds([Fake("a", [], fails_at=3, error=KeyboardInterrupt)], [Case(1, 5, 2)], 9, 0, kept, settle_s=0)
    assert len(kept[0, Case(1, 5, 2)]) == 2


class Echo:
    """A subject for worker processes: its sizes say what to do."""

    def __init__(self, name: str) -> None:
        if name == "refused":
            raise UserError("this one cannot be loaded")
        self.facts = {"device": name, "versions": {}}

    def turn(self, case: Case) -> Sample:
        print("noise on standard output")
        if case.batch == 2:
            os.kill(os.getpid(), signal.SIGSEGV)
        if case.batch == 3:
            raise RuntimeError("first line\nsecond line")
        return Sample(1.0, 2.0, ((case.prompt_tokens,),))


def test_a_worker_answers_and_keeps_its_own_peak_memory(capfd: pytest.CaptureFixture[str]) -> None:
    ballast = np.ones(64 << 20)  # 512 MiB here, which a child's ru_maxrss would begin with
    worker = workers.Worker("echo", Echo, "x")
    try:
        worker.ready()
        sample = worker.turn(Case(1, 7, 1))
    finally:
        worker.close()
    assert worker.facts["device"] == "x" and sample.tokens == ((7,),)
    assert 1 < sample.peak_rss_mb < ballast.nbytes / 1e6 <= workers.peak_rss_mb()
    assert "noise" not in capfd.readouterr().out  # standard output is the table's


def test_a_crash_and_an_error_are_one_line_each() -> None:
    crashed, failed, refused = (workers.Worker(name, Echo, name) for name in ("crashed", "failed", "refused"))
    try:
        with pytest.raises(UserError, match="this one cannot be loaded"):
            refused.ready()
        crashed.ready()
        with pytest.raises(UserError, match=r"^crashed: its process ended by SIGSEGV"):
            crashed.turn(Case(2, 1, 1))
        failed.ready()
        with pytest.raises(UserError, match=r"^RuntimeError: first line [(]unexpected"):
            failed.turn(Case(3, 1, 1))
    finally:
        for worker in (crashed, failed, refused):
            worker.close()


def test_load_of_others_is_counted_without_our_own() -> None:
    worker = workers.Worker("echo", Echo, "x")
    worker.ready()
    load = noise.OtherLoad([worker.pid])
    sum(range(3_000_000))
    cores = load.cores()
    assert cores is not None and 0 <= cores <= (os.cpu_count() or 1) + 0.5
    worker.close()
    assert load.cores() is None


def test_what_a_worker_s_child_uses_is_our_own() -> None:
    spin = "import time; end = time.process_time() + 0.5\nwhile time.process_time() < end: pass"
    parent = f"import subprocess, sys; input(); subprocess.run([sys.executable, '-c', {spin!r}]); print(); input()"
    worker = subprocess.Popen([sys.executable, "-c", parent], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert worker.stdin is not None and worker.stdout is not None
    start = time.perf_counter()
    blind, seeing = noise.OtherLoad([]), noise.OtherLoad([worker.pid])
    worker.stdin.write("\n")
    worker.stdin.flush()
    worker.stdout.readline()
    without, cores, wall = blind.cores(), seeing.cores(), time.perf_counter() - start
    worker.communicate("\n")
    assert without is not None and cores is not None
    assert (without - cores) * wall > 0.4  # of the half second


def test_a_turn_gives_the_engine_s_greedy_tokens(tiny_artifact: Path) -> None:
    from gpt2_tvm.engine import Engine

    case = Case(2, 20, 8)
    sample = EngineSubject(str(tiny_artifact)).turn(case)
    engine = Engine(tiny_artifact)
    ids = prompt_of(engine.artifact, case)
    assert ids.shape == (2, 20) and (ids[0] == ids[1]).all() and ids.max() < 97
    expected = [engine.prefill(ids).argmax(-1)]
    for _ in range(7):
        expected.append(engine.decode(expected[-1]).argmax(-1))
    assert np.array_equal(np.stack(expected, 1), sample.tokens)
    assert sample.prefill_s > 0 and sample.decode_s > 0
