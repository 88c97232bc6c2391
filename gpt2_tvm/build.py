"""`compile_model`: a model and a target in, a checked artifact out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpt2_tvm.artifact import INTERFACES, MLC, OWN, SCORE_ROWS
from gpt2_tvm.checkpoint import BUNDLED_NAMES, ModelSource, resolve_model
from gpt2_tvm.data import bundled_streams
from gpt2_tvm.errors import UserError
from gpt2_tvm.kernels.persistent.shape import RULE as PERSISTENT
from gpt2_tvm.kernels.persistent.shape import StepShape, step_shape
from gpt2_tvm.passes.registry import pass_set
from gpt2_tvm.quantization import Scheme, scheme_for
from gpt2_tvm.schedules.registry import LETTERS, rule_set
from gpt2_tvm.schedules.tuned import Tuned, load_tuned
from gpt2_tvm.streams import StreamPlan, read_plan
from gpt2_tvm.toolchains import tensor_intrin
from gpt2_tvm.tvm_alone import import_tvm
from targets import DeviceTarget, load_target, specialise

if TYPE_CHECKING:
    from gpt2_tvm.config import GPT2Config
    from gpt2_tvm.pipeline import Lowered

ATTENTION = ("flash", "materialized")
VERIFY_WIDTHS = (4, 8)
PREFILL_CHUNK = 512  # tokens of one prefill call through MLC's interface
STREAM_ROWS = "4"  # the last token and three candidates
MAX_BATCH = 64
MAX_VERIFY_WIDTH = 32  # a tree row's mask is 32 bits

Progress = Callable[
    [str, float], None
]  # (what is being done, share done 0..1); share 0: a note that the user should read


@dataclass(frozen=True)
class Plan:
    """Everything that decides a module's code."""

    config: GPT2Config
    target: DeviceTarget
    scheme: Scheme
    rules: tuple[str, ...]
    attention: str
    batch_sizes: tuple[int, ...]
    verify_widths: tuple[int, ...]
    max_seq_len: int
    tuned: Tuned | None = None
    cuda_graph: bool = False
    passes: tuple[str, ...] | None = None
    streams: StreamPlan | None = None
    interface: str = OWN
    prefill_chunk: int = 0  # of MLC's interface

    @property
    def step(self) -> StepShape | None:
        """What the step of one sequence is as one kernel, where the rule of that name is among the rules."""
        if PERSISTENT not in self.rules:
            return None
        return step_shape(self.config, self.scheme, self.target, self.max_seq_len, self.batch_sizes)


def make_plan(
    config: GPT2Config,
    target: DeviceTarget,
    quantization: str = "q0f32",
    rules: str = "full",
    attention: str = "flash",
    batch_sizes: Sequence[int] = (1,),
    max_seq_len: int | None = None,
    verify_widths: Sequence[int] = VERIFY_WIDTHS,
    tuned: Tuned | None = None,
    cuda_graph: bool | None = None,
    passes: str = "all",
    interface: str = OWN,
    prefill_chunk: int | None = None,
) -> Plan:
    """Check every choice and resolve the defaults; UserError names the one that is wrong."""
    scheme = scheme_for(quantization, target.name, target.kind)
    if interface not in INTERFACES:
        raise UserError(f"unknown --interface {interface!r}; choose {' or '.join(INTERFACES)}")
    if attention not in ATTENTION:
        raise UserError(f"unknown attention {attention!r}; choose {' or '.join(ATTENTION)}")
    if not batch_sizes or any(not 1 <= b <= MAX_BATCH for b in batch_sizes):
        raise UserError(
            f"--batch-sizes {','.join(map(str, batch_sizes))}: give one or more sizes from 1 to {MAX_BATCH}"
        )
    if any(not 1 <= m <= MAX_VERIFY_WIDTH for m in verify_widths):
        raise UserError(f"--verify-widths {','.join(map(str, verify_widths))}: widths go from 1 to {MAX_VERIFY_WIDTH}")
    capacity = config.n_positions if max_seq_len is None else max_seq_len
    if not 1 <= capacity <= config.n_positions:
        raise UserError(f"--max-seq-len {capacity}: the model has positions for 1 to {config.n_positions} tokens")
    if cuda_graph and target.kind != "cuda":
        raise UserError(f"--cuda-graph is for CUDA targets, {target.name} is {target.kind}; leave it out")
    if interface == MLC and (cuda_graph or attention != "flash"):
        raise UserError("--interface mlc leaves attention and CUDA graphs to TVM's paged cache; leave both options out")
    if prefill_chunk is not None and (interface != MLC or prefill_chunk < 1):
        raise UserError(f"--prefill-chunk {prefill_chunk}: give 1 or more tokens, and --interface mlc")
    widths = tuple(sorted({m for m in verify_widths if m <= capacity}))
    chosen = rule_set(rules, target)
    target = with_letter(target, chosen)
    if PERSISTENT in chosen and (interface == MLC or attention != "flash"):
        raise UserError(
            f"rule {PERSISTENT!r} has attention and cache of its own; leave out --interface and --attention"
        )
    plan = Plan(
        config,
        target,
        scheme,
        chosen,
        attention,
        tuple(sorted(set(batch_sizes))),
        widths,
        capacity,
        tuned,
        target.kind == "cuda" and interface == OWN if cuda_graph is None else cuda_graph,
        pass_set(passes, target, chosen),
        interface=interface,
        prefill_chunk=min(prefill_chunk or PREFILL_CHUNK, capacity) if interface == MLC else 0,
    )
    _ = plan.step  # refuses what it is not made for
    return plan


def with_letter(target: DeviceTarget, rules: Sequence[str]) -> DeviceTarget:
    """The target whose architecture has the instructions that these rules write: sm_90a for sm_90 where one asks for
    warpgroup instructions. Such code runs on that very architecture, and on no later one."""
    for rule in rules:
        if (arch := LETTERS.get(rule)) is None or target.archs == (arch,):
            continue
        plain = arch.rstrip("a")
        if target.tvm.get("arch") != plain or set(target.archs) != {plain}:
            raise UserError(f"rule {rule!r} is for {plain} alone, and {target.name} is not; take --target h200 or h100")
        target = replace(target, tvm={**target.tvm, "arch": arch}, archs=(arch,))
    return target


def weight_layout(target: DeviceTarget) -> Any:
    """How this target wants its weights stored (`quantization.layers.WeightLayout`)."""
    from gpt2_tvm.quantization.layers import WeightLayout

    rows = target.layout.rows or 0 if target.layout.weight == "packed" else 0
    return WeightLayout(panel_rows=rows, fast_math=target.kind == "cpu")


def export_module(plan: Plan) -> tuple[Any, list[str]]:
    """The model as a Relax module, and the names of its parameters in the order of the packed tuple."""
    from gpt2_tvm.attention import AttentionKernels, CpuKernels, MaterializedAttention
    from gpt2_tvm.exported import export_spec
    from gpt2_tvm.model import GPT2LMHeadModel, ModelOptions

    kernels: AttentionKernels
    # TVMScript reads the source of every stack frame; without, ours are parsed in a tenth of the time
    with tensor_intrin.light_stack():
        if plan.target.kind == "cpu":
            kernels = CpuKernels(plan.target.limits.vector_bits or 128)
        else:
            from gpt2_tvm.gpu_attention import GpuKernels

            kernels = GpuKernels.for_target(plan.target)
        if plan.attention == "materialized":
            kernels = MaterializedAttention(kernels)
        options = ModelOptions(
            plan.scheme, weight_layout(plan.target), kernels, plan.max_seq_len, plan.streams, plan.step
        )
        model = GPT2LMHeadModel(plan.config, options)
        mod, params, _ = model.export_tvm(
            spec=export_spec(model, plan.batch_sizes, plan.verify_widths), allow_extern=True
        )
    return mod, [name for name, _ in params]


def lower_plan(
    plan: Plan, dump_ir: Path | None = None, exported: tuple[Any, list[str]] | None = None
) -> tuple[Lowered, list[str]]:
    """Export and run the pipeline; nothing is built for the device yet. exported: of `export_module`, where it is at
    hand."""
    from gpt2_tvm.pipeline import lower

    if plan.target.kind in ("cuda", "metal"):
        tensor_intrin.load(plan.target.kind)
    mod, names = exported or export_module(plan)
    batch = max(plan.batch_sizes)
    bounds = {
        "prefill": {"b": batch, "n": plan.max_seq_len},
        "score": {"b": batch, "n": min(SCORE_ROWS, plan.max_seq_len)},
        "softmax_with_temperature": {"b": batch},
    }
    return lower(mod, plan.target, plan.rules, bounds, dump_ir, plan.tuned, plan.cuda_graph, plan.passes), names


def stored_weights(source: ModelSource, plan: Plan) -> Any:
    """(name, array as stored) for each parameter, streaming: one tensor in memory at a time."""
    from gpt2_tvm.quantization.storage import stored_parameters, stored_streams

    layout = weight_layout(plan.target)
    yield from stored_parameters(source, plan.scheme, layout)
    if plan.streams is not None:
        yield from stored_streams(plan.streams, plan.config, plan.scheme, layout)


def versions() -> dict[str, str]:
    """Versions of the packages that an artifact depends on, and of ours."""
    found = {}
    for package in ("gpt2-tvm", "apache-tvm", "apache-tvm-ffi", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "unknown"
    return found


def compile_model(
    model: str = "gpt2",
    target: str = "cpu",
    quantization: str = "q0f32",
    output: str | Path | None = None,
    rules: str = "full",
    attention: str = "flash",
    batch_sizes: Sequence[int] = (1,),
    max_seq_len: int | None = None,
    tuned: str | Path | None = None,
    *,
    verify_widths: Sequence[int] = VERIFY_WIDTHS,
    dump_ir: str | Path | None = None,
    seed: int = 0,
    cuda_graph: bool | None = None,
    weights: bool = True,
    streams: str | Path | None = None,
    stream_rows: str = STREAM_ROWS,
    passes: str = "all",
    interface: str = OWN,
    prefill_chunk: int | None = None,
    page: bool = True,
    progress: Progress | None = None,
) -> Path:
    """Compile a GPT-2 for a device and write its artifact.

    Args:
        model: a Hugging Face folder, a hub id, a preset (gpt2, gpt2-medium, gpt2-large, gpt2-xl, distilgpt2) or
        "bundled".
        target: a name from ``--list-targets``, or a TOML file.
        quantization: a scheme's name (`quantization.SCHEMES`).
        output: the artifact's folder; default ``artifacts/<model>-<quantization>-<target>``.
        rules: a rule set (`schedules.registry.rule_set`).
        attention: "flash" (our kernels) or "materialized" (matmul and softmax, scheduled by the rules).
        batch_sizes: batch sizes that decode, greedy and verify are compiled for.
        max_seq_len: capacity of the KV cache in tokens; default the model's n_positions.
        tuned: a schedule file made by ``tuning.apply``; never applied unasked.
        verify_widths: how many candidate tokens one verify call takes, each a static variant.
        dump_ir: a folder for the IR after each phase.
        seed: of the random weights, where the checkpoint cannot be downloaded.
        cuda_graph: decode, greedy, verify and keep as one CUDA graph each; default for CUDA targets, refused for
            others.
        weights: False leaves the parameters out, to be added where the artifact will run; refused for webgpu.
        streams: a folder made by ``train_streams``, or "bundled" for those of the bundled model: the model then drafts
            for itself with --strategy streaming.
        stream_rows: rows of the tree that a pass of streams takes, or "8,4": of 8 rows an early exit keeps 4.
        passes: a set of fusions (`passes.registry.pass_set`).
        interface: "own" (`Engine`), or "mlc": the functions that mlc-llm and web-llm call, over TVM's paged cache;
            batch_sizes' largest is how many sequences they may have at a time.
        prefill_chunk: tokens of one prefill call of "mlc"; longer prompts go in several. Default 512.
        page: for webgpu, also link model.wasm, which a page and node load; without it the artifact runs through wgpu.
        progress: called with (what, share done); with a share of 0 for a note that the user should read.

    Returns the artifact's folder. Raises UserError for anything the user can mend.
    """
    from gpt2_tvm.artifact_writer import write_artifact

    say = progress or (lambda what, share: None)
    import_tvm()
    device = specialise(load_target(target))
    if device.kind == "webgpu" and not weights:
        raise UserError("the manifest for webgpu says what the weights ask of a device; compile it with its weights")
    points = load_tuned(Path(tuned), device.name) if tuned is not None else None
    source = resolve_model(str(model), seed=seed)
    if source.note:
        say(source.note, 0.0)
    plan = make_plan(
        source.config,
        device,
        quantization,
        rules,
        attention,
        batch_sizes,
        max_seq_len,
        verify_widths,
        points,
        cuda_graph,
        passes,
        interface,
        prefill_chunk,
    )
    if streams is not None:
        if interface == MLC:
            raise UserError("--streams needs our own engine; leave out --interface mlc")
        folder = bundled_streams() if str(streams) in BUNDLED_NAMES else Path(streams)
        plan = replace(plan, streams=read_plan(folder, source, stream_rows))
    final = Path(output) if output else Path("artifacts") / f"{source.name}-{plan.scheme.name}-{device.name}"
    write_artifact(final, source, plan, None, Path(dump_ir) if dump_ir else None, say, weights, page)
    return final
