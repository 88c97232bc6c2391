"""The parts of `tuning.report` that need no compiled model: comparison, glosses, cutting of sources, errors."""

from __future__ import annotations

from typing import Any

import pytest
from tvm import s_tir, te

from gpt2_tvm.errors import UserError
from tuning.report import difference, facts, glosses, sources


def row_sum() -> Any:
    x = te.placeholder((4, 96), "float32", "x")
    k = te.reduce_axis((0, 96), "k")
    return te.create_prim_func([x, te.compute((4,), lambda i: te.sum(x[i, k], k), name="reduced")])


def test_a_line_that_only_moved_is_not_a_changed_line() -> None:
    rows = difference.side_by_side("a\nb\nc\nd", "a\nx\n    b\ny")
    assert [(row.tag, row.left, row.right) for row in rows] == [
        ("same", "a", "a"),
        ("added", None, "x"),
        ("moved", "b", "    b"),
        ("changed", "c", "y"),
        ("removed", "d", None),
    ]
    assert difference.counts(rows) == {"same": 1, "moved": 1, "removed": 2, "added": 2}
    assert list(difference.unified("a\nb\nc\nd", "a\nx\n    b\ny")) == ["  a", "+ x", "~     b", "- c", "- d", "+ y"]


def test_every_primitive_that_a_schedule_can_use_has_a_gloss() -> None:
    # TVM registers an instruction kind for each; these are the names that traces print
    not_steps = {"AnnotationValueT", "PrimAnnotationValueT", "fork_seed", "func_working_on", "copy", "merge", "get"}
    not_steps |= {"get_sref", "id_", "is_", "mod", "same_as", "seed", "show", "state", "trace", "can_decompose_padding"}
    primitives = {name for name in dir(s_tir.Schedule) if not name.startswith("_")} - not_steps
    assert set(glosses.GLOSSES) == primitives
    assert all(10 < len(text) < 120 and not text.endswith(".") for text in glosses.GLOSSES.values())
    assert set(glosses.LOOKUPS) <= primitives


def test_steps_are_those_of_the_trace() -> None:
    schedule = s_tir.Schedule(row_sum())
    block = schedule.get_sblock("reduced")
    _, k = schedule.get_loops(block)
    schedule.split(k, [None, 32])
    steps = glosses.steps_of(schedule)
    assert [(step.primitive, step.looks_up) for step in steps] == [
        ("get_sblock", True),
        ("get_loops", True),
        ("split", False),
    ]
    assert [(name, count) for name, count, _ in glosses.used(steps)] == [("split", 1)]


def test_generated_code_is_cut_where_functions_end() -> None:
    text = """
extern "C" __global__ void __launch_bounds__(64) f_kernel(float* a);
static int helper(int x) { return x; }
extern "C" __global__ void __launch_bounds__(64) f_kernel(float* a) {
  if (a) {
    a[0] = 1;
  }
}

extern "C" __global__ void f_kernel_1(float* a) {
}
"""
    kernels = sources._cuda(text)
    assert [kernel.name for kernel in kernels] == ["f_kernel", "f_kernel_1"]
    assert kernels[0].text.startswith("extern") and kernels[0].text.endswith("\n}") and kernels[0].lines == 5


def test_an_unknown_function_is_one_line_with_close_names() -> None:
    names = ["fused_NT_matmul_add", "layer_norm", "decode_attention"]
    with pytest.raises(UserError, match=r"close to it: fused_NT_matmul_add$"):
        facts.choose(names, "nt_matmul")
    with pytest.raises(UserError, match="close to it: layer_norm"):
        facts.choose(names, "layer_nrom")
    with pytest.raises(UserError, match=r"there are fused_NT_matmul_add, layer_norm, decode_attention$"):
        facts.choose(names, "zzz")
    assert facts.choose(names, "layer_norm") == ["layer_norm"] and facts.choose(names, None) == names


def test_the_device_peak_bounds_a_function() -> None:
    peak = {"bandwidth_gb_s": 1000.0, "tflops": 10.0}
    assert facts._bound(peak, 1_000_000, 1_000_000) == (1.0, True)
    assert facts._bound(peak, 1_000, 10_000_000) == (1.0, False)
    assert facts._bound(None, 1, 1) == (None, None)
