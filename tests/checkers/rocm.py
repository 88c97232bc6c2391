"""What a code object of AMD says; the reader is `tuning.static.amd`, under the name that tests know it by."""

from __future__ import annotations

from tuning.static.amd import INSTRUCTIONS, PACKAGES, CodeObject, Kernel, code_objects, tools

__all__ = ["INSTRUCTIONS", "PACKAGES", "CodeObject", "Kernel", "code_objects", "tools"]
