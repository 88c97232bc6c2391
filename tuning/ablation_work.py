"""What an ablation does in child processes: ask for the device, compile a rule set, check it, time it."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tuning import ablation_cache, ablation_reference
from tuning.children import Announce, Failure
from tuning.measure import session

TURN_S = 0.4  # a turn goes on until that much is timed: single prefills of a small model are too short to tell
MOST_CYCLES = 25
FEWEST_CYCLES = 3  # of short ones: the first of a turn finds its threads asleep
SHORT_S = 0.5
# Sizes on a software device where none are asked for: plain loops take up to ten seconds for the study's 322 tokens.
LIGHTER = {"prompt_tokens": 64, "generate_tokens": 32}
PARTS, PREFILLS_S = 8, 1.0  # on a software device: parts of decoding, seconds of prefills in a turn
FEWEST_STEPS = 5  # of decode whose functions are timed


FunctionTimes = dict[str, dict[str, dict[str, float]]]
WEB = ("node", "chromium")  # devices that `runners.web` knows
SOFTWARE = ("swiftshader", "llvmpipe", "microsoft basic render")


@dataclass(frozen=True)
class Job:
    """What all rule sets of an ablation have in common; goes to every child.

    Attributes:
        model, target, quantization, attention, seed: as for `compile_model`.
        prompt_tokens, generate_tokens: what a turn times: a prefill from an empty cache, then greedy decoding.
        device: as for `Engine`.
        cache: the folder for artifacts and the reference.
        toggles: what a set is of: "rules", or "passes" (then with the target's full rules).
        adapter: as for `write_artifact`.
    """

    model: str
    target: str
    quantization: str = "q0f32"
    attention: str = "flash"
    seed: int = 0
    prompt_tokens: int = 322
    generate_tokens: int = 64
    device: str | None = None
    cache: str = "artifacts/ablation/cache"
    toggles: str = "rules"
    adapter: tuple[str, ...] | None = None

    def choices(self, names: str) -> tuple[str, str]:
        """(rules, passes), as `compile_model` takes them, of a set: names with commas between, or baseline for none."""
        if self.toggles == "passes":
            return "full", "none" if names == "baseline" else names
        return names, "all"

    @property
    def in_a_page(self) -> bool:
        """Whether the device is one that `runners.web` knows."""
        return self.device in WEB

    @property
    def remote(self) -> bool:
        """Whether the device is another machine's, behind RPC."""
        return self.device is not None and self.device.startswith("rpc://")


def probe(announce: Announce, job: Job) -> dict[str, Any]:
    """The device that would run the target's code: {"device": its name, "memory_bytes": of a GPU, or None, "software":
    whether a GPU's code would run on the CPU, "adapter": `Job.adapter`}.

    Raises UserError where this machine has none.
    """
    from gpt2_tvm.errors import UserError
    from gpt2_tvm.runners.vm import processor_name
    from targets import load_target
    from targets.detect import missing_features

    target = load_target(job.target)
    if job.remote:
        return {"device": _ask_worker(str(job.device), target.kind), "memory_bytes": None}
    wanted = job.device or target.kind
    otherwise = "run where there is one, or look at the compile-time half with --static"
    announce(f"device {wanted}")
    if target.kind == "webgpu" and wanted in WEB:
        return _ask_page(wanted)
    if wanted.split(":")[0] != target.kind:
        raise UserError(f"--device {wanted}: code for {target.name} runs on a {target.kind} device")
    if target.kind == "cpu":
        lacking = missing_features(target.requires)
        if lacking:
            raise UserError(f"--target {target.name}: this CPU lacks {', '.join(lacking)}; {otherwise}")
        return {"device": processor_name(), "memory_bytes": None}
    if target.kind == "webgpu":
        from gpt2_tvm.runners.wgpu import open_device
        from gpt2_tvm.schedules.webgpu_variants import VARIANTS

        device = open_device(job.device)
        # wgpu does not tell a GPU's memory; a software device has the machine's
        memory = None if device.is_software else 2 << 30
        name = f"{device.name} on {processor_name()}" if device.is_software else device.name
        met = tuple(sorted({one for variant in VARIANTS for one in variant.requires if device.meets(one)}))
        return {"device": name, "memory_bytes": memory, "software": device.is_software, "adapter": met}
    import tvm

    if target.kind == "cuda":
        from gpt2_tvm.toolchains import cuda_runtime

        cuda_runtime.load()
    try:
        found = tvm.device(wanted)
        present = bool(found.exist)
    except Exception:
        present = False
    if not present:
        raise UserError(f"this machine has no {wanted} device that TVM's runtime can use; {otherwise}")
    memory = getattr(found, "total_global_memory", None)
    return {"device": str(found.device_name), "memory_bytes": memory}


def _ask_worker(address: str, kind: str) -> str:
    """What the worker at rpc://... calls its device. UserError where it cannot be reached or has none."""
    from gpt2_tvm.errors import UserError
    from gpt2_tvm.runners.rpc import device_name
    from gpt2_tvm.runners.rpc_session import open_session, parse_address

    where = parse_address(address)
    worker = open_session(where)
    device = worker.device(kind)
    if not device.exist:
        raise UserError(f"the worker at {where} has no {kind} device that TVM's runtime can use; choose another --key")
    return f"{device_name(worker, device, kind)} at {where}"


def _ask_page(runner: str) -> dict[str, Any]:
    from gpt2_tvm.runners.vm import processor_name
    from gpt2_tvm.runners.web import Agent

    page = Agent(None, runner)
    try:
        name = str(page.facts["adapter"])
        software = any(word in name.lower() for word in SOFTWARE)
        # WebGPU does not tell a GPU's memory; a software device has the machine's
        memory = None if software else 2 << 30
        where = f"{page.where} on {processor_name()}" if software else page.where
        return {"device": f"{name} in {where}", "memory_bytes": memory, "software": software}
    finally:
        page.close()


def schedule(announce: Announce, job: Job, rules: str) -> dict[str, Any]:
    """What `lower` tells of a rule set."""
    return lower(announce, job, rules)[0]


def lower(
    announce: Announce, job: Job, rules: str, cached: bool = False
) -> tuple[dict[str, Any], tuple[Any, Any, Any]]:
    """Lower a rule set without building it: {"code": digest of the scheduled module and of all else that decides an
    artifact, "functions": name, role, rule, kernels and calls of each, as in the manifest, "launches_prefill",
    "launches_token", "bytes_token": of a greedy step after the prompt, what its functions must move}; and what
    `artifact_writer.write_artifact` goes on with: the source, the plan, and what `lower_plan` made of it.
    """
    from gpt2_tvm.tvm_alone import import_tvm

    announce("start: importing TVM")
    import_tvm()
    import tvm_ffi

    from gpt2_tvm.build import lower_plan, make_plan, versions
    from gpt2_tvm.checkpoint import resolve_model
    from gpt2_tvm.inventory import function_table
    from targets import load_target, specialise

    source = resolve_model(job.model, seed=job.seed)
    target = specialise(load_target(job.target))
    widths = (ablation_reference.WIDTH,)
    names = job.choices(rules)
    plan = make_plan(
        source.config, target, job.quantization, names[0], job.attention, (1,), None, widths, passes=names[1]
    )
    target = plan.target  # with the instructions that a rule asks for
    announce("lowering and scheduling")
    exported = _exported(job, plan, target) if cached else None
    with target.tvm_target():
        lowered, names_of_weights = lower_plan(plan, exported=exported)
        announce("scheduled: listing functions")
        table = function_table(lowered, plan)
    rows = table["functions"]
    bare = [row for row in rows if target.kind != "cpu" and row["kernels"] == 0]
    if bare:  # TVM refuses it on CUDA and Metal with this question; for webgpu it does not look
        name, rule = bare[0]["name"], bare[0]["rule"]
        raise Failure("unbound-thread", f"{rule} left {name} without a thread; did you forget to bind?")
    made_of: dict[str, Any] = {
        "scheduled": str(tvm_ffi.structural_hash(lowered.scheduled, map_free_vars=True)),
        "target": target.to_json(),
        "model": [source.name, plan.config.to_json(), ablation_cache.weights_identity(source)],
        "scheme": asdict(plan.scheme),
        "versions": versions(),
    }
    if job.in_a_page:
        made_of["page"] = True  # an artifact for wgpu alone has no model.wasm
    if job.adapter is not None:
        made_of["adapter"] = job.adapter
    del made_of["target"]["rules"]  # what they did is in the module
    functions = [{key: row[key] for key in ("name", "role", "rule", "kernels", "calls")} for row in rows]
    facts = {
        "code": ablation_cache.digest(made_of),
        "functions": functions,
        "launches_prefill": table["launches"]["prefill"],
        "launches_token": table["launches_per_decode"],
        "bytes_token": bytes_of(rows, "greedy_b1", job.prompt_tokens),
    }
    return facts, (source, plan, (lowered, names_of_weights))


def _exported(job: Job, plan: Any, target: Any) -> tuple[Any, list[str]]:
    """`build.export_module`, done once for all sets of rules: it takes as long as rules and passes together."""
    import tvm
    from filelock import FileLock

    from gpt2_tvm.build import export_module
    from gpt2_tvm.files import replacing_file

    cache = Path(job.cache)
    cache.mkdir(parents=True, exist_ok=True)
    made_of = [target.to_json(), plan.config.to_json(), asdict(plan.scheme), plan.attention, str(plan.step)]
    file = cache / f"exported-{ablation_cache.digest([*made_of, ablation_cache.sources()])}.json"
    with FileLock(file.with_suffix(".lock")):  # sets compile side by side: the first one exports
        if file.is_file():
            names, text = json.loads(file.read_text(encoding="utf-8"))
            return tvm.ir.load_json(text), names
        with target.tvm_target():
            module, names = export_module(plan)
        if not (module.attrs and "external_mods" in module.attrs):  # objects of a compiler's, which JSON does not hold
            with replacing_file(file) as out:
                out.write(json.dumps([names, tvm.ir.save_json(module)]).encode())
    return module, names


def bytes_of(rows: list[dict[str, Any]], call: str, prompt_tokens: int) -> int | None:
    """Bytes that the functions of one call at batch 1 must move, each its own arguments, after a prompt; None where one
    of them does not say."""
    from gpt2_tvm.expressions import evaluate

    sizes = {"b": 1, "n": 1, "p": prompt_tokens}
    called = [row for row in rows if row["calls"].get(call)]
    if any(row["bytes"] is None for row in called):
        return None
    return sum(row["calls"][call] * evaluate(row["bytes"], sizes) for row in called)


def build(announce: Announce, job: Job, rules: str, made_from: str) -> dict[str, Any]:
    """Compile a rule set into the cache, unless the same scheduled module is there already, made from the same sources.

    Announces what `schedule` found before anything is built. Returns {"artifact": the folder's name in the cache,
    "compile_s": seconds, None where it was there}.
    """
    from filelock import FileLock

    from gpt2_tvm import toolchains
    from gpt2_tvm.artifact_writer import write_artifact
    from targets import load_target, specialise

    toolchains.prepare(specialise(load_target(job.target)))
    facts, (source, plan, lowered) = lower(announce, job, rules, cached=True)
    announce("scheduled", facts)
    folder = ablation_cache.artifact_folder(Path(job.cache), facts["code"], made_from)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):  # another set may come to the same code at the same time
        if (folder / "manifest.json").is_file():
            return {"artifact": folder.name, "compile_s": None}
        start = time.perf_counter()
        say = lambda what, share: announce(what) if share else None  # noqa: E731
        write_artifact(folder, source, plan, lowered, say=say, page=job.in_a_page, adapter=job.adapter)
        ablation_cache.keep_one_copy(folder)
    return {"artifact": folder.name, "compile_s": round(time.perf_counter() - start, 2)}


class Subject:
    """An artifact in an engine, in the process that times it. Making it compiles every shader of a webgpu artifact, one
    announced stage each, so that one which does not end is named."""

    def __init__(self, announce: Announce, job: Job, folder: str) -> None:
        announce("load")
        from gpt2_tvm.engine import Engine

        self._announce, self._job = announce, job
        self._engine = Engine(folder, job.device)
        self._prompt: Any = None
        if self._engine.artifact.kind == "webgpu" and job.device not in WEB:  # a page has compiled them all by now
            from gpt2_tvm.runners.wgpu import KERNELS
            from gpt2_tvm.runners.wgsl import parse_wgsl

            runner: Any = self._engine.runner
            for name, shader in parse_wgsl((Path(folder) / KERNELS).read_text(encoding="utf-8")).items():
                announce(f"shader {name}")
                runner.device.compile(shader)
        self.facts = {"device": self._engine.runner.device_name}

    def check(self, reference: str) -> float:
        """`ablation_reference.check` against the file."""
        expected = ablation_reference.Reference.load(Path(reference))
        return ablation_reference.check(self._engine, self._job.quantization, expected, self._announce)

    def warm(self, short: bool = False) -> None:
        """Once untimed what a turn does: pages, buffers and bindings are there afterwards. short: of a prompt of one
        token, which compiles what a software device compiles at its first launch, and little else."""
        self._cycle(2, prompt_tokens=1 if short else None)

    def turn(self) -> dict[str, Any]:
        """Prefill and greedy decoding, again and again for `TURN_S`: seconds of the fastest of each, how many cycles.

        The fastest, because what disturbs a turn only ever adds: on a shared host a neighbour slows a core to half for
        a second or two. On a software device one cycle is as long as such a burst: there decoding is taken in parts,
        of which the fastest counts, and further cycles are there for the prefill alone.
        """
        prefills: list[float] = []
        decodes: list[float] = []
        parts = self._parts()
        generate = self._job.generate_tokens
        start = time.perf_counter()
        while True:
            prefill_s, decode_s = self._cycle(generate, parts if not prefills else 1)
            prefills.append(prefill_s)
            if parts == 1 or not decodes:
                decodes.append(decode_s)
            generate = 1 if parts > 1 else generate
            # by the clock on the wall: through RPC a cycle takes longer than what it times
            spent = sum(prefills) if parts > 1 else time.perf_counter() - start
            enough = len(prefills) >= FEWEST_CYCLES or spent / len(prefills) > SHORT_S
            if (spent >= (TURN_S if parts == 1 else PREFILLS_S) and enough) or len(prefills) == MOST_CYCLES:
                break
        return {"prefill_s": min(prefills), "decode_s": min(decodes), "cycles": len(prefills)}

    def _parts(self) -> int:
        """Into how many parts the tokens of a turn are divided."""
        device = getattr(self._engine.runner, "device", None)
        software = getattr(device, "is_software", False)
        return PARTS if software and self._job.generate_tokens % PARTS == 0 else 1

    def _cycle(self, generate: int, parts: int = 1, prompt_tokens: int | None = None) -> tuple[float, float]:
        engine = self._engine
        if self._prompt is None:
            from gpt2_tvm.measure.cases import Case
            from gpt2_tvm.measure.subjects import prompt_of

            case = Case(1, self._job.prompt_tokens, self._job.generate_tokens)
            self._prompt = prompt_of(engine.artifact, case)
        timed = session.turn(engine, self._prompt[:, :prompt_tokens], generate, parts)
        if timed.tokens.shape != (1, generate):
            raise Failure("run-error", f"decode_greedy gave tokens of shape {list(timed.tokens.shape)}")
        return timed.prefill_s, timed.decode_s

    def time_functions(self, repeats: int, warmups: int) -> FunctionTimes:
        """Each function's time, by `tuning.measure.functions`: {"prefill": {function: {"time_us", "time_us_sd"}},
        "decode": the same}. repeats: rounds of the prefill; a decode step is shorter and has at least `FEWEST_STEPS`.
        """
        from tuning.measure.functions import time_engine

        calls = {"prefill": "prefill", "decode_b1": "decode"}
        found: FunctionTimes = {told: {} for told in calls.values()}
        self._announce("timing functions")
        rounds = {"prefill": repeats, "decode_b1": max(FEWEST_STEPS, repeats)}
        timed = time_engine(self._engine, tuple(calls), self._job.prompt_tokens, rounds, warmups, whole=warmups > 0)
        for one in timed.values():
            found[calls[one.call]][one.function] = {"time_us": one.time_us, "time_us_sd": one.time_us_sd}
        return found


def time_functions(announce: Announce, job: Job, folder: str, repeats: int, warmups: int) -> FunctionTimes:
    """`Subject.time_functions` where no process holds the artifact any more."""
    return Subject(announce, job, folder).time_functions(repeats, warmups)
