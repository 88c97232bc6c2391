"""The parts of a target. Nothing here reads files, and only methods that say so import TVM."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from gpt2_tvm.errors import UserError

KINDS = ("cpu", "cuda", "metal", "webgpu", "rocm")


@dataclass(frozen=True)
class Limits:
    """What a kernel for the device must keep to. None: the device has no such limit, or no such thing.

    Attributes:
        threads_per_block: threads in one block (workgroup, threadgroup).
        shared_memory_bytes: shared memory of one block, in bytes.
        storage_binding_bytes: the largest buffer that a kernel can be given, in bytes (WebGPU).
        vector_bits: width of the CPU's vector registers, in bits.
        vector_registers: how many of them there are.
        l1_kib: the level-1 data cache of a core, in KiB.
        l2_kib: the level-2 cache that a core has to itself, or its share of one, in KiB.
        prefetch_bytes: how far ahead of its loads a core that streams memory should ask for it: a few times its
            bandwidth multiplied by the memory's latency.
    """

    threads_per_block: int | None = None
    shared_memory_bytes: int | None = None
    storage_binding_bytes: int | None = None
    vector_bits: int | None = None
    vector_registers: int | None = None
    l1_kib: int | None = None
    l2_kib: int | None = None
    prefetch_bytes: int | None = None


@dataclass(frozen=True)
class Layout:
    """How a linear weight [N, K] lies in memory.

    Attributes:
        weight: "rows", plain [N, K]; or "packed" for the CPU, panels of `rows` rows: [N / rows, K, rows].
        rows: rows of the weight in one panel (NR: two vector registers of float32), for "packed".
        tile_rows: rows of the activation in one register tile (MR), for "packed".
    """

    weight: str = "rows"
    rows: int | None = None
    tile_rows: int | None = None


@dataclass(frozen=True)
class Peak:
    """What the hardware can do at most, from its maker. None: the maker names no figure.

    Attributes:
        bandwidth_gb_s: memory bandwidth, 10^9 bytes a second.
        fp32_tflops: float32 outside matrix units, 10^12 operations a second (a multiply-add is two).
        fp16_tflops: float16, in matrix units (dense, float32 accumulation) where there are any.
        source: the document that says so.
    """

    bandwidth_gb_s: float | None
    fp32_tflops: float | None
    fp16_tflops: float | None
    source: str


@dataclass(frozen=True)
class Cores:
    """What a GPU is made of, for models of its occupancy. Only rankings rest on it.

    Attributes:
        count: multiprocessors (compute units, GPU cores).
        threads: that one holds at most.
        registers: of 32 bits, in one.
        shared_memory_bytes: in one.
        clock_ghz: when it boosts.
    """

    count: int
    threads: int
    registers: int
    shared_memory_bytes: int
    clock_ghz: float


@dataclass(frozen=True)
class DeviceTarget:
    """A device to compile for.

    Attributes:
        name: how `--target` and artifact folders call it.
        kind: one of `KINDS`.
        description: one line for people.
        tvm: the attributes of TVM's target, as `tvm.target.Target` takes them. For the native CPU without the
            processor's name and features, which TVM's LLVM knows: `tvm_attributes` adds them.
        host: the attributes of the host's target (GPUs), or None: plain code for the machine that compiles.
        export: the form of the library: "so" (linked; .dylib for macOS), or "tar" (objects that TVM links
            where it loads them).
        rules: names of the schedule rules, in the order in which they are tried.
        limits, layout, peak: see there. `peak` is None for what stands for many devices.
        archs: CUDA architectures that the library carries code for; empty for other kinds.
        devices: names under which drivers report this device, as shell patterns ("NVIDIA A100*80GB*").
        generic: whether it stands for all devices of its kind and becomes the one that is present.
        native: whether it is the CPU of this machine.
        requires: CPU features that the code needs, under Linux's names in /proc/cpuinfo. An engine that finds
            one missing must not run it.
        path: the file that it came from.
        cores: see there; None for what stands for many devices.
    """

    name: str
    kind: str
    description: str
    tvm: dict[str, Any]
    host: dict[str, Any] | None
    export: str
    rules: tuple[str, ...]
    limits: Limits
    layout: Layout
    peak: Peak | None
    archs: tuple[str, ...]
    devices: tuple[str, ...]
    generic: bool
    native: bool
    requires: tuple[str, ...]
    path: Path = field(compare=False)
    cores: Cores | None = None

    def tvm_attributes(self) -> dict[str, Any]:
        """`tvm`, for the native CPU with its name and features filled in (that imports TVM)."""
        if not self.native:
            return dict(self.tvm)
        from targets.detect import native_attributes

        return {**self.tvm, **native_attributes()}

    def tvm_target(self) -> Any:
        """The `tvm.target.Target` to schedule and build with, its host included. Imports TVM.

        Raises:
            UserError: TVM does not accept the attributes.
        """
        from tvm.target import Target

        try:
            if self.kind == "cpu":
                target = Target(self.tvm_attributes())
                return Target(target, host=target)
            return Target(self.tvm_attributes(), host=Target(self.host or {"kind": "llvm"}))
        except Exception as error:
            lines = [line for line in str(error).strip().splitlines() if line.strip()] or [type(error).__name__]
            raise UserError(
                f"{self.path}: TVM does not accept the attributes in [tvm] or [host]: {lines[-1].strip()}"
            ) from error

    def host_triple(self) -> str | None:
        """The LLVM triple of the code that runs on the CPU, or None for that of this machine."""
        return (self.tvm if self.kind == "cpu" else self.host or {}).get("mtriple")

    def arch(self) -> str:
        """What the code is for, in the vendor's words: "sm_90", "gfx942", "apple-m1"; "" for webgpu."""
        if self.kind in ("cuda", "rocm", "cpu"):
            return str(self.tvm.get("arch") or self.tvm.get("mcpu") or ("native" if self.native else ""))
        return str((self.host or {}).get("mcpu", "")) if self.kind == "metal" else ""

    def to_json(self) -> dict[str, Any]:
        """This target for an artifact's manifest: plain JSON values, no path of this machine. For the native
        CPU, imports TVM.
        """
        fields = {**asdict(self), "tvm": self.tvm_attributes()}
        for name in ("path", "devices", "generic"):
            del fields[name]
        return {key: list(value) if isinstance(value, tuple) else value for key, value in fields.items()}
