"""The CPU engine as a guest on a machine: threads, memory, what loading touches, and the bounds it is held against.

Nothing here asserts how long something takes. What a process used of the processors' time is its own, whatever else
runs, and is asserted with a wide margin.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gpt2_tvm.artifact import Artifact, open_artifact
from gpt2_tvm.engine import Engine
from gpt2_tvm.errors import UserError
from gpt2_tvm.measure import bounds, loops, machine
from gpt2_tvm.measure.cases import Case
from gpt2_tvm.runners import make_runner, threads
from gpt2_tvm.tensor_cache import ALIGNMENT

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
PROMPT = [5, 3, 8, 2, 9]


def in_child(code: str, *arguments: object, **environment: str) -> Any:
    """The JSON that a script prints in a fresh interpreter. Our own settings of TVM's pool are not passed on."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("TVM_NUM", "TVM_THREAD", "TVM_BIND"))}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env={**clean, **environment}, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def in_thread(call: Callable[[], Any]) -> Any:
    """`call()` on a thread that has no pool yet; its exception is raised here."""
    result: list[Any] = []

    def run() -> None:
        try:
            result.append(call())
        except UserError as error:
            result.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if isinstance(result[0], UserError):
        raise result[0]
    return result[0]


# How many threads ------------------------------------------------------------------------------------------------


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A machine of 4 cores with 2 hyper-threads each, processors k and k + 4 sharing one."""
    for processor in range(8):
        topology = tmp_path / f"sys/devices/system/cpu/cpu{processor}/topology"
        topology.mkdir(parents=True)
        (topology / "thread_siblings_list").write_text(f"{processor % 4},{processor % 4 + 4}\n")
    (tmp_path / "proc/self").mkdir(parents=True)
    return tmp_path


@pytest.fixture
def may_use(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    def allow(*processors: int) -> None:
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(processors), raising=False)

    yield allow


def test_a_thread_for_each_core_that_this_process_may_use(root: Path, may_use: Callable[..., None]) -> None:
    for processors, cores in ((range(8), 4), ((0, 4), 1), ((0, 1, 4, 5), 2), ((3,), 1), ((0, 1, 2, 7), 4)):
        may_use(*processors)
        assert threads.physical_cores(root) == cores, processors


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.mark.parametrize(
    ("groups", "files", "quota"),
    [
        ("0::/\n", {"cpu.max": "150000 100000\n"}, 1.5),  # in a container, version 2
        ("0::/a/b\n", {"a/cpu.max": "200000 100000", "a/b/cpu.max": "max 100000"}, 2),  # a limit on the group above
        ("0::/a\n", {"a/cpu.max": "max 100000\n"}, None),
        ("4:cpu,cpuacct:/d\n0::/\n", {"cpu/d/cpu.cfs_quota_us": "50000", "cpu/d/cpu.cfs_period_us": "100000"}, 0.5),
        ("4:cpu:/host/d\n", {"cpu/cpu.cfs_quota_us": "300000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 3),
        ("4:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
        ("9:memory:/x\n", {}, None),
        ("0::/\n", {"cpu.max": "nonsense"}, None),
    ],
)
def test_a_container_s_quota_counts(
    root: Path, may_use: Callable[..., None], groups: str, files: dict[str, str], quota: float | None
) -> None:
    write(root / "proc/self/cgroup", groups)
    for name, text in files.items():
        write(root / "sys/fs/cgroup" / name, text)
    assert threads.cpu_quota(root) == quota
    may_use(*range(8))
    assert threads.physical_cores(root) == (4 if quota is None else -int(-quota // 1))


def test_the_number_that_the_user_set_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TVM_NUM_THREADS", "3")
    assert threads.check_threads(None) == 3 and threads.check_threads(2) == 2
    for text in ("0", "two", "-1", ""):
        monkeypatch.setenv("TVM_NUM_THREADS", text)
        with pytest.raises(UserError, match="TVM_NUM_THREADS="):
            threads.check_threads(None)
    with pytest.raises(UserError, match="--threads 0"):
        threads.check_threads(0)


def pool_size() -> int:
    import tvm_ffi

    return int(tvm_ffi.get_global_func("runtime.NumThreads")())


def test_engines_with_other_numbers_of_threads_take_turns(tiny_artifact: Path) -> None:
    """The pool is the calling thread's, and follows whichever engine is called; the numbers do not change."""

    def turns() -> list[np.ndarray]:
        one, two = Engine(tiny_artifact, threads=1), Engine(tiny_artifact, threads=2)
        assert (one.threads, two.threads) == (1, 2)
        found = []
        for engine in (one, two, one, two):
            engine.reset()
            found += [engine.prefill(PROMPT), engine.decode(7)]
            assert pool_size() == engine.threads
        return found

    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setenv("TVM_NUM_THREADS", "2")  # a pool grows back to its first size: on one core it would be 1
    try:
        first, second, *others = in_thread(turns)
    finally:
        monkeypatch.undo()
    for i, logits in enumerate(others):
        assert np.array_equal(logits, (first, second)[i % 2])


def test_a_pool_that_cannot_grow_is_said_so(tiny_artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TVM_NUM_THREADS", "2")

    def too_many() -> None:
        assert Engine(tiny_artifact).threads == 2
        Engine(tiny_artifact, threads=3)

    with pytest.raises(UserError, match=r"--threads 3: TVM already runs 2 .* TVM_NUM_THREADS=3"):
        in_thread(too_many)
    assert in_thread(lambda: Engine(tiny_artifact, threads=3).threads) == 3  # a new thread's pool begins with 3


def test_threads_are_a_cpu_s(tmp_path: Path) -> None:
    for kind in ("cuda", "webgpu"):
        with pytest.raises(UserError, match=f"--threads 2: .* runs on {kind}, not on the CPU"):
            make_runner(Artifact(tmp_path, {"target": {"kind": kind}}), None, 2)


@pytest.mark.heavy
def test_commands_take_and_record_threads(tiny_artifact: Path, tmp_path: Path) -> None:
    file = tmp_path / "g.json"
    options = ["--prompt-ids", "1,2,3", "--max-tokens", "4", "--threads", "1", "--json", str(file)]
    subprocess.run([sys.executable, "-m", "gpt2_tvm.generate", str(tiny_artifact), *options], check=True)
    assert json.loads(file.read_text())["threads"] == 1
    sizes = ["--prompt-tokens", "4", "--generate", "4", "--repeats", "1", "--threads", "1", "--json", str(file)]
    subprocess.run([sys.executable, "-m", "gpt2_tvm.benchmark", str(tiny_artifact), *sizes], check=True)
    result = json.loads(file.read_text())
    (row,) = result["rows"]
    assert row["threads"] == 1 and row["load_seconds"] > 0
    read, fma = result["bounds"]
    assert "1 thread " in read["source"] and "1 thread " in fma["source"]
    assert row["bound_gb_s"] == read["gb_s"] and row["bound_gflop_s"] == fma["gflop_s"]
    refused = [sys.executable, "-m", "gpt2_tvm.benchmark", str(tiny_artifact), "--threads", "0"]
    done = subprocess.run(refused, capture_output=True, text=True)
    assert done.returncode == 1 and "--threads 0" in done.stderr and len(done.stderr.splitlines()) == 1


# What the pool does between its tasks ----------------------------------------------------------------------------

IDLE = """
import json, os, sys, time
from pathlib import Path
if sys.argv[2]:
    os.sched_setaffinity(0, {int(sys.argv[2])})
from gpt2_tvm.engine import Engine
engine = Engine(sys.argv[1], verify=False, threads=int(sys.argv[3]) or None)
engine.prefill(list(range(64)))
engine.decode_greedy(16)
tasks = [int(p.name) for p in Path("/proc/self/task").iterdir()]
others = [Path(f"/proc/self/task/{t}") for t in tasks if t != os.getpid()]
def awake():  # how many run, or wait for a processor
    return sum((t / "stat").read_text().rpartition(")")[2].split()[0] == "R" for t in others)
def used():  # seconds of processors
    return sum(int((t / "schedstat").read_text().split()[0]) for t in others) / 1e9
before, end = used(), time.monotonic() + 120
# asking, a worker yields its core: on a busy machine it takes its time, but no more of the processors'
while awake() and time.monotonic() < end:
    time.sleep(0.01)
affinities = [sorted(os.sched_getaffinity(task)) for task in tasks]
found = {"used": used() - before, "awake": awake(), "threads": engine.threads, "affinities": affinities}
print(json.dumps(found))
"""


@linux
def test_workers_sleep_after_their_work_and_are_not_pinned(bundled_artifact: Path) -> None:
    """TVM's own default keeps a core busy for 0.13 s after the last task, and pins each worker to one processor."""
    found = in_child(IDLE, bundled_artifact, "", 2)
    assert found["threads"] == 2 and len(found["affinities"]) >= 2
    assert found["awake"] == 0 and found["used"] < 0.05
    assert all(affinity == sorted(os.sched_getaffinity(0)) for affinity in found["affinities"])


@linux
def test_an_engine_stays_on_the_processors_it_was_given(bundled_artifact: Path) -> None:
    """As under `taskset`: one thread by default, and two on request share the processor."""
    processor = max(os.sched_getaffinity(0))
    for asked, runs in ((0, 1), (2, 2)):
        found = in_child(IDLE, bundled_artifact, processor, asked)
        assert found["threads"] == runs and all(affinity == [processor] for affinity in found["affinities"])


# Loading and memory ----------------------------------------------------------------------------------------------


def mapped_files() -> list[tuple[int, int, str, int, str]]:
    """(start, end, permissions, offset in the file, path) of this process's mappings."""
    found = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, permissions, offset, _, _, *path = line.split(maxsplit=5)
        start, end = (int(x, 16) for x in span.split("-"))
        found.append((start, end, permissions, int(offset, 16), path[0] if path else ""))
    return found


@linux
def test_parameters_are_the_mapped_files_themselves(bundled_artifact: Path) -> None:
    """Nothing is copied or repacked: every parameter's data is where the file is mapped, aligned, at its own offset,
    in private pages (a write would not reach the file)."""
    engine = Engine(bundled_artifact)
    records = dict(located(engine.artifact))
    names = engine.artifact.manifest["params"]
    tensors = list(engine.runner._params)  # type: ignore[attr-defined]
    assert len(names) == len(tensors) == len(records)
    maps = mapped_files()
    for name, tensor in zip(names, tensors, strict=True):
        shard, offset, nbytes = records[name]
        pointer = np.from_dlpack(tensor).ctypes.data
        assert pointer % ALIGNMENT == 0, name
        start, _, permissions, at, _ = next(
            m for m in maps if m[0] <= pointer and pointer + nbytes <= m[1] and m[4] == str(shard.resolve())
        )
        assert permissions.endswith("p") and pointer - start + at == offset, name


def located(artifact: Artifact) -> Iterator[tuple[str, tuple[Path, int, int]]]:
    """Each parameter's shard, offset and bytes, as the index has them."""
    index = json.loads((artifact.params / "tensor-cache.json").read_text())
    for shard in index["records"]:
        for record in shard["records"]:
            place = (artifact.params / shard["dataPath"], record["byteOffset"], record["nbytes"])
            yield record["name"], place


MEMORY = """
import json, sys
from pathlib import Path
import numpy, psutil, tvm
def peak():
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what there is
bare = psutil.Process().memory_info().rss
from gpt2_tvm.engine import Engine
engine = Engine(sys.argv[1])
ids = numpy.arange(322) % engine.config.vocab_size
loaded = peak()
engine.prefill(ids)
for token in range(8):
    engine.decode(token)
engine.decode_greedy(32)
c = engine.config
cache = 2 * 4 * c.n_layer * engine.max_seq_len * c.n_embd
weights = sum(f.stat().st_size for f in engine.artifact.params.glob("*.bin"))
print(json.dumps({"bare": bare, "loaded": loaded, "peak": peak(), "weights": weights, "cache": cache}))
"""
OVERHEAD_MB = 50


def check_memory(artifact: Path) -> None:
    found = in_child(MEMORY, artifact)
    rest = (found["peak"] - found["bare"] - found["weights"] - found["cache"]) / 1e6
    assert rest <= OVERHEAD_MB, found
    assert found["loaded"] - found["bare"] <= OVERHEAD_MB * 1e6, found  # a map costs nothing until it is read


@linux
def test_memory_is_weights_cache_and_little_more(bundled_artifact: Path) -> None:
    check_memory(bundled_artifact)


@linux
@pytest.mark.heavy
def test_memory_of_gpt2_124m(tmp_path: Path) -> None:
    from gpt2_tvm.build import compile_model

    check_memory(compile_model("gpt2", "cpu", output=tmp_path / "gpt2", verify_widths=()))


UNUSED = """
import json, sys
import psutil
from gpt2_tvm.engine import Engine
engine = Engine(sys.argv[1])
engine.prefill([1])  # everything else exists from here on
before = psutil.Process().memory_info().rss
cache = engine.runner.empty((64, 1 << 20), "float32")
made = psutil.Process().memory_info().rss
print(json.dumps({"grown": made - before, "zero": not engine.runner.download(cache).any()}))
"""


@linux
def test_a_cache_takes_memory_as_it_fills(tiny_artifact: Path) -> None:
    """256 MiB of zeros, of which nothing is resident until it is used."""
    found = in_child(UNUSED, tiny_artifact)
    assert found["grown"] < 16 << 20 and found["zero"]


# Bounds ----------------------------------------------------------------------------------------------------------


def test_the_machine_s_bounds_are_measured() -> None:
    """The loops themselves check what they computed (`measure.loops`)."""
    assert in_thread(lambda: bounds.measure_read_bandwidth(1, repeats=2, nbytes=8 << 20)) > 0
    loop = in_thread(lambda: loops.fma_loop(1, steps=1000))
    lanes = loop.amount / (2 * loops.FMA_ROWS * 2 * 1000)
    assert lanes in (4, 8, 16) and np.isfinite(in_thread(loop.rate))


def test_probes_are_summed_up_in_medians() -> None:
    found = machine.MachineBounds({"read": "r", "fma": "f"})
    assert found.bounds() == bounds.Bounds()
    found.probes += [machine.Probe(10.0, 100.0), machine.Probe(30.0, 300.0), machine.Probe(20.0, 110.0)]
    made = found.bounds()
    assert made.bandwidth == bounds.Bandwidth(20, "measured: r, median of 3", 10)
    assert made.arithmetic is not None and made.arithmetic.gflop_s == 110
    found.probes[:] = [machine.Probe(10.0, None)]
    assert found.bounds() == bounds.Bounds(bounds.Bandwidth(10, "measured: r, median of 1"))


WITHOUT_COMPILER = """
import json
from gpt2_tvm.measure.machine import MachineSubject
subject = MachineSubject(1, 8 << 20)
probe = subject.turn()
print(json.dumps({"read": probe.read_gb_s, "fma": probe.fma_gflop_s, "by": subject.facts["read"]}))
"""


def test_without_a_compiler_numpy_reads_and_it_says_so() -> None:
    found = in_child(WITHOUT_COMPILER, TVM_USE_RUNTIME_LIB="1")
    assert found["read"] > 0 and found["fma"] is None and "numpy, as TVM's compiler is not here" in found["by"]


def test_operations_of_a_prefill(bundled_artifact: Path) -> None:
    """What the formula counts is what the compiled functions say they do, their epilogues and norms left out."""
    from gpt2_tvm.expressions import evaluate

    artifact = open_artifact(bundled_artifact)
    case = Case(3, 100, 1)
    counted = 0
    for row in artifact.manifest["functions"]:
        if "prefill" in row["calls"] and ("matmul" in row["name"] or "attention" in row["name"]):
            counted += row["calls"]["prefill"] * evaluate(row["flops"], {"b": 3, "n": 100, "p": 0})
    formula = bounds.prefill_flops(artifact.config, case)
    assert formula <= counted <= 1.05 * formula
