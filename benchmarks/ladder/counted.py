"""Instructions that a decode step and a prefill execute, function by function, counted by valgrind's callgrind.

Valgrind knows no AVX-512, so the model is compiled for x86-64-v3 (AVX2): the loops are the same, the vectors half as
wide. It runs some fifty times slower than the processor: take the bundled model.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

from gpt2_tvm.errors import UserError

# Instructions are counted from the first of these calls on and until the next one.
SWITCH = """
#include <valgrind/callgrind.h>
extern "C" void count_from_here(void) { CALLGRIND_START_INSTRUMENTATION; }
extern "C" void dump(const char* name) { CALLGRIND_DUMP_STATS_AT(name); }
"""
CHILD = """
import ctypes, json, sys
artifact, library, ids, steps = json.loads(sys.argv[1])
from gpt2_tvm.engine import Engine
engine = Engine(artifact, verify=False)
engine.prefill(ids)
engine.decode_greedy(1)
engine.reset()
switch = ctypes.CDLL(library)
switch.count_from_here()
engine.prefill(ids)
switch.dump(b"prefill")
engine.decode_greedy(steps)
switch.dump(b"decode")
"""
_COST = re.compile(r"^[+\-*\d]\S* (\d+)$")


def instructions(artifact: Path, work: Path, ids: list[int], steps: int) -> dict[str, Counter[str]]:
    """{"prefill": {function: instructions}, "decode": …} of one prefill of `ids` and of `steps` steps, on one thread.

    work: a folder for what valgrind writes. UserError where valgrind, its header or a C++ compiler is missing.
    """
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if shutil.which("valgrind") is None or compiler is None:
        raise UserError("--callgrind needs valgrind and a C++ compiler: sudo apt-get install valgrind g++")
    source, library = work / "switch.cc", work / "switch.so"
    source.write_text(SWITCH)
    built = subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source], capture_output=True, text=True)
    if built.returncode:
        raise UserError("--callgrind needs valgrind's headers (valgrind/callgrind.h), which its package brings")
    out = work / "callgrind.out"
    options = ["--tool=callgrind", "--instr-atstart=no", "--compress-strings=no", "--compress-pos=no"]
    command = ["valgrind", *options, f"--callgrind-out-file={out}", sys.executable, "-c", CHILD]
    arguments = json.dumps([str(artifact), str(library), ids, steps])
    done = subprocess.run(
        [*command, arguments], capture_output=True, text=True, env={**os.environ, "TVM_NUM_THREADS": "1"}
    )
    if done.returncode:
        raise UserError(f"valgrind failed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    return {name: read_counts(path) for name, path in _dumps(out)}


def _dumps(out: Path) -> list[tuple[str, Path]]:
    """(what was counted, file) in order; callgrind numbers its dumps."""
    files = sorted(out.parent.glob(f"{out.name}.*"), key=lambda path: int(path.suffix[1:]))
    return list(zip(("prefill", "decode"), files, strict=False))


def read_counts(path: Path) -> Counter[str]:
    """Instructions of each function with all that it calls, from a file of callgrind's. (The bodies of TVM's parallel
    loops have no names of their own: they are callees of the functions that have one.)
    """
    counts: Counter[str] = Counter()
    function = ""
    for line in path.read_text(errors="replace").splitlines():
        if line.startswith("fn="):
            function = line[3:]
        elif match := _COST.match(line):  # its own, or after a line "calls=" what a callee cost
            counts[function] += int(match[1])
    return counts
