"""Strategies by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gpt2_tvm.errors import UserError

if TYPE_CHECKING:
    from gpt2_tvm.decoding.planted import Plan
    from gpt2_tvm.decoding.sampling import Sampling
    from gpt2_tvm.decoding.strategy import Strategy
    from gpt2_tvm.engine import Engine

PLAIN = ("naive", "greedy", "sample")
DRAFTED = ("speculative", "lookup", "mixed", "early", "streaming")  # take a draft length; of these, a second artifact:
WITH_DRAFT = ("speculative", "mixed", "early")
NAMES = (*PLAIN, *DRAFTED)


def check_name(name: str) -> str:
    """`name` if there is such a strategy; UserError lists them otherwise."""
    if name not in NAMES:
        raise UserError(f"unknown --strategy {name!r}; choose from {', '.join(NAMES)}")
    return name


def make_strategy(
    name: str,
    engine: Engine,
    draft: Engine | None = None,
    length: str = "adaptive",
    sampling: Sampling | None = None,
    plan: Plan | None = None,
) -> Strategy:
    """A strategy on `engine`.

    Args:
        name: one of `NAMES`.
        draft: another engine, for speculative, mixed and early.
        length: how many tokens to draft, or "adaptive".
        plan: for speculative: what is drafted, whatever the draft says (greedy only).

    Raises UserError where a draft is missing, too much, or does not fit.
    """
    from gpt2_tvm.decoding.device_rounds import usable
    from gpt2_tvm.decoding.device_speculative import DeviceSpeculative
    from gpt2_tvm.decoding.draft import check_pair
    from gpt2_tvm.decoding.early import Early, is_early
    from gpt2_tvm.decoding.greedy import Greedy
    from gpt2_tvm.decoding.lengths import draft_length
    from gpt2_tvm.decoding.lookup import Lookup
    from gpt2_tvm.decoding.mixed import Mixed
    from gpt2_tvm.decoding.naive import Naive
    from gpt2_tvm.decoding.planted import PlantedDraft, PlantedModelDraft
    from gpt2_tvm.decoding.sampled import Sampled
    from gpt2_tvm.decoding.speculative import Speculative, with_model
    from gpt2_tvm.decoding.streaming import Streaming

    check_name(name)
    if draft is not None and name not in WITH_DRAFT:
        raise UserError(f"--strategy {name} takes no --draft; leave it out, or choose speculative")
    if draft is engine:
        raise ValueError("a draft needs an engine of its own, with caches of its own")
    if name in PLAIN:
        return (Naive if name == "naive" else Greedy if name == "greedy" else Sampled)(engine, sampling)
    if name == "streaming":
        plan_ = engine.artifact.streams or {"streams": 1}
        return Streaming(engine, draft_length(length, int(plan_["streams"])), sampling)
    longest = max(1, max(engine.artifact.verify_widths, default=1) - 1)  # what one pass of the target checks
    tokens = draft_length(length, longest)
    if name == "lookup":
        return Lookup(engine, tokens, sampling)
    if plan is not None and sampling is not None and not sampling.greedy:
        raise UserError("--planted-acceptance is for greedy text; leave --temperature out")
    if plan is not None and draft is None:
        return Speculative(engine, PlantedDraft(plan), tokens, sampling)
    if draft is None:
        raise UserError(f"--strategy {name} needs --draft: the artifact of a smaller model with the same tokenizer")
    if plan is not None:
        check_pair(engine.artifact, draft.artifact)
        planted = PlantedModelDraft(draft, sampling)
        planted.plan = plan
        return Speculative(engine, planted, tokens, sampling)
    if name == "mixed":
        return Mixed(engine, draft, tokens, sampling)
    if name == "early" and not is_early(engine.artifact, draft.artifact):
        raise UserError(
            f"{draft.artifact.path} is not the first layers of {engine.artifact.path}; "
            "make that with python -m gpt2_tvm.decoding.early"
        )
    if usable(engine, draft, sampling):
        return DeviceSpeculative(engine, draft, tokens, sampling)
    if name == "early":
        made = with_model(engine, draft, tokens, sampling)
        return Early(engine, made.draft, tokens, sampling)
    return with_model(engine, draft, tokens, sampling)
