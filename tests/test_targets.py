"""Targets as data: every file suits TVM, mistakes are one line, and this machine is read right."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import targets
from gpt2_tvm.errors import UserError
from targets import list_targets, load_target
from targets.load import FOLDER, NAMES


@pytest.fixture
def changed(tmp_path: Path):
    """A copy of a target's file with one text replaced by another, or with lines appended at the top."""

    def change(name: str, old: str, new: str) -> Path:
        text = (FOLDER / f"{name}.toml").read_text()
        assert old in text
        path = tmp_path / "mine.toml"
        path.write_text(text.replace(old, new, 1))
        return path

    return change


# --- the files ---


def test_names_are_the_files() -> None:
    assert {path.stem for path in FOLDER.glob("*.toml")} == set(NAMES)
    assert [target.name for target in list_targets()] == list(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_tvm_takes_every_target(name: str) -> None:
    target = load_target(name)
    built = target.tvm_target()
    for key, value in target.tvm.items():
        got = built.kind.name if key == "kind" else built.attrs[key]
        assert (list(got) if isinstance(value, list) else got) == value
    triple = target.host_triple()
    assert triple is None or built.host.attrs["mtriple"] == triple


@pytest.mark.parametrize("name", NAMES)
def test_manifest_form_is_json(name: str) -> None:
    target = load_target(name)
    written = json.loads(json.dumps(target.to_json()))
    assert written["name"] == name and written["limits"]["vector_bits"] == target.limits.vector_bits
    assert "path" not in written and str(FOLDER) not in json.dumps(written)


GPU_FIRST = {"norm-gemv", "quantised-gemv", "webgpu-gemv"}  # each takes quantised products of few rows


def test_rules_by_kind() -> None:
    for target in list_targets():
        first, last = ({"cpu-matmul"}, "cpu-reduction") if target.kind == "cpu" else (GPU_FIRST, "fallback")
        assert target.rules[0] in first and target.rules[-1] == last
        # a quantised product of few rows is never left to a rule for many
        if target.kind != "cpu":
            many = next(i for i, rule in enumerate(target.rules) if rule.endswith("matmul"))
            assert target.rules.index("quantised-gemv") < many


def test_register_tiles_fit_the_registers() -> None:
    """Accumulators, one row of weights and one activation stay in registers through the inner loop."""
    for target in list_targets():
        if target.kind != "cpu":
            assert target.layout == targets.Layout("rows")
            continue
        lanes = target.limits.vector_bits // 32
        assert target.layout.rows % lanes == 0
        vectors = target.layout.rows // lanes
        assert vectors * (target.layout.tile_rows + 1) + 1 <= target.limits.vector_registers


def test_peak_rates_name_their_source() -> None:
    named = [target for target in list_targets() if target.kind in ("cuda", "metal", "rocm") and not target.generic]
    assert all(target.peak and target.peak.bandwidth_gb_s and len(target.peak.source) > 20 for target in named)
    assert all(target.peak is None for target in list_targets() if target not in named)


def test_h200_is_not_sm_90a() -> None:
    assert load_target("h200").archs == load_target("h100").archs == ("sm_90",)


# --- what a user may get wrong ---


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("rtx4090", "rtx-4090"),
        ("x86-64", "x86-64-v3"),
        ("gfx1101", "gfx1100"),
        ("../cuda", "cannot read"),
        ("nonsense!", "--list-targets"),
    ],
)
def test_unknown_name(name: str, wanted: str) -> None:
    with pytest.raises(UserError) as error:
        load_target(name)
    assert wanted in str(error.value) and "\n" not in str(error.value)


def test_names_in_any_case_and_paths(changed) -> None:
    assert load_target("RTX-4090") == load_target("rtx-4090")
    mine = changed("rtx-4090", 'name = "rtx-4090"', 'name = "my-gpu"')
    assert load_target(mine).name == load_target(str(mine)).name == "my-gpu"
    assert load_target(mine).peak == load_target("rtx-4090").peak


MISTAKES = [
    ("h200", 'kind = "cuda"\ndesc', "desc", "kind is missing"),
    ("h200", 'kind = "cuda"\ndesc', 'kind = "vulkan"\ndesc', "kind must be one of cpu, cuda"),
    ("h200", 'name = "h200"', 'name = "../h200"', "name must be of a-z"),
    ("h200", "description", "descripton", "description is missing"),
    ("h200", 'export = "so"', 'export = "exe"', "export must be one of so, tar"),
    ("h200", 'rules = ["', 'rules = [7, "', "rules must be a list of strings"),
    ("h200", "[peak]", "colour = 3\n[peak]", "[layout] colour is not a key here"),
    (
        "h200",
        "threads_per_block = 1024\nshared",
        "thread_per_block = 1024\nshared",
        "[limits] threads_per_block is missing",
    ),
    (
        "h200",
        "[limits]\nthreads_per_block = 1024",
        "[limits]\nthreads_per_block = true",
        "threads_per_block must be a whole number, not True",
    ),
    (
        "h200",
        "[limits]\nthreads_per_block = 1024",
        "[limits]\nthreads_per_block = 0",
        "threads_per_block must be at least 1",
    ),
    (
        "h200",
        "[limits]\nthreads_per_block = 1024",
        "[limits]\nthreads_per_block = 512",
        "[tvm] max_threads_per_block is 1024 and [limits]",
    ),
    (
        "h200",
        "bandwidth_gb_s = 4800",
        'bandwidth_gb_s = "4.8 TB/s"',
        "[peak] bandwidth_gb_s must be a number",
    ),
    (
        "h200",
        "bandwidth_gb_s = 4800",
        "bandwidth = 4800",
        "[peak] bandwidth is not a key here; did you mean bandwidth_gb_s?",
    ),
    ("h200", "bandwidth_gb_s = 4800", "bandwidth_gb_s = nan", "bandwidth_gb_s must be above 0"),
    ("h200", 'arch = "sm_90"', 'arch = "90"', 'an architecture must look like "sm_80"'),
    ("h200", 'arch = "sm_90"', "", "[tvm] arch is missing"),
    ("h200", "[tvm]", 'archs = ["sm_80"]\n[tvm]', "archs must hold [tvm] arch, sm_90"),
    (
        "h200",
        "registers_per_block = 65536",
        "registers_per_block = 65.5",
        "[tvm] registers_per_block must be",
    ),
    ("h200", '[tvm]\nkind = "cuda"', '[tvm]\nkind = "llvm"', '[tvm] kind must be "cuda"'),
    ("h200", 'weight = "rows"', 'weight = "packed"\nrows = 8\ntile_rows = 8', "CPU kernels"),
    ("h200", "[tvm]", "native = true\n[tvm]", "native is for kind cpu"),
    ("h200", "[tvm]", "[tvm", "not valid TOML"),
    ("x86-64-v3", "tile_rows = 6", "", "[layout] tile_rows is missing"),
    ("x86-64-v3", "[limits]", '[host]\nkind = "llvm"\n[limits]', "its own host"),
    ("x86-64-v3", "vector_bits = 256", "", "[limits] vector_bits is missing"),
]


@pytest.mark.parametrize(("name", "old", "new", "message"), MISTAKES)
def test_mistakes_are_one_line_that_names_file_and_key(changed, name: str, old: str, new: str, message: str) -> None:
    path = changed(name, old, new)
    with pytest.raises(UserError) as error:
        load_target(path)
    assert message in str(error.value) and str(path) in str(error.value) and "\n" not in str(error.value)


def test_unreadable_files(tmp_path: Path) -> None:
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path / "absent.toml", tmp_path / "binary.toml", tmp_path):
        with pytest.raises(UserError, match=path.name):
            load_target(f"{path}/" if path == tmp_path else path)


def test_an_attribute_that_tvm_does_not_know(changed) -> None:
    target = load_target(changed("h200", "thread_warp_size = 32", "thread_warp_sise = 32"))
    with pytest.raises(UserError, match=r"mine.toml: TVM does not accept .*thread_warp_sise") as error:
        target.tvm_target()
    assert "\n" not in str(error.value)
