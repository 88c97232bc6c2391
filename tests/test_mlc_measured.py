"""mlc_llm as one more peer of the benchmark and of the ablation: with a stand-in (`mlc_stand_in`), and without any."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import mlc_stand_in
import numpy as np
import pytest

from gpt2_tvm.artifact import open_artifact
from gpt2_tvm.config import GPT2Config
from gpt2_tvm.engine import Engine
from gpt2_tvm.errors import UserError
from gpt2_tvm.measure import peers
from gpt2_tvm.measure.cases import Case
from gpt2_tvm.measure.session import Session
from gpt2_tvm.mlc import peer
from gpt2_tvm.mlc.library import open_library
from gpt2_tvm.mlc.lockstep import Lockstep

ROOT = Path(__file__).resolve().parents[1]
ABLATION = ("--prompt-tokens", "12", "--generate", "8", "--reference", "cpu", "--no-functions", "--repeats", "2")


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return mlc_stand_in.install(tmp_path_factory.mktemp("stand-in"))


@pytest.fixture(scope="module")
def converted(packages: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the peer makes of `tiny_model`."""
    folder = tmp_path_factory.mktemp("converted")
    with pytest.MonkeyPatch.context() as patch:
        mlc_stand_in.use(packages, patch)
        peer.build(tiny_model, folder, "model.so", "q0f32", "cpu")
    return folder


def test_without_it_one_line_says_where_it_is(tiny_artifact: Path, tiny_model: Path, tmp_path: Path) -> None:
    for command in (
        ["gpt2_tvm.benchmark", str(tiny_artifact), "--peer", "transformers,mlc_llm", "--prompt-tokens", "4"],
        ["tuning.ablation", "--model", str(tiny_model), "--records", str(tmp_path / "r.json"), "--peer", "mlc_llm"],
    ):
        done = subprocess.run(
            [sys.executable, "-m", *command, "--generate", "4"], cwd=ROOT, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 1 and done.stdout == ""
        (line,) = done.stderr.splitlines()
        assert "--peer mlc_llm: mlc_llm is not installed" in line and peer.HOW_TO_GET_IT in line


def test_lockstep_is_the_engine(converted: Path, tiny_artifact: Path) -> None:
    library = open_library(converted, "cpu", threads=1)
    random = np.random.default_rng(0)
    for batch in (1, 2):
        ours, theirs = Engine(tiny_artifact, threads=1), Lockstep(library.engine(batch, 40))
        ids, chain = (random.integers(0, 97, (batch, n)).astype(np.int32) for n in (19, 4))
        for _ in range(2):  # a second time after a reset
            ours.reset()
            theirs.reset()
            assert np.allclose(ours.prefill(ids), theirs.prefill(ids), atol=1e-4)
            assert np.array_equal(ours.decode_greedy(7), theirs.decode_greedy(7))
            ours.rewind(20)
            theirs.rewind(20)
            assert np.allclose(ours.verify(chain), theirs.verify(chain), atol=1e-4)
            assert np.allclose(ours.decode(chain[:, 0]), theirs.decode(chain[:, 0]), atol=1e-4)
        with pytest.raises(UserError, match=r"not empty; call reset"):
            theirs.prefill(ids)
    with pytest.raises(UserError, match="needs logits"):
        Lockstep(library.engine(1, 8)).decode_greedy(1)
    for batch, tokens, word in ((1, 49, "context_window_size 48"), (3, 8, "max_batch_size 2")):
        with pytest.raises(UserError, match=word):
            library.engine(batch, tokens)


def test_folders_that_are_none(converted: Path, tmp_path: Path) -> None:
    renamed, broken = (shutil.copytree(converted, tmp_path / name) for name in ("renamed", "broken"))
    index = renamed / "tensor-cache.json"
    index.write_text(index.read_text().replace("transformer.ln_f.bias", "transformer.ln_f.other"))
    with pytest.raises(UserError, match=r"has no transformer\.ln_f\.bias as model\.so wants it"):
        open_library(renamed, "cpu")
    (broken / "model.so").write_bytes(b"no library")
    with pytest.raises(UserError, match="does not load here"):
        open_library(broken, "cpu")
    (broken / "model.so").unlink()
    with pytest.raises(UserError, match="it has 0 libraries"):
        open_library(broken, "cpu")


@pytest.mark.heavy
def test_the_benchmark_times_it_beside_ours(
    packages: Path, tiny_artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlc_stand_in.use(packages, monkeypatch)
    cases = [Case(1, 9, 12), Case(2, 20, 5)]
    session = Session([tiny_artifact], cases, repeats=2, peer="mlc_llm", threads=1)
    session.run()
    result = session.result()
    assert result["complete"], result["failures"]
    assert [row.get("peer") for row in result["rows"]] == [None, "mlc_llm"] * 2
    ours, theirs = result["rows"][:2]
    assert theirs["quantization"] == "q0f32" and theirs["attention"] == "paged" and theirs["threads"] == 1
    assert theirs["decode_gb_s"] > 0 and theirs["prefill_tok_s"] > 0 and theirs["device"] == ours["device"]
    found = result["comparisons"]
    assert [(c["peer"], c["same_tokens"], c["of_tokens"]) for c in found] == [("mlc_llm", 12, 12), ("mlc_llm", 10, 10)]


@pytest.mark.heavy
def test_two_peers_in_one_run(packages: Path, tiny_artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    mlc_stand_in.use(packages, monkeypatch)
    session = Session([tiny_artifact], [Case(1, 9, 6)], repeats=2, warmups=0, peer="transformers, mlc_llm", threads=1)
    assert session.turns == 6
    session.run()
    result = session.result()
    assert [row.get("peer") for row in result["rows"]] == [None, "transformers", "mlc_llm"]
    assert [(c["peer"], c["same_tokens"]) for c in result["comparisons"]] == [("transformers", 6), ("mlc_llm", 6)]


def test_what_it_cannot_be_compared_with(packages: Path, tiny_artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlc_stand_in.use(packages, monkeypatch)
    artifact = open_artifact(tiny_artifact)
    peers.check_peer("mlc_llm", artifact)
    config: GPT2Config = artifact.config
    for changed, kind, word in (
        (replace(config, activation_function="gelu"), "cpu", "gelu_new"),
        (replace(config, scale_attn_weights=False), "cuda", "scaled attention"),
        (config, "webgpu", "web-llm alone"),
    ):
        with pytest.raises(UserError, match=word):
            peer.require_runnable("--peer mlc_llm", changed, kind, "it")
    with pytest.raises(UserError, match="names nothing"):
        Session([tiny_artifact], [Case(1, 4, 4)], peer=",")
    assert [peer.scheme_for(s) for s in ("q0f16", "q16f32", "q0bf16")] == ["q0f16", "q0f32", "q0f32"]


def ablation(folder: Path, model: Path, packages: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tuning.ablation", "--model", str(model), "--records", "r.json", *ABLATION]
    environment = mlc_stand_in.environment(packages)
    environment["PYTHONPATH"] = f"{ROOT}:{environment['PYTHONPATH']}"
    return subprocess.run(
        [*command, *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=900
    )


@pytest.mark.heavy
def test_the_ablation_has_it_as_a_row(packages: Path, tiny_model: Path, tmp_path: Path) -> None:
    done = ablation(tmp_path, tiny_model, packages, "--sets", "full", "--peer", "mlc_llm", "--format", "json")
    assert done.returncode == 0, done.stderr
    full, theirs = json.loads(done.stdout)["rows"]
    assert (full["set"], theirs["set"]) == ("full", "mlc_llm") and full["code"] != theirs["code"]
    assert theirs["status"] == "ok" and theirs["repeats"] == 2 and theirs["difference"] < 1e-4, theirs["detail"]
    assert theirs["prefill_tok_s"] > 0 and theirs["decode_tok_s"] > 0 and theirs["compile_s"] > 0
    before = (tmp_path / "r.journal.jsonl").read_bytes()
    again = ablation(tmp_path, tiny_model, packages, "--sets", "full", "--peer", "mlc_llm")
    assert again.returncode == 0 and "| mlc_llm" in again.stdout
    assert (tmp_path / "r.journal.jsonl").read_bytes() == before  # nothing was compiled or timed again


@pytest.mark.heavy
def test_the_ablation_checks_its_numbers(tiny_model: Path, tmp_path: Path) -> None:
    wrong = mlc_stand_in.install(tmp_path, wrong=True)
    done = ablation(tmp_path, tiny_model, wrong, "--sets", "full", "--peer", "mlc_llm", "--format", "json")
    assert done.returncode == 0, done.stderr
    row = json.loads(done.stdout)["rows"][1]
    assert row["status"] == "wrong-result" and row["decode_tok_s"] is None


def test_what_the_ablation_refuses(packages: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gpt2_tvm.checkpoint import resolve_model
    from targets import load_target, specialise
    from tuning.ablation_peer import require
    from tuning.ablation_work import Job

    mlc_stand_in.use(packages, monkeypatch)
    source, cpu = resolve_model(str(tiny_model)), specialise(load_target("cpu"))
    require("mlc_llm", Job("tiny", "cpu"), source, cpu)
    for name, job, word in (
        ("vllm", Job("tiny", "cpu"), "unknown --peer 'vllm'"),
        ("mlc_llm", Job("tiny", "cpu", "q8f32"), "it has no q8f32"),
        ("mlc_llm", Job("tiny", "cpu", device="rpc://h:1/k"), "this machine alone"),
    ):
        with pytest.raises(UserError, match=word):
            require(name, job, source, cpu)
