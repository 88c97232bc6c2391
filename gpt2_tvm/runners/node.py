"""Starting node with Dawn, Chromium's WebGPU, from npm's package webgpu."""

from __future__ import annotations

import os
from collections.abc import Mapping

from gpt2_tvm.errors import UserError
from gpt2_tvm.runners import chromium
from gpt2_tvm.toolchains import web

OLDEST = (20,)
PACKAGE = "node_modules/webgpu/index.js"
HOW_TO_GET_IT = "install node 20 or later (nodejs.org; Debian 13: sudo apt-get install nodejs npm) and put it on PATH"
DAWN = "disable-dawn-features=timestamp_quantization"  # timestamps as they are, not to a tenth of a millisecond


def check() -> None:
    """UserError, in one line, where node or a package of web/package.json is missing."""
    version = web.node_version()
    if version is None or version < OLDEST:
        found = "is missing" if version is None else f"is {'.'.join(map(str, version))}, too old"
        raise UserError(f"node {found}: {HOW_TO_GET_IT}")
    web.js_runtime()
    if not (web.WEB / PACKAGE).is_file():
        raise UserError(f"npm's package webgpu is not installed; run: npm ci --prefix {web.WEB.name}")


def command(address: str) -> list[str]:
    """How to have node work for the agent server at `address`."""
    return ["node", str(web.WEB / "node" / "agent.mjs"), address]


def environment() -> Mapping[str, str]:
    """Environment variables for `command`; DAWN_OPTIONS and a Vulkan driver that the user chose stay."""
    return {**chromium.software_vulkan(), "DAWN_OPTIONS": os.environ.get("DAWN_OPTIONS", DAWN)}
