"""A small GPT-2 that learns a larger one's next tokens: knowledge distillation on the larger one's own text.

After Hinton, Vinyals and Dean 2015, "Distilling the Knowledge in a Neural Network", and Zhou et al. 2024,
"DistillSpec": a draft for speculation gains most from text that the target itself writes. The loss at each place is the
cross entropy with the target's KEPT likeliest tokens (their shares made to add up to 1), and once more with the
likeliest one alone, which is what greedy speculation asks for; places before a greedy token count in full, others by
`LOOSE_WEIGHT`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gpt2_tvm.config import GPT2Config
from gpt2_tvm.files import replacing_file

if TYPE_CHECKING:
    from gpt2_tvm.training.texts import Texts

HARD = 0.5  # weight of the likeliest token alone
LOOSE_WEIGHT = 0.4
WARM_STEPS, LAST_RATE = 100, 0.02  # of the learning rate: linear at first, then a cosine down to this share
STATE_EVERY = 200  # steps between two saved states
REPORT_EVERY = 50
Say = Callable[[str, float], None]


@dataclass(frozen=True)
class Course:
    """How to train. steps: of `rows` texts each; rate: the highest learning rate; seed: of all chance."""

    steps: int
    rows: int = 8
    rate: float = 3e-3
    seed: int = 0

    def rate_at(self, step: int) -> float:
        """The learning rate of a step."""
        warm = min(1.0, (step + 1) / WARM_STEPS)
        return self.rate * warm * (LAST_RATE + (1 - LAST_RATE) * 0.5 * (1 + math.cos(math.pi * step / self.steps)))


def train(config: GPT2Config, texts: Texts, held: Texts, course: Course, state: Path, say: Say) -> tuple[Any, float]:
    """Train a student.

    Args:
        config: the student's shape; its vocabulary is the texts'.
        texts, held: to learn from, and to be judged by.
        state: a file that the state is kept in now and then; training goes on from it where it exists.

    Returns transformers' GPT2LMHeadModel, and the share of the held texts' greedy tokens that it finds.
    """
    import torch

    torch.manual_seed(course.seed)
    model = new_student(config)
    optimizer = make_optimizer(model.parameters(), course.rate)
    done = 0
    if state.is_file():
        kept = torch.load(state, weights_only=True)
        model.load_state_dict(kept["model"])
        optimizer.load_state_dict(kept["optimizer"])
        done = int(kept["step"])
    mean = 0.0
    for step in range(done, course.steps):
        for group in optimizer.param_groups:
            group["lr"] = course.rate_at(step)
        rows = np.random.default_rng([course.seed, step]).integers(0, len(texts), course.rows)
        loss = distillation_loss(model, texts, rows)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        mean = 0.98 * mean + 0.02 * loss.item() if step > done else loss.item()
        if (step + 1) % REPORT_EVERY == 0:
            say(f"training: step {step + 1} of {course.steps}, loss {mean:.3f}", (step + 1) / course.steps)
        if (step + 1) % STATE_EVERY == 0:
            with replacing_file(state) as file:
                torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}, file)
    return model, agreement(model, held)


def new_student(config: GPT2Config) -> Any:
    """A GPT2LMHeadModel of this shape with random weights, without dropout: its text is never seen twice as a rule."""
    from transformers import GPT2Config as HfConfig
    from transformers import GPT2LMHeadModel

    shape = {name: getattr(config, name) for name in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head")}
    return GPT2LMHeadModel(HfConfig(**shape, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))


def make_optimizer(parameters: Iterator[Any], rate: float) -> Any:
    """AdamW; matrices decay, vectors do not."""
    import torch

    all_ = list(parameters)
    groups = [
        {"params": [p for p in all_ if p.dim() > 1], "weight_decay": 0.05},
        {"params": [p for p in all_ if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95))


def distillation_loss(model: Any, texts: Texts, rows: np.ndarray) -> Any:
    """The loss over some texts, a scalar tensor."""
    import torch

    ids = torch.from_numpy(texts.ids[rows].astype(np.int64))
    top = torch.from_numpy(texts.top[rows].astype(np.int64))[:, :-1]
    shares = torch.from_numpy(texts.shares[rows].astype(np.float32))[:, :-1]
    strict = torch.from_numpy(texts.greedy[rows])[:, 1:]
    weight = torch.where(strict, 1.0, LOOSE_WEIGHT)
    logs = torch.log_softmax(model(ids[:, :-1]).logits, dim=-1).gather(-1, top)
    soft = (shares / shares.sum(-1, keepdim=True) * logs).sum(-1)
    return -((soft + HARD * logs[..., 0]) * weight).sum() / weight.sum()


def agreement(model: Any, texts: Texts) -> float:
    """The share of greedy tokens that the student's most likely token is, over all texts."""
    import torch

    right = total = 0
    with torch.no_grad():
        for row in range(0, len(texts), 8):
            ids = torch.from_numpy(texts.ids[row : row + 8].astype(np.int64))
            best = model(ids[:, :-1]).logits.argmax(-1)
            strict = torch.from_numpy(texts.greedy[row : row + 8])[:, 1:]
            right += int((best == ids[:, 1:])[strict].sum())
            total += int(strict.sum())
    return right / max(1, total)


def weights_of(model: Any, config: GPT2Config) -> Iterator[tuple[str, np.ndarray]]:
    """A GPT2LMHeadModel's parameters under our names and in our shapes (linear layers [out, in])."""
    from gpt2_tvm.weights import expected_tensors

    held = model.state_dict()
    for name, shape in expected_tensors(config).items():
        array = held[name].detach().float().numpy()
        linear = len(shape) == 2 and ".h." in name  # Conv1D: stored [in, out]
        yield name, array.T if linear else array
