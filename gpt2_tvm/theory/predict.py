"""From work and a machine to time: what bounds it, what the KV cache gains, how large it is."""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction

from gpt2_tvm.theory.closed import Model, Work, total
from gpt2_tvm.theory.form import Number
from gpt2_tvm.theory.machine import Machine


@dataclass(frozen=True)
class Prediction:
    """Time by the roofline: memory and arithmetic overlap, so the slower of the two decides.

    Attributes: flops, bytes, and the seconds that each takes alone at the machine's rates.
    """

    flops: float
    bytes: float
    compute_s: float
    memory_s: float

    @property
    def seconds(self) -> float:
        """The larger of the two."""
        return max(self.compute_s, self.memory_s)

    @property
    def bound(self) -> str:
        """ "compute" or "memory"."""
        return "compute" if self.compute_s > self.memory_s else "memory"

    @property
    def intensity(self) -> float:
        """FLOP a byte."""
        return self.flops / self.bytes if self.bytes else 0.0


def predict(machine: Machine, flops: Number | float, nbytes: Number | float) -> Prediction:
    """The roofline's time for so much work."""
    return Prediction(
        float(flops),
        float(nbytes),
        float(flops) / (machine.tflops * 1e12),
        float(nbytes) / (machine.bandwidth_gb_s * 1e9),
    )


@dataclass(frozen=True)
class Case:
    """One forward pass: `phase` "naive" or "prefill" of `seq` tokens, or "decode" of the seq-th token with seq - 1 in
    the cache, for `batch` sequences.
    """

    phase: str
    batch: int
    seq: int

    @property
    def sizes(self) -> tuple[int, int, int]:
        """(b, n, p)."""
        return (self.batch, 1, self.seq - 1) if self.phase == "decode" else (self.batch, self.seq, 0)


def forms_of(model: Model, case: Case) -> dict[str, Work]:
    """The closed forms that `case` asks for: a textbook's naive pass has no cache, prefill makes the last row's
    logits.
    """
    cached = model.attention != "textbook" or case.phase == "decode"
    return replace(model, cached=cached, last_row=case.phase == "prefill").parts()


def step_seconds(model: Model, machine: Machine, case: Case) -> float:
    """The whole pass by the closed form, in seconds; a materialized cache holds just the case's tokens."""
    work = total(forms_of(model, case))
    flops, nbytes = (form.at(*case.sizes, s=case.seq) for form in (work.flops, work.bytes))
    return predict(machine, flops, nbytes).seconds


def verify_seconds(model: Model, machine: Machine, batch: int, seq: int, rows: int) -> float:
    """A pass of `rows` rows a sequence, the last of which is the sequence's token number seq, by the closed form."""
    work = total(model.parts())
    p = max(seq - rows, 0)
    flops, nbytes = (form.at(batch, rows, p, seq) for form in (work.flops, work.bytes))
    return predict(machine, flops, nbytes).seconds


@dataclass(frozen=True)
class CacheGain:
    """Time without the KV cache over time with it.

    step: for token number seq alone. text: for all tokens 1 to seq, one after the other.
    """

    batch: int
    seq: int
    step: float
    text: float


def cache_gain(model: Model, machine: Machine, batch: int, seq: int) -> CacheGain:
    """What the cache gains by the closed forms, `model` being that of both passes."""

    def steps(phase: str) -> list[float]:
        work = total(forms_of(model, Case(phase, batch, seq)))  # the same forms for every length
        cases = [Case(phase, batch, n) for n in range(1, seq + 1)]
        return [
            predict(machine, *(form.at(*case.sizes, s=case.seq) for form in (work.flops, work.bytes))).seconds
            for case in cases
        ]

    naive, cached = steps("naive"), steps("decode")
    return CacheGain(batch, seq, naive[-1] / cached[-1], sum(naive) / sum(cached))


def weight_seconds(model: Model, machine: Machine, head: bool = True) -> float:
    """What one decode step takes for the weights alone, whatever batch and context: its constant share, and a floor.

    head: with the product that makes the logits and the LayerNorm before it.
    """
    parts = model.parts()
    nbytes = sum((w.bytes.coefficient() for part, w in parts.items() if head or part != "head"), Fraction(0))
    return float(nbytes) / (machine.bandwidth_gb_s * 1e9)
