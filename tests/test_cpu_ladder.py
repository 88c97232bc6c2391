"""The ladder: every step is right on odd shapes, is the loop that it says it is, and the page shows the record."""

from __future__ import annotations

import json
import platform
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import cpu_bounds  # noqa: E402
import cpu_ladder  # noqa: E402
from ladder import report  # noqa: E402
from ladder.assembly import count, functions, hottest_loop, innermost_loops  # noqa: E402
from ladder.steps import KERNEL_STEPS, MODEL_STEPS  # noqa: E402

PAGE = (ROOT / "docs" / "cpu-ladder.md").read_text(encoding="utf-8")

# -- reading assembly --------------------------------------------------------------------------------------------------

X86 = """
	.globl	f
f:                                      # @f
	xorl	%eax, %eax
.LBB0_1:                                # outer
	vxorps	%xmm0, %xmm0, %xmm0
.LBB0_2:                                # inner
	vbroadcastss	(%rdi,%rax,4), %zmm2    # one element of x
	vfmadd231ps	(%rsi), %zmm2, %zmm0
	vfmadd231ps	64(%rsi){1to16}, %zmm2, %zmm0
	vfmadd231ps	%zmm3, %zmm2, %zmm1
	vcvtph2ps	(%rdx), %zmm3
	vmovups	%zmm1, 8(%rsp)
	leaq	64(%rsi), %rsi
	cmpq	$768, %rax
	jne	.LBB0_2
	vmovups	%zmm0, (%rcx)
	jne	.LBB0_1
	retq
"""

AARCH64 = """
f:
.LBB0_1:
	ldp	q2, q3, [x0], #32
	ld1r	{ v4.4s }, [x1]
	fmla	v0.4s, v2.4s, v4.4s
	fmla	v1.4s, v3.4s, v4.s[0]
	subs	x2, x2, #1
	b.ne	.LBB0_1
	ret
"""

SCALAR = """
f:
.LBB0_1:
	vmovss	(%rdi,%rcx,4), %xmm1
	vfmadd132ss	-60(%rsi,%rcx,4), %xmm0, %xmm1
	vmovss	8(%rdi,%rcx,4), %xmm0
	vfmadd132ss	-56(%rsi,%rcx,4), %xmm1, %xmm0
	jne	.LBB0_1
"""


def test_the_inner_loop_is_found_and_counted() -> None:
    assert [lines[0] for lines in innermost_loops(functions(X86)["f"])] == [".LBB0_2:"]
    loop, lines = hottest_loop(X86)
    assert lines[0] == ".LBB0_2:" and lines[-1].endswith(".LBB0_2")
    assert (loop.instructions, loop.fma, loop.vector_bits, loop.flops) == (9, 3, 512, 3 * 2 * 16)
    assert (loop.loads, loop.stores, loop.converts, loop.stack) == (4, 1, 1, 1)
    assert loop.chain == 2  # two of the three add to the same register


def test_arm_is_read_too() -> None:
    loop, _ = hottest_loop(AARCH64)
    assert (loop.fma, loop.vector_bits, loop.loads, loop.stores, loop.chain) == (2, 128, 2, 0, 1)


def test_a_chain_goes_through_registers_that_take_turns() -> None:
    loop, _ = hottest_loop(SCALAR)
    assert (loop.fma, loop.vector_bits, loop.chain) == (2, 32, 2)


def test_a_sum_that_starts_anew_is_no_chain() -> None:
    again = ["\tvxorps\t%xmm0, %xmm0, %xmm0", "\tvfmadd231ps\t(%rdi), %zmm1, %zmm0", "\tvaddss\t%xmm0, %xmm2, %xmm3"]
    assert count(again).chain == 0
    assert count(again[1:]).chain == 1


def test_code_without_loops_has_no_hottest_loop() -> None:
    loop, lines = hottest_loop("f:\n\tretq\n")
    assert lines == [] and not any(loop.to_json().values())


# -- the steps ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cases() -> list[Any]:
    """Every step built and, by `build_case`, compared with numpy; odd rows, columns and k."""
    from ladder.kernels import build_case
    from ladder.problem import Problem

    from targets import load_target

    target = load_target("cpu")
    problems = (
        Problem("row", 1, 100, 70, True, target),
        Problem("head", 1, 96, 331, False, target),
        Problem("rows", 29, 100, 70, True, target),
    )
    return [build_case(p, lambda _: None) for p in problems]


def test_every_step_is_there_and_right(cases: list[Any]) -> None:
    for case in cases:
        assert [b.step for b in case.steps] == list(KERNEL_STEPS)
        assert all(0 < b.error < 1e-5 for b in case.steps)
        rounding = [b.rounding for b in case.steps]
        assert rounding[5] < rounding[7] < rounding[8] < 0.02  # float32 under float16 under int8


def test_weights_take_the_bytes_that_a_step_says(cases: list[Any]) -> None:
    for case in cases:
        size = {b.step.key: b.weight_bytes for b in case.steps}
        assert size["naive"] == 4 * case.problem.n * case.problem.k
        assert size["float16"] * 2 == size["fused"]
        assert size["int8"] == size["fused"] // 4 + 4 * case.problem.n  # and a scale a row


def test_a_step_that_is_wrong_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from ladder import kernels
    from ladder.problem import Problem

    from targets import load_target

    pack = kernels.pack
    monkeypatch.setattr(kernels, "pack", lambda weight, rows: pack(weight[::-1], rows))
    with pytest.raises(RuntimeError, match="row, packed panels: differs from numpy"):
        kernels.build_case(Problem("row", 1, 32, 65, False, load_target("cpu")), lambda _: None, keys=["panels"])


def test_the_steps_are_the_loops_that_the_page_tells_of() -> None:
    from ladder import gemv, loops, matmul
    from ladder.kernels import compiled
    from ladder.problem import Problem

    from targets import load_target

    target = load_target("x86-64-v3")  # the same instructions whatever machine compiles
    row, rows = (Problem("p", m, 768, 256, False, target) for m in (1, 64))

    def loop(func: Any) -> Any:
        return hottest_loop(compiled(func, target).mod.inspect_source("asm"))[0]

    naive, vectors = loop(loops.naive(row)), loop(loops.vectors(row))
    assert naive.vector_bits == 32 and naive.chain == naive.fma  # every multiply-add waits
    assert vectors.vector_bits == 256
    panels, sums, streams = (loop(make(row)) for make in (gemv.panels, gemv.accumulators, gemv.streams))
    assert panels.chain == panels.fma // 2  # two sums
    assert sums.chain < panels.chain and streams.chain < panels.chain
    panels, tile, blocks = (loop(make(rows)) for make in (matmul.panels, matmul.register_tile, matmul.cache_blocks))
    assert panels.loads >= panels.fma > 0
    for tiled in (tile, blocks):
        assert tiled.loads < tiled.fma and tiled.stack <= 1 and tiled.fma == 12 * tiled.chain


@pytest.mark.heavy
def test_a_run_makes_a_record_that_can_be_shown(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both parts on a tiny model: keys, medians, spreads, gains; the page and the figure of it."""
    from ladder import kernels, models

    monkeypatch.setattr(kernels, "TURN_S", 0.002)
    monkeypatch.setattr(kernels, "COLD_BYTES", 1 << 16)
    steps = (MODEL_STEPS[0], MODEL_STEPS[6], MODEL_STEPS[8])  # no rule, what ships, int8
    monkeypatch.setattr(models, "MODEL_STEPS", steps)
    record: dict[str, Any] = {}
    for made in cpu_ladder.measure(str(tiny_model), "cpu", 17, 4, 2, 2, cpu_ladder.PARTS):
        record = json.loads(json.dumps(made))
    for case in record["kernels"]["cases"]:
        assert [row["step"] for row in case["steps"]] == list(range(len(KERNEL_STEPS)))
        assert case["steps"][0]["gain"] == case["steps"][0]["total_gain"] == 1
        assert all(row[key] > 0 for row in case["steps"] for key in ("time_us", "gb_s", "gflop_s", "bound_share"))
    rows = record["model_ladder"]["steps"]
    assert [row["title"] for row in rows] == [step.title for step in steps]
    assert all(row["decode_tok_s"] > 0 and row["prefill_tok_s"] > 0 for row in rows)
    assert rows[0]["error"] == 0 and 0 < rows[1]["error"] < 1e-3 and rows[1]["error"] < rows[2]["error"] < 0.2

    page = report.render(PAGE, record)
    missing = {"ports", "profile-decode", "profile-prefill", "executed"}
    assert {m["name"] for m in report.BLOCK.finditer(page) if report.NOT_THERE in m[0]} == missing
    assert report.render(page, record) == page
    cpu_ladder.write_figure(tmp_path / "ladder.png", record)
    assert (tmp_path / "ladder.png").read_bytes().startswith(b"\x89PNG")
    assert "whole model: decode" in (tmp_path / "ladder.svg").read_text(encoding="utf-8")


# -- the profile -------------------------------------------------------------------------------------------------------


def test_calls_are_timed_by_name(tiny_artifact: Path) -> None:
    from ladder.profiling import profile, virtual_machine

    from gpt2_tvm.engine import Engine

    engine = Engine(tiny_artifact)
    rows, whole = profile(engine, virtual_machine(engine), "prefill", [1, 2, 3], repeats=1)
    known = {f["name"]: f["calls"].get("prefill", 0) for f in engine.artifact.manifest["functions"]}
    seen = {row["name"]: row["calls"] for row in rows if row["name"] in known}
    assert whole > 0 and seen == {name: calls for name, calls in known.items() if calls}


def test_callgrinds_counts_are_read(tmp_path: Path) -> None:
    from ladder.counted import read_counts

    file = tmp_path / "callgrind.out.1"
    file.write_text("events: Ir\nfn=f\n10 5\n12 7\ncfn=g\ncalls=2 3\n13 100\n\nfn=g\n3 100\n\ntotals: 112\n")
    assert read_counts(file) == {"f": 112, "g": 100}


def test_the_largest_of_the_units_is_the_bound() -> None:
    from ladder import gemv
    from ladder.ports import Ports
    from ladder.problem import Problem
    from ladder.profiling import explain

    from targets import load_target

    target = load_target("x86-64-v3")
    func = gemv.accumulators(Problem("p", 1, 768, 256, False, target)).with_attr("global_symbol", "main")
    ports = Ports(read_gb_s=1.0, fma_gflop_s=1.0, loads=1e9, converts={}, latency_ns=1.0)
    known = {"bytes": 4000, "flops": 2000, "role": "decode: layer", "rule": "cpu-gemv"}
    row = explain({"name": "f", "calls": 2, "time_us": 16.0}, known, func, target, ports, {}, threads=2)
    assert row["role"] == "layer" and row["bound"] == "memory" and row["alone_us"]["memory"] == pytest.approx(8.0)
    assert row["bound_share"] == pytest.approx(0.5) and row["gb_s"] == pytest.approx(0.5)
    assert row["alone_us"]["multiply-adds"] == pytest.approx(4.0)
    assert 0 < row["alone_us"]["chain"] < row["alone_us"]["loads"]


@pytest.mark.heavy
def test_a_profile_says_what_bounds_each_function(tiny_model: Path) -> None:
    from ladder.profile_report import profile_text

    made = json.loads(json.dumps(cpu_bounds.collect(str(tiny_model), "q8f32", "cpu", 8, 5, 1, 2, callgrind=False)))
    text = profile_text(made)
    for what in ("decode", "prefill"):
        rows = made[what]["functions"]
        assert len(rows) == 5 and rows == sorted(rows, key=lambda row: -row["time_us"])
        assert all(row["alone_us"][row["bound"]] == max(row["alone_us"].values()) for row in rows)
        assert all(row["role"] in text for row in rows)
    narrow = [row for row in made["decode"]["functions"] if row["rule"] == "cpu-gemv"]
    assert narrow and all(row["loop"]["converts"] and row["alone_us"]["conversions"] > 0 for row in narrow)
    assert made["ports"]["fma_gflop_s"] > 1 and set(made["ports"]["converts"]) == {"float16", "int8"}


@pytest.mark.heavy
@pytest.mark.skipif(not shutil.which("valgrind"), reason="valgrind is not installed")
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="counts AVX2 code")
def test_the_loop_in_the_assembly_is_the_loop_that_runs() -> None:
    made = cpu_bounds.collect("bundled", "q0f32", "x86-64-v3", 32, 6, 1, 1, callgrind=True)
    for what in ("decode", "prefill"):
        shares = [row["loop_share"] for row in made["executed"][what] if "." in row["role"]]  # linear layers
        assert len(shares) >= 3 and all(0.75 < share <= 1.01 for share in shares), shares


# -- the page ----------------------------------------------------------------------------------------------------------


def test_the_page_shows_the_records() -> None:
    records = ROOT / "artifacts" / "records"
    assert report.render(PAGE, cpu_ladder.page_record(records)) == PAGE, "run python benchmarks/cpu_ladder.py --render"


def test_the_page_has_a_place_for_every_table() -> None:
    names = {match["name"] for match in report.BLOCK.finditer(PAGE)}
    expected = {"machine", "figure", "model", "ports", "profile-decode", "profile-prefill", "executed"}
    expected |= {f"step-{step.number}" for step in KERNEL_STEPS}
    expected |= {"kernel-decode-c_fc", "kernel-decode-lm_head", "kernel-prefill-c_fc"}
    assert names == expected


def test_the_page_names_files_that_are_there() -> None:
    named = re.findall(r"`((?:gpt2_tvm|benchmarks|targets)/[\w./-]*)`", PAGE)
    assert named and [name for name in named if not (ROOT / name).exists()] == []


def test_what_is_recorded_is_what_the_code_would_record() -> None:
    if not cpu_ladder.RECORD.is_file():
        pytest.skip("no record yet")
    record = cpu_ladder.read_record(cpu_ladder.RECORD)
    assert [row["title"] for row in record["model_ladder"]["steps"]] == [step.title for step in MODEL_STEPS]
    for case in record["kernels"]["cases"]:
        assert [row["key"] for row in case["steps"]] == [step.key for step in KERNEL_STEPS]
        for row in case["steps"]:
            assert row["error"] < 1e-5 and np.isfinite(row["gain"])
    for kind in ("png", "svg"):
        assert cpu_ladder.FIGURE.with_suffix(f".{kind}").is_file()


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.0123456, "0.0123"), (1.5, "1.50"), (12.34, "12.3"), (123.4, "123"), (12345, "12,300")],
)
def test_numbers_have_three_digits(value: float, text: str) -> None:
    assert report.number(value) == text


def test_another_target_is_refused() -> None:
    from gpt2_tvm.errors import UserError

    with pytest.raises(UserError, match="--target h100"):
        cpu_ladder.problems("gpt2", "h100", 17)
