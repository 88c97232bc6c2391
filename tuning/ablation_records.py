"""The journal of an ablation (`tuning.journal`): everything that was found, synced to the disk before anything goes on.

After the header each line has a "kind":

- set: a rule set, its rules, the digest of the sources that lowered it, and either `code`, the digest of the scheduled
  module, with each function's rule, or the status that it failed with
- check: of one code, the largest difference of its logits to the reference's
- sample: of one code and one round, seconds of a prefill and of the decode steps
- failure: of one code, the status that it failed with while it was loaded, checked or timed
- functions: of one code, microseconds of each function
- run: what one invocation of the command took, in seconds, and how many sets it compiled; none of one that was killed

Samples belong to a code, not to a set: sets that schedule to the same module share them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tuning.journal import JournalFile, Line

IDENTITY = {
    "model": "model",
    "weights": "weights",
    "quantization": "quantization",
    "target": "target",
    "attention": "attention",
    "prompt_tokens": "number of prompt tokens",
    "generate_tokens": "number of generated tokens",
    "device": "device",
    "tvm": "TVM",
    "toggles": "kind of set",  # "passes"; journals of rules do not say
    "timing": "way of timing",
}


class Journal(JournalFile):
    """A journal's file, and what it says so far. Made by `read` or `begin`.

    Attributes:
        sets: the last "set" line of each name.
        checks, failures, functions: the last line of that kind of each code.
        samples: the samples of each code by round.
        runs: {"seconds", "compiled"} of each "run" line.
    """

    format_name = "gpt2-tvm ablation 1"
    identity = IDENTITY
    maker = "python -m tuning.ablation"

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.sets: dict[str, Line] = {}
        self.checks: dict[str, Line] = {}
        self.failures: dict[str, Line] = {}
        self.functions: dict[str, Line] = {}
        self.samples: dict[str, dict[int, Line]] = {}
        self.runs: list[Line] = []

    @classmethod
    def read(cls, path: Path) -> Journal:
        """A journal to look at. UserError where there is none, or where the file is something else."""
        journal = cls(path)
        journal.load()
        return journal

    @classmethod
    def begin(cls, path: Path, header: Mapping[str, Any], fresh: bool = False) -> Journal:
        """A journal to go on with, made if there is none; arguments and errors as for `JournalFile.open`."""
        journal = cls(path)
        journal.open(header, fresh)
        return journal

    def note(self, line: Line) -> None:
        kind = line["kind"]
        if kind == "set":
            self.sets[line["set"]] = line
        elif kind == "sample":
            if min(line["prefill_s"], line["decode_s"]) <= 0:
                raise ValueError("a time that is not above 0")
            self.samples.setdefault(line["code"], {})[line["round"]] = line
        elif kind == "run":
            self.runs.append({"seconds": line["seconds"], "compiled": line["compiled"]})
        else:
            table = {"check": self.checks, "failure": self.failures, "functions": self.functions}[kind]
            table[line["code"]] = line
