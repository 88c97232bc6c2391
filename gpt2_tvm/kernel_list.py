"""`kernels.json`: what a webgpu artifact's functions launch, for machines that have no TVM virtual machine to ask.

::

    {"format": 1,
     "functions": {"prefill": {
        "inputs":   [TENSOR or [TENSOR, ...] for a tuple argument],   the packed parameters are not among them
        "storages": [BYTES, ...],                                     memory that tensors take turns in
        "tensors":  [TENSOR with "storage": index, ...],              what the function makes itself
        "launches": [{"kernel": entry point, "buffers": [REF, ...],
                      "scalars": [SIZE, ...], "grid": [SIZE, SIZE, SIZE]}, ...],
        "outputs":  REF or [REF, ...]}}}

TENSOR is ``{"shape": [SIZE, ...], "dtype": name}``. SIZE and BYTES are integers or texts of `expressions`, over the
names that stand in the inputs' shapes. REF is ``["input", i]``, ``["input", i, j]`` (element of a tuple),
``["param", i]`` (the manifest's "params" names them) or ``["tensor", k]``. Buffers stand in binding order; one
uniform block follows them, the scalars and then ``packGridDimX`` (`runners.wgpu_device`). A reshape is no launch:
two tensors of one storage. In-place arguments appear as the input that they are.

Beside "functions" stands ``"variants": [{"requires": [NAME, ...], "file": a WGSL file, "kernels": [entry points]}]``:
other versions of some kernels for adapters that are what `requires` says (`schedules.webgpu_variants`); the last that
fits wins. In place of a REF a launch may have ``["window", REF, offset, bytes]``: that part of the tensor's buffer, for
tensors larger than the target binds (`schedules.webgpu_windows`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tvm
from tvm import relax, tirx
from tvm.ir import GlobalVar

from gpt2_tvm.expressions import Text, combine, to_text
from gpt2_tvm.host_code import Extent, HostLaunch, split_launches
from gpt2_tvm.schedules.webgpu_variants import VARIANTS, variant_functions
from gpt2_tvm.schedules.webgpu_windows import Window, windows_of, with_windows
from gpt2_tvm.toolchains.webgpu import KERNELS

if TYPE_CHECKING:
    from gpt2_tvm.build import Plan
    from gpt2_tvm.pipeline import Lowered
    from gpt2_tvm.runners.wgsl import Shader

FORMAT = 1
KERNEL_LIST = "kernels.json"

Ref = list[Any]


def write_kernel_list(work: Path, lowered: Lowered, plan: Plan, adapter: Sequence[str] | None = None) -> None:
    """Write `work`/kernels.json beside the kernels.wgsl that `toolchains.webgpu.export` wrote.

    adapter: variants that ask for anything else of an adapter are left out; None keeps all.
    Raises RuntimeError where a function does what a list of launches cannot say, or names a kernel that
    kernels.wgsl lacks.
    """
    from gpt2_tvm.runners.wgsl import parse_wgsl

    functions = {v: f for v, f in lowered.final.functions_items() if isinstance(f, tirx.PrimFunc)}
    target, most = plan.target.tvm_target(), plan.target.limits.storage_binding_bytes
    launches, kernels = split_launches(functions, target, choices=False)
    shaders = parse_wgsl((work / KERNELS).read_text(encoding="utf-8"))
    windows = _windows(functions, launches, shaders, most)
    listed = {
        var.name_hint: _Program(var.name_hint, func, launches, windows).to_json()
        for var, func in lowered.lowered.functions_items()
        if isinstance(func, relax.Function)
    }
    if windows:
        _replace_kernels(work / KERNELS, _wgsl(kernels, windows, only=set(windows)))
        shaders = parse_wgsl((work / KERNELS).read_text(encoding="utf-8"))
    for name, program in listed.items():
        for launch in program["launches"]:
            shader = shaders.get(launch["kernel"])
            asked = (len(launch["buffers"]), len(launch["scalars"]))
            if shader is None or asked != (len(shader.bindings), len(shader.scalars)):
                raise RuntimeError(f"{name} launches {launch['kernel']}{asked}, which {KERNELS} does not have")
    variants = _write_variants(work, lowered, plan, launches, windows, adapter)
    text = json.dumps({"format": FORMAT, "functions": listed, "variants": variants}, separators=(",", ":"))
    (work / KERNEL_LIST).write_text(text + "\n", encoding="utf-8")


Windows = dict[str, dict[int, list[Window]]]  # kernel -> its buffers by number -> their windows


def _windows(
    functions: dict[Any, Any], launches: dict[str, list[HostLaunch]], shaders: dict[str, Shader], most: int | None
) -> Windows:
    """Buffers of static size that have more than `most` bytes and that a kernel only reads."""
    found: Windows = {}
    for var, func in functions.items():
        for launch in launches[var.name_hint]:
            for number, argument in enumerate(launch.buffers):
                nbytes = _static_bytes(func.params[argument]) if isinstance(argument, int) else None
                writable = launch.kernel not in shaders or shaders[launch.kernel].bindings[number][1]
                if most is not None and nbytes is not None and nbytes > most and not writable:
                    found.setdefault(launch.kernel, {})[number] = windows_of(nbytes, most)
    return found


def _static_bytes(buffer: Any) -> int | None:
    total = tvm.DataType(buffer.dtype).itemsize
    for extent in buffer.shape:
        if not isinstance(extent, tirx.IntImm):
            return None
        total *= int(extent)
    return total


def _wgsl(kernels: dict[Any, tvm.IRModule], windows: Windows, only: set[str]) -> dict[str, str]:
    """The source of each of `only` these kernels."""
    build = tvm.get_global_func("target.build.webgpu")
    sources: dict[str, str] = {}
    for target, module in kernels.items():
        made = {
            var: with_windows(func, windows.get(var.name_hint, {}))
            for var, func in module.functions_items()
            if var.name_hint in only
        }
        if made:
            sources |= _by_name(build(tvm.IRModule(made, attrs=module.attrs), target).inspect_source())
    return sources


def _by_name(text: str) -> dict[str, str]:
    """The parts of a WGSL file by the kernel that they hold."""
    parts: dict[str, str] = {}
    for part in re.split(r"(?m)^(?=// Function: )", text):
        name = re.match(r"// Function: (\w+)", part)
        if name is not None:
            parts[name.group(1)] = parts.get(name.group(1), "") + part
    return parts


def _replace_kernels(file: Path, sources: dict[str, str]) -> None:
    file.write_text("".join((_by_name(file.read_text(encoding="utf-8")) | sources).values()), encoding="utf-8")


def _write_variants(
    work: Path,
    lowered: Lowered,
    plan: Plan,
    launches: dict[str, list[HostLaunch]],
    windows: Windows,
    adapter: Sequence[str] | None,
) -> list[dict[str, Any]]:
    """The files of all variants that an adapter can use, and what kernels.json says of them."""
    target = plan.target.tvm_target()
    unscheduled = {var.name_hint: func for var, func in lowered.fused.functions_items()}
    listed = []
    for variant in VARIANTS:
        if adapter is not None and not set(variant.requires) <= set(adapter):
            continue
        functions = variant_functions(variant, unscheduled, lowered.hits, target)
        if not functions:
            continue
        others, kernels = split_launches(
            {GlobalVar(name): func for name, func in functions.items()}, target, choices=False
        )
        same = [name for name in functions if _told(others[name]) == _told(launches[name])]
        names = {launch.kernel for name in same for launch in others[name]}
        sources = _wgsl(kernels, windows, names)
        file = f"kernels.{variant.name}.wgsl"
        (work / file).write_text("".join(sources.values()), encoding="utf-8")
        listed.append({"requires": list(variant.requires), "file": file, "kernels": sorted(sources)})
    return listed


def _told(launches: list[HostLaunch]) -> list[Any]:
    """What a caller must know of launches, to compare."""

    def text(of: Any) -> Text:
        return of(lambda extent: f"x{extent.argument}_{extent.axis}" if isinstance(extent, Extent) else str(extent))

    return [
        (one.kernel, one.buffers, [text(s) for s in one.scalars], [text(axis) for axis in one.grid]) for one in launches
    ]


def _size(expr: Any) -> Text:
    """A Relax shape's expression; its variables keep their names."""
    return to_text(expr, lambda node: str(node.name) if isinstance(node, tirx.Var) else None)


def _shape(of: Any) -> list[Text]:
    return [_size(extent) for extent in of]


class _Program:
    """One lowered Relax function (`Lowered.lowered`), read binding by binding."""

    def __init__(
        self, name: str, func: relax.Function, launches: dict[str, list[HostLaunch]], windows: Windows
    ) -> None:
        self.name, self.host, self.windows = name, launches, windows
        self.refs: dict[Any, Any] = {}  # variable -> REF, or a list of REFs for a tuple, or a storage's index
        self.shapes: dict[Any, list[Text]] = {}
        self.storages: list[Text] = []
        self.tensors: list[dict[str, Any]] = []
        self.launches: list[dict[str, Any]] = []
        self.inputs: list[Any] = []
        self.scratch: dict[int, tuple[int, set[Text]]] = {}  # by rank within a call: a storage, and what it must hold
        self._read_parameters(func)
        for block in func.body.blocks:
            for binding in block.bindings:
                if not isinstance(binding, relax.VarBinding):
                    raise self._refuse(binding)
                self._bind(binding.var, binding.value)
        self.outputs = self._ref(func.body.body)

    def to_json(self) -> dict[str, Any]:
        return {
            "inputs": self.inputs,
            "storages": self.storages,
            "tensors": self.tensors,
            "launches": self.launches,
            "outputs": self.outputs,
        }

    def _read_parameters(self, func: relax.Function) -> None:
        inputs = int(func.attrs["num_input"]) if func.attrs and "num_input" in func.attrs else len(func.params)
        for i, param in enumerate(func.params):
            ty = param.ty
            fields = list(ty.fields) if isinstance(ty, relax.TupleType) else None
            if i >= inputs:  # the tuple of parameters; the bindings that take it apart carry their names
                if fields is None:
                    raise self._refuse(param)
                self.refs[param] = "params"
                continue
            ref: Ref = ["input", i]
            self.refs[param] = ref if fields is None else [[*ref, j] for j in range(len(fields))]
            self.inputs.append(self._tensor(ty) if fields is None else [self._tensor(f) for f in fields])

    @staticmethod
    def _tensor(ty: Any) -> dict[str, Any]:
        return {"shape": _shape(ty.shape), "dtype": str(ty.dtype)}

    def _bind(self, var: Any, value: Any) -> None:
        if isinstance(value, relax.TupleGetItem):
            self._take(var, value)
        elif isinstance(value, relax.Call) and isinstance(value.op, GlobalVar):
            self._launch(value)
        elif isinstance(value, relax.Call):
            self._operator(var, value)
        else:  # another name for what is there already, a tuple of it, or a constant that nothing uses
            self.refs[var] = self._ref(value)

    def _take(self, var: Any, value: relax.TupleGetItem) -> None:
        of = self.refs[value.tuple_value]
        self.refs[var] = ["param", int(value.index)] if of == "params" else of[int(value.index)]

    def _operator(self, var: Any, call: relax.Call) -> None:
        name = str(call.op.name)
        if name == "relax.memory.alloc_storage":
            (nbytes,) = _shape(call.args[0].values)
            self.refs[var] = self._storage(nbytes)
        elif name == "relax.memory.alloc_tensor":
            storage, offset, shape, dtype = call.args[:4]
            if _size(offset.value) != 0:
                raise self._refuse(call)
            self._allocate(var, self.refs[storage], _shape(shape.values), str(dtype.value))
        elif name == "relax.builtin.alloc_tensor":
            shape, dtype = _shape(call.args[0].values), str(call.args[1].value)
            self._allocate(var, self._storage(_bytes(shape, dtype)), shape, dtype)
        elif name == "relax.reshape":
            self._view(var, call)
        else:
            raise self._refuse(call)

    def _storage(self, nbytes: Text) -> int:
        self.storages.append(nbytes)
        return len(self.storages) - 1

    def _allocate(self, var: Any, storage: int, shape: list[Text], dtype: str) -> None:
        self.tensors.append({"shape": shape, "dtype": dtype, "storage": storage})
        self.refs[var] = ["tensor", len(self.tensors) - 1]

    def _view(self, var: Any, call: relax.Call) -> None:
        """A reshape: for what the function made, another tensor of the same storage; for an input, the input itself."""
        ref = self._ref(call.args[0])
        if ref[0] == "tensor":
            seen = self.tensors[ref[1]]
            self._allocate(var, seen["storage"], _shape(var.ty.shape), seen["dtype"])
        else:
            self.refs[var] = ref

    def _ref(self, expr: Any) -> Any:
        if isinstance(expr, relax.Tuple):
            return [self._ref(field) for field in expr.fields]
        if expr not in self.refs:
            raise self._refuse(expr)
        return self.refs[expr]

    def _launch(self, call: relax.Call) -> None:
        shapes = [_shape(argument.ty.shape) for argument in call.args]
        scratch: dict[int, Ref] = {}  # of this call

        def extent(of: Any) -> Text:
            return shapes[of.argument][of.axis]

        for launch in self.host[call.op.name_hint]:
            buffers = []
            for buffer in launch.buffers:
                if isinstance(buffer, int):
                    buffers.append(self._ref(call.args[buffer]))
                    continue
                if buffer.index not in scratch:
                    shape = [buffer.elements(extent)]
                    storage = self._scratch(buffer.index, _bytes(shape, buffer.dtype))
                    self.tensors.append({"shape": shape, "dtype": buffer.dtype, "storage": storage})
                    scratch[buffer.index] = ["tensor", len(self.tensors) - 1]
                buffers.append(scratch[buffer.index])
            parts = self.windows.get(launch.kernel, {})
            bound: list[Ref] = []
            for number, ref in enumerate(buffers):
                of = parts.get(number)
                bound += [ref] if of is None else [["window", ref, w.offset, w.size] for w in of]
            self.launches.append(
                {
                    "kernel": launch.kernel,
                    "buffers": bound,
                    "scalars": [scalar(extent) for scalar in launch.scalars],
                    "grid": [axis(extent) for axis in launch.grid],
                }
            )

    def _scratch(self, index: int, nbytes: Text) -> int:
        """The storage of a call's scratch buffer: shared with the other calls, which run before or after it."""
        if index not in self.scratch:
            self.scratch[index] = self._storage(0), set()
        storage, sizes = self.scratch[index]
        if nbytes not in sizes:
            sizes.add(nbytes)
            known = self.storages[storage]
            self.storages[storage] = nbytes if known == 0 else combine("max", known, nbytes)
        return storage

    def _refuse(self, node: Any) -> RuntimeError:
        return RuntimeError(f"{self.name} does what a list of launches cannot say: {node}")


def _bytes(shape: list[Text], dtype: str) -> Text:
    total: Text = tvm.DataType(dtype).bits // 8
    for extent in shape:
        total = combine("*", total, extent)
    return total
