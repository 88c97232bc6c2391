"""What each schedule primitive does, in a line for somebody who has never scheduled; and the steps of a schedule."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

CALL = re.compile(r"\bsch\.(\w+)\(")
# Methods that only find something to work on.
LOOKUPS = ("get_sblock", "get_loops", "get_child_blocks", "get_producers", "get_consumers", "get_output_blocks")

GLOSSES = {
    "add_unit_loop": "puts a loop of one iteration around a block, for something to bind to or to compute at",
    "annotate": "leaves a note for a later pass, such as how far to unroll",
    "annotate_buffer_access": "states which part of a buffer a block touches, where the compiler cannot see it",
    "bind": "gives a loop's iterations to the blocks or threads of a GPU: they run at once instead of in turn",
    "blockize": "makes one block of a whole inner loop nest, so that an instruction can replace it",
    "cache_index": "computes an address once and keeps it",
    "cache_inplace": "stages a buffer that is read and written in place",
    "cache_read": "copies what a block reads into nearer memory (shared memory or registers) first",
    "cache_write": "collects what a block writes in nearer memory, and writes it out once at the end",
    "compute_at": "moves a producer into its consumer's loop, so that each piece is made right before it is used",
    "compute_inline": "writes a producer's formula into its consumer: the buffer between them disappears",
    "decompose_padding": "fills a padded buffer in two parts, the zeros and the data, without a test at each element",
    "decompose_reduction": "takes the start of a sum (acc = 0) out of the loop that adds to it",
    "enter_postproc": "marks where the postprocessing of a tuning search begins",
    "fuse": "makes one loop of several nested ones: first step to split them evenly among threads",
    "fuse_reduction_epilogue": "starts a sum at its epilogue's value (a bias) instead of at zero",
    "get_child_blocks": "looks up the blocks inside a block",
    "get_consumers": "looks up the blocks that read what a block writes",
    "get_loops": "looks up the loops around a block",
    "get_output_blocks": "looks up the blocks that write the function's results",
    "get_producers": "looks up the blocks that write what a block reads",
    "get_sblock": "looks up a block by its name",
    "loop_partition": "cuts a loop into ranges that each become a loop, for example body and tail",
    "pad_einsum": "rounds a product's extents up to whole tiles, so that no tile needs a test at its edge",
    "parallel": "spreads a loop's iterations over the CPU's cores",
    "read_at": "copies what a loop reads into nearer memory, at that loop",
    "reindex": "gives a block its own copy of a buffer, laid out in the order in which the block walks it",
    "reindex_cache_read": "cache_read into a layout of its own",
    "reindex_cache_write": "cache_write from a layout of its own",
    "remove_rv": "forgets a name that the schedule no longer needs",
    "reorder": "swaps loops: decides what runs outside and what runs inside",
    "reorder_block_iter_var": "swaps the axes of a block",
    "reverse_compute_at": "moves a consumer (bias, activation, cast) into its producer's loop, right after each piece",
    "reverse_compute_inline": "writes a consumer's formula into its producer",
    "rfactor": "splits one long sum into several partial sums that can run at once, and a short sum of those",
    "rolling_buffer": "keeps only the last rows of a buffer that slides along",
    "sample_categorical": "a search picks one of several values",
    "sample_compute_location": "a search picks the loop to compute a block at",
    "sample_partitioned_tile": "a search picks how to split a loop, within a part of it",
    "sample_perfect_tile": "a search picks how to split a loop without remainder",
    "set_scope": "says where a buffer lives: global, shared, or registers (local)",
    "split": "cuts a loop into nested ones (48 → 3 × 16), so that each part can be treated in its own way",
    "storage_align": "pads a buffer's rows so that neighbouring rows start in different memory banks",
    "tensorize": "replaces an inner nest by an instruction of a matrix unit (tensor core, simdgroup matrix)",
    "transform_block_layout": "renumbers a block's axes, for example joins batch and row into one",
    "transform_layout": "changes how a buffer lies in memory",
    "unannotate": "takes a note away again",
    "unroll": "writes a loop's iterations out one after another, so that their values can stay in registers",
    "unsafe_hide_buffer_access": "hides an access of a block from the compiler's checks",
    "unsafe_set_dtype": "changes the type of a buffer, unchecked",
    "vectorize": "runs a short innermost loop as one instruction on a vector (one wide load instead of four)",
    "work_on": "chooses the function that the next steps work on",
    "write_at": "writes what a loop produces from nearer memory, at that loop",
}


@dataclass(frozen=True)
class Step:
    """One line of a schedule. primitive: "split"; text: the call as Python, without its keyword noise."""

    primitive: str
    text: str

    @property
    def gloss(self) -> str:
        return GLOSSES.get(self.primitive, "")

    @property
    def looks_up(self) -> bool:
        """Whether it only finds a block or loops, and changes nothing."""
        return self.primitive in LOOKUPS


def steps_of(schedule: Any) -> list[Step]:
    """The steps of an `s_tir.Schedule`, in order; empty where its rule wrote TIR without primitives."""
    if schedule is None or schedule.trace is None:
        return []
    found = []
    for line in schedule.trace.as_python():
        match = CALL.search(str(line))
        if match:
            found.append(Step(match[1], _short(str(line).strip())))
    return found


def used(steps: Sequence[Step]) -> list[tuple[str, int, str]]:
    """(primitive, how often, gloss) of the steps that change something, in the order of first use."""
    counts: dict[str, int] = {}
    for step in steps:
        if not step.looks_up:
            counts[step.primitive] = counts.get(step.primitive, 0) + 1
    return [(name, count, GLOSSES.get(name, "")) for name, count in counts.items()]


def _short(text: str) -> str:
    for noise in (", preserve_unit_iters=True", ", disable_predication=False", ", preserve_unit_loops=True"):
        text = text.replace(noise, "")
    return text.replace(", index=-1", "").replace("T.int64(", "(")
