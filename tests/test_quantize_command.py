"""`python -m gpt2_tvm.quantize`: the figures against their definitions, and the checkpoint of rounded weights."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest
from reference import checkpoint
from typer.testing import CliRunner

from gpt2_tvm.checkpoint import resolve_model
from gpt2_tvm.config import GPT2Config
from gpt2_tvm.errors import UserError
from gpt2_tvm.quantization import SCHEMES, get_scheme
from gpt2_tvm.quantization.errors import matrix_errors, whole_model
from gpt2_tvm.quantization.rows import dequantise_rows, quantise_rows
from gpt2_tvm.quantize import app, write_rounded
from gpt2_tvm.weights import iter_weights, write_hf_checkpoint

CONFIG = GPT2Config(vocab_size=101, n_positions=16, n_embd=60, n_layer=2, n_head=3)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("model"), CONFIG)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_figures_are_what_they_say(model: Path, scheme: str) -> None:
    source = resolve_model(str(model))
    weights = {n: a.astype(np.float64) for n, a in iter_weights(source, "float32") if a.ndim == 2 and "wpe" not in n}
    parts = list(matrix_errors(source, get_scheme(scheme)))
    assert [m.name for m, _, _ in parts] == list(weights)
    total = whole_model(parts)
    bits = {"float32": 32, "float16": 16, "bfloat16": 16, "int8": 8, "int4": 4}[get_scheme(scheme).weight_dtype]
    for matrix, _, _ in parts:
        weight = weights[matrix.name]
        assert (matrix.rows, matrix.columns) == weight.shape and matrix.parameters == weight.size
        assert bits <= matrix.bits <= 1.25 * bits + 1
        assert np.isclose(matrix.relative_rms, matrix.rms / np.sqrt((weight**2).mean()))
        assert matrix.rms <= matrix.max <= matrix.max_weight == np.abs(weight).max()
        assert matrix.worst_row_relative_rms >= matrix.relative_rms
    if scheme == "q8f32":
        name, weight = next(iter(weights.items()))
        error = dequantise_rows(*quantise_rows(name, weight)) - weight
        assert np.isclose(parts[0][0].rms, np.sqrt((error**2).mean()), rtol=1e-6)
        assert np.isclose(parts[0][0].max, np.abs(error).max(), rtol=1e-6)
        by_row = np.sqrt((error**2).sum(axis=1) / (weight**2).sum(axis=1))
        assert parts[0][0].worst_row == by_row.argmax()
    both = sum(m.relative_rms for m, _, _ in parts) / len(parts)
    assert total.parameters == sum(w.size for w in weights.values()) and 0.5 * both <= total.relative_rms <= 2 * both
    assert (total.relative_rms == 0) == (scheme == "q0f32")


def test_fewer_bits_more_error(model: Path) -> None:
    source = resolve_model(str(model))
    order = ["q0f16", "q0bf16", "q8f32", "q4f16_1"]
    errors = [whole_model(list(matrix_errors(source, get_scheme(s)))).relative_rms for s in order]
    assert errors == sorted(errors) and errors[0] < 1e-3 < errors[2] < 0.02 < errors[3] < 0.2


def test_a_table_that_stays_floats_has_no_error(model: Path) -> None:
    source = resolve_model(str(model))
    parts = {m.name: m for m, _, _ in matrix_errors(source, get_scheme("q4f32_1-float-embedding"))}
    table = parts.pop("transformer.wte.weight")
    assert table.rms == 0 and table.stored_as == "float32" and all(m.rms > 0 for m in parts.values())


@pytest.mark.parametrize("form", ["md", "csv", "json"])
def test_the_command(model: Path, tmp_path: Path, form: str) -> None:
    file = tmp_path / "errors.json"
    options = ["--model", str(model), "--quantization", "q8f32,q4f16_1", "--format", form, "--json", str(file)]
    result = CliRunner().invoke(app, options)
    assert result.exit_code == 0, result.output
    saved = json.loads(file.read_text())
    assert [r["quantization"] for r in saved] == ["q8f32", "q4f16_1"] and len(saved[0]["matrices"]) == 9
    if form == "md":
        assert result.stdout.count("h.1.mlp.c_proj.weight") == 2 and "relative RMS" in result.stdout
    elif form == "csv":
        rows = list(csv.DictReader(io.StringIO(result.stdout)))
        assert len(rows) == 20 and float(rows[0]["relative_rms"]) == saved[0]["matrices"][0]["relative_rms"]
    else:
        assert json.loads(result.stdout) == saved


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--quantization", "q9"], "unknown quantization 'q9'"),
        (["--quantization", ""], "give a scheme"),
        (["--quantization", "q0f32-float-head"], "no quantised matrices"),
        (["--quantization", "q8f32-float-tail"], "-float-embedding"),
        (["--quantization", "q8f32,q8f16", "--output", "x"], "one scheme with --output"),
        (["--format", "xml"], "md, csv, json"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(options: list[str], words: str) -> None:
    result = CliRunner().invoke(app, options)
    assert isinstance(result.exception, UserError) and words in str(result.exception)
    assert "\n" not in str(result.exception)


def test_outliers_show_and_nan_is_refused(model: Path, tmp_path: Path) -> None:
    tensors = dict(iter_weights(resolve_model(str(model)), "float32"))
    name = "transformer.h.1.mlp.c_fc.weight"
    tensors[name] = tensors[name].copy()
    tensors[name][7, 3] = 1e4
    source = resolve_model(str(write_hf_checkpoint(tmp_path / "outlier", CONFIG, tensors.items())))
    for scheme in ("q8f32", "q4f32_1"):
        parts = {m.name: m for m, _, _ in matrix_errors(source, get_scheme(scheme))}
        assert parts[name].max_weight == 1e4
        assert parts[name].rms < 0.1 and parts["transformer.h.0.mlp.c_fc.weight"].max < 0.05
    tensors[name][7, 3] = np.nan
    write_hf_checkpoint(tmp_path / "nan", CONFIG, tensors.items())
    with pytest.raises(UserError, match=rf"{name}[^\n]*NaN"):
        list(matrix_errors(resolve_model(str(tmp_path / "nan")), get_scheme("q8f32")))


def test_the_rounded_checkpoint_is_what_the_kernels_use(model: Path, tmp_path: Path) -> None:
    source, scheme = resolve_model(str(model)), get_scheme("q8f32")
    rounded = dict(iter_weights(resolve_model(str(write_rounded(source, scheme, tmp_path / "out"))), "float32"))
    for name, weight in iter_weights(source, "float32"):
        if weight.ndim == 2 and "wpe" not in name:
            assert np.array_equal(rounded[name], dequantise_rows(*quantise_rows(name, weight))), name
        else:
            assert np.array_equal(rounded[name], weight), name
