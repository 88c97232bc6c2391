"""A checkpoint in transformers, trained a step at a time.

A pruned one is trained at full width: what was cut is zeros, and zeros stay zeros, because every step ends by putting
them back. So one model of transformers' serves all, and what comes out has the shape that went in.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gpt2_tvm.checkpoint import ModelSource
from gpt2_tvm.errors import UserError
from gpt2_tvm.files import replacing_file
from gpt2_tvm.finetuning.corpus import Corpus
from gpt2_tvm.pruning.blocks import expanded, narrowed, whole_config
from gpt2_tvm.pruning.cut import kept_lists
from gpt2_tvm.pruning.magnitude import is_matrix
from gpt2_tvm.weights import KEPT, iter_weights

CONV1D = (".c_attn.weight", ".c_proj.weight", ".c_fc.weight")  # which torch holds the other way round
LAST_RATE = 0.1  # the learning rate ends at this share of the highest


@dataclass(frozen=True)
class Settings:
    """How to train.

    steps: of the optimizer, each of `batch` x `accumulate` sequences of `context` tokens; rate: the highest learning
    rate, reached after `warmup` steps, then a cosine down to a tenth of it; keep_zeros: weights of the blocks' matrices
    that are zero stay zero; windows: of the validation text, at the most; seed: of all chance.
    """

    steps: int = 200
    batch: int = 4
    accumulate: int = 1
    context: int = 256
    rate: float = 5e-5
    warmup: int = 10
    decay: float = 0.01
    dropout: float = 0.1
    keep_zeros: bool = True
    windows: int = 40
    seed: int = 0

    def check(self, source: ModelSource) -> None:
        """UserError, in one line, for what cannot be."""
        for name, least in (("steps", 0), ("batch", 1), ("accumulate", 1), ("warmup", 0), ("windows", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise UserError(f"--{name} {getattr(self, name)}: give at least {least}")
        if not 2 <= self.context <= source.config.n_positions:
            most = source.config.n_positions
            raise UserError(f"--context {self.context}: {source.name} has positions for 2 to {most} tokens")
        if not (self.rate > 0 and math.isfinite(self.rate)):
            raise UserError(f"--rate {self.rate:g}: give a positive learning rate, such as 5e-5")
        if not 0 <= self.dropout < 1 or not self.decay >= 0:
            raise UserError(f"--dropout {self.dropout:g} --decay {self.decay:g}: a share below 1, and 0 or more")

    def rate_at(self, step: int) -> float:
        """The learning rate of a step, from 0."""
        warm = min(1.0, (step + 1) / (self.warmup + 1))
        return (
            self.rate * warm * (LAST_RATE + (1 - LAST_RATE) * 0.5 * (1 + math.cos(math.pi * step / max(1, self.steps))))
        )


class Trainer:
    """A model, its optimizer, and where they are.

    Args:
        source: a trained checkpoint, pruned or not.
        corpus: what to learn from and be judged by.
        settings: see `Settings`; checked by the caller.
        device: torch's name of it.

    Attributes: step, how many have been done.
    """

    def __init__(self, source: ModelSource, corpus: Corpus, settings: Settings, device: str = "cpu") -> None:
        import torch
        import transformers

        transformers.utils.logging.set_verbosity_error()
        self.torch, self.source, self.corpus, self.settings, self.step = torch, source, corpus, settings, 0
        self.config = source.config
        torch.manual_seed(settings.seed)
        whole = whole_config(source.config)
        share = settings.dropout
        values = {**json.loads(whole.to_json()), "resid_pdrop": share, "embd_pdrop": share, "attn_pdrop": share}
        model: Any = transformers.GPT2LMHeadModel(transformers.GPT2Config(**values))
        self.model = model.to(device)
        self.device = self.model.device
        self._parameters = dict(self.model.named_parameters())
        self._load(expanded(source.config, iter_weights(source, "float32")))
        self._masks = self._find_masks()
        matrices = [p for p in self._parameters.values() if p.dim() > 1]
        vectors = [p for p in self._parameters.values() if p.dim() <= 1]
        groups = [{"params": matrices, "weight_decay": settings.decay}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=settings.rate, betas=(0.9, 0.95))

    def _load(self, weights: Iterator[tuple[str, np.ndarray]]) -> None:
        with self.torch.no_grad():
            for name, array in weights:
                turned = array.T if name.endswith(CONV1D) else array
                self._parameters[name].copy_(self.torch.from_numpy(np.ascontiguousarray(turned)))

    def _find_masks(self) -> dict[str, Any]:
        """What may not change: parameters that were cut, and zeros of matrices; 1 where a parameter lives."""
        ones = (
            (name, array if name.endswith(KEPT) else np.ones_like(array))
            for name, array in iter_weights(self.source, "float32")
        )
        masks = {}
        for (name, alive), (_, array) in zip(
            expanded(self.config, ones), expanded(self.config, iter_weights(self.source, "float32")), strict=True
        ):
            if self.settings.keep_zeros and is_matrix(name, array):
                alive = alive * (array != 0)
            if not alive.all():
                turned = np.ascontiguousarray(alive.T if name.endswith(CONV1D) else alive)
                masks[name] = self.torch.from_numpy(turned.astype(bool)).to(self.device)
        return masks

    def train_step(self) -> float:
        """One step of the optimizer -> the mean loss of its sequences, in nats a token."""
        torch, s = self.torch, self.settings
        self.model.train()
        ids = self.corpus.batch(self.step, s.seed, s.batch * s.accumulate, s.context)
        total = 0.0
        for part in ids.reshape(s.accumulate, s.batch, s.context):
            x = torch.from_numpy(part).to(self.device)
            loss = self.model(x, labels=x).loss / s.accumulate
            loss.backward()
            total += float(loss.detach())
        if not math.isfinite(total):
            raise UserError(f"the loss became {total} at step {self.step}; choose a smaller --rate than {s.rate:g}")
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = s.rate_at(self.step)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for name, mask in self._masks.items():
                self._parameters[name].mul_(mask)
        self.step += 1
        return total

    def validate(self) -> float:
        """The validation loss in nats a token: windows of `context` tokens, each predicted from its own first token."""
        torch = self.torch
        self.model.eval()
        total, count = 0.0, 0
        with torch.no_grad():
            for window in self.corpus.windows(self.settings.context, self.settings.windows):
                x = torch.from_numpy(window)[None].to(self.device)
                total += float(self.model(x, labels=x).loss) * (len(window) - 1)
                count += len(window) - 1
        return total / count

    def weights(self) -> Iterator[tuple[str, np.ndarray]]:
        """Every parameter in our names and shapes (`weights.expected_tensors`), float32, as pruned as it came."""

        def whole() -> Iterator[tuple[str, np.ndarray]]:
            for name, parameter in self._parameters.items():
                array = parameter.detach().cpu().numpy()
                yield name, np.ascontiguousarray(array.T) if name.endswith(CONV1D) else array

        return narrowed(self.config, kept_lists(self.source), whole())

    def save_state(self, path: Path, identity: dict[str, Any]) -> None:
        """Write where training is, beside and renamed. identity: what `load_state` will compare."""
        state = {
            "identity": json.dumps(identity, sort_keys=True),
            "step": self.step,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "random": self.torch.get_rng_state(),
            "random_cuda": self.torch.cuda.get_rng_state_all() if self.torch.cuda.is_available() else [],
        }
        with replacing_file(path) as file:
            self.torch.save(state, file)

    def load_state(self, path: Path, identity: dict[str, Any]) -> bool:
        """Go on from a saved state; False where there is none. UserError for one that is damaged or another run's."""
        if not path.is_file():
            return False
        try:
            state = self.torch.load(path, map_location="cpu", weights_only=True)
            same = state["identity"] == json.dumps(identity, sort_keys=True)
        except Exception:  # what a damaged file raises depends on where the damage is
            raise UserError(f"{path} is damaged; remove it to train from the beginning") from None
        if not same:
            raise UserError(
                f"{path} is of a run with other weights, texts or settings; choose another --output, or remove it"
            )
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.torch.set_rng_state(state["random"])
        if state["random_cuda"] and self.torch.cuda.is_available():
            self.torch.cuda.set_rng_state_all(state["random_cuda"])
        self.step = int(state["step"])
        return True
