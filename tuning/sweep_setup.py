"""What a sweep is of: the products, their points, the workers, the file; and what it found, in words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpt2_tvm.errors import UserError
from tuning import records as store
from tuning.children import Child
from tuning.records import Records
from tuning.search import STRATEGIES, get_strategy
from tuning.space import SPACES, Points, describe, get_spaces, points, stock_point
from tuning.sweeping import START_S, Done, Search, Sweep, WorkerSpec
from tuning.workloads import ALONE, Workload

if TYPE_CHECKING:
    from targets import DeviceTarget
    from tuning.candidates.scheduling import Task

MAX_GRID = 20_000  # points of one product: more than that is no grid but a job for a strategy that learns


@dataclass
class Setup:
    """A sweep before it runs. name: MODEL-QUANTIZATION-TARGET, for files."""

    name: str
    note: str
    target: DeviceTarget
    target_name: str
    tasks: dict[str, Task]
    searches: list[Search]
    found: list[tuple[Workload, Points]]
    model: str
    quantization: str
    batch: int

    @staticmethod
    def make(
        model: str,
        target: str,
        quantization: str,
        batch: int,
        only: str | None,
        space: str,
        strategy: str,
        trials: int | None,
        seed: int,
    ) -> Setup:
        """Lower the model for the target and lay out the points. UserError names what is wrong with a choice."""
        from gpt2_tvm.build import lower_plan, make_plan
        from gpt2_tvm.checkpoint import resolve_model
        from targets import load_target, specialise
        from tuning.candidates.scheduling import Task

        spaces = get_spaces(space)
        maker = get_strategy(strategy)
        device = specialise(load_target(target))
        if device.kind == "cpu":
            raise UserError("the GEMV tuner is for GPUs; a CPU's product has no threads to lay out (see benchmarks/)")
        source = resolve_model(model)
        plan = make_plan(source.config, device, quantization, "full", batch_sizes=(batch,), passes=ALONE)
        lowered, _ = lower_plan(plan)
        workloads = gemv_only(lowered, plan, batch, only)
        searches, found = [], []
        for w in workloads:
            for s in spaces:
                configs = points(s, w, device)
                found.append((w, configs))
                if strategy == "grid" and trials is None and len(configs.configs) > MAX_GRID:
                    others = ", ".join(name for name in STRATEGIES if name != "grid")
                    raise UserError(
                        f"space {s.name} has {len(configs.configs)} points for {w.name}; "
                        f"give --trials, or another --strategy ({others})"
                    )
                searches.append(
                    Search(w, s.name, maker(configs.configs, w, device, trials, seed), stock_point(w, device))
                )
        return Setup(
            f"{source.name}-{quantization}-{device.name}",
            source.note or "",
            device,
            target,
            {w.name: Task.of(w, f) for w, f in workloads.items()},
            searches,
            found,
            model,
            quantization,
            batch,
        )

    @property
    def workload_names(self) -> list[str]:
        return list(self.tasks)

    def listing(self) -> str:
        """Products, spaces and dropped points, as Markdown."""
        lines = []
        for w, found in self.found:
            lines.append(
                f"{w.name}: {w.calls} calls a token, {w.bytes / 1e6:.2f} MB a call; {found.space.name} "
                f"({found.space.title}): {len(found.configs)} of {found.total} points"
            )
            lines += [f"  - {count} dropped: {why}" for why, count in found.dropped.most_common()]
        return "\n".join(lines)

    def workers(
        self,
        static: bool,
        count: int | None,
        tracker: str | None,
        key: str | None,
        budget_s: float,
        spread: float,
        runner: str | None = None,
        page_port: int | None = None,
        say: Callable[[str], None] = lambda what: None,
    ) -> list[WorkerSpec]:
        """The children that measure. UserError where the device, or the tracker's key, is missing."""
        from tuning.candidates.sampling import Budget

        budget = Budget(seconds=budget_s, spread=spread)
        if static:
            from tuning.candidates.static import StaticCandidates

            arguments: tuple[Any, ...] = (self.target_name, self.tasks)
            return [WorkerSpec(f"static{i}", StaticCandidates, arguments, f"{i}") for i in range(count or 2)]
        if tracker is not None or key is not None:
            if tracker is None or key is None:
                raise UserError("--tracker HOST:PORT and --key KEY belong together")
            from tuning.candidates.remote import RemoteCandidates

            arguments = (self.target_name, self.tasks, tracker, key, budget)
            return [WorkerSpec(f"{key}{i}", RemoteCandidates, (*arguments, i), f"{i}") for i in range(count or 1)]
        from tuning.candidates.backends import backend_of

        if runner == "browser":
            from tuning.candidates.page import browser_arguments

            make = backend_of(self.target_name, browser=True)
            arguments = (self.target_name, self.tasks, budget, *browser_arguments(page_port, say))
            return [WorkerSpec("browser", make, arguments, "browser")]
        default = 2
        if self.target.kind == "webgpu":
            from gpt2_tvm.runners.wgpu_device import Device

            default = 1 if Device().is_software else 2  # a software device's kernels run on the builders' cores
        kind, backend, arguments = (
            self.target.kind,
            backend_of(self.target_name),
            (self.target_name, self.tasks, budget),
        )
        return [WorkerSpec(f"{kind}{i}", backend, arguments, kind) for i in range(count or default)]

    def probe(self, specs: list[WorkerSpec]) -> dict[str, Any]:
        """What the first worker says of its device."""
        child = Child(specs[0].name, specs[0].make, *specs[0].arguments)
        outcome = child.ready(START_S)
        child.close()
        if not outcome.ok:
            raise UserError(f"cannot measure on {self.target.name}: {outcome.detail}")
        return dict(outcome.value)

    def remaining(self, records: Records) -> int:
        """Points that will be tried at most."""
        total = 0
        for search in self.searches:
            done = sum(p.space in (search.space, store.STOCK) for p in records.of(search.workload.name))
            total += max(0, search.strategy.trials - done)
        return total

    def introduction(self, facts: dict[str, Any], records: Records, todo: int) -> str:
        known = f", {len(records.points)} points known" if records.points else ""
        floor = facts.get("launch_floor_us")
        launches = f"; an empty launch takes {floor:.1f} us" if floor else ""
        return f"{self.name} on {facts['device']}: {len(self.tasks)} products, at most {todo} points{known}{launches}"

    def run(self, records: Records, specs: list[WorkerSpec], timeout_s: float, done: Done) -> None:
        """Measure until every search is done."""
        Sweep(records, self.searches, specs, timeout_s, done).run()

    def run_static(
        self, records: Records, specs: list[WorkerSpec], trials: int | None, timeout_s: float, done: Done
    ) -> None:
        """Compile the shortlists; nothing runs."""
        from tuning.static_sweep import StaticSweep

        def start(worker: int) -> Child:
            return Child(specs[worker].name, specs[worker].make, *specs[worker].arguments)

        sweep = StaticSweep(records, self.target, start, len(specs), timeout_s, done)
        sweep.run(sweep.jobs(self.searches, self.found, trials))

    def measure_decode(
        self,
        records: Records,
        leaders: int,
        sizes: tuple[int, int, int],
        say: Callable[[str], None],
    ) -> None:
        """Decode throughput of the whole model with each product's leading points. sizes: prompt, generate, rounds."""
        from tuning.decode import Setting, measure_leaders

        setting = Setting(self.model, self.target_name, self.quantization, self.batch, *sizes)
        measure_leaders(records, setting, leaders, self.workload_names, say)


def gemv_only(lowered: Any, plan: Any, batch: int, only: str | None) -> dict[Workload, Any]:
    """The products whose name contains one of `only`; UserError lists them where none does."""
    from tuning.workloads import gemv_workloads

    found = gemv_workloads(lowered, plan, batch)
    wanted = [part.strip() for part in (only or "").split(",") if part.strip()]
    chosen = {w: f for w, f in found.items() if not wanted or any(part in w.name for part in wanted)}
    if not chosen:
        raise UserError(f"--workload {only} names none of: {'; '.join(w.name for w in found)}")
    return chosen


def open_records(file: Path, plan: Setup, facts: dict[str, Any], fresh: bool) -> Records:
    """The sweep's file, with its header and the definitions of its products."""
    records = Records(file)
    header = store.header(facts["device"], plan.target.name, facts["method"], **_what(plan), **_told(facts))
    records.open(header, fresh)
    try:
        records.define(w for w, _ in plan.found)
    except BaseException:
        records.close()
        raise
    return records


def _what(plan: Setup) -> dict[str, Any]:
    return {
        "model": plan.model,
        "quantization": plan.quantization,
        "batch": plan.batch,
        "target_argument": plan.target_name,
    }


def _told(facts: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in facts.items() if key not in ("device", "method")}


def summary(records: Records, names: list[str]) -> str:
    """A row a product: best point, stock, gain, how many points of which status. Markdown."""
    from gpt2_tvm.measure.tables import markdown_table

    rows, counts = [], Counter(p.status for p in records)
    for name in names:
        best, stock = records.ok(name), records.stock(name)
        if not best:
            rows.append([name, "none ran", "", "", "", str(len(records.of(name)))])
            continue
        first = best[0]
        gain = f"{stock.time_us / first.time_us:.2f}x" if stock and stock.time_us and first.time_us else "-"
        stock_us = f"{stock.time_us:.1f} ± {stock.time_us_sd or 0:.1f}" if stock and stock.time_us else "-"
        rows.append(
            [
                name,
                describe(first.config, stock.config if stock else None),
                f"{first.time_us:.1f} ± {first.time_us_sd or 0:.1f} us",
                f"{first.gb_s:.2f}",
                f"{stock_us} us ({gain})",
                str(len(records.of(name))),
            ]
        )
    table = markdown_table(["product", "best point", "time", "GB/s", "DLight's point (gain)", "points"], rows, left=2)
    status = ", ".join(f"{count} {name}" for name, count in counts.most_common())
    floor = records.header.get("launch_floor_us")
    empty = f" An empty launch takes {floor:.1f} us there." if floor else ""
    if records.header["method"] == "static":
        software = " Nothing ran: times are a model's, with the registers and spills that the compiler reported."
        return f"{table}\n{records.header['device']}, {records.header['date']}: {status}.{software}\n"
    software = " A software device: its ranking says nothing of a GPU's." if records.header.get("software") else ""
    return f"{table}\n{records.header['device']}, {records.header['date']}: {status}.{empty}{software}\n"


__all__ = ["SPACES", "Setup", "gemv_only", "open_records", "summary"]
