"""What this machine is: its CPU's features, its family among the targets, and the GPU that is present. Fast,
without TVM (but for `native_attributes`), and without starting a GPU's context."""

from __future__ import annotations

import ctypes
import functools
import platform
import re
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from targets.device import DeviceTarget

CPUINFO = Path("/proc/cpuinfo")
SYS = Path("/sys")

# Linux's name of a feature in /proc/cpuinfo, and LLVM's. Those that change what LLVM emits for our kernels.
X86_FEATURES = {
    "sse4_1": "sse4.1", "sse4_2": "sse4.2", "ssse3": "ssse3", "popcnt": "popcnt", "movbe": "movbe",
    "abm": "lzcnt", "bmi1": "bmi", "bmi2": "bmi2", "avx": "avx", "avx2": "avx2", "fma": "fma", "f16c": "f16c",
    "avx_vnni": "avxvnni", "avx512f": "avx512f", "avx512bw": "avx512bw", "avx512cd": "avx512cd",
    "avx512dq": "avx512dq", "avx512vl": "avx512vl", "avx512ifma": "avx512ifma", "avx512vbmi": "avx512vbmi",
    "avx512_vbmi2": "avx512vbmi2", "avx512_vnni": "avx512vnni", "avx512_bitalg": "avx512bitalg",
    "avx512_vpopcntdq": "avx512vpopcntdq", "avx512_bf16": "avx512bf16", "avx512_fp16": "avx512fp16",
    "avx512_vp2intersect": "avx512vp2intersect", "gfni": "gfni", "vaes": "vaes",
    "vpclmulqdq": "vpclmulqdq", "amx_tile": "amx-tile", "amx_int8": "amx-int8", "amx_bf16": "amx-bf16",
}  # fmt: skip
ARM_FEATURES = {
    "asimd": "neon", "asimdhp": "fullfp16", "asimddp": "dotprod", "asimdfhm": "fp16fml", "bf16": "bf16",
    "i8mm": "i8mm", "sve": "sve", "sve2": "sve2",
}  # fmt: skip


@dataclass(frozen=True)
class Gpu:
    """A GPU that is present: the driver's name for it, and its architecture ("sm_90"; "" for Metal)."""

    name: str
    arch: str


@functools.cache
def host_features() -> frozenset[str]:
    """The features of this machine's CPU that are in `X86_FEATURES` or `ARM_FEATURES`, under Linux's names.

    Empty where the system does not tell (Windows), so that nothing is taken to be there.
    """
    if platform.system() == "Darwin":
        if platform.machine() == "arm64":  # every Apple M has these
            return frozenset(("asimd", "asimdhp", "asimddp", "asimdfhm"))
        return intel_mac_features(_sysctl("machdep.cpu.features") + " " + _sysctl("machdep.cpu.leaf7_features"))
    try:
        return cpuinfo_features(CPUINFO.read_text())
    except OSError:
        return frozenset()


def cpuinfo_features(text: str) -> frozenset[str]:
    """The features that a /proc/cpuinfo lists for all its processors (cores may differ)."""
    lines = [line.partition(":")[2].split() for line in text.splitlines() if line.startswith(("flags", "Features"))]
    known = X86_FEATURES.keys() | ARM_FEATURES.keys()
    return frozenset(set.intersection(*map(set, lines)) & known) if lines else frozenset()


def intel_mac_features(text: str) -> frozenset[str]:
    """The features that macOS names ("FMA AVX1.0 AVX2 AVX512F"), under Linux's names."""
    names = (name.lower().replace("avx1.0", "avx").replace(".", "_") for name in text.split())
    return frozenset(names) & X86_FEATURES.keys()


def missing_features(requires: Iterable[str]) -> list[str]:
    """Those of `requires` that this CPU lacks, sorted. An instruction of theirs would kill the process."""
    return sorted(set(requires) - host_features())


def cpu_family(families: Sequence[DeviceTarget]) -> DeviceTarget | None:
    """The first of `families` whose architecture is this machine's and whose `requires` it has."""
    from gpt2_tvm.toolchains.linker import platform_of, this_platform

    here = this_platform()
    for family in families:
        there = platform_of(str(family.tvm["mtriple"]))
        # x86 is x86 on any system; of the Arm families one is for Linux and one for macOS
        same = there.arch == here.arch and (here.arch == "x86_64" or there.system == here.system)
        if same and not missing_features(family.requires):
            return family
    return None


def caches_kib() -> dict[str, int]:
    """The data caches of this machine's smallest core, in KiB: "l1_kib", and "l2_kib" (its share of a shared one).

    Only what the system tells: Linux in /sys; macOS through sysctl, for the slower cores where there are two kinds.
    """
    if platform.system() == "Linux":
        return linux_caches_kib(SYS)
    if platform.system() != "Darwin":
        return {}
    slow = "hw.perflevel1" if _sysctl("hw.perflevel1.l1dcachesize") else "hw"
    sharers = max(1, _number(_sysctl(f"{slow}.cpusperl2")))
    found = {
        "l1_kib": _number(_sysctl(f"{slow}.l1dcachesize")) // 1024,
        "l2_kib": _number(_sysctl(f"{slow}.l2cachesize")) // sharers // 1024,
    }
    return {name: size for name, size in found.items() if size}


def linux_caches_kib(sys: Path) -> dict[str, int]:
    """`caches_kib` from what Linux shows under `sys` (/sys); containers and virtual machines may show nothing."""
    found: dict[str, int] = {}
    for cpu in (sys / "devices" / "system" / "cpu").glob("cpu[0-9]*"):
        threads = 1  # of this core: those that share its L1
        for index in sorted((cpu / "cache").glob("index*")):
            level, kind = _text(index / "level"), _text(index / "type")
            size = _number(_text(index / "size").removesuffix("K"))
            if kind not in ("Data", "Unified") or level not in ("1", "2") or not size:
                continue
            mask = _text(index / "shared_cpu_map").replace(",", "")
            sharers = bin(int(mask, 16)).count("1") if re.fullmatch(r"[0-9a-f]+", mask) else 1
            if level == "1":
                threads = sharers
            size = size * threads // max(threads, sharers)
            found[f"l{level}_kib"] = min(found.get(f"l{level}_kib", size), size)
    return found


def native_attributes() -> dict[str, Any]:
    """LLVM's name for this CPU ("mcpu") and each feature that it has or lacks ("mattr"). Imports TVM.

    The name alone is not enough: LLVM takes AMD's from the model number and believes that all features of
    the model are there, while a virtual machine may hide AVX-512, and the first such instruction would kill
    the process.
    """
    from tvm.target.codegen import llvm_get_system_cpu

    there = host_features()
    names = X86_FEATURES if platform.machine().lower() in ("x86_64", "amd64") else ARM_FEATURES
    attributes: dict[str, Any] = {"mcpu": str(llvm_get_system_cpu())}
    if there:
        attributes["mattr"] = [("+" if name in there else "-") + llvm for name, llvm in names.items()]
    return attributes


def present_gpu(kind: str) -> Gpu | None:
    """The first GPU of `kind` ("cuda", "rocm", "metal") on this machine, or None."""
    if kind == "cuda":
        return nvidia_gpu()
    if kind == "rocm":
        return amd_gpu(SYS)
    if kind == "metal" and platform.system() == "Darwin" and platform.machine() == "arm64":
        return Gpu(_sysctl("machdep.cpu.brand_string"), "")
    return None


def nvidia_gpu() -> Gpu | None:
    """The first GPU that the NVIDIA driver shows this process (CUDA_VISIBLE_DEVICES counts)."""
    from gpt2_tvm.toolchains.cuda_runtime import driver

    cuda = driver()
    if cuda is None or cuda.cuInit(0):
        return None
    device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    name = ctypes.create_string_buffer(256)
    # 75, 76: CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR
    if (
        cuda.cuDeviceGet(ctypes.byref(device), 0)
        or cuda.cuDeviceGetName(name, len(name), device)
        or cuda.cuDeviceGetAttribute(ctypes.byref(major), 75, device)
        or cuda.cuDeviceGetAttribute(ctypes.byref(minor), 76, device)
    ):
        return None
    return Gpu(name.value.decode(errors="replace"), f"sm_{major.value}{minor.value}")


def amd_gpu(sys: Path) -> Gpu | None:
    """The first GPU that Linux's amdgpu driver shows under `sys` (/sys); needs no part of ROCm.

    Its name is the product's where the board tells it, else the driver's, which often stands for many
    products.
    """
    nodes = (sys / "class" / "kfd" / "kfd" / "topology" / "nodes").glob("*")
    for node in sorted(nodes, key=lambda path: path.name.zfill(4)):
        lines = _text(node / "properties").splitlines()
        properties = dict(line.split(maxsplit=1) for line in lines if " " in line)
        version = int(properties.get("gfx_target_version", "0"))
        if version:  # 90402 is 9.4.2; CPUs have 0. gfx names write minor version and stepping in hexadecimal.
            arch = f"gfx{version // 10000}{version // 100 % 100:x}{version % 100:x}"
            card = sys / "class" / "drm" / f"renderD{properties.get('drm_render_minor', '')}"
            return Gpu(_text(card / "device" / "product_name") or _text(node / "name") or arch, arch)
    return None


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _number(text: str) -> int:
    return int(text) if text.isdigit() else 0


def _sysctl(name: str) -> str:
    try:
        return subprocess.run(["sysctl", "-n", name], capture_output=True, text=True, timeout=5).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""
