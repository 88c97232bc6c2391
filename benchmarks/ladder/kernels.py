"""The ladder of one matrix product: every step built, compared with numpy, and then timed in interleaved rounds."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import tvm

from gpt2_tvm.kernels.packed_linear import pack
from gpt2_tvm.measure.loops import fma_loop, read_loop
from ladder import gemv, loops, matmul
from ladder.assembly import Loop, hottest_loop
from ladder.problem import Problem
from ladder.shipped import build_layer
from ladder.steps import KERNEL_STEPS, SCHEMES, Step

COLD_BYTES = (
    192 << 20
)  # of copies of one weight, beyond any L3: in a model a layer's weight is cold when its turn comes
TURN_S = 0.12  # of calls in one turn
SLOW_S = 0.5  # a step whose one call takes longer has SLOW_ROUNDS turns
SLOW_ROUNDS = 3
TOLERANCE = 1e-5  # largest difference to numpy with the same stored weights, as a share of the largest value

Say = Callable[[str], Any]


@dataclass
class Built:
    """A step of one problem, ready to run. call(i): on the i-th copy of the weight, modulo their number."""

    step: Step
    call: Callable[[int], Any]
    result: Callable[[], np.ndarray]
    weight_bytes: int
    loop: Loop
    code: list[str]  # of the loop
    values: np.ndarray  # the weight that it stores, as float32 [n, k]
    error: float = 0.0  # to numpy with these weights
    rounding: float = 0.0  # to numpy with the weights before they were stored; both as shares of the largest value
    first_s: float = 0.0
    times: list[float] = field(default_factory=list)  # seconds a call, one a round


@dataclass
class Case:
    """One problem with its steps. rates: the bounds', a round each."""

    problem: Problem
    steps: list[Built] = field(default_factory=list)
    rates: dict[str, list[float]] = field(default_factory=dict)


def compiled(func: Any, target: Any) -> Any:
    """A scheduled PrimFunc as an executable with one function, `main`."""
    return tvm.compile(tvm.IRModule({"main": func.with_attr("global_symbol", "main")}), target=target.tvm_target())


def build_case(problem: Problem, say: Say, keys: Sequence[str] | None = None) -> Case:
    """All steps (or those of `keys`), each compared with numpy; RuntimeError names one that is wrong."""
    case, data = Case(problem), problem.data()
    expected = problem.expected(data)
    largest = float(np.abs(expected).max())
    stores: dict[str, list[Any]] = {}

    def copies(layout: str, array: Callable[[], np.ndarray]) -> list[Any]:
        if layout not in stores:
            stored = array()
            stores[layout] = [tvm.runtime.tensor(stored) for _ in range(max(2, -(-COLD_BYTES // stored.nbytes)))]
        return stores[layout]

    for step in KERNEL_STEPS:
        if keys is not None and step.key not in keys:
            continue
        say(f"{problem.name}: building step {step.number}, {step.title}")
        build = _shipped_step if step.key in SCHEMES else _own_step
        built = build(problem, step, data, copies)
        built.call(0)
        result = built.result()
        same = expected if built.values is data["weight"] else problem.expected(data, built.values)
        built.error, built.rounding = (float(np.abs(result - y).max()) / largest for y in (same, expected))
        if not built.error <= TOLERANCE:  # also fails on NaN
            raise RuntimeError(f"{problem.name}, {step.title}: differs from numpy by {built.error:.1e} of the largest")
        built.values = np.empty(0)  # of a head it is 150 MB
        case.steps.append(built)
    return case


Copies = Callable[[str, Callable[[], np.ndarray]], list[Any]]


def _own_step(p: Problem, step: Step, data: dict[str, np.ndarray], copies: Copies) -> Built:
    """Steps 0 to 5: the product, then bias and GELU in a function of their own."""
    tiled = matmul if p.rows > 1 else gemv
    makers: dict[str, Callable[[Problem], Any]] = {
        "naive": loops.naive,
        "vectors": loops.vectors,
        "parallel": loops.parallel,
        "panels": tiled.panels,
        "registers": matmul.register_tile if p.rows > 1 else gemv.accumulators,
        "blocks": matmul.cache_blocks if p.rows > 1 else gemv.streams,
    }
    packed = step.number >= 3
    weights = (
        copies("panels", lambda: pack(data["weight"], p.panel_rows))
        if packed
        else copies("rows", lambda: data["weight"])
    )
    executable = compiled(makers[step.key](p), p.target)
    product = executable["main"]
    x, bias = tvm.runtime.tensor(data["x"]), tvm.runtime.tensor(data["bias"])
    y = tvm.runtime.tensor(np.full((p.rows, p.columns), np.nan, np.float32))  # what is not written shows
    epilogue = compiled(loops.bias_gelu(p, step.number >= 2), p.target)["main"] if p.gelu else None

    def call(i: int) -> None:
        product(x, weights[i % len(weights)], y)
        if epilogue is not None:
            epilogue(y, bias)

    loop, code = hottest_loop(executable.mod.inspect_source("asm"))
    return Built(step, call, lambda: y.numpy()[:, : p.n], weights[0].numpy().nbytes, loop, code, data["weight"])


def _shipped_step(p: Problem, step: Step, data: dict[str, np.ndarray], copies: Copies) -> Built:
    """Steps 6 to 8: the project's layer, in one function."""
    layer = build_layer(p, SCHEMES[step.key], data)
    weights = copies(step.key if step.key != "fused" else "panels", lambda: layer.stored["weight"])
    given = [None if name == "weight" else tvm.runtime.tensor(layer.stored[name]) for name in layer.arguments[1:]]
    place = 1 + layer.arguments[1:].index("weight")
    x = tvm.runtime.tensor(data["x"][None])
    y = tvm.runtime.tensor(np.full((1, p.rows, p.n), np.nan, np.float32))
    function = layer.executable["main"]
    calls = [(x, *given, y) for _ in weights]
    calls = [(*c[:place], w, *c[place + 1 :]) for c, w in zip(calls, weights, strict=True)]
    loop, code = hottest_loop(layer.executable.mod.inspect_source("asm"))
    nbytes = sum(a.nbytes for name, a in layer.stored.items() if name != "bias")
    return Built(
        step, lambda i: function(*calls[i % len(calls)]), lambda: y.numpy()[0], nbytes, loop, code, layer.values
    )


def measure(cases: Sequence[Case], repeats: int, threads: int, say: Say) -> None:
    """Fill in times and bounds: in each round every step of every case has a turn, and the bounds one for each case."""
    target = cases[0].problem.target
    read, fma = read_loop(threads, target=target), fma_loop(threads, target=target)
    for round_ in range(-1, repeats):  # the first is a warm-up, and says how long a call takes
        say(f"kernels: round {round_ + 1} of {repeats}" if round_ >= 0 else "kernels: warm-up")
        for case in cases:
            rates = {"read_gb_s": read.rate(), "fma_gflop_s": fma.rate()}
            for name, rate in rates.items():
                case.rates.setdefault(name, []).extend([rate] if round_ >= 0 else [])
            for built in case.steps:
                if round_ < 0:
                    built.first_s = seconds(partial(built.call, 1))
                elif built.first_s <= SLOW_S or round_ < SLOW_ROUNDS:
                    built.times.append(_turn(built))


def seconds(call: Callable[[], Any]) -> float:
    """Of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _turn(built: Built) -> float:
    """Seconds a call, the mean over a turn."""
    if built.first_s <= TURN_S:
        built.call(0)  # wakes the threads
    count = max(1, min(1000, int(TURN_S / built.first_s)))
    start = time.perf_counter()
    for i in range(1, count + 1):
        built.call(i)
    return (time.perf_counter() - start) / count


def spread(values: Sequence[float]) -> float:
    """Standard deviation; 0 for a single value."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def summarise(key: str, values: Sequence[float]) -> dict[str, float]:
    """{key: median, key_sd: standard deviation}"""
    return {key: statistics.median(values), f"{key}_sd": spread(values)}


def ratios(over: Sequence[float], under: Sequence[float]) -> list[float]:
    """over / under, round by round."""
    return [a / b for a, b in zip(over, under, strict=False)]


def case_record(case: Case) -> dict[str, Any]:
    """One case of the record: rates in GB/s of weights as stored and GFLOP/s of the product, `gain` over the step
    before and `total_gain` over the first, all medians over rounds."""
    p = case.problem
    memory_bound = p.rows == 1
    rows: list[dict[str, Any]] = []
    before: list[float] | None = None
    for step in KERNEL_STEPS:
        built = next((b for b in case.steps if b.step == step), None)
        if built is None:
            continue
        bound = case.rates["read_gb_s" if memory_bound else "fma_gflop_s"]
        work = (built.weight_bytes if memory_bound else p.flops) / 1e9
        first = case.steps[0].times
        rows.append(
            {
                "step": step.number,
                "key": step.key,
                "error": built.error,
                "rounding": built.rounding,
                "rounds": len(built.times),
                "weight_bytes": built.weight_bytes,
                **summarise("time_us", [t * 1e6 for t in built.times]),
                **summarise("gb_s", [built.weight_bytes / t / 1e9 for t in built.times]),
                **summarise("gflop_s", [p.flops / t / 1e9 for t in built.times]),
                **summarise("bound_share", [work / t / b for t, b in zip(built.times, bound, strict=False)]),
                **summarise("gain", ratios(before or built.times, built.times)),
                **summarise("total_gain", ratios(first, built.times)),
                "loop": built.loop.to_json(),
            }
        )
        before = built.times
    bounds = {k: v for name, values in case.rates.items() for k, v in summarise(name, values).items()}
    shape = {"rows": p.rows, "k": p.k, "n": p.n, "gelu": p.gelu, "bound": "read" if memory_bound else "fma"}
    return {"name": p.name, **shape, **bounds, "steps": rows}
