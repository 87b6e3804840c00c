"""The Scalar engine: activation functions, their ranges, and its reduction registers."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from jax_tkg.nki.interpreter import isa as nisa
from jax_tkg.nki.interpreter import language as nl
from tests.interpreter.computing import (
    BF16,
    E4M3,
    F16,
    F32,
    integers,
    issued,
    normal,
    refused,
    results,
    run,
    wide,
)

COMMAND = nisa.reduce_cmd


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x > -700 else 0.0


def cdf(x: float) -> float:
    return 0.5 * math.erfc(-x / math.sqrt(2))


def density(x: float) -> float:
    return math.exp(-x * x / 2) / math.sqrt(2 * math.pi)


def tanh_gelu(x: float) -> float:
    return x / 2 * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def softplus(x: float) -> float:
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


FUNCTIONS: dict[str, Callable[[float], float]] = {
    "copy": lambda x: x,
    "square": lambda x: x * x,
    "abs": abs,
    "relu": lambda x: max(x, 0.0),
    "prelu": lambda x: max(x, 0.0),
    "exp": math.exp,
    "tanh": math.tanh,
    "sigmoid": sigmoid,
    "erf": math.erf,
    "erf_dx": lambda x: 2 / math.sqrt(math.pi) * math.exp(-x * x),
    "gelu": lambda x: x * cdf(x),
    "gelu_dx": lambda x: cdf(x) + x * density(x),
    "gelu_apprx_tanh": tanh_gelu,
    "gelu_apprx_sigmoid": lambda x: x * sigmoid(1.702 * x),
    "gelu_apprx_sigmoid_dx": lambda x: (
        sigmoid(1.702 * x) + 1.702 * x * sigmoid(1.702 * x) * sigmoid(-1.702 * x)
    ),
    "silu": lambda x: x * sigmoid(x),
    "silu_dx": lambda x: sigmoid(x) + x * sigmoid(x) * sigmoid(-x),
    "softplus": softplus,
    "mish": lambda x: x * math.tanh(softplus(x)),
    "sign": lambda x: math.copysign(1.0, x),
    "log": math.log,
    "sqrt": math.sqrt,
    "rsqrt": lambda x: x**-0.5,
    "reciprocal": lambda x: 1 / x,
    "sin": math.sin,
    "arctan": math.atan,
}
# Name, the ends of the valid range, and whether it is of the magnitude.
RANGES = [
    ("log", 2.0**-64, 2.0**64, False),
    ("sqrt", 2.0**-116, 2.0**118, False),
    ("rsqrt", 2.0**-87, 2.0**97, False),
    ("reciprocal", 2.0**-42, 2.0**42, True),
    ("sin", -math.pi, math.pi, False),
    ("arctan", -math.pi / 2, math.pi / 2, False),
]
LIMITED = [name for name, *_ in RANGES]


def activation(name: str, **kwargs: Any) -> Callable[..., None]:
    return lambda dst, x: nisa.activation(dst, getattr(nl, name), x, **kwargs)


def inputs(name: str) -> np.ndarray:
    """Values all over where the function may be evaluated."""
    if name in ("log", "sqrt", "rsqrt", "reciprocal"):
        return np.exp(normal(16, 50, scale=5))
    if name in ("sin", "arctan"):
        return np.linspace(-1.57, 1.57, 800, dtype=F32).reshape(16, 50)
    return np.concatenate([normal(16, 25), normal(16, 25, scale=6, seed=1)], 1)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("psum", [(), ("x",), ("dst",)])
def test_functions(name: str, psum: tuple[str, ...]) -> None:
    x = inputs(name)
    got = results(activation(name), x, out=[((16, 50), F32)], psum=psum)
    want = np.vectorize(FUNCTIONS[name])(x.astype(np.float64))
    np.testing.assert_allclose(got, want, rtol=4e-6, atol=2e-7)


@pytest.mark.parametrize("name", [n for n in FUNCTIONS if n not in LIMITED])
def test_functions_of_infinities_and_nan(name: str) -> None:
    """Valid for [-inf, inf]: the limits. NaN stays NaN."""
    x = np.array([[-np.inf, np.inf, np.nan]], F32)
    got = results(activation(name), x, out=[((1, 3), F32)])[0]
    far = [200.0, 700.0] if name == "exp" else [3e4, 3e5]
    for value, sign in ((got[0], -1), (got[1], 1)):
        near, farther = (FUNCTIONS[name](sign * f) for f in far)
        if abs(farther) > 2 * abs(near):
            assert value == math.copysign(np.inf, farther)
        else:
            assert value == pytest.approx(farther, abs=1e-6)
    assert np.isnan(got[2])


@pytest.mark.parametrize(("name", "low", "high", "of_magnitude"), RANGES)
def test_ranges(name: str, low: float, high: float, of_magnitude: bool) -> None:
    ends = np.array([low, high, np.nan], F32)
    x = np.stack([ends, -ends]) if of_magnitude else ends[None]
    got = results(activation(name), x, out=[(x.shape, F32)])
    assert np.isfinite(got[:, :2]).all()
    assert np.isnan(got[:, 2]).all()
    slack = F32(2.0**-8) if name == "sin" else F32(0)
    results(activation(name), np.array([[low - slack, high + slack]], F32), out=[((1, 2), F32)])
    below = np.nextafter(F32(low) - slack, F32(-np.inf))
    above = np.nextafter(F32(high) + slack, F32(np.inf))
    for outside in (below, above, *((-below, 0.0) if of_magnitude else ()), np.inf):
        x = np.full((2, 3), ends[0])
        x[1, 2] = outside
        message = refused("activation.range", activation(name), x, out=[((2, 3), F32)])
        assert f"{outside:.9g}" in message
        assert f"{high:.6g}" in message


def test_the_range_holds_for_the_scaled_and_shifted_argument() -> None:
    x = np.full((4, 5), 2.0, F32)
    out = [((4, 5), F32)]
    got = results(activation("sin", scale=4.0, bias=-6.0), x, out=out)
    np.testing.assert_allclose(got, np.full((4, 5), math.sin(2.0)), rtol=1e-6)
    refused("activation.range", activation("sin", scale=2.0), x, out=out)
    for op in ("activation_reduce", "activate2"):

        def body(dst, x, op=op):
            if op == "activate2":
                nisa.activate2(dst, nl.sin, x, 2.0, 0.0, nl.multiply, nl.add)
            else:
                nisa.activation_reduce(dst, nl.sin, x, nl.add, None, scale=2.0)

        refused(f"{op}.range", body, x, out=out, target="trn3")


@pytest.mark.parametrize("kinds", [(F32, BF16), (BF16, F16), (E4M3, F32), (np.int16, F32)])
@pytest.mark.parametrize("columns", [(), ("scale",), ("bias",), ("scale", "bias")])
def test_scale_and_bias(kinds: tuple[Any, Any], columns: tuple[str, ...]) -> None:
    x = normal(32, 2, 9).astype(kinds[0])
    both = normal(32, 2, seed=1)

    def body(dst, x, both):
        nisa.activation(
            dst, nl.tanh, x,
            scale=both[:, 0] if "scale" in columns else 0.5,
            bias=both[:, 1] if "bias" in columns else -0.25,
        )  # fmt: skip

    got = results(body, x, both, out=[((32, 18), kinds[1])])
    scale = both[:, :1] if "scale" in columns else F32(0.5)
    bias = both[:, 1:] if "bias" in columns else F32(-0.25)
    want = np.tanh(wide(x).reshape(32, 18) * scale + bias)
    np.testing.assert_allclose(wide(got), wide(want.astype(kinds[1])), rtol=1e-6)


@pytest.mark.parametrize("psum", [(), ("column",)])
def test_a_bias_may_have_other_types(psum: tuple[str, ...]) -> None:
    x, out = normal(8, 9), [((8, 9), F32)]

    def body(dst, x, column):
        nisa.activation(dst, nl.copy, x, bias=column)

    def scaled(dst, x, column):
        nisa.activation(dst, nl.copy, x, scale=column)

    for kind in (F32, BF16, E4M3, np.int32):
        column = normal(8, 1, seed=1, scale=3).astype(kind)
        np.testing.assert_array_equal(
            results(body, x, column, out=out, psum=psum), x + wide(column)
        )
    results(scaled, x, normal(8, 1), out=out, psum=psum)
    refused("activation.operand-dtype", scaled, x, normal(8, 1, dtype=BF16), out=out)
    refused("activation.vector-operand", scaled, x, normal(8, 2), out=out)
    refused("activation.vector-operand", body, x, normal(4, 1), out=out)

    def reinterpreted(dst, x, column):
        nisa.activation(dst, nl.copy, x, bias=column.view(nl.tfloat32))

    refused("activation.bias", reinterpreted, x, normal(8, 1), out=out)


def test_bias_on_trn1() -> None:
    x, out = np.abs(normal(8, 9)) + 1, [((8, 9), F32)]
    trn1 = {"target": "trn1"}
    results(activation("reciprocal"), x, out=out, **trn1)
    refused("activation.bias", activation("exp", bias=0.5), x, out=out, **trn1)

    def body(name: str) -> Callable[..., None]:
        return lambda dst, x, c: nisa.activation(dst, getattr(nl, name), x, bias=c)

    results(body("exp"), x, normal(8, 1), out=out, **trn1)
    column = np.abs(normal(8, 1))
    refused("activation.bias", body("reciprocal"), x, column, out=out, **trn1)
    results(body("reciprocal"), x, column, out=out)


@pytest.mark.parametrize("name", ["add", "maximum", "invert", "divide", "bypass"])
def test_only_activation_functions(name: str) -> None:
    refused("activation.operator", activation(name), normal(4, 5), out=[((4, 5), F32)])


def test_activation_shapes() -> None:
    refused("activation.shape", activation("exp"), normal(4, 5), out=[((4, 6), F32)])


# Reductions


def summed(*commands: Any, reads: bool = True, reduce_op: Any = nl.add) -> Callable[..., None]:
    """exp of x, then of x - 1, ... with these commands; the last one reads the registers."""

    def body(dst, total, x):
        for n, what in enumerate(commands):
            result = total if reads and n == len(commands) - 1 else None
            nisa.activation(
                dst, nl.exp, x, bias=-float(n), reduce_op=reduce_op, reduce_res=result,
                reduce_cmd=what,
            )  # fmt: skip

    return body


@pytest.mark.parametrize(
    ("commands", "terms"),
    [
        ((COMMAND.reset_reduce,), {0}),
        ((COMMAND.reset_reduce, COMMAND.reduce), {0, 1}),
        ((COMMAND.reset_reduce, COMMAND.idle), {0}),
        ((COMMAND.reset, COMMAND.reduce, COMMAND.reduce), {1, 2}),
        ((COMMAND.reset_reduce, COMMAND.reset), set()),
        ((COMMAND.reset_reduce, COMMAND.reset_reduce), {1}),
        ((COMMAND.reset_reduce, COMMAND.idle, COMMAND.reduce), {0, 2}),
    ],
)
def test_registers(commands: tuple[Any, ...], terms: set[int]) -> None:
    x = normal(32, 3, 7, dtype=BF16)
    got, total = results(summed(*commands), x, out=[((32, 21), BF16), ((32, 1), F32)])
    flat = wide(x).reshape(32, 21)
    want = sum((np.exp(flat - n).sum(1) for n in terms), np.zeros(32))[:, None]
    np.testing.assert_allclose(total, want, rtol=1e-5)  # of values before they are rounded
    np.testing.assert_array_equal(got, np.exp(flat - (len(commands) - 1)).astype(BF16))


def test_registers_are_unknown_before_a_reset() -> None:
    x, out = normal(8, 7), [((8, 7), F32), ((8, 1), F32)]
    refused("activation.accumulator", summed(COMMAND.reduce), x, out=out)
    refused("activation.accumulator", summed(COMMAND.idle), x, out=out)
    results(summed(COMMAND.idle, reads=False), x, out=out)


def test_reduction_refusals() -> None:
    x, out = normal(8, 7), [((8, 7), F32), ((8, 1), F32)]
    reset = COMMAND.reset_reduce
    refused("activation.reduce-op", summed(reset, reduce_op=None), x, out=out)
    refused("activation.operator", summed(reset, reduce_op=nl.maximum), x, out=out)
    refused("activation.reduce-cmd", summed(COMMAND.load_reduce), x, out=out)
    refused("activation.reduce-res", summed(reset), x, out=[out[0], ((8, 2), F32)])


def test_activation_reduce_is_activation_with_a_reset() -> None:
    x, column = normal(16, 2, 5), normal(16, 1, seed=1)

    def body(dst, total, x, column):
        nisa.activation_reduce(dst, nl.square, x, nl.add, total, column, 2.0)

    got, total = results(body, x, column, out=[((16, 10), F32), ((16, 1), F16)])
    want = np.square(2 * x.reshape(16, 10) + column)
    np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(total, want.sum(1, keepdims=True).astype(F16))

    def largest(dst, total, x, column):
        nisa.activation_reduce(dst, nl.square, x, nl.maximum, total)

    refused("activation_reduce.operator", largest, x, column, out=[((16, 10), F32), ((16, 1), F32)])


def test_costs() -> None:
    x, out = np.ones((4, 100), F32), [((4, 100), F32), ((4, 1), F32)]
    done = run(summed(COMMAND.reset_reduce), x, out=out)
    assert issued(done, "activation").cycles == 164
    assert issued(done, "activation").engine is nisa.engine.scalar
    assert issued(run(activation("exp"), x, out=out[:1]), "activation").cycles == 100


# activate2

TRN3 = {"target": "trn3"}
STAGES = [
    (nl.multiply, nl.add), (nl.multiply, nl.subtract), (nl.multiply, nl.bypass),
    (nl.add, nl.bypass), (nl.subtract, nl.bypass), (nl.bypass, nl.bypass),
]  # fmt: skip
NUMPY = {"multiply": np.multiply, "add": np.add, "subtract": np.subtract}


@pytest.mark.parametrize("ops", STAGES, ids=str)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("as_tile", [False, True])
def test_activate2(ops: tuple[Any, Any], reverse: bool, as_tile: bool) -> None:
    x, both = normal(16, 9), normal(16, 2, seed=1)
    reverses = [reverse and op is not nl.bypass for op in ops]

    def body(dst, x, both):
        operands = (both[:, 0], both[:, 1]) if as_tile else (2.0, -0.5)
        nisa.activate2(dst, nl.tanh, x, *operands, *ops, reverse0=reverses[0], reverse1=reverses[1])

    got = results(body, x, both, out=[((16, 9), F32)], **TRN3)
    operands = (both[:, :1], both[:, 1:]) if as_tile else (F32(2.0), F32(-0.5))
    want = x
    for op, operand, swapped in zip(ops, operands, reverses, strict=True):
        if op is not nl.bypass:
            pair = (operand, want) if swapped else (want, operand)
            want = NUMPY[op.name](*pair)
    np.testing.assert_array_equal(got, np.tanh(want))


@pytest.mark.parametrize("as_tile", [False, True])
def test_prelu_slope(as_tile: bool) -> None:
    x, column = normal(16, 9), normal(16, 1, seed=1)

    def body(dst, x, column):
        slope = column if as_tile else 0.25
        nisa.activate2(dst, nl.prelu, x, 0.0, 0.0, nl.bypass, nl.bypass, relu_param=slope)

    got = results(body, x, column, out=[((16, 9), F32)], **TRN3)
    np.testing.assert_array_equal(got, np.where(x < 0, x * (column if as_tile else F32(0.25)), x))


def last_of_magnitude(x: np.ndarray, largest: bool) -> np.ndarray:
    size = np.abs(x)
    end = size.max(1, keepdims=True) if largest else size.min(1, keepdims=True)
    return np.array([row[np.flatnonzero(hit)[-1]] for row, hit in zip(x, size == end, strict=True)])


@pytest.mark.parametrize(
    ("name", "fold"),
    [
        ("add", lambda x: x.sum(1)),
        ("maximum", lambda x: x.max(1)),
        ("minimum", lambda x: x.min(1)),
        ("abs_max", lambda x: last_of_magnitude(x, True)),
        ("abs_min", lambda x: last_of_magnitude(x, False)),
    ],
)
def test_activate2_reductions(name: str, fold: Callable[..., Any]) -> None:
    x = integers(32, 14, dtype=np.int32, low=-5, high=6).astype(F32)

    def body(dst, total, x):
        for half, what in ((slice(0, 7), COMMAND.reset_reduce), (slice(7, 14), COMMAND.reduce)):
            nisa.activate2(
                dst[:, half], nl.copy, x[:, half], 0.0, 0.0, nl.bypass, nl.bypass,
                reduce_op=getattr(nl, name), reduce_cmd=what,
                reduce_res=total if half.stop == 14 else None,
            )  # fmt: skip

    _, total = results(body, x, out=[((32, 14), F32), ((32, 1), F32)], **TRN3)
    np.testing.assert_array_equal(total[:, 0], fold(x))


def test_activate2_refusals() -> None:
    x, out = normal(8, 7), [((8, 7), F32)]

    def body(op0: Any = nl.multiply, op1: Any = nl.add, **kwargs: Any) -> Callable[..., None]:
        return lambda dst, x: nisa.activate2(dst, nl.exp, x, 1.0, 1.0, op0, op1, **kwargs)

    results(body(), x, out=out, **TRN3)
    refused("activate2.target", body(), x, out=out)
    refused("activate2.operators", body(nl.add, nl.multiply), x, out=out, **TRN3)
    refused("activate2.operators", body(nl.bypass, nl.add), x, out=out, **TRN3)
    results(body(None, None), x, out=out, **TRN3)
    refused("activate2.reverse", body(None, None, reverse0=True), x, out=out, **TRN3)
    refused("activate2.reverse", body(nl.add, None, reverse1=True), x, out=out, **TRN3)
    folds = body(reduce_op=nl.multiply, reduce_cmd=COMMAND.reset_reduce)
    refused("activate2.operator", folds, x, out=out, **TRN3)
    refused("activate2.reduce-cmd", body(reduce_cmd=COMMAND.load_reduce), x, out=out, **TRN3)

    def mixed(dst, x, a, b):
        nisa.activate2(dst, nl.exp, x, a, b, nl.multiply, nl.add)

    a = normal(8, 1)
    results(mixed, x, a, a, out=out, **TRN3)
    refused("activate2.operand-dtype", mixed, x, a, a.astype(BF16), out=out, **TRN3)
