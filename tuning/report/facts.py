"""Everything that a report says about a compiled model, as plain data: one `FunctionReport` for each PrimFunc that is
called. `page` and `terminal` write it down."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from gpt2_tvm.errors import UserError
from gpt2_tvm.expressions import Text, evaluate
from tuning.report.sources import Kernel

if TYPE_CHECKING:
    from gpt2_tvm.build import Plan
    from gpt2_tvm.pipeline import Lowered
    from tuning.report.asking import Answer
    from tuning.report.building import Built
    from tuning.report.glosses import Step
    from tuning.report.loops import Node, Place
    from tuning.report.story import Story
    from tuning.report.tile import Tile

EXAMPLE_TOKENS = 322  # of the prompt, and in the cache at decode, where a size is symbolic: the study's prompt
CLOSE = 6  # functions that are listed where a name fits several
GENERATES = ("decode", "greedy", "sample", "propose", "verify", "speculate", "decide", "stream", "look")


@dataclass(frozen=True)
class Buffer:
    """A parameter of a function."""

    name: str
    shape: str
    dtype: str


@dataclass(frozen=True)
class Version:
    """A function in one form: as the model has it, as its rule left it, or under `baseline`.

    rule: who made it ("" for the model's form). tir: TVMScript. kernels: generated code, empty where it was not
    compiled. resources: a row a kernel, {"kernel", and what `tuning.static` knows}.
    """

    rule: str
    tir: str
    nest: tuple[Node, ...]
    stages: tuple[Place, ...] = ()
    tile: Tile | None = None
    steps: tuple[Step, ...] = ()
    kernels: tuple[Kernel, ...] = ()
    resources: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True)
class FunctionReport:
    """One PrimFunc. grid, block, nbytes and flops are texts over b, n and p (see `inventory`); `sizes` has the values
    that the numbers below were computed with. intensity: FLOP a byte. bound_us: what the device's peak rates allow at
    best, in microseconds; None where the target names none. before is None for functions that come scheduled.
    """

    name: str
    role: str
    rule: str
    calls: dict[str, int]
    calls_per_token: int
    kernels: int
    grid: list[Text] | None
    block: list[Text] | None
    shared_memory_bytes: Text | None
    bytes_text: Text
    flops_text: Text | None
    sizes: dict[str, int]
    nbytes: int
    flops: int | None
    intensity: float | None
    bound_us: float | None
    memory_bound: bool | None
    buffers: tuple[Buffer, ...]
    answers: tuple[Answer, ...]
    story: Story | None
    before: Version | None
    after: Version
    baseline: Version | None
    baseline_note: str


@dataclass
class Report:
    """A model compiled for a target.

    ridge: the intensity, FLOP a byte, where the device's two peaks meet. functions: by the bytes that a decode step
    moves through them, the most first. whole: all functions of the model, and not the one that was asked for. command:
    the command line that makes the same report, "" where none did.
    """

    model: str
    target: str
    description: str
    kind: str
    quantization: str
    rules: tuple[str, ...]
    versions: dict[str, str]
    peak: dict[str, Any] | None
    ridge: float | None
    launches_per_decode: int
    functions: list[FunctionReport] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    whole: bool = True
    command: str = ""

    @property
    def language(self) -> str:
        from tuning.report.sources import LANGUAGES

        return LANGUAGES[self.kind]


Progress = Callable[[str, float], None]


def choose(roles: Mapping[str, str], wanted: str | None) -> list[str]:
    """The functions to report: all, or the one of this name, or the only one in whose name and role (`roles`: by name)
    each of these words occurs.

    Raises:
        UserError: there is none, or there are several; it lists names that are close.
    """
    if wanted is None:
        return list(roles)
    if wanted in roles:
        return [wanted]
    words = wanted.lower().split()
    fit = [name for name, role in roles.items() if words and all(word in f"{name} {role}".lower() for word in words)]
    if len(fit) == 1:
        return fit
    if fit:
        listed = ", ".join(f"{name} ({roles[name]})" for name in fit[:CLOSE]) + (", ..." if len(fit) > CLOSE else "")
        raise UserError(f"--function {wanted}: it fits {len(fit)} functions; close to it: {listed}")
    close = difflib.get_close_matches(wanted, list(roles), n=5, cutoff=0.4)
    there = f"close to it: {', '.join(close)}" if close else f"there are {', '.join(roles)}"
    raise UserError(f"--function {wanted}: the compiled model has no such function; {there}")


def collect(plan: Plan, model: str, function: str | None = None, progress: Progress | None = None) -> Report:
    """Lower and schedule a model, compile its functions, and gather what there is to say about each (or about one).

    Raises UserError for an unknown function. Missing toolchains are notes of the report.
    """
    say = progress or (lambda what, share: None)
    from gpt2_tvm import toolchains
    from gpt2_tvm.build import lower_plan, versions
    from gpt2_tvm.inventory import function_table
    from tuning.report.building import build

    if toolchains.missing(plan.target) is None:
        toolchains.prepare(plan.target)
    say("lowering and scheduling", 0.05)
    lowered, _ = lower_plan(plan)
    table = function_table(lowered, plan)
    rows = {row["name"]: row for row in table["functions"]}
    names = choose({name: row["role"] for name, row in rows.items()}, function)
    say("asking the rules", 0.25)
    asked = {name: _ask(plan, lowered, name) for name in names}
    baselines = {name: _baseline(plan, lowered, name, rows[name]["rule"]) for name in names}
    say("compiling for the device", 0.4)
    built = build(plan, lowered, {name: lowered.scheduled[name] for name in names})
    say("compiling under baseline", 0.65)
    under = build(plan, _lowered_as(lowered, baselines), {name: b[0] for name, b in baselines.items() if b[0]})
    peak = plan.target.peak
    rate = _peak_flops(plan, table["compute_dtype"])
    report = Report(
        model=model,
        target=plan.target.name,
        description=plan.target.description,
        kind=plan.target.kind,
        quantization=plan.scheme.name,
        rules=plan.rules,
        versions=versions(),
        peak={"bandwidth_gb_s": peak.bandwidth_gb_s, "tflops": rate, "source": peak.source} if peak else None,
        ridge=rate * 1e3 / peak.bandwidth_gb_s if peak and rate and peak.bandwidth_gb_s else None,
        launches_per_decode=table["launches_per_decode"],
        notes=list(dict.fromkeys(note for note in (built.note, under.note) if note)),
        whole=function is None,
    )
    for i, name in enumerate(names):
        say(f"describing: {name}", 0.85 + 0.1 * i / len(names))
        report.functions.append(
            _describe(plan, lowered, report, rows[name], asked[name], baselines[name], built, under)
        )
    report.functions.sort(key=lambda f: (-f.calls_per_token * f.nbytes, f.name))
    return report


def version_of(func: Any, rule: str = "", schedule: Any = None) -> Version:
    """A PrimFunc as a `Version`, without its generated code; `schedule` is the s_tir.Schedule that made it, if any."""
    from tuning.report.glosses import steps_of
    from tuning.report.loops import loop_nest, stages
    from tuning.report.tile import find_tile

    nest = loop_nest(func)
    return Version(rule, script(func), nest, tuple(stages(nest)), find_tile(func), tuple(steps_of(schedule)))


def script(func: Any) -> str:
    """TVMScript of a PrimFunc, without the imports above it; with the width of integers left out where that makes it
    shorter, which it does for the width that most have."""
    texts = [func.script(show_meta=False, int_dtype=dtype) for dtype in ("int32", "int64")]
    lines = min(texts, key=len).splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith("@")), 0)
    return "\n".join(lines[start:])


def _ask(plan: Plan, lowered: Lowered, name: str) -> tuple[list[Answer], Any]:
    """What each rule says about a function, and the schedule that made it (None for one that came scheduled)."""
    from gpt2_tvm.passes.apply_rules import is_scheduled
    from gpt2_tvm.schedules.registry import make_rules
    from tuning.report.asking import ask
    from tuning.report.reasons import why_not, work_of

    func = lowered.fused[name]
    if is_scheduled(func):
        return [], None
    answers = ask(func, make_rules(plan.rules, plan.target), plan.target.tvm_target())
    work = work_of(func)
    answers = [a if a.outcome != "declined" else replace(a, reason=why_not(a.rule, work)) for a in answers]
    return answers, next((answer.schedule for answer in answers if answer.won), None)


def _baseline(plan: Plan, lowered: Lowered, name: str, rule: str) -> tuple[Any, Any, str, str]:
    """(the function under `baseline`, its schedule, the rule that made it, "") or (None, None, "", why it is not
    shown)."""
    from gpt2_tvm.passes.apply_rules import NONE, OURS, is_scheduled
    from gpt2_tvm.schedules.registry import make_rules, rule_set
    from tuning.report.asking import ask

    func = lowered.fused[name]
    if rule == OURS or is_scheduled(func):
        return None, None, "", "it comes scheduled, so baseline has the same kernel"
    rules = rule_set("baseline", plan.target)
    answers = ask(func, make_rules(rules, plan.target), plan.target.tvm_target())
    won = next((answer for answer in answers if answer.won), None)
    if won is not None:
        if won.rule == rule:
            return None, None, "", f"{rule} is the rule that baseline has for it, too"
        scheduled = won.schedule.mod["main"].with_attr("tirx.is_scheduled", True)
        return scheduled, won.schedule, won.rule, ""
    if plan.target.kind == "cpu":
        same = rule == NONE
        return (None, None, "", "no rule took it, as under baseline") if same else (func, None, NONE, "")
    why = "; ".join(answer.error or answer.outcome for answer in answers)
    return None, None, "", f"baseline cannot schedule it: {why}"


def _lowered_as(lowered: Lowered, baselines: dict[str, tuple[Any, Any, str, str]]) -> Lowered:
    """`lowered` with the baseline's form of the functions that have one."""
    import tvm

    from gpt2_tvm.schedules.registry import Hit

    forms = {name: b[0] for name, b in baselines.items() if b[0] is not None}
    hits = [Hit(name, b[2]) for name, b in baselines.items() if b[0] is not None]
    scheduled = tvm.IRModule(forms) if forms else lowered.scheduled
    return replace(lowered, scheduled=scheduled, hits=hits)


def _describe(
    plan: Plan,
    lowered: Lowered,
    report: Report,
    row: dict[str, Any],
    asked: tuple[list[Answer], Any],
    baseline: tuple[Any, Any, str, str],
    built: Built,
    under: Built,
) -> FunctionReport:
    from gpt2_tvm.passes.apply_rules import OURS

    name, rule = row["name"], row["rule"]
    answers, schedule = asked
    after = _with_code(version_of(lowered.scheduled[name], rule, schedule), name, built)
    func, its_schedule, its_rule, note = baseline
    sizes = _sizes(plan, row["calls"])
    nbytes = evaluate(row["bytes"], sizes)
    flops = None if row["flops"] is None else evaluate(row["flops"], sizes)
    intensity = flops / nbytes if flops is not None and nbytes else None
    bound, memory = _bound(report.peak, nbytes, flops)
    return FunctionReport(
        **{key: row[key] for key in ("name", "role", "rule", "calls", "kernels", "grid", "block")},
        calls_per_token=row["calls"].get(f"greedy_b{min(plan.batch_sizes)}", 0),
        shared_memory_bytes=row["shared_memory_bytes"],
        bytes_text=row["bytes"],
        flops_text=row["flops"],
        sizes=sizes,
        nbytes=nbytes,
        flops=flops,
        intensity=intensity,
        bound_us=bound,
        memory_bound=memory,
        buffers=tuple(_buffers(lowered.fused[name])),
        answers=tuple(answers),
        story=_story(plan, name, rule, bool(after.steps)),
        before=None if rule == OURS else version_of(lowered.fused[name]),
        after=after,
        baseline=None if func is None else _with_code(version_of(func, its_rule, its_schedule), name, under),
        baseline_note=note,
    )


def _story(plan: Plan, name: str, rule: str, scheduled: bool) -> Story | None:
    """Where no primitives tell how a function was made: what its author says."""
    from gpt2_tvm.passes.apply_rules import NONE, OURS
    from gpt2_tvm.schedules.registry import make_rules
    from tuning.report import story

    if rule == OURS:
        return story.of_kernel(name, plan.target.kind)
    if scheduled or rule == NONE:
        return None
    return story.of_rule(make_rules((rule,), plan.target)[0][1])


def _with_code(version: Version, name: str, built: Built) -> Version:
    kernels = tuple(built.kernels.get(name, ()))
    wanted = {kernel.name for kernel in kernels} | {name}
    found = sorted(built.resources.items(), key=lambda item: (len(item[0]), item[0]))  # kernel, kernel_1, ...
    rows = [
        {"kernel": kernel, **(vars(value) if hasattr(value, "__dict__") else dict(value))}
        for kernel, value in found
        if kernel in wanted or kernel.startswith(f"{name}_kernel")
    ]
    return replace(version, kernels=kernels, resources=tuple(rows))


def _buffers(func: Any) -> list[Buffer]:
    from tuning.report.loops import extent_text

    return [
        Buffer(str(p.name), f"[{', '.join(str(extent_text(e)) for e in p.shape)}]", str(p.dtype))
        for p in func.params
        if hasattr(p, "shape")
    ]


def _sizes(plan: Plan, calls: dict[str, int]) -> dict[str, int]:
    """Values for b, n and p: one sequence; the rows of a prompt, or one row after as many tokens in the cache."""
    tokens = min(EXAMPLE_TOKENS, max(1, plan.max_seq_len // 2))
    generating = all(caller.startswith(GENERATES) for caller in calls)
    return {"b": 1, "n": 1, "p": tokens} if generating else {"b": 1, "n": tokens, "p": 0}


def _peak_flops(plan: Plan, dtype: str) -> float | None:
    peak = plan.target.peak
    if peak is None:
        return None
    return peak.fp32_tflops if dtype == "float32" else peak.fp16_tflops or peak.fp32_tflops


def _bound(peak: dict[str, Any] | None, nbytes: int, flops: int | None) -> tuple[float | None, bool | None]:
    """(microseconds at the device's peaks, whether memory sets them)."""
    if peak is None or not peak["bandwidth_gb_s"]:
        return None, None
    memory = nbytes / (peak["bandwidth_gb_s"] * 1e3)
    compute = (flops or 0) / (peak["tflops"] * 1e6) if peak["tflops"] else 0.0
    return max(memory, compute), memory >= compute
