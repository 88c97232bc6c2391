"""`kernel_resources`: what each kernel of a compiled module takes and is made of, on any kind of target."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpt2_tvm.errors import UserError
from tuning.static import amd, assembly, occupancy, sass, shaders

if TYPE_CHECKING:
    from gpt2_tvm.build import Plan
    from gpt2_tvm.pipeline import Lowered

# What is None for a kind of target, and why. Said once beneath a table.
UNKNOWN: dict[str, dict[str, str]] = {
    "cuda": {"vector_bits": "a thread's arithmetic is scalar; widest_load_bytes says how it loads"},
    "rocm": {"vector_bits": "a lane's arithmetic is scalar; widest_load_bytes says how it loads"},
    "webgpu": {
        "registers": "the driver's compiler assigns them on the device",
        "spill_bytes": "the driver's compiler decides on the device",
        "occupancy": "it follows from registers, which the driver's compiler assigns",
    },
    "metal": {
        "registers": "macOS compiles the source on the device",
        "spill_bytes": "macOS compiles the source on the device",
        "occupancy": "it follows from registers, which macOS assigns",
    },
    "cpu": {
        "shared_bytes": "a CPU has no memory that threads share but its caches",
        "occupancy": "a core runs one thread of the pool at a time",
    },
}


@dataclass(frozen=True)
class KernelResources:
    """One kernel (on a CPU: one PrimFunc). None: not to be known for this kind of target; `UNKNOWN` says why.

    Attributes:
        function: the PrimFunc that it belongs to. kernel: its own name; the PrimFunc's on a CPU.
        registers: a thread's (CUDA), a lane's vector registers (ROCm), vector registers that the hottest loop names
            (CPU).
        shared_bytes: shared memory of a block, static and dynamic.
        spill_bytes: local memory of a thread: spilled registers, and arrays that are indexed at run time (a note says
            so). On a CPU: places on the stack that the hottest loop reads or writes.
        widest_load_bytes: what one thread's widest load from global memory takes; on a CPU in the hottest loop.
        vector_bits: width of the vectors that it computes with; on a CPU in the hottest loop.
        instructions: how often what stands in the code (shaders: in the source), by kind; "total" all. Loops are not
            multiplied out. A CPU's hottest loop has keys of its own, "loop.fma".
        occupancy: the share (0..1) of a multiprocessor's threads that blocks of this kernel can fill.
        notes: what is worth a look, in words.
        arch: the architecture ("sm_89"); a fat binary has a record for each. threads: of a block; None on a CPU, or
            where the size depends on the input.
    """

    function: str
    kernel: str
    registers: int | None
    shared_bytes: int | None
    spill_bytes: int | None
    widest_load_bytes: int | None
    vector_bits: int | None
    instructions: dict[str, int]
    occupancy: float | None
    notes: tuple[str, ...] = ()
    arch: str = ""
    threads: int | None = field(default=None)


def kernel_resources(
    plan: Plan, lowered: Lowered, executable: Any, library: bytes | None = None
) -> dict[str, KernelResources]:
    """What every kernel of a compiled module takes, by the kernel's name (with several architectures by
    "kernel@arch").

    Args:
        plan, lowered, executable: of `build.make_plan`, `build.lower_plan`, `tvm.compile`.
        library: the bytes of the exported library, where it is at hand; for CUDA and ROCm it is else made here.

    Raises UserError where a tool that reads the code is missing; the line says how to get it.
    """
    try:
        records = list(_READERS[plan.target.kind](plan, lowered, executable, library))
    except FileNotFoundError as error:
        raise UserError(f"cannot look into code for {plan.target.name}: {error}") from error
    several = len({record.arch for record in records}) > 1
    return {f"{r.kernel}@{r.arch}" if several else r.kernel: r for r in records}


def function_of(kernel: str) -> str:
    """The PrimFunc of a device kernel: TVM calls a function's kernels f_kernel, f_kernel_1 and so on."""
    return re.sub(r"_kernel(?:_\d+)?$", "", kernel)


def place_of(kernel: str) -> int:
    """Which of its function's kernels a device kernel is, counted from 0."""
    found = re.search(r"_kernel_(\d+)$", kernel)
    return int(found.group(1)) if found else 0


def _threads(lowered: Lowered) -> Callable[[str], int | None]:
    """Threads of a block by the kernel's name, read from the scheduled functions' loops."""
    from tvm import tirx

    from gpt2_tvm.inventory import launch_shapes

    bodies = {v.name_hint: f for v, f in lowered.scheduled.functions_items() if isinstance(f, tirx.PrimFunc)}

    def threads(kernel: str) -> int | None:
        body = bodies.get(function_of(kernel))
        nests = launch_shapes(body) if body is not None else []
        index = place_of(kernel)
        if index >= len(nests):
            return None
        total = 1
        for extent in nests[index][1]:
            if not isinstance(extent, int):
                return None
            total *= extent
        return total

    return threads


# CUDA ----------------------------------------------------------------------------------------------------------------


def _cuda(plan: Plan, lowered: Lowered, executable: Any, library: bytes | None) -> Iterable[KernelResources]:
    from gpt2_tvm.toolchains import modules

    threads = _threads(lowered)
    source = modules.sources(executable, "cuda")
    dynamic = _dynamic_shared(plan, lowered, source)
    for kernel in sass.kernels(library if library is not None else _exported(plan, executable)):
        block = threads(kernel.name)
        shared = kernel.shared + dynamic.get(kernel.name, 0)
        resident = occupancy.cuda_occupancy(kernel.arch, block, kernel.registers, shared) if block else None
        notes = []
        if kernel.indexed_local:
            notes.append(f"{kernel.indexed_local} accesses of an array in local memory that is indexed at run time")
        elif kernel.stack and (kernel.counts["LDL"] or kernel.counts["STL"]):
            notes.append(f"spills: {kernel.counts['STL']} stores and {kernel.counts['LDL']} loads of local memory")
        if resident and resident[0] < 0.25:
            notes.append(f"{resident[1]} bound its occupancy to {resident[0]:.0%}")
        yield KernelResources(
            function=function_of(kernel.name),
            kernel=kernel.name,
            registers=kernel.registers,
            shared_bytes=shared,
            spill_bytes=kernel.stack + kernel.local,
            widest_load_bytes=kernel.widest_load,
            vector_bits=None,
            instructions=kernel.mix,
            occupancy=resident[0] if resident else None,
            notes=tuple(notes),
            arch=kernel.arch,
            threads=block,
        )


def _dynamic_shared(plan: Plan, lowered: Lowered, source: str) -> dict[str, int]:
    """Bytes of shared memory that the host gives at launch, by kernel: of those whose CUDA source declares some."""
    parts = re.split(r"(?m)^(?=extern \"C\" __global__)", source)
    wanted = {
        function_of(name.group(1))
        for part in parts
        if "extern __shared__" in part and (name := re.search(r"(\w+_kernel(?:_\d+)?)\(", part))
    }
    if not wanted:
        return {}
    import tvm
    import tvm_ffi
    from tvm import tirx
    from tvm.tirx.build import split_host_device_mods

    from gpt2_tvm.host_code import launch_values
    from gpt2_tvm.schedules.webgpu_pipeline import tir_pipeline

    functions = {v: f for v, f in lowered.final.functions_items() if v.name_hint in wanted}
    target = plan.target.tvm_target()
    with target:
        module = tirx.transform.BindTarget(target)(tvm.IRModule(functions))
        pipeline, _, _ = tir_pipeline(target)
        host, _ = split_host_device_mods(pipeline(module))
    found: dict[str, int] = {}

    def launch(call: Any) -> None:
        if not str(getattr(call.op, "name", "")).endswith("call_ffi_kernel"):
            return
        size = launch_values(call).get("tirx.use_dyn_shared_memory")
        if isinstance(size, tirx.IntImm):
            found[str(call.args[0].value)] = int(size)

    for _, func in host.functions_items():
        tvm_ffi.structural_walk(func.body, [(tvm.ir.Call, launch)], order="pre")
    return found


def _exported(plan: Plan, executable: Any) -> bytes:
    """The library that `executable` gives, in memory: the device's code is serialised into it."""
    from gpt2_tvm import toolchains

    with tempfile.TemporaryDirectory() as scratch:
        names = toolchains.export(executable, plan.target, Path(scratch))
        return Path(scratch, names[0]).read_bytes()


# ROCm ----------------------------------------------------------------------------------------------------------------


def _rocm(plan: Plan, lowered: Lowered, executable: Any, library: bytes | None) -> Iterable[KernelResources]:
    threads = _threads(lowered)
    for image in amd.code_objects(library if library is not None else _exported(plan, executable)):
        for kernel in image.kernels:
            block = threads(kernel.name)
            taken = (kernel.wave, block or 0, kernel.vector_registers, kernel.shared_bytes)
            resident = occupancy.amd_occupancy(image.arch, *taken)
            notes = []
            if kernel.vector_spills or kernel.scalar_spills:
                notes.append(f"spills {kernel.vector_spills} vector and {kernel.scalar_spills} scalar registers")
            elif kernel.private_bytes:
                notes.append("its private memory is an array that is indexed at run time")
            if resident and resident[0] < 0.25:
                notes.append(f"{resident[1]} bound its occupancy to {resident[0]:.0%}")
            yield KernelResources(
                function=function_of(kernel.name),
                kernel=kernel.name,
                registers=kernel.vector_registers,
                shared_bytes=kernel.shared_bytes,
                spill_bytes=kernel.private_bytes,
                widest_load_bytes=kernel.widest_load,
                vector_bits=None,
                instructions={**kernel.mix, "scalar_registers": kernel.scalar_registers},
                occupancy=resident[0] if resident else None,
                notes=tuple(notes),
                arch=image.arch,
                threads=block,
            )


# Shaders -------------------------------------------------------------------------------------------------------------


def _webgpu(plan: Plan, lowered: Lowered, executable: Any, library: bytes | None) -> Iterable[KernelResources]:
    from gpt2_tvm.toolchains import modules

    return _shader(plan, lowered, shaders.wgsl_kernels(modules.sources(executable, "webgpu")))


def _metal(plan: Plan, lowered: Lowered, executable: Any, library: bytes | None) -> Iterable[KernelResources]:
    from gpt2_tvm.toolchains import modules

    return _shader(plan, lowered, shaders.msl_kernels(modules.sources(executable, "metal")))


def _shader(plan: Plan, lowered: Lowered, kernels: list[shaders.Kernel]) -> Iterable[KernelResources]:
    threads = _threads(lowered)
    limits = plan.target.limits
    for kernel in kernels:
        block = kernel.threads if kernel.threads is not None else threads(kernel.name)
        notes = []
        if limits.shared_memory_bytes and kernel.shared_bytes > limits.shared_memory_bytes:
            notes.append(f"its shared memory is more than the target's {limits.shared_memory_bytes} bytes")
        if limits.threads_per_block and block and block > limits.threads_per_block:
            notes.append(f"its block has more than the target's {limits.threads_per_block} threads")
        yield KernelResources(
            function=function_of(kernel.name),
            kernel=kernel.name,
            registers=None,
            shared_bytes=kernel.shared_bytes,
            spill_bytes=None,
            widest_load_bytes=kernel.widest_load_bytes,
            vector_bits=kernel.vector_bits,
            instructions=kernel.mix,
            occupancy=None,
            notes=tuple(notes),
            arch=plan.target.arch(),
            threads=block,
        )


# CPU -----------------------------------------------------------------------------------------------------------------


def _cpu(plan: Plan, lowered: Lowered, executable: Any, library: bytes | None) -> Iterable[KernelResources]:
    from gpt2_tvm.toolchains import modules

    # TVM exports for the target's own CPU: the assembly is of the code that the library holds
    text = "\n".join(m.inspect_source("asm") for m in modules.tree(executable) if m.kind == "llvm")
    for name, function in assembly.functions(text).items():
        if name in {hit.function for hit in lowered.hits}:
            yield _cpu_function(plan, name, function)


def _cpu_function(plan: Plan, name: str, function: assembly.Function) -> KernelResources:
    loop = function.hottest
    code = loop.instructions if loop else function.instructions
    slots = loop.stack_slots if loop else {}
    notes = []
    if loop is None:
        notes.append("no loop is left: all of it counts as its hottest")
    if slots:
        notes.append(f"its hottest loop touches the stack at {len(slots)} places, {sum(slots.values())} bytes")
    counted = assembly.counts(function.instructions)
    if counted.get("workspace"):
        notes.append(f"asks TVM for workspace at {counted['workspace']} places")
    in_loop = assembly.counts(code)
    return KernelResources(
        function=name,
        kernel=name,
        registers=len({register for i in code for register in i.registers}),
        shared_bytes=None,
        spill_bytes=sum(slots.values()),
        widest_load_bytes=max((i.load_bytes for i in code), default=0),
        vector_bits=function.vector_bits,
        instructions={
            **counted,
            **{f"libm.{called}": times for called, times in function.libm.items()},
            **{f"loop.{kind}": times for kind, times in in_loop.items()},
        },
        occupancy=None,
        notes=tuple(notes),
        arch=plan.target.arch(),
    )


_Reader = Callable[["Plan", "Lowered", Any, "bytes | None"], Iterable[KernelResources]]
_READERS: dict[str, _Reader] = {"cuda": _cuda, "rocm": _rocm, "webgpu": _webgpu, "metal": _metal, "cpu": _cpu}
