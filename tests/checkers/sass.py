"""The machine code in a CUDA library; the reader is `tuning.static.sass`, under the name that tests know it by."""

from __future__ import annotations

from tuning.static.sass import INSTRUCTIONS, PACKAGES, Kernel, kernels, tool

__all__ = ["INSTRUCTIONS", "PACKAGES", "Kernel", "kernels", "tool"]
