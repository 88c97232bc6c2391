"""What tests of the web runtime need of a machine, and a skip that names what is missing."""

from __future__ import annotations

import functools
import os
import subprocess
from pathlib import Path

import pytest

from gpt2_tvm.toolchains import web
from gpt2_tvm.toolchains.webruntime import emscripten

if not os.environ.get("GPT2_TVM_WEB_TESTS"):
    pytest.skip(
        "set GPT2_TVM_WEB_TESTS=1 to run: needs emcc, node and npm; compile does not write model.wasm yet",
        allow_module_level=True,
    )

NODE = (20,)
NPM_S = 300
SWIFTSHADER = Path("/usr/lib/chromium/vk_swiftshader_icd.json")  # Chromium's software Vulkan, where Debian puts it


def emcc() -> emscripten.Emscripten:
    """emcc, or a skip."""
    found = emscripten.find()
    if found is None:
        pytest.skip(f"emcc is missing: {emscripten.HOW_TO_GET_IT}")
    return found


@functools.cache
def _packages() -> str:
    """Why node or the packages of web/package.json are not here, or ""; they are installed where they can be."""
    version = web.node_version()
    if version is None or version < NODE:
        return f"node {NODE[0]} or later is missing"
    if (web.WEB / "node_modules/webgpu").is_dir() and (web.WEB / web.JS_RUNTIME).is_file():
        return ""
    command = ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--prefix", str(web.WEB)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=NPM_S, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"npm ci of web/ did not run: {error}"
    return "" if done.returncode == 0 else f"npm ci of web/ failed: {done.stderr.strip().splitlines()[-1:]}"


def packages() -> None:
    """node and the packages of web/package.json, or a skip."""
    if reason := _packages():
        pytest.skip(reason)


def run_node(script: str, *arguments: str, timeout_s: float = 400) -> subprocess.CompletedProcess[bytes]:
    """A script of web/node on a software WebGPU device; a skip where there is no adapter."""
    packages()
    environment = dict(os.environ)
    if SWIFTSHADER.is_file():
        environment.setdefault("VK_ICD_FILENAMES", str(SWIFTSHADER))
    command = ["node", str(web.WEB / "node" / script), *arguments]
    done = subprocess.run(command, capture_output=True, env=environment, timeout=timeout_s, stdin=subprocess.DEVNULL)
    if b"find a compatible GPU" in done.stderr:
        pytest.skip("Dawn finds no Vulkan device (Debian: chromium or mesa-vulkan-drivers has one in software)")
    return done


def node(script: str, *arguments: str) -> bytes:
    """Standard output of `run_node`, which must succeed."""
    done = run_node(script, *arguments)
    assert done.returncode == 0, done.stderr.decode(errors="replace")[-2000:]
    return done.stdout


def browser() -> str:
    """A Chromium, or a skip."""
    from tuning.candidates.page import find_browser

    found = find_browser()
    if found is None:
        pytest.skip("no Chromium on PATH (Debian: chromium)")
    return found
