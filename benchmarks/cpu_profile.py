"""Where the time of a prefill and of a decode step goes, function by function, beside what the machine can do.

    python benchmarks/cpu_profile.py ARTIFACT [--prompt-tokens 322] [--repeats 15] [--threads N] [--json FILE]

TVM's virtual machine tells when it enters and leaves each function (`set_instrument`); Python takes the times, a
microsecond or two of which are its own. Bytes and FLOPs are the manifest's. "between functions" is the rest of a call
that was not instrumented: the virtual machine's own instructions, the read-back of the logits and their argmax.
GB/s and GFLOP/s have their bounds below the table, measured in the same rounds. Figures are medians.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from gpt2_tvm.cli import run, write_json
from gpt2_tvm.errors import UserError

app = typer.Typer(add_completion=False, rich_markup_mode=None)

BETWEEN = "between functions"


def timed(call: Callable[[], Any]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


class Profiler:
    """Seconds by function of each call of an engine, on its own virtual machine."""

    def __init__(self, engine: Any, functions: set[str]) -> None:
        self._vm, self._functions = engine.runner._vm, functions
        self._found: dict[str, float] = {}
        self._entered = 0.0
        self._on = False

    def measure(self, call: Callable[[], Any]) -> dict[str, float]:
        """Run `call` with and without the instrument -> seconds by function, and of what is between them."""
        self._on, self._found = False, defaultdict(float)
        total = timed(call)
        self._vm.set_instrument(self._see)
        self._on = True
        call()
        self._on = False
        found = dict(self._found)
        return {**found, BETWEEN: max(0.0, total - sum(found.values()))}

    def _see(self, _: Any, name: str, before: bool, *rest: Any) -> None:
        if not self._on or name not in self._functions:
            return
        now = time.perf_counter()
        if before:
            self._entered = now
        else:
            self._found[name] += now - self._entered


def rows_of(
    samples: list[dict[str, float]], functions: dict[str, dict[str, Any]], caller: str, sizes: dict[str, int]
) -> list[dict[str, Any]]:
    """A row a function, the slowest first: time a call of the model takes in it, its share, GB/s and GFLOP/s."""
    from gpt2_tvm.expressions import evaluate

    medians = {name: statistics.median(s.get(name, 0.0) for s in samples) for name in samples[0]}
    total = sum(medians.values())
    rows = []
    for name, seconds in sorted(medians.items(), key=lambda item: -item[1]):
        entry = functions.get(name)
        calls = entry["calls"][caller] if entry else 0
        spread = [s.get(name, 0.0) for s in samples]
        row = {
            "function": name,
            "rule": entry["rule"] if entry else None,
            "calls": calls,
            "time_us": seconds * 1e6,
            "time_us_sd": statistics.stdev(spread) * 1e6 if len(spread) > 1 else 0.0,
            "share": seconds / total,
        }
        for key, unit in (("bytes", "gb_s"), ("flops", "gflop_s")):
            amount = entry.get(key) if entry else None
            row[unit] = None if amount is None else calls * evaluate(amount, sizes) / seconds / 1e9
        rows.append(row)
    return rows


def by_rule(rows: list[dict[str, Any]]) -> dict[str, float]:
    """The share of each rule; of `ours` (kernels that come scheduled) each kernel's."""
    shares: dict[str, float] = defaultdict(float)
    for row in rows:
        key = row["function"] if row["rule"] in ("ours", None) else row["rule"]
        shares[key] += row["share"]
    return dict(sorted(shares.items(), key=lambda item: -item[1]))


def print_rows(title: str, rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title)
    for name in ("function", "rule", "calls", "us", "sd", "share", "GB/s", "GFLOP/s"):
        table.add_column(name, justify="left" if name in ("function", "rule") else "right", no_wrap=True)
    for r in rows:
        rates = ["" if r[key] is None else f"{r[key]:.1f}" for key in ("gb_s", "gflop_s")]
        times = [f"{r['time_us']:.1f}", f"{r['time_us_sd']:.1f}", f"{r['share']:.1%}"]
        table.add_row(r["function"], r["rule"] or "", str(r["calls"] or ""), *times, *rates)
    Console(width=140).print(table)


@app.command()
def main(
    artifact: Annotated[Path, typer.Argument(help="An artifact for this CPU.")],
    prompt_tokens: Annotated[int, typer.Option(min=2, help="Tokens of the prompt.")] = 322,
    repeats: Annotated[int, typer.Option(min=1, help="Prefills, and decode steps, that count.")] = 15,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads [physical cores].")] = None,
    json: Annotated[Path | None, typer.Option(help="Write the figures to this file.")] = None,
) -> None:
    """Say where the time of a prefill and of a decode step goes."""
    import numpy as np

    from gpt2_tvm.engine import Engine
    from gpt2_tvm.measure.machine import MachineBounds, MachineSubject

    engine = Engine(artifact, threads=threads)
    if engine.threads is None:
        raise UserError(f"{artifact} is not for a CPU; profile it with its vendor's tools")
    if prompt_tokens + 2 * (repeats + 1) > engine.max_seq_len:
        raise UserError(
            f"--prompt-tokens {prompt_tokens}: with {repeats} steps that is past {engine.max_seq_len} tokens"
        )
    functions = {row["name"]: row for row in engine.artifact.manifest["functions"]}
    prompt = np.arange(prompt_tokens) % engine.config.vocab_size
    profiler = Profiler(engine, set(functions))
    machine = MachineSubject(engine.threads)
    bounds = MachineBounds(machine.facts)

    def prefill() -> None:
        engine.reset()
        engine.prefill(prompt)

    prefill()
    prefills, decodes = [], []
    for _ in range(repeats):
        bounds.probes.append(machine.turn())
        prefills.append(profiler.measure(prefill))
        decodes.append(profiler.measure(lambda: engine.decode(1)))
    found: dict[str, Any] = {"artifact": str(artifact), "threads": engine.threads, "prompt_tokens": prompt_tokens}
    for caller, samples, n, p in (
        ("prefill", prefills, prompt_tokens, 0),
        (f"decode_b{min(engine.artifact.batch_sizes)}", decodes, 1, prompt_tokens),
    ):
        rows = rows_of(samples, functions, caller, {"b": 1, "n": n, "p": p})
        found[caller] = {"rows": rows, "shares": by_rule(rows)}
        print_rows(f"{caller}, {sum(r['time_us'] for r in rows) / 1e3:.2f} ms", rows)
        print("  ".join(f"{name} {share:.1%}" for name, share in found[caller]["shares"].items()))
    measured = bounds.bounds()
    for part in (measured.bandwidth, measured.arithmetic):
        if part is not None:
            found.setdefault("bounds", []).append(vars(part))
            print(*(f"{value:.1f}" if isinstance(value, float) else value for value in vars(part).values()))
    if json is not None:
        write_json(json, found)


if __name__ == "__main__":
    run(app)
