"""TVM's RPC proxy and the browser that shows its page, in a process that ends with the one that asked for them.

Reads one line of JSON from standard input, then waits for the input's end: however the asking process ends, that comes.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from gpt2_tvm.runners.guard import end


def main() -> None:
    """The line: port and web_port to listen on, index and files to serve ((folder, path) pairs), seconds that a client
    waits for the page, the browser's command (or none), the
    file for its messages, the folder to remove at the end."""
    from tvm.rpc.proxy import PopenProxyServerState

    asked = json.loads(sys.stdin.readline())
    PopenProxyServerState(
        "127.0.0.1",
        port=asked["port"],
        port_end=asked["port"] + 1,
        web_port=asked["web_port"],
        timeout_client=asked["wait_s"],
        timeout_server=24 * 3600,
        index_page=asked["index"],
        resource_files=[tuple(pair) for pair in asked["files"]],
    )
    browser = None
    if asked["browser"]:
        with Path(asked["log"]).open("wb") as log:
            browser = subprocess.Popen(asked["browser"], stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    print("ready", flush=True)
    sys.stdin.read()
    if browser is not None:
        end(browser)
    shutil.rmtree(asked["folder"], ignore_errors=True)
    os._exit(0)  # the proxy's thread never ends by itself


if __name__ == "__main__":
    main()
