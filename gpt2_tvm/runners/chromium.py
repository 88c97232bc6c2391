"""Finding Chromium, or a browser built from it, and starting it without a window, with WebGPU."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from gpt2_tvm.errors import UserError

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "microsoft-edge")
HOW_TO_GET_ONE = "install it (Debian: sudo apt-get install chromium) or name it in CHROMIUM"
FLAGS = (
    "--headless=new",
    "--enable-unsafe-webgpu",  # without it a headless browser on Linux offers no adapter
    "--enable-webgpu-developer-features",  # timestamps to the nanosecond; else to a tenth of a millisecond
    "--disable-quic",
    "--no-first-run",
    "--no-default-browser-check",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--enable-logging=stderr",
)
SOFTWARE = "--use-webgpu-adapter=swiftshader"
MORE_FLAGS = "GPT2_TVM_CHROMIUM_FLAGS"
# Where Debian, Fedora and Google's packages put SwiftShader, Chromium's Vulkan device in software.
SOFTWARE_ICDS = tuple(
    Path(folder) / "vk_swiftshader_icd.json"
    for folder in ("/usr/lib/chromium", "/usr/lib64/chromium-browser", "/opt/google/chrome")
)


def find_browser() -> str | None:
    """The browser that CHROMIUM names, or one of the usual names on PATH; None where there is none."""
    for name in (os.environ.get("CHROMIUM"), *NAMES):
        if name and (path := shutil.which(name)):
            return path
    return None


def require_browser(otherwise: str = "") -> str:
    """`find_browser`, or a UserError that says how to get one. otherwise: what else would do."""
    browser = find_browser()
    if browser is None:
        raise UserError(f"no Chromium on PATH: {HOW_TO_GET_ONE}{otherwise}")
    return browser


def command(browser: str, profile: Path, address: str) -> list[str]:
    """How to open `address` in a browser of its own. profile: a folder for its state.

    GPT2_TVM_CHROMIUM_FLAGS adds flags; left out on a machine without a GPU, the software device is chosen.
    """
    flags = [*FLAGS, *os.environ.get(MORE_FLAGS, SOFTWARE if no_gpu() else "").split()]
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        flags.append("--no-sandbox")  # Chromium's sandbox refuses root
    return [browser, *flags, f"--user-data-dir={profile}", address]


def no_gpu() -> bool:
    """Whether this Linux machine has no GPU device."""
    if os.name != "posix" or not Path("/proc").is_dir():
        return False
    return not any(Path("/dev/dri").glob("renderD*")) and not Path("/dev/nvidia0").exists()


def software_vulkan() -> Mapping[str, str]:
    """Environment variables that choose Chromium's software device for Vulkan programs, where there is no GPU and the
    user chose nothing."""
    if not no_gpu() or any(name in os.environ for name in ("VK_ICD_FILENAMES", "VK_DRIVER_FILES")):
        return {}
    return next(({"VK_ICD_FILENAMES": str(icd)} for icd in SOFTWARE_ICDS if icd.is_file()), {})
