"""What a GEMV sweep found: a header with the device, TVM and the workloads, then a line a point.

A point's line: workload (name), space, config, status, and where it ran time_us, time_us_sd, gb_s; decode_tok_s and
decode_tok_s_sd where the whole model was measured with it; for a failed point, detail. A line without a space is
DLight's own point. Figures follow the project's convention: `<key>` the median, `<key>_sd` the spread.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, ClassVar

from gpt2_tvm.errors import UserError
from gpt2_tvm.schedules.gemv_config import GemvConfig
from tuning.journal import JournalFile, Line
from tuning.workloads import Workload

STOCK = "stock"  # the space of DLight's own point
STATUSES = ("ok", "invalid", "compile-error", "wrong-result", "timeout", "crash", "skipped")


@dataclass(frozen=True)
class Point:
    """One measured point.

    Attributes:
        workload: its name · space: where the point came from ("stock" for DLight's own).
        config, status: "ok", or what became of it.
        time_us, time_us_sd: of one call, median and standard deviation over `samples`, microseconds.
        gb_s: bytes of the workload over that time.
        decode_tok_s, decode_tok_s_sd: of the whole model with this point, where that was measured.
        detail: of a failure, one line · extra: what else the line has (registers, load widths, the worker).
    """

    workload: str
    space: str
    config: GemvConfig
    status: str
    time_us: float | None = None
    time_us_sd: float | None = None
    gb_s: float | None = None
    samples: int = 0
    decode_tok_s: float | None = None
    decode_tok_s_sd: float | None = None
    detail: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        return self.status == "ok"

    def to_line(self) -> Line:
        figures = ("time_us", "time_us_sd", "gb_s", "decode_tok_s", "decode_tok_s_sd")
        line: Line = {
            "workload": self.workload,
            "space": self.space,
            "config": self.config.to_json(),
            "status": self.status,
        }
        line |= {key: getattr(self, key) for key in figures if getattr(self, key) is not None}
        if self.samples:
            line["samples"] = self.samples
        if self.detail:
            line["detail"] = self.detail
        return line | dict(self.extra)

    @classmethod
    def from_line(cls, line: Line) -> Point:
        known = {f for f in cls.__dataclass_fields__ if f != "extra"}
        values = {key: value for key, value in line.items() if key in known}
        values["config"] = GemvConfig.from_json(line["config"])
        return cls(**values, extra={key: value for key, value in line.items() if key not in known})


class Records(JournalFile):
    """The journal of a sweep. `points` has the last line of every (workload, config)."""

    format_name = "gpt2-tvm-gemv-1"
    maker = "python -m tuning.sweep"
    identity: ClassVar[Mapping[str, str]] = {
        "device": "device",
        "target": "target",
        "tvm": "TVM",
        "method": "way of measuring",
        "model": "model",
        "quantization": "quantization",
        "batch": "batch",
    }

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.points: dict[tuple[str, GemvConfig], Point] = {}
        self.workloads: dict[str, Workload] = {}
        self.notes: dict[str, Any] = {}  # launch floor, bandwidth: what was measured once

    def note(self, line: Line) -> None:
        try:
            if "define" in line:
                workload = Workload.from_json(line["define"])
                self.workloads[workload.name] = workload
            elif "note" in line:
                self.notes |= line["note"]
            else:
                point = Point.from_line(line)
                if point.workload not in self.workloads:
                    raise KeyError(point.workload)
                self.points[point.workload, point.config] = point
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{self.path} has a line that says nothing of a sweep ({error}); begin anew with --fresh"
            ) from None

    def define(self, workloads: Iterable[Workload]) -> None:
        """Name the products that the points are of. UserError where a name stands for another product already."""
        for workload in workloads:
            known = self.workloads.get(workload.name)
            if known is None:
                self.append({"define": workload.to_json()})
            elif known.digest != workload.digest:
                raise UserError(
                    f"{self.path} holds records of another product under the name {workload.name!r} (its IR differs); "
                    "give another --records, or begin anew with --fresh"
                )

    def add(self, point: Point) -> None:
        self.append(point.to_line())

    def of(self, workload: str) -> list[Point]:
        """All points of a workload."""
        return [p for p in self.points.values() if p.workload == workload]

    def ok(self, workload: str) -> list[Point]:
        """Those that ran and computed the right numbers, fastest first."""
        return sorted((p for p in self.of(workload) if p.ok and p.time_us is not None), key=lambda p: p.time_us or 0.0)

    def stock(self, workload: str) -> Point | None:
        """DLight's own point, if it was measured."""
        return next((p for p in self.of(workload) if p.space == STOCK), None)

    def __iter__(self) -> Iterator[Point]:
        return iter(self.points.values())


def header(device: str, target: str, method: str, **told: Any) -> dict[str, Any]:
    """The first line of a sweep's file. method: "timestamps" (wgpu), "time_evaluator" (CUDA, RPC), "static"."""
    from importlib.metadata import version

    date = datetime.now(timezone.utc).strftime("%Y-%m-%d")
    return {
        "device": device,
        "target": target,
        "tvm": version("apache-tvm"),
        "method": method,
        "date": date,
        **told,
    }


def read_records(path: Path) -> Records:
    """A sweep's file, to look at."""
    records = Records(path)
    records.load()
    return records
