"""Several cuts of one model, compiled and measured beside it: size, speed and quality over the share that is cut."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpt2_tvm.checkpoint import resolve_model
from gpt2_tvm.cli import write_json
from gpt2_tvm.comparing.making import make_artifacts
from gpt2_tvm.errors import UserError
from gpt2_tvm.pruning.cut import MULTIPLE, check_choice, prune

if TYPE_CHECKING:
    from gpt2_tvm.build import Progress

Json = dict[str, Any]
BITS = {"float32": 32, "float16": 16, "bfloat16": 16, "int8": 8, "int4": 4}
TOLD = "pruned.json"


@dataclass(frozen=True)
class Point:
    """One artifact of a sweep. methods: joined with +, "whole" for the model itself. share: that was cut. told: what
    `cut.prune` says of it."""

    path: Path
    methods: str
    share: float
    told: Json


def parse_shares(text: str) -> list[float]:
    """A comma list of shares between 0 and 1, ascending, without repeats. UserError for anything else."""
    try:
        shares = sorted({float(part) for part in text.split(",") if part.strip()})
    except ValueError:
        shares = []
    if not shares or not all(0 < share < 1 for share in shares):
        raise UserError(f"--shares {text!r}: give shares between 0 and 1 with commas between, such as 0.25,0.5,0.75")
    return shares


def make_points(
    model: str,
    methods: Sequence[str],
    shares: Sequence[float],
    scope: str,
    target: str,
    scheme: str,
    batch_sizes: Iterable[int],
    cache: Path,
    *,
    multiple: int = MULTIPLE,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[Point]:
    """The whole model, then every method at every share, each compiled; what the cache has is not made again.

    methods: each a method, or several with + between them (mlp+heads). Raises UserError for bad choices before
    anything is made.
    """
    from tuning.ablation_cache import digest, sources, weights_identity

    say = progress or (lambda what, share: None)
    source = resolve_model(model, seed=seed)
    for name in methods:
        for share in shares:
            check_choice(name.split("+"), share, scope, multiple)
    sizes = sorted(set(batch_sizes))
    points: list[Point] = []
    total = 1 + len(methods) * len(shares)

    def compiled(model: str, what: str) -> Path:
        def part(stage: str, share: float) -> None:
            if share:
                say(f"{what}: {stage}", (len(points) + share) / total)
            else:
                say(stage, 0.0)

        return make_artifacts(model, target, [scheme], sizes, cache, seed=seed, progress=part)[0]

    points.append(Point(compiled(model, "whole"), "whole", 0.0, {"zeros": 0, "matrix_weights": 0}))
    for name in methods:
        for share in shares:
            made_of = [weights_identity(source), source.config.to_json(), name, share, scope, multiple, sources()]
            folder = cache / "pruned" / f"{source.name}-{name}-{share:g}-{digest(made_of)}"
            if not (folder / TOLD).is_file():
                told = prune(source, folder, name.split("+"), share, scope, multiple)
                write_json(folder / TOLD, told)
            told = json.loads((folder / TOLD).read_text(encoding="utf-8"))
            points.append(Point(compiled(str(folder), f"{name} {share:g}"), name, share, told))
    return points


def annotated(result: Json, points: Sequence[Point], weight_dtype: str) -> Json:
    """A comparison's result with what each row is: "methods", "share", "kept" (share of the parameters that is left,
    zeros left out), and "sparse_mb": the size where only weights other than zero and a bit for each place are stored
    (no kernel here does so: what magnitude pruning could save on disk).
    """
    by_path = {str(point.path): point for point in points}
    rows = []
    for row in result["rows"]:
        point = by_path[row["artifact"]]
        zeros, weights = point.told["zeros"], point.told["matrix_weights"]
        saved = (zeros * BITS[weight_dtype] - weights) / 8e6 if zeros else 0.0
        parameters = point.told.get("parameters")
        rows.append(
            {
                **row,
                "model": point.methods if point.methods == "whole" else f"{point.methods} {point.share:g}",
                "methods": point.methods,
                "share": point.share,
                "kept": (parameters - zeros) / point.told["parameters_before"] if parameters else 1.0,
                "sparse_mb": row["size_mb"] - max(0.0, saved),
            }
        )
    return {**result, "rows": rows}
