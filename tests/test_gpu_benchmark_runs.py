"""benchmarks/gpu.py when something goes wrong: hangs, crashes, wrong numbers, too little time, another build. What runs
on the GPU is planted here."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from gpt2_tvm import UserError
from gpt2_tvm.artifact import open_artifact
from gpt2_tvm.measure.cases import Case, Sample

torch = pytest.importorskip("torch", reason="pip install 'gpt2-tvm[reference]'")

pytestmark = pytest.mark.usefixtures("gpu_bench")
CASE, LATER = Case(1, 6, 5), Case(2, 6, 5)


@pytest.fixture(scope="module")
def path(gpu_kit: Path) -> Path:
    return gpu_kit / "artifacts" / "tiny-q0f32-full"


# ---- correctness


def test_logits_that_are_no_numbers_are_wrong(path: Path) -> None:
    from gpu_bench.correctness import check, compare, within

    engine = SimpleNamespace(
        reset=lambda: None,
        prefill=lambda ids: np.full((len(ids), 97), np.nan, np.float32),
        decode=lambda ids: np.full((len(ids), 97), np.nan, np.float32),
    )
    error, largest = compare(engine, open_artifact(path), CASE)
    assert np.isnan(error) and not within(error, largest, 1e9)
    assert within(1e-3, 0.5, 1e-3) and not within(1.1e-3, 0.5, 1e-3)  # absolute where logits are small
    assert within(0.05, 60.0, 1e-3) and not within(0.07, 60.0, 1e-3)
    found = check(path, None)
    assert found["ok"] and {(s["batch"], s["prompt_tokens"]) for s in found["sizes"]} == {(1, 40), (2, 40)}


def test_every_sequence_has_a_prompt_of_its_own(path: Path) -> None:
    from gpu_bench.correctness import prompts_of

    first, second = prompts_of(open_artifact(path), Case(2, 20, 1)).tolist()
    assert first != second and sorted(first) == sorted(second)


def hangs_or_dies(path: Path, device: str | None) -> dict[str, Any]:
    """In the place of `correctness.check`, by the artifact's name."""
    if "hangs" in path.name:
        time.sleep(600)
    if "dies" in path.name:
        raise RuntimeError("CUDA: an illegal memory access was encountered")
    numbers = {"error": 0.0, "largest": 1.0, "share": 0.0, "allowed": 1e-3}
    return {**numbers, "sizes": [], "same_ids": None, "refused": "", "failure": "", "message": "", "ok": True}


@pytest.mark.heavy
def test_a_hang_or_a_fault_is_a_row_and_the_others_go_on(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    from gpu_bench import correctness, pieces
    from gpu_bench.crew import Clock

    kit = tmp_path / "kit"
    for name in ("a-dies", "b-hangs", "c-right"):
        shutil.copytree(path, kit / name)
    monkeypatch.setattr(correctness, "check", hangs_or_dies)

    def check_all(clock: Clock) -> tuple[list[str], dict[str, Any]]:
        lines = correctness.check_all(kit, tmp_path, None, clock, 30.0)
        return lines, json.loads((tmp_path / "correctness.json").read_text())

    lines, found = check_all(Clock(300))
    assert [line.split(", ")[0] for line in lines] == ["a-dies: error", "b-hangs: timeout"]
    kinds = {row["artifact"]: (row["ok"], row["failure"]) for row in found["rows"]}
    assert kinds == {"a-dies": (False, "error"), "b-hangs": (False, "timeout"), "c-right": (True, "")}
    assert "illegal memory access" in found["rows"][0]["message"] and not found["complete"] and not found["left"]

    seen: list[str] = []

    def planted(label: str, limit_s: float, function: Any, *arguments: Any) -> tuple[Any, dict[str, str]]:
        seen.append(label)
        return hangs_or_dies(Path("right"), None), {}

    monkeypatch.setattr(pieces, "alone", planted)
    shutil.copytree(path, kit / "d-new")
    lines, found = check_all(Clock(300))
    assert not lines and seen == ["d-new", "a-dies", "b-hangs"] and found["complete"]  # what was not looked at first
    check_all(Clock(300))
    assert len(seen) == 3
    monkeypatch.setattr(pieces, "code_of", lambda entry, programs: "another build")
    late = Clock(300)
    late.end = time.monotonic() + 50  # of which nothing is begun
    lines, found = check_all(late)
    assert len(lines) == 1 and len(seen) == 3 and len(found["left"]) == 4 and not found["rows"]


def test_a_worker_ends_in_time_though_it_comes_late() -> None:
    """The time is over before there is a worker: it is ended all the same."""
    from gpu_bench.crew import alone

    start = time.monotonic()
    result, why = alone("sleeper", -1.0, time.sleep, 600)
    assert result is None and why["failure"] == "timeout" and time.monotonic() - start < 60


# ---- rounds


class Planted:
    """A worker in this process. behaviour(n): what its nth turn does; None makes a sample."""

    def __init__(self, label: str, log: list[str], ready: Any = None, behaviour: Callable[[int], Any] | None = None):
        self.label, self.log, self._ready, self._behaviour = label, log, ready, behaviour
        self.facts = {"device": "planted"}
        self.ended = threading.Event()
        self.turns = 0

    def interrupt(self) -> None:
        self.ended.set()

    def close(self) -> None:
        self.log.append(f"closed {self.label}")

    def hang(self) -> None:
        assert self.ended.wait(60)
        raise UserError(f"{self.label}: its process ended by SIGKILL")

    def ready(self) -> None:
        if self._ready == "hangs":
            self.hang()
        if self._ready is not None:
            raise UserError(self._ready)

    def turn(self, case: Case) -> Sample:
        self.log.append(self.label)
        self.turns += 1
        if self._behaviour is not None:
            self._behaviour(self.turns)
        if self.ended.is_set():
            raise UserError(f"{self.label}: its process ended by SIGKILL")
        return Sample(0.01, 0.02, ((1, 2, 3, 4, 5),) * case.batch)


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Workers by their label; `made` (label -> arguments of `Planted`) says how they behave."""
    from gpu_bench import runs

    state = SimpleNamespace(log=[], how={}, runs=runs)
    monkeypatch.setattr("gpt2_tvm.measure.timing.SETTLE_S", 0.0)

    def worker(entry: Any, device: str, cases: Any) -> Planted:
        return Planted(entry.label, state.log, **state.how.get(entry.label, {}))

    monkeypatch.setattr(runs.Entry, "worker", worker)
    return state


def entries(path: Path) -> list[Any]:
    from gpu_bench.runs import Entry

    return [Entry(path, "ours", "plain"), Entry(path, "torch", "eager"), Entry(path, "torch", "max-autotune")]


def part(state: Any, path: Path, results: Path, cases: list[Case], limit: float = 300.0, **changes: Any) -> Any:
    from gpu_bench.crew import Clock

    return state.runs.run_part("peers", [entries(path)], cases, 2, Clock(limit), "cpu", results, **changes)


def test_who_is_ready_is_measured_and_who_is_not_is_a_row(planted: Any, path: Path, tmp_path: Path) -> None:
    planted.how = {"torch max-autotune": {"ready": "hangs"}}
    found = part(planted, path, tmp_path, [CASE], limit=8.0)
    assert [row["engine"] for row in found["rows"]] == ["tiny-q0f32-full, plain", "torch eager"]
    (failure,) = found["failures"]
    assert (failure["engine"], failure["failure"]) == ("torch max-autotune", "timeout") and not found["complete"]
    planted.how = {}
    planted.log.clear()
    found = part(planted, path, tmp_path, [CASE, LATER])
    assert found["complete"] and len(found["rows"]) == 6 and not found["failures"]
    first = planted.log.index("closed torch eager")
    assert planted.log[:first].count("torch eager") == 3  # the untried case first, then all of the other again
    assert planted.log.count("tiny-q0f32-full, plain") == 6


def test_a_hang_in_the_rounds_takes_a_share_of_the_time(planted: Any, path: Path, tmp_path: Path) -> None:
    workers: list[Planted] = []
    planted.how = {"torch eager": {"behaviour": lambda n: workers[0].hang() if n == 2 else None}}
    make = planted.runs.Entry.worker

    def worker(entry: Any, device: str, cases: Any) -> Planted:
        made = make(entry, device, cases)
        if entry.how == "eager":
            workers.append(made)
        return made

    planted.runs.Entry.worker = worker  # the fixture takes it back
    found = part(planted, path, tmp_path, [CASE], limit=24.0)
    assert [row["engine"] for row in found["rows"]] == ["tiny-q0f32-full, plain", "torch max-autotune"]
    assert [row["failure"] for row in found["failures"]] == ["timeout"]


def test_a_case_that_was_cut_off_counts_for_nothing(planted: Any, path: Path, tmp_path: Path) -> None:
    def slow(n: int) -> None:
        time.sleep(2.0 if n > 2 else 0.0)

    planted.how = {"torch max-autotune": {"behaviour": slow}}
    found = part(planted, path, tmp_path, [CASE], limit=1.5)
    assert not found["rows"] and not found["complete"]
    assert {row["failure"] for row in found["failures"]} == {"timeout"}
    planted.how = {}
    found = part(planted, path, tmp_path, [CASE])
    assert found["complete"] and [row["repeats"] for row in found["rows"]] == [2, 2, 2]
    again = part(planted, path, tmp_path, [CASE])
    assert again["rows"] == found["rows"]


def test_rows_of_another_build_or_machine_are_measured_again(
    planted: Any, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = part(planted, path, tmp_path, [CASE])
    for name, changed in (("machine_key", lambda device: "another GPU"), ("code_of", lambda entry: "another build")):
        planted.log.clear()
        monkeypatch.setattr(planted.runs, name, changed)
        other = part(planted, path, tmp_path, [CASE])
        assert planted.log.count("torch eager") == 3 and len(other["rows"]) == 3 and other["complete"]
    assert {row["code"] for row in other["rows"]} == {"another build"} != {row["code"] for row in found["rows"]}


def test_nothing_is_begun_with_little_time_left(planted: Any, path: Path, tmp_path: Path) -> None:
    from gpu_bench.crew import Clock

    clock = Clock(450)
    clock.end = time.monotonic() + 55
    found = planted.runs.run_part("peers", [entries(path)], [CASE], 2, clock, "cpu", tmp_path)
    assert not planted.log and not found["complete"] and not found["failures"]


def test_weights_that_take_too_long_are_a_row(
    planted: Any, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planted.runs, "has_weights", lambda path: False)
    monkeypatch.setattr(planted.runs, "fill", endless)
    start = time.monotonic()
    found = part(planted, path, tmp_path, [CASE], limit=5.0)
    assert time.monotonic() - start < 60 and not found["rows"]
    assert {row["failure"] for row in found["failures"]} == {"timeout"}


def endless(path: Path) -> None:
    """In the place of `fill`."""
    time.sleep(600)


def test_a_model_that_is_missing_does_not_end_the_sizes(
    planted: Any, path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import gpu

    kit = path.parent.parent
    options = {"batch": "1", "prompt_tokens": 6, "generate": "5", "repeats": 2, "limit": 300.0, "device": "cpu"}
    with pytest.raises(UserError, match="gpt2-xl q0f32: no gpt2-xl q0f32 in"):
        gpu.sizes(kit, tmp_path, models="gpt2-xl,tiny", quantization="q0f32", modes="eager", then="", **options)
    assert "torch eager" in capsys.readouterr().out


# ---- subjects


def test_kernels_are_counted_at_the_batch_that_runs() -> None:
    from gpu_bench.subjects import count_kernels, kernels_a_token

    manifest = {"batch_sizes": [1, 4], "launches": {"greedy_b1": 63, "greedy_b4": 75, "prefill": 9}}
    assert [kernels_a_token(manifest, batch) for batch in (1, 3, 4)] == [63, 75, 75]

    def event(name: str, device: str) -> Any:
        return SimpleNamespace(name=name, device_type=SimpleNamespace(name=device))

    seen = [event("sgemm_128", "CUDA"), event("Memcpy DtoD", "CUDA"), event("cuLaunchKernel", "CPU")]
    assert count_kernels([*seen, event("triton_red", "CUDA")]) == 2


def test_torchs_prefill_looks_at_the_prompt_alone(path: Path) -> None:
    """The same logits with a cache of any capacity, and none of its slots past the prompt read."""
    from gpu_bench.torch_gpt2 import TorchGPT2

    ids = torch.arange(10).reshape(2, 5)
    with torch.inference_mode():
        model = TorchGPT2.load(open_artifact(path), 2, 30, torch.float32, "cpu")
        places = torch.arange(30)
        wanted = model(ids, places[:5])
        for block in model.h:
            block.keys[:, :, 5:] = torch.nan
        np.testing.assert_allclose(model.prefill(ids, places[:5]).numpy(), wanted.numpy(), atol=1e-5)
