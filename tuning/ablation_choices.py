"""What the options of `python -m tuning.ablation` choose, checked and resolved."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpt2_tvm.errors import UserError

if TYPE_CHECKING:
    from targets import DeviceTarget
    from tuning.ablation_work import Job
    from tuning.variants import Variant

RUNNERS = ("auto", "vm", "wgpu", "node", "chromium")


class Choices:
    """The choices of a command line, checked and resolved."""

    def __init__(
        self,
        model: str,
        target: str,
        quantization: str,
        attention: str,
        seed: int,
        names: Sequence[str] | None,
        full_factorial: bool,
        extra: Sequence[str],
        factors: Sequence[str] | None,
        passes: bool,
        runner: str,
    ) -> None:
        from gpt2_tvm.build import make_plan
        from gpt2_tvm.checkpoint import resolve_model
        from gpt2_tvm.quantization import get_scheme
        from targets import load_target, specialise
        from tuning.variants import cells, pass_cells, pass_variants, variants
        from tuning.variants import factors as every_factor

        self.target: DeviceTarget = specialise(load_target(target))
        wanted = ("wgpu", "node", "chromium") if self.target.kind == "webgpu" else ("vm",)
        if runner not in RUNNERS:
            raise UserError(f"unknown --runner {runner!r}; choose {', '.join(RUNNERS)}")
        if runner not in ("auto", *wanted):
            takes = " or ".join(wanted)
            raise UserError(f"--runner {runner} cannot run code for {self.target.name}; that takes {takes}")
        if passes and extra:
            raise UserError("--rule and --passes: rules stay as they are while passes are toggled; give one of them")
        self.extra = tuple(extra)
        self.plain: list[Variant]
        self.variants: list[Variant]
        self.toggles = "passes" if passes else "rules"
        if passes:
            scaled = get_scheme(quantization).widened
            self.plain = pass_variants(self.target, names, False, scaled)
            self.variants = pass_variants(self.target, names, full_factorial, scaled, factors)
            self.design = pass_cells(self.target, scaled, factors)
        else:
            self.plain = variants(self.target, names, False, self.extra)
            self.variants = variants(self.target, names, full_factorial, self.extra, factors)
            self.design = cells(self.target, self.extra, factors)
            if full_factorial and factors is None:
                left = sorted(set(every_factor(self.target, self.extra)) - set().union(*self.design.values()))
                if left:
                    print(
                        f"note: --full-factorial leaves {', '.join(left)} off; --factors crosses others",
                        file=sys.stderr,
                    )
        self.source = resolve_model(model, seed=seed)
        make_plan(self.source.config, self.target, quantization, "full", attention)  # refuses what it does not know

    def add_peer(self, name: str, job: Job, static: bool) -> None:
        """One more set, of somebody else's making. UserError where it cannot be had."""
        from tuning.ablation_peer import VARIANT, require

        if static:
            raise UserError(f"--peer {name}: it is timed, and --static times nothing; leave out one of them")
        require(name, job, self.source, self.target)
        self.variants.append(VARIANT)

    def result(self, journal: Any) -> dict[str, Any]:
        from tuning.ablation_results import result

        return result(journal, self.variants, self.target, self.extra, self.design)

    def recorded(self, file: Path, attention: str, quantization: str) -> dict[str, Any]:
        """What the records hold: of the journal where there is one, else of the result that was kept without it.
        UserError where they are of something else than these choices."""
        from tuning.ablation_records import Journal
        from tuning.ablation_results import read_result

        if not journal_of(file).exists() and file.is_file():
            found = read_result(file, "--records")
        else:
            found = self.result(Journal.read(journal_of(file)))
        held = {"toggles": "rules", **{key: value for key, value in found["identity"].items() if value is not None}}
        asked = {"model": self.source.name, "target": self.target.name, "quantization": quantization}
        for option, value in {**asked, "attention": attention, "toggles": self.toggles}.items():
            if held.get(option) != value:
                raise UserError(
                    f"{file} holds {option} {held.get(option)}, not {value}; say so, or give other --records"
                )
        return found


def names_in(option: str, text: str | None) -> list[str] | None:
    """What an option lists with commas between. UserError for nothing but commas."""
    names = None if text is None else [name.strip() for name in text.split(",") if name.strip()]
    if names == []:
        raise UserError(f"{option} {text!r} names nothing; leave it out, or give names with commas between")
    return names


def journal_of(file: Path) -> Path:
    """The journal that stands beside a result."""
    return file.with_suffix(".journal.jsonl")


def where_of(target: DeviceTarget, device: str | None, tracker: str | None, key: str | None) -> str | None:
    """The device as `Engine` takes it."""
    if (tracker is None) != (key is None):
        raise UserError("--tracker HOST:PORT and --key KEY go together: give both, or neither")
    if tracker is None:
        return device
    if device is not None:
        raise UserError(f"--device {device} and --tracker {tracker}: give one of them; a worker has one device")
    if target.kind == "webgpu":
        raise UserError("--tracker: TVM's RPC workers cannot run webgpu; run this where the device is")
    return f"rpc://{tracker}/{key}"


def pair_of(compare: str | None) -> tuple[str, str] | None:
    if compare is None:
        return None
    parts = [part.strip() for part in compare.split(",")]
    if len(parts) != 2 or not all(parts):
        raise UserError(f"--compare {compare}: give two sets with a comma between, such as baseline,full")
    return parts[0], parts[1]
