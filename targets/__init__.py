"""What a device is, as data: one TOML a device, read into a `DeviceTarget`.

A new device is a new file, here or anywhere (`--target ./my-gpu.toml`), and no code; `rtx-4090.toml` shows a
GPU's keys, `x86-64-v3.toml` a CPU's, and `targets/load.py` says what each means.
"""

from targets.adapt import as_gpu, specialise
from targets.detect import Gpu
from targets.device import DeviceTarget, Layout, Limits, Peak
from targets.load import list_targets, load_target

__all__ = [
    "DeviceTarget",
    "Gpu",
    "Layout",
    "Limits",
    "Peak",
    "as_gpu",
    "list_targets",
    "load_target",
    "specialise",
]
