"""What the source of a shader says about its kernels: WGSL (WebGPU) and MSL (Metal).

Registers and spills are decided by the driver's compiler on the device, so they are not here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

PART = re.compile(r"^(?=// Function: )", re.MULTILINE)

WGSL_BYTES = {"f32": 4, "i32": 4, "u32": 4, "f16": 2, "bool": 4}
MSL_BYTES = {"float": 4, "int": 4, "uint": 4, "half": 2, "short": 2, "ushort": 2, "char": 1, "uchar": 1, "bool": 1}
MSL_BYTES |= {"long": 8, "ulong": 8, "bfloat": 2, "int8_t": 1, "uint8_t": 1, "int64_t": 8, "size_t": 8}
_VOLATILE = re.compile(r"\(\(volatile threadgroup \w+\*\)(\w+)\)")  # how TVM names a buffer of a reduction
_MSL_SCALAR = "|".join(sorted(MSL_BYTES, key=len, reverse=True))


@dataclass(frozen=True)
class Kernel:
    """One kernel's source.

    threads: of a block; None where the source does not say. shared_bytes: of a block. widest_load_bytes: of one access
    of a global buffer that the kernel reads; 0 if it reads none. vector_bits: the widest vector type that it computes
    with; the scalar's width if it has none. mix: how often what stands in the source (loops are not counted out).
    """

    name: str
    threads: int | None
    shared_bytes: int
    widest_load_bytes: int
    vector_bits: int
    mix: dict[str, int]


def wgsl_kernels(source: str) -> list[Kernel]:
    """The kernels in WGSL written by TVM."""
    return [_wgsl(part, name) for part in PART.split(source) for name in _entry(part, r"@compute.*?\bfn\s+(\w+)")]


def msl_kernels(source: str) -> list[Kernel]:
    """The kernels in MSL written by TVM."""
    return [_msl(part, name) for part in PART.split(source) for name in _entry(part, r"\bkernel void\s+(\w+)")]


def _entry(part: str, pattern: str) -> Iterator[str]:
    found = re.search(pattern, part, re.DOTALL)
    if found:
        yield found.group(1)


# WGSL ----------------------------------------------------------------------------------------------------------------


def _wgsl(part: str, name: str) -> Kernel:
    block = re.search(r"@workgroup_size\((\d+),\s*(\d+),\s*(\d+)\)", part)
    threads = 1
    for extent in block.groups() if block else ():
        threads *= int(extent)
    body = part[part.index("@compute") :]
    code = body[body.index("{") :]
    storage = re.findall(r"var<storage,\s*(read_write|read)>\s*(\w+)\s*:\s*array<([^;]+)>;", part)
    shared = re.findall(r"var<workgroup>\s*(\w+)\s*:\s*array<(.+?),\s*(\d+)>;", part)
    loads, stores = 0, 0
    widest = 0
    for _, buffer, element in storage:
        reads, writes = _accesses(code, buffer)
        loads, stores = loads + reads, stores + writes
        if reads:
            widest = max(widest, wgsl_bytes(element))
    shared_loads, shared_stores = 0, 0
    for buffer, _, _ in shared:
        reads, writes = _accesses(code, buffer)
        shared_loads, shared_stores = shared_loads + reads, shared_stores + writes
    vectors = {wgsl_bytes(t) for t in re.findall(r"\bvec[234]<(?:f32|f16|i32|u32)>", code)}
    scalars = {wgsl_bytes(t) for t in re.findall(r"\b(f32|f16)\b", code)} or {4}
    mix = {
        "bindings": len(storage),
        "global_load": loads,
        "global_store": stores,
        "shared_load": shared_loads,
        "shared_store": shared_stores,
        "fma": len(re.findall(r"\bfma\(", code)),
        "barrier": len(re.findall(r"\bworkgroupBarrier\(", code)),
        "shuffle": len(re.findall(r"\bsubgroup\w+\(", code)),
        "transcendental": len(re.findall(r"\b(?:exp2?|log2?|tanh|sqrt|inverseSqrt|pow|sin|cos)\(", code)),
        "loop": len(re.findall(r"\b(?:for|while|loop)\s*[({]", code)),
    }
    return Kernel(
        name,
        threads,
        sum(wgsl_bytes(element) * int(count) for _, element, count in shared),
        widest,
        8 * max(vectors | scalars),
        {key: value for key, value in mix.items() if value},
    )


def wgsl_bytes(type_: str) -> int:
    """Bytes of an element as it lies in an array: vec3 takes the place of a vec4."""
    vector = re.match(r"vec([234])<(\w+)>", type_.strip())
    if vector:
        lanes = 4 if vector.group(1) == "3" else int(vector.group(1))
        return lanes * WGSL_BYTES[vector.group(2)]
    return WGSL_BYTES.get(re.sub(r"^atomic<(\w+)>$", r"\1", type_.strip()), 4)


def _accesses(code: str, buffer: str) -> tuple[int, int]:
    """(reads, writes) of `buffer[...]`: a write is one that an assignment follows."""
    writes = reads = 0
    for found in re.finditer(rf"\b{re.escape(buffer)}\s*\[", code):
        end = _closing(code, found.end() - 1)
        if re.match(r"\s*(?:\[[^\]]*\]|\.\w+)?\s*=(?!=)", code[end : end + 80]):
            writes += 1
        else:
            reads += 1
    return reads, writes


def _closing(code: str, start: int) -> int:
    """The position after the bracket that closes the one at `start`."""
    depth = 0
    for position in range(start, len(code)):
        if code[position] in "[(":
            depth += 1
        elif code[position] in "])":
            depth -= 1
            if depth == 0:
                return position + 1
    return len(code)


# MSL -----------------------------------------------------------------------------------------------------------------


def _msl(part: str, name: str) -> Kernel:
    start = part.index(f"kernel void {name}")
    head, _, code = part[start:].partition(") {")
    buffers = dict(
        (buffer, element)
        for element, buffer in re.findall(rf"device\s+(?:const\s+)?((?:{_MSL_SCALAR})[234]?)\s*\*\s*(\w+)", head)
    )
    declared = re.findall(rf"^\s*threadgroup\s+((?:{_MSL_SCALAR})[234]?)\s+(\w+)\[(\d+)\];", code, re.MULTILINE)
    simdgroup = re.findall(r"^\s*threadgroup\s+simdgroup_(\w+?)8x8\s+\w+\[(\d+)\];", code, re.MULTILINE)
    loads, stores, widest = 0, 0, 0
    for buffer, element in buffers.items():
        reads, writes = _accesses(code, buffer)
        loads, stores = loads + reads, stores + writes
        if reads:
            widest = max(widest, msl_bytes(element))
    for found in re.finditer(rf"\*\(device\s+((?:{_MSL_SCALAR})[234]?)\s*\*\)", code):
        end = _closing(code, found.end()) if code[found.end() : found.end() + 1] == "(" else found.end()
        if re.match(r"\s*=(?!=)", code[end : end + 8]):
            stores += 1
        else:
            loads += 1
            widest = max(widest, msl_bytes(found.group(1)))
    arithmetic = {msl_bytes(t) for t in re.findall(r"\b(?:half|float)[234]?\b", code)} or {4}
    code = re.sub(r"^\s*threadgroup\s[^;()]*;", "", _VOLATILE.sub(r"\1", code), flags=re.MULTILINE)
    shared = {buffer for _, buffer, _ in declared}
    shared_reads, shared_writes = 0, 0
    for buffer in shared:
        reads, writes = _accesses(code, buffer)
        shared_reads, shared_writes = shared_reads + reads, shared_writes + writes
    mix = {
        "bindings": len(buffers),
        "global_load": loads,
        "global_store": stores,
        "shared_load": shared_reads,
        "shared_store": shared_writes,
        "simdgroup_multiply": len(re.findall(r"\bsimdgroup_multiply_accumulate\(", code)),
        "simdgroup_load": len(re.findall(r"\bsimdgroup_load\(", code)),
        "simdgroup_store": len(re.findall(r"\bsimdgroup_store\(", code)),
        "shuffle": len(re.findall(r"\bsimd_shuffle\w*\(", code)),
        "barrier": len(re.findall(r"\bthreadgroup_barrier\(", code)),
        "transcendental": len(re.findall(r"\b(?:exp2?|log2?|tanh|r?sqrt|pow|sin|cos)\(", code)),
        "loop": len(re.findall(r"\b(?:for|while)\s*\(", code)),
    }
    nbytes = sum(msl_bytes(element) * int(count) for element, _, count in declared)
    nbytes += sum(64 * MSL_BYTES[element] * int(count) for element, count in simdgroup)
    return Kernel(name, None, nbytes, widest, 8 * max(arithmetic), {key: value for key, value in mix.items() if value})


def msl_bytes(type_: str) -> int:
    """Bytes of a scalar or vector type; a vector of three takes the place of four."""
    found = re.match(r"(\w*?[a-z_t])([234])?$", type_)
    if found is None or found.group(1) not in MSL_BYTES:
        return MSL_BYTES.get(type_, 4)
    lanes = {"2": 2, "3": 4, "4": 4}.get(found.group(2) or "", 1)
    return lanes * MSL_BYTES[found.group(1)]
