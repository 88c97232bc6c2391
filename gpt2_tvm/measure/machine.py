"""The machine's own bounds, measured in the rounds of a benchmark by a process of their own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median, stdev
from typing import Any

from gpt2_tvm.measure import loops
from gpt2_tvm.measure.bounds import Arithmetic, Bandwidth, Bounds, read_loop

PASSES = 8  # of each loop in a turn: some 50 ms, as long as a few steps of decode


@dataclass(frozen=True)
class Probe:
    """One turn of the machine. fma_gflop_s: None where there is no compiler to make the loop."""

    read_gb_s: float
    fma_gflop_s: float | None
    peak_rss_mb: float = 0.0


class MachineSubject:
    """This machine as a worker's subject: a turn is a `Probe`, a tenth of a second or so.

    threads: None for as many as an engine takes by default. nbytes: read in each pass.
    """

    def __init__(self, threads: int | None = None, nbytes: int = loops.READ_BYTES) -> None:
        from gpt2_tvm.runners.threads import check_threads

        count = check_threads(threads)
        compiler = loops.can_compile()
        self._read = read_loop(count, nbytes)
        self._fma = loops.fma_loop(count) if compiler else None
        by = "a loop compiled by TVM" if compiler else "numpy, as TVM's compiler is not here (a kernel may pass it)"
        of = f"{count} thread{'s' if count > 1 else ''}"
        self.facts: dict[str, Any] = {
            "read": f"{of} reading {nbytes >> 20} MiB with {by}",
            "fma": f"{of} doing float32 multiply-adds on registers",
        }

    def turn(self, case: object = None) -> Probe:
        """Measure once; a first pass, which wakes the threads, does not count. `case` says nothing here."""
        self._read.run()
        read = self._read.rate(PASSES)
        return Probe(read, self._fma.rate(PASSES) if self._fma else None)


@dataclass
class MachineBounds:
    """The probes of a run. facts: `MachineSubject`'s."""

    facts: Mapping[str, str]
    probes: list[Probe] = field(default_factory=list)

    def bounds(self) -> Bounds:
        """The medians over the rounds, like all that is timed."""
        rounds = f"median of {len(self.probes)}"
        read = _summary([p.read_gb_s for p in self.probes])
        fma = _summary([p.fma_gflop_s for p in self.probes if p.fma_gflop_s is not None])
        return Bounds(
            Bandwidth(read[0], f"measured: {self.facts['read']}, {rounds}", read[1]) if read else None,
            Arithmetic(fma[0], f"measured: {self.facts['fma']}, {rounds}", fma[1]) if fma else None,
        )


def _summary(values: Sequence[float]) -> tuple[float, float] | None:
    """(median, standard deviation), if there is anything."""
    return (median(values), stdev(values) if len(values) > 1 else 0.0) if values else None
