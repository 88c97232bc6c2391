"""The schedule file that `python -m tuning.apply` writes and `compile --tuned` reads: a point for each shape.

format = "gpt2-tvm-tuned-1"
target = "rtx-4090"          # and device, tvm, date, model, quantization: where the points come from
[[gemv]]
outputs = 50257              # N
reduced = 768                # K
rows = 1
dtype = "float16"            # of the weight
time_us = 42.1               # measured, beside DLight's point
stock_us = 44.0
config = { TS = 8, TR = 16, TILE_S = 1, TILE_R = 8, ... }
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpt2_tvm.errors import UserError
from gpt2_tvm.schedules.gemv_config import GemvConfig

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

if TYPE_CHECKING:
    from tvm.target import Target

    from gpt2_tvm.schedules.tunable_gemv import GemvShape

FORMAT = "gpt2-tvm-tuned-1"
RULE = "tuned-gemv"  # what the hits of a model compiled with --tuned call it
ORIGIN = ("target", "device", "tvm", "date", "model", "quantization", "software")


@dataclass(frozen=True)
class TunedPoint:
    """A point for products of one shape. told: what was measured of it."""

    outputs: int
    reduced: int
    rows: int
    dtype: str
    config: GemvConfig
    told: Mapping[str, Any] = field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, int, int, str]:
        return self.outputs, self.reduced, self.rows, self.dtype


@dataclass(frozen=True)
class Tuned:
    """A schedule file. origin: target, device, tvm, date, ...: where it was measured."""

    origin: Mapping[str, Any]
    points: tuple[TunedPoint, ...]

    def choose(self, shape: GemvShape, target: Target) -> GemvConfig | None:
        """`TunableGemv`'s chooser: the point of that shape, or None to leave it to the next rule."""
        wanted = (shape.outputs, shape.reduced, shape.rows, shape.dtype)
        return next((point.config for point in self.points if point.shape == wanted), None)

    def to_json(self) -> dict[str, Any]:
        """For an artifact's manifest, and as TOML."""
        rows = [
            {
                "outputs": p.outputs,
                "reduced": p.reduced,
                "rows": p.rows,
                "dtype": p.dtype,
                **p.told,
                "config": p.config.to_json(),
            }
            for p in self.points
        ]
        return {"format": FORMAT, **self.origin, "gemv": rows}

    def write(self, path: Path) -> None:
        """As TOML, beside and then renamed."""
        import tomli_w

        from gpt2_tvm.files import write_atomically

        write_atomically(path, tomli_w.dumps(self.to_json()))


def load_tuned(path: Path, target: str | None = None) -> Tuned:
    """Read a schedule file. UserError where it is missing, damaged, no such file, or (with `target`) for another
    target.
    """
    make = "make one with python -m tuning.apply"
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"--tuned {path}: there is no such file; {make}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--tuned {path} cannot be read: {error}") from None
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"--tuned {path} is no TOML ({error}); {make}") from None
    if values.get("format") != FORMAT:
        raise UserError(f"--tuned {path} is no schedule file of this version (format {FORMAT!r}); {make}")
    try:
        points = tuple(_point(row) for row in values["gemv"])
        origin = {key: values[key] for key in ORIGIN if key in values}
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"--tuned {path} is damaged ({error!r}); {make}") from None
    if target is not None and origin.get("target") != target:
        raise UserError(
            f"--tuned {path} was measured for {origin.get('target')}, this is {target}; sweep and apply for {target}"
        )
    return Tuned(origin, points)


def _point(row: Mapping[str, Any]) -> TunedPoint:
    shape = {"outputs", "reduced", "rows", "dtype"}
    sizes = {name: int(row[name]) for name in ("outputs", "reduced", "rows")}
    told = {key: value for key, value in row.items() if key not in shape | {"config"}}
    return TunedPoint(**sizes, dtype=str(row["dtype"]), config=GemvConfig.from_json(row["config"]), told=told)
