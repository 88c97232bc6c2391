"""What tests of the web runtime need of a machine, and a skip that names what is missing."""

from __future__ import annotations

import functools
import os
import subprocess

import pytest

from gpt2_tvm.errors import UserError
from gpt2_tvm.runners import chromium
from gpt2_tvm.runners import node as dawn
from gpt2_tvm.toolchains import web
from gpt2_tvm.toolchains.webruntime import emscripten

NPM_S = 300


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
    if version is None or version < dawn.OLDEST:
        return f"node {dawn.OLDEST[0]} or later is missing: {dawn.HOW_TO_GET_IT}"
    try:
        dawn.check()
    except UserError:
        command = ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--prefix", str(web.WEB)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=NPM_S, stdin=subprocess.DEVNULL)
        except (OSError, subprocess.TimeoutExpired) as error:
            return f"npm ci of web/ did not run: {error}"
        if done.returncode != 0:
            return f"npm ci of web/ failed: {done.stderr.strip().splitlines()[-1:]}"
    return ""


def packages() -> None:
    """node and the packages of web/package.json, or a skip."""
    if reason := _packages():
        pytest.skip(reason)


@functools.cache
def _no_adapter() -> bool:
    """Whether Dawn finds no Vulkan device, nor one in software."""
    packages()
    done = subprocess.run(
        ["node", str(web.WEB / "node" / "adapter.mjs")],
        capture_output=True,
        text=True,
        env={**os.environ, **dawn.environment()},
        timeout=60,
        stdin=subprocess.DEVNULL,
    )
    return done.stdout.strip() in ("", "none")


def dawn_device() -> None:
    """node, its packages and a device for Dawn, or a skip."""
    packages()
    if _no_adapter():
        pytest.skip("Dawn finds no Vulkan device (Debian: chromium has one in software)")


def run_node(script: str, *arguments: str, timeout_s: float = 400) -> subprocess.CompletedProcess[bytes]:
    """A script of web/node on a WebGPU device; a skip where there is none."""
    dawn_device()
    command = ["node", str(web.WEB / "node" / script), *arguments]
    environment = {**os.environ, **dawn.environment()}
    return subprocess.run(command, capture_output=True, env=environment, timeout=timeout_s, stdin=subprocess.DEVNULL)


def node(script: str, *arguments: str) -> bytes:
    """Standard output of `run_node`, which must succeed."""
    done = run_node(script, *arguments)
    assert done.returncode == 0, done.stderr.decode(errors="replace")[-2000:]
    return done.stdout


def browser() -> str:
    """A Chromium, or a skip."""
    found = chromium.find_browser()
    if found is None:
        pytest.skip(f"no Chromium on PATH: {chromium.HOW_TO_GET_ONE}")
    return found
