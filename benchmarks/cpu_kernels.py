"""GPT-2's matrix products on this CPU, each beside the machine's own bound and beside torch, in one run.

    python benchmarks/cpu_kernels.py [--rows 1,4,12] [--prompt-tokens 322] [--quantization q0f32,q16f32,q8f32]
        [--repeats 9] [--json FILE]

Few rows of x are bound by reading the weight: GB/s, and the share of what a loop reaches that only adds up memory. Many
rows are bound by multiply-adds: GFLOP/s, and the share of what a loop of multiply-adds on registers alone reaches; the
bound shown is the nearer one. Both loops are TVM's, on as many threads as everything else. torch has float32 weights
where a scheme computes in float32. Weights are cold: there are more copies of each than the caches
hold, as in a model whose layers follow one another. All take turns within a repeat, so that a slow moment of the
machine hits all alike, with a pause before each turn: pools of threads spin for a while after their last work, on cores
that the next engine needs. Figures are medians.
"""

# TVMScript is parsed by TVM, not executed: its annotations mean nothing to a type checker.
# mypy: disable-error-code="no-untyped-def,valid-type"

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from gpt2_tvm.cli import run, write_json
from gpt2_tvm.measure import loops
from gpt2_tvm.measure.timing import SETTLE_S

app = typer.Typer(add_completion=False, rich_markup_mode=None)

COLD_BYTES = 192 << 20  # of copies of one weight: beyond any L3


@dataclass(frozen=True)
class Layer:
    """One linear layer: name, K, N, and what follows the product."""

    name: str
    k: int
    n: int
    activation: str | None = None
    residual: bool = False
    bias: bool = True


LAYERS = (
    Layer("attn.c_attn", 768, 2304),
    Layer("attn.c_proj", 768, 768, residual=True),
    Layer("mlp.c_fc", 768, 3072, activation="gelu_new"),
    Layer("mlp.c_proj", 3072, 768, residual=True),
    Layer("lm_head", 768, 50257, bias=False),
)


@dataclass
class Case:
    """A layer at a number of rows, and one callable an engine that runs it on the i-th copy of its weight."""

    layer: Layer
    scheme: str
    rows: int
    weight_bytes: int
    copies: int
    engines: dict[str, Callable[[int], Any]]
    seconds: dict[str, list[float]] = field(default_factory=dict)

    @property
    def flops(self) -> int:
        return 2 * self.rows * self.layer.k * self.layer.n


def build_layer(layer: Layer, rows: int, scheme: Any, target: Any) -> Any:
    """The layer's one function, from the model's own module through the pipeline's passes and the target's rules."""
    import tvm
    from tvm import tirx
    from tvm.relax.frontend import nn

    from gpt2_tvm.build import weight_layout
    from gpt2_tvm.passes.apply_rules import apply_rules
    from gpt2_tvm.pipeline import PLAIN
    from gpt2_tvm.quantization.layers import Linear, Matrix
    from gpt2_tvm.schedules.cpu_matmul import GEMV_ROWS
    from gpt2_tvm.schedules.registry import make_rules

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            kind = Linear if layer.bias else Matrix
            self.layer = kind(layer.k, layer.n, scheme, weight_layout(target))

        def forward(self, x: nn.Tensor, residual: nn.Tensor) -> nn.Tensor:
            if not layer.bias:
                return self.layer.product(x)
            return self.layer(x, activation=layer.activation, residual=residual if layer.residual else None)

    few = rows <= GEMV_ROWS
    length: Any = rows if few else "n"
    shapes = {"x": (1, length, layer.k), "residual": (1, length, layer.n)}
    spec = {"forward": {k: nn.spec.Tensor(s, scheme.compute_dtype) for k, s in shapes.items()}}
    mod, _ = Wrapped().export_tvm(spec)
    with target.tvm_target():
        mod = tvm.transform.Sequential([make() for make in PLAIN])(mod)
    (func,) = [f for _, f in mod.functions_items() if isinstance(f, tirx.PrimFunc)]
    mod = tvm.IRModule({"main": func.with_attr("global_symbol", "main")})
    scheduled, hits = apply_rules(mod, make_rules(target.rules, target), target.tvm_target())
    assert hits[0].rule == ("cpu-gemv" if few else "cpu-matmul"), hits
    return tvm.compile(scheduled, target=target.tvm_target())["main"]


def cold_weights(layer: Layer, scheme: Any, target: Any) -> list[Any]:
    """Copies of a layer's weight as the scheme stores it, 1/32 everywhere, more than caches hold."""
    import numpy as np
    import tvm

    from gpt2_tvm.build import weight_layout

    unit = np.full((layer.n, layer.k), 1 if scheme.scaled else 1 / 32, scheme.weight_dtype)
    stored = weight_layout(target).store(unit)
    return [tvm.runtime.tensor(stored) for _ in range(max(2, -(-COLD_BYTES // stored.nbytes)))]


def make_case(layer: Layer, rows: int, scheme: Any, target: Any, weights: list[Any], torch_weights: list[Any]) -> Case:
    """Inputs and engines for one line of the table; without `torch_weights` torch takes no turns."""
    import numpy as np
    import tvm

    rng = np.random.default_rng(0)
    copies = len(weights)

    def random(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(scheme.compute_dtype)

    x, bias, residual = random(1, rows, layer.k), random(layer.n), random(1, rows, layer.n)
    function = build_layer(layer, rows, scheme, target)
    scales = np.full(layer.n, 1 / 32, np.float32)
    given = [scales] * scheme.scaled + [bias] * layer.bias + [residual] * layer.residual
    tensors = [tvm.runtime.tensor(a) for a in (x, *given)]
    out = tvm.runtime.tensor(np.empty((1, rows, layer.n), scheme.compute_dtype if layer.bias else "float32"))
    engines: dict[str, Callable[[int], Any]] = {"tvm": lambda i: function(tensors[0], weights[i], *tensors[1:], out)}
    if torch_weights:
        engines["torch"] = torch_layer(layer, torch_weights, x, bias, residual)
    item = np.dtype(scheme.weight_dtype).itemsize
    return Case(layer, scheme.name, rows, layer.n * layer.k * item, copies, engines)


def torch_layer(layer: Layer, weights: list[Any], x: Any, bias: Any, residual: Any) -> Callable[[int], Any]:
    """The same layer in torch, eager, as transformers runs it."""
    import torch
    from torch.nn import functional

    given, b, r = (torch.from_numpy(a) for a in (x, bias, residual))

    def call(i: int) -> Any:
        with torch.no_grad():
            y = functional.linear(given, weights[i % len(weights)], b if layer.bias else None)
            y = functional.gelu(y, approximate="tanh") if layer.activation else y
            return y + r if layer.residual else y

    return call


def _compiled(func: Any, target: Any) -> Callable[..., Any]:
    import tvm

    library = tvm.compile(tvm.IRModule({"main": func.with_attr("global_symbol", "main")}), target=target.tvm_target())
    return library["main"]


def read_loop(target: Any, threads: int) -> tuple[Callable[[], Any], float]:
    """A call that adds up memory, and the bytes that it reads."""
    found = loops.read_loop(threads, target=target)
    return found.run, found.amount


def fma_loop(target: Any, threads: int) -> tuple[Callable[[], Any], float]:
    """A call that does nothing but multiply-adds on vector registers, and its floating-point operations."""
    found = loops.fma_loop(threads, target=target)
    return found.run, found.amount


def launch_us(target: Any, threads: int) -> float:
    """Microseconds that one parallel loop with nothing in it costs, while the pool's threads are awake."""
    import numpy as np
    import tvm
    from tvm.script import tirx as T

    # fmt: off
    @T.prim_func(s_tir=True)
    def main(out: T.Buffer((threads, 16), "float32"), times: T.int64):
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
        for i in T.serial(times):
            for t in T.parallel(threads):
                out[t, 0] = T.Cast("float32", i)
    # fmt: on

    call = _compiled(main, target)
    out = tvm.runtime.tensor(np.zeros((threads, 16), np.float32))
    call(out, 100)
    return seconds(lambda: call(out, 1000)) * 1e3


def seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def measure(cases: list[Case], bounds: dict[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """Fill in the cases' times, all engines and bounds taking turns; returns the bounds' rates."""
    rates: dict[str, list[float]] = {name: [] for name in bounds}
    for repeat in range(-1, repeats):  # the first is a warm-up
        for case in cases:
            time.sleep(SETTLE_S)
            for name, rate in bounds.items():
                value = rate()
                if repeat >= 0:
                    rates[name].append(value)
            for name, call in case.engines.items():
                time.sleep(SETTLE_S)
                call(0)  # wakes the threads
                times = [seconds(partial(call, i)) for i in range(1, case.copies)]
                if repeat >= 0:
                    case.seconds.setdefault(name, []).append(statistics.mean(times))
    return rates


def report(cases: list[Case], rates: dict[str, list[float]]) -> list[dict[str, Any]]:
    """One row a case and engine."""
    read, fma = statistics.median(rates["read_gb_s"]), statistics.median(rates["fma_gflop_s"])
    rows = []
    for case in cases:
        for engine, times in case.seconds.items():
            median = statistics.median(times)
            gb_s, gflop_s = case.weight_bytes / median / 1e9, case.flops / median / 1e9
            rows.append(
                {
                    "layer": case.layer.name,
                    "quantization": case.scheme,
                    "rows": case.rows,
                    "k": case.layer.k,
                    "n": case.layer.n,
                    "engine": engine,
                    "time_us": median * 1e6,
                    "time_us_sd": statistics.stdev(times) * 1e6 if len(times) > 1 else 0.0,
                    "time_us_best": min(times) * 1e6,
                    "gb_s": gb_s,
                    "gflop_s": gflop_s,
                    "bound_share": max(gb_s / read, gflop_s / fma),
                }
            )
    return rows


def print_table(rows: list[dict[str, Any]], rates: dict[str, list[float]], launch: float, threads: int) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{threads} threads; one parallel loop costs {launch:.1f} us")
    for name in ("layer", "weights", "rows", "engine", "us", "sd", "GB/s", "GFLOP/s", "bound"):
        left = name in ("layer", "weights", "engine")
        table.add_column(name, justify="left" if left else "right", no_wrap=True)
    for r in rows:
        name = f"{r['layer'].removeprefix('attn.').removeprefix('mlp.')} {r['k']}x{r['n']}"
        figures = [f"{r[key]:.1f}" for key in ("time_us", "time_us_sd", "gb_s", "gflop_s")]
        table.add_row(name, r["quantization"], str(r["rows"]), r["engine"], *figures, f"{r['bound_share']:.0%}")
    console = Console(width=None if sys.stdout.isatty() else 110)  # 80 would cut the columns of a file
    console.print(table)
    for name, values in rates.items():
        console.print(f"{name}: median {statistics.median(values):.1f}, best {max(values):.1f}")


@app.command()
def main(
    rows: Annotated[str, typer.Option(help="Rows of x in decode's products: batch sizes, at most 16.")] = "1,4,12",
    prompt_tokens: Annotated[int, typer.Option(min=17, help="Rows of x in prefill's products.")] = 322,
    quantization: Annotated[str, typer.Option(help="How weights are stored and computed with.")] = (
        "q0f32,q16f32,q8f32"
    ),
    repeats: Annotated[int, typer.Option(min=1, help="Turns of every engine.")] = 9,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of each engine [physical cores].")] = None,
    torch: Annotated[bool, typer.Option(help="Whether torch takes turns too, where it is installed.")] = True,
    json: Annotated[Path | None, typer.Option(help="Write the figures to this file.")] = None,
) -> None:
    """Time GPT-2 124M's matrix products beside the machine's bounds."""
    from importlib.util import find_spec

    import psutil

    threads = threads or psutil.cpu_count(logical=False) or 1
    os.environ["TVM_NUM_THREADS"] = str(threads)  # read once, when the pool starts; TVM's default is half of the CPUs

    from gpt2_tvm.errors import UserError
    from gpt2_tvm.measure.cases import parse_sizes
    from gpt2_tvm.quantization import get_scheme
    from gpt2_tvm.schedules.cpu_matmul import GEMV_ROWS
    from targets import load_target

    with_torch = torch and find_spec("torch") is not None
    if with_torch:
        import torch as torch_module

        torch_module.set_num_threads(threads)
    target, schemes = load_target("cpu"), [get_scheme(name) for name in quantization.split(",")]
    batches = parse_sizes("--rows", rows)
    if max(batches) > GEMV_ROWS:
        raise UserError(f"--rows {rows}: decode's kernel takes up to {GEMV_ROWS} rows; more are --prompt-tokens")
    sizes = [(layer, n) for n in batches for layer in LAYERS] + [(layer, prompt_tokens) for layer in LAYERS[:-1]]
    cases = []
    for layer in LAYERS:
        theirs = {}  # torch's copies, by dtype
        for scheme in schemes:
            weights = cold_weights(layer, scheme, target)
            if with_torch and scheme.compute_dtype not in theirs:
                shape, dtype = (layer.n, layer.k), getattr(torch_module, scheme.compute_dtype)
                count = max(2, -(-COLD_BYTES // (layer.n * layer.k * dtype.itemsize)))
                theirs[scheme.compute_dtype] = [torch_module.full(shape, 1 / 32, dtype=dtype) for _ in range(count)]
            beside = theirs.get(scheme.compute_dtype, [])
            cases += [make_case(l, n, scheme, target, weights, beside) for l, n in sizes if l is layer]
    cases.sort(key=lambda case: case.rows)  # stable
    read, read_bytes = read_loop(target, threads)
    multiply_add, flops = fma_loop(target, threads)
    bounds: dict[str, Callable[[], float]] = {
        "read_gb_s": lambda: read_bytes / seconds(read) / 1e9,
        "fma_gflop_s": lambda: flops / seconds(multiply_add) / 1e9,
    }
    rates = measure(cases, bounds, repeats)
    launch = launch_us(target, threads)
    table = report(cases, rates)
    print_table(table, rates, launch, threads)
    if json is not None:
        medians = {name: statistics.median(values) for name, values in rates.items()}
        write_json(
            json, {"threads": threads, "quantization": quantization, "launch_us": launch, **medians, "rows": table}
        )


if __name__ == "__main__":
    run(app)
