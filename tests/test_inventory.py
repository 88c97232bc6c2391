"""The manifest's table of functions: work counted by hand, launches counted another way, nothing left out."""

from __future__ import annotations

import re
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tvm
from tvm import relax, te, tirx
from tvm.ir import GlobalVar

from gpt2_tvm.build import make_plan
from gpt2_tvm.config import GPT2Config
from gpt2_tvm.expressions import combine, evaluate, to_text
from gpt2_tvm.inventory import function_table
from gpt2_tvm.passes.cuda_graph import PREFIX
from gpt2_tvm.work import work_of
from targets import load_target

CONFIG = GPT2Config(vocab_size=97, n_positions=48, n_embd=32, n_layer=2, n_head=2)
RULES = {"cpu": "baseline", "cuda": "full", "webgpu": "full"}


@cache
def lowered(target: str, attention: str = "flash") -> tuple[Any, Any]:
    """(what the pipeline leaves, plan) of a tiny model, batch sizes 1 and 3."""
    from gpt2_tvm.build import lower_plan
    from gpt2_tvm.toolchains import tensor_intrin  # noqa: F401, lower_plan loads its intrinsics

    plan = make_plan(CONFIG, load_target(target), "q0f32", RULES[target], attention, (1, 3))
    with plan.target.tvm_target():
        return lower_plan(plan)[0], plan


@cache
def table(target: str, attention: str = "flash") -> dict[str, Any]:
    return function_table(*lowered(target, attention))


def row(of: dict[str, Any], role: str) -> dict[str, Any]:
    (found,) = [r for r in of["functions"] if r["role"] == role]
    return found


# Work ---------------------------------------------------------------------------------------------------------------


def test_work_of_a_matmul_is_what_a_hand_counts() -> None:
    n = te.var("n", "int64")
    x = te.placeholder((n, 64), "float16", name="x")
    w = te.placeholder((48, 64), "float16", name="w")
    k = te.reduce_axis((0, 64), name="k")
    y = te.compute((n, 48), lambda i, j: te.sum(x[i, k].astype("float32") * w[j, k].astype("float32"), axis=k))
    nbytes, flops = work_of("matmul", te.create_prim_func([x, w, y]))
    assert evaluate(flops, {"n": 5}) == 2 * 5 * 64 * 48
    assert evaluate(nbytes, {"n": 5}) == 2 * 5 * 64 + 2 * 48 * 64 + 4 * 5 * 48


def test_work_of_a_row_taken_from_a_table_is_the_row() -> None:
    ids = te.placeholder((3,), "int32", name="ids")
    wide = te.placeholder((1000, 8), "float32", name="wide")
    low = te.placeholder((2, 8), "float32", name="low")
    y = te.compute((3, 8), lambda i, j: te.exp(wide[ids[i], j]) + low[ids[i] % 2, j])
    nbytes, flops = work_of("embed", te.create_prim_func([ids, wide, low, y]))
    assert flops == 3 * 8 * 2
    assert nbytes == 4 * 3 + 4 * 3 * 8 + 4 * 2 * 8 + 4 * 3 * 8  # of the small table no more than there is


def test_work_of_a_half_read_argument_is_that_half() -> None:
    cache_ = te.placeholder((2, 10, 4), "float32", name="cache")
    y = te.compute((10, 4), lambda s, d: cache_[1, s, d])
    assert work_of("read_values", te.create_prim_func([cache_, y])) == (4 * 2 * 10 * 4, 0)


@pytest.mark.parametrize("target", ["cpu", pytest.param("webgpu", marks=pytest.mark.heavy)])
def test_layer_norm_and_linear_of_the_model(target: str) -> None:
    E = CONFIG.n_embd
    norm = next(r for r in table(target)["functions"] if r["name"].startswith("layer_norm") and "prefill" in r["role"])
    # sum E, mean 1, squares 4E (x - mean twice, a product, a sum), rstd 3, normalised 4E
    assert evaluate(norm["flops"], {"b": 2, "n": 7}) == 14 * (9 * E + 4)
    assert evaluate(norm["bytes"], {"b": 2, "n": 7}) == 4 * (2 * 14 * E + 2 * E)
    sizes = {"b": 1, "n": 1}
    if target == "cpu":  # fast_math writes gelu_new otherwise, packed weights may be padded
        return
    linear = row(table(target), "prefill, score: attn.c_attn + bias")
    assert evaluate(linear["flops"], sizes) == 2 * E * 3 * E + 3 * E
    assert evaluate(linear["bytes"], sizes) == 4 * (E + 3 * E * E + 3 * E + 3 * E)
    out = row(table(target), "prefill, score: attn.c_proj + bias + residual")
    assert evaluate(out["flops"], sizes) == 2 * E * E + 2 * E


@pytest.mark.parametrize("p", [0, 1, 31])
@pytest.mark.parametrize(("b", "n"), [(1, 1), (2, 5)])
def test_attention_closed_form_equals_a_count_row_by_row(p: int, b: int, n: int) -> None:
    heads, size = CONFIG.n_head, CONFIG.head_dim
    flops = 0
    for _ in range(b * heads):
        for t in range(n):
            for _ in range(p + t + 1):  # slots that row t sees: q . k, scale, maximum, subtract, exp, sum, p . V
                flops += 2 * size + 1 + 1 + 1 + 1 + 1 + 2 * size
            flops += size  # division by the sum
    found = next(r for r in table("webgpu")["functions"] if r["name"] == "prefill_attention")
    assert evaluate(found["flops"], {"b": b, "n": n, "p": p}) == flops
    moved = 4 * heads * size * (b * n + 2 * b * (p + n) + b * n) + 2 * 4 * b
    assert evaluate(found["bytes"], {"b": b, "n": n, "p": p}) == moved


# Rows ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "attention"),
    [
        ("cpu", "flash"),
        ("cuda", "flash"),
        ("webgpu", "flash"),
        pytest.param("cuda", "materialized", marks=pytest.mark.heavy),
        ("webgpu", "materialized"),
    ],
)
def test_every_called_function_has_a_row(target: str, attention: str) -> None:
    low, _ = lowered(target, attention)
    calls: dict[str, Counter[str]] = {}
    for var, func in low.final.functions_items():  # the table counts in an earlier phase
        if isinstance(func, relax.Function) and not var.name_hint.startswith(PREFIX):  # the same steps, once more
            calls[var.name_hint] = Counter()
            relax.analysis.post_order_visit(
                func, lambda node, count=calls[var.name_hint]: count.update(_callee(low.final, node))
            )
    rows = {r["name"]: r for r in table(target, attention)["functions"]}
    called = {name for count in calls.values() for name in count}
    assert set(rows) == {name for name in called if not name.startswith("shape_func")}  # the VM's own, on the host
    for name, found in rows.items():
        assert found["calls"] == {caller: count[name] for caller, count in calls.items() if count[name]}
        assert found["bytes"] is not None and found["flops"] is not None, name
        assert evaluate(found["bytes"], {"b": 2, "n": 3, "p": 4}) > 0
    hits = {hit.function: hit.rule for hit in low.hits}
    assert {name: r["rule"] for name, r in rows.items()} == {name: hits[name] for name in rows}


def extent_of(function: tirx.PrimFunc, argument: int, axis: int) -> int | str:
    shape = function.params[argument].shape
    return to_text(shape[axis], lambda v: str(v.name) if isinstance(v, tirx.Var) else None)


def _callee(mod: tvm.IRModule, node: Any) -> list[str]:
    if isinstance(node, relax.Call) and isinstance(node.op, GlobalVar) and isinstance(mod[node.op], tirx.PrimFunc):
        return [node.op.name_hint]
    return []


@pytest.mark.parametrize(("target", "attention"), [("webgpu", "flash"), ("webgpu", "materialized"), ("cuda", "flash")])
def test_launches_equal_those_of_the_compiled_host_code(target: str, attention: str) -> None:
    from gpt2_tvm.host_code import host_launches

    low, plan = lowered(target, attention)
    functions = {v: f for v, f in low.final.functions_items() if isinstance(f, tirx.PrimFunc)}
    host = host_launches(functions, plan.target.tvm_target())
    found = table(target, attention)
    counted: Counter[str] = Counter()
    for entry in found["functions"]:
        launches = host[entry["name"]]
        assert entry["kernels"] == len(launches)
        for axis, extent in zip(launches[0].grid, entry["grid"], strict=True):  # the grid as TVM's last pass has it
            text = axis(lambda of, function=low.final[entry["name"]]: extent_of(function, of.argument, of.axis))
            assert evaluate(text, {"b": 2, "n": 3}) == evaluate(extent, {"b": 2, "n": 3}), entry["name"]
        for caller, times in entry["calls"].items():
            counted[caller] += times * len(launches)
    assert found["launches"] == dict(counted)
    assert found["launches_per_decode"] == counted["greedy_b1"]


def test_blocks_and_shared_memory_stay_within_the_target() -> None:
    limits = load_target("webgpu").limits
    for attention in ("flash", "materialized"):
        for entry in table("webgpu", attention)["functions"]:
            x, y, z = entry["block"]
            assert 1 <= x * y * z <= (limits.threads_per_block or 0), entry["name"]
            assert 0 <= entry["shared_memory_bytes"] <= (limits.shared_memory_bytes or 0), entry["name"]
    matmul = row(table("webgpu"), "prefill, score: attn.c_attn + bias")
    assert matmul["rule"] == "webgpu-matmul" and matmul["shared_memory_bytes"] > 0


def test_a_cpu_has_no_grid() -> None:
    found = table("cpu")
    assert all(r["grid"] is None and r["block"] is None for r in found["functions"])
    assert found["launches_per_decode"] == sum(r["calls"].get("greedy_b1", 0) for r in found["functions"])


def test_roles_name_layers() -> None:
    roles = [r["role"] for r in table("webgpu")["functions"]]
    assert "decode, greedy, propose: ln_2, mlp.c_fc + bias + gelu_new" in roles  # LayerNorm in the product's prologue
    assert {"decode, greedy: ln_f, logits (wte)", "propose: ln_f, logits (wte)"} <= set(roles)
    assert "prefill, score: mlp.c_fc + bias + gelu_new" in roles
    assert not any(re.search(r"_b\d", role.partition(":")[0]) for role in roles)


def test_the_manifest_carries_the_table(tiny_artifact: Path) -> None:
    from gpt2_tvm.artifact import open_artifact

    manifest = open_artifact(tiny_artifact).manifest
    assert manifest["launches_per_decode"] == manifest["launches"]["greedy_b1"] > 0
    assert manifest["compute_dtype"] == "float32"


# Expressions --------------------------------------------------------------------------------------------------------


def test_expressions_say_what_tir_computes() -> None:
    b, n = tirx.Var("b", "int64"), tirx.Var("n", "int64")
    cases = [
        (tirx.Cast("int32", tirx.floordiv(b * n + 31, 32)) * 4, lambda b, n: (b * n + 31) // 32 * 4),
        (n - (b - 1), lambda b, n: n - (b - 1)),
        (n - b - 1, lambda b, n: n - b - 1),
        ((n + b) * (n - b), lambda b, n: (n + b) * (n - b)),
        (tirx.floordiv(n, tirx.floordiv(b + 3, 2)), lambda b, n: n // ((b + 3) // 2)),
        (tirx.floormod(n * 3, b + 1) * 2, lambda b, n: n * 3 % (b + 1) * 2),
        (n * tirx.floordiv(b, 2), lambda b, n: n * (b // 2)),
        (tirx.max(b, tirx.min(n, 7)) - 9, lambda b, n: max(b, min(n, 7)) - 9),
    ]
    for expr, expected in cases:
        text = to_text(expr, lambda v: v.name if isinstance(v, tirx.Var) else None)
        for sizes in ({"b": 1, "n": 1}, {"b": 3, "n": 17}, {"b": 8, "n": 5}):
            assert evaluate(text, sizes) == expected(**sizes), text


def test_expressions_fold_numbers() -> None:
    assert combine("*", 3, 4) == 12 and combine("min", 3, 4) == 3
    assert combine("+", "n", 0) == "n" and combine("*", 1, "n") == "n" and combine("*", 0, "n") == 0


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os')",
        "b.real",
        "b[0]",
        "abs(b)",
        "n",
        "b ** 9",
        "b if b else 1",
        "lambda: b",
        "'b'",
        "b +",
        "1 // 0",
        "min(b)",
        "min(b, key=b)",
        "True",
    ],
)
def test_expressions_outside_the_grammar_are_refused(text: str) -> None:
    with pytest.raises(ValueError):
        evaluate(text, {"b": 2})


@pytest.mark.heavy
def test_the_table_of_gpt2_takes_little_time() -> None:
    import time

    from gpt2_tvm.build import lower_plan
    from gpt2_tvm.config import PRESETS

    plan = make_plan(PRESETS["gpt2"], load_target("webgpu"))
    with plan.target.tvm_target():
        low, _ = lower_plan(plan)
    start = time.process_time()  # of this process alone: other work on the machine does not count
    found = function_table(low, plan)
    assert time.process_time() - start < 1.5
    assert found["launches_per_decode"] < 130
