"""benchmarks/peers_cpu.py at work: engines that fail or are interrupted, and the peers' greedy ids."""

from __future__ import annotations

import json
import os
import signal
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from gpt2_tvm.artifact import open_artifact
from gpt2_tvm.checkpoint import random_model, resolve_model
from gpt2_tvm.config import GPT2Config
from gpt2_tvm.errors import UserError
from gpt2_tvm.measure.cases import Case, Sample
from gpt2_tvm.measure.machine import Probe
from gpt2_tvm.measure.subjects import EngineSubject, prompt_of
from gpt2_tvm.measure.workers import Worker
from gpt2_tvm.weights import write_hf_checkpoint

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
if str(BENCHMARKS) not in sys.path:  # as `python benchmarks/peers_cpu.py` has it; child processes inherit it
    sys.path.insert(0, str(BENCHMARKS))

from peers import engines, report, run  # noqa: E402
from peers.setup import Setup, in_child  # noqa: E402

TINY = GPT2Config(vocab_size=97, n_positions=48, n_embd=32, n_layer=2, n_head=2)
ONE, FOUR = Case(1, 10, 4), Case(4, 10, 4)


class Machine:
    """Stands for `MachineSubject`, in a child process as that is."""

    def __init__(self, threads: int) -> None:
        self.facts = {"read": f"{threads} threads", "fma": "x"}

    def turn(self, case: object) -> Probe:
        return Probe(10.0, 100.0)


class Plain:
    """An engine that answers, and crashes or fails where its path says so."""

    def __init__(self, setup: Setup, path: str) -> None:
        if path == "refuses":
            raise UserError("cannot be loaded")
        self.facts = {"device": "", "versions": {"plain": "1"}, "settings": path}
        self._setup, self._path, self._turns = setup, path, 0

    def turn(self, case: Case) -> Sample:
        self._turns += 1
        if self._turns == 3 and self._path == "crashes":
            os.kill(os.getpid(), signal.SIGSEGV)
        ids = self._setup.ids(case)
        return Sample(1.0, 0.5, tuple(tuple(row) for row in ids[:, : case.generate_tokens].tolist()))


class Crashes(Plain):
    def __init__(self, setup: Setup, path: str) -> None:
        super().__init__(setup, "crashes")


class Refuses(Plain):
    def __init__(self, setup: Setup, path: str) -> None:
        super().__init__(setup, "refuses")


def dies(setup: Setup, folder: Path) -> str:
    os.kill(os.getpid(), signal.SIGABRT)
    return ""


def fakes() -> list[engines.Engine]:
    plain = engines.Engine("plain", "float32", Plain, weight_bits=32)
    return [
        *(plain, replace(plain, name="crashes", subject=Crashes), replace(plain, name="refuses", subject=Refuses)),
        *(replace(plain, name="dies", prepare=dies), replace(plain, name="absent", packages=("no_such_module",))),
    ]


def make_run(chosen: list[engines.Engine], folder: Path) -> run.Run:
    return run.Run(random_model(TINY, name="tiny"), chosen, [ONE, FOUR], 2, 1, 1, folder, settle_s=0)


def test_engines_that_fail_are_rows_with_their_reasons(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "MachineSubject", Machine)
    saved: list[int] = []
    made = make_run(fakes(), tmp_path)
    made.run(lambda what, turns: None, lambda: saved.append(len(made.result()["rows"])))
    result = made.result()
    assert result["complete"] and saved == [5, 10]
    bounds = result["bounds"]
    assert (bounds["read_gb_s"], bounds["fma_gflop_s"], bounds["fma_gflop_s_sd"]) == (10, 100, 0)
    assert "1 threads, median of 5" in bounds["read_source"] and bounds["import_rss_mb"] > 10  # first, and each round
    reasons = {e["engine"]: e["failure"] for e in result["engines"]}
    assert reasons["plain"] is None and reasons["refuses"] == "cannot be loaded"
    assert reasons["crashes"].startswith("its process ended by SIGSEGV")
    assert reasons["dies"].startswith("its process ended by SIGABRT")
    assert reasons["absent"] == "no no_such_module here: pip install 'gpt2-tvm[peers]'"
    counts = {(r["engine"], r["batch"]): r["repeats"] for r in result["rows"]}
    assert counts["plain", 1] == counts["plain", 4] == 2
    assert counts["crashes", 1] == 1 and counts["crashes", 4] == 0  # its third turn is the second round
    assert {r["engine"] for r in result["rows"] if r["failure"]} == {"crashes", "refuses", "dies", "absent"}
    text = report.render(result)
    assert "failed after 1 rounds" in text and text.count("failed, see below") == 7
    json.loads(json.dumps(result, allow_nan=False))


def test_an_interrupted_run_keeps_what_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "MachineSubject", Machine)
    made = make_run(fakes()[:1], tmp_path)

    def say(what: str, turns: int) -> None:
        if turns == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        made.run(say)
    result = made.result()
    assert not result["complete"] and [r["batch"] for r in result["rows"]] == [1]
    assert all(e.worker is None for e in made.entries)


def test_a_function_in_a_child_process() -> None:
    assert in_child("sum", sum, [1, 2, 3]) == 6
    with pytest.raises(UserError, match=r"^ValueError: "):
        in_child("int", int, "x")


# The peers' ids --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bundled(bundled_artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Setup, dict[Case, Any]]:
    """A setup of the bundled model, and our greedy ids for two cases."""
    source = resolve_model("bundled")
    folder = write_hf_checkpoint(tmp_path_factory.mktemp("peers") / "austen", source.config, source)
    cases = (Case(1, 40, 16), Case(3, 33, 8))
    artifact = open_artifact(bundled_artifact)
    subject = EngineSubject(str(bundled_artifact))
    singles = [Case(1, case.prompt_tokens, case.generate_tokens) for case in cases]
    expected = {c: subject.turn(one).tokens * c.batch for c, one in zip(cases, singles, strict=True)}
    prompt = tuple(prompt_of(artifact, cases[0])[0].tolist())
    return Setup(folder, prompt, (1, 3), 56, threads=1), expected  # several threads crawl on a busy machine


@pytest.mark.parametrize(
    "name",
    [
        *("transformers", "llama-f32", "llama-f16", "llama-q8_0", "ct2-float32"),
        *(pytest.param(name, marks=pytest.mark.heavy) for name in ("torch-compile", "llama-f32-kv16", "ct2-int8")),
    ],
)
def test_a_peer_gives_our_greedy_ids(name: str, bundled: tuple[Setup, dict[Case, Any]], tmp_path: Path) -> None:
    engine = engines.PEERS[name]
    absent = [package for package in engine.packages if find_spec(package) is None]
    if absent:
        pytest.skip(f"{name} needs {' and '.join(absent)}: pip install 'gpt2-tvm[peers]'")
    setup, expected = bundled
    path = in_child(name, engine.prepare, setup, tmp_path) if engine.prepare else str(setup.checkpoint)
    worker = Worker(name, engine.subject, setup, path)
    try:
        worker.ready()
        for case, ids in expected.items():
            first, again = worker.turn(case), worker.turn(case)
            assert first.tokens == again.tokens and first.prefill_s > 0 and first.decode_s > 0
            if engine.exact:
                assert first.tokens == ids
            else:  # fewer bits choose otherwise now and then, and the texts part there
                assert [row[0] for row in first.tokens] == [row[0] for row in ids]
        assert worker.facts["settings"] and worker.facts["versions"]
    finally:
        worker.close()
