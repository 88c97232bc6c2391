"""The parts of `tuning.report` that need no compiled model: comparison, glosses, cutting of sources, errors."""

from __future__ import annotations

import html
import re
from types import SimpleNamespace
from typing import Any

import pytest
from tvm import s_tir, te

from gpt2_tvm.errors import UserError
from tuning.report import difference, facts, glosses, numbers, sources, tile
from tuning.report.drawing import draw_tile


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


ROLES = {
    "fused_NT_matmul_add": "decode, greedy: attn.c_attn + bias",
    "fused_NT_matmul1_add": "prefill, score: attn.c_attn + bias",
    "layer_norm": "prefill, score: layer_norm (ln_1)",
    "layer_norm2": "decode: layer_norm (ln_1)",
    "decode_attention": "decode: decode_attention",
}


def test_a_function_is_named_by_itself_or_by_words_that_fit_no_other() -> None:
    assert facts.choose(ROLES, None) == list(ROLES)
    assert facts.choose(ROLES, "layer_norm") == ["layer_norm"]  # and not the two that have it in their names
    assert facts.choose(ROLES, "greedy C_ATTN") == ["fused_NT_matmul_add"]
    assert facts.choose(ROLES, "norm2") == ["layer_norm2"]


def test_an_unknown_function_is_one_line_with_close_names() -> None:
    both = r"fits 2 functions; close to it: fused_NT_matmul_add \(decode, .* fused_NT_matmul1_add \(prefill, .*bias\)$"
    with pytest.raises(UserError, match=both):
        facts.choose(ROLES, "nt_matmul")
    with pytest.raises(UserError, match="no such function; close to it: layer_norm"):
        facts.choose(ROLES, "layer_nrom")
    with pytest.raises(UserError, match=r"there are fused_NT_matmul_add, .*, decode_attention$"):
        facts.choose(ROLES, "zzz")
    with pytest.raises(UserError, match="no such function"):
        facts.choose(ROLES, " ")


def test_the_device_peak_bounds_a_function() -> None:
    peak = {"bandwidth_gb_s": 1000.0, "tflops": 10.0}
    assert facts._bound(peak, 1_000_000, 1_000_000) == (1.0, True)
    assert facts._bound(peak, 1_000, 10_000_000) == (1.0, False)
    assert facts._bound(None, 1, 1) == (None, None)


def test_resources_say_what_they_were_compiled_for_and_why_shared_memory_differs() -> None:
    kernel = {"kernel": "f_kernel", "arch": "sm_80", "shared_bytes": 836, "registers": 32}

    def table(asked: int, kind: str) -> dict[str, Any]:
        version = facts.Version("gemv", "", (), resources=(kernel,))
        function: Any = SimpleNamespace(after=version, baseline=None, shared_memory_bytes=asked)
        return numbers.resource_table(function, kind)

    assert table(520, "cuda")["title"] == "as compiled for sm_80"
    assert "sums across threads" in table(520, "cuda")["note"] and table(836, "cuda")["note"] == ""
    assert dict(table(520, "cuda")["rows"])["shared memory as compiled, bytes a block"] == ["836"]
    assert table(520, "metal")["title"] == "by the shader's source"


def a_tile(steps: int) -> tile.Tile:
    return tile.Tile(
        "w", "float16", 50257, 256 * steps, 8, 32, 4, 8, 4, steps, 1571, "threadIdx.y", "threadIdx.x", (), ()
    )


@pytest.mark.parametrize("steps", [1, 3])
def test_what_stands_above_each_picture_of_a_tile_is_about_it(steps: int) -> None:
    svg = html.unescape(draw_tile(a_tile(steps)))
    order = re.findall(r'<text[^>]*class="head"[^>]*>([^<]*)|<rect class="(matrix|threads|elements)"', svg)
    captions, pictures = order[::2], order[1::2]
    assert [what for _, what in pictures] == ["matrix", "threads", "elements"]
    assert [head.split(":")[0] for head, _ in captions] == [
        "the matrix",
        "a block's threads",
        "a thread's part of a step",
    ]
    assert "…" not in svg and svg.count("R →") == svg.count("S↓") == 3
    blue = "light blue: a block's 32 rows; 1571 blocks in all"
    assert (blue in svg) == (steps > 1)  # with one step the green covers the blue
