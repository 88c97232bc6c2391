"""What `tuning.report` reads from a compiled model: rules and their reasons, loops, tiles, code. Nothing is timed."""

from __future__ import annotations

import importlib.util
import re
import sys
import xml.dom.minidom
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import tvm
import tvm_ffi
from tvm import te
from tvm.s_tir import dlight
from tvm.target import Target

from gpt2_tvm.build import Plan, lower_plan, make_plan
from gpt2_tvm.config import GPT2Config
from gpt2_tvm.inventory import function_table
from gpt2_tvm.passes.apply_rules import NONE, OURS
from gpt2_tvm.schedules.tunable_gemv import overruns
from targets import load_target
from tuning.report import facts, loops
from tuning.report.asking import ACCEPTED, DECLINED, RAISED, ask
from tuning.report.drawing import draw_nest, draw_tile
from tuning.report.reasons import why_not, work_of
from tuning.report.tile import find_tile

CONFIG = GPT2Config(vocab_size=97, n_positions=48, n_embd=64, n_layer=1, n_head=2)
# The rules that `reasons` knows; of any other the line that said no has to be enough.
IN_WORDS = {
    *("matmul", "gemv", "reduction", "general-reduction", "cpu-matmul", "cpu-gemv", "cpu-reduction"),
    *("norm-gemv", "quantised-gemv", "wide-gemv", "webgpu-matmul", "tensor-matmul"),
}
CUDA = Target({"kind": "cuda", "arch": "sm_89", "max_num_threads": 1024, "max_shared_memory_per_block": 49152})


@cache
def planned(target: str, attention: str = "flash", rules: str = "full") -> Plan:
    return make_plan(CONFIG, load_target(target), attention=attention, verify_widths=(4,), rules=rules)


@cache
def lowered(target: str, attention: str = "flash", rules: str = "full") -> Any:
    return lower_plan(planned(target, attention, rules))[0]


@cache
def report(target: str) -> facts.Report:
    """Everything about a tiny model, compiled. WebGPU and the CPU need no toolchain."""
    return facts.collect(planned(target), "tiny")


def product(rows: int | None, columns: int, depth: int, dtype: str = "float16") -> Any:
    """y[1, rows, columns] = x . w^T as the model has it; rows None: known at run time."""
    n = te.var("n", "int64") if rows is None else rows
    x, w = te.placeholder((1, n, depth), dtype, "x"), te.placeholder((columns, depth), dtype, "w")
    k = te.reduce_axis((0, depth), "k")
    body = lambda b, i, j: te.sum(x[b, i, k].astype("float32") * w[j, k].astype("float32"), k)  # noqa: E731
    return te.create_prim_func([x, w, te.compute((1, n, columns), body, name="NT_matmul")])


def row_reduction(combine: Any, shape: tuple[int, int] = (4, 96)) -> Any:
    x = te.placeholder(shape, "float32", "x")
    k = te.reduce_axis((0, shape[1]), "k")
    return te.create_prim_func([x, te.compute((shape[0],), lambda i: combine(x[i, k], k), name="reduced")])


# Which rule --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [pytest.param("webgpu", marks=pytest.mark.heavy), "x86-64-v3"])
def test_every_function_is_there_with_the_rule_that_took_it(target: str) -> None:
    made, low = report(target), lowered(target)
    table = {row["name"]: row for row in function_table(low, planned(target))["functions"]}
    assert {f.name: f.rule for f in made.functions} == {name: row["rule"] for name, row in table.items()}
    for f in made.functions:
        won = [a.rule for a in f.answers if a.won]
        assert won == ([] if f.rule in (OURS, NONE) else [f.rule])
        assert [a.rule for a in f.answers] == ([] if f.rule == OURS else list(made.rules))
        assert f.after.tir == facts.script(low.scheduled[f.name])
        assert (f.before is None) == (f.rule == OURS)
        assert f.story is not None or f.rule not in (OURS,)
        assert f.nbytes > 0 and f.buffers
        assert not [a for a in f.answers if a.outcome == RAISED]


def test_asking_gives_the_schedule_that_the_pipeline_used() -> None:
    low, plan = lowered("rtx-4090"), planned("rtx-4090")
    hits = {hit.function: hit.rule for hit in low.hits}
    from gpt2_tvm.schedules.registry import make_rules

    for name in [next(n for n, rule in hits.items() if rule == took) for took in plan.rules if took in hits.values()]:
        answers = ask(low.fused[name], make_rules(plan.rules, plan.target), plan.target.tvm_target())
        (won,) = [a for a in answers if a.won]
        assert won.rule == hits[name]
        made = won.schedule.mod["main"].with_attr("tirx.is_scheduled", True)
        assert tvm_ffi.structural_equal(made, low.scheduled[name])


def test_wherever_a_rule_declines_the_report_says_why() -> None:
    for target in ("webgpu", "x86-64-v3"):
        for f in report(target).functions:
            for a in f.answers:
                if a.outcome == DECLINED:
                    assert a.reason or a.rule not in IN_WORDS, (f.name, a.rule, a.places)
                    assert a.places and all(place.condition and place.line for place in a.places)
                    assert not any(Path(place.file).is_absolute() for place in a.places)
                else:
                    assert not a.reason and not a.places


@pytest.mark.heavy
def test_the_line_that_said_no_is_dlights_own_where_the_rule_is_dlights() -> None:
    """Our wrappers and subclasses of DLight's rules are on the way, and never the end of it."""
    from gpt2_tvm.schedules.registry import STOCK_GPU, make_rules

    said: dict[str, set[str]] = {}
    for target, attention in (("rtx-4090", "flash"), ("webgpu", "flash"), ("m1", "materialized")):
        plan, low = planned(target, attention), lowered(target, attention)
        rules = make_rules(STOCK_GPU, plan.target)
        for name in (hit.function for hit in low.hits if hit.rule in plan.rules):
            for answer in ask(low.fused[name], rules, plan.target.tvm_target()):
                if answer.outcome == DECLINED:
                    said.setdefault(answer.rule, set()).add(answer.places[-1].file)
    assert all(file.startswith("tvm/s_tir/dlight/") for files in said.values() for file in files), said
    assert "tvm/s_tir/dlight/gpu/gemv.py" in said["gemv"]


def test_cudas_rules_say_why_too() -> None:
    from gpt2_tvm.schedules.registry import make_rules

    low, plan = lowered("rtx-4090"), planned("rtx-4090")
    rules = make_rules(plan.rules, plan.target)
    declined = set()
    for name in (hit.function for hit in low.hits if hit.rule in plan.rules):
        function = low.fused[name]
        for answer in ask(function, rules, plan.target.tvm_target()):
            if answer.outcome == DECLINED:
                declined.add(answer.rule)
                assert why_not(answer.rule, work_of(function)) or answer.rule not in IN_WORDS, (name, answer.rule)
    assert {"tensor-matmul", "wide-gemv", "norm-gemv"} <= declined


PLANTED = """
class Deep:
    def apply(self, func, target, tunable):
        found = self.look(func)
        if found is None:
            return None
        return found

    def look(self, func):
        if len(func.params) > 1:
            if len(func.params) == 3:
                return None
        return 1


class Raises:
    def apply(self, func, target, tunable):
        raise ValueError("planted")


class Swallows:
    def apply(self, func, target, tunable):
        try:
            self.look(func)
        except AssertionError:
            return None

    def look(self, func):
        if func is not None:
            assert len(func.params) > 7
"""


@pytest.fixture(scope="module")
def own_rules(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """Rules of our own in a folder that the watcher takes for a rules' package."""
    path = tmp_path_factory.mktemp("rules") / "dlight" / "planted.py"
    path.parent.mkdir()
    path.write_text(PLANTED)
    spec = importlib.util.spec_from_file_location("planted_rules", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_line_that_said_no_is_found_through_calls_and_handlers(own_rules: ModuleType) -> None:
    before = sys.gettrace()
    rules = [("deep", own_rules.Deep()), ("raises", own_rules.Raises()), ("swallows", own_rules.Swallows())]
    deep, raises, swallows = ask(product(1, 64, 64), rules, CUDA)
    assert sys.gettrace() is before
    lines = PLANTED.splitlines()
    assert [(p.condition, lines[p.line - 1].strip()) for p in deep.places] == [
        ("found is None", "return None"),
        ("len(func.params) == 3", "return None"),
    ]
    assert raises.outcome == RAISED and raises.error == "ValueError: planted"
    assert swallows.outcome == DECLINED
    assert [p.condition for p in swallows.places] == [
        "AssertionError at self.look(func)",
        "AssertionError at assert len(func.params) > 7",
    ]
    assert deep.asked and raises.asked and swallows.asked


def test_rules_after_the_winner_are_asked_and_marked(own_rules: ModuleType) -> None:
    gemv, fallback = dlight.gpu.GEMV(), dlight.gpu.Fallback()
    answers = ask(product(1, 64, 64), [("deep", own_rules.Deep()), ("gemv", gemv), ("fallback", fallback)], CUDA)
    assert [(a.outcome, a.asked, a.won) for a in answers] == [
        (DECLINED, True, False),
        (ACCEPTED, True, True),
        (ACCEPTED, False, False),
    ]


@pytest.mark.parametrize(
    ("func", "rule", "says"),
    [
        (product(1, 64, 96), "matmul", "one factor is a vector"),
        (product(4, 64, 96), "gemv", "4 rows"),
        (product(None, 64, 96), "gemv", "known only at run time"),
        (row_reduction(te.max), "reduction", "takes a maximum"),
        (row_reduction(te.sum), "matmul", "not over products of two matrices"),
        (row_reduction(te.sum), "general-reduction", "only stage is the sum"),
        (row_reduction(te.sum), "cpu-gemv", "weight in panels"),
    ],
)
def test_a_reason_is_given_for_what_a_rule_really_declines(func: Any, rule: str, says: str) -> None:
    from gpt2_tvm.schedules.registry import make_rules

    target = load_target("x86-64-v3" if rule.startswith("cpu") else "rtx-4090")
    (answer,) = ask(func, make_rules((rule,), target), target.tvm_target())
    assert answer.outcome == DECLINED
    assert says in why_not(rule, work_of(func))


# Loops and tiles ---------------------------------------------------------------------------------------------------


def data(svg: str, cls: str) -> list[dict[str, str]]:
    """The data attributes of the groups of this class."""
    groups = re.findall(rf'<g class="{cls}[^"]*"([^>]*)>', svg)
    return [dict(re.findall(r'data-([\w-]+)="([^"]*)"', group)) for group in groups]


def gemv_constants(kind: str, depth: int, columns: int) -> tuple[int, int, int, int, int, str]:
    """(TS, TR, TILE_S, TILE_R, VEC_C, axis of S) of `dl.gpu.GEMV` for a weight [columns, depth], from its source."""
    tall = columns > depth
    ts, tr = {
        "cuda": (16, 32),
        "webgpu": (1, 64),
        "metal": (4, 16) if tall else (2, 64),
        "rocm": (1, 128) if tall else (4, 64),  # 8 x 64 does not fit the target's 256 threads, and TS is halved
    }[kind]
    tile_r = max([f for f in (tr, 2 * tr, 4 * tr, 8 * tr) if depth % f == 0], default=1) // tr or 1
    most = {"cuda": 4, "webgpu": 1, "metal": 1, "rocm": 4}[kind]
    vec = min(max(f for f in (1, 2, 4, 8) if tile_r % f == 0), most)
    return ts, tr, 1, tile_r, vec, "threadIdx.x" if kind == "metal" else "threadIdx.y"


def threads_in_text(tir: str) -> dict[str, set[int]]:
    """{axis: extents} of the thread bindings in TVMScript."""
    found: dict[str, set[int]] = {}
    for extent, axis in re.findall(r'T\.thread_binding\((?:T\.int64\()?(\d+)\)?, thread="([\w.]+)"', tir):
        found.setdefault(axis, set()).add(int(extent))
    return found


@pytest.mark.parametrize("target", ["rtx-4090", "webgpu", "m1", "gfx942"])
@pytest.mark.parametrize(("columns", "depth"), [(2304, 768), (768, 3072), (768, 768), (256, 96)])
def test_the_drawing_shows_the_tile_that_the_tir_has(target: str, columns: int, depth: int) -> None:
    device = load_target(target)
    with device.tvm_target() as tvm_target:
        schedule = dlight.gpu.GEMV().apply(product(1, columns, depth), tvm_target, False)
    func = schedule.mod["main"]
    tile = find_tile(func)
    assert tile is not None
    (drawn,) = data(draw_tile(tile), "tile")
    expected = gemv_constants(device.kind, depth, columns)
    names = ("ts", "tr", "tile-s", "tile-r", "vec")
    assert (*(int(drawn[name]) for name in names), drawn["tag-s"]) == expected
    assert (int(drawn["rows"]), int(drawn["columns"])) == (columns, depth)
    # and the same from the text of the TIR: thread axes, and the whole matrix covered
    threads = threads_in_text(facts.script(func))
    assert threads[drawn["tag-s"]] == {tile.ts} and threads[drawn["tag-r"]] == {tile.tr}
    assert threads["blockIdx.x"] == {tile.blocks} and tile.blocks * tile.ts * tile.tile_s == columns
    assert tile.steps == -(-depth // (tile.tr * tile.tile_r))  # the last step is cut where it does not fit


def test_the_nest_in_the_drawing_has_every_loop_of_the_tir() -> None:
    low = lowered("rtx-4090", rules="stock")
    func = low.scheduled[next(hit.function for hit in low.hits if hit.rule == "gemv")]
    drawn = data(draw_nest(loops.loop_nest(func)), "loop")
    found: list[tuple[str, str]] = []
    from tvm import tirx

    def see(loop: Any) -> None:
        binding = loop.thread_binding
        found.append(("" if binding is None else str(binding.thread_tag), str(int(loop.extent))))

    tvm_ffi.structural_walk(func.body, [(tirx.For, see)], order="pre")
    assert [(group.get("axis", ""), group["extent"]) for group in drawn] == found
    assert {g["kind"] for g in drawn} == {"grid", "thread", "serial", "vector"}


def test_a_drawing_can_stand_alone() -> None:
    nest = loops.loop_nest(lowered("rtx-4090", rules="stock").scheduled["layer_norm2"])
    alone = draw_nest(nest, "a <title>", standalone=True)
    assert xml.dom.minidom.parseString(alone).documentElement.tagName == "svg"
    assert "background:#fff" in alone and "prefers-color-scheme" not in alone  # what is around it is not known
    assert "<style>" not in draw_nest(nest)


def test_a_tile_is_not_seen_where_there_is_none() -> None:
    for rules, products in (("stock", {"gemv"}), ("full", {"gemv", "wide-gemv", "norm-gemv"})):
        low = lowered("rtx-4090", rules=rules)
        with_tile = {hit.function for hit in low.hits if find_tile(low.scheduled[hit.function]) is not None}
        table = function_table(low, planned("rtx-4090", rules=rules))["functions"]
        of_one_row = {row["name"] for row in table if {"greedy_b1", "propose_b1"} & set(row["calls"])}
        taken = {hit.function for hit in low.hits if hit.rule in products}
        assert with_tile == taken & of_one_row and len(with_tile) == 6  # the head with and without a temperature


def test_cache_stages_have_the_size_of_one_block_and_one_thread() -> None:
    low, plan = lowered("rtx-4090", rules="stock"), planned("rtx-4090", rules="stock")
    rows = {row["name"]: row for row in function_table(low, plan)["functions"]}
    checked = 0
    for name, row in rows.items():
        found = loops.stages(loops.loop_nest(low.scheduled[name]))
        shared = [place.bytes for place in found if place.scope.startswith("shared")]
        if row["rule"] == "gemv":
            assert sum(size for size in shared if isinstance(size, int)) == row["shared_memory_bytes"]
            tile = find_tile(low.scheduled[name])
            assert tile is not None
            registers = [place.bytes for place in found if place.scope == "local"]
            # float32: a vector of sums, a tile of the weight, their sum; and the product where something follows it: an
            # epilogue, or the guarded copy of a head whose last block is not full
            follows = "fused" in name or overruns(low.fused[name], plan.target.tvm_target())
            assert registers == [4 * tile.vec, 4 * tile.tile_s * tile.tile_r, 4, *([4] if follows else [])]
            checked += 1
    assert checked == 6


def test_repeated_code_is_drawn_once_and_counted() -> None:
    low = lowered("x86-64-v3")
    name = next(hit.function for hit in low.hits if hit.rule == "cpu-gemv")
    nest = loops.loop_nest(low.scheduled[name])
    assert max(n.repeats for n in loops.walk(nest) if isinstance(n, loops.Loop)) > 1
    assert len(list(loops.walk(nest))) < low.scheduled[name].script().count("\n")


# Code and numbers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["webgpu", "x86-64-v3"])
def test_every_function_has_its_generated_code(target: str) -> None:
    for f in report(target).functions:
        assert f.after.kernels, f.name
        assert all(kernel.text.strip() for kernel in f.after.kernels)
        if target == "webgpu":
            assert len(f.after.kernels) == f.kernels
            assert all(f"fn {kernel.name}(" in kernel.text for kernel in f.after.kernels)
        if f.baseline is not None:
            assert f.baseline.kernels and f.baseline.tir != f.after.tir
            assert f.baseline.rule == ("none" if target == "x86-64-v3" else "fallback")
        else:
            assert f.baseline_note


def test_a_compiler_that_is_missing_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    from gpt2_tvm import toolchains

    monkeypatch.setattr(toolchains, "missing", lambda target: "a compiler: pip install it")
    made = facts.collect(planned("webgpu"), "tiny", "embed1")
    assert made.notes == ["not compiled: it needs a compiler: pip install it"]
    assert [f.name for f in made.functions] == ["embed1"] and not made.functions[0].after.kernels


@pytest.mark.heavy
def test_numbers_of_symbolic_functions_are_for_the_sizes_that_are_named() -> None:
    made = [f for f in facts.collect(planned("webgpu", rules="stock"), "tiny").functions if "layer_norm" in f.name]
    decode, prefill = (next(f for f in made if f.role.startswith(what)) for what in ("decode", "prefill"))
    assert prefill.sizes == {"b": 1, "n": 24, "p": 0} and decode.sizes["n"] == 1
    weights = 2 * 64 * 4
    assert decode.nbytes == 2 * 64 * 4 + weights and prefill.nbytes == 24 * 2 * 64 * 4 + weights
    assert decode.intensity == pytest.approx((decode.flops or 0) / decode.nbytes)


def test_a_kernel_without_a_closed_form_is_still_reported() -> None:
    func = tvm.IRModule({"main": row_reduction(te.sum)})["main"]
    version = facts.version_of(func)
    assert version.tile is None and version.steps == () and "T.sblock" in version.tir
