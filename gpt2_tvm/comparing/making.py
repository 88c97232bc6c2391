"""The artifacts to compare, compiled where the cache lacks them.

A folder of the cache is called MODEL-SCHEME-TARGET-DIGEST, the digest being of all that decides what is in it: weights,
configuration, target, sizes, this project's sources. So a folder that is there is the right one, and a run that was
stopped goes on where it was.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpt2_tvm.artifact import open_artifact
from gpt2_tvm.checkpoint import resolve_model
from gpt2_tvm.errors import UserError

if TYPE_CHECKING:
    from gpt2_tvm.build import Progress
    from gpt2_tvm.config import GPT2Config
    from targets import DeviceTarget

CACHE = Path("artifacts") / "compare"


def schemes_for(config: GPT2Config, target: DeviceTarget) -> list[str]:
    """The names of the schemes that this model can be compiled in for this target."""
    from gpt2_tvm.build import make_plan
    from gpt2_tvm.quantization import SCHEMES

    found = []
    for name in SCHEMES:
        try:
            make_plan(config, target, name)
        except UserError:
            continue
        found.append(name)
    return found


def check_schemes(config: GPT2Config, target: DeviceTarget, wanted: Sequence[str]) -> None:
    """Refuse, in one line that names what there is, schemes that are unknown or that the target lacks."""
    present = schemes_for(config, target)
    lacking = [name for name in wanted if name not in present]
    if lacking:
        raise UserError(
            f"--schemes {','.join(lacking)}: {target.name} has {', '.join(present)}; leave the others out, or choose "
            "another --target"
        )


def make_artifacts(
    model: str,
    target: str,
    schemes: Sequence[str],
    batch_sizes: Iterable[int],
    cache: Path,
    *,
    max_seq_len: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[Path]:
    """One artifact a scheme, in that order; those that the cache lacks are compiled.

    Args as for `compile_model`; cache: the folder that holds them. Raises UserError for a scheme that the target lacks
    before anything is compiled.
    """
    from gpt2_tvm.build import compile_model, versions
    from targets import load_target, specialise
    from tuning.ablation_cache import digest, sources, weights_identity

    say = progress or (lambda what, share: None)
    source = resolve_model(model, seed=seed)
    if source.note:
        say(source.note, 0.0)
    device = specialise(load_target(target))
    check_schemes(source.config, device, schemes)
    sizes = tuple(sorted(set(batch_sizes)))
    made_of: dict[str, Any] = {
        "weights": weights_identity(source),
        "config": json.loads(source.config.to_json()),
        "target": device.to_json(),
        "sizes": [sizes, max_seq_len],
        "made by": [versions(), sources(target=Path(target) if Path(target).suffix == ".toml" else None)],
    }
    paths = []
    for i, scheme in enumerate(schemes):
        folder = cache / f"{source.name}-{scheme}-{device.name}-{digest({**made_of, 'scheme': scheme})}"
        paths.append(folder)
        if _is_whole(folder):
            say(f"{scheme}: already in {cache}", max(0.01, i / len(schemes)))
            continue

        def part(what: str, share: float, scheme: str = scheme, i: int = i) -> None:
            if 0 < share < 1:  # notes were told above; the end of one is not the end of all
                say(f"{scheme}: {what}", (i + share) / len(schemes))

        compile_model(
            model, target, scheme, folder, batch_sizes=sizes, max_seq_len=max_seq_len, seed=seed, progress=part
        )
    return paths


def _is_whole(folder: Path) -> bool:
    try:
        open_artifact(folder, verify=False)
    except UserError:
        return False
    return True
