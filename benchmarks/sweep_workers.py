"""What workers behind a TVM RPC tracker do for a sweep, on this machine: wall time with one and with two, one of them
killed half-way, and a browser page beside a native worker.

    python benchmarks/sweep_workers.py [--points 200] [--rounds 1] [--json FILE]

The same points each time, timed shortly (`--budget`), of small products in packed weights: much to build and little to
run. A software device runs kernels on all cores, which two workers on one machine would fight over; here each worker's
keeps to one core, as if it were a machine of its own. Start-up (importing TVM, lowering the model, opening the device)
is inside, as for a user. A tracker and the workers are started here and ended again.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer

from gpt2_tvm.cli import run, write_json
from gpt2_tvm.errors import UserError

app = typer.Typer(add_completion=False, rich_markup_mode=None)
HOST = "127.0.0.1"
PORTS = range(9150, 9190)  # TVM's tracker counts up from the port that it is given, and never past 9199
START_S = 180.0
HEADER = (
    "| workers | seconds | points | measured twice | by worker | not ok |\n| --- | ---: | ---: | ---: | --- | ---: |"
)


ONE_CORE = {"LP_NUM_THREADS": "1"}  # of Mesa's software device, lavapipe


@contextmanager
def program(*arguments: str, more: dict[str, str] | None = None) -> Iterator[subprocess.Popen[str]]:
    """A Python program in a process group of its own, which ends with the block. more: of its environment."""
    process = subprocess.Popen(
        [sys.executable, "-m", *arguments], start_new_session=True, text=True, stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE, env={**os.environ, **(more or {})},
    )  # fmt: skip
    try:
        yield process
    finally:
        end(process)


def end(process: subprocess.Popen[str]) -> None:
    """Kill a program and all that it started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def free_port() -> int:
    """A port for the tracker."""
    for port in PORTS:
        with socket.socket() as probe:
            try:
                probe.bind((HOST, port))
            except OSError:
                continue
            return port
    raise UserError(f"no free port in {PORTS.start}..{PORTS.stop - 1}; end the trackers that hold them")


def wait_for_tracker(port: int) -> None:
    """Return once it answers."""
    begin = time.monotonic()
    while time.monotonic() - begin < START_S:
        with suppress(OSError):
            socket.create_connection((HOST, port), 1).close()
            return
        time.sleep(0.1)
    raise UserError(f"TVM's tracker did not start within {START_S:.0f} s; run python -m tvm.exec.rpc_tracker by hand")


def wait_for_workers(port: int, key: str, count: int) -> None:
    """Return once the tracker has `count` workers to hand out."""
    from tvm import rpc

    begin = time.monotonic()
    while time.monotonic() - begin < START_S:
        with suppress(Exception):
            if rpc.connect_tracker(HOST, port).summary()["queue_info"].get(key, {}).get("free", 0) >= count:
                return
        time.sleep(0.2)
    raise UserError(f"{count} workers did not register within {START_S:.0f} s; run python -m tuning.worker by hand")


def sweep(kinds: list[str], options: list[str], records: Path, kill_at: int | None = None) -> dict[str, Any]:
    """One sweep over a worker of each kind ("native" or "browser"): seconds, points by status and by worker.

    kill_at: when so many points are on the disk, the last worker is killed.
    """
    records.unlink(missing_ok=True)  # its lines are counted below
    with ExitStack() as stack:
        port = free_port()
        stack.enter_context(
            program("tvm.exec.rpc_tracker", "--host", HOST, "--port", str(port), "--port-end", str(port + 1))
        )
        wait_for_tracker(port)
        workers = []
        for number, kind in enumerate(kinds):
            more = ["--runner", "browser"] if kind == "browser" else []
            workers.append(
                stack.enter_context(
                    program("tuning.worker", "--tracker", f"{HOST}:{port}", "--key", "bench", *more, more=ONE_CORE)
                )
            )
            wait_for_workers(port, "bench", number + 1)  # one by one: TVM's servers look for a free port each
        begin = time.monotonic()
        command = [*options, "--records", str(records), "--fresh", "--tracker", f"{HOST}:{port}", "--key", "bench"]
        sweeping = stack.enter_context(program("tuning.sweep", *command, "--workers", str(len(kinds))))
        while sweeping.poll() is None:
            if kill_at is not None and lines(records) > kill_at:
                end(workers[-1])
                kill_at = None
            time.sleep(0.05)
        seconds = time.monotonic() - begin
        if sweeping.returncode != 0:
            said = (sweeping.stderr.read() if sweeping.stderr else "").strip().splitlines()
            raise UserError(f"the sweep ended with {sweeping.returncode}: {said[-1] if said else 'it said nothing'}")
        if kill_at is not None:
            raise UserError("the sweep ended before a worker could be killed; give it more --points")
    from tuning.records import read_records

    points = list(read_records(records))
    return {
        "seconds": seconds,
        "points": len(points),
        "distinct": len({(p.workload, p.config) for p in points}),
        "status": dict(Counter(p.status for p in points)),
        "by_worker": dict(Counter(p.extra.get("worker", "bench0") for p in points)),
    }


def lines(file: Path) -> int:
    """Lines of a file that may not be there yet."""
    try:
        return file.read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0


@app.command()
def main(
    model: Annotated[str, typer.Option(help="As for tuning.sweep.")] = "bundled-draft",
    target: Annotated[str, typer.Option(help="As for tuning.sweep.")] = "webgpu",
    quantization: Annotated[
        str, typer.Option(help="As for tuning.sweep; packed weights take longer to build.")
    ] = "q4f32_1",
    workload: Annotated[str, typer.Option(help="The products whose points are built.")] = "attn,mlp,logits",
    space: Annotated[str, typer.Option(help="As for tuning.sweep.")] = "schedule1,schedule2",
    points: Annotated[int, typer.Option(help="How many of each product and space.")] = 200,
    worker: Annotated[str, typer.Option(help="native, or browser: a page in a headless Chromium.")] = "native",
    budget: Annotated[float, typer.Option(help="Seconds of timing a point.")] = 0.01,
    rounds: Annotated[int, typer.Option(help="One worker and two take turns so often.")] = 1,
    mixed: Annotated[bool, typer.Option(help="Also with a native worker beside a page.")] = True,
    json_: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the result here.")] = None,
) -> None:
    """Print wall time and points for one worker, two, two of which one is killed, and one beside a browser page."""
    if worker not in ("native", "browser"):
        raise UserError(f"unknown --worker {worker!r}; choose native or browser")
    options = ["--model", model, "--target", target, "--quantization", quantization]
    options += ["--workload", workload, "--space", space]
    options += ["--strategy", "random", "--trials", str(points), "--budget", str(budget)]
    results: dict[str, list[dict[str, Any]]] = {"one": [], "two": [], "two, one killed": [], "native + page": []}
    with tempfile.TemporaryDirectory() as folder:
        records = Path(folder) / "points.jsonl"
        for number in range(rounds):
            print(f"round {number + 1} of {rounds}", file=sys.stderr)
            results["one"].append(sweep([worker], options, records))
            results["two"].append(sweep([worker] * 2, options, records))
        print("one of two killed", file=sys.stderr)
        half = results["one"][-1]["points"] // 2  # by then both have measured
        results["two, one killed"].append(sweep([worker] * 2, options, records, kill_at=half))
        if mixed:
            print("a native worker and a page", file=sys.stderr)
            results["native + page"].append(sweep(["native", "browser"], options, records))
    print(HEADER)
    for name, found in results.items():
        if found:
            last = found[-1]
            shares = ", ".join(f"{count}" for _, count in sorted(last["by_worker"].items()))
            bad = last["points"] - last["status"].get("ok", 0)
            seconds = median(one["seconds"] for one in found)
            twice = last["points"] - last["distinct"]
            print(f"| {name} | {seconds:.1f} | {last['points']} | {twice} | {shares} | {bad} |")
    ratio = median(a["seconds"] / b["seconds"] for a, b in zip(results["one"], results["two"], strict=True))
    print(f"\nOne {worker} worker took {ratio:.2f} times as long as two (median of {rounds}); {os.cpu_count()} cores.")
    if json_:
        write_json(json_, {"worker": worker, "command": options, "two_over_one": ratio, "runs": results})


if __name__ == "__main__":
    run(app)
