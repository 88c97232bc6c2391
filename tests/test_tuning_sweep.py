"""Sweeps end to end: planted faults, interruption, lost workers, and real points on whatever WebGPU finds."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from commands import run_here
from planted_candidates import Planted, Vanishing, time_of
from test_tuning_records import HEADER
from test_tuning_space import workload

from gpt2_tvm.errors import UserError
from gpt2_tvm.schedules.gemv_config import GemvConfig
from targets import load_target
from tuning.records import Records, read_records
from tuning.search import Grid
from tuning.sweeping import Search, Sweep, WorkerSpec

STOCK = GemvConfig(4, 32, 1, 8)


def searches(configs: list[GemvConfig]) -> list[Search]:
    w = workload()
    return [Search(w, "planted", Grid(configs, w, load_target("h200"), None, 0), STOCK)]


def sweep(file: Path, configs: list[GemvConfig], workers: list[WorkerSpec], timeout_s: float = 3.0) -> Records:
    with Records(file) as records:
        records.open(HEADER)
        records.define([workload()])
        Sweep(records, searches(configs), workers, timeout_s, lambda search, point: None).run()
    return read_records(file)


def test_faults_are_reported_as_what_they_are(tmp_path: Path) -> None:
    configs = [GemvConfig(ts, 8, 2, 8) for ts in (2, 4, 8, 16, 32, 64, 128, 256)]
    log = tmp_path / "log"
    found = sweep(tmp_path / "r.jsonl", configs, [WorkerSpec("one", Planted, (str(log),), "d")])
    assert {p.config.ts: p.status for p in found if p.space == "planted"} == {
        **dict.fromkeys((2, 4, 8), "ok"),
        16: "compile-error",
        32: "timeout",
        64: "crash",
        128: "wrong-result",
        256: "invalid",
    }
    assert found.ok(workload().name)[0].config.ts == 4
    assert found.stock(workload().name).config == STOCK
    details = {p.config.ts: p.detail for p in found}
    assert "the compiler says no" in details[16] and "SIGABRT" in details[64]
    again = sweep(tmp_path / "r.jsonl", configs, [WorkerSpec("one", Planted, (str(log),), "d")])
    assert len(again.points) == len(found.points) == len(log.read_text().splitlines()), "nothing is measured twice"


def test_workers_share_the_points_and_a_lost_one_gives_its_point_back(tmp_path: Path) -> None:
    configs = [GemvConfig(ts, tr, 2, 8) for ts in (1, 2, 4, 8) for tr in (4, 8, 16)]
    workers = [
        WorkerSpec("stays", Planted, (str(tmp_path / "a"), 0.1), "a"),
        WorkerSpec("goes", Vanishing, (str(tmp_path / "b"),), "b"),
    ]
    found = sweep(tmp_path / "r.jsonl", configs, workers)
    assert {p.config for p in found} == {*configs, STOCK} and all(p.ok for p in found)
    by = [p.extra["worker"] for p in found]
    assert by.count("goes") == 1 and by.count("stays") == len(configs)


def test_when_every_worker_is_lost_the_sweep_says_so(tmp_path: Path) -> None:
    configs = [GemvConfig(ts, 8, 2, 8) for ts in (1, 2, 4, 8)]
    with pytest.raises(UserError, match=r"every worker was lost.*the plug was pulled.*go on"):
        sweep(tmp_path / "r.jsonl", configs, [WorkerSpec("goes", Vanishing, (str(tmp_path / "b"),), "b")])
    assert len(read_records(tmp_path / "r.jsonl").points) == 1


SCRIPT = """
import sys
sys.path[:0] = sys.argv[3:]
from pathlib import Path
from gpt2_tvm.schedules.gemv_config import GemvConfig
from planted_candidates import Planted
from test_tuning_sweep import sweep
from tuning.sweeping import WorkerSpec
configs = [GemvConfig(ts, tr, 2, 8) for ts in (1, 2, 4, 8) for tr in (1, 2, 4, 8)]
if __name__ == "__main__":
    sweep(Path(sys.argv[1]), configs, [WorkerSpec("one", Planted, (sys.argv[2], 0.2), "d")])
"""


def test_kill_9_loses_at_most_the_point_in_flight(tmp_path: Path) -> None:
    script, file, log = tmp_path / "run.py", tmp_path / "r.jsonl", tmp_path / "log"
    script.write_text(SCRIPT)
    tests = Path(__file__).parent
    command = [sys.executable, str(script), str(file), str(log), str(tests), str(tests.parent)]
    first = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and (not file.exists() or len(file.read_bytes().splitlines()) < 7):
        time.sleep(0.02)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    done = len(read_records(file).points)
    assert 5 <= done < 17
    subprocess.run(command, check=True, timeout=120)
    found = read_records(file)
    assert len(found.points) == 17 and found.ok(workload().name)[0].time_us == min(
        time_of(c) for c in (GemvConfig(4, 8, 2, 8),)
    )
    assert len(log.read_text().splitlines()) in (17, 18), "the point in flight, and no other, ran twice"


# -- on a device ---------------------------------------------------------------------------------------------


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        capture_output=True,
        text=True,
        timeout=500,
        cwd=Path(__file__).parent.parent,
    )


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from wgsl_harness import device

    device()
    file = tmp_path_factory.mktemp("sweep") / "r.jsonl"
    arguments = ("--model", "bundled", "--target", "webgpu", "--workload", "attn.c_proj", "--budget", "0.02")
    done = command("tuning.sweep", *arguments, "--trials", "6", "--records", str(file))
    assert done.returncode == 0, done.stderr
    assert "attn.c_proj 256x256 float32" in done.stdout and "software device" in done.stdout
    return file


def test_a_sweep_of_the_bundled_model(swept: Path) -> None:
    found = read_records(swept)
    (w,) = found.workloads.values()
    assert (w.outputs, w.reduced, w.calls, w.epilogue) == (256, 256, 6, ("bias", "residual"))
    assert len(found.ok(w.name)) >= 10 and found.stock(w.name).ok
    for p in found.ok(w.name):
        assert p.extra["error"] < 1e-4 and p.gb_s == pytest.approx(w.bytes / p.time_us / 1e3)
    assert found.header["launch_floor_us"] > 0


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("quantization", "dtype", "lanes"), [("q8f32", "int8", 4), ("q16f32", "float16", 2), ("q4f32_1", "int4", 8)]
)
def test_products_of_packed_weights_are_checked_and_timed(quantization: str, dtype: str, lanes: int) -> None:
    """Weights in words of 32 bits, against their values in float64."""
    from wgsl_harness import device

    from tuning.candidates.sampling import Budget
    from tuning.candidates.webgpu import WebgpuCandidates
    from tuning.sweep_setup import Setup

    device()
    setup = Setup.make("bundled", "webgpu", quantization, 1, "attn.c_proj,mlp.c_fc", "schedule2", "random", 3, 0)
    backend = WebgpuCandidates(lambda *_: None, "webgpu", setup.tasks, Budget(0.01))
    assert len(setup.searches) == 2
    for search in setup.searches:
        assert search.workload.dtype == dtype
        results: dict[GemvConfig, float | None] = {}
        while (config := search.strategy.ask(results, set())) is not None:
            assert config.tile_r % lanes == 0
            backend.build(search.workload.name, config)
            value = backend.run(search.workload.name, config)
            assert 0 < value["error"] < 1e-4
            results[config] = value["time_us"]
        assert len(results) == 3


def test_heatmaps_of_it(swept: Path, tmp_path: Path) -> None:
    done = command("tuning.heatmap", str(swept), "--output", str(tmp_path), "--measure", "gain")
    assert done.returncode == 0, done.stderr
    assert "Best: TS=" in done.stdout  # how much a parameter explains is not said where noise explains it all
    names = {f.name for f in tmp_path.iterdir()}
    assert names == {"index.html", *(f"attn.c_proj-256x256-float32.{form}" for form in ("png", "svg"))}
    page = (tmp_path / "index.html").read_text()
    assert "http" not in page.replace("http://www.w3.org/2000/svg", "").replace("http-equiv", "")


def test_apply_and_compile_with_it(swept: Path, tmp_path: Path) -> None:
    from gpt2_tvm.artifact import read_manifest
    from gpt2_tvm.engine import Engine

    file = tmp_path / "tuned.toml"
    done = command("tuning.apply", str(swept), "--unchecked", "--output", str(file))
    if done.returncode and "no point" in done.stderr:
        pytest.skip("the software device was too noisy for a clear winner")
    assert done.returncode == 0, done.stderr
    artifact = tmp_path / "artifact"
    options = ("--tuned", str(file), "--verify-widths", "", "--output", str(artifact))
    done = command("gpt2_tvm.compile", "--model", "bundled", "--target", "webgpu", *options)
    assert done.returncode == 0, done.stderr
    manifest = read_manifest(artifact)
    rules = {row["name"]: row["rule"] for row in manifest["functions"] if "attn.c_proj" in row["role"]}
    assert "tuned-gemv" in rules.values()
    assert json.dumps(manifest["tuned"]).count('"TS"') == 1
    logits = Engine(artifact).prefill([1, 2, 3])
    assert logits.shape[-1] == 2048


def test_bad_choices_are_one_line() -> None:
    for arguments, word in [
        (("--target", "cpu"), "for GPUs"),
        (("--space", "schedule9"), "unknown space"),
        (("--strategy", "luck"), "unknown strategy"),
        (("--objective", "beauty"), "unknown objective"),
        (("--target", "webgpu", "--workload", "nothing"), "names none of"),
        (
            (
                "--target",
                "metal",
            ),
            "cannot be timed",
        ),
        (("--target", "webgpu", "--tracker", "127.0.0.1:1"), "belong together"),
        (("--target", "webgpu", "--tracker", "127.0.0.1:1", "--key", "k"), "no RPC tracker answers"),
    ]:
        done = run_here("tuning.sweep", "--model", "bundled", *arguments)
        assert done.returncode != 0 and word in done.stderr, (arguments, done.stderr)
        assert "Traceback" not in done.stderr
        assert len([line for line in done.stderr.splitlines() if line.startswith("error:")]) == 1
