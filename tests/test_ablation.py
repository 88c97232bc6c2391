"""Which rule sets an ablation compares, which rule takes which function, and what logits are compared with."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from faults import refusal
from reference import FLOAT16, FLOAT32
from test_ablation_results import HEADER

from gpt2_tvm.schedules.registry import make_rules, rule_set
from targets import load_target
from tuning import ablation_reference
from tuning.ablation_records import Journal
from tuning.ablation_results import result
from tuning.ablation_work import Job, schedule
from tuning.variants import Variant, cells, crossed_factors, factors, variants

# Sets ---------------------------------------------------------------------------------------------------------------


def test_sets_of_a_gpu() -> None:
    names = [v.name for v in variants(load_target("webgpu"))]
    rules = ("matmul", "gemv", "reduction", "general-reduction")
    joint = "reduction+general-reduction"
    assert names[0] == "baseline" and names[-1] == "full" and "stock" in names
    assert {f"only-{r}" for r in (*rules, joint)} | {f"without-{r}" for r in (*rules, joint)} <= set(names)
    by_name = {v.name: v for v in variants(load_target("webgpu"))}
    assert by_name[f"only-{joint}"].rules == ("reduction", "general-reduction", "fallback")
    assert not set(by_name[f"without-{joint}"].rules) & {"reduction", "general-reduction"}
    assert all(v.rules[-1] == "fallback" for v in by_name.values())
    assert by_name["baseline"].on == frozenset() and set(rules) <= by_name["full"].on


def test_sets_of_a_cpu() -> None:
    target = load_target("cpu")
    found = {v.name: v.rules for v in variants(target)}
    ours, theirs = tuple(target.rules), ("dlight-cpu-gemv", "dlight-cpu-reduction")
    assert factors(target) == (*ours, *theirs)
    assert found["baseline"] == () and found["full"] == ours and found["stock"] == theirs
    assert {f"only-{r}" for r in (*ours, *theirs)} <= set(found)
    assert {f"without-{r}" for r in ours} <= set(found)
    assert found["without-cpu-gemv"] == tuple(r for r in ours if r != "cpu-gemv")


@pytest.mark.parametrize("name", ["cpu", "webgpu", "cuda"])
def test_a_factorial_design_has_every_subset_once(name: str) -> None:
    target = load_target(name)
    design = cells(target)
    assert len(design) == 2 ** len(crossed_factors(target)) <= 64 and len(set(design.values())) == len(design)
    assert {"matmul", "gemv", "reduction", "general-reduction"} <= set(crossed_factors(target)) or name == "cpu"
    plain, found = variants(target), variants(target, full_factorial=True)
    assert {v.rules for v in found} >= set(design)
    assert len({v.name for v in found}) == len(found) and set(plain) <= set(found)
    added = [v.rules for v in found if v not in plain]
    assert len(set(added)) == len(added) and not set(added) & {v.rules for v in plain}


def test_sets_by_name_and_rules_of_ones_own() -> None:
    target = load_target("cpu")
    (one,) = variants(target, ["only-planted_rules:Raises"])
    assert one == Variant("only-planted_rules:Raises", ("planted_rules:Raises",))
    mine = variants(target, extra=["planted_rules:TakesNothing"])
    by_name = {v.name: v.rules for v in mine}
    assert by_name["with-planted_rules:TakesNothing"] == ("planted_rules:TakesNothing", *target.rules)
    assert by_name["only-planted_rules:TakesNothing"] == ("planted_rules:TakesNothing",)
    ((name, rule),) = make_rules(("planted_rules:TakesNothing",), target)
    assert name == "planted_rules:TakesNothing" and rule.apply(None, None, False) is None
    assert make_rules(("planted_rules:Raises",), target)[0][1] is not None  # one that takes no argument
    refusal(lambda: make_rules(("planted_rules:NotThere",), target))
    refusal(lambda: make_rules(("no_such_module:X",), target))


@pytest.mark.parametrize(
    ("text", "kind", "rules"),
    [
        ("only-gemv+matmul", "cuda", ("gemv", "matmul", "fallback")),  # in the order given
        ("without-gemv+matmul", "cuda", ("reduction", "general-reduction", "fallback")),
        ("with-reduction", "cuda", ("reduction", "matmul", "gemv", "general-reduction", "fallback")),
        ("with-dlight-cpu-gemv", "cpu", ("dlight-cpu-gemv", "cpu-matmul", "cpu-gemv", "cpu-reduction")),
        ("a.b:C,matmul", "cuda", ("a.b:C", "matmul", "fallback")),
    ],
)
def test_rule_sets_of_several_rules(text: str, kind: str, rules: tuple[str, ...]) -> None:
    from dataclasses import replace

    target = load_target(kind)
    stock = ("matmul", "gemv", "reduction", "general-reduction", "fallback")
    target = replace(target, rules=stock) if kind == "cuda" else target  # whatever `full` becomes
    assert rule_set(text, target) == rules


def test_sets_that_mean_nothing_are_refused() -> None:
    cpu, gpu = load_target("cpu"), load_target("cuda")
    assert "nonsense" in refusal(lambda: variants(cpu, ["only-nonsense"]))
    assert "not for cpu" in refusal(lambda: variants(cpu, ["only-gemv"]))
    assert "Fallback stays" in refusal(lambda: rule_set("without-fallback", gpu))
    for text in ("only-", "without-", "with-", ","):
        assert "names no rule" in refusal(lambda text=text: rule_set(text, cpu))
    assert "MODULE:CLASS" in refusal(lambda: variants(cpu, extra=["cpu-gemv"]))
    many = [f"m:R{i}" for i in range(5)]
    assert "--full-factorial" in refusal(lambda: variants(cpu, full_factorial=True, extra=many))


# Hits ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "attention"),
    [
        *((name, "flash") for name in ("cpu", "cuda", "webgpu")),
        *(pytest.param(name, "flash", marks=pytest.mark.heavy) for name in ("metal", "rocm")),
        ("webgpu", "materialized"),
    ],
)
def test_hits_of_full_are_what_each_rule_says_by_hand(
    target: str, attention: str, tiny_model: Path, tmp_path: Path
) -> None:
    job = Job(str(tiny_model), target, attention=attention)
    found = schedule(lambda *_: None, job, "full")
    (full,) = variants(load_target(target), ["full"])
    journal = Journal.begin(tmp_path / "j", HEADER)
    line = {"kind": "set", "set": "full", "rules": list(full.rules), "sources": "s", "status": "ok", "compile_s": 1.0}
    journal.append({**line, **found})
    (row,) = result(journal, [full], load_target(target), ())["rows"]

    by_hand, ours = _ask(target, attention, tiny_model)
    listed = {function["name"]: function["rule"] for function in found["functions"]}
    assert listed == {name: by_hand[name] for name in listed}
    assert row["hits"] == Counter(listed.values())
    assert sum(row["hits"].values()) == len(found["functions"])
    # what is not listed is called by nothing
    assert all(function["calls"] for function in found["functions"])
    called = {name for function in found["functions"] for name in function["calls"]}
    assert {"prefill", "decode_b1", "greedy_b1", "score"} <= called
    # and what is called ours came with its schedule
    assert {name for name, rule in listed.items() if rule == "ours"} == ours & set(listed) != set()


def _ask(name: str, attention: str, model: Path) -> tuple[dict[str, str], set[str]]:
    """({function: the first rule that takes it}, names of the functions that come scheduled), each rule asked here."""
    import tvm
    from tvm import relax, tirx
    from tvm.s_tir.dlight import gpu

    from gpt2_tvm.build import lower_plan, make_plan
    from gpt2_tvm.checkpoint import resolve_model
    from targets import specialise

    target = specialise(load_target(name))
    plan = make_plan(resolve_model(str(model)).config, target, attention=attention, verify_widths=(4,))
    stock = {
        "matmul": gpu.Matmul,
        "gemv": gpu.GEMV,
        "reduction": gpu.Reduction,
        "general-reduction": gpu.GeneralReduction,
        "fallback": gpu.Fallback,
    }
    rules = [(rule, stock[rule]() if rule in stock else make_rules([rule], target)[0][1]) for rule in target.rules]
    taken, ours = {}, set()
    with target.tvm_target() as tvm_target:
        lowered, _ = lower_plan(plan)
        called: set[str] = set()
        for _, function in lowered.final.functions_items():
            if isinstance(function, relax.Function):
                relax.analysis.post_order_visit(function, lambda node: called.update(_callees(node)))
        for var, function in lowered.fused.functions_items():
            if not isinstance(function, tirx.PrimFunc):
                continue
            if function.attrs and function.attrs.get("tirx.is_scheduled"):
                taken[var.name_hint] = "ours"
                ours.add(var.name_hint)
                continue
            for rule, made in rules:
                try:
                    answer = made.apply(function, tvm_target, False)
                except ValueError:  # DLight's GEMV on a product it cannot unpack: it counts as declined
                    assert rule == "gemv"
                    answer = None
                if answer is not None:
                    taken[var.name_hint] = rule
                    break
            else:
                taken[var.name_hint] = "none"
    primitives = {var.name_hint for var, f in lowered.final.functions_items() if isinstance(f, tvm.tirx.PrimFunc)}
    assert called & primitives <= set(taken) | {n for n in primitives if n.startswith("shape_func")}
    return taken, ours


def _callees(node: Any) -> list[str]:
    from tvm import relax
    from tvm.ir import GlobalVar

    return [node.op.name_hint] if isinstance(node, relax.Call) and isinstance(node.op, GlobalVar) else []


def test_the_code_of_a_set_is_what_it_schedules(tiny_model: Path) -> None:
    job = Job(str(tiny_model), "cpu")

    def code(rules: str, **changes: Any) -> str:
        return str(schedule(lambda *_: None, Job(**{**vars(job), **changes}), rules)["code"])

    plain = code("baseline")
    assert code("only-planted_rules:TakesNothing") == plain  # another list, the same module
    assert code("full") != plain
    assert code("baseline", target="x86-64-v3") != plain
    assert code("baseline", quantization="q0f16") != plain


# The reference ------------------------------------------------------------------------------------------------------


def test_tolerances_are_those_of_the_parity_tests() -> None:
    tolerance = ablation_reference.tolerance
    assert tolerance("q0f32") == tolerance("q8f32") == FLOAT32  # int8 is compared with int8
    assert tolerance("q0f16") == tolerance("q16f32") == FLOAT16


def test_which_reference() -> None:
    choose = ablation_reference.choose
    assert choose("cpu", "q0f16", "webgpu") == "cpu full q0f32"
    assert choose("cpu", "q0f32", "cpu") == "cpu baseline q0f32"  # the CPU's own rules are on trial
    assert choose("auto", "q8f32", "cuda") == "cpu full q8f32"  # quantised weights have no float32 original
    refusal(lambda: choose("onnx", "q0f32", "cpu"))
    refusal(lambda: choose("transformers", "q8f32", "cpu"))
