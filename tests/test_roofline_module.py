"""The module's count against the closed form: equal in every part, or different by what the reasons say, exactly."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest

from gpt2_tvm.build import Plan, make_plan, weight_layout
from gpt2_tvm.config import GPT2Config
from gpt2_tvm.quantization import SCHEMES
from gpt2_tvm.theory.closed import PARTS, Model, Work, total
from gpt2_tvm.theory.counted import PHASES, Call, Counted, count_module
from gpt2_tvm.theory.dtypes import Dtypes
from gpt2_tvm.theory.explain import Layout, module_reasons, textbook_reasons, unexplained
from gpt2_tvm.theory.form import S
from gpt2_tvm.theory.predict import Case, forms_of
from targets import load_target

# A narrow MLP, an untied head on odd widths, a small vocabulary, every activation, and a cache long enough to be split.
CONFIGS = {
    "narrow-mlp-relu": GPT2Config(
        vocab_size=97, n_positions=48, n_embd=60, n_layer=2, n_head=3, n_inner=100, activation_function="relu"
    ),
    "untied-one-head-gelu": GPT2Config(
        vocab_size=17,
        n_positions=40,
        n_embd=37,
        n_layer=3,
        n_head=1,
        n_inner=53,
        activation_function="gelu",
        tie_word_embeddings=False,
    ),
    "silu": GPT2Config(vocab_size=257, n_positions=64, n_embd=96, n_layer=2, n_head=4, activation_function="silu"),
    "long-tanh": GPT2Config(vocab_size=50, n_positions=400, n_embd=64, n_layer=1, n_head=4, activation_function="tanh"),
    "plain": GPT2Config(vocab_size=97, n_positions=48, n_embd=32, n_layer=2, n_head=2),
}
BATCHES = (1, 5)
LENGTHS = (1, 7, 33)


@cache
def counted(name: str, target: str, scheme: str, attention: str) -> tuple[Plan, Counted]:
    plan = make_plan(CONFIGS[name], load_target(target), scheme, "full", attention, BATCHES, None, ())
    return plan, count_module(plan)


def model_of(plan: Plan) -> Model:
    compute = plan.scheme.compute_dtype
    dtypes = Dtypes(plan.scheme.weight_dtype, compute, compute, "float32")
    fast, tables = plan.target.kind == "cpu", plan.scheme.float_tables
    return Model(plan.config, dtypes, plan.attention, fast_math=fast, float_tables=tables)


def compare(name: str, target: str, scheme: str, attention: str) -> int:
    """Every part of every pass; returns how many differ, each as explained."""
    plan, module = counted(name, target, scheme, attention)
    model, panel, different = model_of(plan), int(weight_layout(plan.target).panel_rows), 0
    for case in [Case(phase, b, n) for phase in PHASES for b in BATCHES for n in LENGTHS]:
        b, n, p = case.sizes
        count = module.parts(case.phase, b, n, p)
        reasons = module_reasons(model, Layout(panel, module.splits[b]), case.phase, b, n, p)
        for part, form in forms_of(model, case).items():
            fixed = Work(form.flops.replace(s=plan.max_seq_len), form.bytes.replace(s=plan.max_seq_len))
            left = unexplained(fixed, count[part], reasons[part], b, n, p)
            assert (left.flops, left.bytes) == (0, 0), f"{part} of {case}: {count[part]}, {reasons[part]}"
            same = count[part] == (fixed.flops.at(b, n, p), fixed.bytes.at(b, n, p))
            assert same == (not reasons[part]), f"{part} of {case}: reasons without a difference, or the other way"
            different += not same
    return different


@pytest.mark.parametrize("name", CONFIGS)
def test_the_module_of_a_gpu_is_the_closed_form_exactly(name: str) -> None:
    different = compare(name, "t4", "q0f16", "flash")
    # the only difference: attention over a long cache in pieces, in each decode
    assert different == (len(BATCHES) * len(LENGTHS) if name == "long-tanh" else 0)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_module_of_a_cpu_is_the_closed_form_and_its_padding(name: str) -> None:
    compare(name, "x86-64-v3", "q0f32", "flash")


@pytest.mark.parametrize("target", ["t4", "x86-64-v3"])
@pytest.mark.parametrize("name", ["narrow-mlp-relu", "long-tanh"])
def test_materialized_attention_is_its_closed_form(name: str, target: str) -> None:
    compare(name, target, "q0f16", "materialized")


@pytest.mark.parametrize("target", ["webgpu", "m1"])
def test_other_kinds_of_gpu(target: str) -> None:
    assert compare("long-tanh", target, "q0f32", "flash") == len(BATCHES) * len(LENGTHS)


@pytest.mark.parametrize("scheme", [s for s in ("q16f32", "q8f32") if s in SCHEMES])
def test_weights_stored_smaller(scheme: str) -> None:
    compare("untied-one-head-gelu", "x86-64-v3", scheme, "flash")


@pytest.mark.parametrize("options", ["embedding", "head", "embedding-float-head"])
@pytest.mark.parametrize(
    ("name", "target", "scheme"), [("plain", "x86-64-v3", "q8f32"), ("untied-one-head-gelu", "x86-64-v3", "q8f32")]
)
def test_tables_that_stay_floats(name: str, target: str, scheme: str, options: str) -> None:
    compare(name, target, f"{scheme}-float-{options}", "flash")


def test_a_wrong_table_shows() -> None:
    """Each option moves the bytes of its own part, in a tied model those of both."""
    for name, option, moved in (
        ("untied-one-head-gelu", "embedding", {"embedding"}),
        ("untied-one-head-gelu", "head", {"head"}),
        ("plain", "head", {"embedding", "head"}),
    ):
        plan, _ = counted(name, "x86-64-v3", f"q8f32-float-{option}", "flash")
        right = model_of(plan)
        wrong = replace(right, float_tables=()).parts()
        assert {part for part, work in right.parts().items() if work.bytes != wrong[part].bytes} == moved


def test_a_wrong_closed_form_shows() -> None:
    """Another width, head, dtype or activation does not pass the comparison."""
    plan, module = counted("plain", "t4", "q0f16", "flash")
    b, n, p = 5, 7, 0
    count = {part: module.parts("naive", b, n, p)[part] for part in PARTS}
    right = model_of(plan)
    wrong = {
        "MLP": replace(right, config=replace(plan.config, n_inner=127)),
        "head": replace(right, config=replace(plan.config, vocab_size=98)),
        "MHA": replace(right, attention="textbook"),
        "embedding": replace(right, dtypes=replace(right.dtypes, weights="float32")),
    }
    for part, model in wrong.items():
        left = unexplained(model.parts()[part], count[part], [], b, n, p)
        assert left.flops or left.bytes, part
        same = unexplained(right.parts()[part], count[part], [], b, n, p)
        assert (same.flops, same.bytes) == (0, 0)
    fast = replace(right, fast_math=True).parts()["MLP"]
    assert unexplained(fast, count["MLP"], [], b, n, p).flops != 0


def test_a_layer_norm_shared_by_parts_counts_in_each() -> None:
    _, module = counted("plain", "t4", "q0f16", "flash")
    norms = [(c.part, c.label, c.times) for c in module.calls("decode", 5) if c.label.startswith("ln_")]
    assert norms == [("MHA", "ln_1", 2), ("MLP", "ln_2", 2), ("head", "ln_f", 1)]
    assert len({c.name for c in module.calls("decode", 5) if c.label.startswith("ln_")}) == 1
    assert {c.part for phase in PHASES for c in module.calls(phase, 1)} == set(PARTS)


def test_scores_in_memory_are_what_flash_attention_saves() -> None:
    """At a capacity of N, ours materialized has N^2 scores in memory and computes all pairs."""
    plan, _ = counted("long-tanh", "t4", "q0f16", "flash")
    flash = model_of(plan)
    plain = replace(flash, attention="materialized")
    b, n, heads, layers = 2, 400, plan.config.n_head, plan.config.n_layer
    works = [total(m.parts()) for m in (flash, plain)]
    pairs, scores = b * heads * layers * n * n, b * heads * layers * n * n * (2 * 4 + 2 * 2)
    extra = works[1].bytes.at(b, n, 0, n) - works[0].bytes.at(b, n, 0, n)
    assert 1.0 <= extra / scores < 1.3  # and copies of keys, values and heads
    assert 0.5 < works[0].flops.at(b, n) / works[1].flops.at(b, n, 0, n) < 1
    assert works[1].bytes.replace(s=S).coefficient(b=1, n=1, s=1) * n * n * b == scores
    assert works[1].flops.coefficient(b=1, n=1, s=1) * n * n * b == (4 * 16 + 6) * pairs


@pytest.mark.parametrize("dtypes", [Dtypes(), Dtypes("int8", "float16", "float16", "float32")])
def test_the_textbook_differs_by_its_reasons(dtypes: Dtypes) -> None:
    ours = Model(CONFIGS["narrow-mlp-relu"], dtypes)
    textbook = replace(ours, attention="textbook", cached=False)
    for b, n in ((1, 1), (1, 33), (5, 7)):
        whole = total(ours.parts())
        values = whole.flops.at(b, n), whole.bytes.at(b, n)
        left = unexplained(total(textbook.parts()), values, textbook_reasons(textbook, ours, b, n), b, n, 0)
        assert (left.flops, left.bytes) == (0, 0)
    assert textbook_reasons(textbook, ours, 5, 7)[0].flops < 0 < textbook_reasons(textbook, ours, 5, 7)[4].bytes


def test_a_kernel_without_a_form_says_so() -> None:
    with pytest.raises(RuntimeError, match=r"the work of new_kernel has no form"):
        Call("new_kernel", "new", "MHA", 1, None, None).work(1, 1, 0)
