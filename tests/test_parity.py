"""Logits against transformers: every function of the engine, every kind of configuration, length and batch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("transformers", reason="needs pip install 'gpt2-tvm[reference]'")

from reference import FLOAT16, FLOAT32, RULES, Reference, assert_close, checkpoint, random_rows

from gpt2_tvm import Engine, compile_model
from gpt2_tvm.config import PRESETS, GPT2Config
from gpt2_tvm.data import bundled_model
from gpt2_tvm.tokenizer import load_tokenizer

STEPS = 64  # of decode
LENGTHS = (1, 2, 17, 322)  # of prompts, beside the full context
WIDTH = 8  # of verify

# Head sizes 20, 64, 80 and others; widths that no vector length divides; odd and round vocabularies; every activation.
SHAPES = {
    "head-20": GPT2Config(vocab_size=97, n_positions=400, n_embd=60, n_layer=2, n_head=3),
    "head-64-gelu": GPT2Config(
        vocab_size=1000,
        n_positions=512,
        n_embd=128,
        n_layer=2,
        n_head=2,
        activation_function="gelu",
        layer_norm_epsilon=1e-3,
    ),
    "head-80-relu-narrow-mlp": GPT2Config(
        vocab_size=211, n_positions=387, n_embd=160, n_layer=2, n_head=2, n_inner=100, activation_function="relu"
    ),
    "untied-silu": GPT2Config(
        vocab_size=257,
        n_positions=390,
        n_embd=96,
        n_layer=2,
        n_head=4,
        tie_word_embeddings=False,
        activation_function="silu",
    ),
    "tanh-scaled-by-layer": GPT2Config(
        vocab_size=50,
        n_positions=400,
        n_embd=64,
        n_layer=3,
        n_head=4,
        activation_function="tanh",
        scale_attn_by_inverse_layer_idx=True,
    ),
    "unscaled-attention": GPT2Config(
        vocab_size=333, n_positions=386, n_embd=72, n_layer=2, n_head=3, n_inner=500, scale_attn_weights=False
    ),
    "one-odd-head": GPT2Config(
        vocab_size=17, n_positions=393, n_embd=37, n_layer=2, n_head=1, n_inner=53, layer_norm_epsilon=0.1
    ),
    "head-of-1": GPT2Config(vocab_size=128, n_positions=400, n_embd=16, n_layer=1, n_head=16, n_inner=16),
}
SOME = ("head-20", "untied-silu")  # where each shape would add nothing
# Alone with batch 1 in a quick test, and with batches of 4 and 8 in a heavy one; the others have one artifact for both
QUICK = ("head-20", "head-64-gelu", "one-odd-head")
# What the matmul and softmax of attention see: head sizes and scales, not activations or vocabularies
HEADS = ("head-64-gelu", "tanh-scaled-by-layer", "unscaled-attention", "one-odd-head", "head-of-1")

Make = Callable[..., tuple[Engine, Reference]]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """(engine, reference) of a shape; the last ones made are kept for the next test."""
    folder = tmp_path_factory.mktemp("parity")
    references: dict[str, Reference] = {}
    engines: dict[Path, Engine] = {}

    def make(
        name: str,
        quantization: str = "q0f32",
        attention: str = "flash",
        batch_sizes: tuple[int, ...] = (1,),
        verify_widths: tuple[int, ...] = (WIDTH,),
    ) -> tuple[Engine, Reference]:
        source = folder / name
        if name not in references:
            references.clear()
            # with GPT-2's initial 0.02 attention is nearly uniform and an activation nearly linear: errors would hide
            checkpoint(source, SHAPES[name], spread=4.0)
            references[name] = Reference(source)
        output = folder / "-".join([name, quantization, attention, *map(str, (*batch_sizes, "of", *verify_widths))])
        if output not in engines:
            engines.clear()
            if not output.exists():
                compile_model(
                    str(source), "cpu", quantization, output, RULES, attention, batch_sizes, verify_widths=verify_widths
                )
            engines[output] = Engine(output)
        engine = engines[output]
        engine.reset()
        return engine, references[name]

    return make


def check_prefill(engine: Engine, reference: Reference, lengths: tuple[int, ...], share: float) -> None:
    """One batch of prompts of these lengths."""
    rows = random_rows(engine.config, lengths, seed=sum(lengths))
    expected = np.stack([logits[-1] for logits in reference.logits(rows)])
    engine.reset()
    assert_close(engine.prefill(rows), expected, share, f"prefill of {lengths}")
    assert engine.positions.tolist() == list(lengths)


def check_decode(engine: Engine, reference: Reference, lengths: tuple[int, ...], share: float) -> None:
    """STEPS decode steps after prompts of these lengths; each step is compared."""
    rows = random_rows(engine.config, [n + STEPS for n in lengths], seed=len(lengths))
    expected = reference.logits(rows)
    engine.reset()
    engine.prefill([r[:n] for r, n in zip(rows, lengths, strict=True)])
    for step in range(STEPS):
        ours = engine.decode([r[n + step] for r, n in zip(rows, lengths, strict=True)])
        want = np.stack([e[n + step] for e, n in zip(expected, lengths, strict=True)])
        assert_close(ours, want, share, f"decode step {step} after {lengths}")


def check_chain(engine: Engine, reference: Reference, lengths: tuple[int, ...], share: float, m: int) -> None:
    """m tokens verified at once after prompts of these lengths."""
    rows = random_rows(engine.config, [n + m for n in lengths], seed=m)
    expected = np.stack([e[n:] for e, n in zip(reference.logits(rows), lengths, strict=True)])
    engine.reset()
    engine.prefill([r[:n] for r, n in zip(rows, lengths, strict=True)])
    ours = engine.verify([r[n:] for r, n in zip(rows, lengths, strict=True)])
    assert_close(ours, expected, share, f"verify of a chain of {m} after {lengths}")
    assert engine.positions.tolist() == [n + m for n in lengths]


def check_tree(engine: Engine, reference: Reference, lengths: tuple[int, ...], share: float, m: int = WIDTH) -> None:
    """Another random tree of m tokens for each sequence; each token's logits are those of its own branch."""
    generator = np.random.default_rng(m)
    parents = [[int(generator.integers(-1, j)) if j else -1 for j in range(m)] for _ in lengths]
    prompts = random_rows(engine.config, lengths, seed=m)
    tokens = random_rows(engine.config, [m] * len(lengths), seed=m + 1)
    branches = []
    for prompt, token, parent in zip(prompts, tokens, parents, strict=True):
        for j in range(m):
            branch, at = [], j
            while at >= 0:
                branch.insert(0, token[at])
                at = parent[at]
            branches.append(prompt + branch)
    expected = np.stack([e[-1] for e in reference.logits(branches)]).reshape(len(lengths), m, -1)
    engine.reset()
    engine.prefill(prompts)
    ours = engine.verify(tokens, parents)
    assert_close(ours, expected, share, f"verify of the trees {parents} after {lengths}")
    assert engine.positions.tolist() == list(lengths)


# ---- batch 1, every shape


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.heavy) for n in SHAPES])
def test_a_shape_at_every_length(make: Make, name: str) -> None:
    engine, reference = make(name) if name in QUICK else make(name, batch_sizes=(1, 4), verify_widths=(4, WIDTH))
    full = engine.config.n_positions
    for n in (*LENGTHS, full):
        check_prefill(engine, reference, (n,), FLOAT32)
    for n in (1, full - STEPS):  # the second ends at the last position
        check_decode(engine, reference, (n,), FLOAT32)
    for n, m in ((1, 1), (17, WIDTH), (322, WIDTH + 3), (full - WIDTH, WIDTH)):
        check_chain(engine, reference, (n,), FLOAT32, m)
    for n in (2, 322, full - WIDTH):
        check_tree(engine, reference, (n,), FLOAT32)


@pytest.mark.parametrize("name", SOME)
def test_attention_made_of_matmul_and_softmax(make: Make, name: str) -> None:
    engine, reference = make(name, attention="materialized")
    for n in (1, 17, 322, engine.config.n_positions):
        check_prefill(engine, reference, (n,), FLOAT32)
    check_decode(engine, reference, (17,), FLOAT32)
    check_chain(engine, reference, (17,), FLOAT32, WIDTH + 3)
    check_tree(engine, reference, (322,), FLOAT32)


@pytest.mark.parametrize("name", SOME)
def test_float16(make: Make, name: str) -> None:
    engine, reference = make(name, "q0f16", batch_sizes=(1, 4))
    for n in (1, 17, 322, engine.config.n_positions):
        check_prefill(engine, reference, (n,), FLOAT16)
    check_decode(engine, reference, (17,), FLOAT16)
    check_chain(engine, reference, (322,), FLOAT16, WIDTH + 3)
    check_tree(engine, reference, (17,), FLOAT16)


def test_greedy_text_of_the_trained_model(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    folder = bundled_model()
    prompt = load_tokenizer(folder).encode("Emma had never seen")
    if RULES == "full":  # as other files use it
        path = request.getfixturevalue("bundled_artifact")
    else:
        path = compile_model("bundled", "cpu", output=tmp_path / "a", rules=RULES)
    engine = Engine(path)
    engine.prefill(prompt)
    assert engine.decode_greedy(256)[0].tolist() == Reference(folder).greedy(prompt, 256)


# ---- ragged batches


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("name", "attention"), [*((name, "flash") for name in SHAPES), *((name, "materialized") for name in HEADS)]
)
def test_a_ragged_batch(make: Make, name: str, attention: str) -> None:
    """Three sequences in a batch of four; with flash attention, for some shapes, eight of eight too."""
    batches, widths = (((4, 8) if name in QUICK else (1, 4)), (4, WIDTH)) if attention == "flash" else ((4,), (WIDTH,))
    engine, reference = make(name, attention=attention, batch_sizes=batches, verify_widths=widths)
    full = engine.config.n_positions
    for prompts in ((1, 322, 17), (2, full, 1, 17, 322, 5, 64, 100))[: 1 + (8 in batches)]:
        check_prefill(engine, reference, prompts, FLOAT32)
        starts = tuple(min(n, full - STEPS) for n in prompts)
        check_decode(engine, reference, starts, FLOAT32)
        check_chain(engine, reference, starts, FLOAT32, WIDTH + 3)
        check_tree(engine, reference, starts, FLOAT32)


@pytest.mark.heavy
@pytest.mark.parametrize("name", SHAPES)
def test_a_ragged_batch_in_float16(make: Make, name: str) -> None:
    engine, reference = make(name, "q0f16", batch_sizes=(1, 4) if name in SOME else (4,))
    prompts = (engine.config.n_positions - STEPS, 1, 17)
    check_prefill(engine, reference, prompts, FLOAT16)
    check_decode(engine, reference, prompts, FLOAT16)
    check_chain(engine, reference, prompts, FLOAT16, WIDTH)
    check_tree(engine, reference, prompts, FLOAT16)


# ---- GPT-2 124M


@pytest.mark.heavy
def test_gpt2_124m(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "gpt2", PRESETS["gpt2"])
    reference = Reference(source)
    compile_model(str(source), "cpu", "q0f32", tmp_path / "f32", RULES, batch_sizes=(1, 4, 8), verify_widths=(WIDTH,))
    engine = Engine(tmp_path / "f32")
    full = engine.config.n_positions
    for n in (*LENGTHS, full):
        check_prefill(engine, reference, (n,), FLOAT32)
    check_decode(engine, reference, (full - STEPS,), FLOAT32)
    check_prefill(engine, reference, (17, 322, 1), FLOAT32)
    for prompts in ((17, 100, 1), (1, 2, 17, 64, 5, 33, 100, 9)):  # the reference goes over each token again
        check_decode(engine, reference, prompts, FLOAT32)
        check_chain(engine, reference, prompts, FLOAT32, WIDTH)
    check_tree(engine, reference, (17, 33, 1), FLOAT32)

    del engine
    compile_model(str(source), "cpu", "q0f16", tmp_path / "f16", RULES, verify_widths=(WIDTH,))
    engine = Engine(tmp_path / "f16")
    for n in (1, 17, 322):
        check_prefill(engine, reference, (n,), FLOAT16)
    check_decode(engine, reference, (100,), FLOAT16)
    check_chain(engine, reference, (322,), FLOAT16, WIDTH)
    check_tree(engine, reference, (17,), FLOAT16)
