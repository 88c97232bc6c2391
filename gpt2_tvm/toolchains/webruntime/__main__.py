"""`python -m gpt2_tvm.toolchains.webruntime`: build TVM's web runtime now, so that no compile has to wait for it."""

from __future__ import annotations

import sys

from gpt2_tvm import cli


def main() -> None:
    """Two minutes the first time, then nothing: the objects stay in the user's cache folder."""
    from gpt2_tvm.toolchains.webruntime.build import cache_folder, runtime_objects

    runtime_objects(lambda what: print(what, file=sys.stderr, flush=True))
    print(f"TVM's web runtime is in {cache_folder()}")


if __name__ == "__main__":
    cli.run(main)
