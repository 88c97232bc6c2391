"""Weights for artifacts that travelled without: seeded random numbers, the same on every machine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from gpt2_tvm.artifact import read_manifest
from gpt2_tvm.checkpoint import random_model
from gpt2_tvm.config import GPT2Config
from gpt2_tvm.errors import UserError
from gpt2_tvm.tensor_cache import INDEX, TensorCacheWriter

SEED = 0


def has_weights(artifact: Path) -> bool:
    """Whether there is nothing to make."""
    return (artifact / "params" / INDEX).is_file()


def fill(artifact: Path, say: Callable[[str], None] = lambda what: None) -> None:
    """Make the weights of an artifact that came without: the same numbers on every machine, once for each model and
    precision in the folder beside the artifacts."""
    from gpt2_tvm.quantization import get_scheme
    from gpt2_tvm.quantization.forms import WeightLayout
    from gpt2_tvm.quantization.storage import stored_parameters

    params = artifact / "params"
    if has_weights(artifact):
        return
    manifest = read_manifest(artifact)
    name = f"{manifest['model']}-{manifest['quantization']}"
    shared = artifact.parent / ".params" / name
    if not (shared / INDEX).is_file():
        say(f"making the weights of {name}")
        source = random_model(GPT2Config.from_json(manifest["config"]), SEED, manifest["model"])
        names = []
        with TensorCacheWriter(shared) as writer:
            for key, array in stored_parameters(
                source, get_scheme(manifest["quantization"]), WeightLayout(**manifest["layout"])
            ):
                writer.add(key, array)
                names.append(key)
        if names != manifest["params"]:
            (shared / INDEX).unlink()
            raise UserError(f"{artifact}: its parameters are not those of this version; make the kit again")
    params.unlink(missing_ok=True)  # a link to a folder that was removed
    params.symlink_to(Path("..") / ".params" / name)
