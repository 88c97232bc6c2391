"""Pruned checkpoints: what is cut, and that the smaller model computes what transformers computes with zeros."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from reference import FLOAT32, Reference, assert_close, checkpoint, random_rows

from gpt2_tvm import Engine, compile_model
from gpt2_tvm.artifact import open_artifact
from gpt2_tvm.checkpoint import ModelSource, resolve_model
from gpt2_tvm.config import GPT2Config
from gpt2_tvm.errors import UserError
from gpt2_tvm.measure import bounds
from gpt2_tvm.measure.cases import Case
from gpt2_tvm.pruning import magnitude
from gpt2_tvm.pruning.blocks import blocks, expanded, whole_config
from gpt2_tvm.pruning.cut import kept_lists, make_keeps, prune
from gpt2_tvm.pruning.scores import block_scores, choose, kept_count
from gpt2_tvm.weights import expected_tensors, iter_weights, write_hf_checkpoint

CONFIG = GPT2Config(vocab_size=97, n_positions=48, n_embd=32, n_layer=2, n_head=4)
STRUCTURED = [("mlp",), ("heads",), ("inputs",), ("heads", "mlp"), ("inputs", "heads", "mlp")]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    folder = checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny", CONFIG, seed=3, spread=6.0)
    return resolve_model(str(folder))


def full_width(folder: Path, into: Path) -> Path:
    """A pruned checkpoint with zeros in place of what was cut, as transformers loads it."""
    made = resolve_model(str(folder))
    return write_hf_checkpoint(into, whole_config(made.config), expanded(made.config, iter_weights(made)))


@pytest.mark.parametrize(
    ("methods", "scope"),
    [
        *(
            pytest.param(methods, scope, marks=pytest.mark.heavy)
            for methods, scope in zip(STRUCTURED[:-1], ("global", "layer", "global", "layer"), strict=True)
        ),
        *((STRUCTURED[-1], scope) for scope in ("layer", "global")),  # all of them together
    ],
    ids=lambda value: value if isinstance(value, str) else "+".join(value),
)
def test_the_cut_model_is_the_one_with_zeros(
    source: ModelSource, methods: tuple[str, ...], scope: str, tmp_path: Path
) -> None:
    pytest.importorskip("torch", reason="needs pip install 'gpt2-tvm[reference]'")
    told = prune(source, tmp_path / "cut", methods, 0.4, scope, multiple=4)
    config = GPT2Config.from_json(tmp_path / "cut")
    assert told["parameters"] == config.num_parameters() < CONFIG.num_parameters()
    artifact = compile_model(
        str(tmp_path / "cut"), "cpu", output=tmp_path / "a", batch_sizes=(2,), verify_widths=(4,), rules="baseline"
    )
    stored = {name: np.prod(shape) for name, shape in expected_tensors(config).items() if not name.endswith(".kept")}
    assert sum(stored.values()) == config.num_parameters()
    engine, rows = Engine(artifact), random_rows(CONFIG, [9, 9])
    reference = Reference(full_width(tmp_path / "cut", tmp_path / "zeros"))
    expected = np.stack(reference.logits(rows))
    first = engine.prefill([row[:5] for row in rows])
    assert_close(first, expected[:, 4], FLOAT32, "prefill")
    assert_close(engine.decode([row[5] for row in rows]), expected[:, 5], FLOAT32, "decode")
    assert_close(engine.verify([row[6:9] for row in rows]), expected[:, 6:9], FLOAT32, "verify")


def test_zeros_are_where_the_least_norms_were(source: ModelSource, tmp_path: Path) -> None:
    """Against the definition, written out with loops."""
    prune(source, tmp_path / "cut", ["mlp"], 0.5, multiple=1)
    made = resolve_model(str(tmp_path / "cut"))
    assert made.config.n_inner == 64 and not made.config.pruned  # every layer alike: a plain, narrower GPT-2
    old, new = dict(iter_weights(source)), dict(iter_weights(made))
    for layer in range(CONFIG.n_layer):
        name = f"transformer.h.{layer}.mlp"
        up, down = old[f"{name}.c_fc.weight"], old[f"{name}.c_proj.weight"]
        norms = [np.sqrt((up[i] ** 2).sum() + (down[:, i] ** 2).sum()) for i in range(128)]
        kept = sorted(np.argsort(norms)[64:])
        np.testing.assert_array_equal(new[f"{name}.c_fc.weight"], up[kept])
        np.testing.assert_array_equal(new[f"{name}.c_fc.bias"], old[f"{name}.c_fc.bias"][kept])
        np.testing.assert_array_equal(new[f"{name}.c_proj.weight"], down[:, kept])


def test_scores_of_heads_and_inputs(source: ModelSource) -> None:
    tensors = next(tensors for layer, tensors in blocks(iter_weights(source)) if layer == 1)
    found = block_scores(tensors, CONFIG, 1)
    qkv, proj, norm = (tensors[n] for n in ("attn.c_attn.weight", "attn.c_proj.weight", "ln_1.weight"))
    at = [part * 32 + 8 + i for part in range(3) for i in range(8)]  # head 1 of size 8
    assert found["heads"][1] == pytest.approx(np.sqrt((qkv[at] ** 2).sum() + (proj[:, 8:16] ** 2).sum()))
    assert found["attn"][5] == pytest.approx(np.linalg.norm(qkv[:, 5]) * abs(norm[5]))
    assert found["units"][7] == pytest.approx(np.linalg.norm(tensors["mlp.c_proj.weight"][:, 7]))


def test_a_global_choice_may_differ_between_layers() -> None:
    scores = [np.array([1.0, 2, 3, 4]), np.array([10.0, 20, 30, 40])]
    assert [m.tolist() for m in choose(scores, [4, 4], 0.5, "layer", 1)] == [[False, False, True, True]] * 2
    one, other = choose(scores, [4, 4], 0.5, "global", 1)
    assert one.tolist() == [False, False, False, True] and other.all()  # a layer keeps one in any case


@pytest.mark.parametrize(
    ("whole", "share", "multiple", "present", "kept"),
    [
        (1024, 0.5, 32, 1024, 512),
        (1024, 0.9, 32, 1024, 128),
        (12, 0.5, 1, 12, 6),
        (100, 0.3, 1, 100, 70),
        (20, 0.5, 32, 20, 20),
        (4, 0.99, 1, 4, 1),
        (1024, 0.5, 32, 256, 256),
    ],
)
def test_counts(whole: int, share: float, multiple: int, present: int, kept: int) -> None:
    assert kept_count(whole, share, multiple, present) == kept


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("share", [0.25, 0.5, 0.9])
def test_magnitude_takes_the_smallest(source: ModelSource, scope: str, share: float, tmp_path: Path) -> None:
    told = prune(source, tmp_path / "cut", ["magnitude"], share, scope)
    old, new = dict(iter_weights(source)), dict(iter_weights(resolve_model(str(tmp_path / "cut"))))
    matrices = [n for n, a in old.items() if magnitude.is_matrix(n, a)]
    assert len(matrices) == 8 and told["matrix_weights"] == sum(old[n].size for n in matrices)
    for name in set(old) - set(matrices):
        np.testing.assert_array_equal(new[name], old[name])
    groups = [[n] for n in matrices] if scope == "layer" else [matrices]
    for group in groups:
        before = np.concatenate([old[n].ravel() for n in group])
        after = np.concatenate([new[n].ravel() for n in group])
        count = round(share * before.size)
        assert (after == 0).sum() == count
        assert np.abs(before[after == 0]).max() <= np.abs(before[after != 0]).min()
        np.testing.assert_array_equal(after[after != 0], before[after != 0])


def test_equal_magnitudes_are_counted_exactly() -> None:
    matrix = np.array([[1, -1, 1, 2], [1, 3, -1, 1]], np.float32)
    assert magnitude.smallest(matrix, 3).tolist() == [True, True, True, False, False, False, False, False]
    weights = [("transformer.h.0.a.weight", matrix), ("transformer.h.1.a.weight", matrix)]
    zeros = [int((a == 0).sum()) for _, a in magnitude.zeroed(lambda: weights, 0.5, "global")]
    assert zeros == [6, 2]  # twelve ones, eight of them taken in order


def test_a_cut_can_be_cut_again(source: ModelSource, tmp_path: Path) -> None:
    """By the same share of the same whole nothing goes; by more, the rest of what one cut would have left."""
    prune(source, tmp_path / "a", ["inputs", "heads"], 0.3, multiple=2)
    first = resolve_model(str(tmp_path / "a"))
    prune(first, tmp_path / "b", ["inputs", "heads"], 0.3, multiple=2, whole=CONFIG)
    again = resolve_model(str(tmp_path / "b"))
    assert again.config == first.config
    for (name, one), (_, other) in zip(iter_weights(first), iter_weights(again), strict=True):
        np.testing.assert_array_equal(one, other, err_msg=name)
    told = prune(first, tmp_path / "c", ["inputs", "heads"], 0.6, multiple=2, whole=CONFIG)
    assert told["heads"] == [2, 2] and told["inputs"][0][0] == 14 and told["parameters"] < first.config.num_parameters()
    twice = resolve_model(str(tmp_path / "c"))
    for name, kept in kept_lists(twice).items():
        assert (np.diff(kept) > 0).all(), name


def test_bytes_are_what_is_stored(source: ModelSource, tmp_path: Path) -> None:
    prune(source, tmp_path / "cut", ["heads", "mlp"], 0.5, multiple=1)
    artifact = open_artifact(
        compile_model(str(tmp_path / "cut"), "cpu", output=tmp_path / "a", rules="baseline", verify_widths=())
    )
    config, case = artifact.config, Case(3, 10, 5)
    cached = sum(2 * 4 * config.heads(i) * config.head_dim for i in range(2)) * 3 * (10 + 3)
    stored = bounds.artifact_param_bytes(artifact)
    weights = sum(size for name, size in stored.items() if "wpe" not in name)
    assert bounds.decode_step_bytes(config, stored, "float32", case) == weights + cached
    assert bounds.prefill_flops(config, case) < bounds.prefill_flops(CONFIG, case)


def test_the_configuration_refuses_what_cannot_be() -> None:
    made = replace(CONFIG, layer_heads=[1, 4], layer_inner=[3, 5], layer_inputs=[[32, 8, 1], [5, 32, 32]])  # type: ignore[arg-type]
    assert made.pruned and GPT2Config.from_json(json.loads(made.to_json())) == made and hash(made)
    assert "layer_heads" not in CONFIG.to_json() and not CONFIG.pruned
    assert made.first_layers(1).layer_heads == (1,) and CONFIG.first_layers(1) == replace(CONFIG, n_layer=1)
    for wrong in (
        {"layer_heads": [1]},
        {"layer_heads": [0, 1]},
        {"layer_heads": [5, 1]},
        {"layer_heads": 3},
        {"layer_inner": [1.5, 2]},
        {"layer_inner": [129, 2]},
        {"layer_inner": [True, 2]},
        {"layer_inputs": [[1, 2], [1, 2]]},
        {"layer_inputs": [[33, 2, 2], [1, 2, 2]]},
        {"layer_heads": [1, 1], "layer_inputs": [[1, 9, 1], [1, 8, 1]]},  # a head of 8 makes no 9 channels
    ):
        with pytest.raises(UserError, match=next(reversed(wrong))) as found:
            replace(CONFIG, **wrong)
        assert "\n" not in str(found.value)


def test_a_damaged_list_of_inputs_is_refused(source: ModelSource, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    prune(source, tmp_path / "cut", ["inputs"], 0.5, multiple=4)
    file = tmp_path / "cut" / "model.safetensors"
    tensors = load_file(file)
    (name, *_) = [n for n in tensors if n.endswith(".kept")]
    good = tensors[name].copy()
    for bad in (good[::-1].copy(), good - good[0] - 1, good.astype(np.float32)):
        save_file({**tensors, name: bad}, file, metadata={"format": "pt"})
        with pytest.raises(UserError, match=r"\.kept"):
            list(iter_weights(resolve_model(str(tmp_path / "cut"))))


@pytest.mark.parametrize(
    ("methods", "share", "scope", "multiple", "says"),
    [
        (["mlp"], 0.0, "layer", 1, "--share 0"),
        (["mlp"], 1.0, "layer", 1, "--share 1"),
        (["mlp"], float("nan"), "layer", 1, "--share nan"),
        (["width"], 0.5, "layer", 1, "magnitude, inputs, mlp, heads"),
        ([], 0.5, "layer", 1, "--method"),
        (["mlp"], 0.5, "block", 1, "layer or global"),
        (["mlp"], 0.5, "layer", 0, "--multiple 0"),
    ],
)
def test_a_bad_choice_is_one_line(
    source: ModelSource, methods: list[str], share: float, scope: str, multiple: int, says: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=says) as found:
        prune(source, tmp_path / "cut", methods, share, scope, multiple)
    assert "\n" not in str(found.value) and not (tmp_path / "cut").exists()


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    def weights() -> list[tuple[str, np.ndarray]]:
        shapes = expected_tensors(CONFIG).items()
        return [(n, np.full(s, np.nan if n.endswith("1.mlp.c_fc.weight") else 1, np.float32)) for n, s in shapes]

    folder = write_hf_checkpoint(tmp_path / "nan", CONFIG, weights())
    with pytest.raises(UserError, match=r"h\.1\.mlp\.c_fc\.weight .* NaN"):
        prune(resolve_model(str(folder)), tmp_path / "cut", ["mlp"], 0.5)


def test_equal_and_zero_weights_still_leave_something(tmp_path: Path) -> None:
    shapes = expected_tensors(CONFIG).items()
    folder = write_hf_checkpoint(tmp_path / "zero", CONFIG, ((n, np.zeros(s, np.float32)) for n, s in shapes))
    source = resolve_model(str(folder))
    for scope in ("layer", "global"):
        keeps = make_keeps(source, ["inputs", "heads", "mlp"], 0.9, scope, 1, CONFIG)
        assert all(getattr(k, f).any() for k in keeps for f in vars(k))
    assert prune(source, tmp_path / "cut", ["magnitude"], 0.5)["zeros"] == 2 * (32 * 96 + 32 * 32 + 2 * 32 * 128)
