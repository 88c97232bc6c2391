"""Float32 functions as TIR expressions that vectorise, in place of calls to libm.

On a CPU LLVM turns `T.exp` of a vector into one call of `expf` a lane, and GELU then costs more than the matrix product
in front of it. The functions here are arithmetic, a floor, selects and shifts, so they stay in vector registers of any
width and any instruction set. One expression serves scalars and vectors; values used twice are bound by `Let`.

Methods. `exp`: n = round(x / ln 2) and r = x - n ln 2 with ln 2 in two parts (W. J. Cody and W. Waite, "Software
Manual for the Elementary Functions", 1980, chapter 6), a polynomial of r, then two multiplications by powers of two.
`tanh` and `erf`: an odd polynomial near zero, an exponential elsewhere. The coefficients were fitted for this file
(weighted least squares on Chebyshev nodes, reweighted by Lawson's method until the error levels off, then rounded to
float32).

Largest errors, measured by `tests/test_kernel_math.py` against float64:

========  ===========================  =================================================
exp       1.0e-7 relative              [-87.3, 88.72]; subnormal results within one step
tanh      1.6e-7 relative              all x
erf       1.6e-7 relative              all x
sigmoid   1.8e-7 relative              [-87, inf]
========  ===========================  =================================================

NaN stays NaN; `exp(-inf)` is 0 and `exp(inf)` is inf.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import tvm_ffi
from tvm import ir, tirx

from gpt2_tvm.errors import UserError

Expr = Any  # tirx.Expr, or te's tensor slice, which converts to one

# ln 2 = LN2_HIGH + LN2_LOW; n * LN2_HIGH is exact for every n that occurs (9 bits by 9 bits)
LN2_HIGH, LN2_LOW = 0.693359375, -2.12194440054690583e-4
# above: exp overflows; below: it is 0 even as a subnormal
EXP_MAX, EXP_MIN = 89.0, -104.0
# (exp(r) - 1 - r) / r^2 on |r| <= ln(2)/2, highest power first; 3.1e-9 relative to exp(r)
EXP_POLYNOMIAL = (0.0013814318, 0.008368852, 0.0416684, 0.1666652, 0.49999994)
# (tanh(x)/x - 1) / x^2 as a polynomial of x^2, |x| <= TANH_SPLIT; 4.4e-9 relative to tanh(x)
TANH_SPLIT = 0.625
TANH_POLYNOMIAL = (-0.0057049743, 0.020639075, -0.053739712, 0.13331442, -0.3333328)
# erf(x)/x - 1 as a polynomial of x^2, |x| <= 1; 1.2e-9 relative to erf(x)
ERF_SPLIT, ERF_MAX = 1.0, 4.0
ERF_SMALL = (7.853855e-05, -0.000801019, 0.0051883273, -0.02685381, 0.112835854, -0.37612626, 1.1283791 - 1.0)
# ln(erfc(x)) as a polynomial of x on [1, 4], past which erf rounds to 1; 1.1e-9 relative to erf(x)
ERF_LARGE = (0.00018638036, -0.0029476697, 0.021838108, -0.10310685, -0.63814473, -1.1270893, -0.00034150775)

ACTIVATIONS = ("gelu_new", "gelu", "relu", "silu", "tanh")


def _const(value: float) -> Expr:
    return tirx.const(value, "float32")


def _let(value: Expr, body: Callable[[Expr], Expr], name: str) -> Expr:
    """`body(v)` with v bound to `value`, so that `value` is computed once however often `body` uses it."""
    var = tirx.Var(name, value.ty)
    return tirx.Let(var, value, body(var))


def _horner(coefficients: Sequence[float], x: Expr) -> Expr:
    total = _const(coefficients[0])
    for c in coefficients[1:]:
        total = total * x + _const(c)
    return total


def _float32(x: Expr) -> Expr:
    """`x` as a float32 expression: float16 is widened, and te's tensor slices become loads."""
    if not isinstance(x, ir.Expr):
        x = x.asobject()
    return x if x.ty.dtype == "float32" else tirx.Cast("float32", x)


def exp(x: Expr) -> Expr:
    """e^x in float32, within 1e-7 of the true value; 0 below -104, inf from 88.73 on, NaN for NaN."""

    def clamped(x: Expr) -> Expr:
        # the comparisons are false for NaN, which so reaches the polynomial; T.min and T.max would drop it
        low = tirx.Select(x < _const(EXP_MIN), _const(EXP_MIN), x)
        return _let(tirx.Select(x > _const(EXP_MAX), _const(EXP_MAX), low), reduced, "x")

    def reduced(x: Expr) -> Expr:
        n = tirx.floor(x * _const(1 / math.log(2)) + _const(0.5))
        return _let(n, lambda n: _let(x - n * _const(LN2_HIGH) - n * _const(LN2_LOW), lambda r: scaled(n, r), "r"), "n")

    def scaled(n: Expr, r: Expr) -> Expr:
        power = _horner(EXP_POLYNOMIAL, r) * r * r + r + _const(1.0)
        return _let(
            tirx.Cast("int32", n), lambda n: _let(n >> 1, lambda h: power * two_to(h) * two_to(n - h), "h"), "n"
        )

    def two_to(k: Expr) -> Expr:
        # 2^n leaves the range of normal floats at both ends (n = 128, n < -126), its two halves do not
        return tirx.reinterpret("float32", (k + 127) << 23)

    return _let(_float32(x), clamped, "x")


def tanh(x: Expr) -> Expr:
    """tanh(x) in float32, within 2e-7 of the true value."""

    def near_zero(x: Expr) -> Expr:
        return _let(x * x, lambda s: _horner(TANH_POLYNOMIAL, s) * s * x + x, "s")

    def body(x: Expr) -> Expr:
        # 1 - 2/(e^2|x| + 1) has no cancellation here, and is 1 where e^2|x| overflows
        tail = _const(1.0) - _const(2.0) / (exp(tirx.abs(x) * _const(2.0)) + _const(1.0))
        return tirx.Select(tirx.abs(x) < _const(TANH_SPLIT), near_zero(x), _with_sign_of(x, tail))

    return _let(_float32(x), body, "x")


def erf(x: Expr) -> Expr:
    """The error function in float32, within 2e-7 of the true value."""

    def near_zero(x: Expr) -> Expr:
        return _let(x * x, lambda s: _horner(ERF_SMALL, s) * x + x, "s")

    def body(x: Expr) -> Expr:
        magnitude = tirx.Select(tirx.abs(x) > _const(ERF_MAX), _const(ERF_MAX), tirx.abs(x))
        tail = _const(1.0) - exp(_horner(ERF_LARGE, magnitude))
        return tirx.Select(tirx.abs(x) < _const(ERF_SPLIT), near_zero(x), _with_sign_of(x, tail))

    return _let(_float32(x), body, "x")


def sigmoid(x: Expr) -> Expr:
    """1 / (1 + e^-x) in float32."""
    return _const(1.0) / (_const(1.0) + exp(-_float32(x)))


def _with_sign_of(x: Expr, magnitude: Expr) -> Expr:
    # no Let around `magnitude`, which holds some: TVM's passes visit a Let's value twice, and so on inwards
    return tirx.Select(x < _const(0.0), _const(-1.0), _const(1.0)) * magnitude


def activation(name: str, x: Expr, fast: bool) -> Expr:
    """An activation function of GPT-2 checkpoints, computed in float32 and returned as float32.

    name: gelu_new (GELU with tanh; Hendrycks and Gimpel 2016, section 2), gelu (with erf), relu, silu or tanh.
    x: a float32 or float16 expression. fast: the functions of this file (CPUs), else the target's intrinsics (GPUs).
    Raises UserError for another name.
    """
    if name not in ACTIVATIONS:
        raise UserError(f"activation_function {name!r} is not supported; it can be {', '.join(ACTIVATIONS)}")
    x = _float32(x)
    if name == "relu":
        return tirx.Select(x < _const(0.0), _const(0.0), x)
    if name == "tanh":
        return tanh(x) if fast else tirx.tanh(x)
    if name == "silu":
        return _let(x, lambda x: x * (sigmoid(x) if fast else tirx.sigmoid(x)), "x")
    if name == "gelu":
        root_half = _const(math.sqrt(0.5))
        return _let(x, lambda x: x * _const(0.5) * (_const(1.0) + (erf if fast else tirx.erf)(x * root_half)), "x")

    def gelu_new(x: Expr) -> Expr:
        inner = _const(math.sqrt(2 / math.pi)) * (x + _const(0.044715) * x * x * x)
        # (1 + tanh(u)) / 2 = sigmoid(2u): one exponential, and no cancellation where tanh is near -1
        return x * sigmoid(_const(2.0) * inner) if fast else x * _const(0.5) * (_const(1.0) + tirx.tanh(inner))

    return _let(x, gelu_new, "x")


_VECTORISABLE = {"tirx.exp": exp, "tirx.tanh": tanh, "tirx.erf": erf, "tirx.sigmoid": sigmoid}


def vectorise_intrinsics(node: Any) -> Any:
    """`node` (an expression or a statement) with T.exp, T.tanh, T.erf and T.sigmoid of float32 or float16 scalars
    replaced by the functions of this file, the result in the dtype it had."""

    def replace(call: ir.Call) -> Expr:
        name = getattr(call.op, "name", None)
        if name not in _VECTORISABLE or call.ty.dtype not in ("float32", "float16"):
            return call
        value = _VECTORISABLE[name](call.args[0])
        return value if call.ty.dtype == "float32" else tirx.Cast(call.ty.dtype, value)

    return tvm_ffi.structural_map(node, [(ir.Call, replace)])


# -- looking into expressions, and rewriting them ----------------------------------------------------------------------


def static(e: Expr) -> int | None:
    """The value of a constant integer expression, else None."""
    return int(e) if isinstance(e, int | tirx.IntImm) else None


def loads(e: Expr) -> list[ir.TensorLoad]:
    """All buffer loads in an expression."""
    found: list[ir.TensorLoad] = []
    tvm_ffi.structural_walk(e, [(ir.TensorLoad, lambda load: found.append(load))])
    return found


def uses(e: Expr, var: ir.Var) -> bool:
    """Whether an expression reads a variable."""
    found: list[bool] = []
    tvm_ffi.structural_walk(e, [(ir.Var, lambda v: found.append(True) if v.same_as(var) else None)])
    return bool(found)


def rewrite(
    e: Expr, variables: Mapping[ir.Var, Expr], buffers: Mapping[Any, Callable[[list[Expr]], Expr]] | None = None
) -> Expr:
    """`e` with variables replaced, and loads of `buffers` by what their function makes of the (new) indices.

    Variables bound by Let are renewed: an expression may be written into several loops, and TIR wants one definition
    of a variable.
    """
    buffers = buffers or {}

    def on_load(load: ir.TensorLoad) -> Expr:
        return buffers[load.source](list(load.indices)) if load.source in buffers else load

    def on_let(let: tirx.Let) -> Expr:
        fresh = tirx.Var(let.var.name, let.var.ty)
        return tirx.Let(fresh, let.value, tvm_ffi.structural_map(let.body, [(ir.Var, _swap({let.var: fresh}))]))

    return tvm_ffi.structural_map(e, [(ir.TensorLoad, on_load), (tirx.Let, on_let), (ir.Var, _swap(variables))])


def _swap(variables: Mapping[ir.Var, Expr]) -> Callable[[ir.Var], Expr]:
    return lambda var: variables.get(var, var)
