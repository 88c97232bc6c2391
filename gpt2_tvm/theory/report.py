"""One report: coefficients, cases, the module beside the closed form, cache, speculation, measured points."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from gpt2_tvm.theory import speculation
from gpt2_tvm.theory.closed import PARTS, Model, Work, decode_coefficients, naive_coefficients, total
from gpt2_tvm.theory.explain import Layout, Reason, module_reasons, textbook_reasons, unexplained
from gpt2_tvm.theory.machine import Machine
from gpt2_tvm.theory.predict import Case, cache_gain, forms_of, predict, verify_seconds, weight_seconds

if TYPE_CHECKING:
    from gpt2_tvm.theory.counted import Counted
    from gpt2_tvm.theory.measured import Point

Json = dict[str, Any]


@dataclass(frozen=True)
class Question:
    """What is asked.

    Attributes:
        name: of the model. model: its closed form, as compiled ("flash" or "materialized" attention, cached).
        machine, batches, seqs: where, and the sizes to look at.
        capacity: slots of the compiled cache. panel_rows: of the target's weight layout, 0 for plain rows.
        counted: the module's count, None where it cannot be made, and then why_not says why.
    """

    name: str
    model: Model
    machine: Machine
    batches: tuple[int, ...]
    seqs: tuple[int, ...]
    capacity: int
    panel_rows: int = 0
    counted: Counted | None = None
    why_not: str = ""

    @property
    def textbook(self) -> Model:
        """The textbook's form of the same model."""
        return replace(self.model, attention="textbook", cached=False)


@dataclass(frozen=True)
class Drafting:
    """What speculation is asked with: the draft's name and form, or a cost ratio alone."""

    name: str
    model: Model | None
    cost_ratio: float | None
    agreement: float
    sampled_agreement: float


def make_report(question: Question, drafting: Drafting | None, points: Sequence[Point] = ()) -> Json:
    """Everything as plain JSON values; times in milliseconds, sizes in MB of 10^6 bytes."""
    q = question
    cases = [_case(q, m, case) for m, case in _all_cases(q)]
    return {
        "model": q.name,
        "parameters": q.model.config.num_parameters(),
        "device": {**asdict(q.machine), "ridge_flop_per_byte": q.machine.ridge},
        "dtypes": asdict(q.model.dtypes),
        "float_tables": list(q.model.float_tables),
        "attention": q.model.attention,
        "weights": _weights(q),
        "cache": _cache(q),
        "coefficients": _coefficients(q),
        "cases": cases,
        "module": _agreement(q, cases),
        "textbook_differs": _textbook(q),
        "cache_gain": [
            {"attention": m.attention, **asdict(cache_gain(m, q.machine, b, n))}
            for m in _forms(q)
            for b in q.batches
            for n in q.seqs
        ],
        "speculation": _speculation(q, drafting) if drafting else None,
        "measured": [point.to_json() for point in points],
    }


def _forms(q: Question) -> list[Model]:
    return [q.textbook, q.model]


def _all_cases(q: Question) -> list[tuple[Model, Case]]:
    sizes = [(b, n) for b in q.batches for n in q.seqs]
    phases = (
        (q.textbook, "naive"),
        (q.model, "naive"),
        (q.model, "prefill"),
        (q.textbook, "decode"),
        (q.model, "decode"),
    )
    return [(model, Case(phase, b, n)) for b, n in sizes for model, phase in phases]


def exact(value: Fraction) -> int | float:
    """A whole number as int, else a float."""
    return int(value) if value.denominator == 1 else float(value)


def _values(work: Work, b: int, n: int, p: int, s: int) -> tuple[Fraction, Fraction]:
    return work.flops.at(b, n, p, s), work.bytes.at(b, n, p, s)


def _case(q: Question, model: Model, case: Case) -> Json:
    """One pass: work, intensity, bound and time, of each part and the whole; the module's beside it where counted."""
    slots = q.capacity if model.attention == "materialized" else case.seq
    forms = forms_of(model, case)
    ours = model is q.model and q.counted is not None and _is_counted(q, case)
    counted = q.counted.parts(case.phase, *case.sizes) if ours and q.counted else {}
    works = {part: _values(work, *case.sizes, slots) for part, work in forms.items()}
    none = Fraction(0)
    works["whole"] = (sum((f for f, _ in works.values()), none), sum((b for _, b in works.values()), none))
    rows = {}
    for part, (flops, nbytes) in works.items():
        guess = predict(q.machine, flops, nbytes)
        rows[part] = {
            "flops": exact(flops),
            "bytes": exact(nbytes),
            "intensity": guess.intensity,
            "bound": guess.bound,
            "time_ms": 1e3 * guess.seconds,
            "compute_ms": 1e3 * guess.compute_s,
            "memory_ms": 1e3 * guess.memory_s,
        }
    found: Json = {
        "phase": case.phase,
        "attention": model.attention,
        "batch": case.batch,
        "seq": case.seq,
        "parts": rows,
    }
    if ours:
        found["module"] = _module(q, model, case, forms, counted, slots)
    return found


def _is_counted(q: Question, case: Case) -> bool:
    return q.counted is not None and (case.phase != "decode" or case.batch in q.counted.splits)


def _module(
    q: Question, model: Model, case: Case, forms: dict[str, Work], counted: dict[str, tuple[int, int]], slots: int
) -> Json:
    assert q.counted is not None
    b, n, p = case.sizes
    layout = Layout(q.panel_rows, q.counted.splits.get(b, 1))
    reasons = module_reasons(model, layout, case.phase, b, n, p)
    fixed = {part: Work(w.flops.replace(s=slots), w.bytes.replace(s=slots)) for part, w in forms.items()}
    left = [unexplained(fixed[part], counted[part], reasons[part], b, n, p) for part in PARTS]
    functions = []
    seconds = 0.0
    for call in q.counted.calls(case.phase, b):
        flops, nbytes = call.work(b, n, p)
        guess = predict(q.machine, flops, nbytes)
        seconds += call.times * guess.seconds
        functions.append(
            {
                "name": call.name,
                "label": call.label,
                "part": call.part,
                "times": call.times,
                "flops": flops,
                "bytes": nbytes,
                "intensity": guess.intensity,
                "bound": guess.bound,
                "time_us": 1e6 * guess.seconds,
            }
        )
    return {
        "parts": {part: {"flops": counted[part][0], "bytes": counted[part][1]} for part in PARTS},
        "by_function_ms": 1e3 * seconds,
        "launches": sum(call.times for call in q.counted.calls(case.phase, b)),
        "differs": [_reason(reason, part) for part in PARTS for reason in reasons[part]],
        "unexplained": [_reason(r, part) for part, r in zip(PARTS, left, strict=True) if r.flops or r.bytes],
        "functions": functions,
    }


def _reason(reason: Reason, part: str) -> Json:
    return {"part": part, "why": reason.why, "flops": exact(reason.flops), "bytes": exact(reason.bytes)}


def _agreement(q: Question, cases: list[Json]) -> Json:
    """Whether the module's count is the closed form's in every part of every case."""
    compared = [case["module"] for case in cases if "module" in case]
    return {
        "counted": bool(compared),
        "why_not": q.why_not,
        "cases": len(compared),
        "equal": sum(not m["differs"] and not m["unexplained"] for m in compared),
        "explained": sum(bool(m["differs"]) and not m["unexplained"] for m in compared),
        "unexplained": sum(bool(m["unexplained"]) for m in compared),
    }


def _weights(q: Question) -> Json:
    whole = q.model.weight_bytes()
    head = q.model.head().bytes.coefficient()
    return {
        "bytes_a_step": exact(whole),
        "head_bytes_a_step": exact(head),
        "step_ms": 1e3 * weight_seconds(q.model, q.machine),
        "step_without_head_ms": 1e3 * weight_seconds(q.model, q.machine, head=False),
    }


def _cache(q: Question) -> Json:
    sizes = [(b, n) for b in q.batches for n in q.seqs]
    return {
        "bytes_a_token": exact(q.model.cache_bytes(1, 1)),
        "cases": [{"batch": b, "seq": n, "mb": float(q.model.cache_bytes(b, n)) / 1e6} for b, n in sizes],
        "full_context_mb": float(q.model.cache_bytes(1, q.model.config.n_positions)) / 1e6,
    }


def _coefficients(q: Question) -> list[Json]:
    rows = []
    for model in _forms(q):
        parts = model.parts()
        for part, work in {**parts, "whole": total(parts)}.items():
            found = {"attention": model.attention, "part": part, "pass": "naive"}
            rows.append({**found, **{key: exact(value) for key, value in naive_coefficients(work).items()}})
    for model in _forms(q):
        parts = replace(model, cached=True).parts()
        for part, work in {**parts, "whole": total(parts)}.items():
            found = {"attention": model.attention, "part": part, "pass": "decode"}
            rows.append({**found, **{key: exact(value) for key, value in decode_coefficients(work).items()}})
    return rows


def _textbook(q: Question) -> list[Json]:
    """Why our naive pass is not the textbook's, for flash attention."""
    if q.model.attention != "flash":
        return []
    rows = []
    for b in q.batches:
        for n in q.seqs:
            reasons = textbook_reasons(q.textbook, q.model, b, n)
            ours = total(q.model.parts())
            values = ours.flops.at(b, n), ours.bytes.at(b, n)
            left = unexplained(total(q.textbook.parts()), values, reasons, b, n, 0)
            rows.append(
                {
                    "batch": b,
                    "seq": n,
                    "reasons": [_reason(r, "MHA") for r in reasons],
                    "unexplained": {"flops": exact(left.flops), "bytes": exact(left.bytes)},
                }
            )
    return rows


def _speculation(q: Question, drafting: Drafting) -> Json:
    """The best draft length by Theorem 3.8 with the constant step times, and with the roofline's time for checking."""
    batch, seq = q.batches[0], q.seqs[-1]
    draft_s = target_s = None
    ratio = drafting.cost_ratio
    if drafting.model is not None:
        draft_s, target_s = weight_seconds(drafting.model, q.machine), weight_seconds(q.model, q.machine)
        ratio = draft_s / target_s if ratio is None else ratio
    assert ratio is not None
    kinds = {"greedy": drafting.agreement, "with temperature": drafting.sampled_agreement}
    if drafting.agreement == drafting.sampled_agreement:
        kinds = {"greedy or sampled": drafting.agreement}
    times = {rows: verify_seconds(q.model, q.machine, batch, seq, rows) for rows in range(1, speculation.LONGEST + 2)}
    draft_step = (
        verify_seconds(drafting.model, q.machine, batch, seq, 1)
        if drafting.model is not None and drafting.cost_ratio is None
        else ratio * times[1]
    )
    flops = None
    if drafting.model is not None:
        draft_flops, target_flops = (total(m.parts()).flops.at(1, 1, seq - 1, seq) for m in (drafting.model, q.model))
        flops = float(draft_flops / target_flops)
    rows = []
    for kind, agreement in kinds.items():
        theorem = [speculation.speedup(agreement, k, ratio) for k in range(speculation.LONGEST + 1)]
        roofline = [
            speculation.speedup_measured(agreement, k, draft_step, times.__getitem__)
            for k in range(speculation.LONGEST + 1)
        ]
        for by, gains in (("theorem 3.8", theorem), ("roofline", roofline)):
            found = speculation.best(agreement, gains.__getitem__)
            more = None if flops is None else speculation.arithmetic_increase(agreement, found.k, flops)
            known = {"decoding": kind, "agreement": agreement, "by": by, "operations": more}
            rows.append({**known, **asdict(found), "curve": gains[:17]})
    return {
        "draft": drafting.name,
        "cost_ratio": ratio,
        "draft_ms": None if draft_s is None else 1e3 * draft_s,
        "target_ms": None if target_s is None else 1e3 * target_s,
        "batch": batch,
        "seq": seq,
        "best": rows,
    }
