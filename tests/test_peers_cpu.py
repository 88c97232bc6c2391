"""benchmarks/peers_cpu.py: its GGUF files, tables and verdict, engines that fail, and the peers' greedy ids."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from statistics import stdev
from typing import Any

import numpy as np
import pytest

from gpt2_tvm.checkpoint import random_model, resolve_model
from gpt2_tvm.config import GPT2Config
from gpt2_tvm.errors import UserError
from gpt2_tvm.measure.cases import Case, Sample
from gpt2_tvm.weights import iter_weights

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
if str(BENCHMARKS) not in sys.path:  # as `python benchmarks/peers_cpu.py` has it; child processes inherit it
    sys.path.insert(0, str(BENCHMARKS))

from peers import engines, llama, report, run, verdict  # noqa: E402
from peers.setup import Setup, require_plain  # noqa: E402

TINY = GPT2Config(vocab_size=97, n_positions=48, n_embd=32, n_layer=2, n_head=2)
BOUNDS = {"read_gb_s": 10.0, "read_gb_s_sd": 1.0, "read_source": "a loop", "import_rss_mb": 60.0}
BOUNDS |= {"fma_gflop_s": 100.0, "fma_gflop_s_sd": 2.0, "fma_source": "another"}

# GGUF ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gguf() -> Any:
    return pytest.importorskip("gguf", reason="pip install 'gpt2-tvm[peers]'")


@pytest.mark.parametrize("kind", ["f32", "f16", "q8_0"])
def test_gguf_holds_the_checkpoint(kind: str, gguf: Any, tiny_model: Path, tmp_path: Path) -> None:
    setup = Setup(tiny_model, (1,), (1,), 8, 1)
    reader = gguf.GGUFReader(llama.write_model(setup, tmp_path, kind))
    found = {tensor.name: tensor for tensor in reader.tensors}
    weights = dict(iter_weights(resolve_model(str(tiny_model)), "float32"))
    block = {"ln_1": "attn_norm", "attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output", "ln_2": "ffn_norm"}
    block |= {"mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down"}
    expected = {"token_embd.weight": "wte.weight", "position_embd.weight": "wpe.weight", "output.weight": "wte.weight"}
    expected |= {f"output_norm.{end}": f"ln_f.{end}" for end in ("weight", "bias")}
    for i in range(TINY.n_layer):
        for ours, theirs in block.items():
            expected |= {f"blk.{i}.{theirs}.{end}": f"h.{i}.{ours}.{end}" for end in ("weight", "bias")}
    assert found.keys() == expected.keys()
    for theirs, ours in expected.items():
        tensor, array = found[theirs], weights["transformer." + ours]
        plain = array.ndim == 1 or theirs == "position_embd.weight"
        assert tensor.tensor_type.name == ("F32" if plain else kind.upper()), theirs
        assert tuple(reversed(tensor.shape.tolist())) == array.shape  # GGUF's fastest axis comes first
        value = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(array.shape)
        if tensor.tensor_type.name == "Q8_0":
            blocks = np.abs(array.reshape(-1, 32)).max(1, keepdims=True)
            error = np.abs((value - array).reshape(-1, 32))
            half_a_step = 0.5 + 127 / 2**11  # and what a step that is rounded to float16 adds up to
            assert (error <= blocks / 127 * half_a_step).all(), theirs
            assert error.max() > 0
        else:
            assert np.array_equal(value, array if plain or kind == "f32" else array.astype(np.float16)), theirs
    assert reader.fields["gpt2.vocab_size"].contents() == 97 and reader.fields["gpt2.block_count"].contents() == 2


def test_gguf_of_rows_that_blocks_do_not_divide(gguf: Any, tmp_path: Path) -> None:
    from peers.gguf_file import write_gguf

    config = GPT2Config(vocab_size=20, n_positions=8, n_embd=48, n_layer=1, n_head=3, n_inner=64)
    path = write_gguf(tmp_path / "x.gguf", config, iter_weights(random_model(config)), "q8_0")
    types = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}
    assert types["blk.0.ffn_down.weight"] == "Q8_0" and types["blk.0.ffn_up.weight"] == "F16"


def test_what_a_fixed_graph_computes_wrongly_is_refused() -> None:
    require_plain(TINY, "x")
    with pytest.raises(UserError, match="x computes GPT-2 with gelu_new"):
        require_plain(replace(TINY, activation_function="relu"), "x")
    with pytest.raises(UserError, match="scales attention"):
        require_plain(replace(TINY, scale_attn_by_inverse_layer_idx=True), "x")


# Rows and verdict ------------------------------------------------------------------------------------------------

ONE, FOUR = Case(1, 10, 4), Case(4, 10, 4)
IDS = (1, 2, 3, 4)


def planted(
    *seconds: tuple[float, float], ids: tuple[int, ...] = IDS, batch: int = 1, mb: float = 70.0
) -> list[Sample]:
    return [Sample(prefill, decode, (ids,) * batch, mb) for prefill, decode in seconds]


def entry(engine: engines.Engine, bits: float = 32, failure: str | None = None) -> run.Entry:
    return run.Entry(engine, failure, param_bytes=engines.stored_bytes(TINY, engine.weight_bits or bits))


@pytest.fixture
def rows() -> list[dict[str, Any]]:
    """ours 32, then 8 bits; llama-f32 decodes faster than we do, ct2-float32 prefills faster; ct2-int8 is missing."""
    names = ("llama-f32", "ct2-float32", "llama-q8_0", "ct2-int8")
    peers = [entry(engines.PEERS[name]) for name in names]
    peers[3].failure = "not installed"
    ours = entry(engines.ours_of("q0f32"))
    ours.facts = {"load_seconds": 1.5}
    entries = [ours, *peers[:2], entry(engines.ours_of("q8f32"), 8), *peers[2:]]
    samples = {
        (0, ONE): planted((1.0, 1.0), (2.0, 1.0), (1.0, 2.0)),
        (1, ONE): planted((2.0, 0.8), (2.0, 0.8), (4.0, 1.6), ids=(1, 2, 9, 4)),
        (2, ONE): planted((0.5, 4.0), (1.0, 4.0)),  # it failed in its third round
        (3, ONE): planted((1.0, 0.25), (1.0, 0.25), (1.0, 0.25)),
        (4, ONE): planted((1.5, 0.5), (1.5, 0.5), (1.5, 0.5)),
        (0, FOUR): planted((4.0, 2.0), batch=4),
        (1, FOUR): planted((4.0, 2.2), batch=4),
        (2, FOUR): planted((4.0, 2.4), batch=4),
    }
    return report.make_rows(TINY, entries, [ONE, FOUR, Case(12, 10, 4)], samples, BOUNDS)


def test_figures_of_a_row(rows: list[dict[str, Any]]) -> None:
    ours, llama_row, ct2_row = rows[:3]
    names = ["ours q0f32", "llama-f32", "ct2-float32", "ours q8f32", "llama-q8_0", "ct2-int8"]
    assert [r["engine"] for r in rows] == names * 2
    assert len(rows) == 12 and {r["batch"] for r in rows} == {1, 4}  # nothing of a case that was not begun
    assert (ours["prefill_tok_s"], ours["decode_tok_s"]) == (10, 4)
    assert ours["prefill_tok_s_sd"] == pytest.approx(stdev([10, 5, 10]))
    # a block's matrices: 3 E E + E E + 2 * 4 E E; the head for one token; attention over 1 + 2 + … + 10 tokens
    matrices, attention = 2 * 12 * 32 * 32, 2 * 2 * (2 * 2 * 32) * 55 / 2
    flops = 2 * 10 * matrices + attention + 2 * 97 * 32
    assert ours["prefill_gflop_s"] == pytest.approx(flops / 1.0 / 1e9)
    assert ours["fma_share"] == pytest.approx(flops / 1e9 / 100)
    # a step reads all but the position table, and a cache of 11 to 14 tokens: keys and values of 2 layers
    read = 4 * (TINY.num_parameters() - 48 * 32) + 4 * 2 * 2 * 32 * 12.5
    assert ours["decode_gb_s"] == pytest.approx(read * 4 / 1e9)
    assert ours["read_share"] == pytest.approx(read * 4 / 1e9 / 10)
    assert ours["cache_mb"] == pytest.approx(4 * 2 * 2 * 32 * 14 / 1e6)
    assert ours["ratio_of"] is None and ours["prefill_ratio"] is None and ours["of_tokens"] is None
    assert (llama_row["same_tokens"], llama_row["of_tokens"], llama_row["tokens_of"]) == (2, 4, "ours q0f32")
    assert (llama_row["prefill_ratio"], llama_row["decode_ratio"]) == (2, pytest.approx(0.8))  # 2 1 4; 0.8 0.8 0.8
    assert llama_row["prefill_ratio_sd"] == pytest.approx(stdev([2, 1, 4]))
    assert (ct2_row["repeats"], ct2_row["prefill_ratio"], ct2_row["decode_ratio"]) == (2, 0.5, 4)
    assert rows[4]["ratio_of"] == "ours q8f32" and rows[4]["decode_ratio"] == 2
    assert rows[5]["failure"] == "not installed" and rows[5]["decode_tok_s"] is None and rows[5]["repeats"] == 0
    batched = rows[7]
    assert batched["decode_tok_s"] == pytest.approx(16 / 2.2) and batched["decode_ratio"] == pytest.approx(1.1)
    weights = 4 * (TINY.num_parameters() - 48 * 32)
    assert batched["decode_gb_s"] == pytest.approx((weights + 4 * 4 * 2 * 2 * 32 * 12.5) * 4 / 2.2 / 1e9)
    json.loads(json.dumps(rows, allow_nan=False))


def test_bytes_of_the_peers_formats() -> None:
    sizes = engines.stored_bytes(TINY, engines.PEERS["llama-q8_0"].weight_bits or 0)
    assert sizes["transformer.wte.weight"] == 97 * 32 / 32 * 34 and sizes["transformer.ln_f.bias"] == 4 * 32
    assert engines.stored_bytes(TINY, 16)["transformer.h.0.mlp.c_fc.weight"] == 2 * 128 * 32


def test_the_verdict_takes_the_hardest_peer_of_each_phase(rows: list[dict[str, Any]]) -> None:
    lines = {(line["line"], line["target"]): line for line in verdict.judge(rows, BOUNDS)}
    decode = lines["batch 1, float32 decode", ">= 1.05 x the best float32 peer"]
    assert (decode["against"], decode["reached"], decode["met"]) == ("llama-f32", pytest.approx(0.8), False)
    prefill = lines["batch 1, float32 prefill", ">= 1 x the best float32 peer"]
    assert (prefill["against"], prefill["reached"], prefill["met"]) == ("ct2-float32", 0.5, False)
    assert lines["batch 1, int8 decode", ">= 1.05 x llama.cpp q8_0"]["met"] is True
    assert lines["batch 1, int8 prefill", ">= 1 x llama.cpp q8_0"]["reached"] == 1.5
    share = lines["batch 1, float32 decode", ">= 85 % of the measured read bandwidth"]
    assert share["met"] is False and share["reached"] == rows[0]["read_share"]
    assert lines["batch 1, float32 prefill", ">= 60 % of the measured FMA rate"]["met"] is False
    memory = next(line for line in lines.values() if "memory" in line["line"])
    assert memory["reached"] == 10 and memory["met"] is True  # 70 MB over 60, of 50.1 allowed
    load = next(line for line in lines.values() if "loading" in line["line"])
    assert load["reached"] == 1.5 and load["met"] is False
    batched = lines["batch 4, float32 decode", ">= 1 x the best float32 peer"]
    assert (batched["against"], batched["met"]) == ("llama-f32", True)
    assert len(lines) == 9  # nothing is said of what did not run: float16, CTranslate2 int8, int8 at batch 4


def test_a_ratio_just_below_or_at_its_target(rows: list[dict[str, Any]]) -> None:
    for ratio, met in ((1.05, True), (1.0499, False)):
        rows[1]["decode_ratio"] = ratio
        first = verdict.judge(rows[:6], BOUNDS)[0]
        assert (first["line"], first["met"]) == ("batch 1, float32 decode", met)
    rows[5]["decode_ratio"], rows[5]["decode_ratio_sd"] = 0.5, 0.1
    mark = next(line for line in verdict.judge(rows[:6], BOUNDS) if "mark" in line["target"])
    assert mark["met"] is None and mark["reached"] == 0.5


def test_the_table_says_what_happened(rows: list[dict[str, Any]]) -> None:
    engine = {"engine": "ct2-int8", "failure": "not installed", "versions": {}, "settings": ""}
    result = {
        **{"model": "tiny", "rows": rows, "bounds": BOUNDS, "threads": 2, "repeats": 3, "note": None, "device": "d"},
        **{"complete": False, "other_cores": 0.7, "verdict": verdict.judge(rows, BOUNDS), "engines": [engine]},
    }
    text = report.render(result)
    lines = text.splitlines()
    (llama_line, *_) = [line for line in lines if line.startswith("| llama-f32")]
    cells = [cell.strip() for cell in llama_line.strip("|").split("|")]
    assert cells[2].startswith("2.00 ±") and cells[6].startswith("0.80 ±") and cells[-1] == "2 of 4 (not all)"
    assert "## tiny, batch 4, 10 + 4 tokens" in lines and "- ct2-int8: not installed" in lines
    assert "not complete" in text and "0.7 cores busy" in text and "Bound: 10.0 ± 1.0 GB/s (a loop)" in text
    assert sum("not met" in line for line in lines) == 5
    empty = {**result, "rows": [], "verdict": [], "bounds": None}
    assert report.render(empty).startswith("Nothing was measured.")


# Choosing --------------------------------------------------------------------------------------------------------


def test_engines_are_ordered_by_precision_ours_first() -> None:
    chosen = engines.choose(("llama-q8_0", "ours", "llama-f32", "llama-f32"), ("q8f32", "q0f32", "q4f16_1"))
    assert [e.name for e in chosen] == ["ours q0f32", "llama-f32", "ours q8f32", "llama-q8_0", "ours q4f16_1"]
    assert [e.exact for e in chosen] == [True, True, False, False, False]
    with pytest.raises(UserError, match=r"no 'onnx'.*llama-f16"):
        engines.choose(("ours", "onnx"), ("q0f32",))
    with pytest.raises(UserError, match="nothing to measure"):
        engines.choose(("ours",), ())


def test_the_default_is_every_engine_of_the_table() -> None:
    import peers_cpu

    assert tuple(peers_cpu.ENGINES.split(",")) == engines.DEFAULT


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "find_spec", lambda name: None if name == "llama_cpp" else object())
    assert engines.PEERS["llama-f16"].missing() == "no llama_cpp here: pip install 'gpt2-tvm[peers]'"
    assert engines.PEERS["ct2-int8"].missing() is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--engines", "onnx"), "there is no 'onnx'"),
        (("--model", "bundled", "--prompt-tokens", "4000"), "choose smaller ones"),
        (("--batch", "0"), "--batch"),
    ],
)
def test_wrong_arguments_are_one_line(arguments: tuple[str, ...], message: str) -> None:
    command = [sys.executable, str(BENCHMARKS / "peers_cpu.py"), *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 1 and message in ended.stderr and len(ended.stderr.splitlines()) == 1
