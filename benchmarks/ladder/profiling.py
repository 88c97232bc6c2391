"""Where the time of a compiled model goes, by function, and what each unit of the machine would need for it."""

from __future__ import annotations

import re
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gpt2_tvm.expressions import evaluate
from ladder.assembly import hottest_loop
from ladder.counted import instructions
from ladder.kernels import compiled
from ladder.ports import Ports

DECODE_STEPS = 32  # of one turn
COUNTED_STEPS = 4  # under valgrind

Row = dict[str, Any]


def virtual_machine(engine: Any) -> Any:
    """TVM's virtual machine inside an engine, which has no public name: nothing but a profile needs it."""
    return engine.runner._vm


@contextmanager
def timed_calls(machine: Any) -> Iterator[dict[str, list[float]]]:
    """Seconds of every call that a virtual machine makes in the block, by the function's name."""
    times: dict[str, list[float]] = defaultdict(list)
    starts: list[float] = []

    def instrument(function: Any, name: str, before: bool, result: Any, *arguments: Any) -> None:
        if before:
            starts.append(time.perf_counter())
        else:
            times[name].append(time.perf_counter() - starts.pop())

    machine.set_instrument(instrument)
    try:
        yield times
    finally:
        machine.set_instrument(lambda *_: None)


def profile(engine: Any, machine: Any, what: str, prompt: list[int], repeats: int) -> tuple[list[Row], float]:
    """Functions of one prefill or decode step, slowest first, and the step's time without instruments, in us.

    A row has name, calls (a step), time_us (all its calls in a step, the median over repeats).
    """
    runs: list[dict[str, float]] = []
    whole: list[float] = []
    calls: dict[str, float] = {}
    steps = 1 if what == "prefill" else DECODE_STEPS
    for repeat in range(-1, repeats):  # the first is a warm-up
        for instrumented in (False, True):
            engine.reset()
            if what == "decode":
                engine.prefill(prompt)
            start = time.perf_counter()
            if instrumented:
                with timed_calls(machine) as times:
                    engine.prefill(prompt) if what == "prefill" else engine.decode_greedy(steps)
            else:
                engine.prefill(prompt) if what == "prefill" else engine.decode_greedy(steps)
                took = (time.perf_counter() - start) / steps
            if repeat >= 0 and instrumented:
                runs.append({name: sum(values) / steps * 1e6 for name, values in times.items()})
                calls = {name: len(values) / steps for name, values in times.items()}
            elif repeat >= 0:
                whole.append(took * 1e6)
    rows = [
        {"name": name, "calls": calls[name], "time_us": statistics.median(r.get(name, 0.0) for r in runs)}
        for name in calls
    ]
    return sorted(rows, key=lambda row: -row["time_us"]), statistics.median(whole)


def explain(
    row: Row, known: Row, scheduled: Any, target: Any, ports: Ports, sizes: dict[str, int], threads: int
) -> Row:
    """A row with its role, rates, inner loop, and the time that each unit would need alone, in us."""

    from gpt2_tvm.expressions import evaluate

    nbytes, flops = (evaluate(known[key], sizes) * row["calls"] for key in ("bytes", "flops"))
    text = compiled(scheduled, target).mod.inspect_source("asm")
    loop, _ = hottest_loop(text)
    alone = {"memory": nbytes / ports.read_gb_s / 1e3, "multiply-adds": flops / ports.fma_gflop_s / 1e3}
    if loop.flops:
        iterations = flops / loop.flops
        used = threads if "BackendParallelLaunch" in text else 1
        share = threads / used  # the rates are those of all threads
        alone["multiply-adds"] *= share
        alone["loads"] = iterations * loop.loads / ports.loads * 1e6 * share
        narrow = next((d for d in ports.converts if _reads(scheduled, d)), None)
        if loop.converts and narrow:
            alone["conversions"] = iterations * loop.converts / ports.converts[narrow] * 1e6 * share
        alone["chain"] = iterations * loop.chain * ports.latency_ns / 1e3 / used
    bound = max(alone, key=lambda unit: alone[unit])
    return {
        **row,
        "role": known["role"].rpartition(": ")[2],
        "rule": known["rule"],
        "gb_s": nbytes / row["time_us"] / 1e3,
        "gflop_s": flops / row["time_us"] / 1e3,
        "loop": loop.to_json(),
        "alone_us": alone,
        "bound": bound,
        "bound_share": alone[bound] / row["time_us"],
    }


def _reads(func: Any, dtype: str) -> bool:
    return any(str(getattr(p, "dtype", "")) == dtype for p in func.params)


def executed(artifact: Path, work: Path, manifest: Row, parts: Row, prompt: list[int]) -> Row:
    """Instructions that the top functions execute, beside what their hottest loops account for."""

    counts = instructions(artifact, work, prompt, COUNTED_STEPS)
    found: Row = {}
    for what, counted in counts.items():
        rows = []
        for row in parts[what]["functions"]:
            if not row["loop"]["chain"]:  # it does not accumulate: its FLOPs may be elsewhere
                continue
            names = [n for n in counted if re.fullmatch(rf"(?:__tvm_ffi_)?{row['name']}(?:_compute_)?", n)]
            total = max((counted[n] for n in names), default=0) / (COUNTED_STEPS if what == "decode" else 1)
            known = next(f for f in manifest["functions"] if f["name"] == row["name"])
            sizes = {"b": 1, "n": len(prompt) if what == "prefill" else 1, "p": 0 if what == "prefill" else len(prompt)}
            inner = evaluate(known["flops"], sizes) * row["calls"] / row["loop"]["flops"] * row["loop"]["instructions"]
            if total:
                rows.append({"role": row["role"], "instructions": total, "loop_share": inner / total})
        found[what] = rows
    return found
