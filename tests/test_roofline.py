"""The closed forms: the worked case of a T4 by hand, the algebra, dtypes, cache and machine.

Derivations. gpt2-xl: E = 1600, 48 layers, H = 25 heads of D = 64, V = 50257; all tensors 16-bit (2 bytes), 300 GB/s,
65 TFLOP/s. A multiply-add is 2 operations.

C1, operations a token:
    matrices          2 * 12 E^2 = 61,440,000 a layer, * 48           2,949,120,000
    biases 9 E, residuals 2 E, gelu_new 9 * 4 E, two norms 2 (9 E + 4): 104,008 a layer, * 48    4,992,384
    head 2 E V 160,822,400, its norm 14,404, embedding E 1,600          160,838,404
                                                                      3,114,950,788
C2, operations a pair of tokens: q . k and p . V 4 D, scale and softmax's five 6: 262 * 25 * 48 = 314,400.
C3, bytes of weights: 12 E^2 + 13 E = 30,740,800 elements a layer, * 48 = 1,475,558,400; last norm 2 E = 3,200;
    head E V = 80,411,200: 1,555,972,800 elements, 3,111,945,600 bytes.
C4, bytes a token: elements a layer: norms 4 E, c_attn 4 E, q k v and output 4 E, c_proj 3 E, c_fc 5 E, mlp.c_proj 6 E:
    26 E = 41,600, so 83,200 bytes, * 48 = 3,993,600; last norm 6,400; head 2 E + 2 V = 103,714; embedding: id 4,
    two rows and their sum 9,600: 9,604. Together 4,113,318.
C5, bytes a pair: the scores written and read, masked, written and read by softmax, written and read: six times 2 bytes,
    * 25 * 48 = 14,400. C6: a mask of one byte a pair and layer: 48. And 4 bytes a sequence, its position.

Ours: half the pairs (N^2 + N) / 2 at 4 D + 5 = 261, so C2 = 261 * 25 * 48 / 2 = 156,600, which also adds 156,600 to
C1, and E divisions a layer, 76,800: C1 = 3,115,184,188. No scores and no mask: C5 = C6 = 0. Keys and values go to the
cache, 8 E bytes a layer, 614,400: C4 = 4,727,718. 16 bytes a sequence and layer for positions and lengths, and 4: 772.

With the cache: D1 = 3,114,950,788 + 76,800 = 3,115,027,588; D2 = 261 * 25 * 48 = 313,200; D3 = C3; D5, keys and values
of a slot, 2 E elements a layer: 4 E * 48 = 307,200; D4 = C4 of ours less the cache's own read, 307,200, plus the 772
bytes a sequence: 4,421,290.
"""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import pytest

from gpt2_tvm.config import PRESETS, GPT2Config
from gpt2_tvm.errors import UserError
from gpt2_tvm.theory.closed import Model, decode_coefficients, naive_coefficients, total
from gpt2_tvm.theory.dtypes import Dtypes
from gpt2_tvm.theory.form import B, Form, N, P, S, rows_of_table
from gpt2_tvm.theory.machine import Machine, machine_of
from gpt2_tvm.theory.predict import Case, cache_gain, forms_of, predict, step_seconds, weight_seconds
from targets import load_target

HALF = Dtypes("float16", "float16", "float16", "float16")
T4 = Machine("t4", "a T4 of the worked case", 300.0, 65.0, None, "by hand")
XL = Model(PRESETS["gpt2-xl"], HALF, "flash")
TEXTBOOK = replace(XL, attention="textbook", cached=False)
SMALL = Model(PRESETS["gpt2"], HALF, "flash")


def test_coefficients_of_gpt2_xl_are_those_by_hand() -> None:
    keys = ("C1", "C2", "C3", "C4", "C5", "C6", "B")
    textbook = (3_114_950_788, 314_400, 3_111_945_600, 4_113_318, 14_400, 48, 4)
    ours = (3_115_184_188, 156_600, 3_111_945_600, 4_727_718, 0, 0, 772)
    assert naive_coefficients(total(TEXTBOOK.parts())) == dict(zip(keys, textbook, strict=True))
    assert naive_coefficients(total(XL.parts())) == dict(zip(keys, ours, strict=True))
    decode = (3_115_027_588, 313_200, 3_111_945_600, 4_421_290, 307_200, 0)
    found = decode_coefficients(total(XL.parts()))
    assert found == dict(zip(("D1", "D2", "D3", "D4", "D5", "D6"), decode, strict=True))


# (form, pass, B, N, FLOPs, bytes, what bounds, ms). FLOPs and bytes from the coefficients above; ms is bytes / 0.3e9 or
# FLOPs / 65e9, the larger. "decode" N has N - 1 in the cache: 31 and 1023.
WORKED = [
    (TEXTBOOK, "naive", 1, 32, 100_000_370_816, 3_258_366_532, "memory", 10.8612),
    (TEXTBOOK, "naive", 1, 1024, 3_519_381_901_312, 22_473_809_284, "memory", 74.9127),
    (TEXTBOOK, "naive", 64, 32, 6_400_023_732_224, 12_479_788_672, "compute", 98.4619),
    (TEXTBOOK, "naive", 64, 1024, 225_240_441_683_968, 1_239_100_327_552, "memory", 4130.33),
    (XL, "naive", 1, 32, 99_846_252_416, 3_263_233_348, "memory", 10.8774),
    (XL, "naive", 1, 1024, 3_354_155_610_112, 7_953_129_604, "compute", 51.6024),
    (XL, "naive", 64, 32, 6_390_160_154_624, 12_794_361_472, "compute", 98.3102),
    (XL, "naive", 64, 1024, 214_665_959_047_168, 312_947_721_856, "compute", 3302.55),
    (XL, "decode", 1, 32, 3_125_049_988, 3_126_197_290, "memory", 10.4207),
    (XL, "decode", 1, 1024, 3_435_744_388, 3_430_939_690, "memory", 11.4365),
    (XL, "decode", 64, 32, 200_003_199_232, 4_024_053_760, "memory", 13.4135),
    (XL, "decode", 64, 1024, 219_887_640_832, 23_527_567_360, "memory", 78.4252),
]


@pytest.mark.parametrize(("model", "phase", "b", "n", "flops", "nbytes", "bound", "ms"), WORKED)
def test_the_worked_case_on_a_t4(
    model: Model, phase: str, b: int, n: int, flops: int, nbytes: int, bound: str, ms: float
) -> None:
    case = Case(phase, b, n)
    # `uncapped`: at B = 64 and N = 1024 more rows are looked up than the tables have; by hand each token reads its own
    forms = [f.uncapped() for part in forms_of(model, case).values() for f in (part.flops, part.bytes)]
    counted = sum(f.at(*case.sizes) for f in forms[::2]), sum(f.at(*case.sizes) for f in forms[1::2])
    assert counted == (flops, nbytes)
    guess = predict(T4, flops, nbytes)
    assert guess.bound == bound and 1e3 * guess.seconds == pytest.approx(ms, rel=1e-5)
    # the tables, read once at the most, take back less than a hundredth of a per cent
    assert step_seconds(model, T4, case) == pytest.approx(guess.seconds, rel=2e-3)


def test_the_constant_time_of_a_token() -> None:
    """gpt2: 12 (12 E^2 + 13 E) + 2 E + E V = 85,054,464 + 1,536 + 38,597,376 = 123,653,376 elements, 247,306,752 bytes:
    0.82436 ms; without head and last norm 170,108,928 bytes: 0.56703 ms. gpt2-xl: 3,111,945,600 bytes, 10.37315 ms, and
    2,951,116,800 bytes without head, 9.83706 ms.
    """
    assert 1e3 * weight_seconds(SMALL, T4) == pytest.approx(0.824356, rel=1e-5)
    assert 1e3 * weight_seconds(SMALL, T4, head=False) == pytest.approx(0.567030, rel=1e-5)
    assert 1e3 * weight_seconds(XL, T4) == pytest.approx(10.373152, rel=1e-6)
    assert 1e3 * weight_seconds(XL, T4, head=False) == pytest.approx(9.837056, rel=1e-6)


def test_the_cache_its_size_and_gain() -> None:
    # 2 * 48 * 1600 elements of 2 bytes a token: 307,200; 64 sequences of 1024 take 20.1 GB, more than a T4 has
    assert XL.cache_bytes(1, 1) == 307_200 and XL.cache_bytes(64, 1024) == 20_132_659_200
    gain = cache_gain(XL, T4, 1, 1024)
    assert gain.step == pytest.approx(51.6024 / 11.4365, rel=1e-4)
    assert 1 < gain.text < gain.step  # earlier tokens gain less
    small = cache_gain(XL, T4, 1, 2)
    by_hand = [step_seconds(XL, T4, Case(phase, 1, n)) for phase in ("naive", "decode") for n in (1, 2)]
    assert small.text == pytest.approx((by_hand[0] + by_hand[1]) / (by_hand[2] + by_hand[3]))


def test_prefill_makes_the_logits_of_one_row() -> None:
    """Less (N - 1) rows of the head: 2 E V operations and 9 E + 4 of its norm; the row is copied out."""
    naive, prefill = (total(forms_of(XL, Case(phase, 3, 10))) for phase in ("naive", "prefill"))
    rows = 3 * (10 - 1)
    assert naive.flops.at(3, 10) - prefill.flops.at(3, 10) == rows * (160_822_400 + 14_404)
    taken = 3 * (2 * 2 * 1600 + 4)
    assert naive.bytes.at(3, 10) - prefill.bytes.at(3, 10) == rows * (103_714 + 6_400) - taken


def test_every_dtype_moves_what_it_says() -> None:
    wide = total(Model(PRESETS["gpt2"], Dtypes()).parts()).bytes.uncapped()
    half = total(SMALL.parts()).bytes.uncapped()
    ids = 4 * B * N + (4 + 8 * 2 * 12) * B  # int32 whatever the rest is
    assert wide - ids == 2 * (half - ids)
    int8 = replace(SMALL, dtypes=replace(HALF, weights="int8"))
    E, V, L = 768, 50257, 12
    matrices = 12 * E * E * L + E * V
    scales = 4 * (9 * E * L + V)  # float32, one a row: 3E + E + 4E + E rows a layer
    assert int8.weight_bytes() == SMALL.weight_bytes() - 2 * matrices + matrices + scales
    int4 = replace(SMALL, dtypes=replace(HALF, weights="int4"))
    groups = 2 * (9 * E * E // 32 + 3 * E * E // 32) * L + 2 * V * E // 32  # float16, one for 32 of a row
    assert int4.weight_bytes() == SMALL.weight_bytes() - 2 * matrices + matrices // 2 + groups
    cache = replace(SMALL, dtypes=replace(HALF, cache="int8"))
    assert SMALL.cache_bytes(2, 10) == 2 * cache.cache_bytes(2, 10)
    assert total(cache.parts()).flops == total(SMALL.parts()).flops
    sums = replace(SMALL, dtypes=replace(HALF, accumulation="float32"))
    more, less = (total(model.parts()).bytes.uncapped() for model in (sums, SMALL))
    assert more - less == 2 * V * B * N  # the logits


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"weights": "int3"}, "unknown dtype 'int3' for weights; choose one of float32, "),
        ({"activations": "int8"}, "activations of int8 are not modelled"),
        ({"accumulation": "int4"}, "accumulation of int4"),
    ],
)
def test_other_dtypes_are_refused(values: dict[str, str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        Dtypes(**values)


def test_a_form_is_a_polynomial() -> None:
    form = 3 * B * N * (N + 1) * Fraction(1, 2) + 5 * B * P - S + 7
    assert form.at(2, 3, 4, 5) == 3 * 2 * 3 * 4 // 2 + 5 * 2 * 4 - 5 + 7
    assert form.replace(p=N - 1, s=2) == 3 * B * N * (N + 1) * Fraction(1, 2) + 5 * B * (N - 1) + 5
    assert form.coefficient(b=1, n=2) == Fraction(3, 2) and form.coefficient() == 7
    assert form - form == Form() and hash(B + N) == hash(N + B)
    table = rows_of_table(100, 8) * 2
    assert (table.at(1, 5), table.at(4, 5), table.at(400, 5)) == (80, 200, 200)
    assert table.uncapped() == 16 * B * N
    for wrong in (lambda: table * B, lambda: -table, lambda: table.replace(n=1)):
        with pytest.raises(ValueError):
            wrong()


def test_what_is_not_of_the_printed_form_is_no_set_of_coefficients() -> None:
    with pytest.raises(ValueError, match="not of the form"):
        naive_coefficients(total(replace(XL, last_row=True).parts()))


def test_a_machine_is_the_target_s_peak_or_what_is_given() -> None:
    t4 = load_target("t4")
    half, single = machine_of(t4, "float16"), machine_of(t4, "float32")
    assert (half.bandwidth_gb_s, half.tflops, half.fp32_tflops) == (320, 65, 8.1)
    assert (single.tflops, single.fp32_tflops) == (8.1, None) and "peak of target t4" in single.source
    given = machine_of(t4, "float16", 300.0)
    assert (given.bandwidth_gb_s, given.tflops) == (300, 65) and given.source.startswith("300.0 GB/s as given; peak")
    assert given.ridge == pytest.approx(65e12 / 300e9)
    assert machine_of(load_target("m1"), "float16").tflops == 2.6  # Apple names no float16 rate
    with pytest.raises(UserError, match="target webgpu names no peak in float16; give --bandwidth-gb-s and --tflops"):
        machine_of(load_target("webgpu"), "float16", bandwidth_gb_s=10.0)
    assert machine_of(load_target("webgpu"), "float16", 10.0, 2.0).source == "10.0 GB/s and 2.0 TFLOP/s as given"
    for wrong in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(UserError, match=r"--tflops .*above 0"):
            machine_of(t4, "float16", tflops=wrong)


def test_a_model_whose_mlp_is_not_four_times_as_wide() -> None:
    """E = 6, I = 10, relu: up 10 (12 + 1), down 6 (20 + 1 + 1), norm 58 operations a token and layer."""
    config = GPT2Config(
        vocab_size=11, n_positions=8, n_embd=6, n_layer=1, n_head=2, n_inner=10, activation_function="relu"
    )
    mlp = Model(config, Dtypes()).parts()["MLP"]
    assert mlp.flops == (130 + 132 + 58) * B * N
    # weights 2 * 60 + biases 16 + norm 12 elements; rows: norm 12, up 16, down 16 + residual 6
    assert mlp.bytes == 4 * (120 + 16 + 12) + 4 * (12 + 16 + 22) * B * N
