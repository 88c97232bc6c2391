"""`python -m tuning.measure ARTIFACT`: which function takes how long inside a prefill and inside a decode step."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gpt2_tvm import cli

if TYPE_CHECKING:
    from tuning.measure.functions import FunctionTimes

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command()
def main(
    artifact: Annotated[Path, typer.Argument(metavar="ARTIFACT", help="A folder made by compile.")],
    calls: Annotated[str, typer.Option(help="prefill, decode_b<batch>: a comma list.")] = "prefill,decode_b1",
    prompt_tokens: Annotated[int, typer.Option(help="Tokens of the prompt, cut to what the context holds.")] = 322,
    repeats: Annotated[int, typer.Option(help="Rounds that count.")] = 20,
    device: Annotated[str | None, typer.Option(help='"cuda:1", say; default: the first of its kind.')] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Also write the figures here, as JSON.")
    ] = None,
) -> None:
    """Time each function of a model inside a prefill and inside a decode step, on the machine that runs it.

    Each call of a function is timed in the order of the model's own calls, so weights and caches are as cold as there.
    Beside it stands the whole call, timed in the same rounds, and the share of it that the functions make up.
    """
    from tuning.measure.functions import time_functions

    times = time_functions(artifact, [call.strip() for call in calls.split(",")], prompt_tokens, repeats, device)
    sys.stdout.write(table(times))
    sys.stdout.flush()
    if json_file is not None:
        cli.write_json(json_file, as_json(times))


def as_json(times: FunctionTimes) -> dict[str, Any]:
    """{"calls": [...], "functions": [...]}, a dictionary each."""
    from dataclasses import asdict

    return {
        "calls": [asdict(call) for call in times.calls.values()],
        "functions": [{**asdict(one), "total_us": one.total_us} for one in times.values()],
    }


def table(times: FunctionTimes) -> str:
    """Markdown: for each call its functions, the longest first."""
    from gpt2_tvm.measure.tables import markdown_table

    parts = []
    for name, call in times.calls.items():
        own = sorted((one for one in times.values() if one.call == name), key=lambda one: -one.total_us)
        cells = [
            [
                one.function,
                str(one.calls),
                f"{one.time_us:.1f} ± {one.time_us_sd:.1f}",
                f"{one.total_us:.0f}",
                f"{one.total_us / call.time_us:.1%}",
            ]
            for one in own
        ]
        parts.append(
            f"{name}: {call.time_us:.0f} ± {call.time_us_sd:.0f} us, of which the functions make up "
            f"{call.coverage:.0%} ({call.method}; {call.overhead_us:.2f} us a call subtracted)\n\n"
            + markdown_table(["function", "calls", "us a call", "us in all", "of the whole"], cells, left=1)
        )
    return "\n".join(parts)


if __name__ == "__main__":
    cli.run(app)
