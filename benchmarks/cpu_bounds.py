"""What bounds the functions that take a decode step's and a prefill's time: the proof behind docs/cpu-ladder.md.

    python benchmarks/cpu_bounds.py [--model gpt2] [--quantization q0f32] [--top 6] [--json FILE]
    python benchmarks/cpu_bounds.py --model bundled --target x86-64-v3 --callgrind

For the functions on top the inner loop is counted in LLVM's assembly, and held against what this machine's units can
do, measured in the same run: the time that memory, multiply-adds, loads, conversions, or the chain of dependent
multiply-adds would need alone. The largest of them is the bound; a kernel near it has nothing left to gain but from
fewer bytes or fewer instructions. --callgrind counts the instructions that are really executed, to confirm the loops.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(Path(__file__).resolve().parent))

from gpt2_tvm.cli import run, write_json  # noqa: E402
from gpt2_tvm.errors import UserError  # noqa: E402

RECORDS = ROOT / "artifacts" / "records"
RECORD, COUNTED = RECORDS / "cpu-bounds.json", RECORDS / "cpu-bounds-callgrind.json"

app = typer.Typer(add_completion=False, rich_markup_mode=None)


def collect(
    model: str,
    quantization: str,
    target: str,
    prompt_tokens: int,
    top: int,
    repeats: int,
    threads: int,
    callgrind: bool,
) -> dict[str, Any]:
    """The record: "ports", "decode" and "prefill" with their `top` functions, and with `callgrind` "executed"."""
    from ladder.ports import measure_ports
    from ladder.profiling import DECODE_STEPS, executed, explain, profile, virtual_machine

    from gpt2_tvm.build import compile_model, lower_plan, make_plan
    from gpt2_tvm.checkpoint import resolve_model
    from gpt2_tvm.data import prompt_for
    from gpt2_tvm.engine import Engine
    from gpt2_tvm.measure.results import now
    from gpt2_tvm.runners.vm import processor_name
    from targets import load_target

    device, source = load_target(target), resolve_model(model)
    if device.kind != "cpu":
        raise UserError(f"--target {target}: the bounds are those of CPU code")
    if callgrind and (device.limits.vector_bits or 128) > 256:
        raise UserError("--callgrind: valgrind knows no AVX-512; add --target x86-64-v3")
    with tempfile.TemporaryDirectory(prefix="gpt2-tvm-bounds-") as folder:
        path = compile_model(model, target, quantization, Path(folder) / "artifact", verify_widths=())
        lowered, _ = lower_plan(make_plan(source.config, device, quantization, verify_widths=()))
        engine = Engine(path, verify=False, threads=threads)
        manifest = engine.artifact.manifest
        known = {f["name"]: f for f in manifest["functions"]}
        ports = measure_ports(device, threads)
        prompt = prompt_for(None, engine.config.vocab_size, min(prompt_tokens, engine.max_seq_len - DECODE_STEPS))
        made: dict[str, Any] = {
            **{"model": source.name, "quantization": quantization, "target": target, "threads": threads},
            **{"processor": processor_name(), "date": now(), "prompt_tokens": len(prompt), "ports": vars(ports)},
        }
        for what in ("decode", "prefill"):
            rows, whole = profile(engine, virtual_machine(engine), what, prompt, repeats)
            cached = len(prompt) + DECODE_STEPS // 2
            sizes = {"b": 1, "n": len(prompt), "p": 0} if what == "prefill" else {"b": 1, "n": 1, "p": cached}
            shown = [
                explain(row, known[row["name"]], lowered.scheduled[row["name"]], device, ports, sizes, threads)
                for row in [r for r in rows if r["name"] in known][:top]
            ]
            instrumented = sum(row["time_us"] for row in rows)
            made[what] = {"time_us": whole, "instrumented_us": instrumented, "functions": shown}
        if callgrind:
            made["executed"] = executed(path, Path(folder), manifest, made, prompt[:32])
    return made


@app.command()
def main(
    model: Annotated[str, typer.Option(help="As for gpt2_tvm.compile.")] = "gpt2",
    quantization: Annotated[str, typer.Option(help="How weights are stored and computed with.")] = "q0f32",
    target: Annotated[str, typer.Option(help="A CPU target that this machine runs.")] = "cpu",
    prompt_tokens: Annotated[int, typer.Option(min=2, help="Tokens of the prefill, and in the cache of decode.")] = 322,
    top: Annotated[int, typer.Option(min=1, help="Functions to explain.")] = 6,
    repeats: Annotated[int, typer.Option(min=1, help="Turns of each measurement.")] = 5,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads [physical cores].")] = None,
    callgrind: Annotated[bool, typer.Option("--callgrind", help="Count what is executed; no AVX-512.")] = False,
    json: Annotated[Path | None, typer.Option(help="Write the figures to this file.")] = None,
    record: Annotated[bool, typer.Option("--record", help="Write them to the committed record.")] = False,
) -> None:
    """Say what bounds the functions that take the time."""
    from ladder.profile_report import profile_text

    from gpt2_tvm.runners.threads import check_threads

    threads = check_threads(threads)
    made = collect(model, quantization, target, prompt_tokens, top, repeats, threads, callgrind)
    print(profile_text(made))
    if record:
        json = COUNTED if callgrind else RECORD
    if json is not None:
        write_json(json, made)


if __name__ == "__main__":
    run(app)
