"""Finding the device code inside a library that TVM exported, and saying what it is for.

TVM keeps a device module as one serialised blob in the library's data, where no vendor tool looks. The images
in it are ELF files (a cubin of NVIDIA, a code object of AMD) or CUDA's fat binaries; both say their own
length in their headers.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass

_ELF64 = b"\x7fELF\x02\x01"
_EM_CUDA, _EM_AMDGPU = 190, 224
_FATBIN_MAGIC = struct.pack("<I", 0xBA55ED50)
_FATBIN_KINDS = {1: "ptx", 2: "sm"}


@dataclass(frozen=True)
class DeviceImage:
    """One image of device code.

    Attributes:
        kind: "cubin", "fatbin" (CUDA) or "code-object" (AMD).
        archs: what it holds code for: ("sm_90",), ("sm_80", "sm_90", "ptx_90") or ("gfx90a",).
        data: its bytes; a file with just these is what the vendor's tools read.
    """

    kind: str
    archs: tuple[str, ...]
    data: bytes


def cuda_images(library: bytes) -> list[DeviceImage]:
    """The fat binaries in `library`, and the cubins outside them, in the order in which they lie there."""
    found: list[DeviceImage] = []
    position = 0
    while True:
        fat, elf = library.find(_FATBIN_MAGIC, position), library.find(_ELF64, position)
        starts = [start for start in (fat, elf) if start >= 0]
        if not starts:
            return found
        position = min(starts)
        image = _fatbin_at(library, position) if position == fat else _cubin_at(library, position)
        if image:
            found.append(image)
        position += len(image.data) if image else len(_FATBIN_MAGIC)


def amd_images(library: bytes) -> list[DeviceImage]:
    """The AMD GPU code objects in `library`."""
    return [DeviceImage("code-object", (_amd_target(data),), data) for data in _elf_files(library, _EM_AMDGPU) if data]


def cuda_source_left(library: bytes) -> bool:
    """Whether `library` holds CUDA C++, to which TVM falls back in silence when it cannot compile."""
    return b"__global__ void" in library


def _cubin_at(library: bytes, start: int) -> DeviceImage | None:
    data = _elf_at(library, start, _EM_CUDA)
    if data is None:
        return None
    (flags,) = struct.unpack_from("<I", data, 48)
    # The architecture moved from the lowest byte to the second one with version 8 of the ELF's ABI (CUDA 13).
    number = (flags >> 8) & 0xFF if data[8] >= 8 else flags & 0xFF
    return DeviceImage("cubin", (f"sm_{number}",), data)


def _fatbin_at(library: bytes, start: int) -> DeviceImage | None:
    if start + 16 > len(library):
        return None
    _, version, header, size = struct.unpack_from("<IHHQ", library, start)
    if version != 1 or header < 16 or not size or start + header + size > len(library):
        return None
    data = library[start : start + header + size]
    archs = []
    offset = header
    while offset + 32 <= len(data):
        kind, _, entry_header, entry_size = struct.unpack_from("<HHIQ", data, offset)
        (number,) = struct.unpack_from("<I", data, offset + 28)
        if kind not in _FATBIN_KINDS or not entry_size:
            break
        archs.append(f"{_FATBIN_KINDS[kind]}_{number}")
        offset += entry_header + entry_size
    return DeviceImage("fatbin", tuple(archs), data) if archs else None


def _elf_files(library: bytes, machine: int) -> Iterator[bytes]:
    start = library.find(_ELF64)
    while start >= 0:
        data = _elf_at(library, start, machine)
        if data:
            yield data
        start = library.find(_ELF64, start + (len(data) if data else len(_ELF64)))


def _elf_at(library: bytes, start: int, machine: int) -> bytes | None:
    """The 64-bit little-endian ELF file for `machine` that begins at `start`, or None."""
    if start + 64 > len(library) or struct.unpack_from("<H", library, start + 18)[0] != machine:
        return None
    segments, sections = struct.unpack_from("<QQ", library, start + 32)
    segment_size, segment_count, section_size, section_count = struct.unpack_from("<HHHH", library, start + 54)
    # Both tables stand at the end of the file in what ptxas and lld write; the later one ends the file.
    end = start + max(segments + segment_size * segment_count, sections + section_size * section_count)
    return library[start:end] if start < end <= len(library) else None


def _amd_target(code_object: bytes) -> str:
    name = re.search(rb"amdgcn-amd-amdhsa-[a-z]*-(gfx[0-9a-f]+)", code_object)
    return name.group(1).decode() if name else "unknown"
