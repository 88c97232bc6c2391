"""A device as a roofline sees it: how fast it moves bytes and how fast it computes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gpt2_tvm.errors import UserError

if TYPE_CHECKING:
    from targets import DeviceTarget

HALF = ("float16", "bfloat16", "float8")


@dataclass(frozen=True)
class Machine:
    """Two rates.

    Attributes:
        name, description: of the target.
        bandwidth_gb_s: 10^9 bytes a second. tflops: 10^12 operations a second in the dtype asked for.
        fp32_tflops: the rate outside matrix units where that is another, else None.
        source: where the figures come from.
    """

    name: str
    description: str
    bandwidth_gb_s: float
    tflops: float
    fp32_tflops: float | None
    source: str

    @property
    def ridge(self) -> float:
        """FLOP a byte at which the two rates meet: below, memory bounds; above, arithmetic."""
        return 1e3 * self.tflops / self.bandwidth_gb_s


def machine_of(
    target: DeviceTarget,
    dtype: str,
    bandwidth_gb_s: float | None = None,
    tflops: float | None = None,
    benchmarks: Sequence[Path] = (),
) -> Machine:
    """The device's peaks for arithmetic in `dtype`.

    From the target's [peak]; for this machine's CPU, whose file names none, as a benchmark's result in `benchmarks` has
    measured it, or else measured now. `bandwidth_gb_s` and `tflops` replace either. UserError where a figure is missing
    or not positive.
    """
    for option, value in (("--bandwidth-gb-s", bandwidth_gb_s), ("--tflops", tflops)):
        if value is not None and not 0 < value < float("inf"):
            raise UserError(f"{option} {value}: give a number above 0")
    peak = target.peak
    given = [
        text for text, value in ((f"{bandwidth_gb_s} GB/s", bandwidth_gb_s), (f"{tflops} TFLOP/s", tflops)) if value
    ]
    notes = [f"{' and '.join(given)} as given"] if given else []
    fp32 = None
    if peak is not None:
        half = dtype in HALF and peak.fp16_tflops is not None
        if tflops is None:
            tflops = peak.fp16_tflops if half else peak.fp32_tflops
            notes.append(f"peak of target {target.name}")
            fp32 = peak.fp32_tflops if half and peak.fp32_tflops != tflops else None
        if bandwidth_gb_s is None:
            bandwidth_gb_s = peak.bandwidth_gb_s
            notes.append(f"peak of target {target.name}")
    elif target.native:
        from gpt2_tvm.measure.bounds import measure_fma_rate, measure_read_bandwidth
        from gpt2_tvm.runners.threads import default_threads
        from gpt2_tvm.theory.measured import machine_rates

        read, fma = machine_rates(benchmarks)
        if bandwidth_gb_s is None and read is not None:
            bandwidth_gb_s = read
            notes.append("bandwidth measured by the benchmark")
        if tflops is None and fma is not None:
            tflops = fma
            notes.append("multiply-adds measured by the benchmark")
        threads = default_threads()
        if bandwidth_gb_s is None:
            bandwidth_gb_s = measure_read_bandwidth(threads)
            notes.append(f"reads measured with {threads} threads")
        if tflops is None:
            tflops = measure_fma_rate(threads) / 1e3
            notes.append(f"float32 multiply-adds measured with {threads} threads")
    if bandwidth_gb_s is None or tflops is None:
        raise UserError(
            f"target {target.name} names no peak in {dtype}; give --bandwidth-gb-s and --tflops, or a target of one "
            "device (python -m gpt2_tvm.compile --list-targets)"
        )
    return Machine(target.name, target.description, bandwidth_gb_s, tflops, fp32, "; ".join(dict.fromkeys(notes)))
