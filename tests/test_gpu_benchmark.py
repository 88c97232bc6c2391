"""benchmarks/gpu.py without a GPU: every part on the CPU with a tiny model, tables and figures from planted records,
and the kit, packed here and run from its own folder."""

from __future__ import annotations

import json
import lzma
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gpt2_tvm import Engine, UserError, compile_model
from gpt2_tvm.artifact import open_artifact, read_manifest
from gpt2_tvm.checkpoint import random_model
from gpt2_tvm.config import GPT2Config
from gpt2_tvm.measure.cases import Case
from gpt2_tvm.weights import write_hf_checkpoint

torch = pytest.importorskip("torch", reason="pip install 'gpt2-tvm[reference]'")

pytestmark = pytest.mark.usefixtures("gpu_bench")
SCRIPT = Path(__file__).parent.parent / "benchmarks" / "gpu.py"
CASE = Case(2, 6, 5)


# What a GPU machine with Python, numpy and torch has not; typer and TVM it has once a kit's lib/ is on the path.
BARE = """import importlib.machinery, sys
GONE = ("tokenizers", "transformers", "psutil", "safetensors", "matplotlib", "huggingface_hub", "rich", "click")
def find_spec(name, path=None, target=None, find=importlib.machinery.PathFinder.find_spec):
    brought = any(folder.endswith("/lib") for folder in sys.path)
    top = name.partition(".")[0]
    return None if top in GONE[:6] or (top in ("typer", "tvm", *GONE) and not brought) else find(name, path, target)
importlib.machinery.PathFinder.find_spec = find_spec
"""


def command(
    *arguments: str | Path,
    script: Path = SCRIPT,
    fails: bool = False,
    bare: Path | None = None,
    cwd: Path | None = None,
) -> str:
    """Run it. bare: a folder with a sitecustomize.py that takes packages away."""
    environment = {**os.environ, **({"PYTHONPATH": str(bare)} if bare is not None else {})}
    done = subprocess.run(
        [sys.executable, script, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
        cwd=cwd,
    )
    assert bool(done.returncode) == fails, done.stderr[-2000:]
    return done.stderr if fails else done.stdout


# ---- torch


def test_torchs_model_is_the_same_model(gpu_kit: Path) -> None:
    from gpu_bench.torch_gpt2 import TorchGPT2

    path = gpu_kit / "artifacts" / "tiny-q0f32-full"
    engine, ids = Engine(path), np.arange(10).reshape(2, 5) * 7 % 97
    with torch.inference_mode():
        model = TorchGPT2.load(open_artifact(path), 2, 8, torch.float32, "cpu")
        places = torch.arange(8)
        np.testing.assert_allclose(model(torch.from_numpy(ids), places[:5]).numpy(), engine.prefill(ids), atol=2e-5)
        for at, token in ((5, 3), (6, 90)):
            wanted = model(torch.full((2, 1), token), places[at : at + 1]).numpy()
            np.testing.assert_allclose(wanted, engine.decode([token, token]), atol=2e-5)


def test_both_subjects_give_the_same_tokens(gpu_kit: Path) -> None:
    from gpu_bench.subjects import Ours, Torch

    path = str(gpu_kit / "artifacts" / "tiny-q0f32-full")
    mine, theirs = Ours(path, None, None, [CASE]).turn(CASE), Torch(path, "cpu", "eager", [CASE]).turn(CASE)
    assert mine.tokens == theirs.tokens and len(mine.tokens[0]) == 5
    assert min(mine.prefill_s, mine.decode_s, theirs.prefill_s, theirs.decode_s) > 0
    with pytest.raises(UserError, match="has no CUDA graphs"):
        Ours(path, None, True, [CASE])


def test_a_missing_weight_is_named(gpu_kit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gpu_bench import torch_gpt2

    every = torch_gpt2.artifact_weights
    monkeypatch.setattr(torch_gpt2, "artifact_weights", lambda a: (w for w in every(a) if "ln_f" not in w[0]))
    with pytest.raises(RuntimeError, match=r"lacks ln_f.bias, ln_f.weight"):
        torch_gpt2.TorchGPT2.load(open_artifact(gpu_kit / "artifacts" / "tiny-q0f32-full"), 1, 8, torch.float32, "cpu")


# ---- the parts, as commands


@pytest.mark.heavy
def test_every_part_on_a_cpu(gpu_kit: Path, tmp_path: Path) -> None:
    results = tmp_path / "results"
    common = ("--kit", gpu_kit, "--results", results)
    small = ("--prompt-tokens", 6, "--generate", 5, "--repeats", 2, "--device", "cpu")
    printed = command("machine", "--results", results, "--device", "cpu", "--repeats", 2, "--copy-mb", 4, "--edge", 64)
    assert "copy gb" in printed
    printed = command("correctness", *common)
    assert "tiny-q0f32-full" in printed and "ok" in printed
    command("ours", *common, *small, "--model", "tiny", "--quantization", "q0f32", "--batch", "1,2")
    command("peers", *common, *small, "--model", "tiny", "--quantization", "q0f32", "--modes", "eager")
    printed = command(
        "sizes",
        *common,
        *small,
        "--models",
        "tiny",
        "--quantization",
        "q0f32",
        "--modes",
        "",
        "--then",
        "",
        "--batch",
        "2",
    )
    rows = json.loads((results / "peers.json").read_text())["rows"]
    assert [row["engine"] for row in rows] == ["tiny-q0f32-full, plain", "torch eager"]
    assert rows[1]["same_ids"] == 5 and rows[0]["floor_from"] == "measured copy" and rows[0]["floor_share"] > 0
    assert rows[0]["launches_a_token"] == rows[0]["kernels_a_token"]  # no graph on a CPU
    assert {row["batch"] for row in json.loads((results / "ours.json").read_text())["rows"]} == {1, 2}
    for title in ("What each step brings", "Beside torch", "Every size", "Logits beside torch"):
        assert title in printed
    figures = tmp_path / "figures"
    command("report", "--results", results, "--figures", figures, "--output", tmp_path / "report.md")
    assert sorted(p.name for p in figures.iterdir()) == ["gpu-ours.png", "gpu-peers.png", "gpu-sizes.png"]
    assert (tmp_path / "report.md").read_text() == printed


def test_what_cannot_be_run_is_said_in_a_line(gpu_kit: Path, tmp_path: Path) -> None:
    assert "no gpt2 q0f16 in" in command(
        "ours", "--kit", gpu_kit, "--results", tmp_path, "--quantization", "q0f16", fails=True
    )
    assert "holds no results" in command("report", "--results", tmp_path / "none", fails=True)
    if not torch.cuda.is_available():
        assert "no NVIDIA GPU" in command("machine", "--results", tmp_path, fails=True)


# ---- the report, from planted records


def planted(**changes: Any) -> dict[str, Any]:
    row = {
        "engine": "gpt2-q0f16-full, graph",
        "artifact": "gpt2-q0f16-full",
        "kind": "ours",
        "how": "graph",
        "model": "gpt2",
        "quantization": "q0f16",
        "batch": 1,
        "prompt_tokens": 322,
        "generate_tokens": 64,
        "repeats": 7,
        "prefill_tok_s": 250_000.0,
        "prefill_tok_s_sd": 900.0,
        "decode_tok_s": 9000.0,
        "decode_tok_s_sd": 30.0,
        "step_time_us": 111.1,
        "floor_tok_s": 18_000.0,
        "floor_share": 0.5,
        "floor_from": "measured copy",
        "same_ids": 64,
        "date": "2026-01-01T00:00:00+00:00",
        "device": "Planted GPU",
        "kernels_a_token": 63,
        "launches_a_token": 1,
    }
    return {**row, **changes}


def test_the_report_of_planted_records(tmp_path: Path) -> None:
    from gpu_bench.report import draw, render

    torch_row = planted(
        engine="torch eager", kind="torch", how="eager", decode_tok_s=900.0, floor_share=0.05, same_ids=60
    )
    torch_row |= {"launches_a_token": 140, "kernels_a_token": 140}
    failure = planted(engine="torch max-autotune", failure="timeout", message="planted")
    result = {"complete": False, "failures": [failure], "date": "2026-01-02"}
    (tmp_path / "peers.json").write_text(json.dumps({**result, "rows": [torch_row, planted()]}))
    for batch in (1, 4):
        rows = [planted(batch=batch), planted(batch=batch, generate_tokens=512, kind="torch")]
        (tmp_path / f"sizes-gpt2-{batch}.json").write_text(json.dumps({**result, "rows": rows}))
    text = render(tmp_path)
    peers, sizes = text.split("#### Every size")
    lines = [line for line in peers.splitlines() if line.startswith("| gpt2 q0f16")]
    assert ["graph" in lines[0], "torch eager" in lines[1]] == [True, True]  # the fastest first
    assert "50%" in lines[0] and "| 1 |" in " ".join(lines[0].split()) and "60 of 64" in lines[1]
    assert (
        "Failed (timeout): torch max-autotune of gpt2-q0f16-full, 1 x 322 + 64: planted" in peers
        and "the same command goes on" in peers
    )
    assert sizes.count("| gpt2 q0f16") == 4
    made = draw(tmp_path, tmp_path / "figures")
    assert [path.name for path in made] == ["gpu-peers.png", "gpu-sizes.png"]
    assert all(path.stat().st_size > 10_000 for path in made)


# ---- the kit


def test_every_step_of_ours_has_an_artifact() -> None:
    from gpu_bench.kit import VARIANTS, jobs_of

    def named(target: str, q: str) -> list[str]:
        return [f"{model} {variant}" for model, _, variant in jobs_of(["gpt2", "gpt2-xl"], [q], target, "gpt2", True)]

    every = [f"gpt2 {variant}" for variant in VARIANTS]
    assert "gpt2 persistent" in every
    assert named("h200", "q0f16") == [
        *every,
        *("gpt2-xl wgmma", "gpt2-xl full", "bundled persistent", "bundled full"),
    ]
    assert named("h200", "q0f32") == [n for n in named("h200", "q0f16") if not n.endswith((" tensor", " wgmma"))]
    assert named("a100", "q0f16") == [n for n in named("h200", "q0f16") if not n.endswith(" wgmma")]
    for without in (named("h200", "q8f16"), named("t4", "q0f16")):  # the kernel of a whole step declines both
        assert not any("persistent" in name for name in without) and "bundled full" in without
    assert "gpt2 late" in every and "gpt2 late" not in named("h200", "q8f16")  # packed weights are not loaded early
    assert VARIANTS["persistent"][0] == "with-persistent"


def test_artifacts_go_by_their_models_and_by_their_folders_names(tmp_path: Path) -> None:
    """The bundled model has a name of its own in its manifest."""
    from gpu_bench.runs import find_artifacts

    for folder, model in (("bundled-q0f16-full", "austen-target"), ("gpt2-q0f16-full", "gpt2"), ("gpt2-xl-q0f16", "x")):
        (tmp_path / "artifacts" / folder).mkdir(parents=True)
        manifest = json.dumps({"model": model, "quantization": "q0f16"})
        (tmp_path / "artifacts" / folder / "manifest.json").write_text(manifest)
    for asked in ("bundled", "austen-target"):
        assert [path.name for path in find_artifacts(tmp_path, asked)] == ["bundled-q0f16-full"]
    assert [path.name for path in find_artifacts(tmp_path, "gpt2", "q0f16")] == ["gpt2-q0f16-full"]
    with pytest.raises(UserError, match="no bundled q0f32"):
        find_artifacts(tmp_path, "bundled", "q0f32")


def test_each_variant_is_one_step_away_from_none() -> None:
    from gpu_bench.kit import VARIANTS

    from gpt2_tvm.schedules.registry import rule_set
    from targets import load_target

    target = load_target("h200")
    rules = {name: set(rule_set(text, target)) for name, (text, _) in VARIANTS.items()}
    steps = {
        name: rules[name] - rules["stock"] | ({"flash"} if VARIANTS[name][1] == "flash" else set()) for name in VARIANTS
    }
    assert all(rules["stock"] <= found for found in rules.values())
    alone = {"attention": "flash", "wide": "wide-gemv", "norm": "norm-gemv", "tensor": "tensor-matmul"}
    assert not steps["stock"] and {name: steps[name] for name in alone} == {name: {s} for name, s in alone.items()}
    assert set(alone.values()) <= steps["full"] and steps["persistent"] == steps["full"] | {"persistent"}
    assert steps["wgmma"] == steps["full"] | {"wgmma-matmul"}
    assert steps["late"] == steps["full"] | {"late-norm-gemv"} and VARIANTS["late"][0].startswith("with-")


@pytest.mark.heavy
def test_a_kit_runs_from_its_own_folder(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Code without weights travels; the machine makes them, and its numbers are those of the same seed here. There
    are neither tokenizers nor anything else that is here beside numpy and torch."""
    from gpu_bench import kit as kits
    from gpu_bench.unpacking import unpacked

    from gpt2_tvm import pack

    # quick: test_pack.py measures how small it gets
    monkeypatch.setattr(pack, "_CODE", [{"id": lzma.FILTER_X86}, {"id": lzma.FILTER_LZMA2, "preset": 0}])
    output = tmp_path / "kit.tar.xz"
    kits.build(output, [str(tiny_model)], ["q0f32"], "cpu", (1,), None, True, None, lambda what, share: None)
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "sitecustomize.py").write_text(BARE)
    there = unpacked(output)
    assert unpacked(output) == there and there.parent == output.parent and there.name.startswith("kit-")
    path, trained = sorted((there / "artifacts").iterdir(), key=lambda p: "bundled" in p.name)
    assert (trained / "tokenizer").is_dir()
    assert not (path / "params").exists() and not list(there.rglob("libtvm_compiler*"))
    printed = command("correctness", "--results", tmp_path / "results", script=there / "gpu.py", bare=bare)
    assert printed.count(" ok ") == 2
    small = ("--results", tmp_path / "results", "--model", "tiny", "--quantization", "q0f32", "--device", "cpu")
    assert "LM head of" in command("kernels", *small, "--repeats", 2, script=there / "gpu.py", bare=bare)
    assert "stretches" in command("replays", *small, "--count", 100, script=there / "gpu.py", bare=bare)
    # outside of it there is no typer and no TVM either: the benchmark goes on in the packed kit
    printed = command("report", "--kit", output, "--results", tmp_path / "results", bare=bare)
    assert "Replays of the decode graph" in printed
    manifest = read_manifest(path)
    assert manifest["random_weights"] and (path / "params").is_symlink()
    config = GPT2Config.from_json(manifest["config"])
    seeded = write_hf_checkpoint(tmp_path / "seeded", config, random_model(config, seed=manifest["seed"]))
    here = compile_model(str(seeded), "cpu", output=tmp_path / "here", rules="baseline")
    np.testing.assert_allclose(Engine(path).prefill([1, 2, 3]), Engine(here).prefill([1, 2, 3]), atol=1e-5)
    (there / "kit.json").write_text('{"python": "2.7"}')
    assert "this kit is for Python 2.7" in command("machine", script=there / "gpu.py", fails=True)


def test_wheels_of_another_python(tmp_path: Path) -> None:
    import zipfile

    from gpu_bench import kit as kits

    for name, tag, inside in (
        (
            "apache_tvm-0.27.0",
            "py3-none",
            ("tvm/__init__.py", "tvm/lib/libtvm_compiler.so", "tvm/lib/libtvm_runtime.so"),
        ),
        ("apache_tvm_ffi-0.1.14", "cp312-cp312", ("tvm_ffi/core.abi3.so", "tvm_ffi/include/a.h")),
        ("ml_dtypes-0.5.3", "cp312-cp312", ("ml_dtypes/__init__.py",)),
    ):
        with zipfile.ZipFile(tmp_path / f"{name}-{tag}-linux_x86_64.whl", "w") as wheel:
            for file in inside:
                wheel.writestr(file, b"planted")
    found = {member.path for member in kits._libraries(tmp_path)}
    assert {"lib/tvm/lib/libtvm_runtime.so", "lib/tvm_ffi/core.abi3.so", "lib/gpt2_tvm/engine.py"} < found
    assert not any("tvm_compiler" in path or "tvm_ffi/include" in path for path in found)
    assert json.loads(kits._about(tmp_path)) == {"python": "3.12"}
    (tmp_path / "apache_tvm_ffi-0.1.14-cp312-cp312-linux_x86_64.whl").unlink()
    with pytest.raises(UserError, match="lacks apache_tvm_ffi"):
        list(kits._libraries(tmp_path))
