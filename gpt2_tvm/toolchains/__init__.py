"""From a scheduled module to the files of an artifact, one file a kind of target.

The flow, the same for every kind::

    from gpt2_tvm import toolchains

    toolchains.prepare(target)                       # one line of error if a compiler part is missing
    with toolchains.compiling(target) as tvm_target:  # hooks in, tvm_target current, hooks out
        executable = toolchains.build(module, tvm_target)
    names = toolchains.export(executable, target, folder)

Each file of this package offers the same four names, which the functions below dispatch to:
``missing(target)``, ``prepare(target)``, ``compiling(target)`` and ``export(executable, target, folder)``.
Nothing here imports TVM before it is needed, so that the command lines can ask what this machine can do in
milliseconds. TVM may be imported before or after `prepare`: both orders were tried and give real device code.
"""

from __future__ import annotations

import importlib
from contextlib import AbstractContextManager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from targets import DeviceTarget

KINDS = ("cpu", "cuda", "metal", "webgpu", "rocm")


def of(kind: str) -> ModuleType:
    """The module of this package that builds for `kind`, one of `KINDS`."""
    if kind not in KINDS:
        raise ValueError(f"no toolchain for {kind!r}; there are {', '.join(KINDS)}")
    return importlib.import_module(f"gpt2_tvm.toolchains.{kind}")


def missing(target: DeviceTarget) -> str | None:
    """What this machine lacks to compile for `target`, as "what: how to get it", or None. Needs no TVM."""
    return of(target.kind).missing(target)


def prepare(target: DeviceTarget) -> None:
    """Make this process able to compile for `target`. Cheap when called again.

    Raises:
        UserError: a compiler part is missing; the one line says how to get it.
    """
    of(target.kind).prepare(target)


def compiling(target: DeviceTarget) -> AbstractContextManager[Any]:
    """Inside this context `build` builds for `target`; it yields the `tvm.target.Target` to give it.

    What the context changes (callbacks registered with TVM, the current target) is put back at its end.
    Contexts of several threads run one after another, because TVM's callbacks are global to the process.
    """
    return of(target.kind).compiling(target)


def build(module: Any, tvm_target: Any) -> Any:
    """`tvm.compile` as all of this project calls it for code that a device runs: with the TIR pipeline of the target
    (for WebGPU ours, `schedules.webgpu_pipeline`), so that a kernel is the same code wherever it is looked at, timed or
    shipped.

    module: scheduled PrimFuncs, or a Relax module that `pipeline.lower` is done with. Imports TVM.
    """
    import tvm

    from gpt2_tvm.schedules.webgpu_pipeline import pipeline_name

    return tvm.compile(module, target=tvm_target, relax_pipeline=None, tir_pipeline=pipeline_name(tvm_target))


def export(executable: Any, target: DeviceTarget, folder: Path) -> list[str]:
    """Write `executable` (of `build`) into `folder` and check that it carries the device's code.

    Returns:
        The names of the files written, the library to load first.

    Raises:
        UserError: nothing here can link for the target.
        RuntimeError: it carries none, which would otherwise be found only where it is to run.
    """
    return of(target.kind).export(executable, target, folder)
