"""Points that were measured, for the roofline: results of the benchmark, and times by function.

A result of ``python -m gpt2_tvm.benchmark --json`` gives two points a row, prefill and decode; their work comes from
the closed form of the row's own sizes. A file of functions is ``{"functions": [{"name", "flops", "bytes", "time_us",
…}]}`` with the work and the median time of one call each; "batch" and "phase" are shown where they are given.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

from gpt2_tvm.errors import UserError
from gpt2_tvm.theory.closed import Model, total
from gpt2_tvm.theory.machine import Machine
from gpt2_tvm.theory.predict import predict


@dataclass(frozen=True)
class Point:
    """Something measured: `seconds` for so many operations and bytes, beside the roofline's time for the same.

    kind: "prefill", "decode" or "function". who: the engine and device that ran it.
    """

    label: str
    kind: str
    who: str
    flops: float
    bytes: float
    seconds: float
    predicted_s: float

    @property
    def share(self) -> float:
        """The bound's time over the measured one: 1 is the roof."""
        return self.predicted_s / self.seconds

    def to_json(self) -> dict[str, Any]:
        """Plain values; times in milliseconds."""
        return {
            "label": self.label,
            "kind": self.kind,
            "who": self.who,
            "flops": self.flops,
            "bytes": self.bytes,
            "time_ms": 1e3 * self.seconds,
            "predicted_ms": 1e3 * self.predicted_s,
            "share": self.share,
        }


def read_points(
    paths: Sequence[Path], name: str, model: Model, scheme: str | None, machine: Machine
) -> tuple[list[Point], list[str]]:
    """The points of these files, and a line for each row that is not of this model (`name`) and `scheme`.

    UserError, naming the file, for one that is neither kind.
    """
    points: list[Point] = []
    notes: list[str] = []
    for path in paths:
        values = _read(path)
        try:
            if "functions" in values:
                points += [_function(row, machine) for row in values["functions"]]
                continue
            for row in values["rows"]:
                if (row["model"], row["quantization"]) == (name, scheme):
                    points += _benchmark(row, model, machine)
                else:
                    notes.append(f"{path}: {row['model']} {row['quantization']} left out, this is {name} {scheme}")
        except (KeyError, TypeError, ValueError, ZeroDivisionError, AttributeError):
            raise UserError(
                f"{path} is neither a result of gpt2_tvm.benchmark --json nor a file of function times; write it again"
            ) from None
    return points, list(dict.fromkeys(notes))


def machine_rates(paths: Sequence[Path]) -> tuple[float | None, float | None]:
    """(GB/s, TFLOP/s) that a benchmark measured of its machine in the same run, from the first row that has them."""
    found: list[float | None] = [None, None]
    for path in paths:
        rows = _read(path).get("rows")
        for row in rows if isinstance(rows, list) else []:
            for i, (key, scale) in enumerate((("bound_gb_s", 1.0), ("bound_gflop_s", 1e-3))):
                value = row.get(key) if isinstance(row, dict) else None
                if found[i] is None and isinstance(value, int | float) and value > 0:
                    found[i] = value * scale
    return found[0], found[1]


def _read(path: Path) -> Mapping[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"there is no {path}; write it with python -m gpt2_tvm.benchmark ARTIFACT --json {path}"
        ) from None
    except (ValueError, RecursionError):
        raise UserError(
            f"{path} is not JSON; write it with python -m gpt2_tvm.benchmark ARTIFACT --json FILE"
        ) from None
    if not isinstance(values, dict) or not {"rows", "functions"} & set(values):
        raise UserError(f"{path} holds neither rows nor functions; write it with gpt2_tvm.benchmark --json")
    return values


def _benchmark(row: Mapping[str, Any], model: Model, machine: Machine) -> list[Point]:
    """Prefill of the prompt, and the mean decode step after it (the work is linear in the position)."""
    b, prompt, count = int(row["batch"]), int(row["prompt_tokens"]), int(row["generate_tokens"])
    who = f"{row.get('peer') or 'gpt2-tvm'} on {row['device']}"
    ours = replace(model, attention=row["attention"] if row["attention"] in ("flash", "materialized") else "flash")
    cases = {
        "prefill": (replace(ours, last_row=True), prompt, Fraction(0), b * prompt / float(row["prefill_tok_s"])),
        "decode": (ours, 1, prompt + Fraction(count - 1, 2), b / float(row["decode_tok_s"])),
    }
    found = []
    for kind, (form, n, p, seconds) in cases.items():
        work = total(form.parts())
        flops, nbytes = (f.at(b, n, p, prompt + count) for f in (work.flops, work.bytes))
        label = f"{kind} {b} x {prompt}" + (f" + {count}" if kind == "decode" else "")
        found.append(
            Point(label, kind, who, float(flops), float(nbytes), seconds, predict(machine, flops, nbytes).seconds)
        )
    return found


def _function(row: Mapping[str, Any], machine: Machine) -> Point:
    flops, nbytes, seconds = float(row["flops"]), float(row["bytes"]), float(row["time_us"]) / 1e6
    if seconds <= 0 or nbytes <= 0:
        raise ValueError("a time or size that is not positive")
    extra = " ".join(str(row[key]) for key in ("phase", "batch") if key in row)
    label = f"{row['name']} ({extra})" if extra else str(row["name"])
    who = str(row.get("device", ""))
    return Point(label, "function", who, flops, nbytes, seconds, predict(machine, flops, nbytes).seconds)
