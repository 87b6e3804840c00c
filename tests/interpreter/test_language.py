"""Functions of `nki.language` on tiles, against NumPy."""

import math
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_tkg.nki import interpreter
from jax_tkg.nki.interpreter import isa as nisa
from jax_tkg.nki.interpreter import language as nl
from jax_tkg.nki.interpreter.errors import NkiError

Function = Callable[..., Any]


def evaluate(function: Function, *arrays: np.ndarray, **options: Any) -> Any:
    """The result of a function of tiles, which are loaded from arrays."""

    def kernel(inputs):
        result = function(*(nl.load(x) for x in inputs))
        if result.is_on_chip and result.buffer == nl.psum:
            result = nl.copy(result)
        out = nl.ndarray(result.shape, result.dtype, nl.shared_hbm)
        nisa.dma_copy(out, result)
        return out

    return interpreter.run(kernel, arrays, **options).outputs


def refuses(rule: str, function: Function, *arrays: np.ndarray, **options: Any) -> None:
    with pytest.raises(NkiError) as caught:
        evaluate(function, *arrays, **options)
    assert caught.value.rule == rule


def close(found: np.ndarray, wanted: np.ndarray, rtol: float = 2e-6, atol: float = 1e-6) -> None:
    assert found.shape == wanted.shape
    np.testing.assert_allclose(
        found.astype(np.float64), wanted.astype(np.float64), rtol=rtol, atol=atol
    )


RNG = np.random.default_rng(7)
A = RNG.uniform(-4, 4, (8, 12)).astype(np.float32)
B = RNG.uniform(-4, 4, (8, 12)).astype(np.float32)
WHOLE = RNG.integers(-100, 100, (8, 12)).astype(np.int32)
OTHER = RNG.integers(-100, 100, (8, 12)).astype(np.int32)
COLUMN = RNG.uniform(-4, 4, (8, 1)).astype(np.float32)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


erf = np.vectorize(math.erf)
phi = lambda x: np.exp(-x * x / 2) / math.sqrt(2 * math.pi)  # noqa: E731
cdf = lambda x: (1 + erf(x / math.sqrt(2))) / 2  # noqa: E731

UNARY: dict[str, Function] = {
    "abs": np.abs,
    "square": np.square,
    "negative": np.negative,
    "sign": np.sign,
    "exp": np.exp,
    "tanh": np.tanh,
    "sigmoid": sigmoid,
    "relu": lambda x: np.maximum(x, 0),
    "gelu": lambda x: x * cdf(x),
    "gelu_dx": lambda x: cdf(x) + x * phi(x),
    "gelu_apprx_tanh": lambda x: (
        x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    ),
    "gelu_apprx_sigmoid": lambda x: x * sigmoid(1.702 * x),
    "gelu_apprx_sigmoid_dx": lambda x: (
        sigmoid(1.702 * x) * (1 + 1.702 * x * (1 - sigmoid(1.702 * x)))
    ),
    "silu": lambda x: x * sigmoid(x),
    "silu_dx": lambda x: sigmoid(x) * (1 + x * (1 - sigmoid(x))),
    "softplus": lambda x: np.log1p(np.exp(x)),
    "mish": lambda x: x * np.tanh(np.log1p(np.exp(x))),
    "erf": erf,
    "erf_dx": lambda x: 2 / math.sqrt(math.pi) * np.exp(-x * x),
    "reciprocal": lambda x: 1 / x,
    "copy": lambda x: x,
    "arctan": np.arctan,
    "floor": np.floor,
    "ceil": np.ceil,
    "trunc": np.trunc,
    "sin": np.sin,
    "cos": np.cos,
    "tan": np.tan,
}
POSITIVE = {"log": np.log, "sqrt": np.sqrt, "rsqrt": lambda x: 1 / np.sqrt(x)}


@pytest.mark.parametrize("name", [*UNARY, *POSITIVE])
def test_unary(name: str) -> None:
    x = np.abs(A) + 0.01 if name in POSITIVE else A
    wanted = (UNARY | POSITIVE)[name](x.astype(np.float64))
    close(evaluate(getattr(nl, name), x), wanted, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("name", [*UNARY, *POSITIVE])
def test_unary_takes_a_dtype_and_keeps_that_of_the_tile(name: str) -> None:
    x = (np.abs(A) + 0.5).astype(ml_dtypes.bfloat16)
    kept = evaluate(getattr(nl, name), x)
    assert kept.dtype == ml_dtypes.bfloat16
    wide = evaluate(lambda t: getattr(nl, name)(t, dtype=nl.float32), x)
    assert wide.dtype == np.float32
    np.testing.assert_array_equal(wide.astype(ml_dtypes.bfloat16), kept)


BINARY: dict[str, Function] = {
    "add": np.add,
    "subtract": np.subtract,
    "multiply": np.multiply,
    "divide": np.divide,
    "maximum": np.maximum,
    "minimum": np.minimum,
    "equal": np.equal,
    "not_equal": np.not_equal,
    "less": np.less,
    "less_equal": np.less_equal,
    "greater": np.greater,
    "greater_equal": np.greater_equal,
    "logical_and": np.logical_and,
    "logical_or": np.logical_or,
    "logical_xor": np.logical_xor,
    "mod": np.mod,
    "fmod": np.fmod,
}
WHOLE_A, WHOLE_B = np.rint(A), np.where(np.rint(B) == 0, 1, np.rint(B)).astype(np.float32)


@pytest.mark.parametrize("name", BINARY)
def test_binary(name: str) -> None:
    function = getattr(nl, name)
    for x, y in ((A, B), (WHOLE_A, WHOLE_B)):
        close(evaluate(function, x, y), BINARY[name](x, y))
        # One value a partition, on either side, and a number.
        close(evaluate(function, x, COLUMN), BINARY[name](x, COLUMN))
        close(evaluate(function, COLUMN, y), BINARY[name](COLUMN, y))
        close(evaluate(lambda t: function(t, 2.5), x), BINARY[name](x, np.float32(2.5)))
        close(evaluate(lambda t: function(-1.5, t), y), BINARY[name](np.float32(-1.5), y))


def test_power() -> None:
    close(evaluate(nl.power, np.abs(A), B), np.power(np.abs(A), B), rtol=1e-5)
    close(evaluate(lambda t: nl.power(t, 3), A), A**3, rtol=1e-5)


@pytest.mark.parametrize("name", ["bitwise_and", "bitwise_or", "bitwise_xor"])
@pytest.mark.parametrize("dtype", ["int32", "uint8"])
def test_bitwise(name: str, dtype: str) -> None:
    x, y = WHOLE.astype(dtype), OTHER.astype(dtype)
    np.testing.assert_array_equal(evaluate(getattr(nl, name), x, y), getattr(np, name)(x, y))
    found = evaluate(lambda t: getattr(nl, name)(t, 12), x)
    np.testing.assert_array_equal(found, getattr(np, name)(x, np.array(12, dtype)))


@pytest.mark.parametrize("dtype", ["int32", "uint32", "int8", "uint8"])
def test_invert_and_shifts(dtype: str) -> None:
    x = WHOLE.astype(dtype)
    np.testing.assert_array_equal(evaluate(nl.invert, x), np.invert(x))
    found = evaluate(lambda t: nl.left_shift(t, 2), x)
    np.testing.assert_array_equal(found, np.left_shift(x, np.array(2, dtype)))
    unsigned = x.view(f"u{x.itemsize}")
    found = evaluate(lambda t: nl.right_shift(t, 3), unsigned)
    np.testing.assert_array_equal(found, unsigned >> np.array(3, unsigned.dtype))


def test_logical_not_of_truth_values() -> None:
    x = (A > 0).astype(np.float32)
    np.testing.assert_array_equal(evaluate(nl.logical_not, x), 1 - x)


def test_magnitudes_compare_on_trn3_and_keep_their_sign() -> None:
    x, y = np.float32([[-5, 1, 2, -1]]), np.float32([[3, -1, -7, -0.5]])
    found = evaluate(nl.abs_max, x, y, target="trn3")
    np.testing.assert_array_equal(found, [[-5, -1, -7, -1]])
    found = evaluate(nl.abs_min, x, y, target="trn3")
    np.testing.assert_array_equal(found, [[3, -1, 2, -0.5]])
    refuses("tensor_tensor.operator-target", nl.abs_max, x, y, target="trn2")


def test_free_axes_of_one_repeat() -> None:
    x, y = A.reshape(8, 3, 4), B.reshape(8, 3, 4)[:, :1]
    close(evaluate(nl.add, x, y), x + y)
    close(evaluate(nl.add, y, x), x + y)
    close(evaluate(nl.add, x[:, :, :1], y), x[:, :, :1] + y)
    half = COLUMN.astype(np.float16)
    close(evaluate(nl.add, x, half), x + half.astype(np.float32)[..., None])
    refuses("add.shape", nl.add, A, B[:, :5])
    refuses("add.shape", nl.add, A, B[:4])
    refuses("add.shape", nl.add, x, B)


@pytest.mark.parametrize(
    ("left", "right", "result"),
    [
        ("float32", "bfloat16", "float32"),
        ("float16", "bfloat16", "float32"),
        ("bfloat16", "int32", "bfloat16"),
        ("int8", "int32", "int32"),
    ],
)
def test_types_of_two_operands(left: str, right: str, result: str) -> None:
    found = []

    def function(x, y):
        total = nl.add(x, y)
        found.append(str(total.dtype))
        return total

    x, y = (
        np.ones((2, 4)).astype(ml_dtypes.bfloat16 if n == "bfloat16" else n) for n in (left, right)
    )
    close(evaluate(function, x, y), np.full((2, 4), 2.0))
    assert found == [result]


def test_operands_are_checked() -> None:
    refuses("exp.operand", lambda t: nl.exp(2.0), A)
    refuses("add.operand", lambda t: nl.add(1.0, 2.0), A)
    with pytest.raises(TypeError, match="argument: 'y'"):
        evaluate(lambda t: nl.add(t), A)

    def kernel(x):
        nl.exp(x)

    with pytest.raises(NkiError, match=r"nl\.load it first.*exp\.buffer"):
        interpreter.run(kernel, A)


def test_arguments_have_their_documented_names() -> None:
    close(evaluate(lambda x, y: nl.subtract(y=y, x=x, dtype=nl.float32), A, B), A - B)
    assert evaluate(lambda x: nl.exp(x, nl.float16), A).dtype == np.float16
    assert evaluate(lambda x, y: nl.add(x, y, nl.float16), A, B).dtype == np.float16


@settings(max_examples=15)
@given(st.lists(st.floats(-1e4, 1e4, width=32), min_size=48, max_size=48))
def test_sine_and_cosine_of_large_arguments(values: list[float]) -> None:
    x = np.float32([values])
    close(evaluate(nl.sin, x), np.sin(x.astype(np.float64)), atol=3e-6)
    close(evaluate(nl.cos, x), np.cos(x.astype(np.float64)), atol=3e-6)


@settings(max_examples=15)
@given(st.lists(st.floats(width=32, allow_subnormal=False), min_size=48, max_size=48))
def test_rounding_and_arctan_of_every_float(values: list[float]) -> None:
    x = np.float32([values])
    for name in ("floor", "ceil", "trunc"):
        np.testing.assert_array_equal(evaluate(getattr(nl, name), x), getattr(np, name)(x))
    finite = np.nan_to_num(x)
    close(evaluate(nl.arctan, finite), np.arctan(finite), atol=3e-7)


NUMBERS = st.integers(-1000, 1000)


@settings(max_examples=15)
@given(
    st.lists(NUMBERS, min_size=48, max_size=48),
    st.lists(NUMBERS.filter(bool), min_size=48, max_size=48),
)
def test_remainders_of_whole_numbers_are_exact(top: list[int], bottom: list[int]) -> None:
    x, y = np.float32([top]), np.float32([bottom])
    np.testing.assert_array_equal(evaluate(nl.mod, x, y), np.mod(x, y))
    np.testing.assert_array_equal(evaluate(nl.fmod, x, y), np.fmod(x, y))


def test_remainders_stay_inside_where_the_quotient_rounds_up() -> None:
    y = RNG.uniform(0.1, 10, (1, 2000)).astype(np.float32)
    multiple = RNG.integers(1, 50, y.shape).astype(np.float32) * y
    for x in (multiple, np.nextafter(multiple, np.float32(0))):
        for name in ("mod", "fmod"):
            found = evaluate(getattr(nl, name), x, y)
            assert ((found >= 0) & (found < y)).all()
            off = np.abs(found.astype(np.float64) - np.fmod(x.astype(np.float64), y))
            assert (np.minimum(off, y - off) < 1e-4).all()


# Reductions.

X3 = RNG.uniform(-2, 2, (4, 3, 5)).astype(np.float32)
REDUCTIONS: dict[str, Function] = {
    "sum": np.sum,
    "max": np.max,
    "min": np.min,
    "mean": np.mean,
    "prod": np.prod,
}


@pytest.mark.parametrize("name", REDUCTIONS)
@pytest.mark.parametrize("axis", [2, -1, (1, 2), [-2, -1]])
@pytest.mark.parametrize("keepdims", [False, True])
def test_reductions(name: str, axis: Any, keepdims: bool) -> None:
    function = REDUCTIONS[name]
    axes = axis if isinstance(axis, int) else tuple(axis)
    wanted = function(X3, axis=axes, keepdims=keepdims)
    found = evaluate(lambda t: getattr(nl, name)(t, axis, keepdims=keepdims), X3)
    close(found, wanted.reshape(4, 1) if wanted.ndim == 1 else wanted)


def test_variance_keeps_its_axes() -> None:
    close(evaluate(lambda t: nl.var(t, 2), X3), np.var(X3, axis=2, keepdims=True))
    close(evaluate(lambda t: nl.var(t, (1, 2)), X3), np.var(X3, axis=(1, 2), keepdims=True))


def test_all() -> None:
    x = np.float32([[1, 1, 0], [1, 2, 3]])
    np.testing.assert_array_equal(evaluate(lambda t: nl.all(t, 1), x), [[0], [1]])


def test_a_mean_is_summed_in_float32() -> None:
    x = np.full((2, 4096), 100.0, np.float16)  # a float16 ends at 65504
    assert evaluate(lambda t: nl.mean(t, 1), x).tolist() == [[100], [100]]


@pytest.mark.parametrize("name", [*REDUCTIONS, "var", "all", "softmax"])
def test_reductions_end_at_the_last_axis(name: str) -> None:
    function = getattr(nl, name)
    for axis in (0, 1, (0, 1, 2), (), (2, 2)):
        refuses(f"{name}.axis", lambda t, axis=axis: function(t, axis), X3)
    evaluate(lambda t: function(t, (2, 1)), X3)


def test_softmax() -> None:
    def wanted(x, axis):
        powers = np.exp(x - x.max(axis, keepdims=True))
        return powers / powers.sum(axis, keepdims=True)

    close(evaluate(nl.softmax, 30 * X3), wanted(30 * X3, -1), atol=1e-7)
    close(evaluate(lambda t: nl.softmax(t, (1, 2)), X3), wanted(X3, (1, 2)))
    assert evaluate(lambda t: nl.softmax(t, dtype=nl.bfloat16), A).dtype == ml_dtypes.bfloat16


def test_rms_norm() -> None:
    w = RNG.uniform(0.5, 2, (8, 12)).astype(np.float32)
    wanted = A / np.sqrt((A * A).mean(1, keepdims=True) + 1e-3) * w
    close(evaluate(lambda x, w: nl.rms_norm(x, w, 1, 12, 1e-3), A, w), wanted)
    half = evaluate(lambda x, w: nl.rms_norm(x, w, 1, 12, 1e-3, compute_dtype=nl.bfloat16), A, w)
    close(half, wanted, rtol=0.03)
    assert not np.allclose(half, wanted, rtol=1e-4)


def test_where() -> None:
    condition = (A > 0).astype(np.float32)
    close(evaluate(nl.where, condition, A, B), np.where(A > 0, A, B))
    close(evaluate(lambda c, x: nl.where(c, x, -1.0), condition, B), np.where(A > 0, B, -1))
    close(evaluate(lambda c, x: nl.where(c, 7.0, x), condition, B), np.where(A > 0, 7, B))
    close(evaluate(nl.where, condition[:, :1], A, B), np.where(A[:, :1] > 0, A, B))
    mixed = evaluate(nl.where, condition, A.astype(np.float16), B)
    close(mixed, np.where(A > 0, A.astype(np.float16), B))
    refuses("where.operand", lambda c: nl.where(c, 1.0, 0.0), condition)
    refuses("where.shape", nl.where, condition, A, B[:, :5])
    refuses("where.shape", nl.where, condition, A.reshape(8, 3, 4), B)


def test_exact_mode_rounds_nothing() -> None:
    x = A.astype(ml_dtypes.bfloat16)
    wide = x.astype(np.float32)
    for name in ("exp", "sin", "floor", "arctan"):
        found = evaluate(lambda t, name=name: getattr(nl, name)(t), x, exact=True)
        close(found, UNARY[name](wide).astype(ml_dtypes.bfloat16))
    steps = evaluate(lambda t: nl.subtract(nl.multiply(t, 1.001), t, nl.float32), x, exact=True)
    close(steps, wide * np.float32(1.001) - wide)
    rounded = evaluate(lambda t: nl.subtract(nl.multiply(t, 1.001), t, nl.float32), x)
    assert not np.allclose(rounded, steps)
