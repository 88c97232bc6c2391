"""From a target's name or file to a `DeviceTarget`.

Keys of a file: `name`, `kind`, `description`, `export`, `rules`, and where they apply `archs` (cuda),
`devices`, `generic`, `native` and `requires` (cpu); tables `[tvm]`, `[host]`, `[limits]`, `[layout]`,
`[peak]`, `[cores]`. `targets/device.py` says what each means.
"""

from __future__ import annotations

import difflib
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from gpt2_tvm.errors import UserError
from targets import detect, reader
from targets.device import KINDS, Cores, DeviceTarget, Layout, Limits, Peak

FOLDER = Path(__file__).parent
# The order of the table that --list-targets prints: generic first, then old to new.
NAMES = (
    *("cpu", "x86-64-v3", "x86-64-v4", "apple-m", "arm64"),
    *("cuda", "t4", "rtx-3090", "rtx-4090", "a100", "h100", "h200"),
    *("metal", "m1", "m2-ultra"),
    "webgpu",
    *("rocm", "gfx90a", "gfx942", "gfx1100"),
)
# TVM's attributes that say the same as a limit. They have different readers, and must agree.
_SAME = {
    "max_threads_per_block": "threads_per_block",
    "max_num_threads": "threads_per_block",
    "max_shared_memory_per_block": "shared_memory_bytes",
}
_TVM_KINDS = {"cpu": "llvm"}


def load_target(name_or_path: str | os.PathLike[str]) -> DeviceTarget:
    """The target of this name, or in this file.

    Args:
        name_or_path: a name as in `NAMES`, in any case, or a path (it ends in .toml or holds a slash).

    Raises:
        UserError: no such target or file; not TOML; a key missing, unknown, or of a wrong type.
    """
    text = os.fspath(name_or_path)
    if text.endswith(".toml") or os.sep in text:
        return _parse(Path(text))
    path = FOLDER / f"{text.lower()}.toml"
    if not re.fullmatch(r"[\w.-]+", text) or not path.is_file():
        close = difflib.get_close_matches(text.lower(), _names(), n=3, cutoff=0.5)
        guess = f"did you mean {' or '.join(close)}? " if close else ""
        raise UserError(
            f"no target is called {text!r}; {guess}--list-targets lists all, and a path to a .toml file works too"
        )
    return _parse(path)


def list_targets() -> list[DeviceTarget]:
    """All targets of this folder, in the order of `NAMES`, then any others by name."""
    return [load_target(name) for name in _names()]


def _names() -> list[str]:
    there = {path.stem for path in FOLDER.glob("*.toml")}
    return [name for name in NAMES if name in there] + sorted(there - set(NAMES))


def _parse(path: Path) -> DeviceTarget:
    top = reader.read(path)
    name = top.text("name")
    if not re.fullmatch(r"[a-z0-9][a-z0-9._-]*", name):
        top.fail(f"name must be of a-z, 0-9, dot, dash and underscore (folders are named after it), not {name!r}")
    kind = top.one_of("kind", KINDS)
    native = top.flag("native")
    if native and kind != "cpu":
        top.fail(f"native is for kind cpu, not {kind}")
    tvm = _tvm(top, kind)
    limits, layout = _limits(top, kind), _layout(top, kind)
    requires = top.texts("requires", ())
    if native and (
        family := detect.cpu_family([load_target(known) for known in ("x86-64-v4", "x86-64-v3", "apple-m", "arm64")])
    ):
        limits, layout = family.limits, family.layout
    if native:
        limits = replace(limits, **detect.caches_kib())
    target = DeviceTarget(
        name=name,
        kind=kind,
        description=top.text("description"),
        tvm=tvm,
        host=_host(top, kind),
        export=top.one_of("export", ("so", "tar")),
        rules=top.texts("rules"),
        limits=limits,
        layout=layout,
        peak=_peak(top),
        archs=_archs(top, kind, tvm),
        devices=top.texts("devices", ()),
        generic=top.flag("generic"),
        native=native,
        requires=tuple(sorted(detect.host_features())) if native else requires,
        path=path,
        cores=_cores(top, kind),
    )
    top.finish()
    for attribute, limit in _SAME.items():
        if attribute in tvm and tvm[attribute] != getattr(limits, limit):
            top.fail(
                f"[tvm] {attribute} is {tvm[attribute]} and [limits] {limit} is {getattr(limits, limit)}: "
                "they must agree"
            )
    return target


def _tvm(top: reader.Table, kind: str) -> dict[str, Any]:
    table = top.table("tvm", required=True)
    assert table is not None
    wanted = _TVM_KINDS.get(kind, kind)
    if table.text("kind") != wanted:
        table.fail(f'kind must be "{wanted}" where the target\'s kind is {kind}')
    return {"kind": wanted, **_attributes(table)}


def _host(top: reader.Table, kind: str) -> dict[str, Any] | None:
    table = top.table("host")
    if table is None:
        return None
    if kind == "cpu":
        table.fail("a cpu target is its own host: leave [host] out")
    return {"kind": table.text("kind"), **_attributes(table)}


def _attributes(table: reader.Table) -> dict[str, Any]:
    """The rest of a table as attributes of a TVM target; whether TVM knows them, it says itself."""
    values = table.rest()
    for key, value in values.items():
        plain = isinstance(value, str | int) or (
            isinstance(value, list) and all(isinstance(item, str) for item in value)
        )
        if not plain:
            table.fail(f"{key} must be a string, a whole number, true, false or a list of strings, not {value!r}")
    return values


def _limits(top: reader.Table, kind: str) -> Limits:
    table = top.table("limits", required=True)
    assert table is not None
    if kind == "cpu":
        sizes = ("vector_bits", "vector_registers", "l1_kib", "l2_kib", "prefetch_bytes")
        limits = Limits(**{size: table.count(size) for size in sizes})
    else:
        limits = Limits(
            threads_per_block=table.count("threads_per_block"),
            shared_memory_bytes=table.count("shared_memory_bytes"),
            storage_binding_bytes=table.count("storage_binding_bytes", None),
        )
    table.finish()
    return limits


def _layout(top: reader.Table, kind: str) -> Layout:
    table = top.table("layout", required=True)
    assert table is not None
    weight = table.one_of("weight", ("rows", "packed"))
    if weight == "packed" and kind != "cpu":
        table.fail(f'weight "packed" is what the CPU kernels read; for {kind} it must be "rows"')
    layout = Layout(weight, table.count("rows"), table.count("tile_rows")) if weight == "packed" else Layout(weight)
    table.finish()
    return layout


def _peak(top: reader.Table) -> Peak | None:
    table = top.table("peak")
    if table is None:
        return None
    peak = Peak(
        table.rate("bandwidth_gb_s"),
        table.rate("fp32_tflops"),
        table.rate("fp16_tflops"),
        table.text("source"),
    )
    table.finish()
    return peak


def _cores(top: reader.Table, kind: str) -> Cores | None:
    table = top.table("cores")
    if table is None:
        return None
    if kind == "cpu":
        table.fail("is for GPUs: leave it out")
    clock = table.rate("clock_ghz")
    if clock is None:
        table.fail("clock_ghz is missing: it must be a number")
    sizes = ("count", "threads", "registers", "shared_memory_bytes")
    cores = Cores(**{size: table.count(size) for size in sizes}, clock_ghz=clock)
    table.finish()
    return cores


def _archs(top: reader.Table, kind: str, tvm: dict[str, Any]) -> tuple[str, ...]:
    if kind != "cuda":
        return ()
    if not isinstance(arch := tvm.get("arch"), str):
        top.fail('[tvm] arch is missing: it must be a string such as "sm_80"')
    archs = top.texts("archs", [arch])
    for each in (arch, *archs):
        if not re.fullmatch(r"sm_\d+[a-z]?", each):
            top.fail(f'an architecture must look like "sm_80", not {each!r}')
    if arch not in archs:
        top.fail(f"archs must hold [tvm] arch, {arch}, by which the kernels are scheduled")
    return archs
