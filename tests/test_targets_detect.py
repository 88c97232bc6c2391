"""This machine and its GPUs as targets: what is detected, which file fits, and the table of `--list-targets`."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from gpt2_tvm import toolchains
from gpt2_tvm.toolchains import cuda_toolkit, linker, rocm
from targets import Gpu, as_gpu, detect, load_target, report, specialise
from targets.load import FOLDER, NAMES

V3 = frozenset(load_target("x86-64-v3").requires)
V4 = frozenset(load_target("x86-64-v4").requires)


@pytest.fixture
def cpu_with(monkeypatch: pytest.MonkeyPatch):
    """Make this machine look like another: `cpu_with("Linux", "x86_64", features)`."""

    def pretend(system: str, machine: str, features: frozenset[str]) -> None:
        monkeypatch.setattr("platform.system", lambda: system)
        monkeypatch.setattr("platform.machine", lambda: machine)
        monkeypatch.setattr(detect, "host_features", lambda: features)
        monkeypatch.setattr(detect, "caches_kib", dict)  # of that one nothing is known

    return pretend


# --- this machine ---


def test_the_native_cpu_can_run_here() -> None:
    native = load_target("cpu")
    assert detect.missing_features(native.requires) == []
    attributes = native.tvm_attributes()
    assert attributes["mcpu"]
    for feature in attributes.get("mattr", []):
        names = [name for name, llvm in {**detect.X86_FEATURES, **detect.ARM_FEATURES}.items() if llvm == feature[1:]]
        assert (names[0] in detect.host_features()) == (feature[0] == "+")


@pytest.mark.parametrize(
    ("system", "machine", "features", "like"),
    [
        ("Linux", "x86_64", V4 | {"avx512_vnni"}, "x86-64-v4"),
        ("Linux", "x86_64", V4 - {"avx512bw"}, "x86-64-v3"),
        ("Linux", "x86_64", V3, "x86-64-v3"),
        ("Darwin", "x86_64", V3, "x86-64-v3"),
        ("Darwin", "arm64", frozenset(("asimd", "asimdhp", "asimddp")), "apple-m"),
        ("Linux", "aarch64", frozenset(("asimd",)), "arm64"),
    ],
)
def test_native_layout(cpu_with, system: str, machine: str, features: frozenset[str], like: str) -> None:
    cpu_with(system, machine, features)
    native, family = load_target("cpu"), load_target(like)
    assert (native.limits, native.layout) == (family.limits, family.layout)
    assert native.requires == tuple(sorted(features))


def test_native_layout_of_an_old_cpu(cpu_with) -> None:
    cpu_with("Linux", "x86_64", V3 - {"fma"})
    native = load_target("cpu")
    assert (native.limits.vector_bits, native.layout.rows) == (128, 8)


@pytest.mark.parametrize(("features", "register"), [(V4, "zmm"), (V3, "ymm")])
def test_hidden_features_are_not_used(cpu_with, monkeypatch: pytest.MonkeyPatch, features, register: str) -> None:
    """A Zen 5 in a virtual machine that hides AVX-512: LLVM's name for it promises AVX-512, and no
    instruction may use it.
    """
    import tvm
    from tvm import s_tir, te

    cpu_with("Linux", "x86_64", features)
    monkeypatch.setattr("tvm.target.codegen.llvm_get_system_cpu", lambda: "znver5")
    a = te.placeholder((64,), "float32", "a")
    schedule = s_tir.Schedule(te.create_prim_func([a, te.compute((64,), lambda i: a[i] * 2 + 1, "b")]))
    (loop,) = schedule.get_loops(schedule.get_sblock("b"))
    schedule.vectorize(schedule.split(loop, [None, 16])[1])
    attributes = {**load_target("cpu").tvm_attributes(), "mtriple": "x86_64-unknown-linux-gnu"}
    assembly = tvm.compile(schedule.mod, tvm.target.Target(attributes)).mod.inspect_source("asm")
    assert next(name for name in ("zmm", "ymm") if name in assembly) == register


def test_caches_of_the_smallest_core(tmp_path: Path) -> None:
    """Two hyper-threads of a large core; two small cores, one with a smaller L1, that share an L2 of 2 MiB."""
    cores = {0: (48, 2048, "3", "3"), 1: (48, 2048, "3", "3"), 2: (64, 2048, "4", "c"), 3: (32, 2048, "8", "c")}
    for cpu, (l1, l2, l1_map, l2_map) in cores.items():
        levels = [("1", "Data", l1, l1_map), ("1", "Instruction", 16, l1_map), ("2", "Unified", l2, l2_map)]
        for index, (level, kind, size, sharing) in enumerate([*levels, ("3", "Unified", 32768, "f")]):
            folder = tmp_path / "devices" / "system" / "cpu" / f"cpu{cpu}" / "cache" / f"index{index}"
            folder.mkdir(parents=True)
            values = {"level": level, "type": kind, "size": f"{size}K", "shared_cpu_map": f"00000000,0000000{sharing}"}
            for name, value in values.items():
                (folder / name).write_text(f"{value}\n")
    assert detect.linux_caches_kib(tmp_path) == {"l1_kib": 32, "l2_kib": 1024}
    assert detect.linux_caches_kib(tmp_path / "absent") == {}


def test_the_native_cpu_has_this_machines_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(detect, "caches_kib", lambda: {"l1_kib": 96})
    native = load_target("cpu")
    assert native.limits.l1_kib == 96 and native.limits.l2_kib  # what is not told: the family's
    assert load_target("x86-64-v3").limits.l1_kib == 32


def test_cpuinfo() -> None:
    two = "processor : 0\nflags : fpu avx avx2 fma f16c\n\nprocessor : 1\nflags : fpu avx avx2 fma\n"
    assert detect.cpuinfo_features(two) == {"avx", "avx2", "fma"}  # f16c is not on both
    assert detect.cpuinfo_features("Features\t: fp asimd asimdhp crc32 sve") == {"asimd", "asimdhp", "sve"}
    assert detect.cpuinfo_features("") == frozenset()
    assert detect.intel_mac_features("FPU SSE4.2 AVX1.0 FMA F16C AVX2 BMI1") == {
        "sse4_2",
        "avx",
        "fma",
        "f16c",
        "avx2",
        "bmi1",
    }


@pytest.mark.parametrize(
    ("kind", "gpu", "name", "arch"),
    [
        ("cuda", Gpu("NVIDIA H200", "sm_90"), "h200", "sm_90"),
        ("cuda", Gpu("NVIDIA A100-SXM4-80GB", "sm_80"), "a100", "sm_80"),
        ("cuda", Gpu("NVIDIA A100-SXM4-40GB", "sm_80"), "cuda", "sm_80"),
        ("cuda", Gpu("Tesla T4", "sm_75"), "t4", "sm_75"),
        ("cuda", Gpu("NVIDIA GeForce RTX 3090 Ti", "sm_86"), "cuda", "sm_86"),
        ("cuda", Gpu("NVIDIA GeForce RTX 5090", "sm_120"), "cuda", "sm_120"),
        ("metal", Gpu("Apple M2 Ultra", ""), "m2-ultra", "apple-m2"),
        ("metal", Gpu("Apple M4", ""), "metal", "apple-m1"),
        ("rocm", Gpu("aldebaran", "gfx90a"), "gfx90a", "gfx90a"),
        ("rocm", Gpu("ip discovery", "gfx1100"), "rocm", "gfx1100"),  # XTX or XT: no peak rate can be named
        ("rocm", Gpu("sienna_cichlid", "gfx1030"), "rocm", "gfx1030"),
    ],
)
def test_a_generic_target_becomes_the_gpu(kind: str, gpu: Gpu, name: str, arch: str) -> None:
    target = as_gpu(load_target(kind), gpu)
    assert (target.name, target.arch()) == (name, arch)
    assert target.archs == ((arch,) if kind == "cuda" else ())
    assert (target.peak is None) == (name == kind)
    assert target.tvm_target().kind.name == kind


def test_amd_waves() -> None:
    waves = {
        arch: as_gpu(load_target("rocm"), Gpu("?", arch)).tvm["thread_warp_size"]
        for arch in ("gfx908", "gfx1030", "gfx1201")
    }
    assert waves == {"gfx908": 64, "gfx1030": 32, "gfx1201": 32}


def test_specialise_only_what_is_generic(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(detect, "present_gpu", lambda kind: None)
    assert specialise(load_target("cuda")) == load_target("cuda")
    monkeypatch.setattr(detect, "present_gpu", lambda kind: Gpu("NVIDIA H200", "sm_90"))
    assert specialise(load_target("cuda")).name == "h200"
    assert specialise(load_target("a100")).name == "a100"


def test_amd_gpu_from_the_kernel(tmp_path: Path) -> None:
    nodes = tmp_path / "class" / "kfd" / "kfd" / "topology" / "nodes"
    for number, (name, version) in enumerate([("", 0), ("ip discovery", 90402), ("aldebaran", 90010)]):
        node = nodes / str(number)
        node.mkdir(parents=True)
        (node / "name").write_text(name + "\n")
        lines = ["cpu_cores_count 0", f"gfx_target_version {version}", f"drm_render_minor {127 + number}"]
        (node / "properties").write_text("\n".join(lines))
    assert detect.amd_gpu(tmp_path) == Gpu("ip discovery", "gfx942")
    product = tmp_path / "class" / "drm" / "renderD128" / "device" / "product_name"
    product.parent.mkdir(parents=True)
    product.write_text("AMD Instinct MI300X OAM\n")
    gpu = detect.amd_gpu(tmp_path)
    assert gpu == Gpu("AMD Instinct MI300X OAM", "gfx942")
    assert as_gpu(load_target("rocm"), gpu).name == "gfx942"
    (nodes / "1" / "properties").unlink()
    assert detect.amd_gpu(tmp_path) == Gpu("aldebaran", "gfx90a")
    assert detect.amd_gpu(tmp_path / "absent") is None


# --- the table ---


def test_table_shows_every_target_and_fits_80_columns() -> None:
    out = io.StringIO()
    report.print_table(Console(file=out, width=80))
    table, _, reasons = out.getvalue().partition("\n\n")
    lines = table.splitlines()
    assert [line.split()[0] for line in lines[2:]] == list(NAMES)
    assert all(len(line) <= 80 for line in lines)
    assert [line.split()[-1] for line in lines if line.startswith("cpu ")] == ["yes"]
    assert "4,800" in next(line for line in lines if line.startswith("h200"))
    assert "…" not in table and reasons


def test_listing_imports_no_compiler() -> None:
    code = "import sys; from targets import report; report.print_table()"
    code += "; assert not {'tvm', 'torch', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL, cwd=FOLDER.parent)


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(detect, "present_gpu", lambda kind: None)
    monkeypatch.setattr(cuda_toolkit, "find", lambda: None)
    monkeypatch.setattr(rocm, "find_lld", lambda: None)
    assert "pip install 'gpt2-tvm[cuda]'" in report.runs_here(load_target("h200"))
    assert report.runs_here(load_target("gfx90a")).startswith("needs: lld of LLVM 22 or later: apt install lld-22")
    monkeypatch.setattr(detect, "present_gpu", lambda kind: Gpu("NVIDIA H200", "sm_90"))
    assert report.runs_here(load_target("h200")).startswith("runs; to compile: CUDA 13 headers")
    monkeypatch.setattr(toolchains, "missing", lambda target: None)
    assert report.runs_here(load_target("h200")) == "yes"
    assert report.runs_here(load_target("cuda")) == "yes: as h200, NVIDIA H200"
    assert report.runs_here(load_target("a100")) == "compiles: the GPU here is NVIDIA H200 (sm_90)"


def test_a_cpu_that_lacks_features_compiles_only(cpu_with) -> None:
    cpu_with("Linux", "x86_64", V3)
    assert report.runs_here(load_target("x86-64-v3")) in (
        "yes",
        f"needs: a C++ compiler to link with: {linker.HOW_TO_GET_ONE}",
    )
    assert report.runs_here(load_target("x86-64-v4")).startswith("compiles: this CPU has no avx512bw, avx512cd")
