"""Decode throughput of a whole model with some products at points of a sweep: several variants, interleaved."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpt2_tvm.errors import UserError
from gpt2_tvm.schedules.tuned import Tuned, TunedPoint

if TYPE_CHECKING:
    from tuning.records import Point, Records
    from tuning.workloads import Workload

UNTUNED = "untuned"
STOCK = "DLight's rules"  # a variant of this name is compiled with them instead of ours
Say = Callable[[str], None]


@dataclass(frozen=True)
class Setting:
    """What a variant is compiled from and timed with. generate: tokens decoded after a prompt of prompt_tokens."""

    model: str
    target: str
    quantization: str
    batch: int
    prompt_tokens: int
    generate: int
    repeats: int
    device: str | None = None


@dataclass(frozen=True)
class Rates:
    """Tokens a second of each round, the same rounds for all variants."""

    decode: tuple[float, ...]
    prefill: tuple[float, ...]

    @property
    def tok_s(self) -> float:
        return statistics.median(self.decode)

    @property
    def sd(self) -> float:
        return statistics.stdev(self.decode) if len(self.decode) > 1 else 0.0


@dataclass(frozen=True)
class Gain:
    """How many times as fast as another variant: the median of the ratios of the same rounds, and their spread."""

    ratio: float
    sd: float
    rounds: int

    @staticmethod
    def of(ours: Rates, theirs: Rates) -> Gain:
        ratios = [a / b for a, b in zip(ours.decode, theirs.decode, strict=True)]
        return Gain(statistics.median(ratios), statistics.stdev(ratios) if len(ratios) > 1 else 0.0, len(ratios))

    @property
    def error(self) -> float:
        """The standard error of the ratio (of a median: 1.25 times a mean's)."""
        return 1.25 * self.sd / self.rounds**0.5

    def loses(self) -> bool:
        """Slower by more than two standard errors."""
        return self.ratio + 2 * self.error < 1

    def wins(self) -> bool:
        """Faster by more than two standard errors."""
        return self.ratio - 2 * self.error > 1

    def __str__(self) -> str:
        return f"{self.ratio:.3f} ± {self.sd:.3f}x"


def tuned_point(workload: Workload, point: Point, stock: Point | None) -> TunedPoint:
    """A measured point as a schedule file has it."""
    told: dict[str, Any] = {}
    if point.time_us is not None:
        told["time_us"] = round(point.time_us, 3)
    if stock is not None and stock.time_us is not None:
        told["stock_us"] = round(stock.time_us, 3)
    return TunedPoint(workload.outputs, workload.reduced, workload.rows, workload.dtype, point.config, told)


def measure(variants: Mapping[str, Tuned | None], setting: Setting, say: Say = lambda what: None) -> dict[str, Rates]:
    """Compile every variant (None: as it comes) and time them in turns. UserError where one cannot be compiled or
    fails while it is timed; each runs in a process of its own.
    """
    from gpt2_tvm.build import compile_model
    from gpt2_tvm.measure.cases import Case
    from gpt2_tvm.measure.subjects import EngineSubject
    from gpt2_tvm.measure.timing import Samples, run_rounds
    from gpt2_tvm.measure.workers import Worker

    case = Case(setting.batch, setting.prompt_tokens, setting.generate)
    samples: Samples = {}
    workers: list[Worker] = []
    with tempfile.TemporaryDirectory(prefix="gpt2-tvm-tuned-") as folder:
        try:
            for i, (name, tuned) in enumerate(variants.items()):
                say(f"compiling {name}")
                file = Path(folder) / f"{i}.toml"
                if tuned is not None:
                    tuned.write(file)
                path = compile_model(
                    setting.model,
                    setting.target,
                    setting.quantization,
                    output=Path(folder) / str(i),
                    batch_sizes=(setting.batch,),
                    verify_widths=(),
                    rules="stock" if name == STOCK else "full",
                    tuned=file if tuned is not None else None,
                )
                workers.append(Worker(name, EngineSubject, str(path), setting.device, None))
            for worker in workers:
                worker.ready()
            failures = run_rounds(workers, [case], setting.repeats, 1, samples, lambda what, turns: say(what))
            if failures:
                raise UserError("; ".join(failures))
        except BaseException:
            for worker in workers:
                worker.kill()
            raise
        for worker in workers:
            worker.close()
    tokens = {samples[i, case][0].tokens for i in range(len(workers))}
    if len(tokens) > 1:
        say("note: the variants' greedy tokens differ (sums in another order)")
    return {
        name: Rates(
            tuple(setting.batch * setting.generate / s.decode_s for s in samples[i, case]),
            tuple(setting.batch * setting.prompt_tokens / s.prefill_s for s in samples[i, case]),
        )
        for i, name in enumerate(variants)
    }


def origin(records: Records) -> dict[str, Any]:
    """Where a schedule file made from these records says that it comes from."""
    from gpt2_tvm.schedules.tuned import ORIGIN

    return {key: records.header[key] for key in ORIGIN if key in records.header}


def measure_leaders(records: Records, setting: Setting, leaders: int, names: list[str], say: Say) -> None:
    """Add decode throughput to each product's fastest points and to DLight's own, one product at a time."""
    for name in names:
        stock = records.stock(name)
        best = [p for p in records.ok(name) if stock is None or p.config != stock.config][:leaders]
        if not best or all(p.decode_tok_s is not None for p in best):
            continue
        workload = records.workloads[name]
        variants: dict[str, Tuned | None] = {UNTUNED: None}
        for i, point in enumerate(best):
            variants[f"{name}, {i + 1}. point"] = Tuned(origin(records), (tuned_point(workload, point, stock),))
        rates = list(measure(variants, setting, say).values())
        points = ([stock] if stock is not None else []) + best
        for point, rate in zip(points, rates if stock is not None else rates[1:], strict=True):
            records.add(replace(point, decode_tok_s=rate.tok_s, decode_tok_s_sd=rate.sd))
