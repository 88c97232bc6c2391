"""How long the shaders of a webgpu artifact take to compile in Dawn, Chromium's WebGPU, one after the other.

    python benchmarks/web_pipelines.py ARTIFACT... [--rounds 3] [--json FILE]

Without a GPU that is on SwiftShader, Chromium's software device (in node, npm's package webgpu). CPU seconds, of all
threads: other programs on the machine change them little. "A text" are the kernels that a page calls (prefill,
decode_b1, greedy_b1) and compiles as it loads; the others compile when they are called.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer

from gpt2_tvm.artifact import open_artifact
from gpt2_tvm.cli import run, write_json
from gpt2_tvm.errors import UserError
from gpt2_tvm.measure.tables import markdown_table
from gpt2_tvm.runners import node
from gpt2_tvm.toolchains import web
from gpt2_tvm.toolchains.web_needs import ONE_TEXT

app = typer.Typer(add_completion=False, rich_markup_mode=None)
SHOWN = 3  # kernels, the slowest


def compile_all(artifact: Path) -> dict[str, Any]:
    """What web/node/pipelines.mjs says of an artifact; UserError where it fails."""
    command = ["node", str(web.WEB / "node" / "pipelines.mjs"), str(artifact)]
    environment = {**os.environ, **node.environment()}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, stdin=subprocess.DEVNULL)
    if done.returncode != 0:
        said = [line for line in done.stderr.splitlines() if line.strip()] or ["it said nothing"]
        raise UserError(f"the shaders of {artifact} could not be compiled: {said[-1][:300]}")
    return json.loads(done.stdout)


def measure(artifact: Path, rounds: int) -> dict[str, Any]:
    """Medians of `rounds` processes: cpu_s of all kernels and of those of a text, and the kernels, slowest first."""
    manifest = open_artifact(artifact, verify=False).manifest
    functions = json.loads((artifact / "kernels.json").read_text(encoding="utf-8"))["functions"]
    text = {launch["kernel"] for name in ONE_TEXT if name in functions for launch in functions[name]["launches"]}
    tries = [compile_all(artifact) for _ in range(rounds)]
    by_try = [{one["kernel"]: one for one in found["kernels"]} for found in tries]
    kernels = [
        {**by_try[0][name], "cpu_s": median(one[name]["cpu_s"] for one in by_try), "text": name in text}
        for name in by_try[0]
    ]
    return {
        "artifact": artifact.name,
        "model": manifest["model"],
        "quantization": manifest["quantization"],
        "rules": manifest["rules"],
        "adapter": tries[0]["adapter"],
        "rounds": rounds,
        "pipelines": len(kernels),
        "pipelines_text": len(text),
        "cpu_s": median(sum(k["cpu_s"] for k in one.values()) for one in by_try),
        "cpu_s_text": median(sum(k["cpu_s"] for name, k in one.items() if name in text) for one in by_try),
        "kernels": sorted(kernels, key=lambda k: -k["cpu_s"]),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    heads = ["model", "weights", "pipelines", "CPU s", "for a text", "CPU s of these", "slowest (CPU s, KiB shared)"]
    cells = [
        [
            row["model"],
            row["quantization"],
            str(row["pipelines"]),
            f"{row['cpu_s']:.1f}",
            str(row["pipelines_text"]),
            f"{row['cpu_s_text']:.1f}",
            ", ".join(
                f"{k['kernel'].removesuffix('_kernel')} ({k['cpu_s']:.1f}, {k['shared_bytes'] / 1024:.1f})"
                for k in [k for k in row["kernels"] if k["text"]][:SHOWN]
            ),
        ]
        for row in rows
    ]
    return markdown_table(heads, cells, 2) + f"\nOn {rows[0]['adapter']}, median of {rows[0]['rounds']}.\n"


@app.command()
def main(
    artifacts: Annotated[list[Path], typer.Argument(metavar="ARTIFACT...", help="Made by compile --target webgpu.")],
    rounds: Annotated[int, typer.Option(min=1, help="Processes, each compiling all.")] = 3,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Also write the figures here.")
    ] = None,
) -> None:
    """Time the compilation of an artifact's WebGPU pipelines."""
    node.check()
    rows = [measure(artifact, rounds) for artifact in artifacts]
    print(table(rows), end="")
    if json_file is not None:
        write_json(json_file, {"rows": rows})


if __name__ == "__main__":
    run(app)
